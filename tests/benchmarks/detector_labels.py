"""What a few labelled episodes are worth: VUS-PR and F1 with 0, 1, 2, 5, 10 of them, chosen by doubt or by chance.

Learnt without labels from train, as in `detector`. The first half of test reveals labels: an episode is a labelled
range, and who labels it says that its steps were a true alarm; nothing is said of other steps. The second half is
scored. An entity with fewer episodes gives all it has; those with at least five are reported apart (`of_five`).
SLA-VAE, as published, goes on training from the same episodes in random order; it learns at most SLA_ROWS_MAX rows,
evenly spaced.

Raw results: `labels.csv.gz` (set, entity, detector, order, seed, labels wanted and given, `vus_pr`, `f1` at the
detector's own threshold) and `scores.csv.gz` of the second halves (set, entity, detector, order, labels, step, label,
score; first seed).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.ensemble import EnsembleDetector
from enova_recommender.detection.extremes import DriftingThreshold
from enova_recommender.detection.labels import EpisodeLabel, chance_of_true, marks_of, uncertainty
from enova_recommender.detection.surprise import Surprise
from enova_recommender.detection.taught import TaughtDetector
from enova_testing import sla_vae as published
from enova_testing.benchmark import Benchmark, benchmark, bootstrap
from enova_testing.public_series import Entity, entities, filled, is_chosen_on
from enova_testing.range_scores import at_threshold, ranges, vus_pr

SETS = ("smd", "asd", "ms_cloud_monitoring")
COUNTS = (0, 1, 2, 5, 10)
FULL_COUNT = 5            # labels of the headline
RATE = 1e-3
DAY_S = 86_400.0
SLA_ROWS_MAX = 2000
SLA_EPOCHS_MORE = 5
QUANTILE = 0.999
SEEDS, SEEDS_FULL = 1, 5  # of random order
OURS, SLA_VAE = "enova", "sla_vae"
ACTIVE, RANDOM = "active", "random"
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    """One entity, its test span cut in two."""

    entity: Entity
    cut: int
    episodes: list[Span]      # labelled ranges of the first half

    @property
    def truth(self) -> npt.NDArray[np.bool_]:
        """Labels of the second half."""
        assert self.entity.labels is not None
        return self.entity.labels[self.cut :]


def halves(entity: Entity) -> Halves | None:
    """None if there is nothing to find in the second half."""
    if entity.labels is None:
        return None
    cut = len(entity.test) // 2
    if not entity.labels[cut:].any():
        return None
    return Halves(entity=entity, cut=cut, episodes=ranges(entity.labels[:cut]))


class Ours:
    """enova's detector, taught anew for every choice of labels."""

    def __init__(self, each: Halves) -> None:
        entity = each.entity
        day = round(DAY_S / entity.step_s)
        detector = TaughtDetector(EnsembleDetector.standard(period_steps=day if day > 1 else None))
        detector.fit(entity.train)
        self._each, self._saved = each, detector.save()
        self._first = len(entity.train)
        surprise = Surprise()
        surprise.fit(detector.held_out)
        seen = surprise.of(detector.score(entity.test[: each.cut], first=self._first))
        self.doubts = uncertainty([
            float(chance_of_true(np.nanmax(seen[first : last + 1]), rate=RATE)) for first, last in each.episodes
        ])  # fmt: skip

    def scores(self, spans: Sequence[Span]) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Of the second half, and its alarms, after these labels."""
        detector, entity, cut = TaughtDetector.load(self._saved), self._each.entity, self._each.cut
        labels = [EpisodeLabel(first=first, last=last, true=True) for first, last in spans]
        if labels:
            marks = marks_of(labels, first=0, steps=cut)
            detector.learn(entity.test[:cut], marks, first=self._first)
        scores = np.nan_to_num(detector.score(entity.test, first=self._first)[cut:])
        threshold = DriftingThreshold(rate=RATE)
        threshold.fit(detector.held_out)
        return scores, threshold.judge(scores)


class Published:
    """SLA-VAE, trained on from where it stands without labels."""

    def __init__(self, each: Halves, seed: int) -> None:
        entity = each.entity
        together = filled(np.concatenate((entity.train, entity.test)))
        rows = published.features(together, step_s=entity.step_s, seed=seed)
        train = rows[: len(entity.train)]
        self._train = train[np.linspace(0, len(train) - 1, min(len(train), SLA_ROWS_MAX)).round().astype(int)]
        self._test, self._cut = rows[len(entity.train) :], each.cut
        self._model = published.SlaVae(rows.shape[1], single=entity.train.shape[1] == 1, seed=seed)
        self._model.fit(self._train)

    def scores(self, spans: Sequence[Span]) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Of the second half, and its alarms, after these labels."""
        model = self._model.copy()
        if spans:
            marked = np.concatenate([self._test[first : last + 1] for first, last in spans])
            rows = np.concatenate((self._train, marked))
            model.fit(rows, np.arange(len(rows)) >= len(self._train), epochs=SLA_EPOCHS_MORE)
        scores = np.nan_to_num(model.score(self._test[self._cut :]))
        return scores, scores > float(np.quantile(np.nan_to_num(model.score(self._train)), QUANTILE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one detector made of the second half after some labels."""

    row: Row
    scores: Floats
    truth: npt.NDArray[np.bool_]


def outcomes(run: Benchmark, each: Halves) -> Iterator[Outcome]:
    """All choices of labels of one entity."""
    entity, count = each.entity, len(each.episodes)

    mine, other = Ours(each), Published(each, run.seed)
    by_doubt = np.argsort(-mine.doubts, kind="stable").tolist()
    made: dict[tuple[str, frozenset[int]], tuple[Floats, npt.NDArray[np.bool_]]] = {}

    def of(name: str, picks: list[int]) -> tuple[Floats, npt.NDArray[np.bool_]]:
        key = (name, frozenset(picks))
        if key not in made:
            spans = [each.episodes[index] for index in sorted(picks)]
            made[key] = mine.scores(spans) if name == OURS else other.scores(spans)
        return made[key]

    def told(name: str, order: str, wanted: int, picks: list[int], *, seed: int = run.seed) -> Outcome:
        scores, alarms = of(name, picks)
        row = {
            "set": entity.set_name, "entity": entity.name, "detector": name, "order": order, "seed": seed,
            "wanted": wanted, "given": len(picks), "episodes": count, "chosen_on": is_chosen_on(entity),
            "vus_pr": vus_pr(each.truth, scores), "f1": at_threshold(each.truth, alarms).f1,
        }  # fmt: skip
        return Outcome(row=row, scores=scores, truth=each.truth)

    for wanted in COUNTS:
        yield told(OURS, ACTIVE, wanted, by_doubt[:wanted])
        for seed in range(run.seed, run.seed + (SEEDS_FULL if run.full else SEEDS)):
            by_chance = np.random.default_rng(seed).permutation(count).tolist()[:wanted]
            yield told(OURS, RANDOM, wanted, by_chance, seed=seed)
            if seed == run.seed:
                yield told(SLA_VAE, RANDOM, wanted, by_chance)


def mean_at(rows: list[Row], name: str, order: str, key: str) -> list[float | None]:
    """Mean over seeds, entities, then sets, for each count of labels."""
    means: list[float | None] = []
    for wanted in COUNTS:
        own = [row for row in rows if (row["detector"], row["order"], row["wanted"]) == (name, order, wanted)]
        of_sets = [
            float(np.mean([row[key] for row in own if row["set"] == set_name]))
            for set_name in sorted({row["set"] for row in own})
        ]
        means.append(float(np.mean(of_sets)) if of_sets else None)
    return means


def gain(rows: list[Row], name: str, order: str, seed: int) -> Row:
    """What FULL_COUNT labels add to none, entity by entity, then by set; its interval over entities."""
    of: dict[tuple[str, str, int], list[float]] = {}
    for row in rows:
        if (row["detector"], row["order"]) == (name, order):
            of.setdefault((row["set"], row["entity"], row["wanted"]), []).append(row["vus_pr"])
    gains = {
        (set_name, entity): float(np.mean(of[set_name, entity, FULL_COUNT]) - np.mean(of[set_name, entity, 0]))
        for set_name, entity, wanted in of if wanted == 0
    }  # fmt: skip
    if not gains:
        return {"mean": None, "low95": None, "high95": None, "by_set": {}, "entities": 0}
    by_set = {
        set_name: float(np.mean([value for (own, _), value in gains.items() if own == set_name]))
        for set_name in sorted({set_name for set_name, _ in gains})
    }
    low, high = bootstrap(np.array(list(gains.values())), seed=seed)
    return {"mean": float(np.mean(list(by_set.values()))), "low95": low, "high95": high, "by_set": by_set,
            "entities": len(gains)}  # fmt: skip


def main() -> None:
    """Teach, score, and end in one line."""
    run = benchmark("detector_labels", __doc__)
    found = [each for each in map(halves, entities(run)) if each is not None and each.entity.set_name in SETS]
    if not found:
        run.end({"vus_pr_at": None})
        return
    rows: list[Row] = []
    scores: list[Row] = []
    for each in found:
        for outcome in outcomes(run, each):
            rows.append(outcome.row)
            if outcome.row["seed"] == run.seed:
                kept = {key: outcome.row[key] for key in ("set", "entity", "detector", "order", "wanted")}
                scores += [
                    {**kept, "step": each.cut + step, "label": int(outcome.truth[step]), "score": f"{score:.6g}"}
                    for step, score in enumerate(outcome.scores.tolist())
                ]  # fmt: skip
    run.write("labels", rows)
    run.write("scores", scores)
    active, chance = (mean_at(rows, OURS, order, "vus_pr") for order in (ACTIVE, RANDOM))
    theirs = mean_at(rows, SLA_VAE, RANDOM, "vus_pr")
    run.table("VUS-PR of the second half after so many labels", [
        {"detector": name, **{str(count): value for count, value in zip(COUNTS, values, strict=True)}}
        for name, values in ((f"{OURS} {ACTIVE}", active), (f"{OURS} {RANDOM}", chance), (SLA_VAE, theirs))
    ])  # fmt: skip
    at_five = COUNTS.index(FULL_COUNT)
    enough = [row for row in rows if row["episodes"] >= FULL_COUNT]
    run.end({
        "vus_pr_at": active,
        "gain_at_5": gain(rows, OURS, ACTIVE, run.seed)["mean"],
        "gain": gain(rows, OURS, ACTIVE, run.seed),
        "active_minus_random_at_5": (active[at_five] or 0.0) - (chance[at_five] or 0.0),
        "labels": list(COUNTS),
        "f1_at": mean_at(rows, OURS, ACTIVE, "f1"),
        "random": {"vus_pr_at": chance, "f1_at": mean_at(rows, OURS, RANDOM, "f1")},
        "of_five": {OURS: gain(enough, OURS, ACTIVE, run.seed), SLA_VAE: gain(enough, SLA_VAE, RANDOM, run.seed)},
        "unseen": gain([row for row in rows if not row["chosen_on"]], OURS, ACTIVE, run.seed),
        "baselines": {
            SLA_VAE: {
                "vus_pr_at": theirs, "f1_at": mean_at(rows, SLA_VAE, RANDOM, "f1"),
                "gain_at_5": gain(rows, SLA_VAE, RANDOM, run.seed)["mean"],
                "gain": gain(rows, SLA_VAE, RANDOM, run.seed),
            },
        },
        "entities": len(found),
    })  # fmt: skip


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ONE_CORE.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_CORE})
    main()
