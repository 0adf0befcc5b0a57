"""What an ingress reads from a request, and what it adds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enova_agent.ingress.calls import Rejected, call_of_body, prefix_blocks, with_priority
from enova_common.records import PREFIX_HASHES_MAX, PREFIX_TOKENS


def body(**value: Any) -> bytes:
    return json.dumps({"model": "m", **value}).encode()


def test_a_stream_is_asked_for_its_count_and_the_rest_stays_byte_for_byte() -> None:
    raw = b' \n{ "model" : "m", "stream":true, "x": 1.50 }'
    call = call_of_body(raw, streams=True)
    assert call.hide_usage
    assert call.body == b' \n{"stream_options":{"include_usage":true}, "model" : "m", "stream":true, "x": 1.50 }'


@pytest.mark.parametrize(("options", "hidden"), [({"include_usage": True}, False), ({"include_usage": False}, True),
                                                 ({"other": 1}, True), (None, True)])
def test_other_stream_options_are_kept(options: dict[str, Any] | None, hidden: bool) -> None:
    call = call_of_body(body(stream=True, stream_options=options), streams=True)
    assert call.hide_usage is hidden
    assert json.loads(call.body)["stream_options"] == {**(options or {}), "include_usage": True}


def test_what_does_not_stream_is_passed_on_as_it_came() -> None:
    for raw in (body(), body(stream=False), body(stream=None)):
        call = call_of_body(raw, streams=True)
        assert (call.stream, call.hide_usage, call.body) == (False, False, raw)
    assert not call_of_body(body(stream=True), streams=False).stream


def test_a_class_with_a_priority_says_so_to_the_engine_and_a_client_cannot() -> None:
    assert json.loads(with_priority(call_of_body(body(), streams=True), 3))["priority"] == 3
    assert with_priority(call_of_body(body(), streams=True), 0) == body()
    for stream in (True, False):
        call = call_of_body(body(priority=-100, stream=stream), streams=True)
        value = json.loads(with_priority(call, 3))
        assert value["priority"] == 3
        assert value.get("stream_options") == ({"include_usage": True} if stream else None)


@pytest.mark.parametrize(("value", "limit"), [({}, None), ({"max_tokens": 5}, 5), ({"max_completion_tokens": 7}, 7),
                                              ({"max_tokens": 5, "max_completion_tokens": 7}, 7),
                                              ({"max_tokens": "5"}, None), ({"max_tokens": -1}, None)])
def test_the_limit_of_tokens_is_read_where_it_is_given(value: dict[str, Any], limit: int | None) -> None:
    assert call_of_body(body(**value), streams=True).max_tokens == limit


@given(st.binary(max_size=200))
def test_any_bytes_are_a_call_or_a_clear_refusal(raw: bytes) -> None:
    try:
        call_of_body(raw, streams=True)
    except Rejected as rejected:
        refusal = rejected.error
    else:
        return
    assert refusal.status == 400
    assert refusal.message


def test_full_blocks_of_a_prompt_are_told_apart_by_all_that_came_before() -> None:
    ids = list(range(PREFIX_TOKENS * 2 + 5))
    blocks = list(prefix_blocks({"prompt": ids}))
    assert len(blocks) == 2
    assert blocks == list(prefix_blocks({"prompt": [ids]}))
    assert blocks[0] == next(iter(prefix_blocks({"prompt": ids[:PREFIX_TOKENS]})))
    assert list(prefix_blocks({"prompt": ids[:PREFIX_TOKENS - 1]})) == []


def test_text_counts_four_bytes_a_token_and_is_bounded() -> None:
    text = "x" * (PREFIX_TOKENS * 4)
    assert len(list(prefix_blocks({"prompt": text}))) == 1
    assert len(list(prefix_blocks({"messages": [{"role": "user", "content": text[:-5]}]}))) == 1
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": "data:"}}]
    assert len(list(prefix_blocks({"messages": [{"role": "user", "content": parts}, "odd", {"content": 3}]}))) == 1
    assert len(list(prefix_blocks({"prompt": "y" * 10_000_000}))) == PREFIX_HASHES_MAX
    assert list(prefix_blocks({"messages": 3, "prompt": {"a": 1}})) == []
