"""How well max_num_seqs and the layout are chosen for a target of the time between tokens, on measured servers.

Cases are groups of measured settings (model x GPU x load) with a target that some of them meet and some do not. Ours is
the product's search, which is asked for a load without end: the cheapest then has the most requests a
second and GPU, and its max_num_seqs is what keeps the target in a full batch with the wanted chance. `cold`: it knows
the model's shape and the GPU's data sheet alone, by the constants that are shipped. `cold_taught`: also what a fleet
learns that serves the other model families of the same set on that type of GPU (leave one family out: the family at
hand teaches nothing). `after3`: as that, and three settings of the group, drawn by the seed, calibrate it; five seeds.
A choice that misses the target counts under violations alone; of the others the regret is 1 - tokens/s per GPU of the
choice / that of the best feasible setting; no answer is a regret of 1. The chance is the product's: 90 %, or 75 % or
50 % where nothing that was measured is that sure.

Assumed: prompt lengths of rec_mlenergy by task (`PROMPT_TOKENS`), output lengths are those of the group's load; expert
parallel over N GPUs with one data rank is attention split over N; max_num_batched_tokens is vLLM's default.

Raw results: `choices.csv.gz` with columns rule, set, gpu, group, target_ms, seed, settings, chosen (number of the
setting), chosen_sequences, chosen_gpus, step_ms, is_violation, regret (empty for violations), best_worth; and
`predictions.csv.gz`, by the shipped constants, with columns set, group, setting, sequences, gpus, predicted_ms, low_ms,
high_ms, measured_ms, predicted_tokens_per_s, measured_tokens_per_s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from enova_recommender.recommend.types import ASSURANCES
from enova_testing.benchmark import Benchmark, benchmark, wilson
from enova_testing.choice import (
    TARGETS_S,
    Group,
    Rule,
    default_rule,
    energy_groups,
    enova_007_rule,
    largest_rule,
    lengths,
    neighbour_rule,
    our_rules,
    predicted,
    silicon_groups,
)

SEEDS = 5                 # draws of three settings
FULL_SEEDS = 25

Row = dict[str, object]


def main() -> None:
    """Choose by every rule, judge, end in one JSON line."""
    bench = benchmark("recommender_choice", __doc__)
    unknown: set[str] = set()
    groups = [
        *energy_groups(bench.files("rec_mlenergy", "*.csv.gz"), unknown),
        *silicon_groups(bench.files("rec_silicon_concurrency", "*.csv.gz"), unknown),
    ]
    if unknown:
        bench.notes["left out"] = "not in the catalogue: " + ", ".join(sorted(unknown))
    cases = [(group, target) for group in groups for target in TARGETS_S if _is_case(group, target)]
    seeds = range(bench.seed, bench.seed + (FULL_SEEDS if bench.full else SEEDS))
    rules: list[tuple[str, int | None, Rule]] = [
        *our_rules(groups, seeds),
        ("vllm_default", None, default_rule), ("enova_007", None, enova_007_rule), ("largest", None, largest_rule),
    ]  # fmt: skip
    if len({group.family for group in groups}) > 1:
        rules.append(("nearest_neighbour", None, neighbour_rule(groups)))
    else:
        bench.notes["nearest_neighbour"] = "needs two families"
    rows = [_judged(name, seed, rule, group, target) for name, seed, rule in rules for group, target in cases]
    bench.write("choices", rows)
    bench.write("predictions", _predictions(groups))
    _report(bench, rows)


def _is_case(group: Group, target_s: float) -> bool:
    """Whether a target divides the group."""
    meets = [one.step_s <= target_s for one in group.settings]
    return any(meets) and not all(meets)


def _judged(name: str, seed: int | None, rule: Rule, group: Group, target_s: float) -> Row:
    """One choice and what it was worth."""
    best = max(one.worth for one in group.settings if one.step_s <= target_s)
    place = rule(group, target_s)
    chosen = None if place is None else group.settings[place]
    violates = chosen is not None and chosen.step_s > target_s
    regret = None if violates else 1.0 if chosen is None else 1 - chosen.worth / best
    return {
        "rule": name, "set": group.data_set, "gpu": group.settings[0].gpu.name, "group": group.name,
        "target_ms": 1000 * target_s, "seed": seed,
        "settings": len(group.settings), "chosen": place, "chosen_sequences": chosen.sequences if chosen else None,
        "chosen_gpus": chosen.parallelism.gpus if chosen else None, "step_ms": 1000 * chosen.step_s if chosen else None,
        "is_violation": int(violates), "regret": regret, "best_worth": best,
    }  # fmt: skip


def _predictions(groups: Sequence[Group]) -> Iterator[Row]:
    """What the step model expects of each setting, without any trial."""
    for group in groups:
        load = lengths(group)
        for place, one in enumerate(group.settings):
            found = predicted(one, load)
            yield {
                "set": group.data_set, "group": group.name, "setting": place, "sequences": one.sequences,
                "gpus": one.parallelism.gpus, "predicted_ms": 1000 * found.step_s.value,
                "low_ms": 1000 * found.step_s.low, "high_ms": 1000 * found.step_s.high,
                "measured_ms": 1000 * one.step_s, "predicted_tokens_per_s": found.tokens_per_s,
                "measured_tokens_per_s": one.tokens_per_s,
            }  # fmt: skip


def _figures(rows: Sequence[Row]) -> dict[str, object]:
    """The figures of one rule."""
    violations = sum(int(str(row["is_violation"])) for row in rows)
    regrets = np.array([float(str(row["regret"])) for row in rows if row["regret"] is not None])
    return {
        "violation_share": violations / len(rows) if rows else None,
        "violation_interval": wilson(violations, len(rows)),
        "regret_p50": float(np.quantile(regrets, 0.5)) if len(regrets) else None,
        "regret_p90": float(np.quantile(regrets, 0.9)) if len(regrets) else None,
        "cases": len({(row["group"], row["target_ms"]) for row in rows}),
        "choices": len(rows),
    }


def _report(bench: Benchmark, rows: Sequence[Row]) -> None:
    """The tables and the last line."""
    if not rows:
        bench.notes["cases"] = "no group has a target that some settings meet and some do not"
    names = list(dict.fromkeys(str(row["rule"]) for row in rows))
    by_rule = {name: _figures([row for row in rows if row["rule"] == name]) for name in names}
    by_set, by_gpu = (_split(rows, names, column) for column in ("set", "gpu"))
    for title, figures in (("all", by_rule), *by_set.items(), *by_gpu.items()):
        bench.table(title, [{"rule": name, **_flat(found)} for name, found in figures.items()])
    missing = _figures([])
    bench.end({
        **{name: by_rule.pop(name, missing) for name in ("cold", "cold_taught", "after3")}, "baselines": by_rule,
        "by_set": by_set, "by_gpu": by_gpu, "assurances": ASSURANCES,
    })  # fmt: skip


def _split(rows: Sequence[Row], names: Sequence[str], column: str) -> dict[str, dict[str, dict[str, object]]]:
    """The figures of all rules by the values of a column."""
    values = sorted({str(row[column]) for row in rows})
    return {
        value: {name: _figures([row for row in rows if row["rule"] == name and row[column] == value]) for name in names}
        for value in values
    }


def _flat(figures: dict[str, object]) -> dict[str, object]:
    interval = figures["violation_interval"]
    shown = "-" if not isinstance(interval, tuple) else f"{interval[0]:.3f} to {interval[1]:.3f}"
    return {**figures, "violation_interval": shown}


if __name__ == "__main__":
    main()
