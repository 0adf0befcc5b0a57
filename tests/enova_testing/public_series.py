"""Public labelled series as benchmarks read them: what is train, what is scored, and the labels where there are any.

By the protocol of all detector benchmarks: files `*_train` and `*_test` of one entity belong together; of a file with
many series the first part of each is train.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from enova_testing.benchmark import Benchmark, read_rows

Floats = npt.NDArray[np.float64]

TRAIN_SHARES = {"nab": 0.15, "ms_cloud_monitoring": 0.30}   # of each series of a set in one file
PAIRED_STEP_S = {"smd": 60.0, "asd": 300.0}                  # sets whose files have no stamps

# A seeded half of the entities at hand when constants were chosen (the names of each set, sorted, permuted by
# numpy.random.default_rng(0), the first half): no constant was chosen by looking at any other since then.
CHOSEN_ON: dict[str, frozenset[str]] = {
    "asd": frozenset({
        "omi-3", "omi-4", "omi-9",
    }),
    "ms_cloud_monitoring": frozenset({
        "application-crash-rate-1/app1-01", "application-crash-rate-1/app1-05", "application-crash-rate-1/app1-07",
        "application-crash-rate-1/app1-09", "application-crash-rate-2/app2-03", "application-crash-rate-2/app2-07",
        "consumer-purchase-rate/purchase-01", "consumer-purchase-rate/purchase-03",
        "ecommerce-api-incoming-rps/api-01", "middle-tier-api-dependency-latency/outbound-03",
        "middle-tier-api-dependency-latency/outbound-09", "middle-tier-api-dependency-latency/outbound-13",
        "middle-tier-api-dependency-latency/outbound-17", "middle-tier-api-dependency-latency/outbound-19",
        "mongodb-application-rps/mongo-01", "mongodb-application-rps/mongo-03",
    }),
    "nab": frozenset({
        "artificialNoAnomaly/art_daily_no_noise", "artificialNoAnomaly/art_daily_perfect_square_wave",
        "artificialNoAnomaly/art_daily_small_noise", "artificialNoAnomaly/art_flatline",
        "artificialNoAnomaly/art_noisy", "artificialWithAnomaly/art_daily_jumpsdown",
        "artificialWithAnomaly/art_increase_spike_density", "artificialWithAnomaly/art_load_balancer_spikes",
        "realAWSCloudwatch/ec2_cpu_utilization_24ae8d", "realAWSCloudwatch/iio_us-east-1_i-a2eb1cd9_NetworkIn",
        "realAWSCloudwatch/rds_cpu_utilization_e47b3b", "realAdExchange/exchange-2_cpc_results",
        "realAdExchange/exchange-3_cpc_results", "realKnownCause/rogue_agent_key_updown",
        "realTraffic/occupancy_6005", "realTraffic/speed_t4013", "realTweets/Twitter_volume_IBM",
        "realTweets/Twitter_volume_PFE",
    }),
    "smd": frozenset({
        "machine-1-6", "machine-2-7",
    }),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Entity:
    """One entity: steps by features. `labels` is None where the file has no such column."""

    set_name: str
    name: str
    step_s: float
    train: Floats
    test: Floats
    labels: npt.NDArray[np.bool_] | None

    @property
    def labelled(self) -> bool:
        """Whether there is something to find; others count for false alarms alone."""
        return self.labels is not None and bool(self.labels.any())


def entities(run: Benchmark) -> list[Entity]:
    """All entities of the sets in the data folder."""
    found: list[Entity] = []
    for set_name in PAIRED_STEP_S:
        found += [_paired(set_name, path) for path in run.files(set_name, "*_train.csv*")]
    for set_name in TRAIN_SHARES:
        for path in run.files(set_name, "series.csv*"):
            found += _series(set_name, path)
    return found


def is_chosen_on(entity: Entity) -> bool:
    """Whether constants were chosen on it."""
    return entity.name in CHOSEN_ON.get(entity.set_name, frozenset())


def filled(values: Floats) -> Floats:
    """Without gaps, as other detectors need it: the last value before, or 0."""
    out = values.copy()
    for column in out.T:
        known = np.isfinite(column)
        last = np.maximum.accumulate(np.where(known, np.arange(len(column)), 0))
        column[:] = np.nan_to_num(column[last])
    return out


def _paired(set_name: str, train: Path) -> Entity:
    columns, learnt = _table(train)
    _, scored = _table(train.with_name(train.name.replace("_train", "_test")))
    labels = scored.pop("label", None)
    return Entity(
        set_name=set_name,
        name=train.name.partition("_train")[0],
        step_s=PAIRED_STEP_S[set_name],
        train=np.column_stack([learnt[column] for column in columns]),
        test=np.column_stack([scored[column] for column in columns]),
        labels=None if labels is None else labels > 0,
    )


def _table(path: Path) -> tuple[list[str], dict[str, Floats]]:
    rows = list(read_rows(path))
    columns = {name: np.array([_number(row[name]) for row in rows]) for name in rows[0]}
    return [name for name in columns if name != "label"], columns


def _series(set_name: str, path: Path) -> Iterator[Entity]:
    rows: dict[str, list[dict[str, str]]] = {}
    for row in read_rows(path):
        rows.setdefault(row["series"], []).append(row)
    for name, own in rows.items():
        values = np.array([[_number(row["value"])] for row in own])
        labels = np.array([_number(row["label"]) > 0 for row in own]) if "label" in own[0] else None
        split = int(len(own) * TRAIN_SHARES[set_name])
        yield Entity(
            set_name=set_name,
            name=name,
            step_s=_step_s([row["timestamp"] for row in own[:50]]),
            train=values[:split],
            test=values[split:],
            labels=None if labels is None else labels[split:],
        )


def _step_s(stamps: list[str]) -> float:
    seconds = [datetime.fromisoformat(stamp).timestamp() for stamp in stamps]
    return float(np.median(np.diff(seconds)))


def _number(text: str) -> float:
    return float(text) if text else float("nan")
