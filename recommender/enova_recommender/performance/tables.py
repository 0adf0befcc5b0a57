"""Durations of single kernels on one type of GPU, from the measured tables by interpolation.

Theory of operation. A table holds times of one kind of kernel on one GPU. What is interpolated, linearly in the
logarithms of the shape, is the ratio of the time to that GPU's roofline at the shape: a launch floor plus the longer of
memory traffic and arithmetic. The result is multiplied by the roofline of the wanted GPU at the wanted shape. Within
a measured GPU's grid this is interpolation; at its edge the ratio stays as it is and the roofline extrapolates; for
another GPU, or a type of weights that was not measured, the shares of the roofline are those of the nearest GPU by data
sheet (and of 16-bit weights). Seconds throughout.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from enova_recommender.catalog.kernels import MeasuredGpu, Sheet, Table
from enova_recommender.types import Arithmetic, GpuModel, WeightFormat

Floats = npt.NDArray[np.float64]

LIKE = 0.12              # distance of data sheets below which two GPUs are taken for one type
CAPABILITY_WEIGHT = 0.7  # of a whole step of compute capability, against e-folds of rates
LAUNCH_S = 2e-6          # of a matrix product, the floor of its roofline
ATTENTION_LAUNCH_S = 8e-6
EXPERT_LAUNCH_S = 20e-6  # sort, two grouped products, activation, sum
STATE_LAUNCH_S = 6e-6
COLLECTIVE_LAUNCH_S = 7e-6
NEIGHBOURS = 4           # measured expert configurations that are mixed
SAME = 1e-9              # squared distance under which two configurations are one
FEW_BYTES = 0.7          # of a weight: below, its format has less than 8 bits
NEAREST = 2              # GPUs that are asked for a kind of table before a like kind is taken
NEAR = 0.05              # squared distance (powers of two) under which one configuration decides

TABLED_BYTES = {
    "bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5625, "int4_wo": 0.516, "w4a16_mxfp4": 0.531,
    "w4a8_mxfp4_mxfp8": 0.531,
}  # fmt: skip
_LOG2_US = math.log2(1e6)  # tables hold microseconds

PLAIN_FORMAT = WeightFormat(element_bytes=2.0, arithmetic=Arithmetic.PLAIN)
FULL_BYTES = 4.0         # of a weight that is neither kept nor multiplied in 16 bits
# Of the 16-bit rate, what 32 bits reach without tensor cores, which engines keep from them: 19.5 of 312 TFLOP/s on an
# A100, 67 of 989 on an H100.
FULL_SHARE = 1 / 16


def sheet_of(gpu: GpuModel) -> Sheet:
    """The figures of a GPU by which it is likened to measured ones."""
    return Sheet(
        bandwidth=gpu.bandwidth_bytes_per_s, bf16_flops=gpu.bf16_flops, fp8_flops=gpu.fp8_flops or 0.0,
        fp4_flops=gpu.fp4_flops or 0.0, link=gpu.link_bytes_per_s, memory=float(gpu.memory_bytes),
        compute_capability=gpu.compute_capability,
    )  # fmt: skip


def distance(one: Sheet, other: Sheet) -> float:
    """How unlike two GPUs are: e-folds of bandwidth and arithmetic, and generations."""
    rates = math.log(one.bandwidth / other.bandwidth) ** 2 + math.log(one.bf16_flops / other.bf16_flops) ** 2
    return math.sqrt(rates + (CAPABILITY_WEIGHT * (one.compute_capability - other.compute_capability)) ** 2)


class Kernels:
    """Seconds of kernels on one type of GPU, from the tables of the nearest measured ones."""

    def __init__(self, gpu: GpuModel, measured: tuple[MeasuredGpu, ...]) -> None:
        if not measured:
            raise ValueError("kernel times need the tables of at least one GPU")
        self.sheet = sheet_of(gpu)
        self._sources = sorted(measured, key=lambda one: distance(self.sheet, one.sheet))
        self.is_measured = distance(self.sheet, self._sources[0].sheet) < LIKE
        self._gemm = lru_cache(maxsize=4096)(self._gemm_grid)

    # Matrix products.

    def gemm_s(self, weights: WeightFormat, name: str | None, m: Floats, *, n: float, k: float) -> Floats:
        """A product of (m x k) activations with (k x n) weights; `name` is the format's, None for plain."""
        return self._gemm(weights, name, tuple(m.tolist()), n, k)

    def _gemm_grid(self, weights: WeightFormat, name: str | None, m: tuple[float, ...], n: float, k: float) -> Floats:
        kind = self.multiplied_in(weights, name)
        like = "fp8" if kind == "fp8_block" else "bfloat16"
        source, tabled = self._source(f"gemm/{kind}", f"gemm/{like}", "gemm/bfloat16")
        rows = np.array(m)
        ratio = _interpolated(_gemm_ratio(source, tabled), (np.log2(rows), math.log2(n), math.log2(k)))
        element = weights.element_bytes
        return np.asarray(np.exp2(ratio) * _gemm_roofline(self.sheet, kind, element=element, m=rows, n=n, k=k))

    def multiplied_in(self, weights: WeightFormat, name: str | None) -> str:
        """The kind of matrix product that this GPU uses for weights of a format."""
        match weights.arithmetic:
            case Arithmetic.FP4 if self.sheet.fp4_flops > 0:
                return "nvfp4"
            case Arithmetic.FP8 if self.sheet.fp8_flops > 0:
                return "fp8_block" if name == "fp8_block" else "fp8"
            case Arithmetic.INT8:
                return "fp8" if self.sheet.fp8_flops > 0 else "int8"
            case _:
                return "float32" if weights.element_bytes == FULL_BYTES else "bfloat16"

    # Attention.

    def decode_s(
        self, *, group: float, streams: Floats, context: Floats, head_dim: int, element_bytes: float, window: int
    ) -> Floats:
        """One layer's attention of decoding sequences: `streams` sequences x KV heads, each `context` tokens long."""
        source, tabled = self._attention("decode", head_dim, element_bytes, window)
        ratio = _interpolated(_decode_ratio(source, tabled), (math.log2(group), _log2(streams), np.log2(context)))
        return np.exp2(ratio) * _decode_roofline(
            self.sheet, group=group, streams=streams, context=context, head_dim=head_dim, element=element_bytes,
            window=window,
        )  # fmt: skip

    def prefill_s(self, *, group: float, streams: Floats, length: Floats, head_dim: int, window: int) -> Floats:
        """One layer's attention of prompts: `streams` prompts x KV heads, each `length` tokens long."""
        source, tabled = self._attention("prefill", head_dim, 2.0, window)
        ratio = _interpolated(_prefill_ratio(source, tabled), (math.log2(group), _log2(streams), np.log2(length)))
        return np.exp2(ratio) * _prefill_roofline(
            self.sheet, group=group, streams=streams, length=length, head_dim=head_dim, window=window
        )

    def _attention(self, kind: str, head_dim: int, element_bytes: float, window: int) -> tuple[MeasuredGpu, str]:
        """The table of the nearest head size, with the window if it was measured, else without."""
        source = self._sources[0]
        sizes = {int(name.split("/")[1]) for name in source.tables if name.startswith(f"{kind}/")}
        size = min(sizes, key=lambda one: (abs(math.log2(one / head_dim)), one))
        cached = ("fp8", "bfloat16") if element_bytes == 1 else ("bfloat16", "fp8")
        names = [f"{kind}/{size}/{one}/{seen}" for one in cached for seen in (window, 0)]
        return source, next(name for name in names if name in source.tables)

    def latent_decode_s(
        self, *, heads: float, sequences: Floats, context: Floats, kv_rank: int, rope_dim: int, element_bytes: float
    ) -> Floats:
        """One layer's latent attention of decoding sequences, without projections."""
        source, tabled = self._source(f"latent_decode/{'fp8' if element_bytes == 1 else 'bfloat16'}")
        place = (math.log2(heads), _log2(sequences), np.log2(context))
        return np.exp2(_interpolated(_latent_decode_ratio(source, tabled), place)) * _latent_decode_roofline(
            self.sheet, heads=heads, sequences=sequences, context=context, rank=kv_rank, rope=rope_dim,
            element=element_bytes,
        )  # fmt: skip

    def latent_prefill_s(
        self, *, heads: float, prompts: Floats, length: Floats, key_dim: int, value_dim: int
    ) -> Floats:
        """One layer's latent attention of prompts, without projections."""
        source, tabled = self._source("latent_prefill/bfloat16")
        place = (math.log2(heads), _log2(prompts), np.log2(length))
        return np.exp2(_interpolated(_latent_prefill_ratio(source, tabled), place)) * _latent_prefill_roofline(
            self.sheet, heads=heads, prompts=prompts, length=length, dims=key_dim + value_dim
        )

    # Recurrences.

    def recurrence_s(self, *, heads: float, tokens: Floats, state_bytes: float, decode: bool) -> Floats:
        """One layer's state update: of `tokens` sequences by one token each, or of so many prompt tokens.

        `state_bytes` are those of one head of one sequence.
        """
        source, tabled = self._source(f"gdn/{'generation' if decode else 'context'}")
        ratio = _interpolated(_state_ratio(source, tabled), (math.log2(heads), _log2(tokens)))
        roofline = _state_roofline(self.sheet, heads=heads, tokens=tokens, state_bytes=state_bytes, decode=decode)
        return np.exp2(ratio) * roofline

    # Experts.

    def experts_s(self, weights: WeightFormat, name: str | None, tokens: Floats, work: ExpertWork) -> Floats:
        """The routed experts of one layer, for so many tokens of all GPUs that share them."""
        source, kind = self._experts(weights, name)
        ratio = _expert_ratio(source, kind, work, tokens)
        rate = "fp8" if kind == "w4a8_mxfp4_mxfp8" else self.multiplied_in(weights, name)
        return np.exp2(ratio) * work.roofline_s(self.sheet, rate, element=weights.element_bytes, tokens=tokens)

    def _experts(self, weights: WeightFormat, name: str | None) -> tuple[MeasuredGpu, str]:
        """The table that fits best: the format's own on one of the nearest GPUs, else a like one on any."""
        kind = self.multiplied_in(weights, name)
        wanted: tuple[str, ...] = (kind, "fp8" if kind == "fp8_block" else "bfloat16", "bfloat16")
        if name == "mxfp4":  # where there is 4-bit arithmetic, activations are brought to 8 bits
            wanted = (*(("w4a8_mxfp4_mxfp8",) if self.sheet.fp4_flops > 0 else ()), "w4a16_mxfp4", "bfloat16")
        elif weights.element_bytes < FEW_BYTES and kind != "nvfp4":
            wanted = ("int4_wo", "w4a16_mxfp4", "bfloat16")
        for sources in (self._sources[:NEAREST], self._sources):
            for one in wanted:
                for source in sources:
                    if one in source.experts:
                        return source, one
        raise ValueError("none of the given GPUs was measured with experts")

    # Collectives.

    def all_reduce_s(self, message_bytes: Floats, gpus: int) -> Floats:
        """The sum of one message over GPUs: the better of vLLM's own kernel and NCCL."""
        return np.minimum(
            self._collective_s("all_reduce/graph", message_bytes, gpus),
            self._collective_s("nccl/all_reduce", message_bytes, gpus),
        )

    def all_gather_s(self, message_bytes: Floats, gpus: int) -> Floats:
        """All GPUs get all parts of a message of so many bytes in all."""
        return self._collective_s("nccl/all_gather", message_bytes, gpus)

    def reduce_scatter_s(self, message_bytes: Floats, gpus: int) -> Floats:
        """Each GPU gets its part of the sum of messages of so many bytes."""
        return self._collective_s("nccl/reduce_scatter", message_bytes, gpus)

    def _collective_s(self, kind: str, message_bytes: Floats, gpus: int) -> Floats:
        if gpus == 1:
            return np.zeros_like(message_bytes)
        linked = [one for one in self._sources if kind in one.tables]
        source = min(linked, key=lambda one: abs(math.log(one.sheet.link / self.sheet.link)))
        ratio = _interpolated(_collective_ratio(source, kind), (math.log2(gpus), _log2(message_bytes)))
        return np.exp2(ratio) * _collective_roofline(self.sheet, message_bytes=message_bytes, gpus=gpus)

    def _source(self, *kinds: str) -> tuple[MeasuredGpu, str]:
        """The first of these kinds that one of the nearest GPUs has, else that any has."""
        for sources in (self._sources[:NEAREST], self._sources):
            for kind in kinds:
                for source in sources:
                    if kind in source.tables:
                        return source, kind
        raise ValueError(f"none of the given GPUs was measured with {kinds[0]}")


@lru_cache(maxsize=256)
def kernels_of(gpu: GpuModel, measured: tuple[MeasuredGpu, ...]) -> Kernels:
    """The kernels of a GPU from those of measured ones, made once."""
    return Kernels(gpu, measured)


# Rooflines, and the ratios of tables to them, which are made once.


@dataclass(frozen=True, slots=True)
class _Ratio:
    """Base-2 logarithms of the shares of the roofline that a table holds, and its axes."""

    values: Floats
    axes: tuple[Floats, ...]


def _ratio(table: Table, roofline_s: Floats) -> _Ratio:
    return _Ratio(table.log2_us - _LOG2_US - np.log2(roofline_s), table.axes)


def _mesh(table: Table) -> list[Floats]:
    return [np.exp2(axis) for axis in np.meshgrid(*table.axes, indexing="ij")]


def _log2(values: Floats) -> Floats:
    """Logarithms, of nothing that of very little."""
    return np.asarray(np.log2(np.maximum(values, 1e-9)))


def peak(sheet: Sheet, kind: str) -> float:
    """Operations a second of a kind of product; kinds that a GPU has not run at its 16-bit rate."""
    match kind:
        case "nvfp4" if sheet.fp4_flops:
            return sheet.fp4_flops
        case "fp8" | "fp8_block" if sheet.fp8_flops:
            return sheet.fp8_flops
        case "int8":
            return 2 * sheet.bf16_flops
        case "float32":
            return FULL_SHARE * sheet.bf16_flops
        case _:
            return sheet.bf16_flops


def _gemm_roofline(
    sheet: Sheet, kind: str, *, element: float, m: Floats, n: Floats | float, k: Floats | float
) -> Floats:
    moved = n * k * element + m * (n + k) * 2
    return LAUNCH_S + np.maximum(moved / sheet.bandwidth, 2 * m * n * k / peak(sheet, kind))


@lru_cache(maxsize=256)
def _gemm_ratio(source: MeasuredGpu, name: str) -> _Ratio:
    table, kind = source.tables[name], name.removeprefix("gemm/")
    m, n, k = _mesh(table)
    return _ratio(table, _gemm_roofline(source.sheet, kind, element=TABLED_BYTES[kind], m=m, n=n, k=k))


def _decode_roofline(
    sheet: Sheet, *, group: Floats | float, streams: Floats, context: Floats, head_dim: float, element: float,
    window: int,
) -> Floats:  # fmt: skip
    seen = np.minimum(context, window) if window else context
    moved = streams * seen * 2 * head_dim * element
    flops = 4 * group * streams * seen * head_dim
    return ATTENTION_LAUNCH_S + np.maximum(moved / sheet.bandwidth, flops / sheet.bf16_flops)


@lru_cache(maxsize=256)
def _decode_ratio(source: MeasuredGpu, name: str) -> _Ratio:
    _, head_dim, cached, window = name.split("/")
    group, streams, context = _mesh(source.tables[name])
    return _ratio(source.tables[name], _decode_roofline(
        source.sheet, group=group, streams=streams, context=context, head_dim=int(head_dim),
        element=TABLED_BYTES[cached], window=int(window),
    ))  # fmt: skip


def _prefill_roofline(
    sheet: Sheet, *, group: Floats | float, streams: Floats, length: Floats, head_dim: float, window: int
) -> Floats:
    seen = length / 2 if not window else np.where(length > window, window - window**2 / (2 * length), length / 2)
    flops = 4 * group * streams * length * seen * head_dim
    moved = streams * length * (group + 1) * 4 * head_dim
    return ATTENTION_LAUNCH_S + moved / sheet.bandwidth + flops / sheet.bf16_flops


@lru_cache(maxsize=256)
def _prefill_ratio(source: MeasuredGpu, name: str) -> _Ratio:
    _, head_dim, _, window = name.split("/")
    group, streams, length = _mesh(source.tables[name])
    return _ratio(source.tables[name], _prefill_roofline(
        source.sheet, group=group, streams=streams, length=length, head_dim=int(head_dim), window=int(window)
    ))  # fmt: skip


LATENT_RANK, LATENT_ROPE, LATENT_DIMS = 512, 64, 192 + 128  # of the measured model: cached vector; key and value


def _latent_decode_roofline(
    sheet: Sheet, *, heads: Floats | float, sequences: Floats, context: Floats, rank: int, rope: int, element: float
) -> Floats:
    moved = sequences * context * (rank + rope) * element
    flops = 2 * heads * sequences * context * (2 * rank + rope)
    return ATTENTION_LAUNCH_S + np.maximum(moved / sheet.bandwidth, flops / sheet.bf16_flops)


@lru_cache(maxsize=64)
def _latent_decode_ratio(source: MeasuredGpu, name: str) -> _Ratio:
    heads, sequences, context = _mesh(source.tables[name])
    return _ratio(source.tables[name], _latent_decode_roofline(
        source.sheet, heads=heads, sequences=sequences, context=context, rank=LATENT_RANK, rope=LATENT_ROPE,
        element=TABLED_BYTES[name.removeprefix("latent_decode/")],
    ))  # fmt: skip


def _latent_prefill_roofline(
    sheet: Sheet, *, heads: Floats | float, prompts: Floats, length: Floats, dims: int
) -> Floats:
    flops = heads * prompts * length**2 * dims
    moved = prompts * length * heads * dims * 4
    return ATTENTION_LAUNCH_S + moved / sheet.bandwidth + flops / sheet.bf16_flops


@lru_cache(maxsize=64)
def _latent_prefill_ratio(source: MeasuredGpu, name: str) -> _Ratio:
    heads, prompts, length = _mesh(source.tables[name])
    return _ratio(source.tables[name], _latent_prefill_roofline(
        source.sheet, heads=heads, prompts=prompts, length=length, dims=LATENT_DIMS
    ))  # fmt: skip


STATE_BYTES = 128 * 128 * 4.0  # of one head of the measured recurrence, in 32 bits


def _state_roofline(
    sheet: Sheet, *, heads: Floats | float, tokens: Floats, state_bytes: float, decode: bool
) -> Floats:
    """Decoding reads and writes each state; a prompt is worked through in chunks that multiply with it."""
    if decode:
        return STATE_LAUNCH_S + 2 * heads * tokens * state_bytes / sheet.bandwidth
    return 8 * STATE_LAUNCH_S + 2 * heads * tokens * state_bytes / sheet.bf16_flops


@lru_cache(maxsize=64)
def _state_ratio(source: MeasuredGpu, name: str) -> _Ratio:
    heads, tokens = _mesh(source.tables[name])
    decode = name == "gdn/generation"
    found = _ratio(source.tables[name], _state_roofline(
        source.sheet, heads=heads, tokens=tokens, state_bytes=STATE_BYTES, decode=decode
    ))  # fmt: skip
    # The measured program held few states, and large batches met the same ones again in the GPU's own cache. Those of
    # different sequences all come from memory: no batch is faster than its bandwidth.
    return _Ratio(np.maximum(found.values, 0.0), found.axes) if decode else found


def _collective_roofline(sheet: Sheet, *, message_bytes: Floats, gpus: Floats | float) -> Floats:
    return COLLECTIVE_LAUNCH_S + 2 * (gpus - 1) / gpus * message_bytes / sheet.link


@lru_cache(maxsize=64)
def _collective_ratio(source: MeasuredGpu, name: str) -> _Ratio:
    gpus, message_bytes = _mesh(source.tables[name])
    roofline = _collective_roofline(source.sheet, message_bytes=message_bytes, gpus=gpus)
    return _ratio(source.tables[name], roofline)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWork:
    """The routed experts of one layer on one GPU: each cut over `cut` GPUs, and all spread over `spread`."""

    hidden: float
    intermediate: float
    chosen: int      # experts per token
    experts: int
    cut: int
    spread: int
    matrices: int = 3

    @property
    def place(self) -> list[float]:
        """What grouped kernels depend on beside the roofline, in powers of two."""
        local = self.experts / self.spread
        values = (self.hidden, self.intermediate / self.cut, self.chosen, self.experts, local)
        return [math.log2(value) for value in values]

    def roofline_s(self, sheet: Sheet, kind: str, *, element: float, tokens: Floats) -> Floats:
        """Launches, and the longer of reading the experts that are hit and multiplying with them."""
        inside, local = self.intermediate / self.cut, self.experts / self.spread
        # With assignments drawn evenly an expert stays idle with probability (1 - 1 / experts) ^ assignments.
        hit = local * (1 - (1 - 1 / self.experts) ** (tokens * self.chosen))
        rows = tokens * self.chosen * local / self.experts
        moved = self.matrices * hit * self.hidden * inside * element + rows * (self.hidden + inside) * 4
        flops = 2 * self.matrices * self.hidden * inside * rows
        return EXPERT_LAUNCH_S + np.maximum(moved / sheet.bandwidth, flops / peak(sheet, kind))


_TABLED_RATE = {"nvfp4": "nvfp4", "fp8": "fp8", "fp8_block": "fp8_block", "w4a8_mxfp4_mxfp8": "fp8"}


@lru_cache(maxsize=256)
def _expert_ratios(source: MeasuredGpu, kind: str) -> tuple[Floats, Floats]:
    """Places of the measured configurations, and logarithms of their shares of the roofline over the tokens."""
    table = source.experts[kind]
    knots, places, ratios = np.exp2(table.log2_tokens), [], []
    for (hidden, inside, *counts), log2_us in zip(table.shapes.tolist(), table.log2_us, strict=True):
        chosen, experts, cut, spread = map(int, counts)
        work = ExpertWork(hidden=hidden, intermediate=inside, chosen=chosen, experts=experts, cut=cut, spread=spread)
        rate = _TABLED_RATE.get(kind, "bfloat16")
        roofline = work.roofline_s(source.sheet, rate, element=TABLED_BYTES[kind], tokens=knots)
        places.append(work.place)
        ratios.append(log2_us - _LOG2_US - np.log2(roofline))
    return np.array(places), np.array(ratios)


def _expert_ratio(source: MeasuredGpu, kind: str, work: ExpertWork, tokens: Floats) -> Floats:
    """Logarithm of the share of the roofline, mixed from the nearest measured configurations."""
    places, ratios = _expert_ratios(source, kind)
    squares = ((places - work.place) ** 2).sum(axis=1)
    nearest = np.argsort(squares, kind="stable")[:NEIGHBOURS]
    if squares[nearest[0]] < SAME:
        nearest = nearest[:1]
    weights = 1 / (squares[nearest] + NEAR) ** 2
    mixed = np.average(ratios[nearest], axis=0, weights=weights)
    return np.asarray(np.interp(np.log2(tokens), source.experts[kind].log2_tokens, mixed))


def _interpolated(table: _Ratio, point: tuple[Floats | float, ...]) -> Floats:
    """Multilinear interpolation at points given by coordinate, each held within its axis."""
    places = []
    for axis, coordinate in zip(table.axes, point, strict=True):
        inside = np.clip(coordinate, axis[0], axis[-1])
        low = np.clip(np.searchsorted(axis, inside, side="right") - 1, 0, len(axis) - 2)
        places.append((low, (inside - axis[low]) / (axis[low + 1] - axis[low])))
    total = np.zeros(())
    for corner in itertools.product((0, 1), repeat=len(places)):
        weight = math.prod(share if upper else 1 - share for upper, (_, share) in zip(corner, places, strict=True))
        index = tuple(low + upper for upper, (low, _) in zip(corner, places, strict=True))
        total = total + weight * table.values[index]
    return total
