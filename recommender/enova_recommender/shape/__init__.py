"""Reads a model's shape out of the `config.json` that lies beside its weights.

Theory of operation. `parse_shape` finds the section that describes the language model (vision-language models nest
it), picks the reader of its `model_type`, and adds what all families share: vocabulary, context, element types,
quantisation. Families that differ in switches only are rows of tables (`dense`, `experts`); others have a reader.
Counts of parameters are exact: biases and norms are counted too.
"""

from __future__ import annotations

from collections.abc import Mapping

from enova_recommender.shape import dense, experts, hybrid, latent, varied
from enova_recommender.shape.body import Body
from enova_recommender.shape.fields import Fields, ShapeError
from enova_recommender.shape.nesting import Language, find_language
from enova_recommender.shape.own import is_own, read_own, write_shape
from enova_recommender.shape.parts import CONTEXT
from enova_recommender.shape.quantization import read_quantization
from enova_recommender.types import ELEMENT_BYTES, ModelShape

__all__ = ["FAMILIES", "ShapeError", "parse_shape", "write_shape"]

_READERS = {**dense.READERS, **experts.READERS, **latent.READERS, **hybrid.READERS, **varied.READERS}
FAMILIES = tuple(sorted(_READERS))
# Model types that another one's reader reads as well: the same layers under a name of their own.
_SAME_AS = {
    "gemma3": "gemma3_text", "llama4": "llama4_text", "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2",
    "qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen2_5_omni_text": "qwen2", "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text", "gemma4": "gemma4_text", "deepseek_vl_v2": "deepseek_v2", "axk1": "deepseek_v3",
}  # fmt: skip
# Keys of parts that a family without them cannot have: config.json contradicts itself.
_FOREIGN = {"num_local_experts": experts.READERS, "n_routed_experts": experts.READERS, "kv_lora_rank": latent.READERS}
_MULTI_TOKEN = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
# Types of rotary scaling that stretch the context beyond what config.json states.
_STRETCHING = frozenset({"linear", "dynamic"})


def parse_shape(config: Mapping[str, object], *, name: str) -> ModelShape:
    """The shape of the model `name` from its parsed config.json; ShapeError names what is wrong or not modelled.

    Also reads a shape in our own words (`own`), for models of families that have no reader.
    """
    outer = Fields(config)
    if is_own(config):
        return read_own(outer, name=name)
    language = find_language(outer)
    inner = language.fields
    model_type = _model_type(inner)
    body = _READERS[model_type](inner)
    quantization = read_quantization(outer, inner, body.blocks)
    return ModelShape(
        name=name,
        hidden_size=body.hidden_size,
        vocabulary_size=inner.count("vocab_size"),
        context_tokens=_context_tokens(inner, model_type),
        blocks=body.blocks,
        tied_embeddings=_tied(outer, inner, body),
        dtype=_dtype(outer, inner),
        quantization=quantization.method,
        plain_parts=quantization.plain_parts,
        kv_cache_dtype=quantization.kv_cache_dtype,
        extra_parameters=body.extra_parameters,
        not_modelled=_not_modelled(language, body),
    )


def _model_type(fields: Fields) -> str:
    said = fields.text("model_type")
    if said is None:
        raise fields.error("model_type", "is missing")
    model_type = _SAME_AS.get(said, said)
    if model_type not in _READERS:
        if fields.flag("is_encoder_decoder") or fields.has("encoder"):
            raise fields.error("model_type", f"{said!r} is an encoder-decoder, which is not modelled")
        raise fields.error("model_type", f"{said!r} is not modelled; these are: {', '.join(FAMILIES)}")
    if model_type in dense.READERS:
        for key in _FOREIGN:
            value = fields.get(key)
            if isinstance(value, int) and value > 1:
                raise fields.error(key, f"is {value}, but model_type {said!r} has no such part")
    return model_type


def _context_tokens(fields: Fields, model_type: str) -> int:
    """The longest context: what is stated, stretched by those rotary scalings that mean it so."""
    stated = fields.count(*CONTEXT, default=2048)
    scaling = fields.section("rope_scaling")
    if scaling is None or model_type == "gemma3_text":  # whose statement is stretched already
        return stated
    factor = scaling.number("factor")
    if factor is None or scaling.text("rope_type", "type") not in _STRETCHING:
        return stated
    return round(stated * factor)


def _tied(outer: Fields, inner: Fields, body: Body) -> bool:
    """Whether the head is the embedding: as the language part says, else the whole, else as the family is."""
    key = "tie_word_embeddings"
    if inner.has(key) or not outer.has(key):
        return inner.flag(key, default=body.tied_embeddings)
    return outer.flag(key)


def _dtype(outer: Fields, inner: Fields) -> str:
    for fields in (inner, outer):
        value = fields.text("dtype", "torch_dtype")
        if value is None:
            continue
        plain = value.removeprefix("torch.")
        if plain not in ELEMENT_BYTES:
            key = "dtype" if fields.has("dtype") else "torch_dtype"
            raise fields.error(key, f"{value!r} is not known; these are: {', '.join(ELEMENT_BYTES)}")
        return plain
    return "bfloat16"


def _not_modelled(language: Language, body: Body) -> tuple[str, ...]:
    parts = [*language.not_modelled, *body.not_modelled]
    if any(language.fields.count(key, default=0, least=0) for key in _MULTI_TOKEN):
        parts.append("multi-token prediction layers")
    return tuple(dict.fromkeys(parts))
