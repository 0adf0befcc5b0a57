"""`enova-ingress` as a process: how it starts, ends, and comes back; and with the simulated engine behind it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from enova_agent.core.local import EnginesUpdate, RoutesUpdate
from enova_agent.core.model import LocalEngine, Route, RouteTarget
from enova_agent.ingress.state import State, save_state
from enova_common.records import Outcome, RequestRecord, records_of_bytes
from enova_testing.ingress_node import MODEL, TwinAgent, engine, replica
from enova_testing.scripted_engine import ScriptedEngine
from enova_testing.simulated_engine import SimulatedEngine
from enova_testing.waiting import until, until_async

pytestmark = pytest.mark.network
LEFT_WITHIN_S = 1.0  # of a replica whose port refuses
BUSY_S = 1.0         # for a machine with other work on its two cores: an idle one takes hundredths
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


class Program:
    """The process and its files."""

    def __init__(self, folder: Path, **settings: str | int | float | bool) -> None:
        self.folder = folder
        self.ready = folder / "ready.json"
        values = {
            "node": "a", "listen": "127.0.0.1:0", "hop_listen": "127.0.0.1:0", "data_dir": str(folder / "data"),
            "socket": str(folder / "agent.sock"), "ready_file": str(self.ready), "held_interval_s": 0.05, **settings,
        }
        (folder / "ingress.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        self.process: subprocess.Popen[str]

    def start(self, **environment: str) -> None:
        self.ready.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "enova_agent.ingress", "--config", str(self.folder / "ingress.toml")],
            env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True,
        )

    def facts(self) -> dict[str, Any]:
        until(lambda: self.ready.exists() or self.process.poll() is not None, timeout_s=20)
        assert self.process.poll() is None, self.process.communicate()[1]
        facts: dict[str, Any] = json.loads(self.ready.read_text())
        return facts

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        if self.process.poll() is None:
            self.process.send_signal(number)
        errors = self.process.communicate(timeout=15)[1]
        return self.process.returncode, errors

    def records(self) -> list[RequestRecord]:
        files = sorted((self.folder / "data" / "records").glob("*.jsonl"))
        return [record for file in files for record in records_of_bytes(file.read_bytes())]


@pytest.fixture
def program(folder: Path) -> Iterator[Program]:
    program = Program(folder)
    yield program
    if hasattr(program, "process") and program.process.poll() is None:
        program.end(signal.SIGKILL)


def keep_route(program: Program, *urls: str) -> None:
    """Routes on disk, as an earlier run of the ingress left them: a replica of this node for each URL."""
    targets = tuple(
        RouteTarget(replica=replica(number), node="a", hop_address="127.0.0.1:1") for number in range(len(urls))
    )
    save_state(program.folder / "data" / "ingress-state.json", State(
        node="a", revision=1, routes=(Route(served_name=MODEL, deployment="deployments/d", targets=targets),),
        engines=tuple(
            LocalEngine(replica=replica(number), endpoint=url, max_concurrency=8, queue_limit=8, admitting=True)
            for number, url in enumerate(urls)
        ),
    ))


async def test_it_tells_when_and_where_it_serves_and_ends_when_told(program: Program) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(program.folder / "notify"))
        systemd.settimeout(20)
        program.start(NOTIFY_SOCKET=str(program.folder / "notify"))
        assert b"READY=1" in await asyncio.to_thread(systemd.recv, 1000)
        facts = program.facts()
        assert facts["pid"] == program.process.pid
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{facts['openai_address']}/health") as answer:
                assert answer.status == 200
            async with session.get(f"http://{facts['metrics_address']}/metrics") as answer:
                assert "enova_ingress_open_connections" in await answer.text()
        code, errors = await asyncio.to_thread(program.end)
        assert b"STOPPING=1" in systemd.recv(1000)
    assert code == 0
    assert "Traceback" not in errors


async def test_sigterm_lets_a_stream_finish_and_refuses_what_is_new(program: Program) -> None:
    async with ScriptedEngine(tokens=20, gap_s=0.02) as upstream, aiohttp.ClientSession() as session:
        keep_route(program, upstream.url)
        program.start()
        address = (await asyncio.to_thread(program.facts))["openai_address"]
        async with session.post(f"http://{address}/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
            await answer.content.readany()
            program.process.terminate()
            assert (await answer.text()).endswith("data: [DONE]\n\n")
        code, _ = await asyncio.to_thread(program.end, 0)  # 0: told already, now awaited
        assert code == 0
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"http://{address}/health")
    assert [record.outcome for record in program.records()] == [Outcome.FINISHED]


async def test_after_sigkill_it_serves_again_without_an_agent(program: Program) -> None:
    async with ScriptedEngine() as upstream, aiohttp.ClientSession() as session:
        agent = TwinAgent(program.folder / "agent.sock", node="a")
        await agent.start()
        agent.say(
            routes=RoutesUpdate(revision=4, routes=(
                Route(served_name=MODEL, deployment="deployments/d", targets=(
                    RouteTarget(replica=replica(0), node="a", hop_address="127.0.0.1:1"),
                )),
            )),
            engines=EnginesUpdate(engines=(engine(0, upstream.url),)),
        )
        program.start()
        await asyncio.to_thread(program.facts)
        await until_async(lambda: agent.applied() == 4)
        state = program.folder / "data" / "ingress-state.json"
        await until_async(lambda: state.exists() and json.loads(state.read_text())["revision"] == 4)
        await asyncio.to_thread(program.end, signal.SIGKILL)
        await agent.stop()
        program.start()
        address = (await asyncio.to_thread(program.facts))["openai_address"]
        async with session.post(f"http://{address}/v1/chat/completions", json=CHAT) as answer:
            assert answer.status == 200
        await asyncio.to_thread(program.end)


def test_a_port_in_use_is_one_clear_line(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        program = Program(folder, listen=address)
        program.start()
        errors = program.process.communicate(timeout=20)[1]
    assert program.process.returncode == 1
    assert address.rpartition(":")[2] in errors
    assert "is in use by another program" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(("listen", "warned"), [("0.0.0.0:0", True), ("127.0.0.1:0", False)])
def test_plaintext_off_the_loopback_is_said_in_the_log_where_it_listens(
    folder: Path, listen: str, *, warned: bool
) -> None:
    program = Program(folder, listen=listen, insecure_http=True)
    program.start()
    port = program.facts()["openai_address"].rpartition(":")[2]
    with socket.create_connection(("127.0.0.1", int(port)), timeout=5):
        code, errors = program.end()
    assert code == 0
    said = [line for line in errors.splitlines() if "insecure_http" in line]
    assert len(said) == warned
    for line in said:
        assert json.loads(line)["level"] == "WARNING"
        assert "unencrypted" in line
        assert listen in line


async def test_a_dead_replica_is_left_within_a_second_and_its_requests_are_served_by_the_other(
    program: Program
) -> None:
    dead, alive = (SimulatedEngine(program.folder, "--served-model-name", MODEL) for _ in range(2))
    with dead, alive:
        keep_route(program, dead.url, alive.url)
        program.start()
        address = (await asyncio.to_thread(program.facts))["openai_address"]
        began: list[float] = []
        async with aiohttp.ClientSession() as session:
            ending = asyncio.Event()
            clients = [
                asyncio.create_task(asked_over_and_over(session, f"http://{address}", began, ending)) for _ in range(8)
            ]
            await until_async(lambda: len(began) > 100)
            os.killpg(dead.process.pid, signal.SIGKILL)
            killed_s = time.time()
            await until_async(lambda: began[-1] > killed_s + LEFT_WITHIN_S + 2)
            ending.set()
            waited_s = [each for client in clients for each in await client]
        await asyncio.to_thread(program.end)
    assert max(waited_s) < LEFT_WITHIN_S + BUSY_S
    records = program.records()
    assert {record.outcome for record in records} == {Outcome.FINISHED}
    assert {record.replica for record in records if record.arrival_s < killed_s} == {replica(0), replica(1)}
    later = [record for record in records if record.arrival_s > killed_s + LEFT_WITHIN_S]
    assert {record.replica for record in later} == {replica(1)}
    # Left means: tried again at ever longer intervals, by the requests of one moment.
    assert sum(record.attempts > 1 for record in later) <= 0.1 * len(later)


async def asked_over_and_over(
    session: aiohttp.ClientSession, url: str, began: list[float], ending: asyncio.Event
) -> list[float]:
    """One client: a request after the other; how long each took, in seconds. All must be answered."""
    waited_s = []
    while not ending.is_set():
        start_s = time.time()
        began.append(start_s)
        body = {**CHAT, "max_tokens": 2, "stream": False}
        async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            await answer.read()
        waited_s.append(time.time() - start_s)
    return waited_s


def test_wrong_settings_are_told_all_at_once(folder: Path) -> None:
    program = Program(folder, lisen="x", requests_max=0)
    program.start()
    errors = program.process.communicate(timeout=20)[1]
    assert program.process.returncode == 1
    assert "lisen: unknown key; did you mean listen?" in errors
    assert "requests_max" in errors


@pytest.mark.parametrize("stream", [False, True])
async def test_the_simulated_engines_tokens_are_counted_exactly_in_model_time(
    program: Program, stream: bool
) -> None:
    with SimulatedEngine(program.folder, "--served-model-name", MODEL, "--simulated-time-scale", "5") as simulated:
        keep_route(program, simulated.url)
        program.start(ENOVA_TIME_SCALE="5", ENOVA_CLOCK_EPOCH="1700000000")
        address = (await asyncio.to_thread(program.facts))["openai_address"]
        async with openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="k", max_retries=0) as client:
            answer: Any = await client.completions.create(
                model=MODEL, prompt=list(range(600)), max_tokens=50, stream=stream, extra_body={"ignore_eos": True}
            )
            if stream:
                chunks = [chunk async for chunk in answer]
                assert all(chunk.choices for chunk in chunks)  # the count was for us alone
        await asyncio.to_thread(program.end)
    (record,) = program.records()
    assert (record.prompt_tokens, record.output_tokens, record.max_tokens) == (600, 50, 50)
    assert (record.outcome, record.finish_reason, len(record.prefix_hashes)) == (Outcome.FINISHED, "length", 1)
    assert record.duration_s is not None
    if stream:
        assert record.ttft_s is not None
        assert record.tpot_s is not None
        assert record.duration_s == pytest.approx(record.ttft_s + 49 * record.tpot_s, rel=0.2)
        assert 0.002 < record.tpot_s < 0.1  # an 8B model's step in model time
