"""Which phase of a start an engine's log line tells of; pure data and one look-up."""

from __future__ import annotations

import re

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
# A bar of the hub's client: over all files, or over the bytes of one ("x.safetensors:  12%|#  | 594M/4.98G [.. B/s]").
_BAR = re.compile(r"(?P<what>[^|]{1,120}):\s+(?P<percent>\d{1,3})%\|")
_DOWNLOAD = re.compile(r"\b(?:Fetching|Downloading)\b|[kMGT]?B/s")


def phase_of(line: str) -> Phase | None:
    """The phase that a line speaks of, None for all others."""
    if "WARNING" in line:
        return None
    if download(line):
        return Phase.FETCH
    for phase, words in _WORDS:
        if any(word in line for word in words):
            return phase
    return None


def download(line: str) -> str:
    """What is being fetched and how much of it is here, in words; empty if the line is not of a download."""
    bar = _BAR.search(line)
    if bar is None or _DOWNLOAD.search(line) is None:
        return ""
    return f"{bar['what'].strip()}: {bar['percent']} %"


def goes_on(current: Phase | None, line: str) -> Phase | None:
    """The phase that a line leads to, None if it stays the same.

    Phases go forward, but for a download after the loader began: it is the loader that fetches the weights.
    """
    seen = phase_of(line)
    back = current is Phase.LOAD and bool(download(line))
    return seen if back or later(current, seen) else None


def later(current: Phase | None, seen: Phase | None) -> bool:
    """True if `seen` is a phase that comes after `current`."""
    if seen is None:
        return False
    return current is None or _ORDER.index(seen) > _ORDER.index(current)
