"""Production traces as requests of a wanted density: the layouts of `tests/benchmarks/scenarios.toml`, and windows.

A window keeps the load of its trace by 10 s; what came before it becomes the history that policies are told.
"""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from enova_recommender.scaling.situation import Demand
from enova_simulator.cluster.trace import Rows, drawn, read, scaled, steepest

GRID_S = 10.0
MINUTE_S = 60.0
SHARES = (0.05, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99)
COLUMNS = ("p5", "p25", "p50", "p75", "p90", "p95", "p99")
PAIRS = 4096
BURSTY_CV = 4.0
CALM_CV = 1.2

Floats = NDArray[np.float64]
Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One row of the scenarios."""

    name: str
    kind: str
    folder: str
    files: str
    layout: str
    lengths: str
    judged: bool = True
    default: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """A trace as it was recorded: either requests, or counts by 10 s with lengths to draw."""

    rows: Rows | None
    counts: Floats                 # by GRID_S
    cvs: Floats
    lengths: Pairs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Window:
    """A cut of a trace at a density: `counts` are those of the cut by GRID_S, before the factor."""

    start_s: float
    counts: Floats
    source: Source

    def requests(self, factor: float, *, seed: int) -> Rows:
        """The requests, so many times as dense as recorded."""
        span_s = len(self.counts) * GRID_S
        if self.source.rows is not None:
            return scaled(self.source.rows.between(self.start_s, self.start_s + span_s), factor, seed=seed)
        first = round(self.start_s / GRID_S)
        cvs = self.source.cvs[first : first + len(self.counts)]
        return drawn(factor * self.counts, width_s=GRID_S, lengths=self.source.lengths, cv=cvs, seed=seed)

    def history(self, factor: float) -> Demand | None:
        """The minutes before the window; None where there are none."""
        a_minute = round(MINUTE_S / GRID_S)
        first = round(self.start_s / GRID_S)
        whole = first // a_minute
        if not whole:
            return None
        counts = self.source.counts[first - whole * a_minute : first].reshape(whole, a_minute).sum(axis=1)
        prompts, outputs = np.mean(np.array(self.source.lengths), axis=0)
        arrived = factor * counts
        return Demand(
            end_s=0.0, step_s=MINUTE_S, arrived=arrived, finished=arrived.copy(), prompt_tokens=arrived * prompts,
            output_tokens=arrived * outputs,
        )


def source(trace: Trace, data: Path, *, seed: int) -> Source | None:
    """A trace of the data folder; None where its set is absent."""
    found = sorted((data / trace.folder).glob(trace.files))
    azure = sorted((data / "azure_llm_2023").glob("conv*.csv.gz"))
    if not found or (trace.lengths == "azure" and not azure):
        return None
    if trace.layout == "requests":
        rows = _requests(found[0])
        return Source(rows=rows, counts=_binned(rows.arrival_s), cvs=np.ones(0), lengths=rows.lengths)
    if trace.lengths == "azure":
        lengths = _requests(azure[0]).lengths
    else:
        lengths = quantile_pairs(next(iter(sorted((data / trace.folder).glob(trace.lengths)))), seed=seed)
    match trace.layout:
        case "counts":
            counts = _by_grid(_column(found[0], "n_requests", without_gaps=True), 600.0)
            return Source(rows=None, counts=counts, cvs=np.full(len(counts), CALM_CV), lengths=lengths)
        case "tokens":
            mean = float(np.array(lengths).sum(axis=1).mean())
            counts = _by_grid(_column(found[0], "tokens_per_s") * MINUTE_S / mean, MINUTE_S)
            return Source(rows=None, counts=counts, cvs=np.full(len(counts), CALM_CV), lengths=lengths)
        case "clients":
            counts, cvs = _bursty_client(found[0])
            return Source(rows=None, counts=counts, cvs=cvs, lengths=lengths)
        case other:
            raise ValueError(f"{trace.name}: unknown layout {other!r}")


def windows(found: Source, *, window_s: float, count: int) -> list[Window]:
    """The windows of steepest change; the whole trace where it is shorter than one."""
    size = min(round(window_s / GRID_S), len(found.counts))
    places = steepest(
        found.counts, width_s=GRID_S, window_s=window_s, requests_max=float("inf"), windows=count
    )
    return [
        Window(start_s=place * GRID_S, counts=found.counts[place : place + size], source=found) for place in places
    ]


def quantile_pairs(path: Path, *, seed: int) -> Pairs:
    """Lengths drawn from a file of quantiles by client and window, each row as likely as the other."""
    draw = np.random.default_rng(seed)
    rows = list(_rows(path))
    picks = draw.integers(0, len(rows), PAIRS)
    pairs = []
    for pick in picks.tolist():
        one = [_quantile(rows[pick], side, float(draw.random())) for side in ("input", "output")]
        pairs.append((one[0], one[1]))
    return tuple(pairs)


def _quantile(row: Mapping[str, str], side: str, share: float) -> int:
    values = [float(row[f"{side}_{column}"] or "nan") for column in COLUMNS]
    mean = float(row[f"{side}_mean"] or 1.0)
    value = float(np.interp(share, SHARES, values))
    return max(1, round(mean if np.isnan(value) else value))


def _requests(path: Path) -> Rows:
    with gzip.open(path, "rt") as lines:
        return read(lines)


def _rows(path: Path) -> Iterator[Mapping[str, str]]:
    with gzip.open(path, "rt") as lines:
        yield from csv.DictReader(lines)


def _column(path: Path, name: str, *, without_gaps: bool = False) -> Floats:
    kept = [row for row in _rows(path) if not (without_gaps and row.get("recording_gap", "0") == "1")]
    return np.array([float(row[name]) for row in kept])


def _by_grid(counts: Floats, width_s: float) -> Floats:
    """Counts of wide windows by GRID_S, the load linear between the middles of windows."""
    each = round(width_s / GRID_S)
    middles = (np.arange(len(counts)) + 0.5) * each
    return np.asarray(np.interp(np.arange(len(counts) * each) + 0.5, middles, counts / each))


def _binned(arrival_s: Floats) -> Floats:
    steps = int(np.ceil(arrival_s[-1] / GRID_S)) if len(arrival_s) else 0
    return np.bincount((arrival_s // GRID_S).astype(int), minlength=steps)[:steps].astype(np.float64)


def _bursty_client(path: Path) -> tuple[Floats, Floats]:
    """The client with the most requests among those whose median variation is at least BURSTY_CV."""
    counts: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    for row in _rows(path):
        counts[row["client"]][round(float(row["t_s"]) / 600.0)] = float(row["n_requests"]), float(row["cv"] or CALM_CV)
    bursty = {
        client: found for client, found in counts.items()
        if np.median([cv for _, cv in found.values()]) >= BURSTY_CV and len(found) > 100
    }
    found = bursty[max(bursty, key=lambda client: sum(count for count, _ in bursty[client].values()))]
    size = max(found) + 1
    by_window = np.array([found.get(place, (0.0, CALM_CV)) for place in range(size)])
    each = round(600.0 / GRID_S)
    return np.repeat(by_window[:, 0] / each, each), np.repeat(by_window[:, 1], each)
