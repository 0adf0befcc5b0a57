"""gRPC as all programs use it: bounded, with deadlines, secure off the loopback, errors as enova's own.

`open_channel` and `create_server` / `listen` make both ends; `add_standard_services` adds health and reflection;
`error_from_rpc` gives a client the error that the server raised; `peer_identity` says who calls.
"""

from enova_common.rpc.interceptor import ErrorInterceptor
from enova_common.rpc.peer import Peer, peer_identity
from enova_common.rpc.status import error_from_rpc, error_from_status, grpc_code, status_from_error
from enova_common.rpc.transport import (
    MESSAGE_BYTES_MAX,
    add_standard_services,
    create_server,
    listen,
    open_channel,
)

__all__ = [
    "MESSAGE_BYTES_MAX",
    "ErrorInterceptor",
    "Peer",
    "add_standard_services",
    "create_server",
    "error_from_rpc",
    "error_from_status",
    "grpc_code",
    "listen",
    "open_channel",
    "peer_identity",
    "status_from_error",
]
