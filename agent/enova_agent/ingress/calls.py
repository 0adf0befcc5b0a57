"""What a request asks for, as far as an ingress must know; pure.

The body is parsed once and otherwise passed on as it came. What must be added (the engine's count of tokens at
the end of a stream, the class's priority) is spliced in after the opening brace, which keeps the rest byte for
byte what the client wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from enova_agent.core.openai_errors import OpenAIError, invalid_request
from enova_common.records import PREFIX_HASHES_MAX, PREFIX_TOKENS

_TEXT_BYTES_PER_TOKEN = 4  # of English text, near enough to tell prefixes apart


class Rejected(Exception):
    """The request is answered with this error and goes no further."""

    def __init__(self, error: OpenAIError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request for a model."""

    model: str
    stream: bool
    hide_usage: bool           # the count at the end of the stream was not asked for by the client
    max_tokens: int | None
    choices: int               # n: answers to one prompt
    value: dict[str, Any]
    body: bytes


def call_of_body(body: bytes, *, streams: bool) -> Call:
    """The call that a body makes; `streams` if the path can. Raises Rejected."""
    try:
        value = json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise Rejected(invalid_request(f"The body is not valid JSON: {_short(error)}")) from error
    if not isinstance(value, dict):
        raise Rejected(invalid_request("The body is not a JSON object."))
    model = value.get("model")
    if not isinstance(model, str) or not model:
        raise Rejected(invalid_request("`model` must be a string that names a model.", param="model"))
    stream = value.get("stream") or False
    if not isinstance(stream, bool):
        raise Rejected(invalid_request("`stream` must be true or false.", param="stream"))
    options = value.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise Rejected(invalid_request("`stream_options` must be an object.", param="stream_options"))
    stream = stream and streams
    hide_usage = stream and not (options or {}).get("include_usage")
    if hide_usage:
        if "stream_options" in value:
            value["stream_options"] = {**(options or {}), "include_usage": True}
            body = json.dumps(value).encode()
        else:
            body = spliced(body, b'"stream_options":{"include_usage":true},')
    return Call(
        model=model, stream=stream, hide_usage=hide_usage, max_tokens=_max_tokens(value),
        choices=_count(value.get("n")) or 1, value=value, body=body,
    )


def with_priority(call: Call, priority: int) -> bytes:
    """The body with the class's priority, unless it is the engine's default; the client's own word does not count."""
    if "priority" in call.value:
        value = {**call.value, "priority": priority}
        if call.hide_usage:
            value["stream_options"] = {**(value.get("stream_options") or {}), "include_usage": True}
        return json.dumps(value).encode()
    return spliced(call.body, b'"priority":%d,' % priority) if priority else call.body


def with_limit(call: Call, limit: int) -> Call:
    """The call with a limit on its answer, which the client left open; what the client said stays in `max_tokens`."""
    named = {"max_tokens", "max_completion_tokens"} & call.value.keys()
    value = {name: each for name, each in call.value.items() if name not in named} | {"max_tokens": limit}
    if not named:
        return replace(call, value=value, body=spliced(call.body, b'"max_tokens":%d,' % limit))
    if call.hide_usage:            # it was given as null, which the engine would take for the last word
        value["stream_options"] = {**(value.get("stream_options") or {}), "include_usage": True}
    return replace(call, value=value, body=json.dumps(value).encode())


def spliced(body: bytes, member: bytes) -> bytes:
    """A JSON object with another first member; the object is known not to be empty."""
    start = body.index(b"{") + 1
    return body[:start] + member + body[start:]


def prefix_blocks(value: dict[str, Any]) -> Iterator[bytes]:
    """The full blocks of PREFIX_TOKENS at the head of a prompt, at most PREFIX_HASHES_MAX of them."""
    ids = _token_ids(value.get("prompt"))
    if ids is not None:
        for start in range(0, min(len(ids), PREFIX_TOKENS * PREFIX_HASHES_MAX) - PREFIX_TOKENS + 1, PREFIX_TOKENS):
            yield repr(ids[start:start + PREFIX_TOKENS]).encode()
        return
    size = PREFIX_TOKENS * _TEXT_BYTES_PER_TOKEN
    text = prompt_text(value, limit=size * PREFIX_HASHES_MAX)
    for start in range(0, len(text) - size + 1, size):
        yield text[start:start + size]


def prompt_text(value: dict[str, Any], *, limit: int) -> bytes:
    """The first `limit` bytes of what the model reads: the prompt, or roles and contents of the messages."""
    parts: list[str] = []
    size = 0
    for part in _texts(value):
        parts.append(part)
        size += len(part)
        if size >= limit:
            break
    return "\x1e".join(parts).encode("utf-8", "replace")[:limit]


def prompt_ends(value: dict[str, Any], *, head: int, tail: int) -> str:
    """The first and the last characters of what the model reads, without whatever lies between."""
    texts = list(_texts(value))
    if sum(map(len, texts)) <= head + tail:
        return "\n".join(texts)
    first = _until(texts, head, lambda text, room: text[:room])
    last = _until(reversed(texts), tail, lambda text, room: text[-room:])
    return "\n".join([*first, *reversed(last)])


def _until(texts: Iterable[str], size: int, cut: Callable[[str, int], str]) -> list[str]:
    pieces: list[str] = []
    room = size
    for text in texts:
        if room <= 0:
            break
        pieces.append(cut(text, room))
        room -= len(pieces[-1])
    return pieces


def _texts(value: dict[str, Any]) -> Iterator[str]:
    prompt = value.get("prompt")
    if isinstance(prompt, str):
        yield prompt
    elif isinstance(prompt, list):
        yield from (entry for entry in prompt if isinstance(entry, str))
    messages = value.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            continue
        yield str(message.get("role", ""))
        content = message.get("content")
        if isinstance(content, str):
            yield content
        for piece in content if isinstance(content, list) else ():
            text = piece.get("text") if isinstance(piece, dict) else None
            if isinstance(text, str):
                yield text


def _token_ids(prompt: Any) -> list[Any] | None:
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], list):
        prompt = prompt[0]
    return prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], int) else None


def _max_tokens(value: dict[str, Any]) -> int | None:
    limit = _count(value.get("max_completion_tokens"))
    return limit if limit is not None else _count(value.get("max_tokens"))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _short(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__
