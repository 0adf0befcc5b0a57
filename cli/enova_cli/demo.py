"""The demonstration behind `make demo`: a fleet comes up, a trace is replayed, and everything must have happened.

Two simulated 8-GPU nodes (or, with --engine vllm, two slots for a real vLLM on the CPU) serve a deployment; a
public trace drives it; the policy scales it out and back in; one engine is killed on the way and comes back.
The demo itself issues no scale call: with the policy paused it ends non-zero. It exits 0 only if all happened
and no process is left.

Both run under a scaled model clock, in which the policy counts its minutes. Simulated engines live by that clock
too, and so does the trace. A real vLLM does not: its load is the same trace, request after request as fast as they
are answered, and its figures are real seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from enova.v1 import cluster_pb2, decision_service_pb2
from enova_cli.client import Client
from enova_cli.commands.deployments import apply_deployment, wait_ready
from enova_cli.commands.load import decision_rows, measured_load, trace_requests
from enova_cli.commands.simulate import compute
from enova_cli.load.generator import Progress, Target
from enova_cli.load.report import Report, report_table, summary_lines
from enova_cli.manifest import parse_manifest
from enova_cli.output import Format, short
from enova_cli.plain import enum_word, rfc3339, to_plain
from enova_cli.up.leftovers import remaining
from enova_common.errors import EnovaError, TimedOut
from enova_common.traces import TraceRequest

UP_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
VIEW_PERIOD_S = 1.0
POLL_S = 0.2
FLEET_GPUS = 16
COMPARED_START_UP_S, COMPARED_SEED = 60.0, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is deployed on what, and how it is driven. Times are real but for the trace's."""

    up: tuple[str, ...]
    deployment: dict[str, Any]
    time_scale: float  # of the model clock, in which the policy counts its minutes
    load_scale: float  # of the clock that the load is sent and measured by: the engines'
    load_s: float  # of the trace that is replayed, by its own clock
    every: int = 1  # of the trace's requests, one of so many is sent
    tokens_max: int = 1_000_000  # of a prompt and of an answer: longer ones are cut
    open_max: int | None = None  # so many are open all the time, over and over; None: each leaves at its time, once
    load_limit_s: float  # an endless load stops when a killed engine is back, and by then at the latest
    ready_timeout_s: float
    compared: tuple[str, ...] = ()  # policies that the same requests are simulated under
    scale_in_timeout_s: float  # three model minutes of idleness for each halving


SIMULATED = Scenario(
    up=("--nodes", "2", "--gpu", "H100:8"),
    deployment={
        "name": "demo",
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "min": 1,
        "max": 6,
        "policy": "enova",
        "objectives": {"ttft_p95_s": 1.0, "tpot_p95_s": 0.05},
        # Few sequences a replica: one carries less than half of the trace's rate, so that the load must be shared.
        "configuration": {"max_num_seqs": 4, "max_model_len": 8192},
    },
    time_scale=20.0,
    load_scale=20.0,
    load_s=900.0,
    every=2,
    load_limit_s=60.0,
    ready_timeout_s=60.0,
    scale_in_timeout_s=90.0,
    compared=("static-peak", "enova-0.0.7-mended", "enova"),
)


def vllm_scenario(model: str, command: str) -> Scenario:
    """The same small on a real vLLM on the CPU: one replica, two, and one again, of a tiny model."""
    return Scenario(
        up=(
            "--nodes", "2", "--gpu", "CPU:1", "--engine", "vllm",
            "--engine-command", command, "--engine-args", "--dtype float32 --enforce-eager",
        ),
        deployment={
            "name": "demo",
            "model": model,
            "min": 1,
            "max": 2,
            "policy": "enova-0.0.7-mended",
            "configuration": {"max_num_seqs": 4, "max_model_len": 1024},
        },
        # A minute of the policy takes 15 s here. It wants five of them with figures before it acts, and an engine
        # takes a minute or more to start: by the wall clock the whole would be a quarter of an hour.
        time_scale=4.0,
        load_scale=1.0,
        load_s=900.0,
        tokens_max=128,
        open_max=64,  # the policy acts when 50 pend; what waits for longer than a minute is refused
        load_limit_s=600.0,
        ready_timeout_s=300.0,
        scale_in_timeout_s=300.0,
    )  # fmt: skip


@dataclass(slots=True)
class Check:
    """One thing that must have happened."""

    what: str
    passed: bool = False
    detail: str = ""


@dataclass(slots=True)
class Demo:
    """A run of the demonstration: its fleet, what was seen, what is still to be shown."""

    scenario: Scenario
    paused: bool
    console: Console
    directory: Path
    checks: list[Check] = field(default_factory=list)
    peak_ready: int = 0
    killed: str = ""
    held: str = ""  # why the policy was not let scale out

    async def run(self) -> int:
        """The whole demonstration; the exit code."""
        process = await self._start()
        try:
            async with Client([self._facts["api"]], None) as client:
                await self._show(client)
        finally:
            await self._end(process)
        left = await asyncio.to_thread(remaining, self.directory)
        self._check("no process is left", ", ".join(left), passed=not left)
        return self._verdict()

    @property
    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.directory / "up.json").read_text())
        return facts

    async def _start(self) -> asyncio.subprocess.Process:
        began = time.monotonic()
        arguments = [
            *self.scenario.up, "--time-scale", f"{self.scenario.time_scale:g}",
            "--port", "0", "--openai-port", "0", "--data-dir", str(self.directory), "-o", "json",
        ]  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "enova_cli", "up", *arguments, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(UP_TIMEOUT_S):
                line = await process.stdout.readline()
        except TimeoutError as error:
            process.terminate()
            raise TimedOut("enova up was not ready in time", remedy=f"see {self.directory}/logs") from error
        if not line:
            raise TimedOut("enova up ended before it was ready", reason="START_FAILED")
        self.console.print(f"fleet up in {time.monotonic() - began:.1f} s")
        return process

    async def _show(self, client: Client) -> None:
        document = self.scenario.deployment | ({"autoscaling_paused": True} if self.paused else {})
        deployment = await apply_deployment(client, parse_manifest(document))
        began = time.monotonic()
        await wait_ready(client, deployment.name, self.scenario.ready_timeout_s, Format.JSON)
        self._check("deployed and ready", f"in {time.monotonic() - began:.1f} s", passed=True)
        report = await self._drive(client, deployment.name)
        decisions = await self._scaled_in(client, deployment.name)
        self._check_decisions(decisions)
        self._print_report(replace(report, decisions=decision_rows(decisions)))
        if self.scenario.compared:
            await self._compare(document)

    async def _compare(self, document: dict[str, Any]) -> None:
        """What the same requests would have cost under other policies, by simulation."""
        trace = self.directory / "trace.csv"
        rows = [f"{each.arrival_s},{each.prompt_tokens},{each.output_tokens}" for each in _requests(self.scenario)]
        trace.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows, ""]))
        fleet = {"H100": FLEET_GPUS}
        question = {
            "deployment": to_plain(parse_manifest(document)), "trace": str(trace), "fleet": fleet,
            "policies": list(self.scenario.compared), "start_up_s": COMPARED_START_UP_S, "lengths": [],
            "allow_gaps": False, "seed": COMPARED_SEED,
        }  # fmt: skip
        answer = await asyncio.to_thread(compute, question)
        self.console.print("the same requests on a fleet in simulation, by policy:")
        for row in answer["policies"]:
            self.console.print(
                f"  {row['policy']}: {row['gpu_hours']:.2f} GPU hours, {100 * row['attainment']:.2f} % within the "
                f"objectives, {min(row['replicas'])} to {max(row['replicas'])} replicas"
            )
        self._check("compared with other policies", f"{len(answer['policies'])} policies", passed=True)

    async def _drive(self, client: Client, name: str) -> Report:
        """Replay the trace, watch, and kill an engine on the way."""
        scenario = self.scenario
        target = Target(url=self._facts["openai"], model=short(name), time_scale=scenario.load_scale)
        progress = Progress()
        watcher = asyncio.create_task(self._watch(client, name, progress))
        killer = asyncio.create_task(self._kill_one(client, name))
        ends_s = time.monotonic() + scenario.load_limit_s
        requests = _requests(scenario)

        def over() -> bool:
            return killer.done() or bool(self.held) or time.monotonic() > ends_s

        try:
            if scenario.open_max is None:
                report = await measured_load(client, target, requests, name, progress)
            else:
                again = itertools.cycle(replace(request, arrival_s=0.0) for request in requests)
                report = await measured_load(
                    client, target, again, name, progress, stopped=over, open_max=scenario.open_max
                )
            await self._mended(killer)
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        # The killed engine's own streams break off with a clear error; everything else must be served.
        lost = report.failed + report.cut
        bound = int(scenario.deployment["configuration"]["max_num_seqs"])
        self._check(
            "traffic served",
            f"{report.served} served, {lost} lost with the killed engine",
            passed=report.served > 0 and lost <= bound,
        )
        return report

    async def _mended(self, killer: asyncio.Task[None]) -> None:
        """Wait until the killed engine serves again, unless the policy was held: then none was killed, nor will be."""
        try:
            await asyncio.wait_for(killer, POLL_S if self.held else self.scenario.ready_timeout_s)
        except TimeoutError:
            self._check("a killed engine comes back", self.killed or "none was killed", passed=False)

    async def _kill_one(self, client: Client, name: str) -> None:
        """SIGKILL one engine once two serve, and wait for it to serve again."""
        replica = (await _poll(lambda: self._two_ready(client, name)))[-1]
        os.kill(replica.pid, signal.SIGKILL)
        self.killed, began = f"{short(replica.name)} (pid {replica.pid})", time.monotonic()
        self.console.print(f"killed the engine of {self.killed}")

        async def recovered() -> bool:
            ready = await self._two_ready(client, name)
            return any(now.name == replica.name and now.pid != replica.pid for now in ready)

        await _poll(recovered)
        detail = f"{self.killed} is ready again after {time.monotonic() - began:.1f} s"
        self._check("a killed engine comes back", detail, passed=True)

    async def _two_ready(self, client: Client, name: str) -> list[cluster_pb2.Replica]:
        replicas = [r for r in await client.list_replicas(name) if r.state == cluster_pb2.Replica.STATE_READY]
        return replicas if len(replicas) > 1 else []

    async def _watch(self, client: Client, name: str, progress: Progress) -> None:
        """A table that lives on a terminal; a line a few seconds elsewhere."""
        live = Live(console=self.console, refresh_per_second=2) if self.console.is_terminal else None
        with live or contextlib.nullcontext():
            for beat in range(1_000_000):
                with contextlib.suppress(EnovaError):  # a beat without an answer shows the last picture on
                    deployment = await client.get_deployment(name)
                    replicas = await client.list_replicas(name)
                    self.peak_ready = max(self.peak_ready, deployment.ready_replicas)
                    if self.peak_ready == 1:
                        self.held = _held(await client.list_decisions(name))
                    if live is not None:
                        live.update(_view(deployment, replicas, progress))
                    elif beat % 5 == 0:
                        self.console.print(_line(deployment, progress))
                await asyncio.sleep(VIEW_PERIOD_S)

    async def _scaled_in(self, client: Client, name: str) -> list[decision_service_pb2.Decision]:
        """Wait until the policy has let the idle replicas go."""
        self.console.print("load ended; waiting for the policy to scale in")

        async def back_to_minimum() -> bool:
            replicas = await client.list_replicas(name)
            serving = [r for r in replicas if r.state == cluster_pb2.Replica.STATE_READY]
            self.peak_ready = max(self.peak_ready, len(serving))
            return len(serving) == len(replicas) == 1

        try:
            await asyncio.wait_for(_poll(back_to_minimum), self.scenario.scale_in_timeout_s)
            self._check("scaled back in", f"from {self.peak_ready} to 1 replicas", passed=self.peak_ready > 1)
        except TimeoutError:
            self._check("scaled back in", f"not within {self.scenario.scale_in_timeout_s:g} s", passed=False)
        return list(reversed(await client.list_decisions(name)))

    def _check_decisions(self, decisions: list[decision_service_pb2.Decision]) -> None:
        up = [d for d in decisions if d.action == decision_service_pb2.Decision.ACTION_SCALE_UP]
        down = [d for d in decisions if d.action == decision_service_pb2.Decision.ACTION_SCALE_DOWN]
        detail = f"to {self.peak_ready} ready replicas" + (f": {self.held}" if self.held else "")
        self._check("scaled out", detail, passed=bool(up) and self.peak_ready > 1)
        acts = sorted(up + down, key=lambda decision: decision.model_time_s)
        founded = all(d.actor.startswith("policy/") and d.inputs and d.frames for d in acts)
        counts = f"{len(up)} up, {len(down)} down"
        self._check("each decision carries its figures", counts, passed=bool(acts) and founded)
        for decision in acts:
            plain = to_plain(decision)
            self.console.print(
                f"  {rfc3339(decision.model_time_s)} {plain['action']} {decision.from_replicas} -> "
                f"{decision.to_replicas}: {decision.reason}"
            )

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()
        self._check("stopped cleanly", f"exit code {process.returncode}", passed=process.returncode == 0)

    def _check(self, what: str, detail: str = "", *, passed: bool) -> None:
        self.checks.append(Check(what, passed, detail))

    def _print_report(self, report: Report) -> None:
        self.console.print(report_table(report))
        self.console.print("\n".join(summary_lines(report)))
        self._report = json.dumps(report.to_plain())

    _report: str = ""

    def _verdict(self) -> int:
        for check in self.checks:
            self.console.print(f"{'ok  ' if check.passed else 'FAIL'} {check.what}: {check.detail}")
        if self._report:
            print(self._report, flush=True)
        return 0 if all(check.passed for check in self.checks) else 1


def _requests(scenario: Scenario) -> list[TraceRequest]:
    """The part of the shipped trace that is replayed."""
    trace = resources.files("enova_cli.samples") / "azure_conv_first15min.csv.gz"
    with resources.as_file(trace) as path:
        requests = [r for r in trace_requests(path, seed=0) if r.arrival_s < scenario.load_s]
    limit = scenario.tokens_max
    return [
        replace(r, prompt_tokens=min(r.prompt_tokens, limit), output_tokens=min(r.output_tokens, limit))
        for r in requests[:: scenario.every]
    ]


def _held(decisions: list[decision_service_pb2.Decision]) -> str:
    """Why the policy's newest wish was not carried out; empty if it was, or if it had none."""
    newest = decisions[0] if decisions else decision_service_pb2.Decision()
    return newest.reason if newest.action == decision_service_pb2.Decision.ACTION_HOLD else ""


async def _poll(condition: Callable[[], Awaitable[Any]]) -> Any:
    while True:
        with contextlib.suppress(EnovaError):  # the fleet is being shaken: a call may fail
            value = await condition()
            if value:
                return value
        await asyncio.sleep(POLL_S)


def _view(deployment: cluster_pb2.Deployment, replicas: list[cluster_pb2.Replica], progress: Progress) -> Table:
    table = Table(title=_line(deployment, progress), box=None)
    for heading in ("REPLICA", "STATE", "NODE", "PHASE", "RESTARTS", "REASON"):
        table.add_column(heading)
    state = cluster_pb2.Replica.DESCRIPTOR.fields_by_name["state"]
    for replica in replicas:
        word = enum_word(state, replica.state)
        table.add_row(
            short(replica.name), word, short(replica.node), replica.phase, str(replica.restarts), replica.reason
        )
    return table


def _line(deployment: cluster_pb2.Deployment, progress: Progress) -> str:
    ready = f"{deployment.ready_replicas} of {deployment.target_replicas} replicas ready"
    return f"{ready}, {progress.sent} sent, {progress.open} open, {len(progress.results)} answered"


@click.command()
@click.option("--engine", type=click.Choice(["simulated", "vllm"]), default="simulated", show_default=True)
@click.option("--model", default="", help="With --engine vllm: a model directory.")
@click.option("--engine-command", default="vllm serve", help="With --engine vllm: what starts it.")
@click.option("--pause-policy", is_flag=True, help="Pause autoscaling: the demo must then fail.")
def main(engine: str, model: str, engine_command: str, pause_policy: bool) -> None:
    """Show the whole of enova on this machine; the exit code says whether all of it happened."""
    if engine == "vllm" and not model:
        raise click.UsageError("--engine vllm needs --model DIRECTORY")
    scenario = SIMULATED if engine == "simulated" else vllm_scenario(model, engine_command)
    directory = Path(tempfile.mkdtemp(prefix="enova-demo-"))
    demo = Demo(
        scenario=scenario, paused=pause_policy, console=Console(highlight=False, markup=False), directory=directory
    )
    try:
        code = asyncio.run(demo.run())
    except EnovaError as error:
        print(f"enova: {error} [{error.reason}]; files in {directory}", file=sys.stderr)
        sys.exit(1)
    if code == 0:
        shutil.rmtree(directory, ignore_errors=True)
    else:
        print(f"files are kept in {directory}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
