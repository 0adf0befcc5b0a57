"""Every number of an explanation is a field of the answer: each sentence is filled in again, from the JSON alone."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest

from enova_common.vllm import FLAGS
from enova_recommender.recommend.explain import figure, seconds
from enova_recommender.recommend.respond import Problem, respond

PLACE = re.compile(r"\{([^}|]+)(?:\|(\w+))?\}")
SMALL = "meta-llama/Llama-3.1-8B-Instruct"
LARGE = "meta-llama/Llama-3.1-70B-Instruct"
BOTH = [{"type": "H100", "count": 8}, {"type": "L40S", "count": 16}]
LENGTHS = {"prompt_tokens": {"p50": 512, "p95": 1024}, "output_tokens": {"p50": 64, "p95": 128}}
ONE = {"prompt_tokens": {"p50": 300}, "output_tokens": {"p50": 40}}
CASES: dict[str, dict[str, Any]] = {
    "cheapest of two types": {
        "model": SMALL, "gpus": BOTH, "workload": {"requests_per_s": 5, **LENGTHS},
        "objectives": {"ttft_s": 0.5, "tpot_s": 0.05}, "deployable": True,
    },
    "verified by the scheduler": {
        "model": SMALL, "gpus": [{"type": "H100", "count": 1}], "workload": {"requests_per_s": 2, **ONE},
        "objectives": {"ttft_s": 0.5, "tpot_s": 0.05},
    },
    "more than all together carry": {
        "model": SMALL, "gpus": [{"type": "H100", "count": 1}, {"type": "L40S", "count": 2}],
        "workload": {"requests_per_s": 2000, **ONE}, "objectives": {"tpot_s": 0.05},
    },
    "without objectives": {
        "model": LARGE, "gpus": [{"type": "H100", "count": 8}], "workload": {"requests_per_s": 1, **LENGTHS},
        "deployable": True,
    },
    "too few GPUs": {
        "model": SMALL, "gpus": [{"type": "H100", "count": 2}], "workload": {"requests_per_s": 5000, **LENGTHS},
        "objectives": {"tpot_s": 0.05}, "deployable": True,
    },
    "too little memory": {
        "model": LARGE, "gpus": [{"type": "L40S", "count": 1}], "workload": {"requests_per_s": 1, **LENGTHS},
        "deployable": True,
    },
    "an objective that only wide layouts meet": {
        "model": LARGE, "gpus": [{"type": "H100", "count": 8}], "workload": {"requests_per_s": 1, **LENGTHS},
        "objectives": {"tpot_s": 0.02}, "deployable": True,
    },
    "an objective that nothing keeps for sure": {
        "model": SMALL, "gpus": [{"type": "H100", "count": 1}], "workload": {"requests_per_s": 1, **ONE},
        "objectives": {"tpot_s": 0.008}, "deployable": True,
    },
}  # fmt: skip


@cache
def answered(name: str) -> dict[str, Any]:
    """The answer as a reader of JSON has it."""
    found = respond(CASES[name])
    assert not isinstance(found, Problem), found
    answer: dict[str, Any] = json.loads(json.dumps(found))
    return answer


def field(answer: Any, path: str) -> Any:
    """What stands at a path, by nothing but the JSON."""
    for step in path.split("."):
        answer = answer[int(step)] if isinstance(answer, list) else answer[step]
    return answer


def shown_value(text: str) -> float:
    """The value of a figure as it is shown, in the unit of its field."""
    number = float(re.sub(r"[^0-9.]", "", text))
    return number / 1000 if text.endswith(" ms") else number / 100 if text.endswith(" %") else number


def pattern(template: str, answer: dict[str, Any]) -> str:
    """A sentence with its words from the answer, and a group for each of its figures."""
    parts = PLACE.split(template)
    found = re.escape(parts[0])
    for path, form, rest in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        found += ("(.+?)" if form else re.escape(field(answer, path))) + re.escape(rest)
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_every_sentence_is_recomputed_from_the_json(name: str) -> None:
    answer = answered(name)
    assert answer["explanation"]
    for sentence in answer["explanation"]:
        text, template = sentence["text"], sentence["template"]
        assert not re.search(r"\d", PLACE.sub("", template)), f"a number of its own: {template}"
        shown = re.fullmatch(pattern(template, answer), text)
        assert shown is not None, (text, template)
        formed = [(path, form) for path, form in PLACE.findall(template) if form]
        for (path, _), part in zip(formed, shown.groups(), strict=True):
            value = field(answer, path)
            assert shown_value(part) == pytest.approx(value, rel=6e-3, abs=5.1e-3), (path, part, value)


@pytest.mark.parametrize("name", CASES)
def test_figures_that_belong_together_agree(name: str) -> None:
    answer = answered(name)
    for candidate in [answer.get("chosen"), *answer["runners_up"], *answer["pareto"]]:
        if candidate is None or "prediction" not in candidate:
            continue
        prediction = candidate["prediction"]
        assert candidate["gpus"] == candidate["replicas"] * candidate["gpus_per_replica"]
        assert candidate["capacity_rps"] == pytest.approx(candidate["replicas"] * prediction["capacity_rps"]["value"])
        for interval in (prediction[key] for key in ("ttft_s", "tpot_s", "capacity_rps") if key in prediction):
            assert interval["low"] <= interval["value"] <= interval["high"]
    assert sum(each["count"] for each in answer["rejected"]) + ("chosen" in answer) == answer["evaluated"]


@pytest.mark.parametrize("name", CASES)
def test_what_is_advised_are_flags_that_vllm_has(name: str) -> None:
    answer = answered(name)
    for candidate in [answer.get("chosen"), *answer["runners_up"], *answer["pareto"]]:
        for flag, value in (candidate or {"configuration": {}})["configuration"].items():
            assert FLAGS[flag].problem(value) is None, (flag, value)


def test_the_chosen_one_meets_the_objectives_and_carries_the_rate() -> None:
    answer = answered("cheapest of two types")
    prediction = answer["chosen"]["prediction"]
    assert prediction["ttft_s"]["high"] <= 0.5
    assert prediction["tpot_s"]["high"] <= 0.05
    assert prediction["capacity_rps"]["low"] * answer["chosen"]["replicas"] >= 5
    assert all(each["cost_per_hour"] >= answer["chosen"]["cost_per_hour"] for each in answer["runners_up"][:1])


def test_what_one_more_replica_buys_is_a_replica() -> None:
    answer = answered("cheapest of two types")
    chosen, more = answer["chosen"], answer["sensitivities"][0]
    each = chosen["cost_per_hour"] / chosen["replicas"]
    assert more["cost_per_hour"] == pytest.approx(chosen["cost_per_hour"] + each)
    assert more["capacity_rps"] == pytest.approx(answer["capacity_rps"] * (1 + 1 / chosen["replicas"]))


def test_looser_wishes_never_buy_less() -> None:
    answer = answered("verified by the scheduler")
    assert len(answer["sensitivities"]) == 4
    for each in answer["sensitivities"]:
        cheaper = each["cost_per_hour"] < answer["chosen"]["cost_per_hour"]
        assert cheaper or each["capacity_rps"] >= answer["capacity_rps"]


def test_what_cannot_be_carried_says_what_is_missing_and_what_would_do() -> None:
    answer = answered("too few GPUs")
    assert "chosen" not in answer
    assert "the number of GPUs" in answer["explanation"][0]["text"]
    assert answer["sensitivities"][0]["capacity_rps"] >= 5000


def test_all_together_carry_what_they_can_and_what_is_missing_is_counted() -> None:
    mix = answered("more than all together carry")["mix"]
    assert {(each["gpu_type"], each["gpus"]) for each in mix["parts"]} == {("H100", 1), ("L40S", 2)}
    assert sum(each["weight"] for each in mix["parts"]) == pytest.approx(1)
    assert mix["cost_per_hour"] == pytest.approx(sum(each["cost_per_hour"] for each in mix["parts"]))
    assured = sum(each["replicas"] * each["prediction"]["capacity_rps"]["low"] for each in mix["parts"])
    assert mix["carried_rps"] == pytest.approx(assured)
    assert assured < 2000
    assert sum(each["count"] for each in mix["missing"]) > 0


def test_one_configuration_that_does_as_well_is_not_mixed() -> None:
    assert "mix" not in answered("verified by the scheduler")


def test_what_does_not_fit_names_memory() -> None:
    answer = answered("too little memory")
    assert "chosen" not in answer
    assert "memory" in answer["explanation"][0]["text"]
    assert answer["runners_up"][0]["constraint"] == "MEMORY"


def test_a_deployment_gets_one_data_parallel_rank_and_the_published_cache() -> None:
    for candidate in answered("without objectives")["pareto"]:
        assert not {"data_parallel_size", "kv_cache_dtype"} & set(candidate["configuration"])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0123456, "0.0123"), (1.5, "1.5"), (12345.6, "12346"), (250, "250"), (99.96, "100")],
)
def test_figures_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert figure(value) == text


def test_durations_below_a_second_are_milliseconds() -> None:
    assert [seconds(value) for value in (0.0005, 0.25, 1.0, 12.34)] == ["0.5 ms", "250 ms", "1 s", "12.3 s"]


def test_a_chance_below_the_usual_one_is_said_and_the_usual_one_is_not() -> None:
    told = {name: any("kept" in each["text"] for each in answered(name)["explanation"]) for name in CASES}
    assert [name for name, is_told in told.items() if is_told] == ["an objective that nothing keeps for sure"]


def test_what_runs_is_judged_with_the_chance_of_the_advice() -> None:
    name = "an objective that nothing keeps for sure"
    running = {"gpu_type": "H100", "configuration": answered(name)["chosen"]["configuration"]}
    found = respond({**CASES[name], "current": running})
    assert not isinstance(found, Problem), found
    current: Any = found["current"]
    assert current["replicas"] == 1
    assert current["cost_per_hour"] == answered(name)["chosen"]["cost_per_hour"]
