"""Alarms and would-be acts where nothing is wrong: real pods, real runs at low load, quiet time, simulated days.

`gentd26_gpu_serving`: every pod's GPU duty and memory, requests and queue time, everything else missing, folded to
minutes. `vllm_runs`: part A at scales of at most 200. `vllm_cpu_faults`: the time outside events and what they leave
behind; nothing is told of step times, the detector learns them. Simulated: world (b) of `detector_serving` with a day's
wave of load, and every two hours a deploy, a cold start, other prompts, a burst, lost frames or new agents, from the
bytes that agents send every five seconds. REPLICA_DAYS of them (FULL=1: ten times as many), four replicas a cluster.

A page is an episode opened as DEGRADED or MISCONFIGURED, or as OVERLOADED for over a minute. A wrong destructive act is
a stretch of time in which a replica was to be ejected, restarted or replaced. Raw results: `episodes.csv.gz` (source,
series, opened, closed, kind, causes, action), `acts.csv.gz` (source, series, from, until, action).
"""

from __future__ import annotations

import math
import multiprocessing
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from enova_recommender.detection.causes import DESTRUCTIVE
from enova_recommender.detection.episodes import Change
from enova_recommender.detection.folding import FoldSettings
from enova_recommender.detection.observation import (
    QUEUE,
    BucketCounts,
    FrameReading,
    GpuReading,
    Placement,
    ReplicaReading,
    RequestReading,
)
from enova_recommender.detection.watch import FleetWatch, Watched
from enova_recommender.types import VerdictKind
from enova_testing.benchmark import Benchmark, benchmark, read_rows
from enova_testing.frame_bytes import received
from enova_testing.recorded_faults import NODE, REPLICA, recordings
from enova_testing.serving_faults import (
    EFFICIENCY_SIGMA,
    INCIDENTS,
    REPLICAS,
    Incident,
    Setting,
    Stage,
    World,
    kernel_times,
    stage,
)
from enova_testing.serving_trace import recorded_residuals, trace
from enova_testing.serving_world import BOUNDS

REPLICA_DAYS = 150
DAY_S = 86_400.0
INTERVAL_S = 5.0             # of simulated telemetry
EVERY_S = 7200.0             # from one harmless incident to the next
LOAD_LOW, LOAD_HIGH = 0.03, 0.25
OUTPUT_FACTOR = 4.0          # long answers: fewer requests a day
HARMLESS = ("deploy", "cold_start", "shorter_prompts", "longer_prompts", "agent_restarts", "frame_gaps", "short_burst")
POD_STEP_S = 60.0
PAGE_AFTER_S, AFTER_S = 60.0, 60.0
LOW_SCALE = 200.0
MODEL, GPU, TENSOR = "meta-llama/Llama-3.1-70B-Instruct", "H100", 4


@dataclass(slots=True, kw_only=True)
class Counted:
    """What was said of one source's series."""

    source: str
    node_s: float = 0.0
    pages: int = 0
    acts: int = 0
    episodes: list[dict[str, object]] = field(default_factory=list)
    stretches: list[dict[str, object]] = field(default_factory=list)

    def take(
        self, series: str, told: Iterable[Watched], *, step_s: float, nodes: int | list[int],
        counts: Iterable[bool] | None = None,
    ) -> None:  # fmt: skip
        """Count one series; `counts` says which steps do."""
        steps = list(told)
        present = [nodes] * len(steps) if isinstance(nodes, int) else nodes
        holds = [True] * len(steps) if counts is None else list(counts)
        opened: dict[str, dict[str, object]] = {}
        acting: dict[str, dict[str, object]] = {}
        for each, is_counted, count in zip(steps, holds, present, strict=True):
            self.node_s += step_s * count * is_counted
            for change in each.changes:
                episode = change.episode
                if change.change is Change.OPENED and is_counted:
                    opened[episode.id] = {
                        "source": self.source, "series": series, "opened_s": episode.opened_s, "closed_s": math.inf,
                        "kind": episode.kind.value, "causes": "+".join(cause.name for cause in episode.causes),
                        "action": episode.action.value,
                    }  # fmt: skip
                elif change.change is Change.CLOSED and episode.id in opened:
                    opened[episode.id]["closed_s"] = episode.closed_s
            now = {name: verdict for name, verdict in each.judgement.verdicts.items() if verdict.action in DESTRUCTIVE}
            for name in acting.keys() - now.keys():
                self.stretches.append(acting.pop(name))
            for name, verdict in now.items() if is_counted else ():
                began = acting.setdefault(name, {
                    "source": self.source, "series": f"{series}/{name}", "from_s": each.step.end_s,
                    "action": verdict.action.value, "cause": verdict.cause.name if verdict.cause is not None else "",
                })  # fmt: skip
                began["until_s"] = each.step.end_s
                self.acts += began["from_s"] == each.step.end_s
        self.stretches += acting.values()
        self.episodes += opened.values()
        self.pages += sum(map(_is_page, opened.values()))


def _is_page(episode: Mapping[str, object]) -> bool:
    if episode["kind"] in {VerdictKind.DEGRADED.value, VerdictKind.MISCONFIGURED.value}:
        return True
    lasts_s = float(str(episode["closed_s"])) - float(str(episode["opened_s"]))
    return episode["kind"] == VerdictKind.OVERLOADED.value and lasts_s > PAGE_AFTER_S


def pods(run: Benchmark) -> Counted:
    """The real pods, each on a node of its own, from its first report to its last."""
    counted = Counted(source="gentd26_gpu_serving")
    series: dict[str, list[dict[str, str]]] = defaultdict(list)
    for path in run.files("gentd26_gpu_serving", "pods*.csv.gz"):
        for row in read_rows(path):
            series[row["pod"]].append(row)
    lives = {name: sorted(rows, key=lambda row: float(row["t_s"])) for name, rows in series.items()}
    frames = sorted(
        (frame for name, rows in lives.items() for frame in _pod_frames(name, rows)), key=lambda frame: frame.end_s
    )
    last_s = {name: float(rows[-1]["t_s"]) for name, rows in lives.items()}
    watch = FleetWatch(FoldSettings(step_s=POD_STEP_S, lateness_s=0.0))
    there: set[str] = set()
    told: list[Watched] = []
    nodes: list[int] = []
    for frame in frames:
        now = {name for name in there | {frame.node} if last_s[name] >= frame.end_s}
        if now != there:
            there = now
            watch.place([
                Placement(replica=name, deployment="images", variant="images-1", nodes=(name,), gpus=(f"gpu-{name}",))
                for name in sorted(there)
            ])  # fmt: skip
        watch.add(frame, now_s=frame.end_s)
        closed = watch.close(frame.end_s)
        told += closed
        nodes += [len(there)] * len(closed)
    counted.take("pods", told, step_s=POD_STEP_S, nodes=nodes)
    return counted


def _pod_frames(name: str, rows: list[dict[str, str]]) -> Iterator[FrameReading]:
    before_s = float(rows[0]["t_s"]) - 57.0
    requests = waited_s = 0.0
    for number, row in enumerate(rows, start=1):
        now_s = float(row["t_s"])
        came = _number(row["qps"]) * (now_s - before_s)
        if math.isfinite(came):
            requests += came
            waited_s += came * np.nan_to_num(_number(row["queue_rt_ms"])) / 1e3
        yield FrameReading(
            node=name, boot="boot", sequence=number, start_s=before_s, end_s=now_s,
            gpus=(GpuReading(
                uuid=f"gpu-{name}", utilization=_number(row["gpu_duty_pct"]) / 100.0,
                memory_used_bytes=_number(row["gpu_mem_mib"]) * 2**20,
            ),),
            replicas=(ReplicaReading(
                replica=name, instance="1", state="READY", histograms={QUEUE: BucketCounts((requests,), waited_s)}
            ),),
            requests=(RequestReading(deployment="images", replica=name, arrived=came, finished=came),),
        )  # fmt: skip
        before_s = now_s


def low_load(run: Benchmark) -> Counted:
    """Part A of vllm_runs at low scales."""
    counted = Counted(source="vllm_runs")
    runs: dict[str, list[dict[str, str]]] = defaultdict(list)
    for path in run.files("vllm_runs", "*_engine.csv.gz"):
        for row in read_rows(path):
            if float(row["scale"]) <= LOW_SCALE:
                runs[f"{path.name}@{row['scale']}"].append(row)
    for name, rows in runs.items():
        watch = FleetWatch(FoldSettings())
        watch.place([Placement(
            replica=REPLICA, deployment="deployment", variant="variant", nodes=(NODE,), max_num_seqs=256.0
        )])  # fmt: skip
        told: list[Watched] = []
        prompt = generation = 0.0
        before_s = float(rows[0]["t_s"])
        for number, row in enumerate(rows, start=1):
            now_s = float(row["t_s"])
            prompt += float(row["prompt_throughput"]) * (now_s - before_s)
            generation += float(row.get("generation_throughput") or row["gen_throughput"]) * (now_s - before_s)
            reading = ReplicaReading(
                replica=REPLICA, instance="1", state="READY", running=float(row["num_running"]),
                waiting=float(row["num_pending"]), prompt_tokens=prompt, generation_tokens=generation,
                kv_cache_usage=_number(row.get("gpu_kvcache_usage", "")) / 100.0,
            )  # fmt: skip
            watch.add(FrameReading(
                node=NODE, boot="boot", sequence=number, start_s=before_s, end_s=now_s, replicas=(reading,)
            ), now_s=now_s)  # fmt: skip
            told += watch.close(now_s)
            before_s = now_s
        counted.take(name, told, step_s=5.0, nodes=1)
    return counted


def quiet_time(run: Benchmark) -> Counted:
    """Recordings of a real vLLM between events."""
    counted = Counted(source="vllm_cpu_faults")
    for recording in recordings(run.data / "vllm_cpu_faults"):
        watch = FleetWatch(FoldSettings(bounds=recording.bounds))
        watch.place([recording.placement])
        told: list[Watched] = []
        for frame in recording.frames:
            watch.add(frame, now_s=frame.end_s)
            told += watch.close(frame.end_s)
        quiet = [
            not any(event.start_s <= each.step.end_s <= max(event.end_s + AFTER_S, event.recovered_s)
                    for event in recording.events) for each in told
        ]  # fmt: skip
        counted.take(recording.name, told, step_s=5.0, nodes=1, counts=quiet)
    return counted


def simulated(task: tuple[Setting, int, float]) -> Counted:
    """One cluster for so many seconds."""
    setting, seed, duration_s = task
    counted = Counted(source="simulated")
    cluster = stage(setting, seed=seed, capacity_rps=_capacity(setting))
    cluster.output_factor = OUTPUT_FACTOR
    watch = FleetWatch(FoldSettings(bounds=BOUNDS))
    watch.place(cluster.placements())
    watch.expect({each.name: setting.believed for each in cluster.engines})
    incidents = [each for each in INCIDENTS if each.name in HARMLESS]
    told: list[Watched] = []
    while cluster.now_s < duration_s:
        _live(cluster, incidents, seed)
        for node, data in cluster.passing(INTERVAL_S):
            watch.add(received(node, data), now_s=cluster.now_s)
        told += watch.close(cluster.now_s)
        if len(told) > 2000:  # a stretch or an episode that spans the cut counts twice at most
            counted.take(f"cluster-{seed}", told, step_s=5.0, nodes=REPLICAS)
            told = []
    counted.take(f"cluster-{seed}", told, step_s=5.0, nodes=REPLICAS)
    return counted


def _live(cluster: Stage, incidents: list[Incident], seed: int) -> None:
    """The wave of the day, and what happens in it."""
    wave = 0.5 - 0.5 * math.cos(2 * math.pi * cluster.now_s / DAY_S)
    turn, elapsed_s = divmod(cluster.now_s, EVERY_S)
    incident = incidents[(int(turn) + seed) % len(incidents)]
    if elapsed_s < incident.duration_s:
        incident.act(cluster, elapsed_s)
    elif elapsed_s == incident.duration_s:
        incident.undo(cluster, elapsed_s)
    burst = cluster.load > 1.0
    cluster.load = 3.0 * LOAD_HIGH if burst else LOAD_LOW + (LOAD_HIGH - LOAD_LOW) * wave
    cluster.output_factor = OUTPUT_FACTOR


def _capacity(setting: Setting) -> float:
    return setting.capacity_rps() / OUTPUT_FACTOR


def _number(text: str) -> float:
    return float(text) if text else math.nan


def tasks(run: Benchmark) -> list[tuple[Setting, int, float]]:
    """A day a cluster."""
    days = REPLICA_DAYS * (10 if run.full else 1)
    clusters = math.ceil(days / REPLICAS)
    requests, residuals, believed = trace(run), recorded_residuals(run), kernel_times(MODEL, GPU, TENSOR)
    found = []
    for seed in range(run.seed, run.seed + clusters):
        efficiency = math.exp(EFFICIENCY_SIGMA * float(np.random.default_rng(seed).normal()))
        found.append((Setting(
            world=World.PERTURBED, name=MODEL, times=believed, believed=believed, requests=requests,
            residuals=residuals, efficiency=efficiency,
        ), seed, DAY_S * min(1.0, (days - REPLICAS * (seed - run.seed)) / REPLICAS)))  # fmt: skip
    return found


def main() -> None:
    """Replay, live through the days, count, print."""
    run = benchmark("detector_quiet", __doc__)
    found = [pods(run), low_load(run), quiet_time(run)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found += pool.map(simulated, tasks(run), chunksize=1)
    by_source: dict[str, dict[str, object]] = {}
    for source in dict.fromkeys(each.source for each in found):
        own = [each for each in found if each.source == source]
        days = sum(each.node_s for each in own) / DAY_S
        if days == 0:
            run.notes[source] = "not in the data folder: left out"
            continue
        pages = sum(each.pages for each in own)
        by_source[source] = {
            "node_days": days, "pages": pages, "pages_per_node_day": pages / days,
            "wrong_destructive_acts": sum(each.acts for each in own),
            "episodes": sum(len(each.episodes) for each in own),
        }  # fmt: skip
    run.write("episodes", [row for each in found for row in each.episodes])
    run.write("acts", [row for each in found for row in each.stretches])
    run.table("sources", [{"source": name, **each} for name, each in by_source.items()])
    days = sum(each.node_s for each in found) / DAY_S
    run.end({
        "pages_per_node_day": sum(each.pages for each in found) / days if days else None,
        "wrong_destructive_acts": sum(each.acts for each in found), "node_days": days, "by_source": by_source,
    })  # fmt: skip


if __name__ == "__main__":
    main()
