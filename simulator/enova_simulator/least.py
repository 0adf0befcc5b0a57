"""The least that a trace could be served for: by a fluid fleet that knows the future, at the predicted capacity.

`recommender.scaling.lower_bound` over what arrives after the warm-up, for the variant that is cheapest by what it
carries. With one variant replicas are whole; with several a mix could be cheaper than each by itself, so the relaxed
programme is told, in which replicas may be divided. It bounds policies from below as far as a replica carries what the
recommender predicts of it: where it carries more, a policy may need less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from enova_recommender.scaling.lower_bound import Floats, Infeasible, Programme, lower_bound, work_by_step

GRID_S = 10.0
STEPS_MAX = 240                    # a longer trace has longer steps: a looser bound in the same time
TIME_LIMIT_S = 10.0

Plain = Mapping[str, Any]          # Any: JSON


def least(
    arrival_s: Floats, answer: Plain, *, start_up_s: float, min_replicas: int, max_replicas: int | None
) -> dict[str, object] | None:
    """Beside an answer of `what_if`: cost, GPU-hours and replicas over time; None where nothing bounds them.

    That is where no first token is promised, or no fleet within the bounds holds the promise.
    """
    first = answer["variants"][0]
    within_s = answer["objectives"]["ttft_s"]
    begin_s, end_s = float(answer["policies"][0]["warm_up_s"]), float(answer["span_s"])
    whole = len(answer["variants"]) == 1
    if within_s is None or end_s <= begin_s:
        return None
    span_s = end_s - begin_s
    steps = min(STEPS_MAX, math.ceil(span_s / GRID_S))
    step_s = span_s / steps            # whole steps: replicas are paid for no longer than policies pay
    try:
        found = lower_bound(Programme(
            work=work_by_step(arrival_s - begin_s, horizon_s=span_s, step_s=step_s)[:steps], step_s=step_s,
            capacity=first["capacity_rps"]["value"], start_s=start_up_s, within_s=within_s,
            attainment=answer["objectives"]["attainment"], time_limit_s=TIME_LIMIT_S,
            min_replicas=min_replicas if whole else 0, max_replicas=max_replicas if whole else None,
        ))  # fmt: skip
    except Infeasible:
        return None
    hours = found.hours if whole else found.relaxed_hours
    return {
        "gpu_type": first["gpu_type"], "cost_usd": hours * first["usd_per_hour"], "gpu_hours": hours * first["gpus"],
        "whole_replicas": whole, "proven": found.proven, "begin_s": begin_s, "step_s": step_s,
        "replicas": np.asarray(found.running).astype(int).tolist(),
    }  # fmt: skip
