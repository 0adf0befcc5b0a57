"""load: traffic from a trace or a rate, with a report."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from enova.v1 import cluster_pb2, decision_service_pb2
from enova_cli.client import Client
from enova_cli.commands.deployments import Duration
from enova_cli.context import Context, output_option, pass_context
from enova_cli.endpoint import openai_url
from enova_cli.load.generator import Progress, Target, run_load
from enova_cli.load.report import Report, report_table, summarise, summary_lines
from enova_cli.output import Format, print_fact, short
from enova_cli.plain import to_plain
from enova_common.errors import EnovaError, FatalError, InvalidField, NotFound
from enova_common.records import RequestRecord, row_of_record
from enova_common.traces import Draws, Scenario, TraceError, TraceRequest, parse_trace

SAMPLE_PERIOD_S = 0.5  # of replicas, for the GPU-seconds
HOLDING = frozenset(
    {
        cluster_pb2.Replica.STATE_STARTING,
        cluster_pb2.Replica.STATE_READY,
        cluster_pb2.Replica.STATE_DRAINING,
        cluster_pb2.Replica.STATE_STOPPING,
    }
)


@dataclass(slots=True)
class Cost:
    """GPU time held while a load runs, by sampling what the coordinator says."""

    client: Client
    deployment: str
    time_scale: float
    gpu_seconds: float = 0.0
    failures: int = 0
    _last: float = field(default_factory=time.monotonic)

    async def watch(self) -> None:
        """Sample until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_PERIOD_S)
            await self.sample()

    async def sample(self) -> None:
        """Add what has been held since the last sample; a coordinator that is away costs one sample."""
        try:
            replicas = await self.client.list_replicas(self.deployment)
        except EnovaError:
            self.failures += 1
            return
        now = time.monotonic()
        gpus = sum(len(replica.gpus) for replica in replicas if replica.state in HOLDING)
        self.gpu_seconds += gpus * (now - self._last) * self.time_scale
        self._last = now


def open_trace(path: Path, option: str = "--trace") -> Iterator[str]:
    """The lines of a trace file, unpacked if it is gzipped. Raises NotFound, InvalidField naming the option."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"no trace {path}", reason="FILE_NOT_FOUND", remedy="give a CSV file, .gz allowed") from error
    except OSError as error:
        raise InvalidField(f"cannot be read: {error.strerror}", field=option) from error
    try:
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        return iter(io.StringIO(data.decode("utf-8")))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidField(f"not a CSV file: {error}", field=option) from error


def trace_requests(path: Path, seed: int) -> Iterable[TraceRequest]:
    """The requests of a trace file, all read and checked before the first is sent."""
    source = random.Random(seed)  # noqa: S311 - reproducible arrivals
    scenario = Scenario(lengths=[(512, 128), (1024, 256), (256, 64)])
    try:
        return list(parse_trace(open_trace(path), scenario=scenario, draws=Draws(source.random, source.gammavariate)))
    except TraceError as error:
        remedy = "correct it; enova reads arrival_s,prompt_tokens,output_tokens[,class], in order of arrival"
        raise InvalidField(f"{path.name} {error}", field="--trace", reason="INVALID_TRACE", remedy=remedy) from error


def rate_requests(
    *, rate_hz: float, duration_s: float, prompt_tokens: int, output_tokens: int, seed: int
) -> Iterator[TraceRequest]:
    """Poisson arrivals of equal requests."""
    source = random.Random(seed)  # noqa: S311 - reproducible arrivals
    clock = source.expovariate(rate_hz)
    while clock < duration_s:
        yield TraceRequest(arrival_s=clock, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        clock += source.expovariate(rate_hz)


async def measured_load(
    client: Client,
    target: Target,
    requests: Iterable[TraceRequest],
    deployment: str,
    progress: Progress,
    *,
    stopped: Callable[[], bool] = lambda: False,
    open_max: int | None = None,
) -> Report:
    """Run a load (see `run_load`) while counting GPU-seconds and decisions, and report."""
    before = {decision.name for decision in await client.list_decisions(deployment)}
    cost = Cost(client, deployment, target.time_scale)
    watch = asyncio.create_task(cost.watch())
    try:
        results = await run_load(requests, target, progress=progress, stopped=stopped, open_max=open_max)
        await cost.sample()
    finally:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
    decisions = [d for d in reversed(await client.list_decisions(deployment)) if d.name not in before]
    return summarise(results, gpu_seconds=cost.gpu_seconds, decisions=decision_rows(decisions))


def write_records(path: Path, results: Iterable[RequestRecord]) -> None:
    """Rows in order of arrival. Raises InvalidField if the file cannot be written."""
    rows = sorted(results, key=lambda record: record.arrival_s)
    try:
        path.write_text("".join(f"{row_of_record(record)}\n" for record in rows))
    except OSError as error:
        raise InvalidField(f"cannot be written: {error.strerror}", field="--records") from error


def decision_rows(decisions: Iterable[decision_service_pb2.Decision]) -> list[dict[str, Any]]:
    """What a report says of each decision."""
    keys = ("create_time", "actor", "action", "from_replicas", "to_replicas", "reason")
    return [{key: plain[key] for key in keys} for plain in map(to_plain, decisions)]


@click.command()
@click.argument("name", metavar="SERVED_NAME")
@click.option("--trace", type=click.Path(path_type=Path), help="CSV of arrivals and lengths, .gz allowed.")
@click.option("--rate", type=float, help="Requests per second (model time), in place of a trace.")
@click.option("--duration", type=Duration(), default=60.0, help="With --rate, or to cut a trace (model time).")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512)
@click.option("--output-tokens", type=click.IntRange(min=1), default=128)
@click.option("--max-requests", type=click.IntRange(min=1), help="Stop after so many.")
@click.option("--url", help="OpenAI base URL; found through the coordinator by default.")
@click.option("--stream/--no-stream", default=True)
@click.option("--time-scale", type=float, envvar="ENOVA_TIME_SCALE", default=1.0, help="Of the model clock of `up`.")
@click.option("--seed", type=int, default=0)
@click.option("--ca", default="", help="CA of the ingress's certificate.")
@click.option("--records", type=click.Path(path_type=Path), help="Write one enova.request/v1 row a request here.")
@output_option
@pass_context
def load(
    context: Context,
    name: str,
    trace: Path | None,
    rate: float | None,
    duration: float,
    prompt_tokens: int,
    output_tokens: int,
    max_requests: int | None,
    url: str | None,
    stream: bool,
    time_scale: float,
    seed: int,
    ca: str,
    records: Path | None,
) -> None:
    """Send traffic to SERVED_NAME and report what it met with; the last line is JSON, unless YAML is asked for."""
    if (trace is None) == (rate is None):
        raise click.UsageError("give one of --trace and --rate")
    for option, value in (("--rate", rate), ("--time-scale", time_scale)):
        if value is not None and not 0 < value < float("inf"):
            raise click.UsageError(f"{option} must be positive")

    async def action(client: Client) -> None:
        if trace is not None:
            cut = click.get_current_context().get_parameter_source("duration") is not click.core.ParameterSource.DEFAULT
            requests = [r for r in trace_requests(trace, seed) if not cut or r.arrival_s < duration]
        else:
            assert rate is not None
            requests = list(
                rate_requests(
                    rate_hz=rate,
                    duration_s=duration,
                    prompt_tokens=prompt_tokens,
                    output_tokens=output_tokens,
                    seed=seed,
                )
            )
        target = Target(
            url=url or await openai_url(client), model=name, time_scale=time_scale, stream=stream, tls_ca=ca
        )
        deployment = await _deployment_of(client, name)
        progress = Progress()
        console = Console(stderr=True, quiet=context.form is not Format.TABLE)
        with console.status("") as status:
            ticker = asyncio.create_task(_tick(progress, status.update, len(requests)))
            report = await measured_load(client, target, islice(requests, max_requests), deployment, progress)
            ticker.cancel()
        if records is not None:
            write_records(records, progress.results)
        if context.form is Format.TABLE:
            Console(highlight=False).print(report_table(report))
            print("\n".join(summary_lines(report)))
        print_fact(report.to_plain(), json.dumps(report.to_plain()), context.form)
        if report.sent and not report.served:
            problem = next(iter(report.errors), "no answer said why")
            remedy = f"enova explain deployment/{short(deployment)}"
            raise FatalError(f"none of {report.sent} requests was served: {problem}", reason="UNSERVED", remedy=remedy)

    context.run(action)


async def _tick(progress: Progress, show: object, total: int) -> None:
    assert callable(show)
    while True:
        show(f"sent {progress.sent} of {total}, open {progress.open}, answered {len(progress.results)}")
        await asyncio.sleep(SAMPLE_PERIOD_S)


async def _deployment_of(client: Client, served_name: str) -> str:
    for deployment in await client.list_deployments():
        if served_name in (deployment.served_names or [short(deployment.name)]):
            return deployment.name
    raise NotFound(f"nothing serves {served_name!r}", remedy="enova get deployments lists what is served")
