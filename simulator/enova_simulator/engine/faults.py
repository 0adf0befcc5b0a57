"""Faults on order: what a script file or `POST /simulated/fault` asks the engine to suffer."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path


class FaultKind(StrEnum):
    """What goes wrong."""

    SLOW_START = "slow_start"  # the start takes `extra_s` longer, without progress in its log
    OUT_OF_MEMORY = "out_of_memory"  # refuses to start
    CRASH = "crash"  # the API server ends with `exit_code`
    CORE_CRASH = "core_crash"  # the core process is killed
    HANG = "hang"  # no token progress; /health stays 200
    SLOW = "slow"  # every step takes `factor` times as long
    THROTTLE = "throttle"  # as slow, and the GPU says that heat is why
    LEAK = "leak"  # `bytes_per_s` of the process, `blocks_per_s` of the KV cache
    IGNORE_SIGTERM = "ignore_sigterm"
    GRANDCHILD = "grandchild"  # leaves a process in a session of its own behind


START_KINDS = frozenset({FaultKind.SLOW_START, FaultKind.OUT_OF_MEMORY})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault and when it strikes: after so many requests, or so many model seconds after the start, or at once."""

    kind: FaultKind
    after_requests: int = 0
    after_s: float = 0.0
    for_s: float | None = None  # None: until it is lifted
    extra_s: float = 30.0
    factor: float = 2.0
    exit_code: int = 1
    bytes_per_s: float = 0.0
    blocks_per_s: float = 0.0


def parse_fault(row: object) -> Fault:
    """A fault from parsed JSON; ValueError names what is wrong."""
    if not isinstance(row, dict):
        raise ValueError(f"a fault is an object, not {row!r}")  # noqa: TRY004 - the content is wrong, not the call
    try:
        kind = FaultKind(str(row.get("kind")))
    except ValueError:
        raise ValueError(f"kind: {row.get('kind')!r} is none of {', '.join(FaultKind)}") from None
    known = {field.name for field in fields(Fault)} - {"kind"}
    values: dict[str, int | float | None] = {}
    for key, value in row.items():
        if key == "kind":
            continue
        if key not in known:
            raise ValueError(f"{key}: unknown; known are {', '.join(sorted(known))}")
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ValueError(f"{key}: must be a number of at least 0, not {value!r}")
        values[key] = int(value) if key in {"after_requests", "exit_code"} else value
    if values.get("factor", 1.0) == 0:
        raise ValueError("factor: must be above 0")
    return Fault(kind=kind, **values)  # type: ignore[arg-type]


def read_faults(path: Path) -> tuple[Fault, ...]:
    """The faults of a script file: `{"faults": [...]}`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("faults"), list):
        raise ValueError('must be an object like {"faults": [{"kind": "slow", "factor": 2}]}')  # noqa: TRY004
    return tuple(parse_fault(row) for row in content["faults"])
