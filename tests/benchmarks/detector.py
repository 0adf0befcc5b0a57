"""Anomaly detection on public labelled series: how well scores find what people labelled, beside other detectors.

Train files and train spans alone are learnt from, without labels; one setting serves all sets, and all that a detector
is told of a series is its step. Raw results: `scores.csv.gz` (set, entity, step, label, and a column of scores a
detector), `entities.csv.gz` (one row an entity and detector: `vus_pr`, `auc_pr`, `f1`, `event_recall`,
`false_episodes`, `alarmed` and `quiet` steps without a label, `days`, `cpu_s`) and `members.csv.gz` (VUS-PR of
ensembles without each member).

VUS-PR with window 50, mean over labelled entities, then over sets. Own thresholds: enova's by extreme-value theory at
RATE on held-out scores, the others' at the 99.9 % quantile of their train scores. Compute: CPU seconds of fit, score
and threshold on one core; imports are not counted. A peer that spent its budget on a set is not run on the rest of it,
is compared where it ran, and is named under `unfinished`. With the same `--out` and the same series, the scores of
other packages are taken from the run before.

Constants were chosen by VUS-PR on a seeded half of the entities: `unseen` gives the figures of the other half alone.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import statsmodels.tsa.seasonal  # noqa: F401  # before anything is timed

from enova_recommender.detection import (
    context,
    contextual,
    ensemble,
    extremes,
    layers,
    learned,
    nearest,
    scaling,
    seasonal,
    subspace,
    surprise,
    tails,
    vae,
)
from enova_recommender.detection.ensemble import EnsembleDetector, standard_members
from enova_recommender.detection.extremes import DriftingThreshold
from enova_testing import sla_vae as published
from enova_testing.benchmark import Benchmark, benchmark, bootstrap, read_rows
from enova_testing.public_series import Entity, entities, filled, is_chosen_on
from enova_testing.range_scores import at_threshold, auc_pr, vus_pr

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = ROOT / ".venv-detectors"
RATE = 1e-3               # of normal steps that may raise an alarm
PEER_QUANTILE = 0.999
PEER_BUDGET_S = 100.0     # CPU seconds of one peer on one set
SHIFT_STEPS = 600         # an alarm of a day has been seen; so many steps where a day has none
LEAD_STEPS = 300          # of train before test, so that its first steps have a past
DAY_S = 86_400.0
OURS = "enova"
SLA_VAE = "sla_vae"
LEARNED = ("autoencoder", SLA_VAE)
SETTINGS = (
    context, contextual, ensemble, extremes, layers, learned, nearest, scaling, seasonal, subspace, surprise, tails,
    vae,
)  # fmt: skip
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PUBLISHED = {"AE-MLP 16-6-16": "autoencoder", "kNN-5 to train": "knn", "PCA-10 recon error": "pca"}

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What one detector made of one entity."""

    name: str
    entity: Entity
    scores: Floats
    alarms: npt.NDArray[np.bool_]
    cpu_s: float

    def row(self) -> Row:
        """Its figures."""
        entity, labels = self.entity, self.entity.labels
        known = labels if labels is not None else np.zeros(len(self.scores), dtype=bool)
        judged = at_threshold(known, self.alarms)
        return {
            "set": entity.set_name,
            "entity": entity.name,
            "detector": self.name,
            "chosen_on": is_chosen_on(entity),
            "vus_pr": vus_pr(known, self.scores) if entity.labelled else None,
            "auc_pr": auc_pr(known, self.scores) if entity.labelled else None,
            "f1": judged.f1 if entity.labelled else None,
            "event_recall": judged.event_recall if entity.labelled else None,
            "false_episodes": judged.false_episodes,
            "alarmed": int((self.alarms & ~known).sum()),
            "quiet": int((~known).sum()),
            "days": len(self.scores) * entity.step_s / DAY_S,
            "cpu_s": self.cpu_s,
            "values": entity.test.size + entity.train.size,
        }


def day_steps(entity: Entity) -> int | None:
    """Steps of a day, if it has any."""
    steps = round(DAY_S / entity.step_s)
    return steps if steps > 1 else None


def ours(entity: Entity) -> Scored:
    """enova's detector, threshold included."""
    began_s = time.process_time()
    model = EnsembleDetector.standard(period_steps=day_steps(entity))
    model.fit(entity.train)
    first = max(0, len(entity.train) - LEAD_STEPS)
    lead = entity.train[first:]
    scores = np.nan_to_num(model.score(np.concatenate((lead, entity.test)), first=first)[len(lead) :])
    threshold = DriftingThreshold(rate=RATE, shift_steps=day_steps(entity) or SHIFT_STEPS)
    threshold.fit(np.log1p(model.held_out))
    alarms = threshold.judge(np.log1p(scores))
    return Scored(name=OURS, entity=entity, scores=scores, alarms=alarms, cpu_s=time.process_time() - began_s)


def ablated(entity: Entity) -> list[Row]:
    """VUS-PR of the ensemble of all members with equal weights, without each of them, and of each alone."""
    members = standard_members(period_steps=day_steps(entity))
    first = max(0, len(entity.train) - LEAD_STEPS)
    lead = entity.train[first:]
    values = np.concatenate((lead, entity.test))
    cpu_s = []
    for member in members:
        began_s = time.process_time()
        member.fit(entity.train)
        member.score(values, first=first)
        cpu_s.append(time.process_time() - began_s)
    whole = EnsembleDetector.of_fitted(members, features=entity.train.shape[1])
    surprises = whole.surprises(values, first=first)
    rows: list[Row] = []

    def told(kind: str, member: str, kept: list[int], cost_s: float) -> None:
        scores = whole.weighed(surprises, [float(index in kept) for index in range(len(members))])[len(lead) :]
        assert entity.labels is not None
        rows.append({
            "set": entity.set_name, "entity": entity.name, "kind": kind, "member": member,
            "chosen_on": is_chosen_on(entity), "vus_pr": vus_pr(entity.labels, np.nan_to_num(scores)), "cpu_s": cost_s,
        })  # fmt: skip

    every = list(range(len(members)))
    told("all", "", every, sum(cpu_s))
    for index, member in enumerate(members):
        told("without", member.name, [each for each in every if each != index], sum(cpu_s) - cpu_s[index])
        told("alone", member.name, [index], cpu_s[index])
    return rows


def sla_vae(run: Benchmark, found: list[Entity]) -> Iterator[Scored]:
    """SLA-VAE as published, without labels, within the budget of a set; of a run before, if nothing has changed."""
    digest = hashlib.sha256(inspect.getsource(published).encode() + str(run.seed).encode())
    digest.update(series_digest(found).encode())
    path = run.out / f"sla_vae-{digest.hexdigest()[:16]}.npz"
    if not path.is_file():
        run.out.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **_sla_vae_scores(run, found))
    yield from read_scored(SLA_VAE, path, found)


def _sla_vae_scores(run: Benchmark, found: list[Entity]) -> dict[str, Any]:
    spent: dict[str, float] = {}
    made: dict[str, Any] = {}
    for entity in found:
        if spent.get(entity.set_name, 0.0) > PEER_BUDGET_S:
            continue
        began_s = time.process_time()
        rows = published.features(
            filled(np.concatenate((entity.train, entity.test))), step_s=entity.step_s, seed=run.seed
        )
        split, stem = len(entity.train), f"{entity.set_name}/{entity.name}"
        model = published.SlaVae(rows.shape[1], single=entity.train.shape[1] == 1, seed=run.seed)
        model.fit(rows[:split])
        made[f"{stem}/test"] = model.score(rows[split:])
        cpu_s = time.process_time() - began_s
        made[f"{stem}/train"] = model.score(rows[:split])
        made[f"{stem}/cpu_s"] = np.array([cpu_s])
        spent[entity.set_name] = spent.get(entity.set_name, 0.0) + cpu_s
    return made


def read_scored(name: str, path: Path, found: list[Entity]) -> Iterator[Scored]:
    """What a detector made of those entities that it ran on, alarms at PEER_QUANTILE of its train scores."""
    with np.load(path) as made:
        for entity in found:
            stem = f"{entity.set_name}/{entity.name}"
            if f"{stem}/test" in made:
                level = float(np.quantile(np.nan_to_num(made[f"{stem}/train"]), PEER_QUANTILE))
                scores = np.nan_to_num(made[f"{stem}/test"])
                yield Scored(
                    name=name, entity=entity, scores=scores, alarms=scores > level,
                    cpu_s=float(made[f"{stem}/cpu_s"][0]),
                )  # fmt: skip


def series_digest(found: list[Entity]) -> str:
    """Of all series: whether scores of a run before still hold."""
    digest = hashlib.sha256()
    for each in found:
        for values in (each.train, each.test):
            digest.update(f"{each.set_name}/{each.name}/{values.shape}".encode() + np.nan_to_num(values).tobytes())
    return digest.hexdigest()


class Peers:
    """The detectors of other packages, by a program in an environment of its own, beside this one."""

    def __init__(self, run: Benchmark, found: list[Entity]) -> None:
        self._found = found
        self._running: subprocess.Popen[bytes] | None = None
        program = ROOT / "tests/tools/score_series.py"
        digest = hashlib.sha256(program.read_bytes() + series_digest(found).encode()).hexdigest()
        self._folder = run.out / f"peers-{digest[:16]}"
        prepared = subprocess.run([ROOT / "tests/tools/setup_detectors", ENVIRONMENT], check=False)
        if prepared.returncode != 0:
            run.notes["baselines"] = "their packages cannot be installed here"
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        series = self._folder / "series.npz"
        arrays: dict[str, Any] = {
            f"{each.set_name}/{each.name}/{part}": filled(values)
            for each in found for part, values in (("train", each.train), ("test", each.test))
        }
        np.savez_compressed(series, **arrays)
        command = [str(ENVIRONMENT / "bin/python"), str(program), str(series), str(self._folder), str(PEER_BUDGET_S)]
        self._running = subprocess.Popen(command, env={**os.environ, **ONE_CORE})

    def scored(self) -> Iterator[Scored]:
        """What they made of it, once they are done."""
        if self._running is not None and self._running.wait() != 0:
            raise subprocess.CalledProcessError(self._running.returncode, "score_series.py")
        for path in sorted(self._folder.glob("*.npz")):
            if path.stem != "series":
                yield from read_scored(path.stem, path, self._found)


def mean_of(rows: list[Row], key: str) -> float | None:
    """Mean over entities, then over sets."""
    means = []
    for set_name in sorted({row["set"] for row in rows}):
        known = [row[key] for row in rows if row["set"] == set_name and row[key] is not None]
        means += [float(np.mean(known))] if known else []
    return float(np.mean(means)) if means else None


def summary(rows: list[Row], name: str) -> dict[str, object]:
    """The figures of one detector."""
    own = [row for row in rows if row["detector"] == name]
    labelled = [row for row in own if row["vus_pr"] is not None]
    days, values = sum(row["days"] for row in own), sum(row["values"] for row in own)
    return {
        "vus_pr_mean": mean_of(own, "vus_pr"),
        "vus_pr": {
            set_name: float(np.mean([row["vus_pr"] for row in labelled if row["set"] == set_name]))
            for set_name in sorted({row["set"] for row in labelled})
        },
        "auc_pr_mean": mean_of(own, "auc_pr"),
        "f1_own_threshold": mean_of(own, "f1"),
        "event_recall": mean_of(own, "event_recall"),
        "false_alarm_episodes_per_day": sum(row["false_episodes"] for row in own) / days if days else None,
        "achieved_rate": sum(row["alarmed"] for row in own) / max(1, sum(row["quiet"] for row in own)),
        "cpu_s_per_million_points": 1e6 * sum(row["cpu_s"] for row in own) / values if values else None,
        "entities": len(own),
    }


def wins(rows: list[Row], name: str, seed: int) -> dict[str, object]:
    """How often, and by how much, enova's VUS-PR is above another's on the same entity."""
    of = {(row["set"], row["entity"], row["detector"]): row["vus_pr"] for row in rows if row["vus_pr"] is not None}
    pairs = [
        (value, of[set_name, entity, name])
        for (set_name, entity, who), value in of.items() if who == OURS and (set_name, entity, name) in of
    ]
    if not pairs:
        return {"share": None, "difference": None, "low95": None, "high95": None, "entities": 0}
    apart = np.array([mine - other for mine, other in pairs])
    low, high = bootstrap(apart, seed=seed)
    return {
        "share": float((apart > 0).mean()), "difference": float(apart.mean()), "low95": low, "high95": high,
        "entities": len(apart),
    }


def members_told(rows: list[Row], seed: int) -> dict[str, Row]:
    """What each member is worth: alone, and to the ensemble of all; whether it helps is said on unseen entities."""
    weights = EnsembleDetector.standard(period_steps=None).weights
    of = {(row["set"], row["entity"], row["kind"], row["member"]): row["vus_pr"] for row in rows}
    told: dict[str, Row] = {}
    for name in dict.fromkeys(row["member"] for row in rows if row["member"]):
        own = [row for row in rows if row["member"] == name]
        unseen = [row for row in own if row["kind"] == "without" and not row["chosen_on"]]
        gains = np.array([of[row["set"], row["entity"], "all", ""] - row["vus_pr"] for row in unseen])
        low, high = bootstrap(gains, seed=seed) if len(gains) else (None, None)
        gain = float(gains.mean()) if len(gains) else None
        told[name] = {
            "weight": weights.get(name, 0.0),
            "alone": mean_of([row for row in own if row["kind"] == "alone"], "vus_pr"),
            "without_it": mean_of([row for row in own if row["kind"] == "without"], "vus_pr"),
            "all": mean_of([row for row in rows if row["kind"] == "all"], "vus_pr"),
            "gain_unseen": gain, "low95": low, "high95": high,
            "cpu_s": sum(row["cpu_s"] for row in own if row["kind"] == "alone"),
            "helps": None if low is None else "yes" if low > 0 else "no" if gain is None or gain <= 0 else "not shown",
        }
    return told


def reproduced(run: Benchmark, rows: list[Row]) -> dict[str, float]:
    """How far the baselines are, at most, from the table of the same entities that lies in the folder."""
    path = run.data / "BASELINES_multivariate.csv"
    if not path.is_file():
        return {}
    of = {(row["set"], row["entity"], row["detector"]): row["vus_pr"] for row in rows if row["vus_pr"] is not None}
    far: dict[str, float] = {}
    for row in read_rows(path):
        name = PUBLISHED.get(row["detector"])
        mine = of.get((row["set"], row["entity"], name))
        if name is not None and mine is not None and row["smoothing_steps"] == "1":
            far[name] = max(far.get(name, 0.0), abs(mine - float(row["vus_pr_w50"])))
    return far


def write_scores(run: Benchmark, scored: list[Scored]) -> None:
    """One row a step, one column a detector."""
    names = list(dict.fromkeys(each.name for each in scored))
    of = {(each.entity.set_name, each.entity.name, each.name): each.scores for each in scored}
    run.out.mkdir(parents=True, exist_ok=True)
    with gzip.open(run.out / "scores.csv.gz", "wt", compresslevel=3, newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "entity", "step", "label", *names])
        for entity in {id(each.entity): each.entity for each in scored}.values():
            columns = [of.get((entity.set_name, entity.name, name)) for name in names]
            for step in range(len(entity.test)):
                label = "" if entity.labels is None else int(entity.labels[step])
                told = ["" if column is None else f"{column[step]:.6g}" for column in columns]
                writer.writerow([entity.set_name, entity.name, step, label, *told])


def settings_hash() -> str:
    """Of the code that was measured, constants included: one setting for all sets."""
    text = "".join(inspect.getsource(module) for module in SETTINGS)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compute_told(figures: dict[str, dict[str, Any]]) -> Row:
    """CPU seconds a million values beside the best of those that learn."""
    known = {name: figures[name] for name in LEARNED if name in figures and figures[name]["vus_pr_mean"] is not None}
    if not known:
        return {"best_learned": None, "ratio": None}
    best = max(known, key=lambda name: float(known[name]["vus_pr_mean"]))
    mine = figures[OURS]["cpu_s_per_million_points"]
    return {"best_learned": best, "ratio": known[best]["cpu_s_per_million_points"] / mine}


def main() -> None:
    """Score all entities, compare, and end in one line."""
    run = benchmark("detector", __doc__)
    found = entities(run)
    if not found:
        run.end({"vus_pr_mean": None})
        return
    peers = Peers(run, found)
    scored = [ours(entity) for entity in found]
    of_members = [row for entity in found if entity.labelled for row in ablated(entity)]
    scored += [*sla_vae(run, found), *peers.scored()]
    rows = [each.row() for each in scored]
    run.write("entities", rows)
    run.write("members", of_members)
    write_scores(run, scored)
    names = list(dict.fromkeys(row["detector"] for row in rows))
    figures = {name: summary(rows, name) for name in names}
    run.table("Detectors on public series", [
        {"detector": name, **{key: value for key, value in figures[name].items() if key != "vus_pr"}} for name in names
    ])  # fmt: skip
    members = members_told(of_members, run.seed)
    run.table("Members of the ensemble", [{"member": name, **told} for name, told in members.items()])
    unseen = [row for row in rows if not row["chosen_on"]]
    others = {name: figures[name] for name in names if name != OURS}
    run.end({
        **figures[OURS],
        "stated_rate": RATE,
        "settings": settings_hash(),
        "compute": compute_told(figures),
        "wins_vs": {name: wins(rows, name, run.seed) for name in others},
        "unseen": {
            "vus_pr_mean": mean_of([row for row in unseen if row["detector"] == OURS], "vus_pr"),
            "wins_vs": {name: wins(unseen, name, run.seed) for name in others},
            "baselines": {
                name: mean_of([row for row in unseen if row["detector"] == name], "vus_pr") for name in others
            },
        },
        "members": members,
        "does_not_help": [name for name, told in members.items() if told["helps"] == "no"],
        "unfinished": {name: f"{figures[name]['entities']} of {len(found)} entities" for name in others
                       if figures[name]["entities"] != len(found)},
        "reproduced_within": reproduced(run, rows),
        "baselines": others,
    })  # fmt: skip


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ONE_CORE.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_CORE})
    main()
