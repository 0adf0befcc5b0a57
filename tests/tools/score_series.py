"""Detectors that others wrote or that anybody would try first, on the series of one benchmark run.

    python score_series.py SERIES.npz FOLDER BUDGET_S

Runs in an environment of its own (see `setup_detectors`), without enova. SERIES holds `ENTITY/train` and `ENTITY/test`
(steps by features, no gaps). FOLDER gets a file a detector, with `ENTITY/train`, `.../test` and `.../cpu_s` (CPU
seconds of fit and of scoring test, imports left out); a detector whose file is there is not run again. A detector that
spent BUDGET_S on one set is not run on the rest of the set.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[Any]]
Score = Callable[[Floats], Floats]


def scaled(train: Floats, test: Floats) -> tuple[Floats, Floats]:
    """Features between 0 and 1 on train, bounded on test."""
    low, high = train.min(axis=0), train.max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    return np.clip((train - low) / span, -4, 5), np.clip((test - low) / span, -4, 5)


def moving_zscore(values: Floats) -> Floats:
    """Mean of the three largest z-scores against exponentially weighted mean and variance (weight 0.05)."""
    mean, variance, out = values[0].copy(), np.full(values.shape[1], 1e-4), np.zeros(len(values))
    for step, now in enumerate(values):
        away = now - mean
        z = np.minimum(np.abs(away) / np.sqrt(variance + 1e-6), 50.0)
        out[step] = np.sort(z)[-3:].mean()
        mean += 0.05 * away
        variance = 0.95 * (variance + 0.05 * away * away)
    return out


def fitted_pca(train: Floats) -> Score:
    """Norm of the residual of ten principal components."""
    mean = train.mean(axis=0)
    directions = np.linalg.svd(train - mean, full_matrices=False)[2][:10]
    if directions.shape[0] >= train.shape[1]:
        directions = directions[:0]  # as many directions as features leave nothing

    def score(values: Floats) -> Floats:
        away = values - mean
        return np.asarray(np.linalg.norm(away - away @ directions.T @ directions, axis=1))

    return score


def fitted_knn(train: Floats) -> Score:
    """Mean distance to five neighbours among 4,000 seeded train rows."""
    from sklearn.neighbors import NearestNeighbors

    rows = np.random.default_rng(0).choice(len(train), min(4000, len(train)), replace=False)
    model = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(train[rows])
    return lambda values: model.kneighbors(values)[0].mean(axis=1)


def fitted_iforest(train: Floats) -> Score:
    """scikit-learn's isolation forest at its defaults."""
    from sklearn.ensemble import IsolationForest

    model = IsolationForest(random_state=0).fit(train)
    return lambda values: -model.score_samples(values)


def fitted_autoencoder(train: Floats) -> Score:
    """scikit-learn's MLPRegressor (16, 6, 16) on every second train row; norm of the residual."""
    from sklearn.neural_network import MLPRegressor

    rows = train[::2]
    model = MLPRegressor(hidden_layer_sizes=(16, 6, 16), max_iter=60, early_stopping=True, random_state=0)
    model.fit(rows, rows if rows.shape[1] > 1 else rows[:, 0])
    return lambda values: np.linalg.norm(values - model.predict(values).reshape(values.shape), axis=1)


def fitted_pyod(name: str) -> Callable[[Floats], Score]:
    """One of PyOD's detectors at its defaults, on the features that vary in train."""

    def fitted(train: Floats) -> Score:
        from importlib import import_module

        varying = train.std(axis=0) > 0
        if not varying.any():
            return lambda values: np.abs(values - train[0]).sum(axis=1)
        model = getattr(import_module(f"pyod.models.{name.lower()}"), name)()
        model.fit(train[:, varying])
        return lambda values: np.nan_to_num(model.decision_function(values[:, varying]))

    return fitted


def fitted_half_space_trees(train: Floats) -> Score:
    """River's half-space trees, learning on as they score."""
    from river.anomaly import HalfSpaceTrees

    model = HalfSpaceTrees(n_trees=25, seed=0)

    def score(values: Floats) -> Floats:
        out = np.zeros(len(values))
        for step, row in enumerate(values):
            named = dict(enumerate(row.tolist()))
            out[step] = model.score_one(named)
            model.learn_one(named)
        return out

    for row in train:
        model.learn_one(dict(enumerate(row.tolist())))
    return score


def fitted_matrix_profile(train: Floats) -> Score:
    """STUMPY's left matrix profile of each step's window of 50 against train, mean over the features."""
    import stumpy

    width = min(50, len(train) // 4)

    def score(values: Floats) -> Floats:
        total = np.zeros(len(values))
        for column in range(values.shape[1]):
            past = np.concatenate((train[-width + 1 :, column], values[:, column]))
            if past.std() == 0 or train[:, column].std() == 0:
                continue
            distances = stumpy.stump(past, width, train[:, column], ignore_trivial=False)[:, 0].astype(float)
            total += np.nan_to_num(distances, posinf=2 * np.sqrt(width))
        return np.asarray(total / values.shape[1])

    return score


DETECTORS: dict[str, Callable[[Floats], Score]] = {
    "random": lambda _: lambda values: np.random.default_rng(len(values)).random(len(values)),
    "zscore": lambda _: moving_zscore,
    "pca": fitted_pca,
    "knn": fitted_knn,
    "iforest": fitted_iforest,
    "autoencoder": fitted_autoencoder,
    "pyod_ecod": fitted_pyod("ECOD"),
    "pyod_copod": fitted_pyod("COPOD"),
    "pyod_hbos": fitted_pyod("HBOS"),
    "river_half_space_trees": fitted_half_space_trees,
    "stumpy_matrix_profile": fitted_matrix_profile,
}


def run_detector(name: str, data: Any, budget_s: float) -> dict[str, Any]:
    """What one detector makes of all entities."""
    fitted = DETECTORS[name]
    found: dict[str, Any] = {}
    spent: dict[str, float] = {}
    small = np.random.default_rng(0).random((64, 3))
    fitted(small)(small)  # what it imports and compiles is not its cost
    for entity in sorted(key.removesuffix("/train") for key in data if key.endswith("/train")):
        set_name = entity.partition("/")[0]
        if spent.get(set_name, 0.0) > budget_s:
            continue
        train, test = scaled(data[f"{entity}/train"], data[f"{entity}/test"])
        began_s = time.process_time()
        score = fitted(train)
        of_test = score(test)
        cpu_s = time.process_time() - began_s
        spent[set_name] = spent.get(set_name, 0.0) + cpu_s
        found[f"{entity}/test"] = of_test
        found[f"{entity}/train"] = score(train[-min(len(train), 4000) :])
        found[f"{entity}/cpu_s"] = np.array([cpu_s])
    print(f"{name}: {sum(spent.values()):.1f} CPU-seconds", file=sys.stderr, flush=True)
    return found


def main(series: str, folder: str, budget_s: float) -> None:
    """Run all detectors on all entities."""
    warnings.simplefilter("ignore")
    data = np.load(series)
    for name in DETECTORS:
        path = Path(folder) / f"{name}.npz"
        if not path.is_file():
            part = path.with_suffix(".part.npz")
            np.savez_compressed(part, **run_detector(name, data, budget_s))
            part.rename(path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
