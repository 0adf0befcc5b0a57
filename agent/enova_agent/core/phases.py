"""Which phase of a start an engine's log line tells of; pure data and one look-up."""

from __future__ import annotations

from enova_agent.core.events import Phase

# Words of a log line -> phase, the latest phase first: a line of vLLM 0.32 (and of the simulated engine, which
# says the same) may name more than one thing. fetch: resolving and downloading; load: weights; compile: graph
# compilation; warm: memory profile, KV cache, CUDA graphs, the server's own start.
_WORDS: tuple[tuple[Phase, tuple[str, ...]], ...] = (
    (
        Phase.WARM,
        (
            "KV cache size", "# GPU blocks", "# CPU blocks", "Maximum concurrency", "Capturing CUDA graph",
            "Graph capturing", "cuda graph memory", "init engine", "Warming up", "warmup", "profiling run",
            "Starting vLLM", "Started server process", "Application startup", "Uvicorn running",
        ),
    ),
    (
        Phase.COMPILE,
        ("torch.compile", "Dynamo bytecode", "Compiling a graph", "Cache the graph", "compilation cache", "Inductor"),
    ),
    (
        Phase.LOAD,
        (
            "Loading model", "Starting to load model", "Loading weights", "Loading safetensors", "checkpoint shards",
            "Model loading took", "Loading drafter", "Using model weights format",
        ),
    ),
    (
        Phase.FETCH,
        ("Downloading", "Fetching", "Resolved architecture", "Time spent downloading weights", "snapshot_download"),
    ),
)
_ORDER = tuple(Phase)


def phase_of(line: str) -> Phase | None:
    """The phase that a line speaks of, None for all others."""
    for phase, words in _WORDS:
        if any(word in line for word in words):
            return phase
    return None


def later(current: Phase | None, seen: Phase | None) -> bool:
    """True if `seen` is a phase that comes after `current`: phases only go forward."""
    if seen is None:
        return False
    return current is None or _ORDER.index(seen) > _ORDER.index(current)
