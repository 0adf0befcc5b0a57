"""What a checkpoint's `quantization_config` says: the weights' format, the parts that stay plain, the cache's type.

Theory of operation. Checkpoints name the modules that they leave plain, one by one, by wildcard or by regular
expression. A part of the model (its attention, its dense layers, its experts, ...) counts as plain if those names
cover it in at least half of the layers that have it; finer than that the shape does not distinguish.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from enova_recommender.shape.fields import Fields
from enova_recommender.types import EXPERTS_ONLY, Block, Experts, Mlp, Part, Recurrence

# Where vLLM, transformers and the quantisers keep the last matrix of each part, below `layers.N.`.
_MODULES: Mapping[Part, tuple[str, ...]] = {
    Part.ATTENTION: ("self_attn.o_proj", "mixer.o_proj", "attention.dense", "attn.out_proj"),
    Part.RECURRENCE: ("linear_attn.out_proj", "mixer.out_proj", "mamba.out_proj"),
    Part.MLP: ("mlp.down_proj", "feed_forward.down_proj", "mixer.down_proj", "mlp.dense_4h_to_h"),
    Part.SHARED_EXPERTS: (
        "mlp.shared_experts.down_proj", "mlp.shared_expert.down_proj", "feed_forward.shared_expert.down_proj",
        "mixer.shared_experts.down_proj",
    ),
    Part.EXPERTS: (
        "mlp.experts.0.down_proj", "feed_forward.experts.0.down_proj", "block_sparse_moe.experts.0.w2",
        "mixer.experts.0.down_proj",
    ),
}  # fmt: skip
_EXCLUSIONS = ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers", "llm_int8_skip_modules")
_PREFIXES = ("", "model.", "language_model.", "language_model.model.", "model.language_model.")
PATTERN_CHARACTERS_MAX = 400
# A group that repeats can take a matcher exponential time.
_REPEATED_GROUP = re.compile(r"\)[*+{]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What `quantization_config` says."""

    method: str | None = None
    plain_parts: tuple[Part, ...] = ()
    kv_cache_dtype: str | None = None


def read_quantization(outer: Fields, inner: Fields, blocks: Sequence[Block]) -> Quantization:
    """The quantisation of a checkpoint whose configuration, or that of its language part, names one."""
    names = ("quantization_config", "compression_config")
    sections = [s for s in (outer.section(*names), inner.section(*names)) if s is not None and s.values]
    if not sections:
        return Quantization()
    section = sections[0]
    quant_method = section.text("quant_method") or ("modelopt" if section.has("quant_algo", "quantization") else None)
    if quant_method is None:
        raise section.error("quant_method", "is missing")
    if quant_method not in _METHODS:
        raise section.error("quant_method", f"{quant_method!r} is not modelled; {', '.join(_METHODS)} are")
    nested = section.section("quantization") or section
    method = _METHODS[quant_method](nested)
    return Quantization(
        method=method, plain_parts=_plain_parts(nested, method, blocks), kv_cache_dtype=_kv_cache_dtype(nested)
    )


def _fp8(section: Fields) -> str:
    block = section.counts("weight_block_size", least=1)
    if block is not None and len(block) != 2:
        raise section.error("weight_block_size", f"must be two sizes, not {list(block)}")
    return "fp8" if block is None else "fp8_block"


def _awq(section: Fields) -> str:
    bits = section.count("bits", "w_bit", default=4)
    if bits != 4:
        raise section.error("bits", f"is {bits}, and awq has 4")
    return _grouped("awq", section)


def _gptq(section: Fields) -> str:
    bits = section.count("bits")
    if bits not in (4, 8):
        raise section.error("bits", f"{bits} is not modelled for gptq; 4 and 8 are")
    return _grouped("gptq", section) if bits == 4 else "int8_weights"


def _grouped(name: str, section: Fields) -> str:
    """The method, or that of small groups, whose scales weigh more."""
    group = section.get("group_size", "q_group_size")
    return "int4_group32" if isinstance(group, int) and 0 < group <= 32 else name


def _bitsandbytes(section: Fields) -> str:
    four, eight = section.flag("load_in_4bit", "_load_in_4bit"), section.flag("load_in_8bit", "_load_in_8bit")
    if four and eight:
        raise section.error("load_in_8bit", "is true, but load_in_4bit is too")
    if not four and not eight:
        raise section.error("load_in_4bit", "is false, and so is load_in_8bit")
    return "bitsandbytes" if four else "int8"


def _modelopt(section: Fields) -> str:
    algorithm = section.text("quant_algo")
    if algorithm is None:
        if section.has("config_groups"):
            return _compressed(section)
        raise section.error("quant_algo", "is missing")
    methods = {"FP8": "fp8", "FP8_PER_CHANNEL_PER_TOKEN": "fp8", "FP8_PB_WO": "fp8_block", "NVFP4": "nvfp4",
               "W4A16_NVFP4": "nvfp4_weights", "W4A16_AWQ": "awq", "W8A8_SQ_PER_CHANNEL": "int8", "MXFP4": "mxfp4"}
    if algorithm.upper() not in methods:
        raise section.error("quant_algo", f"{algorithm!r} is not modelled; {', '.join(methods)} are")
    return methods[algorithm.upper()]


def _compressed(section: Fields) -> str:
    groups = section.section("config_groups")
    if groups is None or not groups.values:
        raise section.error("config_groups", "is missing")
    formats = {name: _group_format(group) for name in groups.values if (group := groups.section(name)) is not None}
    first, *rest = formats.items()
    for name, method in rest:
        if method != first[1]:
            raise groups.error(name, f"is {method}, but {first[0]} is {first[1]}: mixed formats are not modelled")
    return first[1]


def _group_format(group: Fields) -> str:
    weights = group.section("weights")
    if weights is None:
        raise group.error("weights", "is missing")
    bits, kind = weights.count("num_bits"), weights.text("type") or "int"
    size, with_activations = weights.get("group_size"), group.has("input_activations")
    small = isinstance(size, int) and 0 < size <= 32
    match kind, bits:
        case "float", 8 if weights.text("strategy") == "block":
            return "fp8_block"
        case "float", 8:
            return "fp8" if with_activations else "fp8_weights"
        case "float", 4 if size == 32:
            return "mxfp4"
        case "float", 4:
            return "nvfp4" if with_activations else "nvfp4_weights"
        case "int", 8:
            return "int8" if with_activations else "int8_weights"
        case "int", 4:
            return "int4_group32" if small else "int4"
    raise weights.error("num_bits", f"{bits} of type {kind!r} are not modelled; 4 and 8 of int and float are")


_METHODS: Mapping[str, Callable[[Fields], str]] = {
    "fp8": _fp8, "fbgemm_fp8": _fp8, "awq": _awq, "gptq": _gptq, "bitsandbytes": _bitsandbytes,
    "mxfp4": lambda _: "mxfp4", "modelopt": _modelopt, "modelopt_fp4": _modelopt, "compressed-tensors": _compressed,
}  # fmt: skip


def _kv_cache_dtype(section: Fields) -> str | None:
    scheme = section.get("kv_cache_scheme")
    algorithm = scheme if isinstance(scheme, str) else section.text("kv_cache_quant_algo")
    if algorithm is not None:
        return "fp8" if algorithm.upper() == "FP8" else None
    nested = section.section("kv_cache_scheme")
    if nested is not None and nested.count("num_bits") == 8 and nested.text("type") == "float":
        return "fp8"
    return None


def _plain_parts(section: Fields, method: str, blocks: Sequence[Block]) -> tuple[Part, ...]:
    layers, having = sum(block.count for block in blocks), _layers_of(blocks)
    excluded, targets = [name for key in _EXCLUSIONS for name in section.texts(key) or ()], _targets(section)
    if not excluded and not targets:
        return tuple(part for part in having if method in EXPERTS_ONLY and part is not Part.EXPERTS)
    leaves = _Modules(section, excluded)
    takes = _Modules(section, targets) if targets else None
    plain = []
    for part, count in having.items():
        of_layers = [[f"layers.{index}.{module}" for module in _MODULES[part]] for index in range(layers)]
        if takes is None:
            spared = sum(any(leaves.cover(name) for name in names) for names in of_layers)
        else:
            taken = sum(any(takes.cover(n) and not leaves.cover(n) for n in names) for names in of_layers)
            spared = count - taken
        if 2 * spared >= count:
            plain.append(part)
    return tuple(plain)


def _layers_of(blocks: Sequence[Block]) -> dict[Part, int]:
    """How many layers have each part that quantisation can spare."""
    found: dict[Part, int] = {}
    for block in blocks:
        parts = []
        if block.mixer is not None:
            parts.append(Part.RECURRENCE if isinstance(block.mixer, Recurrence) else Part.ATTENTION)
        match block.feed_forward:
            case Mlp():
                parts.append(Part.MLP)
            case Experts() as experts:
                parts += [Part.EXPERTS, *([Part.SHARED_EXPERTS] if experts.shared_intermediate_size else [])]
        for part in parts:
            found[part] = found.get(part, 0) + block.count
    return found


def _targets(section: Fields) -> list[str]:
    """Names of modules that alone are quantised; empty where whole classes of them are."""
    groups = section.section("config_groups")
    if groups is None:
        return []
    found = [
        name for key in groups.values if (group := groups.section(key)) is not None
        for name in group.texts("targets") or ()
    ]  # fmt: skip
    return [] if any(name.isidentifier() for name in found) else found


class _Modules:
    """A set of modules, as a checkpoint's configuration names them."""

    def __init__(self, section: Fields, names: Sequence[str]) -> None:
        self._exact: set[str] = set()
        self._inner: list[str] = []
        globs, expressions = [], []
        for name in names:
            if len(name) > PATTERN_CHARACTERS_MAX:
                raise section.error("ignore", f"{name[:40]!r}... has more than {PATTERN_CHARACTERS_MAX} characters")
            if name.startswith("re:"):
                expressions.append(self._expression(section, name[3:]))
            elif "*" in name:
                globs.append(fnmatch.translate(_below_layers(name)))
            elif "layers." in name:
                self._exact.add(_below_layers(name))
            else:
                self._inner.append(f".{name}.")
        self._globs = re.compile("|".join(globs)) if globs else None
        self._expressions = expressions

    @staticmethod
    def _expression(section: Fields, text: str) -> re.Pattern[str]:
        if _REPEATED_GROUP.search(text):
            raise section.error("ignore", f"the expression {text!r} repeats a group: not read")
        try:
            return re.compile(text)
        except re.error as error:
            raise section.error("ignore", f"{text!r} is no regular expression: {error}") from error

    def cover(self, name: str) -> bool:
        """Whether the module `layers.N...`, or one that holds it, is in the set."""
        dotted = f".{name}."
        if any(inner in dotted for inner in self._inner):
            return True
        if any(expression.match(prefix + name) for expression in self._expressions for prefix in _PREFIXES):
            return True
        words = name.split(".")
        holders = [".".join(words[:end]) for end in range(2, len(words) + 1)]
        if any(holder in self._exact for holder in holders):
            return True
        return self._globs is not None and any(self._globs.match(holder) for holder in holders)


def _below_layers(name: str) -> str:
    """The name without what stands before `layers.`: it differs by who loads the model."""
    at = name.find("layers.")
    return name if at < 0 else name[at:]
