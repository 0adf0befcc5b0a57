"""Limits that are learned as answers come: one step takes what is known and some new answers; pure.

Theory of operation. The newest SAMPLES_MAX answers of a deployment are kept. Communities are sought anew whenever half
as many answers have come as were known when they were last sought. In between, a new answer is assigned to its
community, whose chart watches for drift; where it alarms, what came before the change is dropped, and the community has
no limit of its own until it has answers enough again. The chart compares with the distribution that was fitted before
the answers came which it judges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from enova_recommender.recommend.max_tokens.communities import assign, centres
from enova_recommender.recommend.max_tokens.drift import Chart, watched
from enova_recommender.recommend.max_tokens.survival import (
    Ints,
    LengthDensity,
    density_of,
    limit_of,
    product_limit,
)
from enova_recommender.recommend.max_tokens.types import Centres, Kind, LengthSamples, Limits, NoLimit, no_samples

SAMPLES_MAX = 4096         # answers that are kept: the newest; at 128 bytes a vector, half a megabyte
ANSWERS_MIN = 100          # of a kind, for a limit of its own
TAIL_MIN = 5               # answers that a limit must be expected to have cut among those it rests on
REGROUP_MIN = 256          # answers before communities are sought


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """All that is known of one deployment's answers. `kinds` is the community of each sample."""

    samples: LengthSamples
    kinds: Ints
    centres: Centres
    charts: tuple[Chart, ...] = ()
    grouped_at: int = 0        # answers that were known when communities were last sought
    fresh: int = 0             # answers since then
    drifts: int = 0


def nothing_known(dimension: int) -> Knowledge:
    """What is known before the first answer."""
    return Knowledge(
        samples=no_samples(dimension),
        kinds=np.zeros(0, np.int64),
        centres=Centres(np.zeros((0, dimension)), np.zeros(0)),
    )


def learned(known: Knowledge, answers: LengthSamples, *, seed: int) -> Knowledge:
    """What is known after some more answers, in their order."""
    if not len(answers):
        return known
    known = _judged(known, answers)
    due = max(REGROUP_MIN, known.grouped_at // 2 if known.grouped_at else 0)
    return grouped(known, seed=seed) if known.fresh >= due else known


def grouped(known: Knowledge, *, seed: int) -> Knowledge:
    """The same answers with communities sought anew."""
    where = centres(known.samples.vectors, seed=seed)
    return replace(
        known,
        kinds=assign(known.samples.vectors, where),
        centres=where,
        charts=tuple(Chart() for _ in where.reaches),
        grouped_at=len(known.samples),
        fresh=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What was known, the answers that came, and the share that limits may cut."""

    known: Knowledge
    answers: LengthSamples
    cut_share: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """What is known after a lesson, and the limits that follow."""

    known: Knowledge
    limits: Limits


def taught(lesson: Lesson) -> Taught:
    """One step of learning, as one call."""
    known = learned(lesson.known, lesson.answers, seed=lesson.seed)
    return Taught(known=known, limits=limits(known, cut_share=lesson.cut_share))


def limits(known: Knowledge, *, cut_share: float) -> Limits:
    """The limits that cut this share of each kind's answers."""
    everything = np.ones(len(known.samples), np.bool_)
    overall, _, _ = _limit(known.samples.at(everything), cut_share)
    return Limits(
        cut_share=cut_share,
        kinds=tuple(_kind(known, place, cut_share) for place in range(len(known.centres.reaches))),
        overall=overall,
        answers=len(known.samples),
        drifts=known.drifts,
    )


def density_of_kind(known: Knowledge, kind: int) -> LengthDensity:
    """The fitted density of one kind's lengths."""
    members = known.samples.at(known.kinds == kind)
    return density_of(product_limit(members.tokens, members.stopped))


def _kind(known: Knowledge, place: int, cut_share: float) -> Kind:
    members = known.samples.at(known.kinds == place)
    limit, no_limit, median = _limit(members, cut_share)
    return Kind(
        centroid=tuple(known.centres.centroids[place].tolist()),
        reach=float(known.centres.reaches[place]),
        answers=len(members),
        stopped=int(members.stopped.sum()),
        median=median,
        limit=limit,
        no_limit=no_limit,
    )


def _limit(members: LengthSamples, cut_share: float) -> tuple[int | None, NoLimit | None, int | None]:
    """The limit of some answers, or why there is none; and their median length."""
    masses = product_limit(members.tokens, members.stopped)
    median = density_of(masses).limit(0.5)
    if len(members) < max(ANSWERS_MIN, math.ceil(TAIL_MIN / cut_share)):
        return None, NoLimit.FEW_ANSWERS, median
    limit = limit_of(masses, cut_share)
    return limit, NoLimit.TAIL_UNSEEN if limit is None else None, median


def _judged(known: Knowledge, answers: LengthSamples) -> Knowledge:
    """Known with the answers added, each community's chart gone on, and what a drift made worthless dropped."""
    kinds = assign(answers.vectors, known.centres)
    charts = []
    dropped = np.zeros(len(known.samples) + len(answers), np.bool_)
    together = np.concatenate([known.kinds, kinds])
    drifts = known.drifts
    for place, chart in enumerate(known.charts):
        chart = _watched(known, answers.at(kinds == place), place, chart)  # noqa: PLW2901  # the same one, later
        if chart.since is not None:
            rows = np.flatnonzero(together == place)
            dropped[rows[: len(rows) - chart.since]] = True
            chart, drifts = Chart(), drifts + 1  # noqa: PLW2901  # it begins anew
        charts.append(chart)
    kept = np.flatnonzero(~dropped)[-SAMPLES_MAX:]
    return replace(
        known,
        samples=known.samples.with_more(answers).at(kept),
        kinds=together[kept],
        charts=tuple(charts),
        fresh=known.fresh + len(answers),
        drifts=drifts,
    )


def _watched(known: Knowledge, answers: LengthSamples, place: int, chart: Chart) -> Chart:
    before = int((known.kinds == place).sum())
    if not len(answers) or before < ANSWERS_MIN:
        return chart               # too little is known to say that anything changed
    return watched(chart, density_of_kind(known, place), answers.tokens, answers.stopped)


