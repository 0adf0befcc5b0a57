"""The OpenAI-shaped requests and answers of vLLM, as plain JSON values; and the text of simulated tokens."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from enova_common.vllm import FinishReason

COMPLETION_MAX_TOKENS = 16  # of /v1/completions, where the request does not say
# How long answers are that nobody cut: lognormal, median 200 tokens.
OUTPUT_MEDIAN_LOG = 5.3
OUTPUT_SIGMA_LOG = 0.8
TEMPLATE_TOKENS = 4  # what a chat template adds to each message
WORDS = (
    "amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "juniper", "kelp", "lagoon",
    "meadow", "nectar", "orchard", "pebble", "quartz", "ripple", "summit", "thicket", "upland", "valley", "willow",
    "yarrow", "zephyr", "anchor", "beacon", "copper", "drift", "estuary", "flint",
)  # fmt: skip


class ApiError(Exception):
    """An answer that is an error, in vLLM's shape."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


def bad_request(message: str, param: str | None = None) -> ApiError:
    """The caller's fault."""
    return ApiError(400, "BadRequestError", message, param)


class Route(StrEnum):
    """The two ways to ask for tokens."""

    COMPLETION = "/v1/completions"
    CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request for tokens, checked."""

    route: Route
    model: str
    prompt_tokens: int
    block_hashes: tuple[int, ...]
    max_tokens: int
    output_tokens: int
    reason: FinishReason
    priority: int
    streams: bool
    include_usage: bool
    continuous_usage: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a request is checked and counted against."""

    served_names: tuple[str, ...]
    max_model_len: int
    block_size: int
    seed: int


def parse_request(body: object, route: Route, rules: Rules, request_id: str) -> Asked:
    """A checked request from a parsed JSON body; ApiError says what is wrong, as vLLM would."""
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object")
    model = body.get("model") or rules.served_names[0]
    if model not in rules.served_names:
        raise ApiError(404, "NotFoundError", f"The model `{model}` does not exist.", "model")
    if _integer(body, "n", 1) != 1:
        raise bad_request("the simulated engine makes one answer a request: n must be 1", "n")
    prompt = _chat_prompt(body) if route is Route.CHAT else _prompt(body)
    prompt_tokens = count_tokens(prompt)
    if prompt_tokens < 1:
        raise bad_request("the prompt must hold at least one token", "prompt")
    max_tokens = _max_tokens(body, route, rules, prompt_tokens)
    output_tokens, reason = _output(body, max_tokens, f"{rules.seed}:{request_id}")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise bad_request("stream_options must be an object", "stream_options")
    return Asked(
        route=route,
        model=model,
        prompt_tokens=prompt_tokens,
        block_hashes=_block_hashes(prompt, rules.block_size),
        max_tokens=max_tokens,
        output_tokens=output_tokens,
        reason=reason,
        priority=_integer(body, "priority", 0, minimum=-(1 << 31)),
        streams=bool(body.get("stream", False)),
        include_usage=bool(options.get("include_usage", False)),
        continuous_usage=bool(options.get("continuous_usage_stats", False)),
    )


def _integer(body: Mapping[str, object], field: str, default: int, minimum: int = 1) -> int:
    value = body.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise bad_request(f"{field} must be a whole number of at least {minimum}, got {value!r}.", field)
    return value


def _prompt(body: Mapping[str, object]) -> str | list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        return prompt
    raise bad_request("prompt must be one text or one list of token ids", "prompt")


def _chat_prompt(body: Mapping[str, object]) -> str:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_request("messages must be a list with at least one message", "messages")
    parts = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad_request("each message must be an object with a role", "messages")
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        parts.append("".ljust(4 * TEMPLATE_TOKENS, "\0") + str(content))
    return "".join(parts)


def count_tokens(prompt: str | list[int]) -> int:
    """Ids count exactly; text counts one token for each four bytes begun."""
    return -(-len(prompt.encode()) // 4) if isinstance(prompt, str) else len(prompt)


def _block_hashes(prompt: str | list[int], block_size: int) -> tuple[int, ...]:
    """One hash for each full block, of it and all before it. They differ between processes for text, never within."""
    content: bytes | list[int] = prompt.encode() if isinstance(prompt, str) else prompt
    width = block_size * (4 if isinstance(content, bytes) else 1)
    hashes: list[int] = []
    before = 0
    for start in range(0, len(content) - width + 1, width):
        part = content[start : start + width]
        before = hash((before, part if isinstance(part, bytes) else tuple(part)))
        hashes.append(before)
    return tuple(hashes)


def _max_tokens(body: Mapping[str, object], route: Route, rules: Rules, prompt_tokens: int) -> int:
    limit = rules.max_model_len
    room = limit - prompt_tokens
    if room < 1:
        raise bad_request(
            f"This model's maximum context length is {limit} tokens. However, your request has {prompt_tokens} input "
            "tokens. Please reduce the length of the input messages.",
            "input_tokens",
        )
    field = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    asked = _integer(body, field, 0)
    if asked > limit:
        raise bad_request(f"{field}={asked} cannot be greater than max_model_len={limit}.", field)
    if asked > room:
        raise bad_request(
            f"'{field}' or 'max_completion_tokens' is too large: {asked}. This model's maximum context length is "
            f"{limit} tokens and your request has {prompt_tokens} input tokens ({asked} > {limit} - {prompt_tokens}).",
            field,
        )
    return asked or (min(room, COMPLETION_MAX_TOKENS) if route is Route.COMPLETION else room)


def _output(body: Mapping[str, object], max_tokens: int, seed: str) -> tuple[int, FinishReason]:
    """How many tokens the answer has, and why it ends."""
    if body.get("ignore_eos"):
        return max_tokens, FinishReason.LENGTH
    least = min(_integer(body, "min_tokens", 1, minimum=0), max_tokens)
    drawn = round(random.Random(seed).lognormvariate(OUTPUT_MEDIAN_LOG, OUTPUT_SIGMA_LOG))  # noqa: S311 - not a secret
    wanted = max(1, least, drawn)
    return (wanted, FinishReason.STOP) if wanted < max_tokens else (max_tokens, FinishReason.LENGTH)


class Voice:
    """The text of one answer's tokens: one word each, the same for the same seed and id."""

    def __init__(self, seed: str) -> None:
        self._start = zlib.crc32(seed.encode())

    def say(self, begin: int, end: int) -> str:
        """Tokens number `begin` up to, not including, `end`. Plain ASCII words, safe inside JSON."""
        count = len(WORDS)
        text = " ".join(WORDS[(self._start + 7 * index) % count] for index in range(begin, end))
        return f" {text}" if begin and end > begin else text


def usage(asked: Asked, made: int) -> dict[str, object]:
    """Token counts of an answer."""
    return {
        "prompt_tokens": asked.prompt_tokens,
        "total_tokens": asked.prompt_tokens + made,
        "completion_tokens": made,
        "prompt_tokens_details": None,
    }


def answer(asked: Asked, answer_id: str, created: int, text: str) -> dict[str, object]:
    """The whole answer of a request that does not stream."""
    choice: dict[str, object] = {"index": 0, "logprobs": None, "finish_reason": asked.reason, "stop_reason": None}
    if asked.route is Route.CHAT:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None, "tool_calls": []}
    else:
        choice["text"] = text
    return {
        "id": answer_id,
        "object": "chat.completion" if asked.route is Route.CHAT else "text_completion",
        "created": created,
        "model": asked.model,
        "choices": [choice],
        "usage": usage(asked, asked.output_tokens),
        "system_fingerprint": "simulated",
    }


class StreamWriter:
    """The events of one stream, as bytes."""

    def __init__(self, asked: Asked, answer_id: str, created: int) -> None:
        self._asked = asked
        self._is_chat = asked.route is Route.CHAT
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        head = {"id": answer_id, "object": kind, "created": created, "model": asked.model}
        self._head = json.dumps(head)[:-1]

    def tokens(self, text: str, *, first: bool, made: int, last: bool) -> bytes:
        """The event that carries new tokens."""
        reason = f'"{self._asked.reason}"' if last else "null"
        if self._is_chat:
            role = '"role":"assistant",' if first else ""
            content = f'"delta":{{{role}"content":"{text}"}}'
        else:
            content = f'"text":"{text}"'
        tail = f", \"usage\":{json.dumps(usage(self._asked, made))}" if self._asked.continuous_usage else ""
        return (
            f'data: {self._head},"choices":[{{"index":0,{content},"logprobs":null,"finish_reason":{reason},'
            f'"stop_reason":null}}]{tail}}}\n\n'
        ).encode()

    def end(self) -> bytes:
        """The last events: usage where it was asked for, then the mark of the end."""
        parts = ""
        if self._asked.include_usage:
            total = json.dumps(usage(self._asked, self._asked.output_tokens))
            parts = f'data: {self._head},"choices":[],"usage":{total}}}\n\n'
        return f"{parts}data: [DONE]\n\n".encode()


def error_events(error: ApiError) -> bytes:
    """An error inside a stream that has begun with status 200."""
    return f"data: {json.dumps(error.body)}\n\ndata: [DONE]\n\n".encode()
