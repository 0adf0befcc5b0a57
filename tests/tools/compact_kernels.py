"""Make the compact kernel tables that `enova_recommender.catalog.kernels` reads, out of public measurements.

    python compact_kernels.py --data DIR [--out FOLDER]

DIR holds the sets `kernels_aiconfigurator` and `kernels_aiconfigurator_v24`
(https://github.com/ai-dynamo/aiconfigurator, Apache-2.0). Needs pandas, pyarrow and scipy.

What is kept: of each shape the fastest kernel, as the base-2 logarithm of its time in microseconds, on a thinned grid.
Attention depends on batch and heads through their product nearly alone (5 % in the median, 19 % at the 90th percentile
over all splits of one product), so the two axes become one. Times are made to grow along tokens, sequences and context:
no shape takes longer than a larger one; what falls there is noise or a bad choice of kernel. Holes take the nearest
shape's share of the roofline.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml
from scipy import ndimage
from scipy.interpolate import RegularGridInterpolator

OUT = Path(__file__).parents[2] / "recommender" / "enova_recommender" / "catalog"
GPUS = ("a100_sxm", "l40s", "h100_sxm", "h200_sxm", "b200_sxm", "b300_sxm", "gb200")
GEMM_M = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384,
          32768)
GEMM_NK_MIN = 128
WEIGHT_BYTES = {"bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5625}
# Attention is tabled by query heads per KV head; ratios between are interpolated.
DISTRIBUTION = "power_law_1.01"  # of tokens over experts: real routers are uneven
OUTLIER = 1.3            # times the median of its neighbours: one shape's bad choice of kernel
LAUNCH_SLACK = 1.5       # below this multiple of its floor an eager measurement shows the host, not the kernel

Floats = npt.NDArray[np.float64]
Arrays = dict[str, npt.NDArray[np.generic]]
Meta = dict[str, dict[str, list[list[float]]]]


class Tables:
    """What is written: arrays by name, and the axes of each."""

    def __init__(self) -> None:
        self.arrays: Arrays = {}
        self.axes: dict[str, list[list[float]]] = {}

    def add(self, name: str, values_us: Floats, axes: Sequence[Iterable[float]]) -> None:
        """Keep one table of microseconds."""
        assert np.isfinite(values_us).all(), name
        assert (values_us > 0).all(), name
        self.arrays[name] = np.round(np.log2(values_us) * SCALE).astype(np.int16)
        self.axes[name] = [[float(knot) for knot in axis] for axis in axes]


SCALE = 1024  # of the stored logarithms: steps of 0.07 %


def read(data: Path, gpu: str, kind: str) -> pd.DataFrame | None:
    """One kind of measurements of one GPU, of the newest version that has it; None if there are none."""
    for path in (
        data / "kernels_aiconfigurator_v24" / f"{gpu}_{kind}_perf.parquet",
        data / "kernels_aiconfigurator" / f"{gpu}_{kind}_perf.csv.gz",
    ):
        if path.exists():
            return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    return None


def grid(rows: pd.DataFrame, columns: Sequence[str], axes: Sequence[Sequence[float]]) -> Floats:
    """Microseconds on the grid of these axes, not a number where nothing was measured."""
    values = np.full([len(axis) for axis in axes], np.nan)
    places = [pd.Index(axis).get_indexer(rows[column]) for column, axis in zip(columns, axes, strict=True)]
    keep = np.all([place >= 0 for place in places], axis=0)
    values[tuple(place[keep] for place in places)] = rows["latency"].to_numpy()[keep] * 1e3
    return values


def filled(values: Floats, roofline_us: Floats) -> Floats:
    """Holes closed by the share of the roofline of the nearest measured shape."""
    ratio = values / roofline_us
    nearest = ndimage.distance_transform_edt(np.isnan(ratio), return_distances=False, return_indices=True)
    return np.asarray(ratio[tuple(nearest)] * roofline_us)


def growing(values: Floats, *along: int) -> Floats:
    """Made to grow along these axes: no shape takes longer than a larger one, to which it could be padded."""
    for axis in along:
        backwards = np.flip(values, axis=axis)
        values = np.flip(np.minimum.accumulate(backwards, axis=axis), axis=axis)
    return values


def fastest(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Of each shape the shortest time over kernels."""
    return rows.groupby(list(columns), as_index=False)["latency"].min()


def knots(rows: pd.DataFrame, column: str, least: float = 0) -> list[float]:
    """The values of a column, sorted."""
    return sorted(value for value in rows[column].unique().tolist() if value >= least)


def gemm(tables: Tables, data: Path, gpu: str, sheet: dict[str, float]) -> None:
    """Matrix products by rows m, columns n and inner size k."""
    rows = read(data, gpu, "gemm")
    assert rows is not None
    by_dtype: dict[str, Floats] = {}
    for dtype, group in rows.groupby("gemm_dtype"):
        best = fastest(group, ("m", "n", "k"))
        m = [float(value) for value in GEMM_M if value in set(best.m)]
        n, k = knots(best, "n", GEMM_NK_MIN), knots(best, "k", GEMM_NK_MIN)
        values = grid(best, ("m", "n", "k"), (m, n, k))
        mm, nn, kk = np.meshgrid(m, n, k, indexing="ij")
        moved = nn * kk * WEIGHT_BYTES[str(dtype)] + mm * (nn + kk) * 2
        roofline = 2 + 1e6 * np.maximum(moved / sheet["bandwidth"], 2 * mm * nn * kk / sheet["bf16_flops"])
        values = filled(values, roofline)
        ratio = values / roofline
        usual = ndimage.median_filter(ratio, size=(1, 3, 3), mode="nearest")
        values = np.where(ratio > OUTLIER * usual, usual, ratio) * roofline
        by_dtype[str(dtype)] = growing(values, 0)
        tables.axes[f"{gpu}/gemm/{dtype}"] = [m, n, k]
    for dtype, values in by_dtype.items():
        kept = values
        if dtype == "fp8_block" and "fp8" in by_dtype:
            # Measured without CUDA graphs: near its floor the time is the host's. There the kernel is as fp8's.
            floor = np.quantile(values, 0.05)
            kernel = np.where(values > LAUNCH_SLACK * floor, values, by_dtype["fp8"])
            kept = growing(np.maximum(kernel, by_dtype["fp8"]), 0)
        tables.add(f"{gpu}/gemm/{dtype}", kept, tables.axes[f"{gpu}/gemm/{dtype}"])


def attention_rows(data: Path, gpu: str, kind: str) -> pd.DataFrame:
    """Attention measurements with the columns of the newer version, heads and batch in the joint form."""
    rows = read(data, gpu, kind)
    assert rows is not None
    for column, value in (("head_dim", 128), ("window_size", 0)):
        if column not in rows:
            rows[column] = value
    rows = rows[rows.num_heads % rows.num_key_value_heads == 0].copy()
    rows["group"] = rows.num_heads // rows.num_key_value_heads
    rows = rows[rows["group"].isin((1, 2, 4, 8, 16, 32, 64))]
    rows["streams"] = rows.batch_size * rows.num_key_value_heads
    return rows


def attention(tables: Tables, data: Path, gpu: str, kind: str, sheet: dict[str, float]) -> None:
    """Attention of one layer by query heads per KV head, sequences x KV heads, and context (or prompt) tokens."""
    rows = attention_rows(data, gpu, kind)
    length = "step" if kind == "generation_attention" else "isl"
    for (head_dim, dtype, window), group in rows.groupby(["head_dim", "kv_cache_dtype", "window_size"]):
        columns = ("group", "streams", length)
        least = fastest(group, (*columns, "batch_size", "num_heads"))
        best = least.groupby(list(columns), as_index=False)["latency"].median()
        if kind == "generation_attention":
            best["step"] += 1
        groups = knots(best, "group")
        streams = [value for value in (2**power for power in range(15)) if value in set(best.streams)]
        lengths = knots(best, length)
        values = grid(best, columns, (groups, streams, lengths))
        gg, pp, ll = np.meshgrid(groups, streams, lengths, indexing="ij")
        seen = np.minimum(ll, window or ll)
        if kind == "generation_attention":
            moved = pp * seen * 2 * head_dim * (1 if dtype == "fp8" else 2)
            flops = 4 * gg * pp * seen * head_dim
        else:
            moved = pp * ll * (gg + 1) * 4 * head_dim
            flops = 4 * gg * pp * ll * np.where(ll > seen, seen, ll / 2) * head_dim
        roofline = 8 + 1e6 * np.maximum(moved / (0.8 * sheet["bandwidth"]), flops / (0.6 * sheet["bf16_flops"]))
        values = filled(values, roofline)
        if kind == "generation_attention":
            # Small caches stayed in the chip's own memory between repeats; between the layers of a model they do not.
            rate = np.quantile((moved / values)[moved > 0.3 * moved.max()], 0.9)
            values = np.maximum(values, values.min() + moved / rate)
        values = growing(values, 1, 2)
        short = "decode" if kind == "generation_attention" else "prefill"
        tables.add(f"{gpu}/{short}/{head_dim}/{dtype}/{window}", values, (groups, streams, lengths))


def experts(tables: Tables, data: Path, gpu: str) -> None:
    """Grouped products of the routed experts: one row a configuration, one column a number of tokens."""
    rows = read(data, gpu, "moe")
    if rows is None:
        return
    rows = rows[rows.distribution == DISTRIBUTION]
    shape = ["hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"]
    for dtype, group in rows.groupby("moe_dtype"):
        best = fastest(group, (*shape, "num_tokens"))
        wide = best.pivot(index=shape, columns="num_tokens", values="latency")
        wide = wide[wide.notna().mean(axis=1) > 0.5]
        wide = wide.interpolate(axis=1, limit_direction="both")
        configurations = wide.index.to_frame().to_numpy(dtype=np.float64)
        values = growing(wide.to_numpy() * 1e3, 1)
        tables.add(f"{gpu}/moe/{dtype}", values, (wide.columns.tolist(),))
        tables.arrays[f"{gpu}/moe_shapes/{dtype}"] = configurations.astype(np.int32)


def interpolated(tables: Tables, name: str, points: Sequence[Floats]) -> Floats:
    """Microseconds between the knots of a table that is already there, linear in logarithms."""
    axes = [np.log2(axis) for axis in tables.axes[name]]
    values = tables.arrays[name].astype(np.float64) / SCALE
    places = np.stack([np.log2(point) for point in np.broadcast_arrays(*points)], axis=-1)
    inside = [np.clip(places[..., index], axis[0], axis[-1]) for index, axis in enumerate(axes)]
    found = RegularGridInterpolator(axes, values)(np.stack(inside, axis=-1))
    return np.asarray(np.exp2(found))


# The model whose latent attention was measured: hidden size, ranks and head sizes of DeepSeek-V3.
LATENT_HIDDEN, QUERY_RANK, KV_RANK, NOPE, ROPE, VALUE = 7168, 1536, 512, 128, 64, 128
LATENT_FLOOR_US = 12.0  # of attention alone, as by CUDA graph


def projections_us(tables: Tables, gpu: str, heads: Floats, tokens: Floats, *, decode: bool) -> Floats:
    """Time of the projections that the measured module holds beside attention."""
    name = f"{gpu}/gemm/bfloat16"
    shapes = [
        (QUERY_RANK + KV_RANK + ROPE, LATENT_HIDDEN), (heads * (NOPE + ROPE), QUERY_RANK),
        (LATENT_HIDDEN, heads * VALUE),
        *([(heads * NOPE, KV_RANK), (KV_RANK, heads * VALUE)] if decode else [(heads * (NOPE + VALUE), KV_RANK)]),
    ]  # fmt: skip
    full = np.ones_like(tokens)
    beyond = np.maximum(1, tokens / tables.axes[name][0][-1])  # of the table's most tokens: there time is in proportion
    times = [interpolated(tables, name, (tokens, n * full, k * full)) for n, k in shapes]
    return np.asarray(beyond * np.sum(times, axis=0))


def latent(tables: Tables, data: Path, gpu: str, kind: str, sheet: dict[str, float]) -> None:
    """The attention in multi-head latent attention, without its projections, by heads, sequences and tokens.

    The module was measured with its projections, which the table of matrix products gives.
    """
    rows = read(data, gpu, f"mla_{kind}_module")
    if rows is None:
        return
    decode = kind == "generation"
    length = "step" if decode else "isl"
    for cached, group in rows[rows.gemm_type == "bfloat16"].groupby("kv_cache_dtype"):
        best = fastest(group, ("num_heads", "batch_size", length))
        axes = [knots(best, "num_heads"), knots(best, "batch_size"), knots(best, length)]
        module = grid(best, ("num_heads", "batch_size", length), axes)
        hh, bb, ll = np.meshgrid(*axes, indexing="ij")
        element = 1 if cached == "fp8" else 2
        if decode:
            moved, flops = bb * ll * (KV_RANK + ROPE) * element, 2 * hh * bb * ll * (2 * KV_RANK + ROPE)
        else:
            moved, flops = bb * ll * hh * (NOPE + VALUE) * 4, hh * bb * ll * ll * (NOPE + ROPE + VALUE)
        roofline = LATENT_FLOOR_US + 1e6 * np.maximum(
            moved / (0.8 * sheet["bandwidth"]), flops / (0.6 * sheet["bf16_flops"])
        )
        tokens = bb if decode else bb * ll
        core = module - projections_us(tables, gpu, hh, tokens, decode=decode)
        # The module's other small kernels are counted as the model's own.
        smallest = np.nanmin(core.reshape(len(axes[0]), -1), axis=1)
        core = core - np.maximum(0.0, smallest - LATENT_FLOOR_US)[:, None, None]
        core = np.where(np.isnan(module), np.nan, np.maximum(core, LATENT_FLOOR_US))
        values = growing(filled(core, roofline), 0, 1, 2)
        tables.add(f"{gpu}/latent_{'decode' if decode else 'prefill'}/{cached}", values, axes)


def recurrence(tables: Tables, data: Path, gpu: str) -> None:
    """Gated delta rule with its convolution: by value heads, and sequences (decode) or tokens (prefill)."""
    rows = read(data, gpu, "gdn")
    if rows is None:
        return
    for phase, group in rows.groupby("phase"):
        axis = "batch_size" if phase == "generation" else "num_tokens"
        kernels = group.groupby(["kernel_source", "num_v_heads", axis], as_index=False)["latency"].median()
        total = kernels.groupby(["num_v_heads", axis], as_index=False)["latency"].sum()
        axes = [knots(total, "num_v_heads"), knots(total, axis)]
        values = grid(total, ("num_v_heads", axis), axes)
        hh, tt = np.meshgrid(*axes, indexing="ij")
        values = growing(filled(values, 10 + hh * tt * (0.02 if phase == "generation" else 0.002)), 0, 1)
        tables.add(f"{gpu}/gdn/{phase}", values, axes)


def hull(values: Floats, message_bytes: Sequence[float]) -> Floats:
    """The lower convex hull over the bytes of the message: steps are switches between algorithms, set too early."""
    lowered = growing(values, 1)
    x = np.array(message_bytes)
    for row in lowered:
        kept = [0]
        for index in range(1, len(x)):
            while len(kept) > 1 and (row[index] - row[kept[-1]]) * (x[kept[-1]] - x[kept[-2]]) < (
                row[kept[-1]] - row[kept[-2]]
            ) * (x[index] - x[kept[-1]]):
                kept.pop()
            kept.append(index)
        row[:] = np.interp(x, x[kept], row[kept])
    return lowered


def collectives(tables: Tables, data: Path, gpu: str) -> None:
    """Collectives among the GPUs of a node, by their number and the bytes of the message."""
    custom = read(data, gpu, "custom_allreduce")
    assert custom is not None
    for source, group in custom.groupby("kernel_source"):
        best = fastest(group, ("num_gpus", "message_size"))
        axes = [knots(best, "num_gpus"), knots(best, "message_size")]
        values = hull(grid(best, ("num_gpus", "message_size"), axes), axes[1])
        tables.add(f"{gpu}/all_reduce/{'graph' if 'graph' in str(source) else 'eager'}", values, axes)
    rows = read(data, gpu, "nccl")
    if rows is None:
        return
    for name, group in rows[rows.nccl_dtype == "half"].groupby("op_name"):
        best = fastest(group, ("num_gpus", "message_size"))
        axes = [knots(best, "num_gpus"), knots(best, "message_size")]
        values = grid(best, ("num_gpus", "message_size"), axes)
        values = hull(filled(values, 10 + np.broadcast_to(np.array(axes[1]), values.shape) / 1e5), axes[1])
        tables.add(f"{gpu}/nccl/{name}", values, axes)


def data_sheet(data: Path, gpu: str) -> dict[str, float]:
    """The figures by which a GPU is recognised, and against which shares of the roofline are taken."""
    folders = ("kernels_aiconfigurator_v24", "kernels_aiconfigurator")
    paths = [data / folder / f"{gpu}_system.yaml" for folder in folders]
    system = yaml.safe_load(next(path for path in paths if path.exists()).read_text())
    chip = system["gpu"]
    return {
        "bandwidth": float(chip["mem_bw"]), "bf16_flops": float(chip["bfloat16_tc_flops"]),
        "fp8_flops": float(chip.get("fp8_tc_flops", 0)), "fp4_flops": float(chip.get("fp4_tc_flops", 0)),
        "link": float(system["node"]["intra_node_bw"]), "memory": float(chip["mem_capacity"]),
        "compute_capability": chip["sm_version"] / 10,
    }  # fmt: skip


def main() -> None:
    """Read everything, write `kernels.npz` and `kernels.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    tables = Tables()
    sheets = {gpu: data_sheet(options.data, gpu) for gpu in GPUS}
    steps: tuple[Callable[[str], None], ...] = (
        lambda gpu: gemm(tables, options.data, gpu, sheets[gpu]),
        lambda gpu: attention(tables, options.data, gpu, "generation_attention", sheets[gpu]),
        lambda gpu: attention(tables, options.data, gpu, "context_attention", sheets[gpu]),
        lambda gpu: experts(tables, options.data, gpu),
        lambda gpu: latent(tables, options.data, gpu, "generation", sheets[gpu]),
        lambda gpu: latent(tables, options.data, gpu, "context", sheets[gpu]),
        lambda gpu: recurrence(tables, options.data, gpu),
        lambda gpu: collectives(tables, options.data, gpu),
    )
    for gpu in GPUS:
        for step in steps:
            step(gpu)
    np.savez_compressed(options.out / "kernels.npz", **tables.arrays)  # type: ignore[arg-type]
    index = {"scale": SCALE, "gpus": sheets, "axes": tables.axes}
    (options.out / "kernels.json").write_text(json.dumps(index, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
