"""Why an engine ended or would not start, read from its last words and its exit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """What kind of thing went wrong; decides whether the same start may help."""

    CRASHED = "CRASHED"
    HUNG = "HUNG"
    START_TIMED_OUT = "START_TIMED_OUT"
    GPU_MEMORY = "GPU_MEMORY"
    HOST_MEMORY = "HOST_MEMORY"
    MODEL = "MODEL"
    HUB_DENIED = "HUB_DENIED"
    HUB_MISSING = "HUB_MISSING"
    HUB_UNREACHABLE = "HUB_UNREACHABLE"
    ARGUMENT = "ARGUMENT"
    PORT_TAKEN = "PORT_TAKEN"
    DISK_FULL = "DISK_FULL"
    GPU_MISSING = "GPU_MISSING"
    EXECUTABLE = "EXECUTABLE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One failure: its kind and one sentence for people."""

    fault: Fault
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a process ended, as far as it is known: an adopted process that is nobody's child leaves no status."""

    code: int | None = None
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is not None:
            return f"killed by signal {self.signal}"
        return "ended, exit code unknown" if self.code is None else f"ended with exit code {self.code}"


# The first pattern found counts, so the specific stand before the general. Sources: vLLM 0.32's messages as
# seen on a CPU and as its source words them for CUDA, Python's and the C library's error texts.
_PATTERNS: tuple[tuple[Fault, str, str], ...] = (
    (
        Fault.GPU_MEMORY,
        "out of GPU memory",
        r"CUDA out of memory|OutOfMemoryError|No available memory for the cache blocks"
        r"|Free memory on device .* is less than desired|CUDA error: out of memory"
        r"|larger than the (?:available KV cache memory|maximum number of tokens that can be stored in KV cache)"
        r"|Engine core initialization failed.*memory",
    ),
    (
        Fault.HOST_MEMORY,
        "out of host memory",
        r"Cannot allocate memory|DefaultCPUAllocator: can't allocate|^MemoryError\b|std::bad_alloc",
    ),
    (Fault.PORT_TAKEN, "its port is taken", r"Address already in use|\[Errno 98\]"),
    (Fault.DISK_FULL, "the disk is full", r"No space left on device|\[Errno 28\]|Disk quota exceeded"),
    (
        Fault.HUB_DENIED,
        "the hub does not give out the model (accept its terms there; give the agent the HF_TOKEN of that account)",
        r"GatedRepoError|Cannot access gated repo|access a gated repo\.|is a gated repository"
        r"|Access to model \S+ is restricted|Access to this resource is disabled|Cannot access content at"
        r"|Invalid (?:user token|credentials in Authorization header|username or password)",
    ),
    (
        Fault.HUB_MISSING,
        "the hub has no such model or revision (check the name; a private model wants HF_TOKEN)",
        r"RepositoryNotFoundError|Repository Not Found for url"
        r"|is not a local folder and is not a valid model identifier|RevisionNotFoundError"
        r"|Revision Not Found for url|is not a valid git identifier",
    ),
    (
        Fault.HUB_UNREACHABLE,
        "the hub cannot be reached (check network and proxy, or give the path of a model directory)",
        r"thrown while requesting (?:HEAD|GET) |We couldn't connect to '|specific connection error when trying to load"
        r"|429 Too Many Requests",
    ),
    (
        Fault.MODEL,
        "the model cannot be loaded",
        r"HFValidationError|Repo id must be|does not appear to have a file named|(?<!in model's )config\.json"
        r"|Can't load (?:the )?(?:configuration|tokenizer)|Unrecognized model in"
        r"|model architectures .* are not supported"
        r"|SafetensorError|OfflineModeIsEnabled|LocalEntryNotFoundError|Invalid repository ID or local directory"
        r"|(?:model|Model) .* (?:does not exist|not found)",
    ),
    (
        Fault.ARGUMENT,
        "the engine refuses its arguments",
        r"unrecognized arguments?|invalid choice|expected (?:one|at least one) argument|error: argument"
        r"|the following arguments are required|validation errors? for \w*Config|Value error,"
        r"|No common block size|invalid \w+ value|is greater than the derived max_model_len",
    ),
    (
        Fault.GPU_MISSING,
        "no usable GPU",
        r"Failed to infer device type|No CUDA GPUs are available|no CUDA-capable device"
        r"|CUDA driver version is insufficient"
        r"|Found no NVIDIA driver",
    ),
)
_HUB = frozenset({Fault.HUB_DENIED, Fault.HUB_MISSING, Fault.HUB_UNREACHABLE})
_COMPILED = tuple((fault, summary, re.compile(pattern)) for fault, summary, pattern in _PATTERNS)
# Where no pattern names the cause. A process of vLLM that dies (here or by a signal) takes the others along: who died
# says more than the errors that follow in every request, and these more than the orderly end after them.
_TELLING = (
    re.compile(r"Fatal Python error|Worker proc .* died unexpectedly"),
    re.compile(r"engine core exited unexpectedly"),
    re.compile(r"EngineDeadError"),
    re.compile(r"^(?!.*WARNING).*\b[A-Za-z_.]+(?:Error|Exception)\b: "),
)
_CHATTER = re.compile(r"nanobind|^ - (?:leaked|\.\.\. skipped)|HTTP/1\.[01]\" \d{3}|^INFO:  |DeprecationWarning|\d%\|")
_LINES_KEPT = 200
_DETAIL_LENGTH_MAX = 400


def classify(ending: Ending, lines: Sequence[str]) -> Cause:
    """The cause of an ending that nobody asked for, from the last lines of the engine's log.

    The newest match wins: an engine may log a harmless refusal long before it dies of something else. Only that a
    model cannot be loaded says less than what the hub had answered before.
    """
    matches = (match for line in reversed(lines[-_LINES_KEPT:]) if (match := _match(line)) is not None)
    newest = next(matches, None)
    if newest is not None and newest[0] is Fault.MODEL:
        newest = next((match for match in matches if match[0] in _HUB), newest)
    if newest is not None:
        fault, summary, line = newest
        return Cause(fault=fault, detail=_shorten(f"{ending}: {summary}: {line}"))
    if ending.signal == 9:
        return Cause(fault=Fault.CRASHED, detail=f"{ending}, by a person or by the kernel for want of host memory")
    last = _last_words(lines[-_LINES_KEPT:])
    words = f"; last words: {last}" if last else ", silently"
    return Cause(fault=Fault.CRASHED, detail=_shorten(f"{ending}{words}"))


def is_chatter(line: str) -> bool:
    """True of a line that never tells why an engine ended: a request it answered, the server's orderly end, a bar."""
    return not line.strip() or _CHATTER.search(line) is not None


def _match(line: str) -> tuple[Fault, str, str] | None:
    """What a line says went wrong, if it does."""
    for fault, summary, pattern in _COMPILED:
        if pattern.search(line):
            return fault, summary, line.strip()
    return None


def _last_words(lines: Sequence[str]) -> str:
    """The newest line that tells most of why it ended; any other where none does."""
    said = [line.strip() for line in reversed(lines) if not is_chatter(line)]
    for telling in _TELLING:
        found = next((line for line in said if telling.search(line)), "")
        if found:
            return found
    return said[0] if said else ""


def _shorten(text: str) -> str:
    return text if len(text) <= _DETAIL_LENGTH_MAX else text[: _DETAIL_LENGTH_MAX - 3] + "..."
