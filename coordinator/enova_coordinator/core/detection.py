"""What the detector is told of the fleet, and what is made of its findings: names, times, words. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from enova_coordinator.core.episode import Episode, EpisodeLabel
from enova_coordinator.core.model import (
    Deployment,
    Intent,
    MaxTokensMode,
    Replica,
    ReplicaState,
    Snapshot,
    Variant,
)
from enova_coordinator.core.routes import DEFAULT_CONCURRENCY
from enova_coordinator.core.verdicts import Verdict
from enova_recommender.detection.causes import Cause
from enova_recommender.detection.folding import FoldSettings
from enova_recommender.detection.lessons import Lesson
from enova_recommender.detection.observation import Placement
from enova_recommender.detection.progress import ProgressLimits
from enova_recommender.detection.verdicts import Contribution
from enova_recommender.detection.verdicts import Verdict as Finding
from enova_recommender.scaling.types import Evidence

STEP_S = 5.0
LATENESS_REAL_S = 1.5              # that frames may be under way
SKEW_REAL_S = 30.0                 # clocks of hosts differ by less, or something is wrong with them
REPORT_REAL_S = 1.25              # an agent reads an engine once a second, and sends what it read once a second
SILENT_REAL_S = 3.0
SUSPECT_STEPS, HUNG_STEPS = 2.0, 4.0
DETECTOR = "fleet"
_LEAST_CAPACITY_RPS = 1e-6
_REPLICAS = "/replicas/"           # in a replica's name, after that of its deployment
# What keeps a replica from serving, whatever its state says: scaling counts on the others.
DEAD = frozenset({Cause.HUNG.name, Cause.CRASH_LOOP.name})

_WORDS: Mapping[Cause, str] = {
    Cause.MISSING: "no frame tells of it",
    Cause.CRASH_LOOP: "its engine fails or restarts again and again",
    Cause.HUNG: "it is alive and makes no progress while requests wait",
    Cause.LEAK: "its KV cache holds more than its requests can",
    Cause.KV_THRASH: "it preempts: requests are computed twice for want of KV cache",
    Cause.THROTTLED: "its GPU is slowed by heat or power, and so are its steps",
    Cause.SLOW: "its steps take longer than its load explains",
    Cause.FAILING: "its requests fail",
    Cause.BATCH_SLACK: "requests wait though a larger batch would cost little",
    Cause.OVERLOAD: "requests wait, and its load explains it",
    Cause.CUT: "a limit on answers cuts more of them than it is meant to",
    Cause.IDLE: "it has nothing to do",
    Cause.SURPLUS: "its deployment would do with one replica fewer",
}


def fold_settings(*, scale: float, step_s: float, bounds: Mapping[str, tuple[float, ...]]) -> FoldSettings:
    """How steps are cut under a model clock of this scale, when telemetry comes in steps of `step_s`.

    What hosts and networks take is real time: under a fast clock a step is long enough that each holds a new reading.
    """
    return FoldSettings(
        step_s=max(STEP_S, step_s, math.ceil(REPORT_REAL_S * scale / STEP_S) * STEP_S if scale > 1 else STEP_S),
        lateness_s=LATENESS_REAL_S * max(1.0, scale),
        skew_s=SKEW_REAL_S * max(1.0, scale),
        bounds=bounds,
    )


def progress_limits(fold: FoldSettings, *, scale: float) -> ProgressLimits:
    """When a standstill is one: no sooner than so many steps, each of which may have missed a reading."""
    usual = ProgressLimits()
    return ProgressLimits(
        suspect_after_s=max(usual.suspect_after_s, SUSPECT_STEPS * fold.step_s),
        hung_after_s=max(usual.hung_after_s, HUNG_STEPS * fold.step_s),
        silent_age_s=max(usual.silent_age_s, SILENT_REAL_S * scale),
    )


def placement(snapshot: Snapshot, replica: Replica) -> Placement | None:
    """Where a replica runs that is meant to serve; None for others."""
    variant = snapshot.variants.get(replica.variant)
    if replica.intent is not Intent.RUN or not replica.members or variant is None:
        return None
    return _placement(replica, variant, snapshot.deployments.get(replica.deployment))


def _placement(replica: Replica, variant: Variant, deployment: Deployment | None) -> Placement:
    flags, spec = variant.configuration, deployment.spec if deployment is not None else None
    advice = deployment.advice if deployment is not None else None
    capacity_rps = advice.capacity_rps if advice is not None and advice.configuration == flags else 0.0
    limited = spec is not None and spec.max_tokens_policy.mode is MaxTokensMode.APPLY
    classes = spec.classes if spec is not None else ()
    return Placement(
        replica=replica.name,
        deployment=replica.deployment,
        variant=replica.variant,
        nodes=tuple(sorted({member.node for member in replica.members})),
        gpus=replica.gpus,
        max_num_seqs=float(flags.get("max_num_seqs", DEFAULT_CONCURRENCY)),
        max_num_batched_tokens=_flag(flags.get("max_num_batched_tokens")),
        max_model_len=_flag(flags.get("max_model_len")),
        capacity_rps=capacity_rps if capacity_rps > _LEAST_CAPACITY_RPS else math.nan,
        cut_share=spec.max_tokens_policy.cut_share if spec is not None and limited else math.nan,
        ttft_p95_s=_laxest(each.ttft_p95_s for each in classes),
        tpot_p95_s=_laxest(each.tpot_p95_s for each in classes),
    )


def _flag(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _laxest(objectives: Iterable[float | None]) -> float:
    """All classes' requests are measured together: what the laxest allows is broken when even that is."""
    known = [each for each in objectives if each]
    return max(known) if known else math.nan


def ejected(snapshot: Snapshot) -> frozenset[str]:
    """Replicas that agents hold out of routing because their engines make no progress."""
    return frozenset(
        name
        for name, each in snapshot.replicas.items()
        if each.intent is Intent.RUN and each.status.state is ReplicaState.READY and not each.status.in_routing
    )


def restarts(snapshot: Snapshot, placed: Iterable[Placement]) -> dict[str, int]:
    """How often agents started the engine of each again: also of engines that no frame ever told of."""
    found = (snapshot.replicas[each.replica] for each in placed)
    return {each.name: each.status.restarts // max(1, len(each.members)) for each in found}


def lesson_of(episode: Episode) -> Lesson | None:
    """What a person's label of an episode teaches; None if there is none."""
    if episode.label is EpisodeLabel.NONE and not episode.label_cause:
        return None
    return Lesson(
        deployments=frozenset(each.partition(_REPLICAS)[0] for each in episode.members),
        causes=tuple(Cause[each] for each in episode.causes if each in Cause.__members__),
        is_true=episode.label is not EpisodeLabel.FALSE,
        score=episode.score,
        weights={each.feature: each.contribution for each in episode.findings},
        said=Cause.__members__.get(episode.label_cause),
    )


def verdict_of(finding: Finding, *, wall_s: Callable[[float], float]) -> Verdict:
    """A finding as it is kept and shown; `wall_s` turns model time into that of the wall clock."""
    return Verdict(
        object=finding.replica,
        kind=finding.kind,
        since_s=wall_s(finding.since_s) if math.isfinite(finding.since_s) else 0.0,
        reason=words(finding.cause, finding.contributions),
        detector=DETECTOR,
        evidence=tuple(
            Evidence(feature=each.feature, value=each.value, threshold=each.threshold) for each in finding.contributions
        ),
        weights=tuple(each.weight for each in finding.contributions),
        suggested_action=finding.action.value,
        score=finding.score,
        confidence=finding.confidence,
        cause=finding.cause.name if finding.cause is not None else "",
    )


def words(cause: Cause | None, contributions: Iterable[Contribution]) -> str:
    """The cause in a sentence, with the figure that weighs most."""
    told = _WORDS[cause] if cause is not None else "it is not as it should be"
    first = next(iter(contributions), None)
    if first is None:
        return told
    beside = f", {first.threshold:.3g} is the threshold" if math.isfinite(first.threshold) else ""
    return f"{told} ({first.feature} is {first.value:.3g}{beside})"
