"""Which phase of a start an engine's log line tells of; pure data and one look-up."""

from __future__ import annotations

from enova_agent.core.events import Phase

# Words of a log line -> phase, the latest phase first: a line of vLLM 0.32 (and of the simulated engine, which
# says the same) may name more than one thing. fetch: resolving and downloading; load: weights; compile: graph
# compilation; warm: memory profile, KV cache, CUDA graphs, the server's own start. Warnings are left out: they
# tell of what will not be done ("Enforce eager set, disabling torch.compile, ... warmup").
_WORDS: tuple[tuple[Phase, tuple[str, ...]], ...] = (
    (
        Phase.WARM,
        (
            "KV cache size:", "KV cache memory:", "# GPU blocks", "# CPU blocks", "Maximum concurrency for",
            "Capturing CUDA graph", "Graph capturing finished", "init engine (profile", "Warming up",
            "Starting vLLM", "Started server process", "Application startup",
        ),
    ),
    (
        Phase.COMPILE,
        (
            "torch.compile takes", "Dynamo bytecode transform", "Compiling a graph", "Directly load the compiled graph",
            "Directly load AOT compilation", "for vLLM's torch.compile",
        ),
    ),
    (
        Phase.LOAD,
        (
            "Starting to load model", "Loading weights", "Loading safetensors", "checkpoint shards",
            "Model loading took", "Loading drafter", "Using model weights format",
        ),
    ),
    (
        Phase.FETCH,
        ("Downloading", "Fetching", "Resolved architecture", "Time spent downloading weights"),
    ),
)
_ORDER = tuple(Phase)


def phase_of(line: str) -> Phase | None:
    """The phase that a line speaks of, None for all others."""
    if "WARNING" in line:
        return None
    for phase, words in _WORDS:
        if any(word in line for word in words):
            return phase
    return None


def later(current: Phase | None, seen: Phase | None) -> bool:
    """True if `seen` is a phase that comes after `current`: phases only go forward."""
    if seen is None:
        return False
    return current is None or _ORDER.index(seen) > _ORDER.index(current)
