"""Server-sent events of an OpenAI stream: taken apart as they pass, without a parser on the common path; pure.

`EventFilter` is fed what arrives and returns what the client shall get, whole events only. It finds the engine's
count of tokens (and hides it if the client did not ask), the end marker, and errors. A chunk of ordinary tokens
costs a few substring searches: inside JSON strings a quote is escaped, so the marks searched for cannot be
produced by generated text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

EVENT_BYTES_MAX = 4 << 20  # logprobs of many tokens can be large, but not this large

_DONE = b"data: [DONE]"
_USAGE = b'"usage":'
_ERROR = b'"error":'
_FINISH = (b'"finish_reason":"', b'"finish_reason": "')
_MARKS = (_USAGE, _ERROR, _DONE, *_FINISH)


class EventTooLarge(ValueError):
    """One event is over the bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The engine's own count."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamError:
    """An error that came as an event."""

    message: str
    status: int
    body: bytes  # the JSON object, as it came


class EventFilter:
    """What passes through one stream."""

    def __init__(self, *, hide_usage: bool) -> None:
        self.usage: Usage | None = None
        self.error: StreamError | None = None
        self.error_at = 0         # which event the error was, from 1
        self.finish_reason = ""
        self.done = False
        self.events = 0           # those with data, errors and hidden ones included
        self._hide_usage = hide_usage
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """The whole events among what came so far, as the client shall get them. Raises EventTooLarge."""
        data = self._rest + data if self._rest else data
        end = data.rfind(b"\n\n")
        crlf_end = data.rfind(b"\r\n\r\n")
        stop = max(end + 2 if end >= 0 else 0, crlf_end + 4 if crlf_end >= 0 else 0)
        self._rest = data[stop:]
        if len(self._rest) > EVENT_BYTES_MAX:
            raise EventTooLarge(f"an event of more than {EVENT_BYTES_MAX} bytes")
        whole = data[:stop]
        if not whole:
            return b""
        if not any(mark in whole for mark in _MARKS):
            self.events += whole.count(b"data:")
            return whole
        separator = b"\r\n\r\n" if crlf_end >= 0 and end < 0 else b"\n\n"
        kept = [event + separator for event in whole.split(separator) if event and self._passes(event)]
        return b"".join(kept)

    def _passes(self, event: bytes) -> bool:
        start = event.find(b"data:")
        if start < 0:
            return True
        self.events += 1
        payload = event[start + 5:].strip()
        if payload == b"[DONE]":
            self.done = True
            return True
        try:
            value = json.loads(payload)
        except (ValueError, RecursionError):
            return True
        if not isinstance(value, dict):
            return True
        if value.get("error") and not value.get("choices"):
            self.error, self.error_at = error_of_value(value, payload), self.events
            return True
        self._note_finish(value.get("choices"))
        usage = usage_of_value(value.get("usage"))
        if usage is None:
            return True
        self.usage = usage
        return not (self._hide_usage and value.get("choices") == [])

    def _note_finish(self, choices: Any) -> None:
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and isinstance(choice.get("finish_reason"), str):
                self.finish_reason = choice["finish_reason"]


def usage_of_value(value: Any) -> Usage | None:
    """The count of an answer's `usage`; None if there is none."""
    if not isinstance(value, dict):
        return None
    prompt, output = value.get("prompt_tokens"), value.get("completion_tokens", 0)
    if not isinstance(prompt, int) or not isinstance(output, int) or prompt < 0 or output < 0:
        return None
    return Usage(prompt_tokens=prompt, output_tokens=output)


def error_of_value(value: dict[str, Any], payload: bytes) -> StreamError:
    """The error that an event holds; an engine that gives no usable code has failed by itself."""
    error = value["error"]
    fields = error if isinstance(error, dict) else {"message": str(error)}
    code = fields.get("code")
    status = code if isinstance(code, int) and not isinstance(code, bool) and 400 <= code <= 599 else 500
    return StreamError(message=str(fields.get("message", ""))[:500], status=status, body=payload)
