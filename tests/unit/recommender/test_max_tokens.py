"""Limits on answers: kinds are found, stopped answers are no ends, growth drops what is known, little data no limit."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest

from enova_recommender.recommend.max_tokens import (
    NOWHERE,
    Centres,
    Knowledge,
    LengthSamples,
    NoLimit,
    UnreadableKnowledge,
    assign,
    communities,
    density_of,
    from_plain,
    grouped,
    learned,
    limit_of,
    limits,
    nothing_known,
    product_limit,
    to_plain,
)
from enova_recommender.recommend.max_tokens.communities import KINDS_MAX, MEMBERS_MIN, neighbours, unit
from enova_recommender.recommend.max_tokens.learning import ANSWERS_MIN, REGROUP_MIN, SAMPLES_MAX
from enova_recommender.recommend.max_tokens.survival import worth_at

DIMENSION = 32
CUT = 0.05


def draw_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def kind_of_prompts(kind: int, count: int, draw: np.random.Generator, *, spread: float = 0.5) -> np.ndarray:
    """Vectors around one direction of their own."""
    middle = np.random.default_rng(1000 + kind).normal(size=DIMENSION)
    points = middle / np.linalg.norm(middle) + draw.normal(size=(count, DIMENSION)) * spread / DIMENSION**0.5
    return np.round(unit(points) * 127).astype(np.int8)


def answers(
    kind: int, count: int, *, median: float, draw: np.random.Generator, cap: int | None = None
) -> LengthSamples:
    tokens = np.ceil(median * np.exp(draw.normal(0.0, 0.4, count))).astype(np.int64)
    stopped = np.zeros(count, np.bool_) if cap is None else tokens > cap
    seen = tokens if cap is None else np.minimum(tokens, cap)
    return LengthSamples(vectors=kind_of_prompts(kind, count, draw), tokens=seen, stopped=stopped)


def mixed(one: LengthSamples, other: LengthSamples, draw: np.random.Generator) -> LengthSamples:
    both = one.with_more(other)
    return both.at(draw.permutation(len(both)))


# The estimate


def test_the_product_limit_estimate_of_a_textbook_case() -> None:
    # 6, 6, 6, 6+, 7, 9+, 10 (+ = stopped): S(6) = 4/7, S(7) = 4/7 * 2/3, S(10) = 0 (one at risk, one ended).
    tokens = np.array([6, 6, 6, 6, 7, 9, 10])
    stopped = np.array([False, False, False, True, False, True, False])
    masses = product_limit(tokens, stopped)
    assert masses.lengths.tolist() == [6.0, 7.0, 10.0]
    assert masses.mass.tolist() == pytest.approx([3 / 7, 4 / 7 / 3, 4 / 7 * 2 / 3])
    assert masses.beyond == pytest.approx(0.0)


def test_without_stops_the_estimate_is_the_sample_and_its_worth_the_sample_size() -> None:
    tokens = np.arange(1, 201)
    masses = product_limit(tokens, np.zeros(200, np.bool_))
    assert masses.mass.tolist() == pytest.approx([1 / 200] * 200)
    assert worth_at(masses, CUT) == pytest.approx(200, rel=0.02)


def test_what_the_longest_stop_hides_lies_beyond_and_gives_no_limit() -> None:
    tokens = np.array([10] * 90 + [20] * 10)
    stopped = np.array([False] * 90 + [True] * 10)
    masses = product_limit(tokens, stopped)
    assert masses.beyond == pytest.approx(0.1)
    assert limit_of(masses, 0.05) is None
    assert limit_of(masses, 0.2) is not None


def test_nothing_but_stops_gives_no_limit_and_no_error() -> None:
    masses = product_limit(np.array([5, 5, 7]), np.array([True, True, True]))
    assert masses.beyond == 1.0
    assert limit_of(masses, 0.5) is None
    assert density_of(masses).limit(0.5) is None


def test_equal_lengths_give_their_own_length_as_limit() -> None:
    masses = product_limit(np.full(500, 64), np.zeros(500, np.bool_))
    assert limit_of(masses, CUT) in {64, 65}


def test_a_density_has_the_mass_of_its_sample() -> None:
    tokens = np.ceil(np.exp(draw_of(1).normal(5, 0.5, 300))).astype(np.int64)
    density = density_of(product_limit(tokens, np.zeros(300, np.bool_)))
    at = np.linspace(0, 10, 2001)
    assert float(np.trapezoid(density.density(at), at)) == pytest.approx(1.0, abs=1e-3)
    spread = float(np.sqrt(np.trapezoid(density.density(at) * (at - np.log(tokens).mean()) ** 2, at)))
    assert spread == pytest.approx(float(np.log(tokens).std()), rel=0.02)  # kernels do not widen it


# Communities


def test_two_kinds_of_prompts_are_two_communities() -> None:
    draw = draw_of(2)
    vectors = np.concatenate([kind_of_prompts(0, 150, draw), kind_of_prompts(1, 100, draw)])
    found = communities(vectors, seed=3)
    assert [set((each >= 150).tolist()) for each in found] == [{False}, {True}]
    assert [len(each) for each in found] == [150, 100]


def test_neighbours_are_the_nearest_and_never_oneself() -> None:
    vectors = kind_of_prompts(0, 700, draw_of(3), spread=1.0)  # more rows than one table of cosines holds
    nearest, cosines = neighbours(vectors, 5)
    table = unit(vectors) @ unit(vectors).T
    np.fill_diagonal(table, -2)
    for place in (0, 511, 512, 699):
        assert sorted(cosines[place]) == pytest.approx(sorted(table[place])[-5:])
        assert place not in nearest[place]


def test_a_prompt_far_from_all_kinds_belongs_to_none() -> None:
    draw = draw_of(4)
    known = grouped(
        dataclasses.replace(nothing_known(DIMENSION), samples=answers(0, 200, median=50, draw=draw)), seed=1
    )
    strangers = kind_of_prompts(7, 50, draw)
    assert (assign(strangers, known.centres) == NOWHERE).mean() > 0.9
    assert (assign(kind_of_prompts(0, 200, draw), known.centres) == 0).mean() > 0.9
    assert assign(strangers, nothing_known(DIMENSION).centres).tolist() == [NOWHERE] * 50


def _found_among(*groups: np.ndarray) -> Knowledge:
    vectors = np.concatenate(groups)
    count = len(vectors)
    samples = LengthSamples(vectors=vectors, tokens=np.ones(count, np.int64), stopped=np.zeros(count, np.bool_))
    return grouped(dataclasses.replace(nothing_known(DIMENSION), samples=samples), seed=0)


def test_groups_too_small_to_learn_from_are_no_kinds() -> None:
    draw = draw_of(5)
    opposite = -kind_of_prompts(0, MEMBERS_MIN - 1, draw)  # joined to nothing else
    known = _found_among(kind_of_prompts(0, 100, draw), opposite)
    assert len(known.centres.reaches) == 1
    assert (assign(opposite, known.centres) == NOWHERE).all()


def test_kinds_are_bounded_in_number() -> None:
    draw = draw_of(5)
    many = [kind_of_prompts(kind, MEMBERS_MIN + kind, draw, spread=0.2) for kind in range(KINDS_MAX + 4)]
    assert len(_found_among(*many).centres.reaches) == KINDS_MAX


def test_prompts_that_are_all_alike_are_a_kind_that_they_belong_to() -> None:
    same = np.repeat(kind_of_prompts(0, 1, draw_of(5)), 60, axis=0)
    known = _found_among(same, kind_of_prompts(1, 60, draw_of(6)))
    assert len(set(assign(same, known.centres).tolist()) - {NOWHERE}) == 1
    assert (assign(same, known.centres) != NOWHERE).all()


# Learning


def test_two_kinds_get_two_limits() -> None:
    draw = draw_of(6)
    stream = mixed(answers(0, 400, median=40, draw=draw), answers(1, 300, median=900, draw=draw), draw)
    found = limits(learned(nothing_known(DIMENSION), stream, seed=1), cut_share=CUT)
    true_limits = [40 * np.exp(0.4 * 1.645), 900 * np.exp(0.4 * 1.645)]
    assert [kind.limit for kind in found.kinds] == pytest.approx(true_limits, rel=0.15)
    assert [kind.median for kind in found.kinds] == pytest.approx([40, 900], rel=0.1)
    assert found.answers == 700


def test_stopped_answers_do_not_draw_the_limit_in() -> None:
    draw = draw_of(7)
    caps = np.exp(draw.normal(np.log(70), 0.4, 3000)).astype(np.int64)
    whole = answers(0, 3000, median=50, draw=draw)
    stopped = whole.tokens > caps
    seen = LengthSamples(vectors=whole.vectors, tokens=np.minimum(whole.tokens, caps), stopped=stopped)
    assert 0.2 < stopped.mean() < 0.35
    true_limit = 50 * np.exp(0.4 * 1.645)
    assert limit_of(product_limit(seen.tokens, seen.stopped), CUT) == pytest.approx(true_limit, rel=0.06)
    naive = limit_of(product_limit(seen.tokens, np.zeros(3000, np.bool_)), CUT)
    assert naive is not None
    assert naive < 0.9 * true_limit


def test_too_few_answers_fall_back_to_the_limit_of_all_and_then_to_none() -> None:
    draw = draw_of(8)
    few = mixed(answers(0, 500, median=60, draw=draw), answers(1, ANSWERS_MIN - 20, median=600, draw=draw), draw)
    found = limits(learned(nothing_known(DIMENSION), few, seed=1), cut_share=CUT)
    assert [kind.no_limit for kind in found.kinds] == [None, NoLimit.FEW_ANSWERS]
    assert found.of(1) == found.of(NOWHERE) == found.overall is not None
    very_few = limits(learned(nothing_known(DIMENSION), few.at(np.arange(ANSWERS_MIN - 1)), seed=1), cut_share=CUT)
    assert very_few.overall is None
    assert very_few.kinds == ()


def test_a_small_cut_share_asks_for_more_answers() -> None:
    known = learned(nothing_known(DIMENSION), answers(0, 400, median=60, draw=draw_of(9)), seed=1)
    assert limits(known, cut_share=0.05).overall is not None
    assert limits(known, cut_share=0.01).overall is None  # five of the longest per cent are not among 400


def test_a_kind_whose_tail_nobody_has_seen_gets_no_limit_not_even_that_of_all() -> None:
    draw = draw_of(10)
    stream = mixed(answers(0, 900, median=40, draw=draw), answers(1, 300, median=500, draw=draw, cap=512), draw)
    found = limits(learned(nothing_known(DIMENSION), stream, seed=1), cut_share=CUT)
    assert found.kinds[1].no_limit is NoLimit.TAIL_UNSEEN
    assert found.of(1) is None
    assert found.of(0) is not None


def test_answers_that_grow_drop_what_was_known_of_their_kind_and_of_no_other() -> None:
    draw = draw_of(11)
    before = mixed(answers(0, 400, median=50, draw=draw), answers(1, 300, median=50, draw=draw), draw)
    known = learned(nothing_known(DIMENSION), before, seed=1)
    old = limits(known, cut_share=CUT)
    grown = learned(known, answers(0, 60, median=200, draw=draw), seed=1)
    after = limits(grown, cut_share=CUT)
    assert after.drifts == 1
    assert after.kinds[0].no_limit is NoLimit.FEW_ANSWERS
    assert after.kinds[0].answers == pytest.approx(60, abs=5)  # those since the change
    assert after.kinds[1].answers == old.kinds[1].answers
    again = limits(learned(grown, answers(0, 150, median=200, draw=draw), seed=1), cut_share=CUT)
    assert again.kinds[0].limit == pytest.approx(200 * np.exp(0.4 * 1.645), rel=0.2)


def test_answers_that_stay_the_same_or_shrink_drop_nothing() -> None:
    draw = draw_of(12)
    known = learned(nothing_known(DIMENSION), answers(0, 600, median=50, draw=draw), seed=1)
    for median in (50.0, 20.0):
        known = learned(known, answers(0, 280, median=median, draw=draw), seed=1)
        assert known.drifts == 0
        assert len(known.samples) >= 880


def test_a_stopped_answer_is_no_sign_of_growth() -> None:
    # Half of the kind's answers begin to be stopped at the median: their hazard is what it was.
    draw = draw_of(13)
    known = learned(nothing_known(DIMENSION), answers(0, 600, median=50, draw=draw), seed=1)
    later = learned(known, answers(0, 250, median=50, draw=draw, cap=50), seed=1)
    assert later.drifts == 0


def test_memory_is_bounded_and_keeps_the_newest() -> None:
    draw = draw_of(14)
    known = dataclasses.replace(nothing_known(DIMENSION), grouped_at=1 << 40)  # communities are not sought
    for median in (50.0, 60.0, 70.0, 80.0):
        newest = answers(0, 1500, median=median, draw=draw)
        known = learned(known, newest, seed=1)
    assert len(known.samples) == SAMPLES_MAX == len(known.kinds)
    assert known.samples.tokens[-1500:].tolist() == newest.tokens.tolist()


def test_communities_are_sought_again_when_half_as_many_answers_came_as_were_known() -> None:
    draw = draw_of(15)
    known = learned(nothing_known(DIMENSION), answers(0, REGROUP_MIN - 1, median=50, draw=draw), seed=1)
    assert not len(known.centres.reaches)
    known = learned(known, answers(0, 300, median=50, draw=draw), seed=1)
    assert (known.grouped_at, known.fresh) == (REGROUP_MIN + 299, 0)
    known = learned(known, answers(1, 250, median=50, draw=draw), seed=1)
    assert len(known.centres.reaches) == 1
    known = learned(known, answers(1, 50, median=50, draw=draw), seed=1)
    assert len(known.centres.reaches) == 2


def test_no_answers_teach_nothing() -> None:
    known = nothing_known(DIMENSION)
    assert learned(known, known.samples, seed=1) is known
    assert limits(known, cut_share=CUT).overall is None


# Saving


@functools.cache
def _some() -> Knowledge:
    draw = draw_of(16)
    stream = mixed(answers(0, 300, median=40, draw=draw, cap=80), answers(1, 200, median=900, draw=draw), draw)
    return learned(learned(nothing_known(DIMENSION), stream, seed=1), answers(0, 30, median=60, draw=draw), seed=1)


def test_saved_knowledge_comes_back_the_same() -> None:
    known = _some()
    back = from_plain(json.loads(json.dumps(to_plain(known))))
    assert limits(back, cut_share=CUT) == limits(known, cut_share=CUT)
    more = answers(1, 50, median=2000, draw=draw_of(17))
    assert limits(learned(back, more, seed=2), cut_share=CUT) == limits(learned(known, more, seed=2), cut_share=CUT)
    assert back.charts == known.charts


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2), ("kind", "other"), ("tokens", "AAAA"), ("vectors", "not base64!"), ("dimension", 0),
        ("charts", []), ("kinds", None), ("reaches", ["x"]), ("dimension", "many"),
    ],
)  # fmt: skip
def test_saved_knowledge_that_was_spoiled_is_refused(field: str, value: object) -> None:
    plain = to_plain(_some()) | {field: value}
    with pytest.raises(UnreadableKnowledge):
        from_plain(plain)


def test_a_centre_is_of_length_one() -> None:
    where: Centres = _some().centres
    assert np.linalg.norm(where.centroids, axis=1).tolist() == pytest.approx([1.0] * len(where.reaches))
