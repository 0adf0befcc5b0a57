"""The fleet of `enova up`: a store, a coordinator, and for each node an agent and an ingress."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from enova.v1 import cluster_pb2
from enova_cli.client import Client
from enova_cli.up import etcd, plan, settings
from enova_cli.up.child import Child
from enova_cli.up.layout import DataDirectory, socket_path
from enova_cli.up.leftovers import end_engines, end_leftovers
from enova_cli.up.logs import keep_bounded
from enova_common.address import Address, parse_address
from enova_common.errors import EnovaError, TimedOut
from enova_common.ports import check_listenable

T = TypeVar("T")

REGISTER_TIMEOUT_S = 30.0
REGISTER_POLL_S = 0.1
STOP_ENGINES_TIMEOUT_S = 30.0  # drain bound and engines' own time to end
DRAIN_TIMEOUT_S = 10.0
AGENT_RETURN_TIMEOUT_S = 10.0  # of one that died just before we stop: the longest pause before a restart

log = logging.getLogger(__name__)


class Fleet:
    """Starts everything in order, keeps it running, stops it in order."""

    def __init__(self, options: plan.UpOptions) -> None:
        self._options = options
        self._data = DataDirectory(options.data_dir)
        self._children: dict[str, Child] = {}
        self._facts: dict[str, Any] = {}
        self._owned = False
        self._bounding: asyncio.Task[None] | None = None

    def stop_on_signals(self, stop: asyncio.Event) -> None:
        """SIGINT and SIGTERM ask for an orderly end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)

    async def start(self, stop: asyncio.Event) -> dict[str, Any] | None:
        """Start all programs and wait until every node is registered; the line of `-o json`. None if stopped."""
        self._data.acquire()
        self._owned = True
        self._bounding = asyncio.create_task(keep_bounded(self._data.path / "logs"), name="bound-logs")
        self._data.remove("up.json")  # of one that was killed: its pids are ended now
        end_leftovers(self._data.token)
        end_engines(self._data.path, kept=self._options.node_names())  # of nodes that a larger fleet had
        starting = asyncio.create_task(self._start_all())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return None
        return await starting

    async def stop(self) -> list[str]:
        """End engines through their agents, then the programs; agents and ingresses before the coordinator.

        The nodes whose agents did not end their engines in time, so that these were killed.
        """
        if not self._owned:
            return []
        nodes = [name for name in self._options.node_names() if f"agent/{name}" in self._children]
        ended = await asyncio.gather(*(self._stop_engines(name) for name in nodes))
        killed: list[int] = []
        await asyncio.gather(*(child.stop() for name, child in self._children.items() if "/" in name))
        for name in ("coordinator", "etcd"):
            if name in self._children:
                await self._children[name].stop()
        if nodes:  # else nothing was begun, and engines that an earlier `up` left still wait to be adopted
            killed = await asyncio.to_thread(end_engines, self._data.path)
        if self._bounding is not None:
            self._bounding.cancel()
        self._data.remove("up.json")  # its pids mean nothing any more
        self._data.release()
        return [name for name, done in zip(nodes, ended, strict=True) if not done] if killed else []

    async def _start_all(self) -> dict[str, Any]:
        for option, port in (("--port", self._options.port), ("--openai-port", self._options.openai_port)):
            check_listenable(Address("127.0.0.1", port), field=option)
        clock = self._data.read_json("clock.json")
        if clock.get("time_scale") != self._options.time_scale:
            clock = {"epoch_s": time.time(), "time_scale": self._options.time_scale}
            self._data.write_json("clock.json", clock)
        environment = plan.environment(
            self._options, os.environ, token=self._data.token, epoch_s=float(clock["epoch_s"])
        )
        gpu = await asyncio.to_thread(settings.gpu_facts, self._options)
        ports = _free(self._data.read_json("ports.json"))
        store = await self._start_etcd(environment, ports) if self._options.store == "etcd" else ""
        api = str((await self._start_coordinator(environment, store, ports))["api_address"])
        nodes = self._options.node_names()
        starts = [self._start_node(name, environment, api, gpu, ports) for name in nodes]
        facts: dict[str, Mapping[str, Any]] = dict(zip(nodes, await _together(*starts), strict=True))
        self._data.write_json("ports.json", {"api": api, "etcd": store, **facts})
        await self._registered(api)
        self._facts = {"api": api, "openai": f"http://{facts[nodes[0]]['openai_address']}/v1"}
        self._write_facts()
        return self._public_facts()

    async def _start_etcd(self, environment: Mapping[str, str], ports: Mapping[str, Any]) -> str:
        server = etcd.command(self._data, ports.get("etcd"))
        child = self._child("etcd", server.argv, environment)
        child.listening = server.listening
        await child.start()
        return server.endpoint

    async def _start_coordinator(
        self, environment: Mapping[str, str], store: str, ports: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        child = self._child("coordinator", [plan.program("enova-coordinator")], environment)
        value = settings.coordinator(self._options, self._data, store, ports, child.ready_file)
        child.argv = [*child.argv, "--config", str(self._data.write_toml(self._data.path / "coordinator.toml", value))]
        facts = await child.start()
        # From now on it comes back on the same port: agents and users know it by that.
        value = settings.coordinator(self._options, self._data, store, {"api": facts["api_address"]}, child.ready_file)
        self._data.write_toml(self._data.path / "coordinator.toml", value)
        return facts

    async def _start_node(
        self, name: str, environment: Mapping[str, str], api: str, gpu: Mapping[str, Any], ports: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        folder = self._data.node_path(name)
        agent = self._child(f"agent/{name}", [plan.program("enova-agent")], environment)
        value = settings.agent(self._options, self._data, name, api, gpu, agent.ready_file)
        agent.argv = [*agent.argv, "--config", str(self._data.write_toml(folder / "agent.toml", value))]
        ingress = self._child(f"ingress/{name}", [plan.program("enova-ingress")], environment)
        value = settings.ingress(self._options, self._data, name, ports.get(name, {}), ingress.ready_file)
        ingress.argv = [*ingress.argv, "--config", str(self._data.write_toml(folder / "ingress.toml", value))]
        facts = (await _together(agent.start(), ingress.start()))[1]
        value = settings.ingress(self._options, self._data, name, facts, ingress.ready_file)
        self._data.write_toml(folder / "ingress.toml", value)
        return {key: facts[key] for key in ("openai_address", "hop_address")}

    def _child(self, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> Child:
        file_name = name.replace("/", "-")
        child = Child(
            name=name,
            argv=argv,
            environment=environment,
            log_path=self._data.path / "logs" / f"{file_name}.log",
            ready_file=self._data.path / f"{file_name}.ready.json",
            on_change=self._write_facts,
        )
        self._children[name] = child
        return child

    async def _registered(self, api: str) -> None:
        """Wait until every node is READY and its ingress known."""
        deadline = time.monotonic() + REGISTER_TIMEOUT_S
        problem = ""
        async with Client([api], None) as client:
            while time.monotonic() < deadline:
                try:
                    nodes = await client.list_nodes()
                except EnovaError as error:
                    problem = error.message
                else:
                    ready = [n for n in nodes if n.state == cluster_pb2.Node.STATE_READY and n.openai_address]
                    if len(ready) == self._options.nodes:
                        return
                    problem = f"{len(ready)} of {self._options.nodes} nodes are registered"
                await asyncio.sleep(REGISTER_POLL_S)
        message = f"not ready within {REGISTER_TIMEOUT_S:g} s: {problem}"
        raise TimedOut(message, reason="START_TIMED_OUT", remedy=f"see {self._data.path / 'logs'}")

    async def _stop_engines(self, node: str) -> bool:
        """Have an agent end its engines, drained; whether it has.

        One that died is waited for: it is being restarted, and adopts its engines before it answers.
        """
        agent = self._children[f"agent/{node}"]
        away_until = time.monotonic() + AGENT_RETURN_TIMEOUT_S
        with contextlib.suppress(TimeoutError):  # the engines are ended without their agent, later
            async with asyncio.timeout(STOP_ENGINES_TIMEOUT_S):
                while True:
                    with contextlib.suppress(OSError):  # it is away
                        if await _engines_stopped(socket_path(self._data, node)):
                            return True
                    if not agent.kept or time.monotonic() > away_until:
                        return False
                    await asyncio.sleep(REGISTER_POLL_S)
        return False

    def _public_facts(self) -> dict[str, Any]:
        pids: dict[str, Any] = {"coordinator": self._children["coordinator"].pid, "agents": {}, "ingresses": {}}
        for name in self._options.node_names():
            pids["agents"][name] = self._children[f"agent/{name}"].pid
            pids["ingresses"][name] = self._children[f"ingress/{name}"].pid
        return self._facts | {"data_dir": str(self._data.path), "pids": pids}

    def _write_facts(self) -> None:
        if not self._facts:
            return
        try:
            self._data.write_json("up.json", self._public_facts())
        except OSError as error:  # a full disk stops no program from coming back
            log.warning("up.json is out of date: %s", error)


async def _engines_stopped(socket: Path) -> bool:
    """Ask an agent over its local socket to end its engines; False if it went away before it had. Raises OSError."""
    reader, writer = await asyncio.open_unix_connection(str(socket))
    try:
        writer.write(json.dumps({"type": "stop_engines", "drain_timeout_s": DRAIN_TIMEOUT_S}).encode() + b"\n")
        await writer.drain()
        while line := await reader.readline():
            if json.loads(line).get("type") == "engines_stopped":
                return True
        return False
    finally:
        writer.close()


def _free(ports: Mapping[str, Any]) -> dict[str, Any]:
    """The addresses of last time that nobody took meanwhile."""
    found: dict[str, Any] = {}
    for name, value in ports.items():
        if isinstance(value, dict):
            found[name] = _free(value)
        elif value:
            with contextlib.suppress(EnovaError):  # taken: any other will do
                check_listenable(parse_address(str(value), field=name), field=name)
                found[name] = value
    return found


async def _together(*starts: Coroutine[Any, Any, T]) -> list[T]:
    """All results, or the first error: then the others are cancelled, and nothing starts behind our back."""
    tasks = [asyncio.ensure_future(start) for start in starts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
