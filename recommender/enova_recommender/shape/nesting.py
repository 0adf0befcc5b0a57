"""Finds the language model within a config.json that describes more: vision, audio, speech."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from enova_recommender.shape.fields import Fields

# Keys of the section of the language model, and of the parts beside it.
_LANGUAGE = ("text_config", "llm_config", "language_config")
_BESIDE = {
    "vision_config": "vision tower", "vision_tower": "vision tower", "visual": "vision tower",
    "mm_vision_tower": "vision tower", "audio_config": "audio tower", "speech_config": "audio tower",
    "talker_config": "speech decoder", "code2wav_config": "speech decoder",
}  # fmt: skip
# A nested section leaves out what its class has as default; these are the defaults of classes that are nested.
_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    },
    "gemma": {
        "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
    },
    "gemma2": {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
        "sliding_window": 4096,
    },
    "gemma3_text": {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "gemma4_text": {
        "vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
        "sliding_window": 512, "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """The section of the language model, and the parts beside it that shapes leave out."""

    fields: Fields
    not_modelled: tuple[str, ...]


def find_language(outer: Fields) -> Language:
    """The language model's section: the whole, or a nested one."""
    whole = outer.section("thinker_config") or outer
    beside = [what for fields in (outer, whole) for key, what in _BESIDE.items() if fields.values.get(key)]
    nested = next((section for key in _LANGUAGE if (section := whole.section(key)) is not None), None)
    if nested is None:
        return Language(fields=whole, not_modelled=tuple(dict.fromkeys(beside)))
    defaults = _DEFAULTS.get(nested.text("model_type") or "", {})
    return Language(fields=nested.with_defaults(defaults), not_modelled=tuple(dict.fromkeys(beside)))
