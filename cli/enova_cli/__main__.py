"""The enova command: options that all commands share, and the commands."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from enova_cli.commands.breakdown import breakdown
from enova_cli.commands.certs import certs
from enova_cli.commands.deployments import accept, apply, delete, deploy, pause, resume, scale, wait
from enova_cli.commands.episodes import episodes
from enova_cli.commands.load import load
from enova_cli.commands.recommend import recommend
from enova_cli.commands.replay import replay
from enova_cli.commands.resources import describe, events, explain, get
from enova_cli.commands.runtime import chat, completion, drain, logs, restart, uncordon, version
from enova_cli.commands.simulate import simulate
from enova_cli.commands.up import up
from enova_cli.context import EXIT_USAGE, Context
from enova_cli.output import Format, print_error
from enova_common.errors import InvalidField
from enova_common.settings import TlsSettings

DEFAULT_API = "127.0.0.1:7700"


class Commands(click.Group):
    """The group; with `-o json` a wrong use of it is told in JSON as every other error is."""

    def main(  # type: ignore[override]  # click's overloads promise a return that only other callers ask for
        self, args: Sequence[str] | None = None, **named: Any
    ) -> Any:
        """Run the command that the arguments name, and exit."""
        if not _wants_json(sys.argv[1:] if args is None else args):
            return super().main(args, **named)
        try:
            code = super().main(args, **named | {"standalone_mode": False})
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx is not None else "enova"
            param = error.param if isinstance(error, click.BadParameter) else None
            field = param.opts[-1] if param is not None else ""
            told = InvalidField(error.format_message(), field=field, reason="USAGE", remedy=f"{path} --help")
            print_error(told, Format.JSON)
            sys.exit(EXIT_USAGE)
        except click.Abort:
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


def _wants_json(words: Sequence[str]) -> bool:
    apart = any(pair in {("-o", "json"), ("--output", "json")} for pair in itertools.pairwise(words))
    return apart or not {"-ojson", "--output=json"}.isdisjoint(words)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--api", envvar="ENOVA_API", default=DEFAULT_API, show_default=True, help="Coordinators, HOST:PORT[,HOST:PORT...]."
)
@click.option("--tls-ca", envvar="ENOVA_TLS_CA", type=click.Path(path_type=Path), help="The fleet's ca.crt.")
@click.option("--tls-cert", envvar="ENOVA_TLS_CERT", type=click.Path(path_type=Path), help="Your certificate.")
@click.option("--tls-key", envvar="ENOVA_TLS_KEY", type=click.Path(path_type=Path), help="Its key.")
@click.pass_context
def main(ctx: click.Context, api: str, tls_ca: Path | None, tls_cert: Path | None, tls_key: Path | None) -> None:
    """Deploy, watch and autoscale LLM serving on GPU hosts."""
    files = (tls_ca, tls_cert, tls_key)
    if any(files) and not all(files):
        raise click.UsageError("give --tls-ca, --tls-cert and --tls-key together")
    tls = TlsSettings(ca=tls_ca, cert=tls_cert, key=tls_key) if tls_ca and tls_cert and tls_key else None
    endpoints = [part.strip() for part in api.split(",") if part.strip()]
    if not endpoints:
        raise click.UsageError("--api names no coordinator: give HOST:PORT")
    ctx.obj = Context(endpoints=endpoints, tls=tls)


for command in (
    up,
    deploy,
    apply,
    accept,
    get,
    describe,
    wait,
    scale,
    delete,
    logs,
    events,
    explain,
    episodes,
    breakdown,
    chat,
    load,
    recommend,
    simulate,
    replay,
    drain,
    uncordon,
    restart,
    pause,
    resume,
    certs,
    version,
    completion,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
