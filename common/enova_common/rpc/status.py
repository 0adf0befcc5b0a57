"""EnovaError to google.rpc.Status and back; what is raised at one end is raised again at the other.

The code follows from the kind of error, and each kind has a code of its own as far as the codes reach, so that the
kind survives the way. Reason, metadata, field and remedy travel in one ErrorInfo and, for a field, one BadRequest.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from enova_common.errors import (
    AlreadyExists,
    CallerError,
    Conflict,
    Corrupt,
    Denied,
    EnovaError,
    Exhausted,
    FatalError,
    InvalidField,
    NotFound,
    RetryableError,
    TimedOut,
    TooLarge,
    Unauthenticated,
    Unavailable,
)

DOMAIN = "enova"
DETAILS_KEY = "grpc-status-details-bin"
# Status travels in HTTP/2 trailers, which peers bound to 8 KiB, and twice: as text and in the details.
TEXT_CHARS_MAX = 1000
VALUE_CHARS_MAX = 300
METADATA_MAX = 12

_CODES: Mapping[type[EnovaError], grpc.StatusCode] = MappingProxyType(
    {
        InvalidField: grpc.StatusCode.INVALID_ARGUMENT,
        CallerError: grpc.StatusCode.INVALID_ARGUMENT,
        NotFound: grpc.StatusCode.NOT_FOUND,
        AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
        Conflict: grpc.StatusCode.FAILED_PRECONDITION,
        Denied: grpc.StatusCode.PERMISSION_DENIED,
        Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
        TooLarge: grpc.StatusCode.OUT_OF_RANGE,
        RetryableError: grpc.StatusCode.UNAVAILABLE,
        Unavailable: grpc.StatusCode.UNAVAILABLE,
        TimedOut: grpc.StatusCode.DEADLINE_EXCEEDED,
        Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
        Corrupt: grpc.StatusCode.DATA_LOSS,
        FatalError: grpc.StatusCode.INTERNAL,
        EnovaError: grpc.StatusCode.INTERNAL,
    }
)
_KINDS: Mapping[grpc.StatusCode, type[EnovaError]] = MappingProxyType(
    {
        grpc.StatusCode.INVALID_ARGUMENT: CallerError,
        grpc.StatusCode.NOT_FOUND: NotFound,
        grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
        grpc.StatusCode.FAILED_PRECONDITION: Conflict,
        grpc.StatusCode.ABORTED: Conflict,
        grpc.StatusCode.PERMISSION_DENIED: Denied,
        grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
        grpc.StatusCode.OUT_OF_RANGE: TooLarge,
        grpc.StatusCode.UNIMPLEMENTED: CallerError,
        grpc.StatusCode.UNAVAILABLE: Unavailable,
        grpc.StatusCode.CANCELLED: RetryableError,
        grpc.StatusCode.DEADLINE_EXCEEDED: TimedOut,
        grpc.StatusCode.RESOURCE_EXHAUSTED: Exhausted,
        grpc.StatusCode.DATA_LOSS: Corrupt,
    }
)
_GRPC_CODES: Mapping[int, grpc.StatusCode] = MappingProxyType({code.value[0]: code for code in grpc.StatusCode})


def grpc_code(error: EnovaError) -> grpc.StatusCode:
    """The code of an error's kind: that of its nearest ancestor which has one."""
    return next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)


def status_from_error(error: EnovaError) -> status_pb2.Status:
    """The error as a google.rpc.Status with one ErrorInfo and, where it names a field, one BadRequest."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    for key, value in list(error.metadata.items())[:METADATA_MAX]:
        info.metadata[key] = _cut(str(value), VALUE_CHARS_MAX)
    if error.remedy:
        info.metadata["remedy"] = _cut(error.remedy, VALUE_CHARS_MAX)
    if error.field:
        info.metadata["field"] = _cut(error.field, VALUE_CHARS_MAX)
    message = _cut(error.message, TEXT_CHARS_MAX)
    status = status_pb2.Status(code=grpc_code(error).value[0], message=message)
    status.details.add().Pack(info)
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_cut(error.field, VALUE_CHARS_MAX), description=_cut(error.message, VALUE_CHARS_MAX)
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    return status


def error_from_status(status: status_pb2.Status) -> EnovaError:
    """The error that a status stands for."""
    code = _GRPC_CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return _error(code, status.message, _info(status))


def error_from_rpc(error: grpc.RpcError) -> EnovaError:
    """The error that a failed call stands for: the server's own, or what gRPC says of the transport."""
    if not isinstance(error, grpc.aio.AioRpcError | grpc.Call):
        return FatalError(str(error) or type(error).__name__)
    text = error.details() or ""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            try:
                return error_from_status(status_pb2.Status.FromString(value))
            except DecodeError:
                break  # a proxy's or a stranger's: code and text still stand
    return _from_transport(error.code(), text)


def _from_transport(code: grpc.StatusCode, text: str) -> EnovaError:
    """An error that no enova server wrote."""
    match code:
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in text:
            return TooLarge(text, reason="MESSAGE_TOO_LARGE", remedy="send less in one message; the bound is 4 MiB")
        case grpc.StatusCode.UNIMPLEMENTED:
            remedy = "the server is of another version or not enova; compare enova version at both ends"
            return CallerError(text, reason="UNIMPLEMENTED", remedy=remedy)
        case grpc.StatusCode.UNAVAILABLE if _smells_of_tls(text):
            remedy = "check both ends' certificates: dates, issuer, host names; TLS here and plaintext there look alike"
            return Unavailable(text, reason="TLS_FAILED", remedy=remedy)
        case grpc.StatusCode.CANCELLED:
            return RetryableError(text or "the call was cancelled", reason="CANCELLED")
    return _error(code, text, None)


def _smells_of_tls(text: str) -> bool:
    lowered = text.lower()
    return any(word in lowered for word in ("handshake", "ssl_error", "certificate", "hostname verification", "tls"))


def _error(code: grpc.StatusCode, message: str, info: error_details_pb2.ErrorInfo | None) -> EnovaError:
    kind = _KINDS.get(code, FatalError)
    if info is None:
        return kind(message or code.name.lower().replace("_", " "))
    metadata = dict(info.metadata)
    field, remedy = metadata.pop("field", ""), metadata.pop("remedy", "")
    if kind is CallerError and field:
        kind = InvalidField
    return kind(message, reason=info.reason, field=field, remedy=remedy, metadata=metadata)


def _info(status: status_pb2.Status) -> error_details_pb2.ErrorInfo | None:
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
            return info
    return None


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
