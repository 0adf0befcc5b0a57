"""Memory: more of it never fits less, and what is said to fit adds up. Live capacity stays within what was seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from enova_recommender import catalog
from enova_recommender.memory import MemorySettings, cache_layout, fit_settings, gpu_weight_bytes, weight_bytes
from enova_recommender.recommend.live import LiveCapacity, ReplicaFrames, live_capacity
from enova_recommender.types import Parallelism, Precision
from enova_testing.examples import examples

NAMES = ("Llama-3.1-8B-Instruct", "Llama-3.1-70B-Instruct", "Qwen3-30B-A3B", "DeepSeek-V3", "gemma-3-12b-it",
         "Qwen3.5-35B-A3B", "gpt-oss-20b", "NVIDIA-Nemotron-Nano-9B-v2")
MODELS = [shape for name, shape in catalog.models().items() if name.rsplit("/", 1)[-1] in NAMES]
GPUS = list(catalog.gpus().values())
PARALLEL = st.builds(
    Parallelism, tensor=st.sampled_from((1, 2, 4, 8)), pipeline=st.sampled_from((1, 2, 3)),
    data=st.sampled_from((1, 2)), expert=st.booleans(),
)  # fmt: skip
SETTINGS = st.builds(
    MemorySettings, gpu=st.sampled_from(GPUS), parallelism=PARALLEL,
    precision=st.builds(Precision, kv_cache_dtype=st.sampled_from(("auto", "fp8")),
                        quantization=st.sampled_from((None, "awq"))),
    gpu_memory_utilization=st.floats(0.3, 0.97), max_num_batched_tokens=st.integers(512, 16384),
    max_num_seqs=st.integers(1, 1024), max_model_len=st.integers(64, 32768), enable_prefix_caching=st.booleans(),
)  # fmt: skip


@examples()
@given(shape=st.sampled_from(MODELS), asked=SETTINGS)
def test_the_division_adds_up(shape: object, asked: MemorySettings) -> None:
    model = next(one for one in MODELS if one is shape)
    found = fit_settings(model, asked)
    left = found.budget_bytes - found.fixed_bytes
    assert 0 <= left - found.kv_blocks * found.kv_block_bytes < found.kv_block_bytes
    assert found.fits == (found.missing_bytes == 0)
    if found.fits:
        assert found.kv_tokens >= found.max_model_len
        assert found.used_bytes <= found.budget_bytes


@examples()
@given(shape=st.sampled_from(MODELS), asked=SETTINGS, more=st.floats(1.0, 2.0))
def test_more_memory_or_fewer_demands_never_leave_fewer_blocks(
    shape: object, asked: MemorySettings, more: float
) -> None:
    model = next(one for one in MODELS if one is shape)
    blocks = fit_settings(model, asked).kv_blocks
    larger = replace(asked, gpu=replace(asked.gpu, memory_bytes=round(asked.gpu.memory_bytes * more)))
    assert fit_settings(model, larger).kv_blocks >= blocks
    assert fit_settings(model, replace(asked, max_num_batched_tokens=512)).kv_blocks >= blocks
    assert fit_settings(model, replace(asked, max_num_seqs=1)).kv_blocks >= blocks


@examples()
@given(shape=st.sampled_from(MODELS), layout=PARALLEL)
def test_gpus_together_hold_at_least_all_weights(shape: object, layout: Parallelism) -> None:
    model = next(one for one in MODELS if one is shape)
    held = gpu_weight_bytes(model, parallelism=layout)
    assert held * layout.gpus * 1.0001 >= weight_bytes(model) * (0.999 if layout.pipeline == 1 else 0.9)
    assert held <= weight_bytes(model) * 1.001


@examples()
@given(shape=st.sampled_from(MODELS), tokens=st.integers(1, 100_000), extra=st.integers(0, 5000))
def test_longer_sequences_never_hold_fewer_blocks(shape: object, tokens: int, extra: int) -> None:
    model = next(one for one in MODELS if one is shape)
    cache = cache_layout(model, parallelism=Parallelism())
    assert cache.blocks(tokens + extra) >= cache.blocks(tokens) > 0


@st.composite
def recordings(draw: st.DrawFn) -> ReplicaFrames:
    """Frames of any kind, with and without queues."""
    count = draw(st.integers(20, 200))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    level = draw(st.floats(0.5, 20.0))
    waiting = np.maximum(0, np.cumsum(generator.normal(draw(st.floats(-1, 1)), 3, count)).round())
    columns = np.array([generator.poisson(level, count), generator.poisson(10 * level, count), waiting,
                        generator.uniform(1, 10, count)])
    columns[:, generator.random(count) < draw(st.floats(0, 0.3))] = np.nan
    return ReplicaFrames(
        interval_s=1.0, finished=columns[0], running=columns[1], waiting=columns[2], latency_s=columns[3]
    )


@examples()
@given(one=recordings())
def test_rates_lie_within_their_intervals_and_below_what_was_seen(one: ReplicaFrames) -> None:
    found = live_capacity([one])
    if isinstance(found, LiveCapacity):
        for interval in (found.n_limit_rps, found.t_limit_s, found.saturation_load):
            assert 0 <= interval.low <= interval.value <= interval.high
        assert found.n_limit_rps.value <= np.nanmax(one.finished) / one.interval_s
        assert found.saturated_frames <= found.frames
        assert found.max_num_seqs >= 1


@examples()
@given(one=recordings())
def test_unmeasured_frames_after_the_end_change_nothing(one: ReplicaFrames) -> None:
    silence = np.full(50, np.nan)
    longer = ReplicaFrames(
        interval_s=one.interval_s,
        finished=np.concatenate([one.finished, silence]), running=np.concatenate([one.running, silence]),
        waiting=np.concatenate([one.waiting, silence]), latency_s=np.concatenate([one.latency_s, silence]),
    )  # fmt: skip
    before, after = live_capacity([one]), live_capacity([longer])
    assert type(before) is type(after)
    if isinstance(before, LiveCapacity) and before.evidence == "QUEUE":
        assert before == after
