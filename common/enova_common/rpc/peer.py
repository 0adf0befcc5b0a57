"""Who is at the other end of a call: by its certificate, or somebody on this host in plaintext."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from enova_common.errors import Denied, Unauthenticated
from enova_common.identity import Identity, Role, parse_identity

_NAMES_KEYS = ("x509_subject_alternative_name", "peer_uri", "peer_spiffe_id")


class CallContext(Protocol):
    """The part of a servicer's context that says who calls."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """What the transport authenticated."""
        ...


@dataclass(frozen=True, slots=True)
class Peer:
    """`identity` is None for plaintext, which is served on the loopback only: whoever is on this host."""

    identity: Identity | None

    def require(self, *roles: Role) -> None:
        """Raises Denied unless the peer has one of the roles; plaintext on the loopback has all."""
        if self.identity is not None and self.identity.role not in roles:
            wanted = " or ".join(role.value for role in roles)
            raise Denied(
                f"{self.identity} may not do this",
                reason="WRONG_ROLE",
                remedy=f"use a certificate of the role {wanted}",
                metadata={"identity": str(self.identity)},
            )

    def require_name(self, role: Role, name: str) -> None:
        """Raises Denied unless the peer is exactly that one: a node may speak for itself alone."""
        self.require(role)
        if self.identity is not None and self.identity.name != name:
            raise Denied(
                f"{self.identity} may not speak for {role.value}/{name}",
                reason="WRONG_IDENTITY",
                remedy=f"use the certificate of {role.value} {name}, or call the node {self.identity.name}",
                metadata={"identity": str(self.identity), "claimed": name},
            )


def peer_identity(context: CallContext) -> Peer:
    """The caller. Raises Unauthenticated if its certificate names no identity of this fleet."""
    facts = context.auth_context()
    if b"ssl" not in list(facts.get("transport_security_type", ())):
        return Peer(None)
    for key in _NAMES_KEYS:
        for name in facts.get(key, ()):
            identity = parse_identity(name.decode("utf-8", "replace"))
            if identity is not None:
                return Peer(identity)
    remedy = "issue it by enova certs issue"
    raise Unauthenticated("the certificate names no spiffe://enova/ROLE/NAME", reason="NO_IDENTITY", remedy=remedy)
