"""How to reach etcd, and what is refused before the first byte: plaintext away from this host."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from enova_common.address import parse_address
from enova_common.certs import check_certificate
from enova_common.errors import InvalidField


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdSettings:
    """Endpoints, certificates, user and deadlines of the etcd store."""

    endpoints: tuple[str, ...]
    """`host:port` of each member; names and addresses both work, and are what the certificates are checked against."""
    ca_file: Path | None = None
    """The authority that signed the members' certificates; needed unless every endpoint is on the loopback."""
    certificate_file: Path | None = None
    """The coordinator's own certificate, for etcd's --client-cert-auth."""
    key_file: Path | None = None
    """The key of that certificate."""
    username: str = ""
    """A user of etcd's own authentication; empty: none (with --client-cert-auth the certificate's CN is the user)."""
    password: str = field(default="", repr=False)
    """The password of that user."""
    call_timeout_s: float = 5.0
    """The deadline of a call with its retries: longer than an election of etcd's own leader takes (1 to 2 s)."""
    attempt_timeout_s: float = 2.0
    """The deadline of one try: a member that hangs costs this much before the next is asked."""


def check_settings(settings: EtcdSettings) -> None:
    """Refuse settings that cannot work or would send secrets in the clear."""
    if not settings.endpoints:
        raise InvalidField("no endpoint", field="endpoints", remedy="name at least one etcd member as host:port")
    for endpoint in settings.endpoints:
        address = parse_address(endpoint, field="endpoints")
        if settings.ca_file is None and not address.is_loopback:
            text = f"{endpoint} is not on this host and would be reached in plaintext"
            raise InvalidField(text, field="ca_file", remedy="set ca_file (and certificate_file, key_file)")
    if (settings.certificate_file is None) != (settings.key_file is None):
        raise InvalidField("a certificate goes with its key", field="certificate_file", remedy="set both or neither")
    if settings.certificate_file is not None and settings.ca_file is None:
        raise InvalidField("a client certificate needs TLS", field="ca_file", remedy="set ca_file")


def channel_credentials(settings: EtcdSettings) -> grpc.ChannelCredentials | None:
    """TLS with the files of the settings, read now; None for plaintext.

    Raises BadCertificate for one that is out of date: from the other side gRPC would only hear a closed connection.
    """
    if settings.ca_file is None:
        return None
    if settings.certificate_file is not None:
        check_certificate(settings.certificate_file, time.time())
    return grpc.ssl_channel_credentials(
        root_certificates=_read(settings.ca_file, "ca_file"),
        private_key=_read(settings.key_file, "key_file"),
        certificate_chain=_read(settings.certificate_file, "certificate_file"),
    )


def _read(path: Path | None, name: str) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidField(f"cannot read {path}: {error.strerror}", field=name) from error
