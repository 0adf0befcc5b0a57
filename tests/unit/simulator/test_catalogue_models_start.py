"""The simulated engine starts every family of models that the catalogue knows, on GPUs that are large enough."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from enova_recommender import catalog
from enova_recommender.types import Batch
from enova_simulator.engine.command_line import parse_options
from enova_simulator.engine.model import StartRefused, load

GPUS = 8


def one_of_each_family() -> Iterator[str]:
    """The first model of the catalogue of each type."""
    seen: set[object] = set()
    for name, config in catalog.model_configs().items():
        if config["model_type"] not in seen:
            seen.add(config["model_type"])
            yield name


@pytest.mark.parametrize("name", list(one_of_each_family()))
def test_a_model_of_each_family_starts_and_takes_time_for_its_steps(name: str) -> None:
    shape = catalog.models()[name]
    size = next(size for size in (8, 4, 2, 1) if shape.attention_heads % size == 0)
    words = ["serve", name, "--simulated-gpu", "B300", "--tensor-parallel-size", str(size), "--max-model-len", "1024"]
    served = load(parse_options(words), {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(GPUS)))})
    assert served.limits.num_blocks > 0
    few, many = (
        served.times.step_s(Batch(decode_sequences=n, context_tokens=n * 1000)) for n in (1, served.limits.max_num_seqs)
    )
    assert 0 < few < many


def test_a_model_too_large_for_one_gpu_is_refused_as_vllm_would() -> None:
    words = ["serve", "moonshotai/Kimi-K2.5", "--simulated-gpu", "H100", "--max-model-len", "1024"]
    with pytest.raises(StartRefused, match="CUDA out of memory"):
        load(parse_options(words), {"CUDA_VISIBLE_DEVICES": "0"})
