"""The picture of a simulation over time: demand and capacity, replicas, time to first token. Needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enova_cli.picture import new_figure, save

SIZE_INCHES = (9.0, 8.0)
POLICIES_MAX = 8               # drawn: the cheapest of those that hold first


def plot_simulation(answer: Mapping[str, Any], path: Path) -> None:
    """Draw an answer of `enova simulate`. Raises FatalError without matplotlib, InvalidField for a bad path."""
    figure = new_figure(*SIZE_INCHES)
    load, replicas, waits = figure.subplots(3, 1, sharex=True)
    minutes = answer["step_s"] / 60
    arrived = [count / answer["step_s"] for count in answer["arrived"]]
    load.plot([place * minutes for place in range(len(arrived))], arrived, color="black", label="demand")
    rate = answer["variants"][0]["capacity_rps"]["value"]
    for row in sorted(answer["policies"], key=lambda each: (not each["holds"], each["cost_usd"]))[:POLICIES_MAX]:
        times = [place * minutes for place in range(len(row["ready"]))]
        name = f"{row['policy']} ({row['cost_usd']:.2f} USD)"
        load.step(times, [rate * count for count in row["ready"]], where="post", linewidth=1, label=name)
        replicas.step(times, row["replicas"], where="post", label=name)
        waits.plot(times, [value if value is not None else float("nan") for value in row["ttft_p50_by_step_s"]])
    least = answer["least"]
    if least is not None and least["whole_replicas"]:
        times = [(least["begin_s"] + place * least["step_s"]) / 60 for place in range(len(least["replicas"]))]
        name = f"least, knowing the future ({least['cost_usd']:.2f} USD)"
        replicas.step(times, least["replicas"], where="post", color="black", linestyle="--", linewidth=1, label=name)
        replicas.legend(fontsize=8)
    objective = answer["objectives"]["ttft_s"]
    if objective is not None:
        waits.axhline(objective, linestyle="--", color="tab:orange", label="objective")
        waits.legend()
    load.set_ylabel("requests/s, and predicted capacity")
    replicas.set_ylabel("replicas holding GPUs")
    waits.set_ylabel("median TTFT, s")
    waits.set_yscale("log")
    waits.set_xlabel("minutes")
    load.set_title(f"{answer['deployment']}: {answer['requests']:,} requests")
    load.legend(fontsize=8)
    save(figure, path)
