"""Shapes in our own words, for models that no reader knows: a JSON object with blocks, read and written.

    {"hidden_size": 4096, "vocabulary_size": 128256, "context_tokens": 131072, "dtype": "bfloat16", "blocks": [
      {"count": 32, "norm_parameters": 8192,
       "mixer": {"kind": "attention", "heads": 32, "kv_heads": 8, "head_dim": 128},
       "feed_forward": {"kind": "mlp", "intermediate_size": 14336}}]}

Every other key is a field of the value that the object describes; what has a default may be left out.
"""

from __future__ import annotations

import types as python_types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from functools import cache

from enova_recommender.shape.fields import LAYERS_MAX, Fields
from enova_recommender.types import (
    ELEMENT_BYTES,
    WEIGHT_FORMATS,
    Attention,
    Block,
    Experts,
    FeedForward,
    LatentAttention,
    Mixer,
    Mlp,
    ModelShape,
    Part,
    Recurrence,
)

_MIXERS: Mapping[str, type[Mixer]] = {
    "attention": Attention, "latent_attention": LatentAttention, "recurrence": Recurrence,
}  # fmt: skip
_FEED_FORWARDS: Mapping[str, type[FeedForward]] = {"mlp": Mlp, "experts": Experts}
_KIND_OF: Mapping[type, str] = {kind: name for name, kind in {**_MIXERS, **_FEED_FORWARDS}.items()}
_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "dtype": tuple(ELEMENT_BYTES), "quantization": tuple(WEIGHT_FORMATS), "kv_cache_dtype": tuple(ELEMENT_BYTES),
    "state_dtype": ("auto", *ELEMENT_BYTES),
}  # fmt: skip
# Keys that `write_shape`'s readers add, and that say nothing of the shape.
_BESIDE = frozenset({"name", "parameters", "weight_bytes"})


def is_own(config: Mapping[str, object]) -> bool:
    """Whether the object is a shape in our own words and no config.json."""
    return "blocks" in config and "model_type" not in config


def read_own(own: Fields, *, name: str) -> ModelShape:
    """The shape that the object describes."""
    sections = own.sections("blocks")
    if not sections:
        raise own.error("blocks", "is empty" if sections is not None else "is missing")
    plain = _checked(own, ModelShape, nested=("blocks", "plain_parts", "not_modelled"), beside=_BESIDE)
    shape = ModelShape(
        **{**plain, "name": name},
        blocks=tuple(_block(section) for section in sections),
        plain_parts=_parts(own),
        not_modelled=own.texts("not_modelled") or (),
    )
    if shape.layers > LAYERS_MAX:
        raise own.error("blocks", f"{shape.layers} layers are more than {LAYERS_MAX}")
    return shape


def write_shape(shape: ModelShape) -> dict[str, object]:
    """The object that `read_own` reads the same shape from."""
    written = asdict(shape)
    for block, values in zip(shape.blocks, written["blocks"], strict=True):
        for key, part in (("mixer", block.mixer), ("feed_forward", block.feed_forward)):
            if part is None:
                del values[key]
            else:
                values[key] = {"kind": _KIND_OF[type(part)], **values[key]}
    return written


def _block(section: Fields) -> Block:
    mixer, feed_forward = section.section("mixer"), section.section("feed_forward")
    if mixer is None and feed_forward is None:
        raise section.error("mixer", "is missing, and so is feed_forward")
    plain = _checked(section, Block, nested=("mixer", "feed_forward"))
    return Block(
        **plain,
        mixer=None if mixer is None else _part(mixer, _MIXERS),
        feed_forward=None if feed_forward is None else _part(feed_forward, _FEED_FORWARDS),
    )


_P = typing.TypeVar("_P")


def _part(section: Fields, kinds: Mapping[str, type[_P]]) -> _P:
    kind = section.text("kind")
    if kind is None or kind not in kinds:
        raise section.error("kind", f"must be one of {', '.join(kinds)}, not {kind!r}")
    made = kinds[kind]
    return made(**_checked(section, made, beside=frozenset({"kind"})))


def _parts(own: Fields) -> tuple[Part, ...]:
    names = own.texts("plain_parts") or ()
    for name in names:
        if name not in set(Part):
            raise own.error("plain_parts", f"{name!r} is none of {', '.join(Part)}")
    return tuple(Part(name) for name in names)


def _checked(
    section: Fields, kind: type, *, nested: tuple[str, ...] = (), beside: frozenset[str] = frozenset()
) -> dict[str, typing.Any]:
    """The section's values for the fields of `kind`, each of its type; unknown keys are blamed."""
    hints = _hints(kind)
    known = {field.name: field for field in fields(kind)}
    for key in section.values:
        if key not in known and key not in beside:
            raise section.error(key, f"is no key here; these are: {', '.join(known)}")
    values: dict[str, typing.Any] = {}
    for key, field in known.items():
        if key in nested or key in beside:
            continue
        if not section.has(key):
            if field.default is MISSING:
                if type(None) not in typing.get_args(hints[key]):
                    raise section.error(key, "is missing")
                values[key] = None
            continue
        least = 1 if field.default is MISSING or field.default is None else 0
        values[key] = _value(section, key, hints[key], least)
    return values


@cache
def _hints(kind: type) -> Mapping[str, object]:
    return typing.get_type_hints(kind)


def _value(section: Fields, key: str, hint: object, least: int) -> object:
    kinds = set(typing.get_args(hint)) if isinstance(hint, python_types.UnionType) else {hint}
    if bool in kinds:
        return section.flag(key)
    if int in kinds:
        return section.count(key, least=least)
    text = section.text(key)
    allowed = _ALLOWED.get(key)
    if allowed is not None and text not in allowed:
        raise section.error(key, f"{text!r} is not known; these are: {', '.join(allowed)}")
    return text
