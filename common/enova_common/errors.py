"""Errors by who acts next: the caller corrects, somebody retries, or nobody can.

Each error has a stable `reason` (UPPER_SNAKE, for programs), a message (for people), and, where it helps, the
`field` that is wrong and the `remedy`: what to do about it. `enova_common.rpc` maps them to gRPC and back,
the command line prints them; nothing else needs to know how.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


class EnovaError(Exception):
    """The root of all errors that enova raises on purpose.

    `metadata` holds the dynamic parts of the message (AIP-193), keyed in lower_snake.
    """

    reason = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str = "",
        remedy: str = "",
        metadata: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.field = field
        self.remedy = remedy
        self.metadata = dict(metadata)

    def __str__(self) -> str:
        text = f"{self.field}: {self.message}" if self.field else self.message
        return f"{text} ({self.remedy})" if self.remedy else text


class CallerError(EnovaError):
    """The caller's fault: the same call will fail again until the caller changes something."""

    reason = "INVALID_ARGUMENT"


class InvalidField(CallerError):
    """A value that is wrong by itself; `field` says which."""

    reason = "INVALID_FIELD"


class NotFound(CallerError):
    """The named thing does not exist."""

    reason = "NOT_FOUND"


class AlreadyExists(CallerError):
    """The name is taken."""

    reason = "ALREADY_EXISTS"


class Conflict(CallerError):
    """The state does not allow it, or it changed since it was read: read again, then decide."""

    reason = "CONFLICT"


class Denied(CallerError):
    """The caller is known and may not do this."""

    reason = "PERMISSION_DENIED"


class Unauthenticated(CallerError):
    """Nobody knows who the caller is."""

    reason = "UNAUTHENTICATED"


class TooLarge(CallerError):
    """Over a stated bound: the message, the list, the queue."""

    reason = "TOO_LARGE"


class RetryableError(EnovaError):
    """The world's fault, for now: the same call may succeed later."""

    reason = "UNAVAILABLE"


class Unavailable(RetryableError):
    """Somebody who is needed cannot be reached."""

    reason = "UNAVAILABLE"


class TimedOut(RetryableError):
    """The deadline passed; whether it happened is not known."""

    reason = "DEADLINE_EXCEEDED"


class Exhausted(RetryableError):
    """A bound on a shared resource is reached: queue full, no space, too many requests."""

    reason = "RESOURCE_EXHAUSTED"


class FatalError(EnovaError):
    """Nobody can mend it by waiting or by asking differently: a defect, or lost data."""

    reason = "INTERNAL"


class Corrupt(FatalError):
    """Stored bytes are not what was written."""

    reason = "DATA_LOSS"
