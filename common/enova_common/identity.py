"""Who a program is: a role and a name, written into its certificate as spiffe://enova/ROLE/NAME."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from enova_common.errors import InvalidField

TRUST_DOMAIN = "spiffe://enova/"
# Also a DNS label, so that a node's name can be its host's name.
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?", re.ASCII)


class Role(StrEnum):
    """What the bearer of a certificate is."""

    COORDINATOR = "coordinator"
    AGENT = "agent"
    INGRESS = "ingress"
    ETCD = "etcd"
    USER = "user"


@dataclass(frozen=True, slots=True)
class Identity:
    """A role and the name of who has it; an agent's and an ingress's name is its node's."""

    role: Role
    name: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidField(
                f"{self.name!r} is not a name",
                field="name",
                remedy="1 to 63 of a-z, 0-9, '.', '_' and '-', beginning and ending with a letter or digit",
            )

    @property
    def uri(self) -> str:
        """The URI that a certificate bears."""
        return f"{TRUST_DOMAIN}{self.role.value}/{self.name}"

    def __str__(self) -> str:
        return f"{self.role.value}/{self.name}"


def parse_identity(uri: str) -> Identity | None:
    """The identity that a URI names; None if it names none of ours."""
    if not uri.startswith(TRUST_DOMAIN):
        return None
    role, _, name = uri.removeprefix(TRUST_DOMAIN).partition("/")
    if role not in set(Role):
        return None
    try:
        return Identity(Role(role), name)
    except InvalidField:
        return None
