"""The leader's watch over every replica: frames to the detection child, its findings to verdicts, episodes and events.

Theory of operation. Each round hands the child what arrived since the last one, and the fleet if that changed; nothing
here computes. A round that fails is one round less: frames go on to wait in their bounded inbox, verdicts that nobody
renewed stop to stand, and the reason is kept for whoever asks. A child that was replaced has forgotten its session and
is told everything again; what took long to learn lies in its file. Episodes are written under the leader's guard, and
labels in them are users': a write takes over the label that it finds.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from enova_common.errors import Corrupt, EnovaError
from enova_coordinator.core.detection import (
    DEAD,
    ejected,
    fold_settings,
    lesson_of,
    placement,
    progress_limits,
    restarts,
    verdict_of,
)
from enova_coordinator.core.episode import Episode, EpisodeLabel, EvidenceSeries
from enova_coordinator.core.episode_ledger import EpisodeLedger, EpisodeWrite, FoundChange
from enova_coordinator.core.followed_corrections import FOLLOW_EVERY_S
from enova_coordinator.core.model import Severity, Snapshot, Variant
from enova_coordinator.core.plan import Put
from enova_coordinator.core.verdicts import Verdict
from enova_coordinator.detection_messages import (
    DetectionAnswer,
    DetectionRequest,
    DetectionSetup,
    EngineFacts,
    FleetFacts,
    MeasuredSeries,
    ToldChange,
)
from enova_coordinator.detection_work import step
from enova_coordinator.events import EventLog
from enova_coordinator.frame_inbox import FrameInbox
from enova_coordinator.policy_process import PolicyProcess, PolicyRaised
from enova_coordinator.service_log import in_turns
from enova_coordinator.store import Compare, Store, codec
from enova_coordinator.store.changes import commit
from enova_recommender.detection.episodes import Change
from enova_recommender.detection.lessons import LESSONS_MAX, Lesson
from enova_recommender.performance.correction import Correction
from enova_recommender.performance.engine_model import EngineModel
from enova_recommender.types import VerdictKind

INTERVAL_REAL_S_MIN = 0.5          # under a fast model clock
SAVE_EVERY_S = 60.0                # real time
STALE_AFTER_S = 30.0               # real time: verdicts that were not renewed for so long do not stand
WRITE_ATTEMPTS = 3                 # a user labels while the leader writes
UNWRITTEN_MAX = 1_000              # episodes that wait for the store
DIGITS = 4                         # significant, of evidence that is stored

log = logging.getLogger(__name__)


class Engines(Protocol):
    """The part of the calibration that detection needs."""

    def facts(self, variant: Variant) -> EngineModel | str:
        """What the step times of a variant's engines depend on, or why nobody can say."""
        ...

    def corrections(self) -> Mapping[str, Correction]:
        """What is known of step times, by `EngineModel.key`."""
        ...


class Clock(Protocol):
    """The model clock."""

    @property
    def scale(self) -> float:
        """Model seconds in a second."""
        ...

    def now(self) -> float:
        """Model time."""
        ...

    def real_s(self, model_s: float) -> float:
        """How long a span of model time takes on the wall."""
        ...


@dataclass(slots=True)
class DetectionFigures:
    """What the loop did, for the coordinator's own metrics."""

    rounds: int = 0
    failures: int = 0
    steps: int = 0
    took_s: float = 0.0            # of the newest round, in the child
    total_s: float = 0.0
    omitted: int = 0
    saves: int = 0
    replica_steps: int = 0
    replica_days: float = 0.0      # of model time, watched
    rejected: dict[str, int] = field(default_factory=dict)
    episodes: dict[str, int] = field(default_factory=dict)  # opened, by verdict


class DetectionLoop:
    """Watches while this coordinator leads. `snapshot` is the leader's, `guard` its compare for every write."""

    def __init__(
        self,
        store: Store,
        inbox: FrameInbox,
        process: PolicyProcess,
        engines: Engines,
        events: EventLog,
        *,
        snapshot: Callable[[], Snapshot],
        guard: Callable[[], Compare],
        session: str,
        clock: Clock,
        telemetry_step_s: float,
        bounds: Mapping[str, tuple[float, ...]],
        state_file: Path,
        monotonic_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.figures = DetectionFigures()
        self.trouble = "it has not judged a step yet"
        """Why the newest round brought nothing; empty: it did."""
        self._store, self._inbox, self._process, self._engines, self._events = store, inbox, process, engines, events
        self._snapshot, self._guard = snapshot, guard
        self._session, self._sessions = session, 0
        self._clock, self._monotonic_s, self._wall_now_s = clock, monotonic_s, wall_s
        self._fold = fold_settings(scale=clock.scale, step_s=telemetry_step_s, bounds=bounds)
        self._setup = DetectionSetup(
            fold=self._fold,
            limits=progress_limits(self._fold, scale=clock.scale),
            scale=clock.scale,
            state_file=str(state_file),
        )
        self._interval_s = max(INTERVAL_REAL_S_MIN, clock.real_s(self._fold.step_s))
        self._stale_s = max(STALE_AFTER_S, 4 * self._interval_s)
        self._told: FleetFacts | None = None       # the fleet that the child knows
        self._restarts: dict[str, int] = {}        # as agents count them, by replica
        self._told_restarts: dict[str, int] = {}
        self._facts: dict[str, EngineFacts] = {}
        self._looked = -1                          # revision of the snapshot that the fleet was made of
        self._learnt_s = -math.inf                 # when corrections were last asked for
        self._fleet = FleetFacts(placements=(), engines={})
        self._ledger: EpisodeLedger | None = None
        self._verdicts: dict[str, Verdict] = {}
        self._judged_s = -math.inf
        self._saved_s = monotonic_s()
        self._false: set[str] = set()
        self._lessons: dict[str, Lesson] = {}      # by the episode's name, the newest last
        self._said = self._taught = 0              # changes of them, and as of which the child knows them
        self._unwritten: dict[str, Episode] = {}   # the store may be away

    async def run(self) -> None:
        """Watch round after round, until cancelled; a round that fails is one round less."""
        while True:
            started_s = self._monotonic_s()
            try:
                await self.round()
            except PolicyRaised as error:
                self._sessions += 1    # whatever it stumbled over is in its watch: the next round makes a new one
                self._failed(str(error))
            except EnovaError as error:
                self._failed(str(error))
            except Exception as error:
                # A defect here must cost the watch, not the leader its term.
                log.exception("nothing was detected")
                self._failed(f"internal error: {type(error).__name__}")
            await asyncio.sleep(max(0.0, self._interval_s - (self._monotonic_s() - started_s)))

    async def round(self) -> None:
        """Hand over what came, take what was found."""
        snapshot = self._snapshot()
        if not snapshot.revision:
            return                 # the store was not read yet
        if self._ledger is None:
            self._ledger = await self._load()
        await self._look(snapshot)
        answer = await self._ask(ejected(snapshot))
        self._count(answer)
        if answer.verdicts is not None:
            found = (verdict_of(each, wall_s=self._wall_s) for each in answer.verdicts)
            self._verdicts = {each.object: each for each in found}
            self._judged_s = self._monotonic_s()
        changes = [_found(each) for each in answer.changes]
        writes = self._ledger.take(changes, now_s=self._clock.now(), real_s=self._monotonic_s())
        for write in writes:
            self._tell(write)
            self._unwritten[write.episode.name] = write.episode
        while len(self._unwritten) > UNWRITTEN_MAX:
            del self._unwritten[next(iter(self._unwritten))]
        await self._write()
        self.trouble = answer.trouble

    @property
    def verdicts(self) -> Mapping[str, Verdict]:
        """What stands of replicas, by name: those that are not NORMAL; nothing when nobody judged of late."""
        return self._verdicts if self._monotonic_s() - self._judged_s <= self._stale_s else {}

    @property
    def judges(self) -> bool:
        """Whether it judged of late, so that a replica without a verdict is well."""
        return self._monotonic_s() - self._judged_s <= self._stale_s

    def dead(self) -> frozenset[str]:
        """Replicas that do not serve whatever their state says: hung, or down again and again."""
        return frozenset(name for name, each in self.verdicts.items() if each.cause in DEAD)

    @property
    def open_episodes(self) -> Mapping[str, Episode]:
        """What stands open, by name."""
        return self._ledger.open if self._ledger is not None else {}

    def labelled(self, episode: Episode) -> None:
        """A user said of an episode whether it was one: the next round's verdicts heed it."""
        if episode.label is EpisodeLabel.FALSE:
            self._false.add(episode.name)
        else:
            self._false.discard(episode.name)
        self._learn(episode)

    def _learn(self, episode: Episode) -> None:
        lesson = lesson_of(episode)
        self._lessons.pop(episode.name, None)
        if lesson is not None:
            self._lessons[episode.name] = lesson
        while len(self._lessons) > LESSONS_MAX:
            del self._lessons[next(iter(self._lessons))]
        self._said += 1

    @property
    def false_alarm_rate(self) -> float:
        """Episodes that users called false in this term, by replica and day of model time."""
        days = self.figures.replica_days
        return len(self._false) / days if days else 0.0

    # -- asking

    async def _look(self, snapshot: Snapshot) -> None:
        """The fleet as it is now, where it changed."""
        waiting = {each.variant for each in self._fleet.placements} - self._facts.keys()
        now_s = self._clock.now()
        learns = not 0.0 <= now_s - self._learnt_s < FOLLOW_EVERY_S
        if snapshot.revision == self._looked and not waiting and not learns:
            return
        self._looked = snapshot.revision
        ordered = [snapshot.replicas[name] for name in sorted(snapshot.replicas)]
        found = [placement(snapshot, each) async for each in in_turns(ordered)]
        placed = tuple(each for each in found if each is not None)
        self._restarts = restarts(snapshot, placed)
        variants = {each.variant for each in placed}
        corrections = self._engines.corrections() if learns or variants - self._facts.keys() else {}
        if learns:
            self._learnt_s = now_s
            self._facts = {
                name: replace(facts, correction=corrections.get(facts.model.key, facts.correction))
                for name, facts in self._facts.items()
            }
        for name in sorted(variants - self._facts.keys()):
            model = self._engines.facts(snapshot.variants[name])
            if not isinstance(model, str):
                self._facts[name] = EngineFacts(model=model, correction=corrections.get(model.key))
        self._facts = {name: facts for name, facts in self._facts.items() if name in variants}
        self._fleet = FleetFacts(placements=placed, engines=dict(self._facts))

    async def _ask(self, out_of_routing: frozenset[str]) -> DetectionAnswer:
        """The child's answer. One that knows nothing of this session is told everything, and asked again."""
        save = self._monotonic_s() - self._saved_s >= SAVE_EVERY_S
        anew, lessons = self._fleet != self._told, tuple(self._lessons.values())
        said = self._said          # a label may come while the child works
        moved = {name: n for name, n in self._restarts.items() if anew or self._told_restarts.get(name) != n}
        request = DetectionRequest(
            session=self._session_name,
            now_s=self._clock.now(),
            frames=self._inbox.take(),
            fleet=self._fleet if anew else None,
            ejected=out_of_routing,
            restarts=moved,
            lessons=lessons if said != self._taught else None,
            save=save,
        )
        answer = await self._process.run(step, request)
        if not answer.known:
            self._sessions += 1
            request = replace(
                request, session=self._session_name, setup=self._setup, fleet=self._fleet, restarts=self._restarts,
                lessons=lessons,
            )  # fmt: skip
            assert self._ledger is not None
            self._ledger.detached(now_s=request.now_s)
            answer = await self._process.run(step, request)
        self._told, self._told_restarts, self._taught = self._fleet, self._restarts, said
        if save:
            self._saved_s = self._monotonic_s()
        return answer

    @property
    def _session_name(self) -> str:
        return f"{self._session}.{self._sessions}"

    def _count(self, answer: DetectionAnswer) -> None:
        figures = self.figures
        figures.rounds += 1
        figures.steps += answer.steps
        figures.took_s = answer.took_s
        figures.total_s += answer.took_s
        figures.omitted += answer.omitted
        figures.saves = answer.saved
        figures.rejected = dict(answer.rejected)
        figures.replica_steps += answer.steps * len(self._fleet.placements)
        figures.replica_days = figures.replica_steps * self._fold.step_s / 86_400.0

    def _failed(self, reason: str) -> None:
        if reason != self.trouble:
            log.warning("nothing was detected: %s", reason)
        self.trouble = reason
        self.figures.failures += 1

    # -- telling

    def _tell(self, write: EpisodeWrite) -> None:
        episode = write.episode
        what = f"{episode.verdict.value} ({', '.join(episode.causes) or 'cause unknown'})"
        if write.change is Change.OPENED:
            counts = self.figures.episodes
            counts[episode.verdict.value] = counts.get(episode.verdict.value, 0) + 1
            many = f" of {episode.member_count} replicas" if episode.member_count > 1 else ""
            ill = episode.verdict is not VerdictKind.UNDERUSED
            self._events.record(
                episode.object,
                "EpisodeOpened",
                f"{what}{many}: {episode.suggested_action} is suggested; {episode.name}",
                Severity.WARNING if ill else Severity.NORMAL,
            )
        elif write.change is Change.CLOSED:
            self._events.record(episode.object, "EpisodeClosed", f"{what} is over; {episode.name}")

    async def _write(self) -> None:
        for name in list(self._unwritten):
            await self.keep(self._unwritten[name])
            del self._unwritten[name]

    async def keep(self, episode: Episode) -> None:
        """Write an episode with the label that is stored, whoever writes beside us."""
        for _ in range(WRITE_ATTEMPTS):
            entry = await self._store.get(codec.key(episode.name))
            known: Episode | None = None
            if entry is not None:
                try:
                    known = codec.decode_as(Episode, entry.value, key=entry.key)
                except Corrupt as error:
                    log.warning("left alone: %s", error)
                    return
            value = _labelled(episode, known)
            revision = entry.mod_revision if entry is not None else 0
            if (await commit(self._store, self._guard(), [Put(value=value, revision=revision)])).succeeded:
                return

    async def _load(self) -> EpisodeLedger:
        stored: list[Episode] = []
        entries, _ = await self._store.range(codec.prefix("episodes"))
        for entry in entries:
            try:
                stored.append(codec.decode_as(Episode, entry.value, key=entry.key))
            except Corrupt as error:
                log.warning("left alone: %s", error)
        for each in sorted(stored, key=lambda each: each.label_time_s):
            self._learn(each)
        return EpisodeLedger(stored, wall_s=self._wall_s, now_s=self._clock.now())

    def _wall_s(self, model_s: float) -> float:
        return self._wall_now_s() - self._clock.real_s(self._clock.now() - model_s)


def _found(told: ToldChange) -> FoundChange:
    return FoundChange(
        change=told.change.change,
        episode=told.change.episode,
        member_count=told.member_count,
        series=tuple(_series(told.series)),
    )


def _series(measured: Iterable[MeasuredSeries]) -> Iterable[EvidenceSeries]:
    for each in measured:
        values = tuple(_rounded(value) for value in each.values.tolist())
        yield EvidenceSeries(
            object=each.replica, feature=each.feature, start_s=each.start_s, step_s=each.step_s, values=values
        )


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _labelled(episode: Episode, known: Episode | None) -> Episode:
    """The episode with what users said of it."""
    if known is None or (known.label is EpisodeLabel.NONE and not known.label_time_s):
        return episode
    return replace(
        episode,
        label=known.label,
        label_cause=known.label_cause,
        label_actor=known.label_actor,
        label_time_s=known.label_time_s,
    )
