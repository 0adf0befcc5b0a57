"""Addresses as settings and flags give them: HOST:PORT, [IPV6]:PORT or unix:PATH; and which stay on this host."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from enova_common.errors import InvalidField

UNIX = "unix:"


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port, or, with port 0 and a host that begins with unix:, a socket's path."""

    host: str
    port: int

    @property
    def is_unix(self) -> bool:
        """Whether it is the path of a socket."""
        return self.host.startswith(UNIX)

    @property
    def is_loopback(self) -> bool:
        """Whether nobody outside this host can reach it; a name counts only if it is `localhost`."""
        if self.is_unix or self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            # What a name resolves to is decided elsewhere and may change: never a reason to trust it.
            return False

    def __str__(self) -> str:
        if self.is_unix:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, *, field: str = "address") -> Address:
    """The address that `text` gives; raises InvalidField naming `field`."""
    if text.startswith(UNIX) and len(text) > len(UNIX):
        return Address(text, 0)
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or "/" in bare or (":" in bare and bare == host):
        raise _invalid(text, field, "has no host")
    if not (port.isascii() and port.isdecimal() and int(port) <= 65535):
        raise _invalid(text, field, "has no port")
    return Address(bare, int(port))


def _invalid(text: str, field: str, problem: str) -> InvalidField:
    return InvalidField(f"{text!r} {problem}", field=field, remedy="give HOST:PORT, such as 127.0.0.1:7400")
