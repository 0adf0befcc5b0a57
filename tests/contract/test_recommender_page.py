"""The case that docs/recommender.md computes by hand: each formula gives its value, and the library gives the same."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import numpy as np
import pytest

from enova_recommender import catalog
from enova_recommender.memory import fit, kv_bytes_per_token, usable_bytes
from enova_recommender.performance import KernelTimes, Roofline
from enova_recommender.recommend.capacity_curve import Curve, Looped, curve
from enova_recommender.recommend.capacity_lengths import lengths_of
from enova_recommender.recommend.types import Workload
from enova_recommender.types import Batch

PAGE = (Path(__file__).parents[2] / "docs" / "recommender.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| ([-0-9.e+]+) \|", PAGE, re.MULTILINE)
SHAPE = catalog.models()["meta-llama/Llama-3.1-8B-Instruct"]
GPU = catalog.gpus()["H100"]
CONTEXT = 32 * 576.5
DECODE = Batch(decode_sequences=32, context_tokens=round(CONTEXT))
MIXED = Batch(prefill_tokens=512, prefill_pairs=512 * 513 // 2, decode_sequences=32, context_tokens=round(CONTEXT))


def evaluated() -> dict[str, float]:
    """Every row's formula, from numbers and the rows above it alone."""
    names: dict[str, float] = {}
    for name, formula, _ in ROWS:
        used = {node.id for node in ast.walk(ast.parse(formula)) if isinstance(node, ast.Name)}
        assert used <= {*names, "max"}, f"{name} uses what stands below it"
        names[name] = eval(formula, {"__builtins__": {}, "max": max}, names)
    return names


VALUES = evaluated()


def behaviour() -> Curve:
    lengths = lengths_of(Workload(requests_per_s=50, lengths=((512, 129),)), prefix_caching=True)
    times = Looped(times=Roofline(SHAPE, GPU), spread=0.13)
    grid = np.array([29.0, 31.0, 33.0])
    return curve(times, lengths, np.array([8192.0]), grid, percentile=0.95, arrival_cv=1.0)


@pytest.mark.parametrize(("name", "shown"), [(name, shown) for name, _, shown in ROWS])
def test_each_formula_gives_the_value_that_stands_beside_it(name: str, shown: str) -> None:
    assert float(shown) == pytest.approx(VALUES[name], rel=1e-5)


def test_shape_and_memory_are_the_librarys() -> None:
    memory = fit(SHAPE, GPU, max_num_batched_tokens=8192, max_num_seqs=256)
    assert VALUES["parameters"] == SHAPE.parameters
    assert VALUES["matrices"] == SHAPE.linear_parameters
    assert VALUES["token_bytes"] == kv_bytes_per_token(SHAPE)
    assert VALUES["usable_bytes"] == pytest.approx(usable_bytes(GPU), abs=1)
    for name in ("weight_bytes", "activation_bytes", "graph_bytes", "runtime_bytes"):
        assert VALUES[name] == getattr(memory, name), name
    assert VALUES["cache_tokens"] == pytest.approx(memory.kv_tokens, abs=16), "the library counts whole blocks"


def test_step_times_are_the_plain_rooflines() -> None:
    times = Roofline(SHAPE, GPU)
    assert VALUES["decode_s"] == pytest.approx(times.step_s(DECODE), rel=1e-9)
    assert VALUES["mixed_s"] == pytest.approx(times.step_s(MIXED), rel=1e-9)


def test_rate_and_latency_are_the_closed_forms_within_what_sharing_a_step_makes() -> None:
    found = behaviour()
    assert VALUES["rate"] == pytest.approx(found.rate[0, 1], rel=0.02)
    assert VALUES["tpot_s"] == pytest.approx(found.mean_tpot_s[0, 1], rel=0.02)
    solved = VALUES["rate"]
    left = 31 * (1 - solved * VALUES["added_s"])
    assert left == pytest.approx(solved * (128 * VALUES["decode_s"] + solved * VALUES["added_s"] * VALUES["own_s"]))


def test_first_tokens_are_delayed_as_the_library_delays_them() -> None:
    delay = KernelTimes(SHAPE, GPU).first_token_delay
    assert VALUES["delay_s"] == pytest.approx(delay.after_s(VALUES["decode_s"]), rel=1e-9)
    said = re.search(r"HTTP \(([\d.]+) ms\), and the decode steps\s+that pass meanwhile \(([\d.]+) of them\)", PAGE)
    assert said is not None
    shown = (1e3 * delay.seconds, delay.decode_steps)
    assert [float(text) for text in said.groups()] == pytest.approx(shown, rel=0.01)


def test_bounds_replicas_and_price_are_the_librarys() -> None:
    times = KernelTimes(SHAPE, GPU)
    assert VALUES["kernels_s"] + 0.000508 + VALUES["sequences_s"] == pytest.approx(times.step_s(DECODE), rel=1e-5)
    spread = float(times.spreads(DECODE.decode_sequences, DECODE.context_tokens))
    assert VALUES["error"] == pytest.approx(math.exp(1.2815515594457 * spread), rel=1e-4)
    assert VALUES["replicas"] == math.ceil(50 / VALUES["assured"])
    assert VALUES["cost_per_hour"] == pytest.approx(VALUES["replicas"] * (GPU.price_per_hour or 0))


def test_what_measured_kernels_change_is_what_the_page_says() -> None:
    times = KernelTimes(SHAPE, GPU)
    said = re.search(r"decodes takes ([\d.]+) ms, and the one with a\s+prompt ([\d.]+) ms", PAGE)
    assert said is not None
    shown = (1e3 * times.step_s(DECODE), 1e3 * times.step_s(MIXED))
    assert [float(text) for text in said.groups()] == pytest.approx(shown, rel=0.05)


def test_the_page_has_all_of_the_case() -> None:
    assert len(ROWS) >= 30
    assert {"parameters", "cache_tokens", "decode_s", "rate", "tpot_s", "replicas", "cost_per_hour"} <= set(VALUES)
