"""What passes through a stream."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enova_agent.ingress.sse import EVENT_BYTES_MAX, EventFilter, EventTooLarge, Usage


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def token(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
DONE = b"data: [DONE]\n\n"


def passed(events: EventFilter, *pieces: bytes) -> bytes:
    return b"".join(events.feed(piece) for piece in pieces)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=10), st.data())
def test_however_it_is_cut_the_client_gets_the_same_and_the_count_is_found(texts: list[str], data: st.DataObject
                                                                         ) -> None:
    visible = b"".join(token(text) for text in texts) + token("", "stop")
    whole = visible + USAGE + DONE
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=20)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    events = EventFilter(hide_usage=True)
    assert passed(events, *pieces) == visible + DONE
    assert events.usage == Usage(prompt_tokens=3, output_tokens=2)
    assert (events.done, events.error, events.finish_reason) == (True, None, "stop")
    assert events.events == len(texts) + 3


def test_a_count_that_was_asked_for_stays() -> None:
    events = EventFilter(hide_usage=False)
    assert passed(events, token("a") + USAGE + DONE) == token("a") + USAGE + DONE
    assert events.usage is not None


def test_usage_beside_choices_stays_and_is_read() -> None:
    running = event({"choices": [{"index": 0, "text": "a"}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}})
    events = EventFilter(hide_usage=True)
    assert passed(events, running) == running
    assert events.usage == Usage(prompt_tokens=3, output_tokens=1)


@pytest.mark.parametrize("text", ['"usage":{"prompt_tokens":9}', '{"error": {"code": 503}}', "data: [DONE]\n\n",
                                  '{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}'])
def test_generated_text_that_looks_like_a_mark_is_text(text: str) -> None:
    events = EventFilter(hide_usage=True)
    assert passed(events, token(text)) == token(text)
    assert (events.usage, events.error, events.done) == (None, None, False)


def test_a_refusal_in_the_first_event_is_seen_as_such() -> None:
    events = EventFilter(hide_usage=True)
    passed(events, event({"error": {"message": "busy", "type": "Service Unavailable", "code": 503}}) + DONE)
    assert events.error is not None
    assert (events.error.status, events.error.message, events.error_at) == (503, "busy", 1)


@pytest.mark.parametrize("error", ["text", {}, {"code": "x"}, {"code": 200}, {"code": True}])
def test_an_error_without_a_usable_code_is_the_engines_failure(error: object) -> None:
    events = EventFilter(hide_usage=True)
    passed(events, token("a"), event({"error": error or {"message": ""}}))
    assert events.error is not None
    assert (events.error.status, events.error_at) == (500, 2)


def test_comments_pass_and_are_no_events() -> None:
    events = EventFilter(hide_usage=True)
    assert passed(events, b": ping\n\n") == b": ping\n\n"
    assert events.events == 0


def test_crlf_ends_events_too() -> None:
    events = EventFilter(hide_usage=True)
    crlf = b"data: {}\r\n\r\n"
    assert passed(events, crlf + USAGE.replace(b"\n", b"\r\n") + DONE.replace(b"\n", b"\r\n")) == (
        crlf + DONE.replace(b"\n", b"\r\n")
    )
    assert events.usage is not None


def test_what_is_not_json_passes_untouched() -> None:
    odd = b'data: {"usage": \n\n'
    assert passed(EventFilter(hide_usage=True), odd) == odd


def test_an_event_without_end_is_refused() -> None:
    events = EventFilter(hide_usage=True)
    with pytest.raises(EventTooLarge):
        passed(events, *[b"x" * 65536] * (EVENT_BYTES_MAX // 65536 + 1))
