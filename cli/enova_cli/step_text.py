"""Step times and what was learnt of them, in words."""

from __future__ import annotations

from collections.abc import Iterable

from enova.v1.breakdown_service_pb2 import Calibration, StepBreakdown

_FACTOR_SHOWN = 0.005  # factors nearer to 1 than this are not listed


def duration(seconds: float) -> str:
    """Seconds as a person reads them: three figures, in ms below one second."""
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"


def step_lines(steps: StepBreakdown, now_s: float) -> Iterable[str]:
    """The steps of a variant and their kernels, a line each."""
    variant = steps.variant.rpartition("/")[2]
    if steps.HasField("step_s"):
        per_sequence = steps.context_tokens / steps.decode_sequences if steps.decode_sequences else 0.0
        yield (
            f"a step of {variant}, {now_s - steps.time_s:.0f} s ago: {duration(steps.step_s)} measured,"
            f" {duration(steps.predicted_s)} predicted, for {steps.decode_sequences:.1f} sequences of"
            f" {per_sequence:.0f} tokens and {steps.prefill_tokens:.1f} prompt tokens"
        )
    else:
        yield f"a step of {variant}: not measured"
    for each in steps.shares:
        yield f"  {each.kernel.lower().replace('_', ' '):20} {duration(each.seconds):>9} {each.share:6.1%}"
    if steps.HasField("calibration"):
        yield f"  {calibration_line(steps.calibration)}"


def calibration_line(value: Calibration) -> str:
    """By how much steps differ from the kernel tables, and how well that is known."""
    factors = ", ".join(
        f"{each.kernel.lower()} {each.factor:.2f} +- {each.deviation:.2f}"
        for each in value.factors
        if abs(each.factor - 1) > _FACTOR_SHOWN
    )
    return (
        f"steps take {value.factor:.2f} times what the kernel tables say, +- {value.spread:.1%}"
        f" ({value.updates} measurements, {value.outliers} cut as outliers{': ' + factors if factors else ''})"
    )
