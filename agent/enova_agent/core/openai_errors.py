"""The errors that an application sees, in the shape that OpenAI clients parse; pure.

Each constructor below is one thing that can happen at the ingress. Messages name what the caller gave and what
to do, and nothing of the fleet: no node, no address, no other model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIError:
    """One error: as a JSON answer, or as the last event of a stream that had begun."""

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    retry_after_s: int | None = None

    def body(self) -> bytes:
        """The JSON object of an answer."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def event(self) -> bytes:
        """A server-sent event; official clients raise on it."""
        return b"data: " + self.body() + b"\n\n"


def unknown_model(model: str) -> OpenAIError:
    """No route bears this name."""
    return OpenAIError(
        status=404, message=f"The model `{model[:200]}` does not exist.",
        type="invalid_request_error", code="model_not_found", param="model",
    )


def invalid_request(message: str, *, param: str | None = None) -> OpenAIError:
    """The body or a header cannot be what was meant."""
    return OpenAIError(status=400, message=message, type="invalid_request_error", code="invalid_request", param=param)


def unknown_path(path: str) -> OpenAIError:
    """Nothing is served there."""
    return OpenAIError(
        status=404, message=f"Unknown request URL: {path[:200]}.", type="invalid_request_error", code="unknown_url"
    )


def wrong_method(method: str, allowed: str) -> OpenAIError:
    """Something is served there, but not by this method."""
    return OpenAIError(
        status=405, message=f"{method[:20]} is not allowed here; use {allowed}.",
        type="invalid_request_error", code="method_not_allowed",
    )


def body_too_large(limit_bytes: int) -> OpenAIError:
    """The body is over the bound of this ingress."""
    return OpenAIError(
        status=413, message=f"The request body is larger than {limit_bytes} bytes.",
        type="invalid_request_error", code="request_too_large",
    )


def body_too_slow(limit_s: float) -> OpenAIError:
    """The body did not arrive in time."""
    return OpenAIError(
        status=408, message=f"The request body did not arrive within {limit_s:g} s.",
        type="invalid_request_error", code="request_timeout",
    )


def overloaded(*, retry_after_s: int = 1) -> OpenAIError:
    """Every queue that the request could wait in is full, or its time in one is over."""
    return OpenAIError(
        status=429, message="The model is overloaded: its queues are full. Retry after the time in Retry-After.",
        type="rate_limit_error", code="overloaded", retry_after_s=retry_after_s,
    )


def queue_timeout(waited_s: float, *, retry_after_s: int = 1) -> OpenAIError:
    """The request waited in a queue until its deadline."""
    return OpenAIError(
        status=429, message=f"The model is overloaded: the request waited {waited_s:.1f} s without being started.",
        type="rate_limit_error", code="queue_timeout", retry_after_s=retry_after_s,
    )


def no_replica(model: str, *, retry_after_s: int = 5) -> OpenAIError:
    """The model is known, but nothing serves it now."""
    return OpenAIError(
        status=503, message=f"The model `{model[:200]}` has no replica that serves now. Retry later.",
        type="service_unavailable", code="no_replica", retry_after_s=retry_after_s,
    )


def ingress_full(*, retry_after_s: int = 1) -> OpenAIError:
    """This ingress holds as many requests as it may."""
    return OpenAIError(
        status=503, message="Too many requests are open here. Retry after the time in Retry-After.",
        type="service_unavailable", code="ingress_full", retry_after_s=retry_after_s,
    )


def engine_failed(reached: int) -> OpenAIError:
    """Replicas took the request and broke before they answered."""
    return OpenAIError(
        status=502, message=f"The request failed on {reached} replica(s) before an answer began.",
        type="server_error", code="engine_failed",
    )


def bad_answer() -> OpenAIError:
    """What the engine sent is not an answer that can be passed on."""
    return OpenAIError(
        status=502, message="The engine's answer could not be understood.", type="server_error", code="bad_answer"
    )


def engine_silent(limit_s: float) -> OpenAIError:
    """No byte came for the idle limit."""
    return OpenAIError(
        status=504, message=f"The engine sent nothing for {limit_s:g} s; the request was given up.",
        type="server_error", code="engine_silent",
    )


def stream_cut() -> OpenAIError:
    """The engine ended in the middle of a stream."""
    return OpenAIError(
        status=502, message="The replica that served this stream is gone; what was sent so far is incomplete.",
        type="server_error", code="stream_cut",
    )


def internal_error() -> OpenAIError:
    """A defect of this ingress; its log says more."""
    return OpenAIError(
        status=500, message="The request failed here, by no fault of its own; the operator finds why in the log.",
        type="server_error", code="internal_error",
    )


def shutting_down() -> OpenAIError:
    """This ingress ends: another one takes the request."""
    return OpenAIError(
        status=503, message="This ingress is shutting down. Retry.", type="service_unavailable",
        code="shutting_down", retry_after_s=1,
    )


def forbidden_peer() -> OpenAIError:
    """The peer's certificate does not name an ingress."""
    return OpenAIError(
        status=403, message="The client certificate does not name an ingress of this fleet.",
        type="permission_error", code="wrong_role",
    )
