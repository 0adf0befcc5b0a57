"""breakdown: where the time of a deployment's requests goes, and that of its engines' steps."""

from __future__ import annotations

import math
from collections.abc import Iterable

import click
from rich.console import Console
from rich.table import Table

from enova.v1.breakdown_service_pb2 import Breakdown, Calibration, GetBreakdownRequest, StepBreakdown, TimePart
from enova_cli import output
from enova_cli.client import CALL_TIMEOUT_S, Client
from enova_cli.commands.deployments import Duration
from enova_cli.commands.resources import complete_kind, find, parse_kind
from enova_cli.context import Context, output_option, pass_context
from enova_cli.plain import to_plain

WINDOW_S = 300.0
_MEANING = {
    "remainder": "HTTP on both hops, tokenising, detokenising, streaming",
}
_FACTOR_SHOWN = 0.005              # factors nearer to 1 than this are not listed


@click.command()
@click.argument("what", metavar="deployment/NAME", shell_complete=complete_kind)
@click.option(
    "--window", type=Duration(), default=WINDOW_S, show_default="5m", help="Model time; 0: since the leader began."
)
@output_option
@pass_context
def breakdown(context: Context, what: str, window: float) -> None:
    """Show where time goes: ingress queue + engine queue + prefill + decode + remainder, and kernels in a step."""
    kind, name = parse_kind(what)
    if kind != "deployments" or not name:
        raise click.UsageError("which one? enova breakdown deployment/NAME")

    async def action(client: Client) -> None:
        full = str((await find(client, kind, name))["name"])
        request = GetBreakdownRequest(name=full, window_s=window)
        answer = await client.call(lambda s: s.breakdowns.GetBreakdown(request, timeout=CALL_TIMEOUT_S))
        if context.form is not output.Format.TABLE:
            output.print_object(kind, to_plain(answer), context.form)
            return
        _print(answer)

    context.run(action)


def _print(answer: Breakdown) -> None:
    span = answer.end_s - answer.start_s
    print(f"{output.short(answer.name)}: {answer.requests} requests were answered in the last {span:.0f} s")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("PART", "MEAN", "SHARE", "P50", "P95", "REQUESTS"):
        table.add_column(heading, justify="left" if heading == "PART" else "right")
    for part in (*answer.parts, answer.end_to_end, answer.ttft, answer.tpot):
        table.add_row(*_row(part))
    Console(highlight=False, markup=False).print(table)
    for steps in answer.steps:
        for line in _steps(steps, answer.end_s):
            print(line)
    for note in answer.notes:
        print(f"note: {note}")


def _row(part: TimePart) -> Iterable[str]:
    name = part.name.replace("_", " ")
    if part.name in _MEANING:
        name = f"{name} ({_MEANING[part.name]})"
    yield name
    yield duration(part.mean_s) if part.HasField("mean_s") else "?"
    yield f"{part.share:.1%}" if part.HasField("share") else ""
    for percentile in ("p50", "p95"):
        yield _quantile(part, percentile)
    yield str(part.count)


def _quantile(part: TimePart, percentile: str) -> str:
    """The value where its bucket is narrow, else the bucket."""
    if not part.HasField(percentile):  # type: ignore[arg-type]  # of two names
        return ""
    quantile = getattr(part, percentile)
    if quantile.high_s <= 1.1 * quantile.low_s or quantile.high_s == 0:
        return duration(quantile.value_s)
    if math.isinf(quantile.high_s):
        return f">{duration(quantile.low_s)}"
    return f"<{duration(quantile.high_s)}" if not quantile.low_s else (
        f"{duration(quantile.low_s)} to {duration(quantile.high_s)}"
    )


def duration(seconds: float) -> str:
    """Seconds as a person reads them: three figures, in ms below one second."""
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"


def _steps(steps: StepBreakdown, now_s: float) -> Iterable[str]:
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
        yield _calibration(steps.calibration)


def _calibration(value: Calibration) -> str:
    factors = ", ".join(
        f"{each.kernel.lower()} {each.factor:.2f} +- {each.deviation:.2f}"
        for each in value.factors
        if abs(each.factor - 1) > _FACTOR_SHOWN
    )
    return (
        f"  steps take {value.factor:.2f} times what the kernel tables say, +- {value.spread:.1%}"
        f" ({value.updates} measurements, {value.outliers} cut as outliers{': ' + factors if factors else ''})"
    )
