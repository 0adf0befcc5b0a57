"""Rules of the benchmark of choices: `cold` knows the model and the GPU alone, the others what they say."""

from __future__ import annotations

from dataclasses import replace

from enova_recommender import catalog
from enova_recommender.types import Parallelism, Precision
from enova_testing.choice import Group, Rule, Setting, lengths, our_rules, predicted

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
    load = lengths(group)
    steps = [slower * predicted(one, load).step_s.value for one in settings]
    return replace(group, settings=tuple(
        replace(one, step_s=step, tokens_per_s=one.sequences / step)
        for one, step in zip(settings, steps, strict=True)
    ))  # fmt: skip


def rules(*, others: float, own: float = 1.0) -> dict[str, Rule]:
    groups = [measured(MODELS[0], slower=own), *(measured(name, slower=others) for name in MODELS[1:])]
    return {name: rule for name, _, rule in our_rules(groups, seeds=(1000,))}


def sequences(rule: Rule, asked: Group, target_s: float = TARGET_S) -> int:
    place = rule(asked, target_s)
    return 0 if place is None else asked.settings[place].sequences


def test_cold_learns_nothing_from_other_families_and_taught_does() -> None:
    asked = measured(MODELS[0], slower=1.0)
    as_said, slow = rules(others=1.0), rules(others=2.5)
    assert sequences(slow["cold"], asked) == sequences(as_said["cold"], asked) > 0
    assert sequences(slow["cold_taught"], asked) < sequences(as_said["cold_taught"], asked)


def test_a_family_teaches_nothing_to_itself() -> None:
    asked = measured(MODELS[0], slower=2.5)
    assert sequences(rules(others=1.0, own=2.5)["cold_taught"], asked) == sequences(
        rules(others=1.0, own=1.0)["cold_taught"], asked
    )


def test_three_trials_are_bolder_than_none_where_the_model_is_right_and_shyer_where_it_is_slow() -> None:
    right, slow = measured(MODELS[0], slower=1.0), measured(MODELS[0], slower=1.8)
    known, cold = rules(others=1.0), rules(others=1.0)["cold"]
    assert sequences(known["after3"], right) >= sequences(cold, right)
    tried = rules(others=1.0, own=1.8)["after3"]
    assert sequences(tried, slow) <= sequences(known["after3"], right)
    place = tried(slow, 0.06)
    assert place is not None
    assert slow.settings[place].step_s <= 0.06


def test_ours_are_named_by_what_they_know() -> None:
    assert list(rules(others=1.0)) == ["cold", "cold_taught", "after3"]
