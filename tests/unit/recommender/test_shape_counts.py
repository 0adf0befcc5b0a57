"""Parameters are counted exactly: as the hub shows of the checkpoints, and as the models' papers and cards have it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from enova_recommender import catalog
from enova_recommender.types import Attention, Block, Experts, ModelShape

# Elements of all tensors, as the Hugging Face hub shows them (safetensors.total of its model API).
HUB = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B-Instruct": 405_853_388_800,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": 480_154_875_392,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
    "bigscience/bloom": 176_247_271_424,
    "bigscience/bloom-7b1": 7_069_016_064,
    "deepseek-ai/DeepSeek-V2-Lite": 15_706_484_224,
    "deepseek-ai/DeepSeek-V2": 235_741_434_880,
    "deepseek-ai/deepseek-moe-16b-base": 16_375_728_128,
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": 8_888_227_328,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
    "ibm-granite/granite-4.0-h-small": 32_207_337_984,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "MiniMaxAI/MiniMax-M2": 228_689_764_864,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    # Published under another name with the very same layers, without the layer for multi-token prediction.
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 79_674_391_296,  # Qwen/Qwen3-Coder-Next
    "zai-org/GLM-4.5-Air": 106_852_251_264,              # PrimeIntellect/INTELLECT-3
    "deepseek-ai/DeepSeek-V3": 671_026_419_200,          # microsoft/MAI-DS-R1
}
# The hub's totals of checkpoints with one layer for multi-token prediction: a layer as the last kind of the others, a
# projection of two hidden vectors to one, three norms, and copies of embedding and head where they are its own.
HUB_WITH_MULTI_TOKEN_LAYER = {
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (81_324_862_720, 0),
    "zai-org/GLM-4.5": (358_337_791_296, 2),
    "zai-org/GLM-4.5-Air": (110_468_824_832, 2),
    "zai-org/GLM-5": (753_864_139_008, 0),
}
# The hub's totals of checkpoints that keep the rotary frequencies of each layer: half a head of them.
HUB_WITH_FREQUENCIES = {
    "meta-llama/Llama-2-7b-hf": 6_738_417_664,
    "meta-llama/Llama-2-13b-hf": 13_015_866_880,
    "meta-llama/Llama-2-70b-hf": 68_976_653_312,
}
# The hub's totals of vision-language models: models of a family share the tower.
HUB_WITH_TOWER = {
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-12b-it": 12_187_325_040,
    "google/gemma-3-27b-it": 27_432_406_640,
}
# Counted by instantiating the reference implementation (transformers 5.19) on the meta device.
REFERENCE = {
    "google/gemma-4-26B-A4B": 25_233_141_760,
    "google/gemma-4-31B-it": 30_697_345_280,
    "XiaomiMiMo/MiMo-V2-Flash": 308_778_780_864,
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": 549_308_993_536,
    "zai-org/GLM-5.2": 743_377_019_904,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "mistralai/Mistral-Large-Instruct-2407": 122_610_069_504,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen1.5-7B": 7_721_324_544,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-3-1b-it": 999_885_952,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/Phi-3.5-MoE-instruct": 41_873_153_344,
    "EleutherAI/gpt-neox-20b": 20_554_567_680,
    "EleutherAI/gpt-j-6b": 6_050_882_784,
    "bigcode/starcoder": 15_517_456_384,
    "bigcode/starcoder2-15b": 15_957_889_024,
    "facebook/opt-6.7b": 6_658_473_984,
    "ibm/mpt-7b-instruct2": 6_649_286_656,
    "openai-community/gpt2": 124_439_808,
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 31_577_940_288,
    "ai21labs/AI21-Jamba-1.5-Mini": 51_570_323_328,
    "allenai/OLMoE-1B-7B-0924": 6_919_161_856,
    "CohereForAI/c4ai-command-r-plus": 103_810_674_688,
    "ByteDance-Seed/Seed-OSS-36B-Instruct": 36_151_104_512,
    "01-ai/Yi-34B": 34_388_917_248,
    "openbmb/MiniCPM3-4B": 4_073_875_968,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3.5-27B": 26_895_998_464,
    "Qwen/Qwen3.5-397B-A17B": 396_346_350_336,
    "google/gemma-3-4b-it": 3_880_263_168,
    "google/gemma-3-12b-it": 11_766_034_176,
    "google/gemma-3-27b-it": 27_009_346_304,
    "tiiuae/falcon-7b": 6_921_720_704,
    "tiiuae/falcon-40b": 41_303_293_952,
    "Salesforce/codegen2-16B": 16_032_155_648,
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": 107_769_861_120,
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": 400_711_848_960,
    "deepseek-ai/DeepSeek-V3.2": 671_877_944_064,
    "moonshotai/Kimi-K2-Instruct": 1_026_408_232_448,
    "zai-org/GLM-4.5": 352_797_829_024,
    "zai-org/GLM-5": 743_911_218_432,
    "nvidia/Nemotron-H-56B-Base-8K": 56_324_350_464,
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16": 120_668_707_840,
    "nvidia/Minitron-8B-Base": 7_734_829_056,
    "zai-org/GLM-4.7-Flash": 29_943_393_920,
    "LGAI-EXAONE/EXAONE-4.0-32B": 32_003_216_384,
}
# Billions of total and active parameters as papers and model cards round them.
CARDS = {
    "mistralai/Mixtral-8x7B-v0.1": ("46.7", "12.9"),
    "mistralai/Mixtral-8x22B-v0.1": ("141", "39"),
    "Qwen/Qwen1.5-MoE-A2.7B": ("14.3", "2.7"),
    "Qwen/Qwen3-30B-A3B": ("30.5", "3.3"),
    "Qwen/Qwen3-235B-A22B": ("235", "22"),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": ("480", "35"),
    "Qwen/Qwen3.5-397B-A17B": ("396", "17"),
    "deepseek-ai/DeepSeek-V2-Lite": ("15.7", "2.4"),
    "deepseek-ai/DeepSeek-V2": ("236", "21"),
    "deepseek-ai/DeepSeek-V3": ("671", "37"),
    "moonshotai/Kimi-K2-Instruct": ("1026", "32"),
    "zai-org/GLM-4.5": ("353", "32"),
    "zai-org/GLM-4.5-Air": ("107", "12"),
    "zai-org/GLM-5": ("744", "40"),
    "openai/gpt-oss-120b": ("116.83", "5.13"),
    "openai/gpt-oss-20b": ("20.91", "3.61"),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": ("108", "17"),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": ("401", "17"),
    "MiniMaxAI/MiniMax-M2.5": ("229", "10"),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ("31.6", "3.2"),
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16": ("121", "12"),
    "allenai/OLMoE-1B-7B-0924": ("6.9", "1.3"),
    "ai21labs/AI21-Jamba-1.5-Mini": ("52", "12"),
    "microsoft/Phi-3.5-MoE-instruct": ("41.9", "6.6"),
    "google/gemma-4-26B-A4B": ("25.2", "3.8"),
    "XiaomiMiMo/MiMo-V2-Flash": ("309", "15"),
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": ("549", "55"),
    "Deci/DeciLM-7B": ("7.04", "7.04"),
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1": ("49.9", "49.9"),
}


@pytest.mark.parametrize(("name", "parameters"), [*HUB.items(), *REFERENCE.items()])
def test_parameters_are_those_of_the_published_checkpoint(name: str, parameters: int) -> None:
    assert catalog.models()[name].parameters == parameters


@pytest.mark.parametrize("name", HUB_WITH_MULTI_TOKEN_LAYER)
def test_what_a_checkpoint_has_beyond_is_its_layer_for_multi_token_prediction(name: str) -> None:
    shape = catalog.models()[name]
    total, copies = HUB_WITH_MULTI_TOKEN_LAYER[name]
    hidden, last = shape.hidden_size, shape.blocks[-1]
    layer = _parameters(shape, replace(last, count=1)) + 2 * hidden * hidden + 3 * hidden
    assert total == shape.parameters + layer + copies * shape.embedding_parameters


@pytest.mark.parametrize("name", HUB_WITH_FREQUENCIES)
def test_what_a_checkpoint_has_beyond_is_its_rotary_frequencies(name: str) -> None:
    shape = catalog.models()[name]
    ((layers, mixer),) = shape.attention_layers
    assert isinstance(mixer, Attention)
    assert HUB_WITH_FREQUENCIES[name] == shape.parameters + layers * mixer.head_dim // 2


def test_what_vision_language_models_have_beyond_is_one_tower_and_a_projector_of_its_width() -> None:
    shapes = [catalog.models()[name] for name in HUB_WITH_TOWER]
    tower_width = 1152
    beyond = {HUB_WITH_TOWER[s.name] - s.parameters - tower_width * s.hidden_size for s in shapes}
    assert beyond == {416_867_184}
    assert all(shape.not_modelled == ("vision tower",) for shape in shapes)


def _parameters(shape: ModelShape, block: Block) -> int:
    """Parameters of a block alone."""
    alone = replace(shape, blocks=(block,), extra_parameters=0)
    return alone.parameters - alone.embedding_parameters * (1 if alone.tied_embeddings else 2)


@pytest.mark.parametrize("name", CARDS)
def test_total_and_active_parameters_round_to_what_the_card_says(name: str) -> None:
    shape = catalog.models()[name]
    total, active = CARDS[name]
    assert abs(shape.parameters / 1e9 - float(total)) <= _half_a_unit(total)
    # Cards count embedding and head, one of them, or none.
    embedding = shape.embedding_parameters / 1e9
    low = shape.active_parameters / 1e9 - (1 if shape.tied_embeddings else 2) * embedding
    assert low - _half_a_unit(active) <= float(active) <= shape.active_parameters / 1e9 + _half_a_unit(active)


def _half_a_unit(text: str) -> float:
    return 0.5001 * 10.0 ** -len(text.partition(".")[2])


def test_every_mixture_of_the_catalogue_is_sparse_and_every_other_is_dense() -> None:
    for shape in catalog.models().values():
        has_experts = any(isinstance(block.feed_forward, Experts) for block in shape.blocks)
        assert (shape.active_parameters < shape.parameters) is has_experts, shape.name


def test_the_parts_of_a_model_add_up_to_its_matrices() -> None:
    for shape in catalog.models().values():
        assert sum(shape.part_parameters.values()) == shape.linear_parameters, shape.name
        assert 0 < shape.quantized_parameters <= shape.linear_parameters, shape.name
