"""Verdicts on recordings of a real vLLM server with labelled faults, replayed as the frames of an agent beside it.

Learnt from folders named `train_*` without labels (where there are no others: from the first half of each run): the
step times of steps that the detector itself finds normal, and the threshold of their residuals. Raw results:
`verdicts.csv.gz` (run, detector, step's end, verdict, cause, action, confidence), `events.csv.gz` (a row a detector and
event: onset, first verdict, first right one) and `runs.csv.gz` (part A and B of vllm_runs: said and true).

Onset, hit and false alarm are as the docs define them: a hit is the right verdict between onset and end; from an end to
60 s later or the recovery nothing counts; any other verdict that is not NORMAL is a false alarm. Where an event is
labelled ANY nothing counts, and a burst may be called overloaded.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from enova_recommender.detection.burn import BurnRate, BurnRule
from enova_recommender.detection.causes import DESTRUCTIVE, SuggestedAction
from enova_recommender.detection.features import Feature, FeatureStep
from enova_recommender.detection.folding import FoldSettings
from enova_recommender.detection.observation import FrameReading, Placement, ReplicaReading
from enova_recommender.detection.residual import (
    AffineExpectation,
    ResidualWatch,
    StepBatches,
    fit_affine,
)
from enova_recommender.detection.watch import FleetWatch
from enova_recommender.performance import Affine
from enova_recommender.scaling.enova_007 import FAITHFUL
from enova_recommender.scaling.types import EngineSizes, GpuFacts, ModelFacts, Observation, ReplicaSeries, Series
from enova_recommender.scaling.types import Feature as MinuteFeature
from enova_recommender.types import VerdictKind
from enova_testing.benchmark import Benchmark, benchmark, read_rows, wilson
from enova_testing.recorded_faults import NODE, REPLICA, Event, Recording, recordings

RATE = 1e-3              # of normal steps whose residual may exceed the threshold
ROUNDS = 3               # of learning: the later ones leave out what the one before found slow
AFTER_S = 60.0           # after an event's end nothing counts
OURS = "enova"
SEEN = "_on_train"         # labels never seen, series learnt from: no figure of merit, but more faults to look at
HOUR_S = 3600.0
SLOW_KINDS = frozenset({"slow_engine", "slow_api", "noisy_neighbour", "hang"})
LATE_KINDS = frozenset({"idle"})                 # delays reported apart
ZSCORE = 6.0
ZSCORE_FEATURES = (
    Feature.WAITING, Feature.RUNNING, Feature.KV_USAGE, Feature.STEP_S, Feature.TTFT_S, Feature.PREEMPTIONS,
)  # fmt: skip
# An hour's rules, of the time scale of these recordings; the objective is that a first token takes a second at most.
BURN_RULES = (BurnRule(long_s=300.0, short_s=30.0, factor=14.4), BurnRule(long_s=900.0, short_s=60.0, factor=6.0))
BURN_OBJECTIVE = 0.99
QUEUE_S_MAX = 1.0
STEPS_TOLD = 3           # of a baseline's evidence in a row, as ours
MINUTE_S = 60.0
# The 32 million parameters of the recordings are none that its rules of thumb know: the smallest that they do.
SERVED = ModelFacts(
    framework="llama", size_billion=1, parameters=32_000_000, kv_elements_per_token=2 * 8 * 4 * 64, attention_heads=8,
    context_tokens=1024,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a detector said at the end of one step; "" is NORMAL."""

    end_s: float
    kind: str = ""
    cause: str = ""
    action: SuggestedAction = SuggestedAction.NONE
    confidence: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """What a detector took from the train runs."""

    times: Affine | None
    batches: list[StepBatches]
    steps: list[FeatureStep]


Detector = Callable[[Recording, Learnt], list[Said]]


def enova(recording: Recording, learnt: Learnt) -> list[Said]:
    """The whole."""
    return _replayed(recording, learnt)[0]


def without_residual(recording: Recording, learnt: Learnt) -> list[Said]:
    """The same, told nothing of step times."""
    return _replayed(recording, Learnt(times=None, batches=[], steps=[]))[0]


def thresholds(recording: Recording, learnt: Learnt) -> list[Said]:
    """What dashboards alert on: a queue, no tokens with requests in the engine, preemptions, no requests."""

    def kind(step: FeatureStep) -> str:
        row = step.of_row(REPLICA)
        if row.get("running", 0.0) > 0 and row.get("generation_tokens", 1.0) == 0:
            return "DEGRADED"
        if row.get("preemptions", 0.0) > 0:
            return "MISCONFIGURED"
        if row.get("waiting", 0.0) >= 1:
            return "OVERLOADED"
        return "UNDERUSED" if row.get("running", 1.0) == 0 and row.get("generation_tokens", 1.0) == 0 else ""

    return _in_a_row([(step.end_s, kind(step)) for step in _steps(recording)])


def zscore(recording: Recording, learnt: Learnt) -> list[Said]:
    """Any figure beyond so many standard deviations of the train runs. It cannot say what: OVERLOADED."""
    history = np.array([[step.of(each)[0] for each in ZSCORE_FEATURES] for step in learnt.steps])
    if not np.isfinite(history).any():
        return []
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of figures that were never measured
        mean, spread = np.nanmean(history, axis=0), np.maximum(np.nanstd(history, axis=0), 1e-9)
    found = []
    for step in _steps(recording):
        values = np.array([step.of(each)[0] for each in ZSCORE_FEATURES])
        odd = np.nan_to_num((values - mean) / spread) > ZSCORE
        found.append((step.end_s, "OVERLOADED" if odd.any() else ""))
    return _in_a_row(found, steps=1)


def burn_rate(recording: Recording, learnt: Learnt) -> list[Said]:
    """Burn rates of the objective that requests wait a second at most. It cannot say what: OVERLOADED."""
    burn = BurnRate(series=1, objective=BURN_OBJECTIVE, rules=BURN_RULES, events_min=5.0)
    found = []
    for step in _steps(recording):
        started = np.nan_to_num(step.of(Feature.FIRST_TOKENS) * step.of(Feature.SPAN_S))
        late = np.where(step.of(Feature.TTFT_S) > QUEUE_S_MAX, started, 0.0)
        alarm = burn.update(now_s=step.end_s, good=started - late, bad=late).alarm
        found.append((step.end_s, "OVERLOADED" if alarm[0] else ""))
    return _in_a_row(found, steps=1)


def enova_007(recording: Recording, learnt: Learnt) -> list[Said]:
    """The rules of ENOVA 0.0.7, asked every minute about the minutes before."""
    sums = MinuteSums()
    said: list[Said] = []
    kind = ""
    for step in _steps(recording):
        sums.add(step)
        if step.end_s % MINUTE_S == 0:
            observation = sums.observation(step.end_s, recording.placement)
            proposal = FAITHFUL.decide(observation)
            kind = "" if proposal.verdict in {VerdictKind.NORMAL, VerdictKind.UNKNOWN} else proposal.verdict.value
        said.append(Said(end_s=step.end_s, kind=kind))
    return said


@dataclass(slots=True)
class MinuteSums:
    """Steps folded to the minutes that ENOVA 0.0.7 looks at."""

    minutes: list[dict[MinuteFeature, float]] = dataclasses.field(default_factory=list)
    steps: list[FeatureStep] = dataclasses.field(default_factory=list)

    def add(self, step: FeatureStep) -> None:
        """One step."""
        self.steps.append(step)
        if step.end_s % MINUTE_S != 0:
            return

        def mean(feature: Feature) -> float:
            values = np.array([each.of(feature)[0] for each in self.steps])
            known = values[np.isfinite(values)]
            return float(known.mean()) if known.size else math.nan

        running, pending = mean(Feature.RUNNING), mean(Feature.WAITING)
        self.minutes.append({
            MinuteFeature.RUNNING: running, MinuteFeature.PENDING: pending, MinuteFeature.ACTIVE: running + pending,
            MinuteFeature.KV_USAGE: 100.0 * mean(Feature.KV_USAGE),
            MinuteFeature.NEW: MINUTE_S * mean(Feature.ARRIVALS),
            MinuteFeature.SUCCESS: MINUTE_S * mean(Feature.FINISHED),
        })  # fmt: skip
        self.steps = []

    def observation(self, now_s: float, placement: Placement) -> Observation:
        """What it is told."""
        start_s = now_s - MINUTE_S * (len(self.minutes) - 1)
        series = {
            feature: Series(start_s=start_s, step_s=MINUTE_S, values=tuple(each[feature] for each in self.minutes))
            for feature in MinuteFeature
        }
        return Observation(
            now_s=now_s, replicas=1, series=(ReplicaSeries(replica=REPLICA, series=series),),
            configuration=EngineSizes(
                tensor_parallel_size=1, gpu_memory_utilization=0.9, max_num_seqs=int(placement.max_num_seqs)
            ),
            model=SERVED, gpu=GpuFacts(count=8, memory_bytes=24 * 2**30),
        )  # fmt: skip


DETECTORS: dict[str, Detector] = {
    OURS: enova, "without_residual": without_residual, "enova_0_0_7": enova_007,
    "thresholds": thresholds, "zscore": zscore, "burn_rate": burn_rate,
}  # fmt: skip


def learn(runs: Sequence[Recording]) -> Learnt:
    """From steps that the detector itself finds normal, once without step times and once with. No label is read."""
    learnt = Learnt(times=None, batches=[], steps=[])
    for _ in range(ROUNDS):
        batches, steps = [], []
        for run in runs:
            for said, batch, step in zip(*_replayed(run, learnt, threshold=False), strict=True):
                if not said.kind:
                    batches.append(batch)
                    steps.append(step)
        try:
            learnt = Learnt(times=fit_affine(batches), batches=batches, steps=steps)
        except ValueError:  # too few steps are known of: the detector is told nothing of step times
            return Learnt(times=None, batches=batches, steps=steps)
    return learnt


def _replayed(
    recording: Recording, learnt: Learnt, *, threshold: bool = True
) -> tuple[list[Said], list[StepBatches], list[FeatureStep]]:
    residual = ResidualWatch(series=1)
    if learnt.times is not None and threshold:
        residual.fit(learnt.batches, AffineExpectation.of(learnt.times, series=1), rate=RATE)
    watch = FleetWatch(FoldSettings(bounds=recording.bounds), residual=residual)
    watch.place([recording.placement])
    if learnt.times is not None:
        watch.expect({REPLICA: learnt.times})
    said: list[Said] = []
    batches: list[StepBatches] = []
    steps: list[FeatureStep] = []
    for frame in recording.frames:
        watch.add(frame, now_s=frame.end_s)
        for told in watch.close(frame.end_s):
            verdict = told.judgement.verdicts.get(REPLICA)
            said.append(Said(end_s=told.step.end_s) if verdict is None or verdict.cause is None else Said(
                end_s=told.step.end_s, kind=verdict.kind.value, cause=verdict.cause.name, action=verdict.action,
                confidence=verdict.confidence,
            ))  # fmt: skip
            batches.append(told.batches)
            steps.append(told.step)
    return said, batches, steps


def _steps(recording: Recording) -> list[FeatureStep]:
    return _replayed(recording, Learnt(times=None, batches=[], steps=[]))[2]


def _in_a_row(found: list[tuple[float, str]], *, steps: int = STEPS_TOLD) -> list[Said]:
    said: list[Said] = []
    count, before = 0, ""
    for end_s, kind in found:
        count = count + 1 if kind == before else 1
        before = kind
        said.append(Said(end_s=end_s, kind=kind if count >= steps else ""))
    return said


def onset_s(event: Event, recording: Recording) -> float:
    """When demand first exceeds capacity on a ramp, else the start."""
    if event.kind != "overload_ramp":
        return event.start_s
    capacity, base = recording.capacity_rps, recording.base_rps
    share = (capacity - base) / (event.parameter * capacity - base)
    return event.start_s + (event.end_s - event.start_s) * share


def judged(recording: Recording, name: str, said: Sequence[Said]) -> tuple[list[dict[str, object]], dict[str, float]]:
    """A row an event, and what else was said: false alarms, destructive acts that were wrong, hours that count."""
    rows = []
    for event in recording.events:
        begin_s = onset_s(event, recording)
        within = [each for each in said if begin_s < each.end_s <= event.end_s + 1e-9 and each.kind]
        right = [each for each in within if each.kind == event.verdict]
        rows.append({
            "run": recording.name, "detector": name, "event": event.kind, "parameter": event.parameter,
            "fault": event.fault, "verdict": event.verdict, "start_s": event.start_s, "onset_s": begin_s,
            "end_s": event.end_s, "first": within[0].kind if within else "",
            "first_cause": within[0].cause if within else "", "hit": bool(right),
            "delay_s": right[0].end_s - begin_s if right else math.nan,
        })  # fmt: skip
    wrong = [each for each in said if _is_wrong(each, recording)]
    ends = [each.end_s for each in said]
    step_s = float(np.median(np.diff(ends))) if len(ends) > 1 else 0.0
    episodes = sum(
        1 for index, each in enumerate(said)
        if each in wrong and not (index and said[index - 1] in wrong and said[index - 1].kind == each.kind)
    )
    counted = sum(not _is_left_out(each.end_s, recording.events) for each in said) * step_s
    return rows, {
        "false_alarms": float(episodes),
        "wrong_acts": float(sum(each.action in DESTRUCTIVE for each in wrong)),
        "hours": counted / HOUR_S,
    }


def _is_left_out(end_s: float, events: Sequence[Event]) -> bool:
    """Whether nothing counts then."""
    inside = [event for event in events if event.start_s <= end_s <= event.end_s]
    if inside:
        return inside[0].fault is None
    return any(event.end_s < end_s <= max(event.end_s + AFTER_S, event.recovered_s) for event in events)


def _is_wrong(said: Said, recording: Recording) -> bool:
    if not said.kind or _is_left_out(said.end_s, recording.events):
        return False
    for event in recording.events:
        if event.start_s <= said.end_s <= event.end_s:
            allowed = {event.verdict} | ({"OVERLOADED"} if event.kind == "short_burst" else set())
            return said.kind not in allowed
    return True


def summary(rows: list[dict[str, object]], counts: list[dict[str, float]], name: str) -> dict[str, object]:
    """The figures of one detector."""
    own = [row for row in rows if row["detector"] == name and row["fault"] is True]
    hits = [row for row in own if row["hit"]]
    told = [row for row in own if row["first"]]
    false = sum(each["false_alarms"] for each in counts)
    interval = wilson(len(hits), len(own))
    delays = [float(str(row["delay_s"])) for row in hits if row["event"] not in LATE_KINDS]
    slow = [row for row in told if row["event"] in SLOW_KINDS]
    return {
        "recall": len(hits) / len(own) if own else None,
        "recall_low95": interval[0] if interval else None,
        "recall_any_verdict": len(told) / len(own) if own else None,
        "precision": len(hits) / (len(hits) + false) if hits or false else None,
        "delay_p50_s": float(np.median(delays)) if delays else None,
        "verdict_accuracy": sum(row["first"] == row["verdict"] for row in told) / len(told) if told else None,
        "degraded_accuracy": sum(row["first"] == row["verdict"] for row in slow) / len(slow) if slow else None,
        "false_alarms_per_hour": false / hours if (hours := sum(each["hours"] for each in counts)) else None,
        "wrong_destructive_acts": int(sum(each["wrong_acts"] for each in counts)),
        "fault_events": len(own),
    }


def halves(recording: Recording) -> tuple[Recording, Recording]:
    """The first half of a run, and the second."""
    middle = len(recording.frames) // 2
    cut_s = recording.frames[middle].end_s
    return (
        dataclasses.replace(recording, frames=recording.frames[:middle], events=()),
        dataclasses.replace(
            recording, frames=recording.frames[middle:],
            events=tuple(event for event in recording.events if event.start_s > cut_s),
        ),
    )  # fmt: skip


def engine_runs(run: Benchmark) -> list[dict[str, object]]:
    """vllm_runs: whether a run is overloaded, said of its gauges alone (no histogram was recorded)."""
    found: list[dict[str, object]] = []
    series: dict[str, list[dict[str, str]]] = {}
    for path in run.files("vllm_runs", "*_engine.csv.gz"):
        for row in read_rows(path):
            series.setdefault(f"{_stem(path)}@{row['scale']}", []).append(row)
    for path in run.files("vllm_runs", "*_timeseries.csv.gz"):
        if not path.name.startswith("RTXPRO6000"):  # its KV figures were not recorded
            series[_stem(path)] = list(read_rows(path))
    for name, rows in series.items():
        scale = float(rows[0].get("scale", "nan"))
        waits_s = _longest_s(rows)
        true = math.isnan(scale) or (scale >= 400 and waits_s >= 10.0)
        if 200 < scale < 400:
            continue
        kinds = _kinds(rows)
        found.append({
            "run": name, "overloaded": true, "said_overloaded": "OVERLOADED" in kinds,
            # Their gauges have holes of half a minute while nothing runs: unknown, or idle, is what one can say.
            "said_besides": ",".join(sorted(kinds - {"OVERLOADED"})),
            "said_wrongly": ",".join(sorted(kinds - {"OVERLOADED", "UNKNOWN", "UNDERUSED"})),
            "longest_queue_s": waits_s,
        })  # fmt: skip
    return found


def _stem(path: Path) -> str:
    return path.name.removesuffix(".csv.gz")


def _waiting(row: dict[str, str]) -> float:
    return float(row.get("num_pending") or row.get("waiting") or 0.0)


def _time_s(row: dict[str, str]) -> float:
    return float(row.get("t_s") or row["t"])


def _longest_s(rows: list[dict[str, str]]) -> float:
    longest, since = 0.0, None
    for row in rows:
        if _waiting(row) > 0:
            since = _time_s(row) if since is None else since
            longest = max(longest, _time_s(row) - since)
        else:
            since = None
    return longest


def _kinds(rows: list[dict[str, str]]) -> set[str]:
    """Every verdict on one of those runs."""
    placement = Placement(
        replica=REPLICA, deployment="deployment", variant="variant", nodes=(NODE,), max_num_seqs=256.0
    )
    watch = FleetWatch(FoldSettings())
    watch.place([placement])
    prompt = generation = 0.0
    before_s = _time_s(rows[0])
    kinds = set()
    for number, row in enumerate(rows, start=1):
        now_s = _time_s(row)
        prompt += float(row["prompt_throughput"]) * (now_s - before_s)
        generation += float(row.get("generation_throughput") or row["gen_throughput"]) * (now_s - before_s)
        reading = ReplicaReading(
            replica=REPLICA, instance="1", state="READY",
            running=float(row.get("num_running") or row.get("running") or 0.0),
            waiting=_waiting(row), prompt_tokens=prompt, generation_tokens=generation,
            kv_cache_usage=float(row.get("gpu_kvcache_usage") or row.get("kv_cache_pct") or "nan") / 100.0,
        )  # fmt: skip
        frame = FrameReading(
            node=NODE, boot="boot", sequence=number, start_s=before_s, end_s=now_s, replicas=(reading,)
        )
        watch.add(frame, now_s=now_s)
        kinds |= {told.judgement.kind(REPLICA).value for told in watch.close(now_s)}
        before_s = now_s
    return kinds - {"NORMAL"}


def main() -> None:
    """Replay, judge, print."""
    run = benchmark("detector_recorded", __doc__)
    found = recordings(run.data / "vllm_cpu_faults")
    train = [each for each in found if each.name.startswith("train_")]
    test = [each for each in found if not each.name.startswith("train_")]
    if not found:
        run.notes["vllm_cpu_faults"] = "no metrics.csv.gz in the data folder: left out"
    if not train or not test:
        split = [halves(each) for each in found]
        train, test = [first for first, _ in split], [second for _, second in split]
        run.notes["split"] = "learnt from the first half of each run, reported on the second"
    figures: dict[str, dict[str, object]] = {}
    rows: list[dict[str, object]] = []
    raw: list[dict[str, object]] = []

    def report(name: str, detector: Detector, learnt: Learnt, on: list[Recording]) -> None:
        counts = []
        for recording in on:
            said = detector(recording, learnt)
            judged_rows, counted = judged(recording, name, said)
            rows.extend(judged_rows)
            counts.append(counted)
            raw.extend({"run": recording.name, "detector": name, **dataclasses.asdict(each)} for each in said)
        figures[name] = summary(rows, counts, name)

    if train:
        learnt = learn(train)
        for name, detector in DETECTORS.items():
            report(name, detector, learnt, test)
            report(name + SEEN, detector, learnt, train)
    runs = engine_runs(run)
    run.write("verdicts", raw)
    run.write("events", rows)
    run.write("runs", runs)
    run.table("events", [row for row in rows if row["detector"] in {OURS, OURS + SEEN}])
    run.table("detectors", [{"detector": name, **each} for name, each in figures.items()])
    run.table("vllm_runs", runs)
    right = sum(row["overloaded"] == row["said_overloaded"] and not row["said_wrongly"] for row in runs)
    run.notes["baselines"] = "zscore and burn_rate name no cause: recall_any_verdict is what they detect"
    run.end({
        **figures.get(OURS, {}),
        "vllm_runs_accuracy": right / len(runs) if runs else None,
        "vllm_runs": len(runs),
        "baselines": {name: each for name, each in figures.items() if name in DETECTORS and name != OURS},
        "on_train": {name: figures.get(name + SEEN) for name in DETECTORS},
    })  # fmt: skip


if __name__ == "__main__":
    main()
