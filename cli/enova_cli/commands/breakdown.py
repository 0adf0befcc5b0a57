"""breakdown: where the time of a deployment's requests goes, and that of its engines' steps."""

from __future__ import annotations

import math
from collections.abc import Iterable

import click
from rich.console import Console
from rich.table import Table

from enova.v1.breakdown_service_pb2 import Breakdown, GetBreakdownRequest, TimePart
from enova_cli import output
from enova_cli.client import CALL_TIMEOUT_S, Client
from enova_cli.commands.deployments import Duration
from enova_cli.commands.resources import complete_kind, find, parse_kind
from enova_cli.context import Context, output_option, pass_context
from enova_cli.plain import to_plain
from enova_cli.step_text import duration, step_lines

WINDOW_S = 300.0
_MEANING = {
    "remainder": "HTTP on both hops, tokenising, detokenising, streaming",
}


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
        for line in step_lines(steps, answer.end_s):
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
