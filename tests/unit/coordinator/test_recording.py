"""What is recorded of a question to a policy is read back without a bit lost, most of its history told once."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest

from enova_common.errors import Corrupt
from enova_coordinator.core.recording import TAIL_MINUTES, Recorded, read_lines
from enova_recommender.scaling.enova import EnovaPolicy
from enova_recommender.scaling.situation import Demand, Memory, ReplicaSight, Signal, Situation
from enova_recommender.scaling.types import (
    EngineSizes,
    Feature,
    GpuFacts,
    ModelFacts,
    Observation,
    ReplicaSeries,
    Series,
)
from enova_testing.recordings import lines_of
from enova_testing.situations import asked, replicas, situation

MINUTES = Observation(
    now_s=9_990.5,
    replicas=2,
    series=(
        ReplicaSeries(
            replica="r0", series={Feature.PENDING: Series(start_s=1.0, step_s=60.0, values=(0.1, math.nan, 3.0))}
        ),
    ),
    configuration=EngineSizes(tensor_parallel_size=1, gpu_memory_utilization=0.9, max_num_seqs=256),
    model=ModelFacts(
        framework="llama", size_billion=7.0, parameters=6_607_000_000, kv_elements_per_token=262144, attention_heads=32,
        context_tokens=4096,
    ),
    gpu=GpuFacts(count=8, memory_bytes=24 << 30),
)  # fmt: skip


def history(minutes: int, *, end_s: float = 9_960.0) -> Demand:
    draws = np.random.default_rng(7).gamma(3.0, 2.0, size=(4, minutes))
    draws[:, ::17] = np.nan
    arrived, finished, prompts, outputs = draws
    return Demand(
        end_s=end_s, step_s=60.0, arrived=arrived, finished=finished, prompt_tokens=prompts, output_tokens=outputs
    )


def question(told: Situation, *, memory: Memory | None = None, uid: str = "u") -> Recorded:
    memory = {"a": 1.0, "b": "x", "c": (1.5, 1e-9), "d": ()} if memory is None else memory
    wish = EnovaPolicy().decide(told, {}).wish
    return Recorded(uid=uid, policy="enova", situation=told, memory=memory, wish=wish)


def rich(history_minutes: int = 90, **given: Any) -> Situation:
    """A situation that has something of everything."""
    sights: tuple[ReplicaSight, ...] = (*replicas(2), *replicas(0, starting=1, first=2, since_s=9_900.25))
    values: dict[str, Any] = {
        "sights": sights,
        "measures": {Signal.RUNNING: [3.0, ((100, 1 / 3), (20, None), (5, 7.0))], Signal.WAITING: 0.1},
        "demand": asked(((300, 4.0), (60, 9.0)), end_s=10_000.0),
        "history": history(history_minutes),
        "minutes": MINUTES,
    }
    return situation(**(values | given))


def same(one: object, other: object) -> bool:
    """Equal to the bit, NaN equal to NaN."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
    if is_dataclass(one) and not isinstance(one, type):
        return type(one) is type(other) and all(
            same(getattr(one, item.name), getattr(other, item.name)) for item in fields(one)
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize(
    "told",
    [rich(), rich(0), rich(history=asked(None, end_s=0.0, steps=0, step_s=60.0)), rich(last_act_s=12.5),
     rich(minutes=None, held=3), rich(variants=())],
    ids=["full", "no history", "empty history", "acted", "no minutes", "no variant"],
)  # fmt: skip
def test_what_was_recorded_is_read_back_to_the_bit(told: Situation) -> None:
    one = question(told)
    (found,) = read_lines(lines_of([one]))
    assert same(found, one)
    assert same(EnovaPolicy().decide(found.situation, {}), EnovaPolicy().decide(told, {}))


def test_a_history_that_goes_on_is_told_once_and_anew_after_an_hour() -> None:
    whole = history(300)

    def until(count: int, first: int = 0) -> Recorded:
        series = ("arrived", "finished", "prompt_tokens", "output_tokens")
        part = {name: getattr(whole, name)[first:count] for name in series}
        return question(rich(history=replace(whole, end_s=60.0 * count, **part)))

    hour = [until(count) for count in range(100, 100 + TAIL_MINUTES + 1)]
    aged = [until(170, first=20)]              # what is too old has gone at its front
    lines = lines_of([*hour, *aged, until(290)])
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds.count("History") == 3
    assert [place for place, kind in enumerate(kinds) if kind == "History"] == [0, TAIL_MINUTES + 2, TAIL_MINUTES + 4]
    assert all(map(same, read_lines(lines), (*hour, *aged, until(290))))


def test_a_history_that_is_another_one_is_told_anew() -> None:
    first = question(rich())
    changed = replace(first.situation.history, arrived=first.situation.history.arrived + 1.0)
    other = question(rich(history=changed))
    lines = lines_of([first, other, first])
    assert [json.loads(line)["kind"] for line in lines].count("History") == 3
    assert all(map(same, read_lines(lines), (first, other, first)))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda line: line[:-20], "line 2"),
        (lambda line: line.replace('"version":1', '"version":2'), "version 2"),
        (lambda line: line.replace('"kind":"Situation"', '"kind":"Other"'), "unknown kind"),
        (lambda line: line.replace('"now_s":10000.0', '"now_s":true'), "is not"),
        (lambda line: line.replace('"held":0', '"hold":0'), "unknown field 'hold'"),
        (lambda line: line.replace('"f8":"', '"f8":"!'), "line 2"),
        (lambda line: line.replace('"history":{"id":1', '"history":{"id":9'), "line 2"),
        (lambda _: "[]", "line 2"),
    ],
    ids=["cut off", "newer", "kind", "type", "field", "bytes", "no history", "no object"],
)
def test_a_line_that_cannot_be_read_is_named(change: Any, what: str) -> None:
    lines = lines_of([question(rich())])
    damaged = change(lines[1])
    assert damaged != lines[1]
    with pytest.raises(Corrupt, match=what) as caught:
        list(read_lines([lines[0], damaged]))
    assert caught.value.reason == "RECORDING_UNREADABLE"
