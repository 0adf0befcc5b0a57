"""up: a coordinator and agents on this machine."""

from __future__ import annotations

import asyncio
import json
import shlex
from pathlib import Path

import click
import yaml
from rich.console import Console

from enova_cli.context import Context, fail, output_option, pass_context, run
from enova_cli.output import Format
from enova_cli.up.fleet import Fleet
from enova_cli.up.plan import NODES_MAX, UpOptions, parse_gpu
from enova_common.errors import EnovaError, InvalidField, TimedOut

DEFAULT_DATA_DIR = Path("enova-data")


@click.command()
@click.option("--nodes", type=click.IntRange(1, NODES_MAX), default=1, show_default=True)
@click.option(
    "--gpu",
    default="H100:8",
    show_default=True,
    metavar="TYPE:COUNT",
    help="GPUs of each node; CPU:1 for vLLM on a CPU.",
)
@click.option("--engine", type=click.Choice(["simulated", "vllm"]), default="simulated", show_default=True)
@click.option("--engine-command", default="", help="Words that start an engine, as a shell would read them.")
@click.option("--engine-args", default="", help="Further arguments of every engine.")
@click.option("--data-dir", type=click.Path(path_type=Path), default=DEFAULT_DATA_DIR, show_default=True)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=7700, show_default=True, help="Of the API; 0: any free one."
)
@click.option(
    "--openai-port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Of the first ingress; 0: any.",
)
@click.option("--store", type=click.Choice(["sqlite", "etcd"]), default="sqlite", show_default=True)
@click.option(
    "--time-scale", type=click.FloatRange(0.1, 1000.0), default=1.0, show_default=True, help="Speed of the model clock."
)
@output_option
@pass_context
def up(
    context: Context,
    nodes: int,
    gpu: str,
    engine: str,
    engine_command: str,
    engine_args: str,
    data_dir: Path,
    port: int,
    openai_port: int,
    store: str,
    time_scale: float,
) -> None:
    """Run a coordinator and agents here until Ctrl-C, which ends engines and programs in order."""
    try:
        gpu_type, count = parse_gpu(gpu)
        command, arguments = _words(engine_command, "--engine-command"), _words(engine_args, "--engine-args")
    except EnovaError as error:
        fail(error, context.form)
    options = UpOptions(
        nodes=nodes,
        gpu_type=gpu_type,
        gpus_per_node=count,
        engine=engine,
        engine_command=command,
        engine_arguments=arguments,
        data_dir=data_dir.resolve(),
        port=port,
        openai_port=openai_port,
        store=store,
        time_scale=time_scale,
    )
    run(_up(options, context.form), context.form)


def _words(text: str, option: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InvalidField(f"{error}: {text}", field=option, remedy="close the quotes") from error


async def _up(options: UpOptions, form: Format) -> None:
    fleet = Fleet(options)
    stop = asyncio.Event()
    fleet.stop_on_signals(stop)
    console = Console(stderr=True, quiet=form is not Format.TABLE, highlight=False)
    try:
        with console.status("starting"):
            facts = await fleet.start(stop)
        if facts is not None:
            _announce(facts, form, options)
            await stop.wait()
    finally:
        with console.status("stopping engines, then programs"):
            killed = await fleet.stop()
    if killed:
        nodes = ", ".join(killed)
        message = f"the agents of {nodes} did not end their engines in time: these were killed, requests and all"
        raise TimedOut(message, reason="ENGINES_KILLED", remedy=f"see {options.data_dir / 'logs'}")


def _announce(facts: dict[str, object], form: Format, options: UpOptions) -> None:
    if form is Format.JSON:
        print(json.dumps(facts), flush=True)
        return
    if form is Format.YAML:
        print(yaml.safe_dump(facts, sort_keys=False), end="", flush=True)
        return
    gpus = f"{options.gpus_per_node} {'simulated ' if options.engine == 'simulated' else ''}{options.gpu_type}"
    print(f"enova is up: {options.nodes} nodes with {gpus} each")
    print(f"  API     {facts['api']}    (ENOVA_API={facts['api']})")
    print(f"  OpenAI  {facts['openai']}")
    print(f"  data    {facts['data_dir']}", flush=True)
