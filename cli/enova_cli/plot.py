"""The Pareto picture of an advice: cost against time between tokens, as SVG or PNG. Needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from enova_cli.picture import new_figure, save

SIZE_INCHES = (8.0, 5.0)


def plot_answer(answer: Mapping[str, Any], path: Path) -> None:
    """Draw an answer of `enova recommend`. Raises FatalError without matplotlib, InvalidField for a bad path."""
    figure = new_figure(*SIZE_INCHES)
    axes = figure.subplots()
    front = _points(answer["pareto"])
    axes.plot([x for x, _, _ in front], [y for _, y, _ in front], "o", color="tab:blue", label="no other is better")
    edge = _edge(front)
    axes.step([x for x, _, _ in edge], [y for _, y, _ in edge], where="post", color="tab:blue", linewidth=1)
    others = _points(answer["runners_up"])
    axes.plot([x for x, _, _ in others], [y for _, y, _ in others], "x", color="tab:gray", label="runners-up")
    chosen = _points([answer["chosen"]] if answer.get("chosen") else [])
    axes.plot([x for x, _, _ in chosen], [y for _, y, _ in chosen], "*", color="tab:red", markersize=16, label="chosen")
    labelled: set[str] = set()
    for x, y, label in [*chosen, *front]:
        if label not in labelled:
            labelled.add(label)
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(6, 6), fontsize=8)
    axes.margins(x=0.12)
    objective = answer["objectives"].get("tpot_s")
    if objective is not None:
        axes.axhline(objective * 1000, linestyle="--", color="tab:orange", label="objective")
    axes.set_xlabel("USD an hour, all replicas")
    axes.set_ylabel("time between tokens, ms")
    axes.set_title(f"{answer['model']} at {answer['requests_per_s']:.3g} requests/s")
    axes.legend()
    save(figure, path)


def _points(candidates: Iterable[Mapping[str, Any]]) -> list[tuple[float, float, str]]:
    """Cost, milliseconds between tokens and name of those that are predicted, cheapest first."""
    return sorted(
        (each["cost_per_hour"], each["prediction"]["tpot_s"]["value"] * 1000, _name(each))
        for each in candidates
        if each.get("prediction") and each["prediction"].get("tpot_s") and "cost_per_hour" in each
    )


def _edge(points: Iterable[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Those of the points, cheapest first, that are quicker than all cheaper ones."""
    kept: list[tuple[float, float, str]] = []
    for point in points:
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def _name(candidate: Mapping[str, Any]) -> str:
    return f"{candidate['replicas']} x {candidate['gpus_per_replica']} {candidate['gpu_type']}"
