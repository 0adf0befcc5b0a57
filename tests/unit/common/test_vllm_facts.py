"""vLLM's interface as data: flags check their values, metrics are those of the captured exposition."""

from __future__ import annotations

import pytest

from enova.v1 import cluster_pb2
from enova_common.vllm import (
    DEFAULTS,
    FLAGS,
    METRIC_ALIASES,
    METRICS,
    FinishReason,
    FlagKind,
    MetricKind,
    token_buckets,
)


def test_flags_are_spelt_as_on_the_command_line() -> None:
    assert FLAGS["max_num_seqs"].option == "--max-num-seqs"
    assert FLAGS["enable_prefix_caching"].negative_option == "--no-enable-prefix-caching"


def test_every_flag_has_a_default_and_each_default_is_allowed() -> None:
    assert set(DEFAULTS) == set(FLAGS)
    for name, value in DEFAULTS.items():
        assert value is None or FLAGS[name].problem(value) is None


def test_choices_belong_to_choice_flags_only() -> None:
    for flag in FLAGS.values():
        assert bool(flag.choices) == (flag.kind is FlagKind.CHOICE)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_num_seqs", 0, "between 1 and"),
        ("max_num_seqs", 2.5, "a whole number"),
        ("max_num_seqs", True, "a whole number"),
        ("max_num_seqs", "8", "a whole number"),
        ("gpu_memory_utilization", 1.5, "between 0.01 and 1"),
        ("gpu_memory_utilization", float("nan"), "between"),
        ("dtype", "int3", "one of auto, bfloat16"),
        ("enforce_eager", "yes", "true or false"),
        ("quantization", "--api-key", "does not start with a dash"),
        ("load_format", "", "a word"),
    ],
)
def test_a_wrong_value_is_told_in_words(name: str, value: object, words: str) -> None:
    problem = FLAGS[name].problem(value)
    assert problem is not None
    assert words in problem


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_num_seqs", 64), ("gpu_memory_utilization", 1), ("dtype", "bfloat16"), ("enforce_eager", False),
     ("quantization", "fp8"), ("seed", 0)],
)  # fmt: skip
def test_a_right_value_has_no_problem(name: str, value: object) -> None:
    assert FLAGS[name].problem(value) is None


def test_nothing_that_names_files_code_or_addresses_can_be_set() -> None:
    dangerous = {"middleware", "host", "port", "api_key", "chat_template", "trust_remote_code", "hf_token", "config",
                 "tool_parser_plugin", "worker_cls", "logits_processors", "download_dir", "ssl_keyfile"}  # fmt: skip
    assert not dangerous & set(FLAGS)


def test_token_buckets_go_up_to_the_context_length() -> None:
    assert token_buckets(2048) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
    assert token_buckets(100)[-1] == 100
    assert token_buckets(99)[-1] == 50
    assert token_buckets(1) == (1,)


def test_metric_names_are_unique_and_old_names_lead_to_them() -> None:
    names = [metric.series_name for metric in METRICS]
    assert len(names) == len(set(names))
    for old, new in METRIC_ALIASES.items():
        assert new in names
        assert old not in names


def test_buckets_rise_and_only_histograms_have_them() -> None:
    for metric in METRICS:
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert not metric.buckets or metric.kind is MetricKind.HISTOGRAM


def test_finish_reasons_are_the_labels_of_the_success_counter() -> None:
    success = next(metric for metric in METRICS if metric.name == "request_success")
    assert success.values == tuple(FinishReason)
    assert success.series_name == "vllm:request_success_total"


def test_the_api_s_configuration_carries_the_allowed_flags_and_no_others() -> None:
    assert set(cluster_pb2.Configuration.DESCRIPTOR.fields_by_name) == set(FLAGS)


def test_bounds_of_whole_numbers_are_written_as_such() -> None:
    assert FLAGS["max_model_len"].problem(0) == "must lie between 1 and 134217728, not 0"
    assert FLAGS["gpu_memory_utilization"].problem(2.0) == "must lie between 0.01 and 1, not 2.0"
