"""Recordings of a real vLLM server with labelled faults, as the frames that an agent beside it would have sent.

A folder holds `metrics.csv.gz` (every series of `/metrics`, once a second), `requests.csv.gz` (what clients saw),
`events.csv` (the labels, which only judging may read) and `run.json`.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from enova_recommender.detection.observation import (
    INTER_TOKEN,
    QUEUE,
    TTFT,
    BucketCounts,
    FrameReading,
    Placement,
    ReplicaReading,
    RequestReading,
)

REPLICA, NODE, DEPLOYMENT = "replica", "node", "deployment"
METRICS = (TTFT, INTER_TOKEN, QUEUE)
_BUCKET = re.compile(r'^vllm:(\w+)_bucket\{le="([^"]+)"\}$')
_FINISHED = re.compile(r'^vllm:request_success_total\{finished_reason="(\w+)"\}$')


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One labelled event; `fault` is None where nobody can say, and then nothing counts."""

    start_s: float
    end_s: float
    recovered_s: float
    kind: str
    parameter: float
    effect: float
    fault: bool | None
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One run."""

    name: str
    placement: Placement
    frames: tuple[FrameReading, ...]
    bounds: Mapping[str, tuple[float, ...]]
    events: tuple[Event, ...]
    capacity_rps: float
    base_rps: float

    @property
    def duration_s(self) -> float:
        """Length of the run."""
        return self.frames[-1].end_s - self.frames[0].start_s


def recordings(folder: Path) -> list[Recording]:
    """Every run of a folder in which anything was recorded, by name."""
    found = (_read(each.parent) for each in sorted(folder.glob("*/metrics.csv.gz")))
    return [each for each in found if each is not None]


def _read(folder: Path) -> Recording | None:
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    with gzip.open(folder / "metrics.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return None
    buckets = _buckets(rows[0])
    engine = run["engine"]

    def flag(name: str) -> float:
        return float(engine[engine.index(name) + 1]) if name in engine else math.nan

    placement = Placement(
        replica=REPLICA, deployment=DEPLOYMENT, variant="variant", nodes=(NODE,),
        max_num_seqs=flag("--max-num-seqs"), max_num_batched_tokens=flag("--max-num-batched-tokens"),
        max_model_len=flag("--max-model-len"),
        kv_tokens=flag("--num-gpu-blocks-override") * flag("--block-size"),
    )  # fmt: skip
    with gzip.open(folder / "requests.csv.gz", "rt", encoding="utf-8", newline="") as file:
        requests = [each for each in csv.DictReader(file) if each["outcome"] != "not_sent"]
    return Recording(
        name=folder.name,
        placement=placement,
        frames=tuple(_frames(rows, requests, buckets)),
        bounds={metric: tuple(bound for bound, _ in columns[:-1]) for metric, columns in buckets.items()},
        events=tuple(_events(folder / "events.csv")),
        capacity_rps=float(run["capacity_requests_per_s"]),
        base_rps=float(run["base_requests_per_s"]),
    )


def _buckets(row: Mapping[str, str]) -> dict[str, list[tuple[float, str]]]:
    """The columns of each histogram by upper bound; +Inf last."""
    found: dict[str, list[tuple[float, str]]] = {}
    for column in row:
        if (match := _BUCKET.match(column)) and match[1] in METRICS:
            found.setdefault(match[1], []).append((float(match[2]), column))
    return {metric: sorted(columns) for metric, columns in found.items()}


def _frames(
    rows: list[dict[str, str]], requests: list[dict[str, str]], buckets: Mapping[str, list[tuple[float, str]]]
) -> Iterator[FrameReading]:
    arrivals = sorted(_number(each["t"]) for each in requests)
    ends = sorted(
        (_number(each["t"]) + max(0.0, _number(each["e2e_s"], 0.0)), each["outcome"] == "ok") for each in requests
    )
    came = left = good = bad = 0
    before_s, before = _number(rows[0]["t"]) - 1.0, (0, 0, 0)
    for number, row in enumerate(rows, start=1):
        now_s = _number(row["t"])
        while came < len(arrivals) and arrivals[came] <= now_s:
            came += 1
        while left < len(ends) and ends[left][0] <= now_s:
            good, bad, left = good + ends[left][1], bad + (not ends[left][1]), left + 1
        yield FrameReading(
            node=NODE, boot="boot", sequence=number, start_s=before_s, end_s=now_s,
            replicas=(_reading(row, buckets, held=float(came - left)),),
            requests=(RequestReading(
                deployment=DEPLOYMENT, replica=REPLICA, arrived=came - before[0], finished=good - before[1],
                held=came - left,
            ),),
        )  # fmt: skip
        before_s, before = now_s, (came, good, bad)


def _reading(
    row: Mapping[str, str], buckets: Mapping[str, list[tuple[float, str]]], *, held: float
) -> ReplicaReading:
    def of(name: str) -> float:
        return _number(row.get(f"vllm:{name}", ""))

    return ReplicaReading(
        replica=REPLICA, instance="1", state="READY", held=held,
        running=of("num_requests_running"), waiting=of("num_requests_waiting"),
        kv_cache_usage=of("kv_cache_usage_perc"), resident_memory_bytes=_number(row.get("rss_bytes", "")),
        prompt_tokens=of("prompt_tokens_total"), generation_tokens=of("generation_tokens_total"),
        preemptions=of("num_preemptions_total"), iterations=of("iteration_tokens_total_count"),
        prefix_cache_hits=of("prefix_cache_hits_total"),
        finished={match[1]: _number(row[name]) for name in row if (match := _FINISHED.match(name))},
        histograms={
            metric: BucketCounts([_number(row[column]) for _, column in columns], of(f"{metric}_sum"))
            for metric, columns in buckets.items()
        },
    )  # fmt: skip


def _events(path: Path) -> Iterator[Event]:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield Event(
                start_s=float(row["start_s"]), end_s=float(row["end_s"]), recovered_s=float(row["recovered_s"]),
                kind=row["kind"], parameter=_number(row["parameter"]), effect=_number(row["effect"]),
                fault=None if row["fault"] == "" else row["fault"] == "1", verdict=row["verdict"],
            )  # fmt: skip


def _number(text: str, missing: float = math.nan) -> float:
    return float(text) if text else missing
