"""TLS contexts of the three kinds of connection: applications to us, ingresses to us, us to other ingresses."""

from __future__ import annotations

import ssl
from pathlib import Path

from enova_agent.ingress.settings import ServingTls
from enova_common.errors import InvalidField
from enova_common.settings import TlsSettings


def openai_context(files: ServingTls) -> ssl.SSLContext:
    """For applications."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # applications' clients are not ours to choose
    context.set_alpn_protocols(["http/1.1"])
    _load(context, files.cert, files.key, table="tls")
    return context


def hop_server_context(files: TlsSettings) -> ssl.SSLContext:
    """For other ingresses, who must show a certificate of the fleet."""
    return _hop_context(files, ssl.PROTOCOL_TLS_SERVER)


def hop_client_context(files: TlsSettings) -> ssl.SSLContext:
    """Towards other ingresses, whose certificate must name their node."""
    return _hop_context(files, ssl.PROTOCOL_TLS_CLIENT)


def _hop_context(files: TlsSettings, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the identity is the URI in the certificate, checked by whoever connects
    context.verify_mode = ssl.CERT_REQUIRED
    _load(context, files.cert, files.key, table="hop_tls")
    try:
        context.load_verify_locations(files.ca)
    except OSError as error:  # ssl.SSLError is one
        raise InvalidField(f"{files.ca}: {error}", field="hop_tls.ca", remedy="give a readable PEM file") from error
    return context


def _load(context: ssl.SSLContext, cert: Path, key: Path, *, table: str) -> None:
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:
        raise InvalidField(
            f"{cert} with {key}: {error}", field=f"{table}.cert", remedy="give readable PEM files that belong together"
        ) from error
