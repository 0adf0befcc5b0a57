"""Reads a model's shape out of the `config.json` that lies beside its weights."""

from __future__ import annotations

from collections.abc import Mapping

from enova_recommender.types import ELEMENT_BYTES, QUANTIZED_WEIGHT_BYTES, Attention, Block, Mlp, ModelShape

# Model types whose layers are what ModelShape describes, and whether they carry biases on q, k, v or norms on q, k.
_QKV_BIAS = {"llama": False, "mistral": False, "qwen2": True, "qwen3": False}
_QK_NORM = {"qwen3"}
# Keys that tell of a part which ModelShape has no words for.
_NOT_MODELLED = {
    "num_local_experts": "mixture of experts",
    "num_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "kv_lora_rank": "multi-head latent attention",
    "vision_config": "a vision tower",
    "audio_config": "an audio tower",
    "encoder": "an encoder",
    "ssm_cfg": "state-space layers",
}


class ShapeError(ValueError):
    """A config.json that cannot be turned into a shape; `field` names the key that is to blame."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


def parse_shape(config: Mapping[str, object], *, name: str) -> ModelShape:
    """The shape of the model `name` from its parsed config.json; ShapeError names what is wrong or not modelled."""
    model_type = _model_type(config)
    heads = _count(config, "num_attention_heads")
    hidden_size = _count(config, "hidden_size")
    kv_heads = _count(config, "num_key_value_heads", heads)
    head_dim = _count(config, "head_dim", hidden_size // heads)
    biases = (heads + 2 * kv_heads) * head_dim if config.get("attention_bias", _QKV_BIAS[model_type]) else 0
    norms = 2 * head_dim if model_type in _QK_NORM else 0
    attention = Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, extra_parameters=biases + norms)
    layer = Block(
        count=_count(config, "num_hidden_layers"),
        mixer=attention,
        feed_forward=Mlp(intermediate_size=_count(config, "intermediate_size")),
        norm_parameters=2 * hidden_size,
    )
    return ModelShape(
        name=name,
        hidden_size=hidden_size,
        vocabulary_size=_count(config, "vocab_size"),
        context_tokens=_count(config, "max_position_embeddings"),
        blocks=(layer,),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=_dtype(config),
        quantization=_quantization(config),
        extra_parameters=hidden_size,
    )


def _model_type(config: Mapping[str, object]) -> str:
    for field, what in _NOT_MODELLED.items():
        if config.get(field):
            raise ShapeError(field, f"{what} is not modelled")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _QKV_BIAS:
        raise ShapeError("model_type", f"{model_type!r} is not modelled; these are: {', '.join(_QKV_BIAS)}")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise ShapeError("sliding_window", "sliding-window attention is not modelled")
    return model_type


def _count(config: Mapping[str, object], field: str, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if value is None:
        raise ShapeError(field, "is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ShapeError(field, f"must be a whole number of at least 1, not {value!r}")
    return value


def _dtype(config: Mapping[str, object]) -> str:
    value = config.get("dtype", config.get("torch_dtype")) or "bfloat16"
    if value not in ELEMENT_BYTES:
        raise ShapeError("torch_dtype", f"{value!r} is not known; these are: {', '.join(ELEMENT_BYTES)}")
    return str(value)


def _quantization(config: Mapping[str, object]) -> str | None:
    section = config.get("quantization_config")
    if not section:
        return None
    method = section.get("quant_method") if isinstance(section, Mapping) else section
    if method not in QUANTIZED_WEIGHT_BYTES:
        raise ShapeError("quantization_config", f"{method!r} is not modelled; {', '.join(QUANTIZED_WEIGHT_BYTES)} are")
    return str(method)
