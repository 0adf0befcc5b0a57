"""A request for advice is read strictly: what is wrong is refused with its field, what is right means what it says."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from enova_recommender.recommend.request import (
    RequestError,
    percentile_lengths,
    request_from_plain,
    settings_of_flags,
    thinned,
)
from enova_recommender.recommend.types import LENGTHS_MAX
from enova_testing.advice import model

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
GOOD: dict[str, Any] = {
    "model": MODEL,
    "gpus": [{"type": "H100", "count": 8}],
    "workload": {"requests_per_s": 5, "prompt_tokens": {"p50": 512, "p95": 2048}, "output_tokens": {"p50": 128}},
}
CONFIG = {
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
OWN = {
    "type": "Own", "count": 6, "gpus_per_node": 4, "price_per_hour": 0.5, "memory_bytes": 48 << 30,
    "bandwidth_bytes_per_s": 1e12, "bf16_flops": 2e14, "link_bytes_per_s": 3e10,
}  # fmt: skip


def workload(**fields: Any) -> dict[str, Any]:
    return {"workload": GOOD["workload"] | fields}


def supply(**fields: Any) -> dict[str, Any]:
    return {"gpus": [{"type": "H100", "count": 8} | fields]}


def without(name: str) -> dict[str, Any]:
    return {"gpus": [{key: value for key, value in OWN.items() if key != name}]}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"modell": "x"}, "modell"),
        ({"model": ""}, "model"),
        ({"model": "nobody/knows"}, "model"),
        ({"config_json": "{"}, "config_json"),
        ({"config_json": "[]"}, "config_json"),
        ({"config_json": json.dumps(CONFIG | {"num_hidden_layers": None})}, "config_json.num_hidden_layers"),
        ({"config_json": json.dumps(CONFIG | {"num_attention_heads": 0})}, "config_json.num_attention_heads"),
        ({"gpus": []}, "gpus"),
        ({"gpus": "H100"}, "gpus"),
        ({"gpus": ["H100"]}, "gpus[0]"),
        (supply(type=""), "gpus[0].type"),
        (supply(type="H1000"), "gpus[0].type"),
        (supply(count=0), "gpus[0].count"),
        (supply(count=-2), "gpus[0].count"),
        (supply(count=True), "gpus[0].count"),
        (supply(price_per_hour=0), "gpus[0].price_per_hour"),
        (supply(price_per_hour=-1), "gpus[0].price_per_hour"),
        (supply(colour="red"), "gpus[0].colour"),
        (without("price_per_hour"), "gpus[0].price_per_hour"),
        (without("bandwidth_bytes_per_s"), "gpus[0].bandwidth_bytes_per_s"),
        (without("memory_bytes"), "gpus[0].memory_bytes"),
        ({"workload": {}}, "workload.requests_per_s"),
        (workload(requests_per_s=0), "workload.requests_per_s"),
        (workload(requests_per_s=-5), "workload.requests_per_s"),
        (workload(requests_per_s=float("nan")), "workload.requests_per_s"),
        (workload(requests_per_s="5"), "workload.requests_per_s"),
        (workload(arrival_cv=-1), "workload.arrival_cv"),
        (workload(cached_prefix_share=1.5), "workload.cached_prefix_share"),
        (workload(prompt_tokens={"p50": 512, "p95": 100}), "workload.prompt_tokens.p95"),
        (workload(prompt_tokens={"p50": 1, "p95": 1e300}), "workload.prompt_tokens.p95"),
        (workload(prompt_tokens={"p95": 100}), "workload.prompt_tokens.p50"),
        (workload(prompt_tokens={"p50": 200_000}), "workload.prompt_tokens.p50"),
        (workload(lengths=[{"prompt_tokens": 1, "output_tokens": 1}]), "workload.lengths"),
        ({"workload": {"requests_per_s": 1}}, "workload.lengths"),
        ({"workload": {"requests_per_s": 1, "lengths": [{"prompt_tokens": 5}]}}, "workload.lengths[0].output_tokens"),
        ({"objectives": {"ttft_s": 0}}, "objectives.ttft_s"),
        ({"objectives": {"tpot_s": -0.1}}, "objectives.tpot_s"),
        ({"objectives": {"percentile": 95}}, "objectives.percentile"),
        ({"max_gpus": 0}, "max_gpus"),
        ({"kv_cache_dtypes": ["int3"]}, "kv_cache_dtypes[0]"),
        ({"current": {"gpu_type": "nothing", "configuration": {}}}, "current.gpu_type"),
    ],
)
def test_what_is_wrong_is_refused_with_its_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        request_from_plain(GOOD | changes)
    assert caught.value.field == field
    assert caught.value.message


def test_a_likely_name_is_offered() -> None:
    with pytest.raises(RequestError) as caught:
        request_from_plain(GOOD | {"workloads": {}})
    assert "workload" in caught.value.remedy


def test_a_catalogued_gpu_has_its_price_unless_another_is_given() -> None:
    listed = request_from_plain(GOOD).nodes[0].gpu
    given = request_from_plain(GOOD | supply(price_per_hour=1.25)).nodes[0].gpu
    assert listed.price_per_hour
    assert given.price_per_hour == 1.25
    assert given.memory_bytes == listed.memory_bytes


def test_a_described_gpu_is_cut_into_nodes_of_its_own_size() -> None:
    nodes = request_from_plain(GOOD | {"gpus": [OWN]}).nodes
    assert [(node.gpu.name, node.gpus, node.island_gpus) for node in nodes] == [("Own", 4, 4), ("Own", 2, 2)]
    assert nodes[0].gpu.memory_bytes == 48 << 30


def test_a_config_wins_over_the_catalogue() -> None:
    shape = request_from_plain(GOOD | {"config_json": json.dumps(CONFIG)}).shape
    assert (shape.name, shape.layers) == (MODEL, 16)


def test_lengths_by_percentiles_have_these_percentiles_and_are_independent() -> None:
    prompts, outputs = np.array(percentile_lengths((512, 2048), (128, 400))).T
    assert np.percentile(prompts, [50, 95]) == pytest.approx([512, 2048], rel=0.02)
    assert np.percentile(outputs, [50, 95]) == pytest.approx([128, 400], rel=0.02)
    assert abs(np.corrcoef(np.argsort(np.argsort(prompts)), np.argsort(np.argsort(outputs)))[0, 1]) < 0.1


def test_equal_lengths_are_one_pair() -> None:
    assert percentile_lengths((512, 512), (128, 128)) == ((512, 128),)


def test_a_tail_is_cut_to_the_context() -> None:
    plain = GOOD | workload(prompt_tokens={"p50": 60_000, "p95": 120_000})
    request = request_from_plain(plain)
    assert max(map(sum, request.workload.lengths)) == request.shape.context_tokens


def test_many_pairs_are_thinned_evenly() -> None:
    pairs = [(index + 1, 1) for index in range(3 * LENGTHS_MAX)]
    kept = thinned(pairs)
    assert len(kept) == LENGTHS_MAX
    assert kept[:3] == ((1, 1), (4, 1), (7, 1))


def test_flags_that_are_not_given_are_vllms_own() -> None:
    h100, l40s = (request_from_plain(GOOD | supply(type=name)).nodes[0].gpu for name in ("H100", "L40S"))
    large = settings_of_flags(h100, {"tensor_parallel_size": 2}, model())
    small = settings_of_flags(l40s, {}, model())
    assert (large.parallelism.tensor, large.max_num_seqs, large.max_num_batched_tokens) == (2, 1024, 8192)
    assert (small.max_num_seqs, small.max_num_batched_tokens) == (256, 2048)
    assert small.max_model_len == model().context_tokens
