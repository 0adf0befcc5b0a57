"""The least that a trace could be served for: worked by hand, and silent where it would lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from enova_simulator.least import STEPS_MAX, least


def answer(
    *, ttft_s: float | None = 10.0, variants: int = 1, span_s: float = 400.0, warm_up_s: float = 100.0, usd: float = 3.6
) -> dict[str, Any]:
    one = {"gpu_type": "H100", "gpus": 2, "usd_per_hour": usd, "capacity_rps": {"value": 10.0}}
    return {
        "variants": [one] * variants, "objectives": {"ttft_s": ttft_s, "attainment": 1.0}, "span_s": span_s,
        "policies": [{"warm_up_s": warm_up_s}],
    }  # fmt: skip


def arrivals(rate: float, begin_s: float, end_s: float) -> list[float]:
    return list(np.arange(begin_s, end_s, 1.0 / rate))


def bound(at_s: list[float], told: dict[str, Any], **given: Any) -> dict[str, Any] | None:
    asked: dict[str, Any] = {"start_up_s": 60.0, "min_replicas": 0, "max_replicas": None} | given
    return least(np.array(sorted(at_s)), told, **asked)


def test_it_is_what_the_load_needs_step_by_step_after_the_warm_up() -> None:
    # 30/s for 200 s keep 3 replicas busy, then 10/s for 100 s keep 1; what came in the warm-up is not judged.
    at_s = [*arrivals(90.0, 0.0, 100.0), *arrivals(30.0, 100.0, 300.0), *arrivals(10.0, 300.0, 400.0)]
    found = bound(at_s, answer())
    assert found is not None
    assert (found["begin_s"], found["step_s"], found["proven"]) == (100.0, 10.0, True)
    # What comes in the last step may be served after the end: 10 replica-seconds less.
    assert found["cost_usd"] == pytest.approx((3 * 200 + 100 - 10) / 3600 * 3.6, rel=0.005)
    assert found["gpu_hours"] == pytest.approx(2 * found["cost_usd"] / 3.6)
    assert found["replicas"][5:15] == [3] * 10
    assert found["replicas"][22:28] == [1] * 6


def test_the_bounds_of_the_deployment_hold_for_it_too() -> None:
    at_s = arrivals(10.0, 0.0, 400.0)
    one, two = bound(at_s, answer()), bound(at_s, answer(), min_replicas=2)
    assert one is not None
    assert two is not None
    assert two["cost_usd"] == pytest.approx(2 * one["cost_usd"], rel=0.05)
    assert bound(arrivals(25.0, 0.0, 400.0), answer(), max_replicas=1) is None, "no such fleet holds the promise"


def test_with_several_variants_replicas_may_be_divided() -> None:
    at_s = arrivals(5.0, 0.0, 400.0)
    found = bound(at_s, answer(variants=2))
    assert found is not None
    assert not found["whole_replicas"]
    assert found["cost_usd"] == pytest.approx(0.5 * 300 / 3600 * 3.6, rel=0.1)


def test_a_long_trace_has_longer_steps_and_no_promise_no_bound() -> None:
    day = bound(arrivals(0.1, 0.0, 86_400.0), answer(span_s=86_400.0))
    assert day is not None
    assert len(day["replicas"]) <= STEPS_MAX
    assert bound([1.0], answer(ttft_s=None)) is None
    assert bound([1.0], answer(span_s=50.0)) is None
