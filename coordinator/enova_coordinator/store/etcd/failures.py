"""What etcd's gRPC errors mean to a caller of the Store."""

from __future__ import annotations

import grpc

from enova_common.errors import Corrupt, Denied, EnovaError, Exhausted, FatalError, TimedOut, TooLarge, Unavailable
from enova_coordinator.store import NO_SPACE, Compacted, LeaseLost

ANSWER_TOO_LARGE = "STORE_ANSWER_TOO_LARGE"
"""The reason of `Exhausted` when an answer is over the client's bound: ask for fewer entries."""

# etcd says these in words only: its codes are shared with other errors.
_TOKEN_PROBLEMS = ("invalid auth token", "revision of auth store is old", "user name is empty")
GRANT_REMEDY = "grant the coordinator's user read and write on the prefix /enova/"
_AWAY_REMEDY = "try again; see that most of etcd's members run: etcdctl endpoint status"
_NO_SPACE_REMEDY = "compact and defragment etcd, then clear the alarm: docs/store-operations.md"


class TokenRefused(Denied):
    """Etcd did not look at the call, for its token: renew the token and call again."""

    reason = "STORE_DENIED"


def mentions_token(details: str) -> bool:
    """Whether etcd's words blame the token."""
    return any(problem in details for problem in _TOKEN_PROBLEMS)


def translated(error: grpc.aio.AioRpcError, endpoint: str) -> EnovaError:
    """The error by who acts next; the caller, who knows them, fills in revision and lease."""
    details = error.details() or error.code().name
    text = f"etcd at {endpoint}: {details}"
    match error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            text = f"etcd at {endpoint} did not answer in time"
            return TimedOut(text, reason="STORE_TIMED_OUT", remedy=_AWAY_REMEDY)
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "space exceeded" in details:
            return Exhausted(text, reason=NO_SPACE, remedy=_NO_SPACE_REMEDY)
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details:
            return Exhausted(text, reason=ANSWER_TOO_LARGE)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Exhausted(text, reason="STORE_BUSY")
        case grpc.StatusCode.UNAUTHENTICATED:
            return TokenRefused(text, remedy=GRANT_REMEDY)
        case grpc.StatusCode.INVALID_ARGUMENT if mentions_token(details):
            return TokenRefused(text, remedy="set the store's username and password")
        case grpc.StatusCode.PERMISSION_DENIED:
            return Denied(text, reason="STORE_DENIED", remedy=GRANT_REMEDY)
        case grpc.StatusCode.INVALID_ARGUMENT if "too large" in details:
            return TooLarge(text)
        case grpc.StatusCode.OUT_OF_RANGE if "compacted" in details:
            return Compacted(0)
        case grpc.StatusCode.NOT_FOUND if "lease" in details:
            return LeaseLost(0)
        case grpc.StatusCode.DATA_LOSS:
            return Corrupt(text, reason="STORE_CORRUPT", remedy="see etcd's alarms: etcdctl alarm list")
        case (
            grpc.StatusCode.INVALID_ARGUMENT
            | grpc.StatusCode.FAILED_PRECONDITION
            | grpc.StatusCode.NOT_FOUND
            | grpc.StatusCode.OUT_OF_RANGE
            | grpc.StatusCode.UNIMPLEMENTED
        ):
            return FatalError(text, reason="STORE_REFUSED")
        case _:
            # UNAVAILABLE, and what a dying connection or a stopping server is called besides.
            return Unavailable(text, reason="STORE_UNAVAILABLE", remedy=_AWAY_REMEDY)
