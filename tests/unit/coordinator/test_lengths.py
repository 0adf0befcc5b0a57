"""Limits on answers in the coordinator: rules for routes, steady ones, and what people are told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from enova_coordinator.core.lengths import (
    DIMENSION,
    LengthState,
    context_tokens,
    length_sentences,
    projection_seed,
    rules_of,
    steady,
    why_unlimited,
)
from enova_coordinator.core.model import (
    Deployment,
    DeploymentSpec,
    MaxTokensMode,
    MaxTokensPolicy,
    Snapshot,
    Variant,
)
from enova_coordinator.core.routes import LengthRules, RouteTable, next_table
from enova_coordinator.core.series import LengthFigures, NodeFrame
from enova_coordinator.core.validation import spec_problems
from enova_coordinator.store import codec
from enova_coordinator.telemetry import LENGTHS_MAX, Telemetry, TelemetryLimits
from enova_recommender.recommend.max_tokens import Kind, Limits, NoLimit

NAME = "deployments/d"


def _deployment(mode: MaxTokensMode = MaxTokensMode.APPLY, uid: str = "u1") -> Deployment:
    spec = DeploymentSpec(model="m", max_tokens_policy=MaxTokensPolicy(mode=mode))
    return Deployment(name=NAME, uid=uid, spec=spec)


def _kind(limit: int | None, no_limit: NoLimit | None = None) -> Kind:
    centroid = (1.0, *(0.0,) * (DIMENSION - 1))
    return Kind(
        centroid=centroid, reach=0.4, answers=200, stopped=20, median=50, limit=limit, no_limit=no_limit
    )


def _limits(*kinds: Kind, overall: int | None = 500) -> Limits:
    return Limits(cut_share=0.05, kinds=kinds, overall=overall, answers=400, drifts=1)


LIMITS = _limits(_kind(100), _kind(None, NoLimit.FEW_ANSWERS), _kind(None, NoLimit.TAIL_UNSEEN))


def _rules(limits: Limits | None = LIMITS, mode: MaxTokensMode = MaxTokensMode.APPLY) -> LengthRules:
    rules = rules_of(_deployment(mode), limits, method=1, context_tokens=4096, ingresses=4)
    assert rules is not None
    return rules


def test_a_kind_without_a_limit_has_that_of_all_or_none() -> None:
    rules = _rules()
    assert [kind.limit_tokens for kind in rules.kinds] == [100, 500, 0]
    assert rules.limit_tokens == 500
    assert rules.apply
    assert len(rules.kinds[0].centroid) == DIMENSION


def test_observing_sends_the_projection_and_no_limit() -> None:
    rules = _rules(mode=MaxTokensMode.OBSERVE)
    assert (rules.apply, rules.kinds, rules.limit_tokens, rules.dimension) == (False, (), 0, DIMENSION)
    assert not _rules(None).apply
    assert rules_of(_deployment(MaxTokensMode.OFF), LIMITS, method=1, context_tokens=1, ingresses=1) is None


def test_ingresses_share_what_may_be_reported() -> None:
    assert _rules().samples_per_s == 5.0
    many = rules_of(_deployment(), LIMITS, method=1, context_tokens=1, ingresses=10_000)
    assert many is not None
    assert many.samples_per_s == 0.05


def test_every_deployment_has_a_projection_of_its_own_that_every_leader_knows() -> None:
    assert projection_seed(_deployment()) == projection_seed(_deployment(MaxTokensMode.OBSERVE))
    assert projection_seed(_deployment()) != projection_seed(_deployment(uid="u2"))
    assert 0 <= projection_seed(_deployment()) < 2**63


def test_rules_that_hardly_differ_are_not_said_anew() -> None:
    said = _rules()
    nearly = _rules(_limits(_kind(102), *LIMITS.kinds[1:]))
    assert steady(said, nearly) is said
    moved = _rules(_limits(_kind(104), *LIMITS.kinds[1:]))
    assert steady(said, moved) is moved
    appears = _rules(_limits(_kind(100), _kind(None, NoLimit.FEW_ANSWERS), _kind(900)))
    assert steady(said, appears) is appears
    for other in (replace(said, apply=False), replace(said, kinds=said.kinds[:1]), replace(said, context_tokens=1)):
        assert steady(said, other) is other
    elsewhere = replace(said, kinds=(replace(said.kinds[0], reach=0.5), *said.kinds[1:]))
    assert steady(said, elsewhere) is elsewhere
    assert steady(None, said) is said


def test_routes_bear_the_rules_of_their_deployment() -> None:
    snapshot = Snapshot(revision=3, deployments={NAME: _deployment()})
    rules = _rules()
    table = next_table(RouteTable(), snapshot, {NAME: rules})
    assert table.routes["d"].lengths is rules
    assert next_table(table, snapshot, {NAME: rules}) is table
    without = next_table(table, snapshot)
    assert without.routes["d"].lengths is None
    assert without.revision > table.revision


def test_the_context_is_the_smallest_that_an_engine_of_the_deployment_has() -> None:
    variant = Variant(name=f"{NAME}/variants/v1", deployment=NAME, model="meta-llama/Llama-3.1-8B-Instruct",
                      served_names=("d",))  # fmt: skip
    assert context_tokens([variant], None) == 131072
    small = replace(variant, configuration={"max_model_len": 2048})
    assert context_tokens([variant, small], None) == 2048
    assert context_tokens([small, replace(variant, model="nobody/knows")], None) == 0
    assert context_tokens([], None) == 0


@pytest.mark.parametrize(
    ("mode", "limits", "context", "word"),
    [
        (MaxTokensMode.OBSERVE, LIMITS, 4096, "observes"),
        (MaxTokensMode.APPLY, LIMITS, 0, "context"),
        (MaxTokensMode.APPLY, _limits(overall=None), 4096, "too few"),
        (MaxTokensMode.APPLY, LIMITS, 4096, ""),
    ],
)
def test_why_nothing_is_limited_is_told(mode: MaxTokensMode, limits: Limits, context: int, word: str) -> None:
    reason = why_unlimited(_deployment(mode), limits, context=context)
    assert (word in reason) if word else not reason


def test_people_are_told_the_limits_in_numbers() -> None:
    policy = MaxTokensPolicy(mode=MaxTokensMode.APPLY)
    told = " ".join(length_sentences(policy, LengthState(limits=LIMITS)))
    for part in ("3 kinds", "400 answers", "500 tokens", "limited to 100 tokens", "median 50", "1 times", "too few"):
        assert part in told
    assert "no answer" in " ".join(length_sentences(policy, None))
    assert not list(length_sentences(MaxTokensPolicy(), None))


@pytest.mark.parametrize(
    ("share", "fine"), [(0.05, True), (0.5, True), (0.0, False), (0.51, False), (float("nan"), False)]
)
def test_a_cut_share_lies_between_none_and_half(share: float, fine: bool) -> None:
    spec = DeploymentSpec(model="m", max_tokens_policy=MaxTokensPolicy(cut_share=share))
    fields = [problem.field for problem in spec_problems(spec, policies=())]
    assert fields == ([] if fine else ["max_tokens_policy.cut_share"])


def test_the_policy_is_stored_and_older_values_have_none() -> None:
    deployment = _deployment()
    assert codec.decode(codec.encode(deployment)) == deployment
    older = codec.encode(Deployment(name=NAME, uid="u", spec=DeploymentSpec(model="m")))
    start = older.index(b',"max_tokens_policy"')
    stripped = older[:start] + older[older.index(b"}", start) + 1 :]
    assert codec.decode(stripped) == Deployment(name=NAME, uid="u", spec=DeploymentSpec(model="m"))


# Telemetry keeps lengths only of those that ask for it


def _frame(sequence: int, *samples: LengthFigures) -> NodeFrame:
    return NodeFrame("nodes/n", "b", sequence, 0.0, 1.0, [], [], [], lengths=samples)


def _sample(deployment: str = NAME, tokens: int = 5) -> LengthFigures:
    return LengthFigures(deployment, 1, b"\x00" * DIMENSION, tokens, stopped=False)


def test_lengths_are_kept_for_wanted_deployments_once_and_bounded() -> None:
    telemetry = Telemetry(TelemetryLimits(), now_s=lambda: 1.0, owns=lambda *_: True)
    telemetry.add(_frame(1, _sample()), sender="nodes/n")
    assert telemetry.take_lengths(NAME) == []
    telemetry.want_lengths([NAME])
    telemetry.add(_frame(2, _sample(), _sample("deployments/other"), _sample(tokens=-1)), sender="nodes/n")
    telemetry.want_lengths([NAME])
    assert telemetry.take_lengths(NAME) == [_sample()]
    assert telemetry.take_lengths(NAME) == []
    assert telemetry.rejected["unwanted_length"] == 3
    telemetry.add(_frame(3, *(_sample(tokens=each) for each in range(LENGTHS_MAX + 10))), sender="nodes/n")
    assert [each.tokens for each in telemetry.take_lengths(NAME)][:1] == [10]
    telemetry.want_lengths([])
    assert telemetry.take_lengths(NAME) == []
