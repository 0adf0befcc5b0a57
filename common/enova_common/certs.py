"""The fleet's certificates: an authority, what it issues, and why a certificate is not good.

gRPC says only "Socket closed" or "handshake failed" when a certificate is refused, and the reason stays at the other
end. So every program checks its own files before it uses them, and says what is wrong and what to do.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from enova_common.errors import AlreadyExists, CallerError, InvalidField, NotFound
from enova_common.identity import TRUST_DOMAIN, Identity, Role, parse_identity
from enova_common.settings import TlsSettings

__all__ = ["CertificateFacts", "Issued", "Role", "check_certificate", "check_tls", "init_authority", "issue"]

BACKDATE = timedelta(minutes=5)  # hosts' clocks differ a little: a fresh certificate must be good at once
DAYS_MAX = 36500
SERVING_ROLES = frozenset({Role.COORDINATOR, Role.INGRESS, Role.ETCD})
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """The two files of a certificate."""

    certificate_path: Path
    key_path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFacts:
    """What a good certificate says."""

    identity: Identity | None
    hosts: tuple[str, ...]
    not_before_unix_s: float
    not_after_unix_s: float


class BadCertificate(CallerError):
    """A certificate or key that cannot be used; the message says why."""

    reason = "BAD_CERTIFICATE"


def init_authority(directory: Path, *, name: str = "enova", days: int = 3650) -> Issued:
    """Creates the authority, ca.crt and ca.key, in `directory`; never over an existing one."""
    _check_days(days)
    files = Issued(certificate_path=directory / "ca.crt", key_path=directory / "ca.key")
    for path in (files.key_path, files.certificate_path):
        if path.exists():
            raise AlreadyExists(
                f"{path} exists", field="dir", remedy="a new authority would cut off the fleet; use another directory"
            )
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name)])
    usage = _key_usage(signs_certificates=True)
    builder = _builder(subject, subject, key.public_key(), days).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    certificate = builder.add_extension(usage, critical=True).sign(key, hashes.SHA256())
    _write(files, key, [certificate])
    return files


def issue(directory: Path, role: Role, name: str, *, hosts: Sequence[str] = (), days: int = 90) -> Issued:
    """Issues ROLE-NAME.crt and .key by the authority in `directory`; replaces an earlier one of that name.

    `hosts` are the DNS names and addresses it serves under; roles that serve are good for the loopback as well.
    """
    _check_days(days)
    identity = Identity(role, name)
    authority, authority_key = _load_authority(directory)
    if authority.not_valid_after_utc < datetime.now(UTC) + timedelta(days=days):
        raise InvalidField(
            f"{days} days is past the end of the authority's own certificate, {authority.not_valid_after_utc:%Y-%m-%d}",
            field="days",
            remedy="ask for fewer days",
        )
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "enova"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role.value),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    loopback = LOOPBACK_HOSTS if role in SERVING_ROLES else ()
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *loopback])]
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role is not Role.USER:
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    certificate = (
        _builder(subject, authority.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri), *names]), critical=False
        )
        .add_extension(_authority_identifier(authority), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    files = Issued(certificate_path=directory / f"{role}-{name}.crt", key_path=directory / f"{role}-{name}.key")
    _write(files, key, [certificate])
    return files


def check_certificate(path: Path, now: float, *, ca: Path | None = None) -> CertificateFacts:
    """What the certificate in `path` says; raises BadCertificate with the reason if it is not good at `now`."""
    chain = _load_certificates(path)
    leaf = chain[0]
    at = datetime.fromtimestamp(now, UTC)
    if at > leaf.not_valid_after_utc:
        raise _bad(path, f"expired at {leaf.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC", "EXPIRED", "issue a new one")
    if at < leaf.not_valid_before_utc:
        raise _bad(
            path,
            f"not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC",
            "NOT_YET_VALID",
            "look at this host's clock",
        )
    if ca is not None:
        _check_issuers(path, chain, ca, at)
    uris, hosts = _alternative_names(leaf)
    return CertificateFacts(
        identity=next(filter(None, map(parse_identity, uris)), None),
        hosts=hosts,
        not_before_unix_s=leaf.not_valid_before_utc.timestamp(),
        not_after_unix_s=leaf.not_valid_after_utc.timestamp(),
    )


def check_tls(tls: TlsSettings, now: float) -> CertificateFacts:
    """Checks all three files together: dates, issuer, the key's fit and its permissions, the identity."""
    facts = check_certificate(tls.cert, now, ca=tls.ca)
    key = _load_key(tls.key)
    if key.public_key() != _load_certificates(tls.cert)[0].public_key():
        raise _bad(tls.key, f"is not the key of {tls.cert}", "KEY_MISMATCH", "give the two files of one issue")
    if stat.S_IMODE(tls.key.stat().st_mode) & stat.S_IRWXO:
        raise _bad(tls.key, "can be read by every user of this host", "KEY_EXPOSED", f"chmod 600 {tls.key}")
    if facts.identity is None:
        remedy = "issue it by enova certs issue, or give it that URI among its subject alternative names"
        raise _bad(tls.cert, f"names no {TRUST_DOMAIN}ROLE/NAME", "NO_IDENTITY", remedy)
    return facts


def _check_issuers(path: Path, chain: Sequence[x509.Certificate], ca: Path, at: datetime) -> None:
    """Each certificate by the next in the file, and the last by one of the trusted ones."""
    for certificate, issuer in itertools.pairwise(chain):
        if not _is_issued_by(certificate, issuer):
            raise _bad(path, "its certificates are not in order, each issued by the next", "WRONG_CHAIN", "reorder it")
    trusted = _load_certificates(ca)
    issuers = [root for root in trusted if _is_issued_by(chain[-1], root)]
    if not issuers:
        remedy = "give the ca.crt of the authority that issued it, or issue it anew by this one"
        raise _bad(path, f"was not issued by the authority in {ca}", "WRONG_AUTHORITY", remedy)
    if all(at > root.not_valid_after_utc for root in issuers):
        ended = issuers[0].not_valid_after_utc
        raise _bad(ca, f"the authority expired at {ended:%Y-%m-%d} UTC", "EXPIRED", "make a new authority")


def _is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _alternative_names(certificate: x509.Certificate) -> tuple[list[str], tuple[str, ...]]:
    """The URIs, and the DNS names and addresses."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return [], ()
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    hosts = (*names.get_values_for_type(x509.DNSName), *addresses)
    return names.get_values_for_type(x509.UniformResourceIdentifier), hosts


def _load_certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError:
        raise _bad(path, "is not a certificate in PEM", "UNREADABLE", "give the .crt file") from None


def _load_key(path: Path) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError):
        raise _bad(path, "is not a private key in PEM without a password", "UNREADABLE", "give the .key file") from None


def _load_authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key_path = directory / "ca.key"
    if not key_path.exists():
        raise NotFound(f"there is no authority in {directory}", field="dir", remedy="make one by enova certs init")
    key = _load_key(key_path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _bad(key_path, "is not an elliptic-curve key", "UNREADABLE", "use an authority of enova certs init")
    return _load_certificates(directory / "ca.crt")[0], key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        remedy = "name an existing file that this user may read"
        raise _bad(path, error.strerror or str(error), "UNREADABLE", remedy) from error


def _bad(path: Path, problem: str, why: str, remedy: str) -> BadCertificate:
    return BadCertificate(f"{path}: {problem}", remedy=remedy, metadata={"path": str(path), "why": why})


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _authority_identifier(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier.value)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):  # then it is not an address but a name
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    if not host or not host.isascii() or any(character.isspace() or character in ":/" for character in host):
        raise InvalidField(f"{host!r} is neither a DNS name nor an address", field="host", remedy="leave out the port")
    return x509.DNSName(host)


def _check_days(days: int) -> None:
    if not 1 <= days <= DAYS_MAX:
        raise InvalidField(f"{days} is not between 1 and {DAYS_MAX}", field="days")


def _write(files: Issued, key: ec.EllipticCurvePrivateKey, chain: Sequence[x509.Certificate]) -> None:
    files.key_path.parent.mkdir(parents=True, exist_ok=True)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _replace(files.key_path, private, 0o600)
    _replace(files.certificate_path, b"".join(c.public_bytes(serialization.Encoding.PEM) for c in chain), 0o644)


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Writes a file whole or not at all; it never exists with more permissions than `mode`."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # made with 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
