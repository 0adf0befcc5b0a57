"""Fitting of the performance model's global constants to measured closed loops.

Few numbers, each held near its prior (in logarithms), by least squares with a loss that large errors enter linearly.
Runs of one family on one GPU share what no column tells (engine options, kernels of that version): each such group has
an offset of its own, which is fitted beside the constants and then thrown away. Groups weigh alike, whatever their
rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from enova_recommender.performance import FITTED, Constants, KernelClass, KernelTimes
from enova_testing.latency_model import CLASSES, FEATURES, ROUNDS, loop_features
from enova_testing.latency_rows import Row

Floats = npt.NDArray[np.float64]

UNIT = replace(
    FITTED,
    gemm=1, experts=1, block_experts=1, prefill_attention=1, decode_attention=1, latent_attention=1, recurrence=1,
    elementwise=1, collective=1, step_s=4e-4, prefill_step_s=1e-3, sequence_s=8e-6, first_token_s=8e-3,
    first_token_steps=3.0, gpu_spreads=(),
)  # fmt: skip
PRIOR = np.array([*(1.0 for _ in CLASSES), UNIT.step_s, UNIT.prefill_step_s, UNIT.sequence_s,
                  UNIT.first_token_s, UNIT.first_token_steps])
# How far each may lie from its prior, as standard deviations of the logarithm: kernels were measured, the host was not
# (asynchronous scheduling hides most of it).
KERNEL_WIDTHS = {KernelClass.EXPERTS: 0.3, KernelClass.BLOCK_EXPERTS: 0.6}  # whether engines tune them is not known
WIDTH = np.array([*(KERNEL_WIDTHS.get(kind, 0.15) for kind in CLASSES), 0.7, 0.7, 0.7, 0.5, 0.3])
FIELDS = (*(kind.value.lower() for kind in CLASSES), "step_s", "prefill_step_s", "sequence_s", "first_token_s",
          "first_token_steps")
SCALE = 0.1              # errors beyond it count linearly
TTFT_CLIENTS_MAX = 8     # above, the first token's time shows how the clients march in step
TTFT_WEIGHT = 0.3        # against the cycle's
TTFT_SHARE_MAX = 0.5     # of a cycle: what is above was waiting for room in the cache
ROWS_PER_PRIOR = 10.0    # measured rows that weigh as much as the priors
ROWS_OF_A_GROUP = 15     # that a group weighs at most
OFFSET_WIDTH = 0.1       # of a group's offset, as of the constants' logarithms


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Features and figures of rows, stacked."""

    decode: Floats
    prompt: Floats
    clients: Floats
    outputs: Floats
    ttft_s: Floats
    tpot_s: Floats

    def only(self, keep: npt.NDArray[np.bool_]) -> Measured:
        """Some of the rows."""
        return Measured(
            decode=self.decode[keep], prompt=self.prompt[keep], clients=self.clients[keep],
            outputs=self.outputs[keep], ttft_s=self.ttft_s[keep], tpot_s=self.tpot_s[keep],
        )  # fmt: skip

    def predicted(self, values: Floats) -> tuple[Floats, Floats, Floats]:
        """Cycle, TTFT and TPOT by constants in the order of FIELDS; the formulas are those of `latency_model`."""
        decode, prompt = self.decode @ values[:FEATURES], self.prompt @ values[:FEATURES]
        cycle = self.outputs * decode + self.clients * prompt
        first_s, first_steps = values[FEATURES:]
        ttft = (1 + (self.clients - 1) / 2 / ROUNDS) * prompt + first_steps * decode + first_s
        return cycle, ttft, np.maximum(cycle - ttft, decode) / np.maximum(1, self.outputs - 1)


def measured(rows: Sequence[Row], times: Sequence[KernelTimes]) -> Measured:
    """The features of rows by step times with unit constants."""
    found = [loop_features(one, row) for one, row in zip(times, rows, strict=True)]
    return Measured(
        decode=np.array([decode for decode, _, _ in found]), prompt=np.array([prompt for _, prompt, _ in found]),
        clients=np.array([float(clients) for _, _, clients in found]),
        outputs=np.array([float(row.output_tokens) for row in rows]),
        ttft_s=np.array([row.ttft_s or np.nan for row in rows]),
        tpot_s=np.array([row.tpot_s or np.nan for row in rows]),
    )  # fmt: skip


def fitted(data: Measured, groups: npt.NDArray[np.intp]) -> Floats:
    """Constants in the order of FIELDS; `groups` number the rows' groups from zero."""
    cycles = np.minimum(data.ttft_s, TTFT_SHARE_MAX * data.outputs * data.tpot_s) + (data.outputs - 1) * data.tpot_s
    sizes = np.bincount(groups)
    weights = np.sqrt(ROWS_OF_A_GROUP / np.maximum(sizes[groups], ROWS_OF_A_GROUP))
    heard = np.where(data.clients <= TTFT_CLIENTS_MAX, TTFT_WEIGHT, 0.0) * weights
    strength = SCALE * np.sqrt(ROWS_PER_PRIOR)

    def errors(point: Floats) -> Floats:
        logarithms, offsets = point[: len(PRIOR)], point[len(PRIOR) :]
        cycle, ttft, _ = data.predicted(PRIOR * np.exp(logarithms))
        return np.concatenate([
            weights * (np.log(cycle / cycles) - offsets[groups]),
            heard * (np.log(ttft / data.ttft_s) - offsets[groups]),
            strength * logarithms / WIDTH, strength * offsets / OFFSET_WIDTH,
        ])  # fmt: skip

    start = np.zeros(len(PRIOR) + len(sizes))
    found = least_squares(errors, start, loss="soft_l1", f_scale=SCALE)
    return np.asarray(PRIOR * np.exp(found.x[: len(PRIOR)]))


def constants(values: Floats) -> Constants:
    """Constants from values in the order of FIELDS."""
    return replace(UNIT, **dict(zip(FIELDS, map(float, values), strict=True)))  # type: ignore[arg-type]
