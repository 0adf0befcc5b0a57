"""replay: what another policy, or another knob, would have wished for in the situations that a deployment was in."""

from __future__ import annotations

import gzip
import sys
import tempfile
from collections.abc import AsyncIterable
from pathlib import Path
from typing import TextIO

import click
from rich.console import Console
from rich.table import Table

from enova.v1.decision_service_pb2 import ExportSituationsRequest, ExportSituationsResponse
from enova_cli.client import Client, Stubs
from enova_cli.commands.deployments import Duration
from enova_cli.commands.resources import parse_kind
from enova_cli.context import Context, output_option, pass_context, run
from enova_cli.output import print_answer
from enova_cli.plain import rfc3339
from enova_cli.plan_process import Plain, ask_plan
from enova_common.errors import InvalidField, NotFound

SHOWN_MAX = 40                     # looks of the table; -o json has them all


@click.command()
@click.argument("deployment", required=False, metavar="[deployment/NAME]")
@click.option("--policy", default="", help="To decide again by. [the one that decided]")
@click.option("--conservatism", type=float, help="The policy's one knob: above 1 spends GPUs. [as it was]")
@click.option("--last", type=Duration(), help="Only the newest of it, of model time: 1h. [all that is kept]")
@click.option("--save", type=click.Path(path_type=Path), help="Keep the situations in this file (.jsonl or .gz).")
@click.option("--file", type=click.Path(path_type=Path), help="Situations that --save kept; no coordinator is asked.")
@output_option
@pass_context
def replay(
    context: Context,
    deployment: str | None,
    policy: str,
    conservatism: float | None,
    last: float | None,
    save: Path | None,
    file: Path | None,
) -> None:
    """Decide a deployment's recorded situations again, by another policy or knob, and show where the wishes differ.

    Every situation stands as it was: what other decisions would have made of the later ones is not made up
    (enova simulate does that, from a trace). Without an option the recorded wishes must come out again.
    """
    if (deployment is None) == (file is None):
        raise click.UsageError("name a deployment, or a --file that --save wrote")
    if file is not None and (last is not None or save is not None):
        raise click.UsageError("--last and --save belong to a deployment, not to a --file")
    asked: Plain = {"policy": policy, "conservatism": conservatism}

    async def of_file(path: Path) -> None:
        if not path.is_file():
            raise NotFound(f"no file {path}", reason="FILE_NOT_FOUND", field="--file")
        print_answer(_answer(asked | {"situations": str(path.resolve())}), context.form, _print_table)

    async def of_deployment(client: Client) -> None:
        name = _deployment_name(str(deployment))
        with tempfile.TemporaryDirectory(prefix="enova-replay-") as folder:
            path = save or Path(folder) / "situations.jsonl.gz"
            if not await _export(client, ExportSituationsRequest(deployment=name, last_s=last or 0.0), path):
                await client.get_deployment(name)  # none of that name is another matter than none recorded
            print_answer(_answer(asked | {"situations": str(path.resolve())}), context.form, _print_table)

    if file is not None:
        run(of_file(file), context.form)
    else:
        context.run(of_deployment)


def _deployment_name(text: str) -> str:
    kind, name = parse_kind(text if "/" in text else f"deployment/{text}")
    if kind != "deployments" or not name:
        raise click.BadParameter(f"{text!r} is not a deployment: give deployment/NAME")
    return f"deployments/{name}"


async def _export(client: Client, request: ExportSituationsRequest, path: Path) -> int:
    """Write the situations to a file; how many lines they are."""

    def exported(stubs: Stubs) -> AsyncIterable[ExportSituationsResponse]:
        return stubs.decisions.ExportSituations(request)

    count = 0
    try:
        with _opened(path) as lines:
            async for message in client.stream(exported):
                lines.write(f"{message.line}\n")
                count += 1
    except OSError as error:
        raise InvalidField(f"{path} cannot be written: {error.strerror}", field="--save") from error
    return count


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "wt", encoding="utf-8", compresslevel=1)
    return path.open("w", encoding="utf-8")


def _answer(asked: Plain) -> Plain:
    return ask_plan("replay", asked, options={"policy", "conservatism"}, remedy="ask for less: --last 1h")


def _print_table(answer: Plain) -> None:
    differing = [look for look in answer["looks"] if look["differs"]]
    if differing:
        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("MODEL TIME", "RAN", "RECORDED", "REPLAYED", "WHY NOW"):
            table.add_column(heading)
        for look in differing[:SHOWN_MAX]:
            table.add_row(
                rfc3339(look["now_s"]), str(look["target"]), _wish(look["recorded"]), _wish(look["replayed"]),
                look["replayed"]["reason"],
            )  # fmt: skip
        console.print(table)
        if len(differing) > SHOWN_MAX:
            print(f"... and {len(differing) - SHOWN_MAX} more (-o json has them all)")
        print()
    hours = (answer["last_s"] - answer["first_s"]) / 3600
    print(
        f"{answer['situations']:,} situations of {answer['deployment']} in {hours:.2f} h: "
        f"{answer['differences']} wishes differ."
    )
    before, now = answer["recorded"], answer["replayed"]
    knobs = ", ".join(f"{each:g}" for each in before["conservatism"])
    for word, one, name in (
        ("Recorded", before, f"{', '.join(before['policies'])} with conservatism {knobs}"),
        ("Replayed", now, f"{now['policy'] or 'the same policy'} with {_knob(now['conservatism'])}"),
    ):
        print(
            f"{word}: {name}: {one['replica_hours']:.2f} replica-hours wished for, "
            f"in {one['changes']} looks another number than ran."
        )


def _wish(wish: Plain) -> str:
    replaced = f", replaces {len(wish['replace'])}" if wish["replace"] else ""
    return f"{wish['replicas']}{replaced}"


def _knob(value: float | None) -> str:
    return "the same conservatism" if value is None else f"conservatism {value:g}"
