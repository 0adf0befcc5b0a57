"""Episodes: verdicts that belong together, from when they begin until they are over.

Theory of operation. One root, one episode. Verdicts of a step are gathered under the widest root that explains them: a
node whose replicas are unknown or degraded together, a deployment most of whose replicas say the same, else the
replica alone. When most nodes fall silent at once the coordinator itself is more likely cut off than they dead: that is
one episode of the fleet, and nothing is to be done. An episode that is open takes in later verdicts of its root and
kind; a narrower one that is explained by a new wider root becomes it. It closes when its members have been well for
some time, so that what comes and goes stays one episode. What befalls its members later on is added to its causes;
what it suggests and rests on is of the gravest cause that stands now. One that goes on unchanged is told of now and
then, so that whoever keeps it knows when it was last seen. Open episodes outlive a restart: `adopt` goes on with them
under their old names, and the time that nobody watched does not count as well.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from enova_recommender.detection.causes import Cause, SuggestedAction
from enova_recommender.detection.observation import Placement
from enova_recommender.detection.verdicts import Contribution, Judgement, Verdict
from enova_recommender.types import VerdictKind

CLOSE_AFTER_S = 30.0     # without a verdict that belongs to it
REMIND_AFTER_S = 60.0    # without a change of one that goes on
TOGETHER_SHARE = 0.5     # of a root's replicas
NODES_MIN = 2            # of which most are silent: fewer are nodes, not a fleet
MEMBERS_MIN = 2          # of a root wider than a replica
CONTRIBUTIONS_MAX = 8


class Scope(StrEnum):
    """How wide a root is."""

    FLEET = "FLEET"
    NODE = "NODE"
    DEPLOYMENT = "DEPLOYMENT"
    REPLICA = "REPLICA"


_PLAIN = ("id", "since_s", "opened_s", "seen_s", "closed_s", "score", "confidence")
_WIDTH = {Scope.REPLICA: 0, Scope.DEPLOYMENT: 1, Scope.NODE: 2, Scope.FLEET: 3}


class Change(StrEnum):
    """What became of an episode in a step."""

    OPENED = "OPENED"
    UPDATED = "UPDATED"
    CLOSED = "CLOSED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """What an episode is about."""

    scope: Scope
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """What befell a root. `since_s`: the first evidence; `opened_s`: when it was said.

    `causes`: those that stand, the most frequent first, and then those that did.
    """

    id: str
    root: Root
    kind: VerdictKind
    causes: tuple[Cause, ...]
    members: frozenset[str]
    since_s: float
    opened_s: float
    seen_s: float
    closed_s: float | None
    score: float
    confidence: float
    action: SuggestedAction
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeChange:
    """One change of one episode, as it is after it."""

    change: Change
    episode: Episode


class EpisodeBook:
    """The open episodes. Give it every step's judgement in order."""

    def __init__(self, *, close_after_s: float = CLOSE_AFTER_S) -> None:
        self._close_after_s = close_after_s
        self._open: dict[str, Episode] = {}
        self._adopted: set[str] = set()
        self._told_s: dict[str, float] = {}

    @property
    def open(self) -> tuple[Episode, ...]:
        """Those that are not over, the oldest first."""
        return tuple(self._open.values())

    def update(self, judgement: Judgement, placements: Mapping[str, Placement]) -> list[EpisodeChange]:
        """What the step changes."""
        changes: list[EpisodeChange] = []
        for id_ in self._adopted & self._open.keys():
            known = self._open[id_]
            self._open[id_] = replace(known, seen_s=max(known.seen_s, judgement.end_s))
        self._adopted.clear()
        rest = dict(judgement.verdicts)
        for root, verdicts in _gathered(rest, placements):
            changes += self._take(root, verdicts, judgement.end_s)
        for episode in list(self._open.values()):
            if judgement.end_s - episode.seen_s >= self._close_after_s or judgement.end_s < episode.opened_s:
                closed = replace(episode, closed_s=judgement.end_s)
                del self._open[episode.id]
                changes.append(EpisodeChange(change=Change.CLOSED, episode=closed))
        self._told_s = {id_: told_s for id_, told_s in self._told_s.items() if id_ in self._open}
        self._told_s |= {each.episode.id: judgement.end_s for each in changes if each.episode.id in self._open}
        return changes

    def adopt(self, episodes: Iterable[Episode]) -> None:
        """Go on with episodes that were open before a restart."""
        for episode in episodes:
            if episode.closed_s is None and episode.id not in self._open:
                self._open[episode.id] = episode
                self._adopted.add(episode.id)

    def _take(self, root: Root, verdicts: list[Verdict], now_s: float) -> list[EpisodeChange]:
        kind, members = verdicts[0].kind, frozenset(each.replica for each in verdicts)
        # An episode that is as wide or wider and holds them goes on; narrower ones widen to this root.
        mine = [
            each for each in self._open.values()
            if each.kind is kind and (each.root == root or each.members & members)
        ]
        if not mine:
            episode = _new(root, verdicts, now_s)
            self._open[episode.id] = episode
            return [EpisodeChange(change=Change.OPENED, episode=episode)]
        mine.sort(key=lambda each: (-_WIDTH[each.root.scope], each.opened_s))
        first = mine[0]
        wider = root if _WIDTH[root.scope] > _WIDTH[first.root.scope] else first.root
        changes: list[EpisodeChange] = []
        for other in mine[1:]:
            if other.members <= members | first.members:
                del self._open[other.id]
                changes.append(EpisodeChange(change=Change.CLOSED, episode=replace(other, closed_s=now_s)))
        updated = _updated(replace(first, root=wider), verdicts, now_s)
        self._open[first.id] = updated
        told_s = self._told_s.setdefault(first.id, first.seen_s)
        if _told(updated) != _told(first) or now_s - told_s >= REMIND_AFTER_S:
            changes.append(EpisodeChange(change=Change.UPDATED, episode=updated))
        return changes


def _gathered(
    verdicts: Mapping[str, Verdict], placements: Mapping[str, Placement]
) -> list[tuple[Root, list[Verdict]]]:
    """Verdicts under the widest root that explains them."""
    rest = {name: verdict for name, verdict in verdicts.items() if name in placements}
    groups: list[tuple[Root, list[Verdict]]] = []

    def take(root: Root, names: list[str]) -> None:
        groups.append((root, [rest.pop(name) for name in sorted(names)]))

    silent = _silent_nodes(rest, placements)
    nodes = {node for each in placements.values() for node in each.nodes}
    if len(nodes) >= NODES_MIN and len(silent) > TOGETHER_SHARE * len(nodes) and len(silent) >= NODES_MIN:
        take(Root(scope=Scope.FLEET, name="fleet"), [
            name for name in rest if rest[name].cause is Cause.MISSING and set(placements[name].nodes) & silent
        ])  # fmt: skip
    for kind in (VerdictKind.UNKNOWN, VerdictKind.DEGRADED):
        for node, names in _by_node(rest, placements, kind).items():
            names = [name for name in names if name in rest]  # noqa: PLW2901  # an earlier node may have taken it
            count = sum(node in each.nodes for each in placements.values())
            if len(names) >= MEMBERS_MIN and len(names) >= TOGETHER_SHARE * count:
                take(Root(scope=Scope.NODE, name=node), names)
    by_deployment: dict[tuple[str, VerdictKind], list[str]] = defaultdict(list)
    for name, verdict in rest.items():
        by_deployment[placements[name].deployment, verdict.kind].append(name)
    sizes = Counter(each.deployment for each in placements.values())
    for (deployment, _), names in sorted(by_deployment.items()):
        if len(names) >= MEMBERS_MIN and len(names) > TOGETHER_SHARE * sizes[deployment]:
            take(Root(scope=Scope.DEPLOYMENT, name=deployment), names)
    for name in sorted(rest):
        take(Root(scope=Scope.REPLICA, name=name), [name])
    return groups


def _silent_nodes(rest: Mapping[str, Verdict], placements: Mapping[str, Placement]) -> set[str]:
    """Nodes of which no replica is heard."""
    heard = {node for name, each in placements.items() for node in each.nodes
             if name not in rest or rest[name].cause is not Cause.MISSING}
    return {node for each in placements.values() for node in each.nodes} - heard


def _by_node(
    rest: Mapping[str, Verdict], placements: Mapping[str, Placement], kind: VerdictKind
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name, verdict in rest.items():
        if verdict.kind is kind:
            for node in placements[name].nodes:
                found[node].append(name)
    return dict(sorted(found.items()))


def _new(root: Root, verdicts: list[Verdict], now_s: float) -> Episode:
    since_s = min(each.since_s for each in verdicts)
    kind = verdicts[0].kind
    empty = Episode(
        id=f"{root.scope.lower()}/{root.name}/{kind.lower()}/{now_s:.0f}",
        root=root, kind=kind, causes=(), members=frozenset(), since_s=since_s, opened_s=now_s, seen_s=now_s,
        closed_s=None, score=0.0, confidence=0.0, action=SuggestedAction.NONE, contributions=(),
    )  # fmt: skip
    return _updated(empty, verdicts, now_s)


def _updated(episode: Episode, verdicts: list[Verdict], now_s: float) -> Episode:
    counted = Counter(each.cause for each in verdicts if each.cause is not None)
    causes = tuple(cause for cause, _ in sorted(counted.items(), key=lambda each: (-each[1], each[0])))
    worst = gravest(verdicts)
    return replace(
        episode,
        causes=(*causes, *(each for each in episode.causes if each not in counted)),
        members=episode.members | {each.replica for each in verdicts},
        since_s=min([episode.since_s, *(each.since_s for each in verdicts)]),
        seen_s=now_s,
        score=max(episode.score, *(each.score for each in verdicts)),
        confidence=max(each.confidence for each in verdicts),
        action=_action(episode.root, verdicts),
        contributions=worst.contributions[:CONTRIBUTIONS_MAX],
    )


def gravest(verdicts: Iterable[Verdict]) -> Verdict:
    """The one whose cause goes before the others', and of such the one with the highest score."""

    def gravity(verdict: Verdict) -> tuple[int, float, str]:
        return -(len(Cause) if verdict.cause is None else verdict.cause), verdict.score, verdict.replica

    return max(verdicts, key=gravity)


def _action(root: Root, verdicts: list[Verdict]) -> SuggestedAction:
    """What most of them ask for; where as many ask for this as for that, what the gravest does."""
    if root.scope is Scope.FLEET:
        return SuggestedAction.NONE
    counted = Counter(each.action for each in verdicts)
    most = max(counted.values())
    return gravest(each for each in verdicts if counted[each.action] == most).action


def _told(episode: Episode) -> tuple[object, ...]:
    """What is worth telling when it changes."""
    return (
        episode.root, episode.causes, episode.members, episode.action, round(episode.score, 1),
        round(episode.confidence, 1),
    )  # fmt: skip


def to_text(episodes: Iterable[Episode]) -> str:
    """Episodes as JSON."""
    return json.dumps([
        {
            **{name: getattr(each, name) for name in _PLAIN}, "scope": each.root.scope.value, "name": each.root.name,
            "kind": each.kind.value, "causes": [cause.name for cause in each.causes], "action": each.action.value,
            "members": sorted(each.members),
            "contributions": [
                [known.feature, known.value, known.threshold, known.is_below] for known in each.contributions
            ],
        }
        for each in episodes
    ])  # fmt: skip


def from_text(text: str) -> list[Episode]:
    """What `to_text` made. Raises ValueError for anything else."""
    try:
        return [
            Episode(
                **{name: each[name] for name in _PLAIN}, root=Root(scope=Scope(each["scope"]), name=each["name"]),
                kind=VerdictKind(each["kind"]), causes=tuple(Cause[cause] for cause in each["causes"]),
                members=frozenset(each["members"]), action=SuggestedAction(each["action"]),
                contributions=tuple(
                    Contribution(feature=feature, value=value, threshold=threshold, is_below=is_below)
                    for feature, value, threshold, is_below in each["contributions"]
                ),
            )
            for each in json.loads(text)
        ]  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"no episodes: {error!r}") from error
