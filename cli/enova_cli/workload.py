"""The workload that `enova recommend` is asked about: from a trace file, or from words such as rate=5,prompt=512.

A trace is judged by its busiest stretch: replicas that carry that carry the rest. Its lengths are a sample of all of
it. A silence that is out of proportion to the trace is taken for a gap of the recording, since it would make the
workload look smaller than it was.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from enova_cli.commands.load import open_trace
from enova_common.errors import InvalidField
from enova_common.traces import PREFIX_TOKENS, Draws, Scenario, TraceError, TraceRequest, parse_trace

OPTION = "--workload"
BUSIEST_S = 300.0          # the stretch whose rate counts
SILENCE_S = 600.0          # no gap is shorter
SILENCE_MEDIANS = 100.0    # nor shorter than so many usual times between arrivals
LENGTHS_MAX = 4096         # pairs that are sent; as the recommender takes
CV_GAPS_MIN = 20           # times between arrivals that a coefficient of variation needs

Plain = dict[str, object]
_WORDS = {
    "rate": "requests a second", "prompt": "prompt tokens (median)", "output": "output tokens (median)",
    "prompt_p95": "prompt tokens, 95th percentile", "output_p95": "output tokens, 95th percentile",
    "cv": "variation of the times between arrivals", "cached": "share of prompt tokens that a prefix cache holds",
}  # fmt: skip
_LENGTH_WORDS = ("prompt", "output", "prompt_p95", "output_p95")


def read_workload(text: str, *, lengths: str = "", allow_gaps: bool = False, seed: int = 0) -> Plain:
    """The workload of `--workload`, as plain values of `ExpectedWorkload`. Raises InvalidField, NotFound."""
    if "=" in text and not Path(text).exists():
        return _of_words(_words(text, OPTION))
    return _of_trace(Path(text), lengths=lengths, allow_gaps=allow_gaps, seed=seed)


def of_requests(requests: Sequence[TraceRequest], *, allow_gaps: bool = False, name: str = "the trace") -> Plain:
    """The workload of a trace's requests. Raises InvalidField for too few of them, or a gap."""
    if len(requests) < 2:
        raise InvalidField(f"{name} holds {len(requests)} requests: a rate needs two", field=OPTION)
    arrivals = [request.arrival_s for request in requests]
    if not allow_gaps:
        _check_gaps(arrivals, name)
    start, end, rate = busiest(arrivals)
    step = max(1.0, len(requests) / LENGTHS_MAX)
    sample = [requests[int(index * step)] for index in range(min(len(requests), LENGTHS_MAX))]
    return {
        "requests_per_s": rate,
        "lengths": [{"prompt_tokens": each.prompt_tokens, "output_tokens": each.output_tokens} for each in sample],
        "arrival_cv": _variation([arrival for arrival in arrivals if start <= arrival <= end]),
        "cached_prefix_share": cached_share(requests),
    }


def busiest(arrivals: Sequence[float]) -> tuple[float, float, float]:
    """The start, end and rate of the busiest BUSIEST_S of sorted arrivals; of all of them if there is no more."""
    length = min(BUSIEST_S, arrivals[-1] - arrivals[0])
    if length <= 0:
        raise InvalidField("all requests arrive at once: there is no rate", field=OPTION)
    best, first = (0, 0), 0
    for last, arrival in enumerate(arrivals):
        while arrivals[first] <= arrival - length:
            first += 1
        best = max(best, (last - first + 1, first))
    count, first = best
    return arrivals[first], arrivals[first] + length, count / length


def cached_share(requests: Sequence[TraceRequest]) -> float:
    """The share of prompt tokens whose prefix an earlier request had: what a cache without bounds would hold."""
    seen: set[str] = set()
    cached = 0
    for request in requests:
        known = sum(prefix in seen for prefix in request.prefix_ids)
        cached += min(known * PREFIX_TOKENS, request.prompt_tokens)
        seen.update(request.prefix_ids)
    return cached / sum(request.prompt_tokens for request in requests)


def _check_gaps(arrivals: Sequence[float], name: str) -> None:
    silences = [later - earlier for earlier, later in pairwise(arrivals)]
    bound = max(SILENCE_S, SILENCE_MEDIANS * statistics.median(silences))
    for index, silence in enumerate(silences):
        if silence > bound:
            message = f"{name} has a gap: nothing arrives from {arrivals[index]:.0f} s to {arrivals[index + 1]:.0f} s"
            remedy = "cut the trace there, or say --allow-gaps if it was quiet indeed"
            raise InvalidField(message, field=OPTION, reason="TRACE_GAP", remedy=remedy)


def _variation(arrivals: Sequence[float]) -> float:
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    if len(gaps) < CV_GAPS_MIN or statistics.mean(gaps) <= 0:
        return 1.0
    return statistics.pstdev(gaps) / statistics.mean(gaps)


def _of_trace(path: Path, *, lengths: str, allow_gaps: bool, seed: int) -> Plain:
    source = random.Random(seed)  # noqa: S311 - reproducible arrivals
    scenario = None
    if lengths:
        scenario = Scenario(lengths=[length_pair(lengths)])
    draws = Draws(source.random, source.gammavariate)
    try:
        requests = list(parse_trace(open_trace(path, OPTION), scenario=scenario, draws=draws))
    except TraceError as error:
        remedy = "correct it; enova reads arrival_s,prompt_tokens,output_tokens[,class], in order of arrival"
        if "windows need lengths" in error.message:
            remedy = "it counts requests without their lengths: give --lengths prompt=512,output=128"
        raise InvalidField(f"{path.name} {error}", field=OPTION, reason="INVALID_TRACE", remedy=remedy) from error
    return of_requests(requests, allow_gaps=allow_gaps, name=path.name)


def length_pair(text: str) -> tuple[int, int]:
    """Prompt and output tokens of `--lengths`. Raises InvalidField."""
    words = _words(text, "--lengths", _LENGTH_WORDS)
    return round(_number(words, "prompt", "--lengths")), round(_number(words, "output", "--lengths"))


def _of_words(words: Mapping[str, str]) -> Plain:
    plain: Plain = {"requests_per_s": _number(words, "rate", OPTION)}
    for name in ("prompt", "output"):
        percentiles = {"p50": _number(words, name, OPTION)}
        if f"{name}_p95" in words:
            percentiles["p95"] = _number(words, f"{name}_p95", OPTION)
        plain[f"{name}_tokens"] = percentiles
    for name, field in (("cv", "arrival_cv"), ("cached", "cached_prefix_share")):
        if name in words:
            plain[field] = _number(words, name, OPTION)
    return plain


def _words(text: str, option: str, known: Sequence[str] = tuple(_WORDS)) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in known:
            remedy = "; ".join(f"{each}: {_WORDS[each]}" for each in known)
            raise InvalidField(f"{part.strip()!r} is not NAME=NUMBER of those known", field=option, remedy=remedy)
        if name in found:
            raise InvalidField(f"{name} is given twice", field=option)
        found[name] = value
    return found


def _number(words: Mapping[str, str], name: str, option: str) -> float:
    if name not in words:
        raise InvalidField(f"{name} is missing", field=option, remedy="rate=5,prompt=512,output=128")
    try:
        value = float(words[name])
    except ValueError as error:
        raise InvalidField(f"{name} is {words[name]!r}, not a number", field=option) from error
    if not math.isfinite(value) or value < 0 or (value == 0 and name not in {"cv", "cached"}):
        raise InvalidField(f"{name} must be more than 0, not {words[name]}", field=option)
    return value
