"""Limits on the length of answers by kind of prompt: do they cut the share that they should, and do they fit?

Prompts (`prompts_gsm8k_mbpp`): 20 times, a seeded half of the prompts is fitted and the other half reported. An
answer's tokens are ceil(UTF-8 bytes / 4). 30 % of the fitted answers are stopped by a random cap: the length of another
answer, drawn from the same half, times the one factor with which 30 % are stopped, so that a cap knows nothing of the
answer that it stops. `own_caps` is the same with caps that do know (uniform between 0 and the answer's own length, for
30 % drawn at random): no estimate that sees only lengths can be right then, and the figure says how wrong this one is.
The wanted cut share is 5 %. A prompt without a limit counts as not cut; pinball losses (of the 95 % quantile, tokens)
are taken over the prompts for which every method has a limit.

Clients (`servegen`): a client of each `*_lengths*` file is a kind. For each of its windows CLIENT_ANSWERS lengths are
drawn from the published percentiles (p5 to p99, straight lines on the logarithm between them; beyond them the outer
lines go on as far as once more their width). `halves`: half of the windows are fitted, 30 % stopped as above, the other
half reported. `stream`: windows come in their order, each is reported with what was learned before it; 30 % of each
window's answers are stopped before they are learned.

Baselines in the same run: one quantile for all (`global`), stopped lengths taken as ends (`ignore_censoring`), k-means
with as many groups (`k_means`), the sets themselves as kinds (`true_sets`: what no method knows); for `stream` the same
without drift resets (`no_reset`).

Raw results: prompts.csv.gz (seed, caps, prompt, truth, kind, tokens, limit of each method; empty = none),
clients.csv.gz (protocol, seed, file, client, window_s, answers, of each method cut answers and the sum of pinball
losses, drifts so far; empty = no limit, or not of this protocol).
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.cluster.vq import kmeans2

from enova_common.prompt_vectors import Projection, vectorise
from enova_recommender.recommend.max_tokens import (
    NOWHERE,
    Centres,
    Knowledge,
    LengthSamples,
    assign,
    grouped,
    learned,
    limit_of,
    limits,
    nothing_known,
    product_limit,
)
from enova_recommender.recommend.max_tokens.communities import centres_of, unit
from enova_recommender.recommend.max_tokens.drift import Chart
from enova_testing.benchmark import Benchmark, benchmark, bootstrap, read_rows

CUT_SHARE = 0.05
STOPPED_SHARE = 0.30
HALVES = 20
PROJECTION = Projection(seed=20240714)
PROMPT_KEYS = ("question", "text", "prompt")
ANSWER_KEYS = ("answer", "code", "completion")
CLIENT_ANSWERS = 200
CLIENT_WINDOWS_MIN = 4
PERCENTILES = (5, 25, 50, 75, 90, 95, 99)
POOLED_WINDOWS = 200       # of all clients together, the newest
CLIENT_METHODS = {"halves": ("ours", "global", "ignore_censoring"), "stream": ("ours", "global", "no_reset")}
CLIENT_COLUMNS = ("ours", "global", "ignore_censoring", "no_reset")
METHODS = ("ours", "global", "ignore_censoring", "k_means", "true_sets")

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Limit = int | None


@dataclass(frozen=True, slots=True)
class Prompts:
    """All prompts of the data: vectors, their answers' tokens, and which set each is from."""

    vectors: npt.NDArray[np.int8]
    tokens: Ints
    truth: Ints


def main() -> None:
    """Run it."""
    run = benchmark("recommender_max_tokens", __doc__)
    prompts = _prompts(run)
    figures: dict[str, object] = {
        "adjusted_rand": None, "communities": None, "cut_share_error": None, "pinball_vs_global": None,
    }
    if prompts is not None:
        figures |= _of_prompts(run, prompts)
    figures["servegen"] = _of_clients(run)
    run.end(figures)


# Prompts


def _prompts(run: Benchmark) -> Prompts | None:
    texts, tokens, truth = [], [], []
    keys: dict[str, int] = {}
    for path in run.files("prompts_gsm8k_mbpp", "*.jsonl.gz"):
        for row in _json_rows(path):
            prompt = next((key for key in PROMPT_KEYS if key in row), None)
            answer = next((key for key in ANSWER_KEYS if key in row), None)
            if prompt is None or answer is None:
                continue
            texts.append(row[prompt])
            tokens.append(math.ceil(len(row[answer].encode()) / 4))
            truth.append(keys.setdefault(prompt, len(keys)))
    if not texts:
        return None
    vectors = np.frombuffer(b"".join(vectorise(text, PROJECTION) for text in texts), np.int8)
    return Prompts(vectors.reshape(len(texts), -1), np.array(tokens, np.int64), np.array(truth, np.int64))


def _json_rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _of_prompts(run: Benchmark, prompts: Prompts) -> dict[str, object]:
    rows: list[dict[str, object]] = []
    for caps in ("other_answers", "own_caps"):
        for seed in range(run.seed, run.seed + HALVES):
            rows += _half(prompts, seed, own_caps=caps == "own_caps")
    run.write("prompts", rows)
    independent = [row for row in rows if row["caps"] == "other_answers"]
    table = [_method_row(independent, method) for method in METHODS]
    run.table(f"prompts: {HALVES} halves, {STOPPED_SHARE:.0%} of the fitted answers stopped", table)
    by_method = {row["method"]: row for row in table}
    seeds = sorted({int(str(row["seed"])) for row in independent})
    rand = [
        adjusted_rand(_column(independent, seed, "truth"), _column(independent, seed, "kind")) for seed in seeds
    ]
    own = _method_row([row for row in rows if row["caps"] == "own_caps"], "ours")
    pinball = float(str(by_method["ours"]["pinball"]))
    return {
        "adjusted_rand": float(np.mean(rand)),
        "communities": float(np.mean([len(set(_column(independent, seed, "kind")) - {NOWHERE}) for seed in seeds])),
        "cut_share_error": by_method["ours"]["cut_share_error"],
        "pinball_vs_global": pinball / float(str(by_method["global"]["pinball"])),
        "pinball_vs_global_interval": _ratio_interval(independent, seeds, run.seed),
        "prompts": len(prompts.tokens),
        "no_kind_share": float(np.mean([row["kind"] == NOWHERE for row in independent])),
        "baselines": {name: row for name, row in by_method.items() if name != "ours"},
        "own_caps": {"cut_share": own["cut_share"], "cut_share_error": own["cut_share_error"]},
    }


def _half(prompts: Prompts, seed: int, *, own_caps: bool) -> list[dict[str, object]]:
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(prompts.tokens))
    fit, report = order[: len(order) // 2], order[len(order) // 2 :]
    tokens, stopped = stopped_at_random(prompts.tokens[fit], draw, own_caps=own_caps)
    samples = LengthSamples(vectors=prompts.vectors[fit], tokens=tokens, stopped=stopped)
    known = grouped(_with_samples(samples), seed=seed)
    kinds = assign(prompts.vectors[report], known.centres)
    given: dict[str, Sequence[Limit]] = {
        "ours": _limits_of(known, kinds),
        "global": [limit_of(product_limit(tokens, stopped), CUT_SHARE)] * len(report),
        "ignore_censoring": _limits_of(_grouped_by(known.centres, _all_ended(samples)), kinds),
        "k_means": _of_k_means(samples, prompts.vectors[report], groups=len(known.centres.reaches), seed=seed),
        "true_sets": _of_sets(samples, prompts.truth[fit], prompts.truth[report]),
    }
    return [
        {
            "seed": seed, "caps": "own_caps" if own_caps else "other_answers", "prompt": int(prompt),
            "truth": int(prompts.truth[prompt]), "kind": int(kinds[place]), "tokens": int(prompts.tokens[prompt]),
        } | {method: given[method][place] for method in METHODS}
        for place, prompt in enumerate(report)
    ]  # fmt: skip


def stopped_at_random(tokens: Ints, draw: np.random.Generator, *, own_caps: bool) -> tuple[Ints, Flags]:
    """Lengths as they are seen where STOPPED_SHARE of the answers were stopped, and which were."""
    if own_caps:
        chosen = draw.random(len(tokens)) < STOPPED_SHARE
        caps = np.maximum(1, np.ceil(draw.random(len(tokens)) * tokens)).astype(np.int64)
        stopped = chosen & (caps < tokens)
        return np.where(stopped, caps, tokens), stopped
    others = tokens[draw.permutation(len(tokens))] * draw.uniform(0.5, 2.0, len(tokens))
    factor = float(np.quantile(tokens / others, 1.0 - STOPPED_SHARE))
    caps = np.maximum(1, np.floor(others * factor)).astype(np.int64)
    stopped = caps < tokens
    return np.where(stopped, caps, tokens), stopped


def _with_samples(samples: LengthSamples) -> Knowledge:
    known = nothing_known(samples.vectors.shape[1])
    return Knowledge(samples=samples, kinds=np.full(len(samples), NOWHERE, np.int64), centres=known.centres)


def _grouped_by(where: Centres, samples: LengthSamples) -> Knowledge:
    charts = tuple(Chart() for _ in where.reaches)
    return Knowledge(samples=samples, kinds=assign(samples.vectors, where), centres=where, charts=charts)


def _all_ended(samples: LengthSamples) -> LengthSamples:
    return LengthSamples(
        vectors=samples.vectors, tokens=samples.tokens, stopped=np.zeros(len(samples.tokens), np.bool_)
    )


def _limits_of(known: Knowledge, kinds: Ints) -> list[Limit]:
    found = limits(known, cut_share=CUT_SHARE)
    return [found.of(int(kind)) for kind in kinds]


def _of_k_means(samples: LengthSamples, report: npt.NDArray[np.int8], *, groups: int, seed: int) -> list[Limit]:
    points = unit(samples.vectors)
    _, labels = kmeans2(points, max(groups, 1), minit="++", seed=seed)
    members = [rows for group in range(groups) if len(rows := np.flatnonzero(labels == group))]
    where = centres_of(samples.vectors, members)
    where = Centres(where.centroids, np.full(len(where.reaches), -1.0))
    return _limits_of(_grouped_by(where, samples), assign(report, where))


def _of_sets(samples: LengthSamples, fitted: Ints, reported: Ints) -> list[Limit]:
    by_set = {
        int(each): limit_of(product_limit(samples.tokens[fitted == each], samples.stopped[fitted == each]), CUT_SHARE)
        for each in np.unique(fitted)
    }
    return [by_set.get(int(each)) for each in reported]


def _column(rows: Sequence[dict[str, object]], seed: int, name: str) -> list[int]:
    return [int(str(row[name])) for row in rows if row["seed"] == seed]


def _method_row(rows: Sequence[dict[str, object]], method: str) -> dict[str, object]:
    seeds = np.array([row["seed"] for row in rows])
    cut = np.array([row[method] is not None and int(str(row["tokens"])) > int(str(row[method])) for row in rows])
    shares = np.array([cut[seeds == seed].mean() for seed in np.unique(seeds)])
    comparable = [row for row in rows if all(row[each] is not None for each in METHODS)]
    return {
        "method": method,
        "cut_share": float(shares.mean()),
        "cut_share_error": abs(float(shares.mean()) - CUT_SHARE),
        "cut_share_sd": float(shares.std()),
        "pinball": float(np.mean([_pinball(row, method) for row in comparable])) if comparable else math.nan,
        "limited_share": float(np.mean([row[method] is not None for row in rows])),
    }


def _pinball(row: dict[str, object], method: str) -> float:
    over = int(str(row["tokens"])) - int(str(row[method]))
    return (1.0 - CUT_SHARE) * over if over > 0 else -CUT_SHARE * over


def _ratio_interval(rows: Sequence[dict[str, object]], seeds: Sequence[int], seed: int) -> list[float]:
    """The 95 % interval of (ours - global) / mean of global, over the halves."""
    pairs = []
    for each in seeds:
        half = [row for row in rows if row["seed"] == each and all(row[name] is not None for name in METHODS)]
        if half:
            ours, whole = (np.mean([_pinball(row, name) for row in half]) for name in ("ours", "global"))
            pairs.append((ours - whole) / whole)
    return list(bootstrap(np.array(pairs), seed=seed)) if pairs else []


def adjusted_rand(one: Sequence[int], other: Sequence[int]) -> float:
    """How alike two divisions of the same things are (Hubert and Arabie, 1985): 1 equal, 0 as by chance."""
    _, rows = np.unique(one, return_inverse=True)
    _, columns = np.unique(other, return_inverse=True)
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1)
    together = _pairs(table).sum()
    by_row, by_column = _pairs(table.sum(axis=1)).sum(), _pairs(table.sum(axis=0)).sum()
    chance = by_row * by_column / _pairs(np.array(len(rows)))
    most = (by_row + by_column) / 2
    return float((together - chance) / (most - chance)) if most > chance else 1.0


def _pairs(counts: Floats) -> Floats:
    return counts * (counts - 1) / 2


# Clients


@dataclass(frozen=True, slots=True)
class Window:
    """One window of one client: drawn lengths, and how they are seen where some were stopped."""

    client: str
    start_s: float
    tokens: Ints
    seen: Ints
    stopped: Flags


def _of_clients(run: Benchmark) -> dict[str, object] | None:
    rows: list[dict[str, object]] = []
    for path in run.files("servegen", "*_lengths*.csv.gz"):
        draw = np.random.default_rng(run.seed)
        windows = _windows(path, draw)
        if not windows:
            run.notes[path.name] = f"no client with {CLIENT_WINDOWS_MIN} windows of percentiles: left out"
            continue
        for protocol, outcome in (("halves", _halves(windows, draw)), ("stream", _stream(windows))):
            rows += [{"protocol": protocol, "seed": run.seed, "file": path.name, **row} for row in outcome]
    if not rows:
        return None
    run.write("clients", rows)
    figures: dict[str, object] = {}
    for protocol, methods in CLIENT_METHODS.items():
        table = [_client_row([row for row in rows if row["protocol"] == protocol], method) for method in methods]
        run.table(f"clients, {protocol}: {STOPPED_SHARE:.0%} of the fitted answers stopped", table)
        ours, whole = (next(row for row in table if row["method"] == name) for name in ("ours", "global"))
        figures[protocol] = {
            "cut_share_error": ours["cut_share_error"],
            "pinball_vs_global": float(str(ours["pinball"])) / float(str(whole["pinball"])),
            "baselines": {row["method"]: row for row in table if row["method"] != "ours"},
        }
    return figures | {"clients": len({(row["file"], row["client"]) for row in rows})}


def _windows(path: Path, draw: np.random.Generator) -> list[Window]:
    """Of each client with windows enough, in the order of time."""
    by_client: dict[str, list[Window]] = {}
    for row in read_rows(path):
        knots = [row.get(f"output_p{percentile}") or "" for percentile in PERCENTILES]
        if all(knots) and float(knots[0]) > 0:
            tokens = drawn(np.array(knots, np.float64), draw)
            seen, stopped = stopped_at_random(tokens, draw, own_caps=False)
            window = Window(row["client"], float(row["t_s"]), tokens, seen, stopped)
            by_client.setdefault(row["client"], []).append(window)
    kept = [window for each in by_client.values() if len(each) >= CLIENT_WINDOWS_MIN for window in each]
    return sorted(kept, key=lambda window: (window.start_s, window.client))


def drawn(knots: Floats, draw: np.random.Generator) -> Ints:
    """Lengths with these percentiles."""
    logs = np.log(np.maximum.accumulate(knots))
    shares = np.array([0.0, *PERCENTILES, 100.0]) / 100.0
    ends = np.concatenate([[2 * logs[0] - logs[1]], logs, [2 * logs[-1] - logs[-2]]])
    values: Floats = np.round(np.exp(np.interp(draw.random(CLIENT_ANSWERS), shares, ends)))
    return np.maximum(values, 1.0).astype(np.int64)


def _halves(windows: Sequence[Window], draw: np.random.Generator) -> Iterator[dict[str, object]]:
    order = draw.permutation(len(windows))
    fitted, reported = order[: len(order) // 2], order[len(order) // 2 :]
    of_client: dict[str, list[Window]] = {}
    for place in fitted:
        of_client.setdefault(windows[place].client, []).append(windows[place])
    given = {client: _client_limits(each) for client, each in of_client.items()}
    whole = _client_limits([windows[place] for place in fitted])["ours"]
    for place in reported:
        window = windows[place]
        if window.client in given:
            yield _client_outcome(window, {"global": whole, **given[window.client]})


def _client_limits(windows: Sequence[Window]) -> dict[str, Limit]:
    seen = np.concatenate([window.seen for window in windows])
    stopped = np.concatenate([window.stopped for window in windows])
    return {
        "ours": limit_of(product_limit(seen, stopped), CUT_SHARE),
        "ignore_censoring": limit_of(product_limit(seen, np.zeros(len(seen), np.bool_)), CUT_SHARE),
    }


def _stream(windows: Sequence[Window]) -> Iterator[dict[str, object]]:
    """Windows in their order: each is reported with what was learned before it, then learned."""
    known: dict[str, Knowledge] = {}
    whole: list[Window] = []
    for window in windows:
        before = known.get(window.client)
        earlier = [each for each in whole if each.start_s < window.start_s][-POOLED_WINDOWS:]
        if before is not None and earlier:
            yield _client_outcome(window, {
                "ours": limits(before, cut_share=CUT_SHARE).of(0),
                "no_reset": _client_limits([each for each in whole if each.client == window.client])["ours"],
                "global": _client_limits(earlier)["ours"],
            }) | {"drifts": before.drifts}  # fmt: skip
        answers = LengthSamples(
            vectors=np.full((len(window.seen), 8), 45, np.int8), tokens=window.seen, stopped=window.stopped
        )
        known[window.client] = learned(before or _one_kind(), answers, seed=0)
        whole.append(window)


def _one_kind() -> Knowledge:
    """Nothing known, of prompts that are all alike."""
    nothing = nothing_known(8)
    where = Centres(unit(np.ones((1, 8), np.int8)), np.array([0.9]))
    return Knowledge(samples=nothing.samples, kinds=nothing.kinds, centres=where, charts=(Chart(),),
                     grouped_at=1 << 40)  # never due: there is nothing to group


def _client_outcome(window: Window, given: dict[str, Limit]) -> dict[str, object]:
    row: dict[str, object] = {"client": window.client, "window_s": window.start_s, "answers": len(window.tokens)}
    for method in CLIENT_COLUMNS:
        limit = given.get(method)
        over = window.tokens - limit if limit is not None else None
        row[f"{method}_cut"] = None if over is None else int((over > 0).sum())
        row[f"{method}_pinball"] = (
            None if over is None else float(np.where(over > 0, (1.0 - CUT_SHARE) * over, -CUT_SHARE * over).sum())
        )
    return {**row, "drifts": None}


def _client_row(rows: Sequence[dict[str, object]], method: str) -> dict[str, object]:
    answers = sum(int(str(row["answers"])) for row in rows)
    limited = [row for row in rows if row[f"{method}_cut"] is not None]
    columns = [name for name in CLIENT_COLUMNS if any(row[f"{name}_cut"] is not None for row in rows)]
    comparable = [row for row in rows if all(row[f"{name}_cut"] is not None for name in columns)]
    cut_share = sum(int(str(row[f"{method}_cut"])) for row in limited) / answers
    compared = sum(int(str(row["answers"])) for row in comparable)
    return {
        "method": method,
        "cut_share": cut_share,
        "cut_share_error": abs(cut_share - CUT_SHARE),
        "pinball": sum(float(str(row[f"{method}_pinball"])) for row in comparable) / max(1, compared),
        "limited_share": sum(int(str(row["answers"])) for row in limited) / answers,
    }


if __name__ == "__main__":
    main()
