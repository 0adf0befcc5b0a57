"""What the detection child does in one step: frames in, verdicts, changes of episodes and a little evidence out.

The child keeps one watch, of one session; a session is a leader's term. A child that was replaced has none and says so,
and then it is told everything again.

What an agent's supervision found of an engine stands as a verdict, too: it looks closer and acts sooner than frames
tell, and an episode must say so whoever saw it first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enova_coordinator.core.followed_corrections import FOLLOW_EVERY_S, FollowedCorrection
from enova_coordinator.detection_messages import (
    DetectionAnswer,
    DetectionRequest,
    DetectionSetup,
    FleetFacts,
    MeasuredSeries,
    ToldChange,
)
from enova_coordinator.detection_state import NO_ARRAYS, Arrays, read_state, write_state
from enova_coordinator.service.detection_frames import read_frame
from enova_recommender.detection.causes import RULES, Cause
from enova_recommender.detection.episodes import Change, EpisodeBook, EpisodeChange, gravest
from enova_recommender.detection.features import COLUMN, Feature
from enova_recommender.detection.observation import Placement
from enova_recommender.detection.verdicts import Contribution, Judgement, Verdict
from enova_recommender.detection.watch import FleetWatch
from enova_recommender.performance.correction import UNCORRECTED, Correction
from enova_recommender.performance.engine_model import EngineModel
from enova_recommender.performance.kernel_times import KernelTimes
from enova_recommender.types import VerdictKind

VERDICTS_MAX = 1_000               # in one answer, the gravest first
CHANGES_MAX = 200
MEMBERS_MAX = 64                   # of an episode that are named
SERIES_MAX = 6                     # figures of an episode's worst member
SERIES_STEPS = 120                 # ten minutes
_WATCH, _FACTORS = "watch/", "factors/"  # parts of what is saved
SUPERVISED_SCORE = 0.9             # of what an agent found: it has watched the process itself
_ALWAYS_SHOWN = (Feature.RUNNING, Feature.WAITING, Feature.GENERATION_TOKENS, Feature.STEP_S, Feature.GPU_UTILIZATION)


class FleetDetection:
    """The watch of one session, and what it has been told of the fleet."""

    def __init__(self, session: str, setup: DetectionSetup) -> None:
        self.session = session
        self._watch = FleetWatch(setup.fold, limits=setup.limits)
        self._book = EpisodeBook()
        self._scale = setup.scale
        self._state_file = Path(setup.state_file)
        self._saved, self._trouble = read_state(self._state_file)
        self._writes = 0
        self._fleet = FleetFacts(placements=(), engines={})
        self._kv_tokens: dict[str, float] = {}
        self._times: dict[str, KernelTimes] = {}        # by variant, of data sheets, corrected
        self._factors: dict[str, FollowedCorrection] = {}  # by variant, that those were corrected by
        self._followed_s = -math.inf
        self._degraded: frozenset[str] = frozenset()    # replicas, in the newest step
        self._since: dict[str, float] = {}              # since when agents hold a replica out of routing
        self._unreadable = 0

    def step(self, request: DetectionRequest) -> DetectionAnswer:
        """Take frames in, judge the steps that are over."""
        started_s = time.perf_counter()
        if request.fleet is not None:
            self._place(request.fleet, request.now_s)
        self._follow(request.now_s)
        if request.lessons is not None:
            self._watch.teach(request.lessons)
        self._watch.tell_restarts(request.restarts)
        self._add(request)
        closed = self._watch.close(request.now_s)
        judged: Judgement | None = None
        changes: list[EpisodeChange] = []
        for each in closed:
            judged = self._merged(each.judgement, request.ejected)
            changes += self._book.update(judged, self._watch.fold.placements)
        if judged is not None:
            self._degraded = frozenset(
                name for name, each in judged.verdicts.items() if each.kind is VerdictKind.DEGRADED
            )
        if request.save:
            self._trouble = write_state(self._state_file, self._state())
            self._writes += not self._trouble
        verdicts = None if judged is None else _gravest(judged)
        return DetectionAnswer(
            steps=len(closed),
            verdicts=verdicts,
            changes=tuple(self._told(each, judged) for each in changes[:CHANGES_MAX]),
            omitted=max(0, len(changes) - CHANGES_MAX)
            + (0 if judged is None or verdicts is None else len(judged.verdicts) - len(verdicts)),
            rejected=self._rejected(),
            took_s=time.perf_counter() - started_s,
            saved=self._writes,
            trouble=self._trouble,
        )

    def _place(self, fleet: FleetFacts, now_s: float) -> None:
        self._fleet = fleet
        self._watch.place(self._with_kv_tokens(fleet.placements))
        saved, self._saved = (self._saved, NO_ARRAYS) if fleet.placements else (NO_ARRAYS, self._saved)
        if saved:
            self._restore(saved, now_s)
        for variant, facts in fleet.engines.items():
            if variant not in self._times:
                begun = FollowedCorrection.begin(facts.correction or UNCORRECTED, now_s=now_s)
                factors = self._factors.setdefault(variant, begun)
                self._times[variant] = _predicted(facts.model, factors.correction)
        variants = {each.variant for each in fleet.placements}
        self._times = {name: each for name, each in self._times.items() if name in variants}
        self._factors = {name: each for name, each in self._factors.items() if name in variants}
        self._expect()

    def _follow(self, now_s: float) -> None:
        """Let what steps are judged by follow what calibration learnt since."""
        if 0.0 <= now_s - self._followed_s < FOLLOW_EVERY_S:
            return
        self._followed_s = now_s
        ill = {each.variant for each in self._fleet.placements if each.replica in self._degraded}
        for variant, before in self._factors.items():
            facts = self._fleet.engines.get(variant)
            if facts is None or facts.correction is None or variant not in self._times:
                continue
            now = before.towards(facts.correction, now_s=now_s, is_well=variant not in ill)
            self._factors[variant] = now
            if now.correction != before.correction:
                self._times[variant] = self._times[variant].corrected(now.correction)
        self._expect()

    def _state(self) -> dict[str, npt.NDArray[Any]]:
        """What the watch learnt, and the step times that it learnt it beside."""
        factors = {f"{_FACTORS}{name}": np.array(each.save()) for name, each in self._factors.items()}
        return {**{f"{_WATCH}{name}": each for name, each in self._watch.save().items()}, **factors}

    def _restore(self, saved: Arrays, now_s: float) -> None:
        def part(prefix: str) -> dict[str, npt.NDArray[Any]]:
            return {name.removeprefix(prefix): each for name, each in saved.items() if name.startswith(prefix)}

        try:
            factors = {
                name: FollowedCorrection.load(each.tolist(), now_s=now_s) for name, each in part(_FACTORS).items()
            }
            self._watch.restore(part(_WATCH))
        except (KeyError, ValueError, IndexError) as error:
            self._trouble = f"what was known cannot be used, and is learnt anew: {error}"  # of another release
            return
        self._factors = factors

    def _with_kv_tokens(self, placements: Iterable[Placement]) -> list[Placement]:
        return [
            replace(each, kv_tokens=self._kv_tokens[each.replica]) if each.replica in self._kv_tokens else each
            for each in placements
        ]

    def _expect(self) -> None:
        placed = self._fleet.placements
        self._watch.expect({each.replica: self._times[each.variant] for each in placed if each.variant in self._times})

    def _add(self, request: DetectionRequest) -> None:
        rooms: dict[str, float] = {}
        for received in request.frames:
            read = read_frame(received.node, received.data, scale=self._scale)
            if read is None:
                self._unreadable += 1
                continue
            rooms |= read.kv_tokens
            self._watch.add(read.frame, now_s=received.received_s)
        placed = {each.replica for each in self._fleet.placements}
        rooms = {name: tokens for name, tokens in rooms.items() if name in placed}
        if any(self._kv_tokens.get(name) != tokens for name, tokens in rooms.items()):
            self._kv_tokens = {name: tokens for name, tokens in (self._kv_tokens | rooms).items() if name in placed}
            self._watch.place(self._with_kv_tokens(self._fleet.placements))

    def _merged(self, judgement: Judgement, ejected: frozenset[str]) -> Judgement:
        """The judgement with what agents found of engines that frames do not call hung yet."""
        self._since = {name: self._since.get(name, judgement.end_s) for name in ejected}
        found = {
            name: _supervised(name, since_s, judgement.end_s)
            for name, since_s in self._since.items()
            if judgement.verdicts.get(name) is None or judgement.verdicts[name].cause is not Cause.HUNG
        }
        return replace(judgement, verdicts={**judgement.verdicts, **found}) if found else judgement

    def _told(self, change: EpisodeChange, judged: Judgement | None) -> ToldChange:
        members = change.episode.members
        named = frozenset(sorted(members)[:MEMBERS_MAX])
        told = ToldChange(
            change=replace(change, episode=replace(change.episode, members=named)), member_count=len(members)
        )
        if change.change is Change.CLOSED or judged is None:
            return told
        ill = [verdict for name in members if (verdict := judged.verdicts.get(name)) is not None]
        if not ill:
            return told
        return replace(told, series=self._series(gravest(ill), judged.end_s))

    def _series(self, verdict: Verdict, end_s: float) -> tuple[MeasuredSeries, ...]:
        """The newest steps of the figures that a verdict rests on, then of some that always help."""
        fold = self._watch.fold
        if verdict.replica not in fold.placements:
            return ()
        rests = [Feature(each.feature) for each in verdict.contributions if each.feature in set(Feature)]
        history = fold.history(verdict.replica, steps=SERIES_STEPS)
        known = np.flatnonzero(~np.isnan(history).all(axis=1))
        if not len(known):
            return ()
        first, step_s = int(known[0]), fold.settings.step_s
        start_s = end_s - (len(history) - first) * step_s
        return tuple(
            MeasuredSeries(
                replica=verdict.replica, feature=feature.value, start_s=start_s, step_s=step_s, values=column.copy()
            )
            for feature in list(dict.fromkeys((*rests, *_ALWAYS_SHOWN)))[:SERIES_MAX]
            if not np.isnan(column := history[first:, COLUMN[feature]]).all()
        )

    def _rejected(self) -> dict[str, int]:
        counts = {reason.value.lower(): count for reason, count in self._watch.fold.rejected.items()}
        counts |= {"unreadable": self._unreadable, "skipped_steps": self._watch.fold.skipped}
        return {reason: count for reason, count in counts.items() if count}


_current: list[FleetDetection] = []  # the child's only state: one watch at most


def step(request: DetectionRequest) -> DetectionAnswer:
    """One step of work, in the child."""
    if request.setup is not None:
        _current[:] = [FleetDetection(request.session, request.setup)]
    if not _current or _current[0].session != request.session:
        return DetectionAnswer(known=False)
    return _current[0].step(request)


def _predicted(model: EngineModel, correction: Correction) -> KernelTimes:
    times = KernelTimes(model.shape, model.gpu, parallelism=model.parallelism, precision=model.precision)
    return times.corrected(correction)


def _supervised(replica: str, since_s: float, now_s: float) -> Verdict:
    rule = RULES[Cause.HUNG]
    out = Contribution(feature="out_of_routing_s", value=max(0.0, now_s - since_s), threshold=1.0)
    return Verdict(
        replica=replica, kind=rule.kind, cause=Cause.HUNG, score=SUPERVISED_SCORE, confidence=SUPERVISED_SCORE,
        since_s=since_s, action=rule.action, contributions=(out,),
    )  # fmt: skip


def _gravest(judgement: Judgement) -> tuple[Verdict, ...]:
    """Those that keep replicas out of the arithmetic of scaling first, then by score."""
    dead = judgement.dead

    def gravity(verdict: Verdict) -> tuple[bool, float, str]:
        return verdict.replica not in dead, -verdict.score, verdict.replica

    return tuple(sorted(judgement.verdicts.values(), key=gravity)[:VERDICTS_MAX])
