"""Rules of the benchmark of choices: `cold` knows the model and the GPU alone, the others what they say."""

from __future__ import annotations

from dataclasses import replace

from enova_recommender import catalog
from enova_recommender.types import Parallelism, Precision
from enova_testing.choice import Group, Rule, Setting, Taught, lengths, our_rules, predicted, step_times

MODELS = ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-32B-Instruct", "meta-llama/Llama-3.1-70B-Instruct")
TARGET_S = 0.03


def measured(name: str, *, slower: float) -> Group:
    """Settings of one model that take so much longer than the shipped model says."""
    settings = tuple(
        Setting(
            shape=catalog.models()[name], gpu=catalog.gpus()["H100"], parallelism=Parallelism(tensor=4),
            precision=Precision(), sequences=count, prompt_tokens=500, output_tokens=300, step_s=1.0,
            tokens_per_s=float(count), is_median=True,
        )
        for count in (8, 32, 64, 128, 256, 512)
    )  # fmt: skip
    group = Group(data_set="made", name=name, settings=settings)
    steps = [predicted(one, step_times(one), lengths(group)).step_s.value for one in settings]
    return replace(group, settings=tuple(
        replace(one, step_s=slower * step, tokens_per_s=one.sequences / (slower * step))
        for one, step in zip(settings, steps, strict=True)
    ))  # fmt: skip


def rules(*, others: float) -> dict[str, Rule]:
    groups = [measured(MODELS[0], slower=1.0), *(measured(name, slower=others) for name in MODELS[1:])]
    return {name: rule for name, _, rule in our_rules(Taught(groups), seeds=(1000,))}


def test_cold_learns_nothing_from_other_families_and_taught_does() -> None:
    asked = measured(MODELS[0], slower=1.0)
    as_said, slow = rules(others=1.0), rules(others=2.5)
    assert slow["cold"](asked, TARGET_S) == as_said["cold"](asked, TARGET_S)
    taught, before = slow["cold_taught"](asked, TARGET_S), as_said["cold_taught"](asked, TARGET_S)
    assert taught is not None
    assert before is not None
    assert asked.settings[taught].sequences < asked.settings[before].sequences


def test_ours_are_named_by_what_they_know() -> None:
    assert list(rules(others=1.0)) == ["cold", "cold_taught", "after3"]
