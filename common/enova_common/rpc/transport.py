"""Channels and servers with enova's limits, and transport security: mutual TLS, plaintext on the loopback alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from enova_common.address import Address, parse_address
from enova_common.errors import CallerError
from enova_common.ports import cannot_listen, check_listenable
from enova_common.rpc.interceptor import DEFAULT_TIMEOUT_S, ErrorInterceptor
from enova_common.settings import TlsSettings

MESSAGE_BYTES_MAX = 4 << 20      # a frame of 8 GPUs and 64 replicas is under 100 kB; more is a defect or an attack
STREAMS_PER_CONNECTION_MAX = 100
RPCS_MAX = 4096                  # 1,000 agents' streams and as many calls; bounds what a flood of resets can hold
KEEPALIVE_TIME_MS = 5_000        # a dead path is found in 8 s, on either end, instead of in TCP's quarter of an hour
KEEPALIVE_TIMEOUT_MS = 3_000
PING_INTERVAL_MIN_MS = 4_000     # under the clients' 5 s, so that their pings are no strikes
PING_STRIKES_MAX = 100           # on a busy host pings pile up and come together: no reason to cut a call
RECONNECT_MIN_MS = 200
RECONNECT_MAX_MS = 2_000         # leaders change within 5 s; gRPC's own 120 s would sleep through it

_COMMON_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    *_COMMON_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", RECONNECT_MIN_MS),
    ("grpc.min_reconnect_backoff_ms", RECONNECT_MIN_MS),
    ("grpc.max_reconnect_backoff_ms", RECONNECT_MAX_MS),
    ("grpc.enable_http_proxy", 0),           # the control plane never goes through http_proxy of the environment
    ("grpc.use_local_subchannel_pool", 1),   # a new channel is a new connection, and reads new certificates
)
_SERVER_OPTIONS: tuple[tuple[str, Any], ...] = (
    *_COMMON_OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_INTERVAL_MIN_MS),
    ("grpc.http2.max_ping_strikes", PING_STRIKES_MAX),
    ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION_MAX),
    ("grpc.http2.bdp_probe", 0),             # else each stream's window grows to megabytes that a flood would fill
    ("grpc.so_reuseport", 0),                # two servers on one port are a mistake, not a load balancer
)


def open_channel(target: str, tls: TlsSettings | None = None) -> grpc.aio.Channel:
    """A channel to HOST:PORT, by mutual TLS where `tls` is given; plaintext to the loopback only.

    The files are checked and read at each call, so that a new channel uses renewed certificates.
    """
    address = parse_address(target, field="target")
    if tls is not None:
        return grpc.aio.secure_channel(str(address), _channel_credentials(tls), options=_CHANNEL_OPTIONS)
    _refuse_plaintext_off_loopback(address, "connect to")
    return grpc.aio.insecure_channel(str(address), options=_CHANNEL_OPTIONS)


def create_server(
    *,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    default_timeout_s: float = DEFAULT_TIMEOUT_S,
    rpcs_max: int = RPCS_MAX,
) -> grpc.aio.Server:
    """A server that maps errors and bounds messages, streams, calls and unary deadlines; `listen` gives it a port.

    Further interceptors run inside the one that maps errors, so that they may raise EnovaError themselves.
    """
    return grpc.aio.server(
        interceptors=(ErrorInterceptor(default_timeout_s=default_timeout_s), *interceptors),
        options=_SERVER_OPTIONS,
        maximum_concurrent_rpcs=rpcs_max,
    )


def listen(server: grpc.aio.Server, address: str, tls: TlsSettings | None = None) -> str:
    """Gives the server an address to listen on (port 0: any); the address with its port.

    Mutual TLS where `tls` is given: a client without a certificate of the fleet's authority is not served.
    """
    wanted = parse_address(address, field="listen")
    if tls is None:
        _refuse_plaintext_off_loopback(wanted, "listen on")
    check_listenable(wanted, field="listen")
    try:
        if tls is None:
            port = server.add_insecure_port(str(wanted))
        else:
            port = server.add_secure_port(str(wanted), _server_credentials(tls))
    except RuntimeError as error:
        raise cannot_listen(wanted, str(error), field="listen") from error
    return str(wanted) if wanted.is_unix else str(Address(wanted.host, port))


async def add_standard_services(server: grpc.aio.Server, services: Sequence[str]) -> health.aio.HealthServicer:
    """Adds grpc.health.v1 and reflection for `services` (full names).

    All are SERVING until the returned servicer's `set` or `enter_graceful_shutdown` says otherwise.
    """
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for name in services:
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return servicer


def _refuse_plaintext_off_loopback(address: Address, what: str) -> None:
    if not address.is_loopback:
        raise CallerError(
            f"refusing to {what} {address} in plaintext",
            reason="PLAINTEXT_REFUSED",
            field="tls",
            remedy="give tls.ca, tls.cert and tls.key (enova certs init, enova certs issue), or use 127.0.0.1",
            metadata={"address": str(address)},
        )


def _channel_credentials(tls: TlsSettings) -> grpc.ChannelCredentials:
    ca, key, cert = _checked_files(tls)
    return grpc.ssl_channel_credentials(ca, key, cert)


def _server_credentials(tls: TlsSettings) -> grpc.ServerCredentials:
    ca, key, cert = _checked_files(tls)
    return grpc.ssl_server_credentials([(key, cert)], root_certificates=ca, require_client_auth=True)


def _checked_files(tls: TlsSettings) -> tuple[bytes, bytes, bytes]:
    from enova_common import certs  # loads OpenSSL, 10 MB that a program without TLS does without

    certs.check_tls(tls, time.time())
    return tls.ca.read_bytes(), tls.key.read_bytes(), tls.cert.read_bytes()
