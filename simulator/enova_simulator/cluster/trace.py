"""Requests for a fleet: read from traces, drawn from counts, thinned or superposed to a wanted size, cut into windows.

Everything is arrays and seeded. A trace is refused with a clear error where it is empty, unsorted, of another unit
(`enova_common.traces` says so, by line), or silent for so long that something must be missing.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from enova_common.traces import PREFIX_TOKENS, Draws, Scenario, TraceError, TraceRequest, parse_trace
from enova_simulator.cluster.engines import Requests
from enova_simulator.cluster.kernel.state import Floats, Longs
from enova_simulator.cluster.setup import SetupError

BLOCK_SIZE = 16
SILENCE_S = 1800.0                 # with nothing in it, in a trace
SILENCE_TIMES = 300.0              # the mean gap: such a silence is a gap in the recording
SHIFT_S = 60.0                     # up to which copies are moved, so that bursts of minutes stay bursts
REQUESTS_MAX = 5_000_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Requests as plain columns; `prefixes` are ids of `PREFIX_TOKENS` tokens each, empty without."""

    arrival_s: Floats
    prompt_tokens: Longs
    output_tokens: Longs
    prefixes: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """Pairs of prompt and output tokens."""
        return tuple(zip(self.prompt_tokens.tolist(), self.output_tokens.tolist(), strict=True))

    def chosen(self, index: Longs) -> Rows:
        """Those at these places."""
        return Rows(
            arrival_s=self.arrival_s[index], prompt_tokens=self.prompt_tokens[index],
            output_tokens=self.output_tokens[index],
            prefixes=tuple(self.prefixes[place] for place in index.tolist()) if self.prefixes else (),
        )  # fmt: skip

    def between(self, start_s: float, end_s: float) -> Rows:
        """Those that arrive in this time, which becomes the new zero."""
        first, last = np.searchsorted(self.arrival_s, [start_s, end_s]).tolist()
        rows = self.chosen(np.arange(first, last))
        return Rows(
            arrival_s=rows.arrival_s - start_s, prompt_tokens=rows.prompt_tokens, output_tokens=rows.output_tokens,
            prefixes=rows.prefixes,
        )  # fmt: skip


def read(
    lines: Iterable[str], *, scenario: Scenario | None = None, seed: int = 1000, allow_gaps: bool = False
) -> Rows:
    """The requests of a trace file in any of its forms. Raises TraceError (by line) or SetupError."""
    generator = np.random.default_rng(seed)
    draws = Draws(uniform=lambda: float(generator.random()), gamma=lambda a, b: float(generator.gamma(a, b)))
    found: list[TraceRequest] = []
    for request in parse_trace(lines, scenario=scenario, draws=draws):
        found.append(request)
        if len(found) > REQUESTS_MAX:
            raise SetupError("trace", f"has more than {REQUESTS_MAX:,} requests: cut or thin it")
    if not found:
        raise SetupError("trace", "holds no request")
    rows = Rows(
        arrival_s=np.array([each.arrival_s for each in found]),
        prompt_tokens=np.array([each.prompt_tokens for each in found], dtype=np.int64),
        output_tokens=np.array([each.output_tokens for each in found], dtype=np.int64),
        prefixes=tuple(tuple(map(_number, each.prefix_ids)) for each in found)
        if any(each.prefix_ids for each in found) else (),
    )  # fmt: skip
    if not allow_gaps:
        refuse_gaps(rows.arrival_s)
    return rows


def refuse_gaps(arrival_s: Floats) -> None:
    """Raise SetupError where a trace is silent for so long that its recording must have a gap."""
    if len(arrival_s) < 3:
        return
    gaps = np.diff(arrival_s)
    widest = int(np.argmax(gaps))
    usual_s = (arrival_s[-1] - arrival_s[0] - gaps[widest]) / (len(gaps) - 1)
    if gaps[widest] > max(SILENCE_S, SILENCE_TIMES * usual_s):
        raise SetupError(
            "trace", f"nothing for {gaps[widest]:.0f} s after {arrival_s[widest]:.0f} s, where requests come every "
            f"{usual_s:.3g} s: is a part missing? (allow gaps if it is not)"
        )  # fmt: skip


def drawn(
    counts: Floats, *, width_s: float, lengths: Sequence[tuple[int, int]], cv: Floats | float, seed: int
) -> Rows:
    """Requests from counts by windows: arrivals are a Gamma renewal process in each, lengths pairs at random."""
    if not np.isfinite(counts).all() or counts.min(initial=0.0) < 0:
        raise SetupError("trace", "counts must be finite and not negative")
    generator = np.random.default_rng(seed)
    spread = np.broadcast_to(np.asarray(cv, dtype=np.float64), counts.shape)
    parts = [
        place * width_s + _renewal(generator, count, width_s, max(1e-3, float(each)))
        for place, (count, each) in enumerate(zip(counts.tolist(), spread.tolist(), strict=True))
        if count > 0
    ]
    arrival_s = np.concatenate(parts) if parts else np.zeros(0)
    pairs = np.array(lengths, dtype=np.int64).reshape(-1, 2)
    picked = pairs[generator.integers(0, len(pairs), len(arrival_s))]
    return Rows(arrival_s=arrival_s, prompt_tokens=picked[:, 0], output_tokens=picked[:, 1])


def scaled(rows: Rows, factor: float, *, seed: int) -> Rows:
    """So many times as dense: thinned at random, or superposed of copies that are moved by up to a minute."""
    if not factor > 0:
        raise SetupError("factor", f"must be positive, is {factor}")
    generator = np.random.default_rng([seed, 5])
    whole = int(factor)
    places = [np.arange(len(rows))] * whole
    if factor > whole:
        places.append(np.flatnonzero(generator.random(len(rows)) < factor - whole))
    end_s = float(rows.arrival_s[-1]) if len(rows) else 0.0
    times = [
        rows.arrival_s[chosen] if number == 0 else (rows.arrival_s[chosen] + generator.uniform(0, SHIFT_S)) % end_s
        for number, chosen in enumerate(places)
    ]
    index, arrival_s = np.concatenate(places), np.concatenate(times)
    order = np.argsort(arrival_s, kind="stable")
    found = rows.chosen(index[order])
    return Rows(
        arrival_s=arrival_s[order], prompt_tokens=found.prompt_tokens, output_tokens=found.output_tokens,
        prefixes=found.prefixes,
    )  # fmt: skip


def steepest(counts: Floats, *, width_s: float, window_s: float, requests_max: float, windows: int) -> list[int]:
    """Where the windows of steepest change begin (places in `counts`), the steepest first, none over another.

    A window's steepness is the largest rise of its load, smoothed over 5 minutes, within 5 minutes, against the
    window's mean; windows of more than `requests_max` requests are left out.
    """
    size, smooth = max(1, round(window_s / width_s)), max(1, round(300.0 / width_s))
    if len(counts) <= size:
        return [0] if len(counts) else []
    level = np.convolve(counts, np.ones(smooth) / smooth, mode="same")
    rise = np.zeros(len(counts))
    rise[smooth:] = level[smooth:] - level[:-smooth]
    sums = np.convolve(counts, np.ones(size), mode="valid")
    highest = np.array([rise[place : place + size].max() for place in range(len(sums))])
    steepness = np.where((sums > 0) & (sums <= requests_max), highest / np.maximum(sums / size, 1e-9), -np.inf)
    found: list[int] = []
    for _ in range(windows):
        place = int(np.argmax(steepness))
        if not np.isfinite(steepness[place]):
            break
        found.append(place)
        steepness[max(0, place - size) : place + size] = -np.inf
    return found


def requests_of(rows: Rows, *, priority: int = 0) -> Requests:
    """The rows as engines take them, with block hashes where prefixes are known."""
    size = PREFIX_TOKENS // BLOCK_SIZE
    counts = np.zeros(len(rows), dtype=np.int64)
    hashes: list[Longs] = []
    for place, ids in enumerate(rows.prefixes):
        full = min(len(ids) * size, int(rows.prompt_tokens[place]) // BLOCK_SIZE)
        blocks = (np.repeat(np.array(ids, dtype=np.int64), size) * size + np.tile(np.arange(size), len(ids)))[:full]
        hashes.append(blocks)
        counts[place] = full
    return Requests(
        arrival_s=np.ascontiguousarray(rows.arrival_s), prompt_tokens=rows.prompt_tokens,
        output_tokens=rows.output_tokens, priority=np.full(len(rows), priority, dtype=np.int64),
        hashes=np.concatenate(hashes) if hashes else np.zeros(0, dtype=np.int64), hash_ends=np.cumsum(counts),
    )  # fmt: skip


def merged(parts: Sequence[Requests]) -> tuple[Requests, Longs]:
    """The requests of several deployments in one order, and which deployment each is of."""
    places = np.concatenate([np.full(len(part), place, dtype=np.int64) for place, part in enumerate(parts)])
    arrival_s = np.concatenate([part.arrival_s for part in parts])
    order = np.argsort(arrival_s, kind="stable")
    counts = np.concatenate([np.diff(part.hash_ends, prepend=0) for part in parts])[order]
    starts = np.concatenate([part.hash_ends - np.diff(part.hash_ends, prepend=0) for part in parts])
    shifts = np.cumsum([0, *(len(part.hashes) for part in parts)])[:-1]
    starts = (starts + shifts[places])[order]
    pool = np.concatenate([part.hashes for part in parts])
    hashes = [pool[start : start + count] for start, count in zip(starts.tolist(), counts.tolist(), strict=True)]
    found = Requests(
        arrival_s=arrival_s[order],
        prompt_tokens=np.concatenate([part.prompt_tokens for part in parts])[order],
        output_tokens=np.concatenate([part.output_tokens for part in parts])[order],
        priority=np.concatenate([part.priority for part in parts])[order],
        hashes=np.concatenate(hashes) if len(pool) else pool, hash_ends=np.cumsum(counts),
    )  # fmt: skip
    return found, places[order]


def _renewal(generator: np.random.Generator, count: float, width_s: float, cv: float) -> Floats:
    """Arrivals within one window at this mean count."""
    shape, mean_s = 1.0 / cv**2, width_s / count
    times: list[Floats] = []
    reached = 0.0
    while reached < width_s:
        gaps = generator.gamma(shape, mean_s / shape, size=int(count + 4 * cv * np.sqrt(count) + 16))
        times.append(reached + np.cumsum(gaps))
        reached = float(times[-1][-1])
    arrivals = np.concatenate(times)
    return arrivals[arrivals < width_s]


def _number(text: str) -> int:
    """A prefix id as a number that is the same in every run."""
    return int(text) if text.isdigit() else (1 << 40) + zlib.crc32(text.encode())


__all__ = [
    "Rows", "TraceError", "drawn", "merged", "read", "refuse_gaps", "requests_of", "scaled", "steepest",
]  # fmt: skip
