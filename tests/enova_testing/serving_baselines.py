"""What others say of the incidents of `serving_faults`: rules, burn rates, z-scores, and our parts each by itself.

Every one has a knob that makes it less sensitive. It is told the same steps as ours, folded from the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.burn import BurnRate, BurnRule
from enova_recommender.detection.causes import SuggestedAction
from enova_recommender.detection.detector import Detector
from enova_recommender.detection.evidence import BURN_OBJECTIVE, queued
from enova_recommender.detection.features import Feature, FeatureStep, Floats
from enova_recommender.detection.progress import Progress
from enova_recommender.detection.watch import Watched
from enova_recommender.scaling.enova_007 import FAITHFUL
from enova_recommender.scaling.types import EngineSizes, GpuFacts, ModelFacts, Observation, ReplicaSeries, Series
from enova_recommender.scaling.types import Feature as MinuteFeature
from enova_recommender.types import VerdictKind
from enova_testing.serving_faults import LIMITS, Played

STEPS_TOLD = 3             # of evidence in a row, as ours
MINUTE_S, MINUTE_STEPS = 60.0, 12
MEMORY_STEPS = 60          # of a moving z-score
MEMORY_MIN = 12
BURN_RULES = (BurnRule(long_s=300.0, short_s=30.0, factor=1.0), BurnRule(long_s=900.0, short_s=60.0, factor=1.0))
SERVED = ModelFacts(
    framework="llama", size_billion=7, parameters=8_030_000_000, kv_elements_per_token=65_536, attention_heads=32,
    context_tokens=8192,
)  # fmt: skip
# What a figure that is out of the ordinary stands for.
MEANING: Mapping[Feature, str] = {
    Feature.STEP_S: "DEGRADED", Feature.TTFT_S: "DEGRADED", Feature.GPU_TEMPERATURE_C: "DEGRADED",
    Feature.GPU_THROTTLED: "DEGRADED", Feature.FAILED: "DEGRADED", Feature.RESTARTS: "DEGRADED",
    Feature.WAITING: "OVERLOADED", Feature.RUNNING: "OVERLOADED", Feature.HELD: "OVERLOADED",
    Feature.PREEMPTIONS: "MISCONFIGURED", Feature.KV_USAGE: "MISCONFIGURED",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a detector said of a replica at the end of a step."""

    replica: str
    end_s: float
    kind: str
    cause: str = ""
    action: SuggestedAction = SuggestedAction.NONE


Baseline = Callable[[Played, float], list[Said]]


def ours(played: Played) -> list[Said]:
    """The whole."""
    return [
        Said(
            replica=name, end_s=each.step.end_s, kind=verdict.kind.value,
            cause=verdict.cause.name if verdict.cause is not None else "", action=verdict.action,
        )
        for each in played.told for name, verdict in each.judgement.verdicts.items()
    ]  # fmt: skip


def thresholds(played: Played, knob: float) -> list[Said]:
    """What dashboards alert on: no tokens though requests run, preemptions, a queue, nothing to do."""

    def kinds(told: Watched) -> list[str]:
        step = told.step
        running, tokens = step.of(Feature.RUNNING), step.of(Feature.GENERATION_TOKENS)
        found: list[str] = np.select(
            [(running > 0) & (tokens == 0), step.of(Feature.PREEMPTIONS) > 0, step.of(Feature.WAITING) >= knob,
             (running == 0) & (tokens == 0), np.isnan(step.of(Feature.AGE_S))],
            ["DEGRADED", "MISCONFIGURED", "OVERLOADED", "UNDERUSED", "UNKNOWN"], "",
        ).tolist()  # fmt: skip
        return found

    return _in_a_row(played, [kinds(each) for each in played.told])


def burn_rate(played: Played, knob: float) -> list[Said]:
    """Burn rates of the objectives, in several windows. It cannot say what: OVERLOADED."""
    burn = BurnRate(series=len(played.told[0].step.replicas), objective=BURN_OBJECTIVE, rules=BURN_RULES)
    found = []
    for each in played.told:
        step = each.step
        started = step.of(Feature.FIRST_TOKENS) * step.of(Feature.SPAN_S)
        late = step.of(Feature.LATE_SHARE) * started
        rates = burn.update(now_s=step.end_s, good=started - late, bad=late).rates
        found.append(["OVERLOADED" if (rate > knob).any() else "" for rate in rates.T])
    return _in_a_row(played, found, steps=1)


def zscore(played: Played, knob: float) -> list[Said]:
    """Any figure so many standard deviations beyond its own last five minutes; the furthest names the kind."""
    features = tuple(MEANING)
    past: list[Floats] = []
    found = []
    for each in played.told:
        values = _values(each.step, features)
        kinds = [""] * len(values)
        if len(past) >= MEMORY_MIN:
            with np.errstate(all="ignore"):
                window = np.array(past[-MEMORY_STEPS:])
                known = np.isfinite(window).any(axis=0)
                window = np.where(known, window, 0.0)
                mean, spread = np.nanmean(window, axis=0), np.nanstd(window, axis=0)
                score = np.nan_to_num((values - mean) / np.maximum(spread, 0.05 * np.abs(mean) + 1e-6))
            kinds = _named(score, features, knob)
        past.append(values)
        found.append(kinds)
    return _in_a_row(played, found)


def residual_alone(played: Played, knob: float) -> list[Said]:
    """Step times beside those expected."""
    return _in_a_row(
        played, [["DEGRADED" if ratio > knob else "" for ratio in each.signals.slowness.ratio] for each in played.told],
        steps=2,
    )  # fmt: skip


def peers_alone(played: Played, knob: float) -> list[Said]:
    """Step times beside the siblings'."""
    return _in_a_row(
        played, [["DEGRADED" if apart > knob else "" for apart in each.signals.peers] for each in played.told], steps=2
    )


def progress_alone(played: Played, knob: float) -> list[Said]:
    """Whether anything moves."""
    stuck = (Progress.SUSPECT, Progress.HUNG, Progress.DOWN)
    return _in_a_row(
        played,
        [["DEGRADED" if code in stuck else "UNDERUSED" if code == Progress.IDLE else ""
          for code in each.signals.progress] for each in played.told],
        steps=1 if knob < 1 else round(knob),
    )  # fmt: skip


def queue_alone(played: Played, knob: float) -> list[Said]:
    """Requests that wait, in the engine or before it."""
    return _in_a_row(
        played, [["OVERLOADED" if count >= knob else "" for count in queued(each.step)] for each in played.told]
    )


def enova_007(played: Played, knob: float) -> list[Said]:
    """The rules of ENOVA 0.0.7 for the deployment, asked every minute. It has no knob."""
    steps = [each.step for each in played.told]
    names = [each.replica for each in played.placements]
    said: list[Said] = []
    minutes: dict[str, list[dict[MinuteFeature, float]]] = {name: [] for name in names}
    kind = ""
    for index, step in enumerate(steps):
        if (index + 1) % MINUTE_STEPS == 0:
            for row, name in enumerate(names):
                minutes[name].append(_minute(steps[index + 1 - MINUTE_STEPS : index + 1], row))
            proposal = FAITHFUL.decide(_observation(minutes, step.end_s))
            kind = "" if proposal.verdict in {VerdictKind.NORMAL, VerdictKind.UNKNOWN} else proposal.verdict.value
        said += [Said(replica=name, end_s=step.end_s, kind=kind) for name in names if kind]
    return said


def anomaly(make: Callable[[], Detector], quiet: Sequence[Played]) -> Baseline:
    """A detector of anomalies that learnt from quiet runs; what contributes most names the kind."""
    features = tuple(MEANING)
    history = np.concatenate([
        np.concatenate([_values(each.step, features)[row][None] for each in played.told])
        for played in quiet for row in range(len(played.placements))
    ])  # fmt: skip
    fitted = make()
    fitted.fit(history)
    saved = fitted.save()

    def baseline(played: Played, knob: float) -> list[Said]:
        detector = type(fitted).load(saved)
        found = []
        for each in played.told:
            scores = detector.update(_values(each.step, features), step=each.step.number)
            shares = detector.contributions()
            found.append([
                MEANING[features[int(np.argmax(share))]] if score > knob else ""
                for score, share in zip(scores, shares, strict=True)
            ])  # fmt: skip
        return _in_a_row(played, found, steps=2)

    return baseline


GRIDS: Mapping[str, tuple[float, ...]] = {
    "enova_0_0_7": (0.0,),
    "thresholds": (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
    "burn_rate": (2.0, 4.0, 6.0, 10.0, 14.4, 18.0),
    "zscore": (3.0, 4.0, 6.0, 8.0, 12.0, 20.0, 40.0, 80.0, 160.0),
    "residual_alone": (1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0, 3.0),
    "peers_alone": (1.0, 2.0, 3.0, 4.0, 6.0, 9.0, 15.0),
    "progress_alone": (1.0, 2.0, 3.0, 6.0),
    "queue_alone": (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
}
BASELINES: Mapping[str, Baseline] = {
    "enova_0_0_7": enova_007, "thresholds": thresholds, "burn_rate": burn_rate, "zscore": zscore,
    "residual_alone": residual_alone, "peers_alone": peers_alone, "progress_alone": progress_alone,
    "queue_alone": queue_alone,
}  # fmt: skip


def _values(step: FeatureStep, features: Sequence[Feature]) -> Floats:
    return np.array([step.of(each) for each in features]).T


def _named(scores: npt.NDArray[np.float64], features: Sequence[Feature], knob: float) -> list[str]:
    furthest = scores.argmax(axis=1)
    return [MEANING[features[at]] if row[at] > knob else "" for row, at in zip(scores, furthest, strict=True)]


def _in_a_row(played: Played, kinds: list[list[str]], *, steps: int = STEPS_TOLD) -> list[Said]:
    said: list[Said] = []
    for row, name in enumerate(played.told[0].step.replicas):
        count, before = 0, ""
        for each, now in zip(played.told, kinds, strict=True):
            count = count + 1 if now[row] == before else 1
            before = now[row]
            if before and count >= steps:
                said.append(Said(replica=name, end_s=each.step.end_s, kind=before))
    return said


def _minute(steps: Sequence[FeatureStep], row: int) -> dict[MinuteFeature, float]:
    def mean(feature: Feature) -> float:
        values = np.array([each.of(feature)[row] for each in steps])
        known = values[np.isfinite(values)]
        return float(known.mean()) if known.size else math.nan

    running, pending = mean(Feature.RUNNING), mean(Feature.WAITING)
    return {
        MinuteFeature.RUNNING: running, MinuteFeature.PENDING: pending, MinuteFeature.ACTIVE: running + pending,
        MinuteFeature.KV_USAGE: 100.0 * mean(Feature.KV_USAGE), MinuteFeature.NEW: MINUTE_S * mean(Feature.ARRIVALS),
        MinuteFeature.SUCCESS: max(1e-3, MINUTE_S * mean(Feature.FINISHED)),
    }  # fmt: skip


def _observation(minutes: Mapping[str, list[dict[MinuteFeature, float]]], now_s: float) -> Observation:
    series = []
    for name, kept in minutes.items():
        start_s = now_s - MINUTE_S * (len(kept) - 1)
        series.append(ReplicaSeries(replica=name, series={
            feature: Series(start_s=start_s, step_s=MINUTE_S, values=tuple(each[feature] for each in kept))
            for feature in MinuteFeature
        }))  # fmt: skip
    return Observation(
        now_s=now_s, replicas=len(series), series=tuple(series),
        configuration=EngineSizes(
            tensor_parallel_size=1, gpu_memory_utilization=0.9, max_num_seqs=LIMITS.max_num_seqs
        ),
        model=SERVED, gpu=GpuFacts(count=8, memory_bytes=80 * 2**30),
    )  # fmt: skip
