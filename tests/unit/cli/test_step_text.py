"""Step times are told with their measure, and what was not measured is not told."""

from __future__ import annotations

import pytest

from enova.v1.breakdown_service_pb2 import Calibration, KernelFactor, KernelShare, StepBreakdown
from enova_cli.step_text import calibration_line, duration, step_lines

LEARNT = Calibration(
    factor=1.31, spread=0.043, updates=120, outliers=3,
    factors=[
        KernelFactor(kernel="MEMORY", factor=1.32, deviation=0.03),
        KernelFactor(kernel="COLLECTIVE", factor=1.001, deviation=0.3),
    ],
)  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 ms"), (0.000324, "0.324 ms"), (0.0096, "9.6 ms"), (1.9321, "1.93 s"), (1234.6, "1235 s")],
)
def test_durations_have_three_figures(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_step_is_told_with_its_batch_its_kernels_and_what_was_learnt() -> None:
    steps = StepBreakdown(
        variant="deployments/chat/variants/v1", time_s=90.0, step_s=0.0096, predicted_s=0.0095, prefill_tokens=12.5,
        decode_sequences=32.0, context_tokens=25_600.0, calibration=LEARNT,
        shares=[KernelShare(kernel="DECODE_ATTENTION", seconds=0.0019, share=0.2)],
    )  # fmt: skip
    first, kernel, learnt = step_lines(steps, 100.0)
    assert first == (
        "a step of v1, 10 s ago: 9.6 ms measured, 9.5 ms predicted, for 32.0 sequences of 800 tokens"
        " and 12.5 prompt tokens"
    )
    assert kernel.split() == ["decode", "attention", "1.9", "ms", "20.0%"]
    assert learnt.strip() == calibration_line(LEARNT)


def test_a_step_that_was_not_measured_is_told_so() -> None:
    first, learnt = step_lines(StepBreakdown(variant="deployments/chat/variants/v1", calibration=LEARNT), 100.0)
    assert first == "a step of v1: not measured"
    assert learnt.strip().startswith("steps take 1.31 times")


def test_factors_that_changed_nothing_are_not_listed() -> None:
    line = calibration_line(LEARNT)
    assert "+- 4.3% (120 measurements, 3 cut as outliers: memory 1.32 +- 0.03)" in line
    assert "collective" not in line
