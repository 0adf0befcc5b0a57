"""What does not fit is explained, and each change that is named makes it fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from enova_recommender import catalog
from enova_recommender.memory import Item, Lever, MemorySettings, fit_settings, why_not
from enova_recommender.types import Parallelism, Precision

SMALL = catalog.models()["meta-llama/Llama-3.1-8B-Instruct"]
LARGE = catalog.models()["meta-llama/Llama-3.1-70B-Instruct"]
HUGE = catalog.models()["meta-llama/Llama-3.1-405B-Instruct"]
GPUS = catalog.gpus()
ALL = tuple(GPUS.values())


def test_what_fits_has_no_reason() -> None:
    assert why_not(SMALL, MemorySettings(gpu=GPUS["H100"])) is None


def test_the_largest_item_and_what_is_missing_are_named() -> None:
    found = why_not(LARGE, MemorySettings(gpu=GPUS["H100"], parallelism=Parallelism(tensor=2)))
    assert found is not None
    assert found.largest is Item.WEIGHTS
    assert found.largest_bytes == found.fit.weight_bytes
    assert found.missing_bytes == found.fit.missing_bytes > 0
    assert f"{found.missing_bytes / 2**30:.1f} GiB are missing" in found.reason
    assert "max_model_len" in found.reason


def test_a_long_context_is_blamed_where_it_is_the_largest() -> None:
    shape = replace(SMALL, context_tokens=1 << 20)
    found = why_not(shape, MemorySettings(gpu=GPUS["H100"]))
    assert found is not None
    assert found.largest is Item.ONE_SEQUENCE


@pytest.mark.parametrize("gpu", ["L4", "A100-40G", "H100"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("shape", [SMALL, LARGE, HUGE])
def test_each_change_makes_it_fit(shape: object, gpu: str, tensor: int) -> None:
    assert shape in {SMALL, LARGE, HUGE}
    model = next(one for one in (SMALL, LARGE, HUGE) if one is shape)
    settings = MemorySettings(gpu=GPUS[gpu], parallelism=Parallelism(tensor=tensor))
    found = why_not(model, settings, gpus=ALL)
    if found is None:
        assert fit_settings(model, settings).fits
        return
    for change in found.changes:
        assert change.settings != settings
        assert fit_settings(model, change.settings).fits
        assert fit_settings(model, change.settings) == change.fit


def test_changes_turn_one_lever_by_as_little_as_helps() -> None:
    settings = MemorySettings(gpu=GPUS["L4"])
    found = why_not(SMALL, settings, gpus=ALL)
    assert found is not None
    by_lever = {change.lever: change for change in found.changes}
    length = by_lever[Lever.MAX_MODEL_LEN].settings.max_model_len
    assert length is not None
    longer = replace(settings, max_model_len=length + 1024)
    assert not fit_settings(SMALL, longer).fits
    smaller = [gpu for gpu in ALL if settings.gpu.memory_bytes < gpu.memory_bytes
               < by_lever[Lever.GPU].settings.gpu.memory_bytes]
    assert not any(fit_settings(SMALL, replace(settings, gpu=gpu)).fits for gpu in smaller)


def test_eight_bit_weights_are_not_offered_where_the_card_has_none() -> None:
    found = why_not(LARGE, MemorySettings(gpu=GPUS["A100-80G"], max_model_len=4096))
    assert found is not None
    assert not any(change.value == "fp8" for change in found.changes)
    assert any(change.lever is Lever.QUANTIZATION and change.value == "awq" for change in found.changes)


def test_quantised_weights_are_not_quantised_again() -> None:
    settings = MemorySettings(gpu=GPUS["L4"], precision=Precision(quantization="awq"))
    found = why_not(LARGE, settings)
    assert found is not None
    assert not any(change.lever is Lever.QUANTIZATION for change in found.changes)


def test_where_nothing_helps_that_is_said() -> None:
    found = why_not(HUGE, MemorySettings(gpu=GPUS["L4"]))
    assert found is not None
    assert found.changes == ()
    assert found.reason.endswith("no single change makes it fit")
