"""Limits on answers at the ingress: which kind, which limit, within which bounds, and what becomes of the body."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from enova_agent.core.lengths import NO_KIND, TEMPLATE_TOKENS, Bucket, Kinds, kinds_of
from enova_agent.core.local import LengthSample, LengthsUpdate, RoutesUpdate, decode, encode
from enova_agent.core.model import LengthRule, LengthRules, Route
from enova_agent.ingress.calls import call_of_body, prompt_ends, with_limit, with_priority
from enova_agent.ingress.lengths import BURST_S, CHAT_PATH, OPEN_SHARE, UNSENT_MAX, Lengths, Look
from enova_common.prompt_vectors import METHOD, Projection, cosine, entries_of, quantised, vectorise
from enova_common.records import Outcome

PROJECTION = Projection(seed=5, dimension=64)
SUM, CODE = "Tom has 3 apples and buys 4 more, how many has he", "Write a python function that sorts a list"


def _rule(prompt: str, *, limit: int, reach: float = 0.5) -> LengthRule:
    return LengthRule(
        centroid=base64.b64encode(vectorise(prompt, PROJECTION)).decode(), reach=reach, limit_tokens=limit
    )


def _rules(*kinds: LengthRule, **fields: Any) -> LengthRules:
    defaults = {"method": METHOD, "seed": 5, "dimension": 64, "apply": True, "context_tokens": 8192}
    return LengthRules(**{**defaults, "kinds": kinds, **fields})


TWO = _rules(_rule(SUM, limit=100), _rule(CODE, limit=300), limit_tokens=700)


def _kinds(rules: LengthRules = TWO) -> Kinds:
    kinds = kinds_of(rules, method=METHOD)
    assert kinds is not None
    return kinds


def _body(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": prompt}], **fields}


# Kinds


def test_a_prompt_belongs_to_the_nearest_kind_within_reach() -> None:
    kinds = _kinds()
    assert kinds.of(vectorise("Ann has 9 pears and buys 2 more, how many has she", PROJECTION)) == 0
    assert kinds.of(vectorise("Write a python function that reverses a list", PROJECTION)) == 1
    assert kinds.of(vectorise("quarterly earnings beat expectations", PROJECTION)) == NO_KIND
    assert kinds.of(bytes(64)) == NO_KIND
    near = _kinds(_rules(_rule(SUM, limit=1, reach=0.999)))
    assert near.of(vectorise("Ann has 9 pears and buys 2 more, how many has she", PROJECTION)) == NO_KIND


def test_the_ingress_assigns_as_the_recommender_fitted() -> None:
    numpy = pytest.importorskip("numpy")
    from enova_recommender.recommend.max_tokens import Centres, assign

    centroids = [entries_of(base64.b64decode(rule.centroid)) for rule in TWO.kinds]
    where = Centres(
        numpy.array([[e / sum(x * x for x in c) ** 0.5 for e in c] for c in centroids]),
        numpy.array([rule.reach for rule in TWO.kinds]),
    )
    words = (SUM + " " + CODE).split()
    vectors = [
        vectorise(" ".join((*prompt.split()[:size], word)), PROJECTION)
        for prompt in (SUM, CODE) for size in (1, 3, 5, 7) for word in words
    ]
    table = numpy.frombuffer(b"".join(vectors), numpy.int8).reshape(-1, 64)
    kinds = _kinds()
    assert [kinds.of(vector) for vector in vectors] == assign(table, where).tolist()
    assert {kinds.of(vector) for vector in vectors} == {NO_KIND, 0, 1}


def test_a_limit_that_might_not_fit_beside_the_prompt_is_none() -> None:
    kinds = _kinds()
    assert kinds.limit(0, prompt_bytes=200) == 100
    assert kinds.limit(NO_KIND, prompt_bytes=200) == 700
    assert kinds.limit(1, prompt_bytes=8192 - TEMPLATE_TOKENS - 300) == 300
    assert kinds.limit(1, prompt_bytes=8192 - TEMPLATE_TOKENS - 299) == 0
    assert _kinds(_rules(_rule(SUM, limit=100), context_tokens=0)).limit(0, prompt_bytes=1) == 0
    assert _kinds(_rules(_rule(SUM, limit=0))).limit(0, prompt_bytes=1) == 0


@pytest.mark.parametrize("rules", [
    _rules(dimension=4), _rules(LengthRule(centroid="AAEC", reach=0.5)),
    _rules(LengthRule(centroid="no base64", reach=0.5)), _rules(LengthRule(centroid="A" * 86 + "==", reach=0.5)),
])  # fmt: skip
def test_rules_that_are_not_understood_are_no_rules(rules: LengthRules) -> None:
    assert kinds_of(rules, method=METHOD) is None


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    bucket = Bucket(per_s=2.0, burst=3.0)
    assert [bucket.take(now_s=10.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(now_s=10.6) for _ in range(2)] == [True, False]
    assert [bucket.take(now_s=100.0) for _ in range(4)] == [True, True, True, False]


# Bodies


def test_a_limit_is_spliced_in_and_the_rest_stays_byte_for_byte() -> None:
    body = b'{ "model": "m",  "messages": [{"role":"user","content":"h\\u00e9"}] }'
    limited = with_limit(call_of_body(body, streams=True), 77)
    assert limited.body == b'{"max_tokens":77,' + body[1:]
    assert limited.max_tokens is None  # what the client said
    assert json.loads(with_priority(limited, 3)) == {"priority": 3, "max_tokens": 77, **json.loads(body)}


def test_a_limit_replaces_one_that_was_given_as_null() -> None:
    given = _body("x", max_completion_tokens=None, max_tokens=None, stream=True, priority=9)
    call = call_of_body(json.dumps(given).encode(), streams=True)
    sent = json.loads(with_priority(with_limit(call, 5), 1))
    assert sent["max_tokens"] == 5
    assert "max_completion_tokens" not in sent
    assert sent["stream_options"] == {"include_usage": True}
    assert sent["priority"] == 1
    assert json.loads(with_limit(call, 5).body)["stream_options"] == {"include_usage": True}


def test_the_ends_of_a_prompt_are_taken_across_its_messages() -> None:
    value = {"messages": [{"role": "system", "content": "aaaa"}, {"role": "user", "content": "b" * 50 + "zz"}]}
    assert prompt_ends(value, head=100, tail=100) == f"system\naaaa\nuser\n{'b' * 50}zz"
    assert prompt_ends(value, head=8, tail=3) == "system\naa\nbzz"
    assert prompt_ends({"prompt": [1, 2, 3]}, head=8, tail=3) == ""
    assert prompt_ends({"prompt": "x" * 100}, head=2, tail=2) == "xx\nxx"


# The looking


def _lengths(*, draw: float = 0.9, now_s: float = 0.0) -> Lengths:
    return Lengths(monotonic_s=lambda: now_s, draw=lambda: draw)


def _look(lengths: Lengths, rules: LengthRules | None, path: str = CHAT_PATH, **fields: Any) -> Look | None:
    call = call_of_body(json.dumps({**_body(SUM), **fields}).encode(), streams=True)
    looking = lengths.look(Route(served_name="m", deployment="deployments/d", lengths=rules), call, path)
    with pytest.raises(StopIteration) as done:  # without an embedding model it waits for nothing
        looking.send(None)
    look: Look | None = done.value.value
    return look


def test_without_rules_no_prompt_is_looked_at() -> None:
    assert _look(_lengths(), None) is None


def test_a_chat_without_a_limit_gets_that_of_its_kind() -> None:
    look = _look(_lengths(), TWO)
    assert look == Look("deployments/d", METHOD, vectorise(f"user\n{SUM}", PROJECTION), 100)


@pytest.mark.parametrize(("rules", "path", "fields"), [
    (_rules(*TWO.kinds, apply=False), CHAT_PATH, {}),
    (TWO, CHAT_PATH, {"max_tokens": 4000}),
    (TWO, CHAT_PATH, {"max_completion_tokens": 4000}),
    (TWO, CHAT_PATH, {"max_tokens": 1}),
    (TWO, "/v1/completions", {}),
    (_rules(*TWO.kinds, method=METHOD + 1), CHAT_PATH, {}),
])  # fmt: skip
def test_where_nothing_may_be_limited_the_prompt_is_only_looked_at(
    rules: LengthRules, path: str, fields: dict[str, Any]
) -> None:
    look = _look(_lengths(), rules, path, **fields)
    assert look is not None
    assert look.limit == 0


def test_a_share_of_answers_is_left_open() -> None:
    assert (_look(_lengths(draw=OPEN_SHARE * 0.99), TWO)) == Look(
        "deployments/d", METHOD, vectorise(f"user\n{SUM}", PROJECTION), 0
    )


def test_several_answers_to_one_prompt_are_left_alone() -> None:
    assert _look(_lengths(), TWO, n=2) is None


def test_prompts_over_the_bound_have_no_limit_and_are_counted() -> None:
    lengths = _lengths()
    looks = [_look(lengths, TWO) for _ in range(2100)]
    assert looks.count(None) == lengths.skipped["prompts"] == 100


LOOK = Look("deployments/d", METHOD, b"\x01\xff", 0, samples_per_s=5.0)


@pytest.mark.parametrize(("outcome", "reason", "tokens", "kept"), [
    (Outcome.FINISHED, "stop", 5, False), (Outcome.FINISHED, "length", 5, True),
    (Outcome.FINISHED, "tool_calls", 5, False),
])  # fmt: skip
def test_an_answer_that_ended_is_reported_as_ended_or_stopped(
    outcome: Outcome, reason: str, tokens: int, kept: bool
) -> None:
    lengths = _lengths()
    lengths.ended(LOOK, outcome, finish_reason=reason, tokens=tokens)
    update = lengths.take()
    assert update == LengthsUpdate(samples=(
        LengthSample(deployment="deployments/d", method=METHOD, vector="Af8=", tokens=5, stopped=kept),
    ))
    assert lengths.take() is None


@pytest.mark.parametrize(("outcome", "reason", "tokens"), [
    (Outcome.CUT, "stop", 5), (Outcome.CANCELLED, "length", 5), (Outcome.FINISHED, "abort", 5),
    (Outcome.FINISHED, "", 5), (Outcome.FINISHED, "stop", None), (Outcome.FAILED, "stop", 5),
])  # fmt: skip
def test_an_answer_that_says_nothing_of_its_length_is_not_reported(
    outcome: Outcome, reason: str, tokens: int | None
) -> None:
    lengths = _lengths()
    lengths.ended(LOOK, outcome, finish_reason=reason, tokens=tokens)
    assert lengths.take() is None


def test_answers_over_the_bound_are_counted_and_not_kept() -> None:
    lengths = _lengths()
    for _ in range(100):
        lengths.ended(LOOK, Outcome.FINISHED, finish_reason="stop", tokens=1)
    update = lengths.take()
    assert update is not None
    assert len(update.samples) == 5 * BURST_S < UNSENT_MAX
    assert lengths.skipped["samples"] == 100 - 5 * BURST_S


def test_deployments_that_are_gone_are_forgotten() -> None:
    lengths = _lengths()
    for _ in range(100):
        lengths.ended(LOOK, Outcome.FINISHED, finish_reason="stop", tokens=1)
    lengths.retain(set())
    lengths.take()
    lengths.ended(LOOK, Outcome.FINISHED, finish_reason="stop", tokens=1)
    assert lengths.take() is not None  # its bucket is a new one


def test_rules_and_samples_survive_the_local_protocol() -> None:
    update = RoutesUpdate(revision=1, routes=(Route(served_name="m", deployment="deployments/d", lengths=TWO),))
    assert decode(encode(update)) == update
    plain = RoutesUpdate(revision=1, routes=(Route(served_name="m", deployment="deployments/d"),))
    assert decode(encode(plain)) == plain


def test_a_quantised_direction_is_the_direction() -> None:
    entries = [0.3, -0.2, 0.9, 0.05] * 16
    assert cosine(entries, entries_of(quantised(entries))) > 0.999
