"""Durations of single kernels on one type of GPU, from the measured tables by interpolation.

Theory of operation. A table holds times of one kind of kernel on one GPU. What is interpolated, linearly in the
logarithms of the shape, is the ratio of the time to that GPU's roofline at the shape: a launch floor plus the longer of
memory traffic and arithmetic. The result is multiplied by the roofline of the wanted GPU at the wanted shape. Within
a measured GPU's grid this is interpolation; at its edge the ratio stays as it is and the roofline extrapolates; for
another GPU, or a type of weights that was not measured, the shares of the roofline are those of the nearest GPU by data
sheet (and of 16-bit weights). Seconds throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from enova_recommender.catalog.kernels import ExpertTable, MeasuredGpu, Sheet, Table
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
NEAR = 0.05              # squared distance (powers of two) under which one configuration decides
_EXP = math.log(2)

PLAIN_FORMAT = WeightFormat(element_bytes=2.0, arithmetic=Arithmetic.PLAIN)


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
    """Seconds of kernels on one type of GPU. `kinds` of tables that were measured on this very type are `direct`."""

    def __init__(self, gpu: GpuModel, measured: tuple[MeasuredGpu, ...]) -> None:
        self.sheet = sheet_of(gpu)
        self._sources = sorted(measured, key=lambda measured: distance(self.sheet, measured.sheet))
        self.is_measured = distance(self.sheet, self._sources[0].sheet) < LIKE
        self._gemm = lru_cache(maxsize=4096)(self._gemm_grid)

    # Matrix products.

    def gemm_s(self, weights: WeightFormat, name: str | None, m: Floats, n: float, k: float) -> Floats:
        """A product of (m x k) activations with (k x n) weights; `name` is the format's, None for plain."""
        return self._gemm(weights, name, tuple(m.tolist()), n, k)

    def _gemm_grid(self, weights: WeightFormat, name: str | None, m: tuple[float, ...], n: float, k: float) -> Floats:
        kind = self.multiplied_in(weights, name)
        source, table = self._table(f"gemm/{kind}", f"gemm/{'fp8' if kind == 'fp8_block' else 'bfloat16'}", "gemm/bfloat16")
        rows = np.array(m)
        tabled = _gemm_ratio(source, table)
        ratio = _interpolated(table.axes, tabled, (np.log2(rows), math.log2(n), math.log2(k)))
        return np.asarray(np.exp2(ratio) * self._gemm_roofline(weights, kind, rows, n, k))

    def _gemm_roofline(self, weights: WeightFormat, kind: str, m: Floats, n: float, k: float) -> Floats:
        moved = n * k * weights.element_bytes + m * (n + k) * 2
        return LAUNCH_S + np.maximum(moved / self.sheet.bandwidth, 2 * m * n * k / _peak(self.sheet, kind))

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
                return "bfloat16"

    # Attention.

    def decode_s(
        self, *, group: float, streams: Floats, context: Floats, head_dim: int, element_bytes: float, window: int
    ) -> Floats:
        """One layer's attention of decoding sequences: `streams` sequences x KV heads, each `context` tokens long."""
        stored = "fp8" if element_bytes == 1 else "bfloat16"
        source, table, tabled_window, tabled_dim = self._attention_table("decode", head_dim, stored, window)
        ratio = _interpolated(
            table.axes, _decode_ratio(source, table, tabled_dim, 1.0 if stored == "fp8" else 2.0, tabled_window),
            (math.log2(group), np.log2(np.maximum(streams, 1e-9)), np.log2(context)),
        )  # fmt: skip
        return np.exp2(ratio) * _decode_roofline(self.sheet, group, streams, context, head_dim, element_bytes, window)

    def prefill_s(self, *, group: float, streams: Floats, length: Floats, head_dim: int, window: int) -> Floats:
        """One layer's attention of prompts: `streams` prompts x KV heads, each `length` tokens long."""
        source, table, tabled_window, tabled_dim = self._attention_table("prefill", head_dim, "bfloat16", window)
        ratio = _interpolated(
            table.axes, _prefill_ratio(source, table, tabled_dim, tabled_window),
            (math.log2(group), np.log2(np.maximum(streams, 1e-9)), np.log2(length)),
        )  # fmt: skip
        return np.exp2(ratio) * _prefill_roofline(self.sheet, group, streams, length, head_dim, window)

    def _attention_table(self, kind: str, head_dim: int, stored: str, window: int) -> tuple[MeasuredGpu, Table, int, int]:
        """The table of the nearest head size, with the window if it was measured, else without."""
        for source in self._sources:
            sizes = {int(name.split("/")[1]) for name in source.tables if name.startswith(f"{kind}/")}
            size = min(sizes, key=lambda one: (abs(math.log2(one / head_dim)), one))
            for cached in (stored, "bfloat16", "fp8"):
                for seen in (window, 0):
                    table = source.tables.get(f"{kind}/{size}/{cached}/{seen}")
                    if table is not None:
                        return source, table, seen, size
        raise AssertionError("no attention was measured")  # the shipped tables hold it for each GPU

    def latent_decode_s(
        self, *, heads: float, sequences: Floats, context: Floats, kv_rank: int, rope_dim: int, element_bytes: float
    ) -> Floats:
        """One layer's latent attention of decoding sequences, without projections."""
        source, table = self._table(f"latent_decode/{'fp8' if element_bytes == 1 else 'bfloat16'}")
        ratio = _interpolated(
            table.axes, _latent_decode_ratio(source, table, 1.0 if element_bytes == 1 else 2.0),
            (math.log2(heads), np.log2(np.maximum(sequences, 1e-9)), np.log2(context)),
        )  # fmt: skip
        work = _latent_decode_roofline(self.sheet, heads, sequences, context, kv_rank, rope_dim, element_bytes)
        return np.exp2(ratio) * work

    def latent_prefill_s(
        self, *, heads: float, prompts: Floats, length: Floats, key_dim: int, value_dim: int
    ) -> Floats:
        """One layer's latent attention of prompts, without projections."""
        source, table = self._table("latent_prefill/bfloat16")
        ratio = _interpolated(
            table.axes, _latent_prefill_ratio(source, table),
            (math.log2(heads), np.log2(np.maximum(prompts, 1e-9)), np.log2(length)),
        )  # fmt: skip
        return np.exp2(ratio) * _latent_prefill_roofline(self.sheet, heads, prompts, length, key_dim, value_dim)

    # Recurrences.

    def recurrence_s(self, *, heads: float, tokens: Floats, state_bytes: float, decode: bool) -> Floats:
        """One layer's state update: of `tokens` sequences by one token each, or of so many prompt tokens.

        `state_bytes` are those of one head of one sequence.
        """
        source, table = self._table(f"gdn/{'generation' if decode else 'context'}")
        ratio = _interpolated(
            table.axes, _state_ratio(source, table, decode), (math.log2(heads), np.log2(np.maximum(tokens, 1e-9)))
        )
        return np.exp2(ratio) * _state_roofline(self.sheet, heads, tokens, state_bytes, decode=decode)

    # Experts.

    def experts_s(
        self, weights: WeightFormat, name: str | None, tokens: Floats, *, hidden: float, intermediate: float,
        chosen: int, experts: int, cut: int, spread: int, matrices: int,
    ) -> Floats:  # fmt: skip
        """The routed experts of one layer, each cut over `cut` GPUs, and spread over `spread`."""
        kind, table, source = self._expert_table(weights, name)
        work = _ExpertWork(hidden, intermediate, chosen, experts, cut, spread)
        ratio = _expert_ratio(table, source.sheet, kind, work, tokens)
        rate = "fp8" if kind == "w4a8_mxfp4_mxfp8" else self.multiplied_in(weights, name)
        return np.exp2(ratio) * work.roofline_s(self.sheet, rate, weights.element_bytes, matrices, tokens)

    def _expert_table(self, weights: WeightFormat, name: str | None) -> tuple[str, ExpertTable, MeasuredGpu]:
        """The table that fits best: the format's own on the nearest GPU, else a like one."""
        wanted: tuple[str, ...]
        if name == "mxfp4":
            wanted = ("w4a16_mxfp4", "int4_wo", "bfloat16")
            if self.sheet.fp4_flops > 0:  # there activations are brought to 8 bits
                wanted = ("w4a8_mxfp4_mxfp8", *wanted)
        elif weights.element_bytes < 0.7:
            wanted = ("nvfp4", "int4_wo") if self.multiplied_in(weights, name) == "nvfp4" else ("int4_wo", "w4a16_mxfp4")
        else:
            kind = self.multiplied_in(weights, name)
            wanted = (kind, "fp8" if kind == "fp8_block" else "bfloat16", "bfloat16")
        for kind in wanted:
            for source in self._sources[:2]:
                if kind in source.experts:
                    return kind, source.experts[kind], source
        for kind in (*wanted, "bfloat16"):
            for source in self._sources:
                if kind in source.experts:
                    return kind, source.experts[kind], source
        raise AssertionError("no experts were measured")

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

    def all_to_all_s(self, message_bytes: Floats, gpus: int) -> Floats:
        """Each GPU sends each other one its part of a message of so many bytes."""
        return self._collective_s("nccl/alltoall", message_bytes, gpus)

    def _collective_s(self, kind: str, message_bytes: Floats, gpus: int) -> Floats:
        if gpus == 1:
            return np.zeros_like(message_bytes)
        source, table = self._table(kind, link=True)
        ratio = _interpolated(
            table.axes, _collective_ratio(source, table), (math.log2(gpus), np.log2(np.maximum(message_bytes, 1.0)))
        )
        return np.exp2(ratio) * _collective_roofline(self.sheet, message_bytes, gpus)

    def _table(self, *kinds: str, link: bool = False) -> tuple[MeasuredGpu, Table]:
        """The first of these kinds that the nearest GPU has, else that any has; `link` likens by the link as well."""
        sources = self._sources
        if link:
            sources = sorted(sources, key=lambda one: abs(math.log(one.sheet.link / self.sheet.link)))
        for kind in kinds:
            for source in sources[:2] if len(kinds) > 1 else sources:
                if kind in source.tables:
                    return source, source.tables[kind]
        raise AssertionError(f"none of {kinds} was measured")


@lru_cache(maxsize=256)
def kernels_of(gpu: GpuModel, measured: tuple[MeasuredGpu, ...]) -> Kernels:
    """The kernels of a GPU from those of measured ones, made once."""
    return Kernels(gpu, measured)


def _peak(sheet: Sheet, kind: str) -> float:
    """Operations a second of a kind of product; kinds that a GPU has not run at its 16-bit rate."""
    match kind:
        case "nvfp4" if sheet.fp4_flops:
            return sheet.fp4_flops
        case "fp8" | "fp8_block" if sheet.fp8_flops:
            return sheet.fp8_flops
        case "int8":
            return 2 * sheet.bf16_flops
        case _:
            return sheet.bf16_flops


TABLED_BYTES = {"bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5625, "int4_wo": 0.516, "w4a16_mxfp4": 0.531,
                "w4a8_mxfp4_mxfp8": 0.531}
_ratios: dict[tuple[int, float, float, float], Floats] = {}


def _cached(table: Table, key: tuple[float, float, float], make: Callable[[], Floats]) -> Floats:
    """Ratios of a table to its roofline, made once."""
    found = _ratios.get((id(table), *key))
    if found is None:
        found = _ratios[id(table), *key] = table.log2_us - math.log2(1e6) - np.log2(make())
    return found


def _mesh(table: Table) -> list[Floats]:
    return [np.exp2(axis) for axis in np.meshgrid(*table.axes, indexing="ij")]


def _gemm_ratio(source: MeasuredGpu, table: Table) -> Floats:
    kind = next(name for name, held in source.tables.items() if held is table).removeprefix("gemm/")

    def roofline() -> Floats:
        m, n, k = _mesh(table)
        moved = n * k * TABLED_BYTES[kind] + m * (n + k) * 2
        return LAUNCH_S + np.maximum(moved / source.sheet.bandwidth, 2 * m * n * k / _peak(source.sheet, kind))

    return _cached(table, (0, 0, 0), roofline)


def _decode_roofline(
    sheet: Sheet, group: Floats | float, streams: Floats, context: Floats, head_dim: float, element: float, window: int
) -> Floats:
    seen = np.minimum(context, window) if window else context
    moved = streams * seen * 2 * head_dim * element
    flops = 4 * group * streams * seen * head_dim
    return ATTENTION_LAUNCH_S + np.maximum(moved / sheet.bandwidth, flops / sheet.bf16_flops)


def _decode_ratio(source: MeasuredGpu, table: Table, head_dim: int, element: float, window: int) -> Floats:
    def roofline() -> Floats:
        group, streams, context = _mesh(table)
        return _decode_roofline(source.sheet, group, streams, context, head_dim, element, window)

    return _cached(table, (head_dim, element, window), roofline)


def _prefill_roofline(
    sheet: Sheet, group: Floats | float, streams: Floats, length: Floats, head_dim: float, window: int
) -> Floats:
    seen = length / 2 if not window else np.where(length > window, window - window**2 / (2 * length), length / 2)
    flops = 4 * group * streams * length * seen * head_dim
    moved = streams * length * (group + 1) * 4 * head_dim
    return ATTENTION_LAUNCH_S + moved / sheet.bandwidth + flops / sheet.bf16_flops


def _prefill_ratio(source: MeasuredGpu, table: Table, head_dim: int, window: int) -> Floats:
    def roofline() -> Floats:
        group, streams, length = _mesh(table)
        return _prefill_roofline(source.sheet, group, streams, length, head_dim, window)

    return _cached(table, (head_dim, 0, window), roofline)


LATENT_RANK, LATENT_ROPE, LATENT_KEY, LATENT_VALUE = 512, 64, 192, 128  # of the measured model


def _latent_decode_roofline(
    sheet: Sheet, heads: Floats | float, sequences: Floats, context: Floats, rank: int, rope: int, element: float
) -> Floats:
    moved = sequences * context * (rank + rope) * element
    flops = 2 * heads * sequences * context * (2 * rank + rope)
    return ATTENTION_LAUNCH_S + np.maximum(moved / sheet.bandwidth, flops / sheet.bf16_flops)


def _latent_decode_ratio(source: MeasuredGpu, table: Table, element: float) -> Floats:
    def roofline() -> Floats:
        heads, sequences, context = _mesh(table)
        return _latent_decode_roofline(source.sheet, heads, sequences, context, LATENT_RANK, LATENT_ROPE, element)

    return _cached(table, (element, 0, 0), roofline)


def _latent_prefill_roofline(
    sheet: Sheet, heads: Floats | float, prompts: Floats, length: Floats, key_dim: int, value_dim: int
) -> Floats:
    flops = heads * prompts * length**2 * (key_dim + value_dim)
    moved = prompts * length * heads * (key_dim + value_dim) * 4
    return ATTENTION_LAUNCH_S + moved / sheet.bandwidth + flops / sheet.bf16_flops


def _latent_prefill_ratio(source: MeasuredGpu, table: Table) -> Floats:
    def roofline() -> Floats:
        heads, prompts, length = _mesh(table)
        return _latent_prefill_roofline(source.sheet, heads, prompts, length, LATENT_KEY, LATENT_VALUE)

    return _cached(table, (0, 0, 0), roofline)


STATE_BYTES = 128 * 128 * 4.0  # of one head of the measured recurrence, in 32 bits


def _state_roofline(
    sheet: Sheet, heads: Floats | float, tokens: Floats, state_bytes: float, *, decode: bool
) -> Floats:
    """Decoding reads and writes each state; a prompt is worked through in chunks that multiply with it."""
    if decode:
        return STATE_LAUNCH_S + 2 * heads * tokens * state_bytes / sheet.bandwidth
    return 8 * STATE_LAUNCH_S + 4 * heads * tokens * state_bytes / 4 * 2 / sheet.bf16_flops


def _state_ratio(source: MeasuredGpu, table: Table, decode: bool) -> Floats:  # noqa: FBT001
    def roofline() -> Floats:
        heads, tokens = _mesh(table)
        return _state_roofline(source.sheet, heads, tokens, STATE_BYTES, decode=decode)

    return _cached(table, (float(decode), 0, 0), roofline)


def _collective_roofline(sheet: Sheet, message_bytes: Floats, gpus: Floats | float) -> Floats:
    return COLLECTIVE_LAUNCH_S + 2 * (gpus - 1) / gpus * message_bytes / sheet.link


def _collective_ratio(source: MeasuredGpu, table: Table) -> Floats:
    def roofline() -> Floats:
        gpus, message_bytes = _mesh(table)
        return _collective_roofline(source.sheet, message_bytes, gpus)

    return _cached(table, (0, 0, 0), roofline)


class _ExpertWork:
    """What the routed experts of one layer do on one GPU."""

    def __init__(
        self, hidden: float, intermediate: float, chosen: int, experts: int, cut: int, spread: int
    ) -> None:
        self.hidden, self.inside = hidden, intermediate / cut
        self.chosen, self.experts, self.local = chosen, experts, experts / spread
        # Likeness: all that the grouped kernels see, in powers of two; the rest is in the roofline.
        self.place = np.log2([hidden, self.inside, chosen, experts, self.local])

    def roofline_s(
        self, sheet: Sheet, kind: str, element_bytes: float, matrices: int, tokens: Floats
    ) -> Floats:
        """Launches, and the longer of reading the experts that are hit and multiplying with them."""
        hit = self.local * (1 - (1 - 1 / self.experts) ** (tokens * self.chosen))
        rows = tokens * self.chosen * self.local / self.experts
        moved = matrices * hit * self.hidden * self.inside * element_bytes + rows * (self.hidden + self.inside) * 4
        flops = 2 * matrices * self.hidden * self.inside * rows
        return EXPERT_LAUNCH_S + np.maximum(moved / sheet.bandwidth, flops / _peak(sheet, kind))


_expert_places: dict[int, Floats] = {}
_TABLED_RATE = {"nvfp4": "nvfp4", "fp8": "fp8", "fp8_block": "fp8_block", "w4a8_mxfp4_mxfp8": "fp8"}


def _expert_ratio(table: ExpertTable, sheet: Sheet, kind: str, work: _ExpertWork, tokens: Floats) -> Floats:
    """Logarithm of the share of the roofline, mixed from the nearest measured configurations."""
    places = _expert_places.get(id(table))
    if places is None:
        hidden, inside, chosen, experts, cut, spread = table.shapes.T
        places = _expert_places[id(table)] = np.log2(
            np.stack([hidden, inside / cut, chosen, experts, experts / spread], axis=1)
        )
    squares = ((places - work.place) ** 2).sum(axis=1)
    nearest = np.argsort(squares, kind="stable")[:NEIGHBOURS]
    weights = 1 / (squares[nearest] + NEAR) ** 2
    if squares[nearest[0]] < 1e-9:
        nearest, weights = nearest[:1], np.ones(1)
    mixed = np.zeros_like(tokens)
    for index, weight in zip(nearest, weights / weights.sum(), strict=True):
        hidden, inside, chosen, experts, cut, spread = table.shapes[index]
        like = _ExpertWork(hidden, inside, int(chosen), int(experts), int(cut), int(spread))
        knots = np.exp2(table.log2_tokens)
        known = like.roofline_s(sheet, _TABLED_RATE.get(kind, "bfloat16"), TABLED_BYTES[kind], 3, knots)
        ratio = table.log2_us[index] - math.log2(1e6) - np.log2(known)
        mixed += weight * np.interp(np.log2(tokens), table.log2_tokens, ratio)
    return mixed


def _interpolated(axes: tuple[Floats, ...], values: Floats, point: tuple[Floats | float, ...]) -> Floats:
    """Multilinear interpolation at points given by coordinate, each held within its axis."""
    total: Floats | float = 0.0
    lows, shares = [], []
    for axis, coordinate in zip(axes, point, strict=True):
        inside = np.clip(coordinate, axis[0], axis[-1])
        low = np.clip(np.searchsorted(axis, inside, side="right") - 1, 0, max(0, len(axis) - 2))
        high = np.minimum(low + 1, len(axis) - 1)
        width = axis[high] - axis[low]
        lows.append((low, high))
        shares.append(np.where(width > 0, (inside - axis[low]) / np.where(width > 0, width, 1), 0.0))
    for corner in range(2 ** len(axes)):
        index, weight = [], 1.0
        for bit, ((low, high), share) in enumerate(zip(lows, shares, strict=True)):
            upper = corner >> bit & 1
            index.append(high if upper else low)
            weight = weight * (share if upper else 1 - share)
        total = total + weight * values[tuple(index)]
    return np.asarray(total)
