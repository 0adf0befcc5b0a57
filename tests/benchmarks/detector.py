"""Anomaly detection on public labelled series: how well scores find what people labelled, beside other detectors.

Train files and train spans alone are learnt from, without labels; one setting serves all sets. Raw results:
`scores.csv.gz` (entity, step, label, and a score by detector) and `entities.csv.gz` (one row an entity and detector:
`vus_pr`, `auc_pr`, `f1`, `event_recall`, `false_episodes`, `days`, `cpu_s`).

VUS-PR with window 50, mean over labelled entities, then over sets. Own thresholds: enova's by extreme-value theory at
RATE, the others' at the 99.9 % quantile of their train scores. Compute: CPU seconds of fit and of scoring. A peer that
spent its budget on a set is not run on the rest of it, and is compared where it ran.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enova_recommender.detection import context, detector, extremes, nearest, scaling, subspace
from enova_recommender.detection.detector import ContextDetector
from enova_recommender.detection.extremes import DriftingThreshold
from enova_testing.benchmark import Benchmark, benchmark, bootstrap
from enova_testing.public_series import Entity, entities
from enova_testing.range_scores import at_threshold, auc_pr, vus_pr

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = ROOT / ".venv-detectors"
RATE = 1e-3               # of normal steps that may raise an alarm
PEER_QUANTILE = 0.999
PEER_BUDGET_S = 100.0     # CPU seconds of one peer on one set
LEAD_STEPS = 300          # of train before test, so that its first steps have a past
DAY_S = 86_400.0
OURS = "enova"
BASELINES = ("random", "zscore", "pca", "knn", "iforest", "autoencoder", "sla_vae")
SETTINGS = (context, detector, extremes, nearest, scaling, subspace)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What one detector made of one entity."""

    name: str
    entity: Entity
    scores: Floats
    alarms: npt.NDArray[np.bool_]
    cpu_s: float

    def row(self) -> dict[str, object]:
        """Its figures."""
        entity, labels = self.entity, self.entity.labels
        known = labels if labels is not None else np.zeros(len(self.scores), dtype=bool)
        judged = at_threshold(known, self.alarms)
        return {
            "set": entity.set_name,
            "entity": entity.name,
            "detector": self.name,
            "vus_pr": vus_pr(known, self.scores) if entity.labelled else None,
            "auc_pr": auc_pr(known, self.scores) if entity.labelled else None,
            "f1": judged.f1 if entity.labelled else None,
            "event_recall": judged.event_recall if entity.labelled else None,
            "false_episodes": judged.false_episodes,
            "days": len(self.scores) * entity.step_s / DAY_S,
            "cpu_s": self.cpu_s,
            "values": self.entity.test.size + self.entity.train.size,
        }


def ours(entity: Entity) -> Scored:
    """enova's detector, threshold included."""
    began_s = time.process_time()
    model = ContextDetector()
    model.fit(entity.train)
    lead = entity.train[-LEAD_STEPS:]
    scores = np.nan_to_num(model.score(np.concatenate((lead, entity.test)))[len(lead) :])
    threshold = DriftingThreshold(rate=RATE)
    threshold.fit(model.score(entity.train))
    alarms = np.array([threshold.update([score])[0] for score in scores])
    return Scored(name=OURS, entity=entity, scores=scores, alarms=alarms, cpu_s=time.process_time() - began_s)


def peers(run: Benchmark, found: list[Entity]) -> Iterator[Scored]:
    """The others, by a program in an environment of its own."""
    prepared = subprocess.run([ROOT / "tests/tools/setup_detectors", ENVIRONMENT], check=False)
    if prepared.returncode != 0:
        run.notes["baselines"] = "their packages cannot be installed here"
        return
    run.out.mkdir(parents=True, exist_ok=True)
    series, scores = run.out / "peer_series.npz", run.out / "peer_scores.npz"
    arrays: dict[str, Any] = {
        f"{each.set_name}/{each.name}/{part}": filled(values)
        for each in found for part, values in (("train", each.train), ("test", each.test))
    }
    np.savez_compressed(series, **arrays)
    program = str(ROOT / "tests/tools/score_series.py")
    command = [str(ENVIRONMENT / "bin/python"), program, str(series), str(scores), str(PEER_BUDGET_S)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    by_name = {f"{each.set_name}/{each.name}": each for each in found}
    with np.load(scores) as made:
        for key in made:
            if not key.endswith("/test"):
                continue
            name, _, rest = key.removesuffix("/test").partition("/")
            stem = key.removesuffix("/test")
            level = float(np.quantile(made[f"{stem}/train"], PEER_QUANTILE))
            values = np.nan_to_num(made[key])
            yield Scored(
                name=name, entity=by_name[rest], scores=values, alarms=values > level,
                cpu_s=float(made[f"{stem}/cpu_s"][0]),
            )


def filled(values: Floats) -> Floats:
    """Without gaps, as the others need it: the last value before, or 0."""
    out = values.copy()
    for column in out.T:
        known = np.isfinite(column)
        last = np.maximum.accumulate(np.where(known, np.arange(len(column)), 0))
        column[:] = np.nan_to_num(column[last])
    return out


def summary(rows: list[dict[str, object]], name: str) -> dict[str, object]:
    """The figures of one detector: means over entities, then over sets."""
    own = [row for row in rows if row["detector"] == name]
    sets = sorted({str(row["set"]) for row in own})
    by_set = {set_name: [row for row in own if row["set"] == set_name] for set_name in sets}

    def mean(key: str) -> float | None:
        means = [np.mean([row[key] for row in part if row[key] is not None]) for part in by_set.values()
                 if any(row[key] is not None for row in part)]
        return float(np.mean(means)) if means else None

    days = sum(float(str(row["days"])) for row in own)
    values = sum(int(str(row["values"])) for row in own)
    return {
        "vus_pr_mean": mean("vus_pr"),
        "vus_pr": {
            set_name: float(np.mean([row["vus_pr"] for row in part if row["vus_pr"] is not None]))
            for set_name, part in by_set.items() if any(row["vus_pr"] is not None for row in part)
        },
        "auc_pr_mean": mean("auc_pr"),
        "f1_own_threshold": mean("f1"),
        "event_recall": mean("event_recall"),
        "false_alarm_episodes_per_day": sum(int(str(row["false_episodes"])) for row in own) / days if days else None,
        "cpu_s_per_million_points": 1e6 * sum(float(str(row["cpu_s"])) for row in own) / values if values else None,
        "entities": len(own),
    }


def wins(rows: list[dict[str, object]], name: str, seed: int) -> dict[str, object]:
    """How often, and by how much, enova's VUS-PR is above another's on the same entity."""
    of = {
        (row["set"], row["entity"], row["detector"]): float(str(row["vus_pr"]))
        for row in rows if row["vus_pr"] is not None
    }
    pairs = [
        (value, of[set_name, entity, name])
        for (set_name, entity, who), value in of.items() if who == OURS and (set_name, entity, name) in of
    ]
    apart = np.array([mine - other for mine, other in pairs])
    low, high = bootstrap(apart, seed=seed)
    return {
        "share": float((apart > 0).mean()), "difference": float(apart.mean()), "low95": low, "high95": high,
        "entities": len(apart),
    }


def settings_hash() -> str:
    """Of the code that was measured, constants included: one setting for all sets."""
    text = "".join(inspect.getsource(module) for module in SETTINGS)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> None:
    """Score all entities, compare, and end in one line."""
    run = benchmark("detector", __doc__)
    found = entities(run)
    if not found:
        run.end({"vus_pr_mean": None})
        return
    scored = [ours(entity) for entity in found] + list(peers(run, found))
    rows = [each.row() for each in scored]
    run.write("entities", rows)
    run.write("scores", (
        {"set": each.entity.set_name, "entity": each.entity.name, "detector": each.name, "step": step,
         "label": "" if each.entity.labels is None else int(each.entity.labels[step]), "score": f"{score:.6g}"}
        for each in scored if each.name in {OURS, *BASELINES} for step, score in enumerate(each.scores.tolist())
    ))  # fmt: skip
    names = list(dict.fromkeys(str(row["detector"]) for row in rows))
    figures = {name: summary(rows, name) for name in names}
    run.table("Detectors on public series", [
        {"detector": name, **{key: value for key, value in figures[name].items() if key != "vus_pr"}} for name in names
    ])
    run.notes["sla_vae"] = "not built yet: null"
    others = {name: figures[name] for name in names if name != OURS}
    run.end({
        **figures[OURS],
        "settings": settings_hash(),
        "wins_vs": {name: wins(rows, name, run.seed) for name in others},
        "baselines": {**others, "sla_vae": others.get("sla_vae")},
    })


if __name__ == "__main__":
    main()
