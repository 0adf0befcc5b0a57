"""recommend: which GPUs, how many and which settings carry a workload within its objectives, and why."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from enova.v1.deployment_service_pb2 import RecommendConfigurationRequest, RecommendConfigurationResponse
from enova_cli import output
from enova_cli.client import Client
from enova_cli.commands.deployments import Duration
from enova_cli.commands.fleet import print_allocation
from enova_cli.context import Context, output_option, pass_context, run
from enova_cli.output import print_answer
from enova_cli.plain import from_plain, to_plain
from enova_cli.plot import plot_answer
from enova_cli.workload import read_workload
from enova_common.errors import FatalError, InvalidField, NotFound, TimedOut
from enova_common.vllm import FLAGS, FlagKind

RECOMMEND_TIMEOUT_S = 120.0
CONFIG_BYTES_MAX = 1 << 20
ALTERNATIVES_SHOWN = 5
_GPU = re.compile(r"([A-Za-z0-9._ -]+):(-?\d+)(?:@(\d+(?:\.\d+)?))?")

_HEADINGS = (
    "", "GPU", "REPLICAS", "GPUS", "USD/H", "TTFT", "TPOT", "CARRIES/S", "MAX_NUM_SEQS", "KV TOKENS", "LOST TO"
)  # fmt: skip

Plain = dict[str, Any]


@click.command()
@click.option("--fleet", is_flag=True, help="For all deployments of the running fleet together; needs no other option.")
@click.option("--model", help="Name of the catalogue, or the path of a config.json (or its folder).")
@click.option("--gpus", default="", help="TYPE:COUNT[@USD_AN_HOUR],...: H100:8,L40S:16. With --api: what is free.")
@click.option(
    "--gpus-file", "--gpu-file", "gpu_file", type=click.Path(path_type=Path),
    help="JSON list of GPU types that the catalogue lacks.",
)
@click.option("--workload", help="Trace CSV (or .gz), or rate=5,prompt=512,output=128.")
@click.option("--lengths", default="", help="prompt=512,output=128: for a trace that counts requests alone.")
@click.option("--allow-gaps", is_flag=True, help="Take long silences in the trace as they are.")
@click.option("--ttft-p95", type=Duration(), help="Objective: time to first token, 500ms.")
@click.option("--tpot-p95", type=Duration(), help="Objective: time per output token, 50ms.")
@click.option("--max-gpus", type=int, help="Of all replicas together.")
@click.option("--kv-cache-dtype", "kv_cache_dtypes", multiple=True, help="To try: auto, fp8; may be repeated.")
@click.option("--headroom", type=float, default=0.0, help="With --fleet: capacity beyond demand, as a share of it.")
@click.option("--time-limit", type=Duration(), help="With --fleet: of the integer programme; 10s.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write the Pareto picture to this .svg or .png.")
@output_option
@pass_context
def recommend(
    context: Context,
    fleet: bool,
    model: str | None,
    gpus: str,
    gpu_file: Path | None,
    workload: str | None,
    lengths: str,
    allow_gaps: bool,
    ttft_p95: float | None,
    tpot_p95: float | None,
    max_gpus: int | None,
    kv_cache_dtypes: tuple[str, ...],
    headroom: float,
    time_limit: float | None,
    plot: Path | None,
) -> None:
    """Say which GPUs, how many and which settings carry a workload within its objectives, and why.

    Without --api it is computed here; with it, by the coordinator, which knows the fleet and the hosts' models. With
    --fleet the coordinator says it of all deployments together, for the traffic that it counted.
    """
    if fleet:
        _refuse_beside_fleet()
        run(print_allocation(context, headroom=headroom, time_limit_s=time_limit), context.form)
        return
    if headroom or time_limit is not None:
        raise click.UsageError(f"{'--headroom' if headroom else '--time-limit'} belongs to --fleet")
    if model is None or workload is None:
        raise click.UsageError(f"Missing option '{'--model' if model is None else '--workload'}'.")
    remote = _asks_coordinator()

    async def action() -> None:
        plain: Plain = {
            **_model(model),
            "gpus": [*parse_supply(gpus), *_described(gpu_file)],
            "workload": read_workload(workload, lengths=lengths, allow_gaps=allow_gaps),
            "objectives": {k: v for k, v in {"ttft_s": ttft_p95, "tpot_s": tpot_p95}.items() if v is not None},
            "kv_cache_dtypes": list(kv_cache_dtypes),
            **({"max_gpus": max_gpus} if max_gpus is not None else {}),
        }
        if plot is not None and plot.suffix.lower() not in {".svg", ".png"}:
            raise InvalidField(f"{plot.name} is neither .svg nor .png", field="--plot")
        answer = await _ask(context, plain) if remote else compute(plain)
        shown = answer | {"command": command_line(_served(model), answer)}
        if plot is not None:
            plot_answer(shown, plot)
        print_answer(shown, context.form, _print_table)

    run(action(), context.form)


def _refuse_beside_fleet() -> None:
    """Raises UsageError for an option that says nothing of a fleet."""
    context = click.get_current_context()
    known = {"fleet", "headroom", "time_limit", "output"}
    for param in context.command.params:
        given = context.get_parameter_source(param.name or "") is not click.core.ParameterSource.DEFAULT
        if given and param.name not in known:
            raise click.UsageError(f"--fleet asks about what runs: it takes no {param.opts[-1]}")


def parse_supply(text: str) -> list[Plain]:
    """TYPE:COUNT[@PRICE] parts as plain values of `GpuSupply`; counts are the recommender's to judge."""
    supply: list[Plain] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _GPU.fullmatch(part)
        if match is None:
            raise InvalidField(f"{part!r} is not TYPE:COUNT[@PRICE]", field="--gpus", remedy="H100:8,L40S:16@1.20")
        price = {} if match[3] is None else {"price_per_hour": float(match[3])}
        supply.append({"type": match[1], "count": int(match[2]), **price})
    return supply


def compute(plain: Plain) -> Plain:
    """The answer of the simulator's plan, which needs no coordinator. Raises what the API would."""
    from_plain(RecommendConfigurationRequest, plain)  # the same form that the API takes
    try:
        done = subprocess.run(
            [sys.executable, "-m", "enova_simulator.plan", "recommend"],
            input=json.dumps(plain), capture_output=True, text=True, check=False, timeout=RECOMMEND_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TimedOut(f"no answer within {RECOMMEND_TIMEOUT_S:g} s", remedy="ask for fewer types of GPU") from error
    if done.returncode == 0:
        return to_plain(from_plain(RecommendConfigurationResponse, json.loads(done.stdout)))
    last = done.stderr.strip().rpartition("\n")[2]
    try:
        told = json.loads(last)
    except ValueError as error:
        raise FatalError(f"enova_simulator.plan failed: {last}", reason="RECOMMENDER_FAILED") from error
    raise InvalidField(told["message"], field=told["field"], remedy=told["remedy"])


def command_line(model: str, answer: Mapping[str, Any]) -> str:
    """The `vllm serve` command of the chosen configuration, for a shell; empty if there is none."""
    chosen = answer.get("chosen")
    if not chosen:
        return ""
    words = ["vllm", "serve", model]
    for name, value in chosen["configuration"].items():
        flag = FLAGS[name]
        problem = flag.problem(value)
        if problem is not None:
            raise FatalError(f"{flag.option} {problem}", reason="RECOMMENDER_FAILED")
        if flag.kind is FlagKind.BOOLEAN:
            words.append(flag.option if value else flag.negative_option)
        else:
            words += [flag.option, str(value)]
    return shlex.join(words)


def _asks_coordinator() -> bool:
    group = click.get_current_context().find_root()
    return group.get_parameter_source("api") is not click.core.ParameterSource.DEFAULT


async def _ask(context: Context, plain: Plain) -> Plain:
    request = from_plain(RecommendConfigurationRequest, plain)
    async with Client(context.endpoints, context.tls) as client:
        response = await client.call(
            lambda stubs: stubs.deployments.RecommendConfiguration(request, timeout=RECOMMEND_TIMEOUT_S)
        )
    return to_plain(response)




def _model(text: str) -> Plain:
    path = Path(text)
    file = path / "config.json" if path.is_dir() else path
    if not (file.is_file() or text.endswith(".json") or path.is_dir()):
        return {"model": text}
    try:
        if file.stat().st_size > CONFIG_BYTES_MAX:
            raise InvalidField(f"{file} is over {CONFIG_BYTES_MAX} bytes", field="--model", remedy="give a config.json")
        return {"model": _served(text), "config_json": file.read_text(encoding="utf-8")}
    except FileNotFoundError as error:
        raise NotFound(f"no file {file}", reason="FILE_NOT_FOUND", field="--model") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidField(f"{file} cannot be read: {error}", field="--model") from error


def _served(text: str) -> str:
    """What `vllm serve` is given: the folder of a config.json, else the name."""
    path = Path(text)
    return str(path.parent) if path.suffix == ".json" else text


def _described(file: Path | None) -> Sequence[Plain]:
    if file is None:
        return ()
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFound(f"no file {file}", reason="FILE_NOT_FOUND", field="--gpu-file") from error
    except (OSError, ValueError) as error:
        raise InvalidField(f"{file} is not JSON: {error}", field="--gpu-file") from error
    if not isinstance(described, list):
        raise InvalidField("expected a list of GPU types", field="--gpu-file", remedy='[{"type": ..., "count": ...}]')
    return described


def _print_table(answer: Plain) -> None:
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False, markup=False)
    rows = [answer["chosen"]] if answer.get("chosen") else []
    others = answer["runners_up"][:ALTERNATIVES_SHOWN]
    if rows or others:
        console.print(_candidates([*rows, *others], chosen=len(rows)))
    print()
    for sentence in answer["explanation"]:
        print(sentence["text"])
    if answer["command"]:
        print(f"\n{answer['command']}")


def _candidates(rows: Sequence[Plain], *, chosen: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold")
    for index, row in enumerate(rows):
        prediction = row.get("prediction") or {}
        table.add_row(
            "*" if index < chosen else "",
            f"{row['gpu_type']} {row['layout']}",
            str(row["replicas"]),
            str(row["gpus"]),
            f"{row['cost_per_hour']:.2f}" if "cost_per_hour" in row else "",
            _interval(prediction.get("ttft_s"), 1000, " ms"),
            _interval(prediction.get("tpot_s"), 1000, " ms"),
            f"{row['capacity_rps']:.3g}",
            output.cell(row["configuration"].get("max_num_seqs")),
            output.cell(prediction.get("kv_tokens")),
            "" if index < chosen else output.cell(row["constraint"]),
        )
    return table


def _interval(interval: Plain | None, scale: float, unit: str) -> str:
    if not interval:
        return ""
    value, low, high = (interval[name] * scale for name in ("value", "low", "high"))
    return f"{value:.3g}{unit} ({low:.3g} to {high:.3g})"
