"""An operator describes a model that no reader knows in our own words, and is told which of them is wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from enova_recommender import catalog
from enova_recommender.shape import ShapeError, parse_shape, write_shape

OWN: dict[str, Any] = {
    "hidden_size": 4096, "vocabulary_size": 128256, "context_tokens": 131072, "extra_parameters": 4096,
    "blocks": [
        {
            "count": 32, "norm_parameters": 8192,
            "mixer": {"kind": "attention", "heads": 32, "kv_heads": 8, "head_dim": 128},
            "feed_forward": {"kind": "mlp", "intermediate_size": 14336},
        }
    ],
}  # fmt: skip


def test_a_described_model_is_the_one_that_its_config_describes() -> None:
    assert parse_shape(OWN, name="meta-llama/Llama-3.1-8B") == catalog.models()["meta-llama/Llama-3.1-8B"]


def test_every_shape_can_be_written_and_read_back() -> None:
    for name, shape in catalog.models().items():
        assert parse_shape(json.loads(json.dumps(write_shape(shape))), name=name) == shape


def change(path: str, value: object) -> Callable[[], dict[str, Any]]:
    """OWN with one value changed; `...` removes it."""

    def changed() -> dict[str, Any]:
        own = copy.deepcopy(OWN)
        *holders, last = path.split("/")
        inside: Any = own
        for key in holders:
            inside = inside[int(key)] if isinstance(inside, list) else inside[key]
        if value is ...:
            del inside[last]
        else:
            inside[int(last) if isinstance(inside, list) else last] = value
        return own

    return changed


@pytest.mark.parametrize(
    ("own", "field", "words"),
    [
        (change("blocks", []), "blocks", "is empty"),
        (change("blocks", None), "blocks", "is missing"),
        (change("blocks", 3), "blocks", "must be a list"),
        (change("hidden_size", ...), "hidden_size", "is missing"),
        (change("hidden_size", 0), "hidden_size", "at least 1"),
        (change("extra_parameters", -1), "extra_parameters", "at least 0"),
        (change("hiden_size", 3), "hiden_size", "is no key here"),
        (change("dtype", "int3"), "dtype", "is not known"),
        (change("quantization", "secret"), "quantization", "is not known"),
        (change("plain_parts", ["HEAD"]), "plain_parts", "'HEAD' is none of"),
        (change("tied_embeddings", "yes"), "tied_embeddings", "true or false"),
        (change("blocks/0/count", 20_000), "blocks", "20000 layers are more than 10000"),
        (change("blocks/0/count", ...), "blocks[0].count", "is missing"),
        (change("blocks/0/mixer/kind", "magic"), "blocks[0].mixer.kind", "attention, latent_attention, recurrence"),
        (change("blocks/0/mixer/kind", ...), "blocks[0].mixer.kind", "not None"),
        (change("blocks/0/mixer/heads", "x"), "blocks[0].mixer.heads", "whole number"),
        (change("blocks/0/mixer/window_tokens", 0), "blocks[0].mixer.window_tokens", "at least 1"),
        (change("blocks/0/mixer/rank", 3), "blocks[0].mixer.rank", "is no key here"),
        (change("blocks/0/feed_forward/kind", "attention"), "blocks[0].feed_forward.kind", "mlp, experts"),
        (change("blocks/0", {"count": 3}), "blocks[0].mixer", "so is feed_forward"),
    ],
)
def test_what_is_wrong_with_a_description_names_its_key(
    own: Callable[[], dict[str, Any]], field: str, words: str
) -> None:
    with pytest.raises(ShapeError, match=words) as caught:
        parse_shape(own(), name="m")
    assert caught.value.field == field
