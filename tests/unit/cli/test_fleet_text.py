"""What the command line says of a fleet's allocation and of live capacity: nothing that lacks goes unsaid."""

from __future__ import annotations

from typing import Any

from enova.v1 import deployment_service_pb2 as wire
from enova_cli.commands.fleet import sentences, unmet_words
from enova_cli.live_text import live_line
from enova_cli.plain import to_plain


def interval(value: float) -> wire.PredictedInterval:
    return wire.PredictedInterval(value=value, low=0.9 * value, high=1.1 * value)


def answer(**fields: Any) -> dict[str, Any]:
    deployment = wire.AllocatedDeployment(
        name="deployments/chat", grounds="4 requests/s that were counted", demand_rps=4, carried_rps=3,
        classes=[
            wire.AllocatedClass(name="a", demand_rps=3, carried_rps=3),
            wire.AllocatedClass(name="b", demand_rps=1, carried_rps=0),
        ],
        unmet=wire.UnmetDemand(requests_per_s=1, replicas=2, obstacle=wire.OBSTACLE_MAX_GPUS, reason="4 are allowed"),
    )  # fmt: skip
    given: dict[str, Any] = {
        "deployments": [deployment], "demand_rps": 4, "carried_rps": 3, "cost_per_hour": 5.98,
        "objective_per_hour": 6.1, "bound_per_hour": 6.0, "gap": 0.0164, "time_limit_s": 10, "solve_s": 0.5,
        "missing": [wire.GpusMissing(gpu_type="H100", count=2, cost_per_hour=5.98)],
        "left_out": [wire.LeftOut(object="nodes/n1", reason="is LOST")], "capacity_basis": "a bound", "headroom": 0.2,
    }  # fmt: skip
    return to_plain(wire.RecommendAllocationResponse(**given | fields))


def test_what_is_carried_costs_lacks_and_is_left_out_is_said() -> None:
    told = "\n".join(sentences(answer()))
    for words in (
        "3 of 4 requests/s are carried for $5.98/h", "below $6.00/h (gap 1.6%)", "may not be the most", "0.5 s of 10 s",
        "a bound, and demand with 20% of headroom", "chat: 4 requests/s that were counted",
        "class b: 0 of 1 requests/s",
        "It lacks 1 requests/s and 2 of its least replicas (MAX_GPUS): 4 are allowed.",
        "Missing for all of it: 2 H100, $5.98/h.", "Left out: n1: is LOST.",
    ):  # fmt: skip
        assert words in told, words


def test_a_proven_answer_is_called_so() -> None:
    assert "is proven to be the most" in "\n".join(sentences(answer(carried_proven=True)))


def test_headroom_that_lacks_is_no_demand_that_lacks() -> None:
    unmet = to_plain(wire.UnmetDemand(headroom_rps=0.5, obstacle=wire.OBSTACLE_GPUS, reason="none is left"))
    assert unmet_words(unmet) == "It lacks 0.5 requests/s of headroom (GPUS): none is left."


def test_live_capacity_is_one_line_with_its_intervals_and_its_cache() -> None:
    found = wire.LiveCapacity(
        n_limit_rps=interval(4), t_limit_s=interval(8), saturation_load=interval(32), max_num_seqs=32, frames=300,
        saturated_frames=200, evidence=wire.SATURATION_EVIDENCE_QUEUE, configured_max_num_seqs=256,
        memory=wire.LiveMemory(sequences=32, cache_bytes=5 << 30, configured_cache_bytes=50 << 30),
    )  # fmt: skip
    line = live_line(to_plain(found))
    assert "n_limit 4 (3.6 to 4.4) requests/s" in line
    assert "(QUEUE, 200 of 300 intervals)" in line
    assert "32 by Little's law where 256 is set" in line
    assert "takes 5120 MiB of 51200 on each GPU" in line


def test_a_doubt_is_told_with_its_reason() -> None:
    found = wire.LiveCapacity(reason="finished still follows the load", at_least_rps=2.5)
    assert live_line(to_plain(found)) == "live capacity is not known: finished still follows the load"


def test_an_unknown_cache_says_why() -> None:
    found = wire.LiveCapacity(
        n_limit_rps=interval(4), t_limit_s=interval(8), saturation_load=interval(32), memory_reason="no lengths yet"
    )
    assert "its cache is not known: no lengths yet" in live_line(to_plain(found))
