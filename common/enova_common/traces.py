"""Traces of requests: what arrives when, with how many tokens; pure.

Three forms of CSV are told apart by their header:

1. requests: `arrival_s,prompt_tokens,output_tokens[,class][,prefix_hash_ids]`, one row a request;
2. windows of counts: `t_s,n_requests[,cv][,recording_gap]`: arrivals are drawn Gamma with the row's or the
   scenario's coefficient of variation; windows in which nothing was recorded are left empty;
3. windows of tokens: `minute,tokens_per_s`: divided by the mean tokens of the scenario into counts, then as 2.

Rows must be sorted; other columns are ignored. A prefix id stands for `PREFIX_TOKENS` tokens.
Reading files is the caller's: functions here take lines and return values.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

PREFIX_TOKENS = 512
TOKENS_MAX = 10_000_000        # a longer prompt is a column of another unit
ARRIVAL_S_MAX = 366 * 86_400   # a year: larger values are milliseconds or Unix times
DEFAULT_CV = 1.2               # of inter-arrival times, where a window file gives none


class TraceError(ValueError):
    """A trace that cannot be used; `line` counts from 1 and includes the header."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(f"line {line}: {message}")
        self.message = message
        self.line = line


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request of a trace. `arrival_s` counts from the start of the trace."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    serving_class: str = ""
    prefix_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One window of a counted trace."""

    start_s: float
    duration_s: float
    requests: float
    cv: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What window files leave open: lengths to draw from (pairs of prompt and output tokens) and burstiness."""

    lengths: Sequence[tuple[int, int]]
    cv: float = DEFAULT_CV


@dataclass(frozen=True, slots=True)
class Draws:
    """The caller's random draws: `uniform()` in [0, 1), `gamma(shape, scale)`."""

    uniform: Callable[[], float]
    gamma: Callable[[float, float], float]


def parse_trace(
    lines: Iterable[str], *, scenario: Scenario | None = None, draws: Draws | None = None
) -> Iterator[TraceRequest]:
    """The requests of a trace in any of the three forms, in order of arrival.

    Raises TraceError naming the line: unknown header, wrong units, unsorted rows, or a window file without
    the `scenario` and `draws` that it needs.
    """
    rows = csv.DictReader(lines)
    header = [name.strip() for name in rows.fieldnames or ()]
    rows.fieldnames = header
    if {"arrival_s", "prompt_tokens", "output_tokens"} <= set(header):
        return _requests(rows)
    windows = {"t_s", "n_requests"} <= set(header) or {"minute", "tokens_per_s"} <= set(header)
    if not windows:
        raise TraceError(f"unknown header {','.join(header)!r}: expected arrival_s,prompt_tokens,output_tokens", 1)
    if scenario is None or draws is None:
        raise TraceError("windows need lengths to draw from", 1)
    return _from_windows(_windows(rows, scenario), scenario, draws)


def _requests(rows: Iterable[Mapping[str, str]]) -> Iterator[TraceRequest]:
    first: float | None = None
    previous = -math.inf
    for line, row in enumerate(rows, start=2):
        arrival = _number(row, "arrival_s", line)
        if arrival < previous:
            raise TraceError(f"arrival_s {arrival:g} is before the row above: sort the trace", line)
        previous = arrival
        first = arrival if first is None else first
        if arrival - first > ARRIVAL_S_MAX:
            raise TraceError(f"arrival_s {arrival:g} is over a year after the start: are these milliseconds?", line)
        prefix = (row.get("prefix_hash_ids") or "").replace("[", "").replace("]", "").replace(",", " ").split()
        yield TraceRequest(
            arrival_s=arrival - first,
            prompt_tokens=_tokens(row, "prompt_tokens", line),
            output_tokens=_tokens(row, "output_tokens", line),
            serving_class=(row.get("class") or "").strip(),
            prefix_ids=tuple(prefix),
        )


def _number(row: Mapping[str, str], column: str, line: int) -> float:
    text = row.get(column)
    try:
        value = float(text or "")
    except ValueError as error:
        raise TraceError(f"{column} is {text!r}, not a number", line) from error
    if not math.isfinite(value) or value < 0:
        raise TraceError(f"{column} is {value:g}: expected a finite number from 0", line)
    return value


def _tokens(row: Mapping[str, str], column: str, line: int) -> int:
    value = _number(row, column, line)
    if value > TOKENS_MAX:
        raise TraceError(f"{column} is {value:g}, over {TOKENS_MAX}: is it another unit?", line)
    return max(1, round(value))


def _windows(rows: Iterable[Mapping[str, str]], scenario: Scenario) -> Iterator[Window]:
    mean_tokens = sum(prompt + output for prompt, output in scenario.lengths) / len(scenario.lengths)
    pending: Window | None = None
    duration = 60.0
    for line, row in enumerate(rows, start=2):
        start = _number(row, "t_s", line) if "t_s" in row else _number(row, "minute", line) * 60.0
        if pending is not None:
            duration = start - pending.start_s
            if duration <= 0:
                raise TraceError(f"the window at {start:g} s is not after the row above: sort the trace", line)
            yield replace(pending, duration_s=duration)
        if "n_requests" in row:
            requests = _number(row, "n_requests", line)
        else:
            requests = _number(row, "tokens_per_s", line) * 60.0 / mean_tokens
        if row.get("recording_gap", "0").strip() not in ("", "0"):
            requests = 0.0
        cv = _number(row, "cv", line) if row.get("cv") else scenario.cv
        pending = Window(start_s=start, duration_s=duration, requests=requests, cv=cv)
    if pending is not None:
        # The last window has no successor to end it: it is taken as wide as the one before.
        yield replace(pending, duration_s=duration)


def _from_windows(windows: Iterable[Window], scenario: Scenario, draws: Draws) -> Iterator[TraceRequest]:
    first: float | None = None
    clock = 0.0
    for window in windows:
        first = window.start_s if first is None else first
        start, end = window.start_s - first, window.start_s - first + window.duration_s
        clock = max(clock, start)
        if window.requests <= 0:
            continue
        mean_gap = window.duration_s / window.requests
        shape = 1.0 / max(window.cv, 1e-3) ** 2  # of a Gamma with this coefficient of variation
        while True:
            clock += draws.gamma(shape, mean_gap / shape)
            if clock >= end:
                # Memory of the overshoot would couple windows of very different rates.
                clock = end
                break
            prompt, output = scenario.lengths[int(draws.uniform() * len(scenario.lengths))]
            yield TraceRequest(arrival_s=clock, prompt_tokens=prompt, output_tokens=output)
