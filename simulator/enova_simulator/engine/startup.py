"""The phases of a start with their log lines and durations, so that an agent can tell them apart and see progress."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from enova_simulator.engine.model import GIB, Served

# Assumptions of ours: one NVMe drive, and what compiling and capturing take on current hosts.
LOAD_BYTES_PER_S = 2.5e9
IMPORT_S = 8.0
PROFILE_S = 3.0
COMPILE_S = 20.0
CAPTURE_S = 10.0
SHARD_BYTES = 5e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the start: it lasts, then its line is logged."""

    duration_s: float
    line: str


def phases(served: Served, *, eager: bool, total_s: float | None) -> list[Phase]:
    """The whole start; with `total_s` stretched or squeezed to last so long."""
    plan = list(_phases(served, eager=eager))
    if total_s is None:
        return plan
    factor = total_s / sum(phase.duration_s for phase in plan)
    return [Phase(duration_s=phase.duration_s * factor, line=phase.line) for phase in plan]


def _phases(served: Served, *, eager: bool) -> Iterator[Phase]:
    name = served.shape.name
    yield Phase(duration_s=IMPORT_S, line=f"Starting to load model {name}...")
    load_s = max(0.5, served.weight_bytes / LOAD_BYTES_PER_S)
    shards = max(1, round(served.weight_bytes / SHARD_BYTES))
    for shard in range(1, shards + 1):
        line = f"Loading safetensors checkpoint shards: {100 * shard // shards:3d}% Completed | {shard}/{shards}"
        yield Phase(duration_s=load_s / shards, line=line)
    memory = served.memory
    yield Phase(
        duration_s=0.2,
        line=f"Model loading took {memory.weight_bytes / GIB:.2f} GiB memory and {load_s:.2f} seconds",
    )
    if not eager:
        yield Phase(duration_s=COMPILE_S, line=f"torch.compile takes {COMPILE_S:.2f} s in total")
    kv_bytes = served.limits.num_blocks * memory.plain_block_bytes
    yield Phase(duration_s=PROFILE_S, line=f"Available KV cache memory: {kv_bytes / GIB:.2f} GiB")
    tokens = served.limits.num_blocks * served.limits.block_size
    yield Phase(duration_s=0.1, line=f"GPU KV cache size: {tokens:,} tokens")
    yield Phase(
        duration_s=0.1,
        line=f"Maximum concurrency for {served.max_model_len:,} tokens per request: "
        f"{tokens / served.max_model_len:.2f}x",
    )
    if not eager:
        yield Phase(duration_s=CAPTURE_S, line=f"Graph capturing finished in {CAPTURE_S:.0f} secs")
    yield Phase(duration_s=0.5, line="init engine (profile, create kv cache, warmup model) is done")
