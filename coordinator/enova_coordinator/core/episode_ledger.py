"""Which stored episodes a detector's changes mean: the pure part of keeping episodes across restarts.

Theory of operation. A detector knows its episodes by ids of its own and forgets them when its process ends; what is
stored outlives it. An episode that opens at a root where one of the same kind stands open in the store goes on under
the stored name: a restart splits nothing. A stored one that the detector does not speak of for `ABANDON_AFTER_S` after
it began is over; nobody saw its end, so it ends where it was last seen. The ledger never touches labels.

Figures move with every step and are written now and then; a new cause, a wider root and new members are written at
once. Whatever is put off is written when its time has come, for a detector tells of a change but once.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import assert_never

from enova_coordinator.core.episode import MEMBERS_KEPT, Episode, EpisodeState, EvidenceSeries, Finding
from enova_recommender.detection.episodes import CLOSE_AFTER_S, Change
from enova_recommender.detection.episodes import Episode as Found

ABANDON_AFTER_S = 4 * CLOSE_AFTER_S  # model time that a detector which begins anew has to see it again
UPDATE_EVERY_S = 10.0                # real time between two writes of one episode of which only figures change


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundChange:
    """A change as the detector told it."""

    change: Change
    episode: Found
    member_count: int
    series: tuple[EvidenceSeries, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeWrite:
    """An episode as it should be stored now, and what became of it."""

    change: Change
    episode: Episode


class EpisodeLedger:
    """The episodes that are open, in the store's terms. `wall_s` turns model time into that of the wall clock."""

    def __init__(self, stored: Iterable[Episode], *, wall_s: Callable[[float], float], now_s: float) -> None:
        self._wall_s = wall_s
        self._began_s = now_s
        self._open = {each.name: each for each in stored if each.state is EpisodeState.OPEN}
        self._inherited = set(self._open)
        self._names: dict[str, str] = {}      # by the detector's id
        self._written: dict[str, tuple[float, Episode]] = {}  # when, and as what
        self._late: set[str] = set()          # names of those that changed since

    @property
    def open(self) -> Mapping[str, Episode]:
        """What stands open, by name."""
        return self._open

    def take(self, changes: Iterable[FoundChange], *, now_s: float, real_s: float) -> list[EpisodeWrite]:
        """What is to be written for these changes, and for those that nobody speaks of any more."""
        writes: dict[str, EpisodeWrite] = {}
        for each in changes:
            write = self._taken(each)
            if write is None:
                continue
            before = writes.get(write.episode.name)
            if before is not None and before.change is Change.OPENED and write.change is Change.UPDATED:
                write = replace(write, change=Change.OPENED)
            writes[write.episode.name] = write
        for write in self._abandoned(now_s):
            writes[write.episode.name] = write
        for name in sorted(self._late - writes.keys()):
            writes[name] = EpisodeWrite(change=Change.UPDATED, episode=self._open[name])
        return [write for write in writes.values() if self._due(write, real_s)]

    def detached(self, *, now_s: float) -> None:
        """The detector begins anew: its ids mean nothing any more, and what is open must be seen again."""
        self._names.clear()
        self._inherited = set(self._open)
        self._began_s = now_s

    def _taken(self, found: FoundChange) -> EpisodeWrite | None:
        name = self._names.get(found.episode.id)
        match found.change:
            case Change.OPENED:
                adopted = self._same(found.episode)
                name = adopted or _name(found.episode, self._wall_s)
                self._names[found.episode.id] = name
                self._inherited.discard(name)
                change = Change.UPDATED if adopted else Change.OPENED
            case Change.UPDATED:
                if name is None:
                    return None        # its opening was left out of an answer: a later step opens it again
                change = Change.UPDATED
            case Change.CLOSED:
                self._names.pop(found.episode.id, None)
                if name is None or name not in self._open:
                    return None
                change = Change.CLOSED
            case _:
                assert_never(found.change)
        episode = _stored(name, found, self._wall_s, before=self._open.get(name))
        if change is Change.CLOSED:
            del self._open[name]
        else:
            self._open[name] = episode
        return EpisodeWrite(change=change, episode=episode)

    def _same(self, found: Found) -> str | None:
        """The name of what is open at the same root, of the same kind, and is nobody's."""
        taken = set(self._names.values())
        return next(
            (
                name
                for name, each in self._open.items()
                if name not in taken and (each.object, each.verdict) == (found.root.name, found.kind)
            ),
            None,
        )

    def _abandoned(self, now_s: float) -> Iterable[EpisodeWrite]:
        if now_s - self._began_s < ABANDON_AFTER_S:
            return
        for name in sorted(self._inherited & set(self._open)):
            episode = self._open.pop(name)
            closed = replace(episode, state=EpisodeState.CLOSED, close_time_s=episode.update_time_s)
            yield EpisodeWrite(change=Change.CLOSED, episode=closed)
        self._inherited.clear()

    def _due(self, write: EpisodeWrite, real_s: float) -> bool:
        name = write.episode.name
        written_s, written = self._written.get(name, (-math.inf, None))
        news = written is None or _weighty(write.episode) != _weighty(written)
        if write.change is Change.UPDATED and not news and real_s - written_s < UPDATE_EVERY_S:
            self._late.add(name)
            return False
        self._late.discard(name)
        self._written[name] = real_s, write.episode
        if write.change is Change.CLOSED:
            del self._written[name]
        return True


def _weighty(episode: Episode) -> tuple[object, ...]:
    """What nobody should have to wait for."""
    return episode.object, frozenset(episode.causes), episode.member_count


def _name(found: Found, wall_s: Callable[[float], float]) -> str:
    """Names sort by when episodes opened."""
    return f"episodes/{round(wall_s(found.opened_s) * 1000):016d}-{zlib.crc32(found.id.encode()):08x}"


def _stored(
    name: str, found: FoundChange, wall_s: Callable[[float], float], *, before: Episode | None
) -> Episode:
    episode = found.episode
    closed = found.change is Change.CLOSED
    model_s = episode.since_s if math.isfinite(episode.since_s) else episode.opened_s
    model_s = model_s if before is None else min(before.since_model_s, model_s)
    return Episode(
        name=name,
        object=episode.root.name,
        verdict=episode.kind,
        causes=tuple(cause.name for cause in episode.causes),
        members=tuple(sorted(episode.members)[:MEMBERS_KEPT]),
        member_count=found.member_count,
        state=EpisodeState.CLOSED if closed else EpisodeState.OPEN,
        since_s=wall_s(model_s),
        since_model_s=model_s,
        open_time_s=wall_s(episode.opened_s) if before is None else before.open_time_s,
        update_time_s=wall_s(episode.seen_s),
        close_time_s=wall_s(episode.closed_s) if closed and episode.closed_s is not None else 0.0,
        score=episode.score,
        confidence=episode.confidence,
        suggested_action=episode.action.value,
        findings=tuple(
            Finding(feature=each.feature, value=each.value, threshold=each.threshold, contribution=each.weight)
            for each in episode.contributions
        ),
        # A change without figures keeps those that it had: the replica may be gone.
        series=found.series or (before.series if before is not None else ()),
    )
