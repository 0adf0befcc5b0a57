"""What the ingress costs: requests a second, added latency, chunks a second, each beside a direct connection.

One `enova-ingress` process (routes from disk, no agent), one upstream process that answers at once, one load
generator process. Paths: `direct` (generator to upstream), `local` (through the ingress that owns the replica),
`hop` (the same ingress, forced over its own hop listener: both halves' work on one core). Rounds alternate
between paths, so that what disturbs the machine disturbs all; figures are medians of rounds.

Raw results, `--out`: `requests.csv.gz` (path, phase, round, start_s, latency_s, status), `streams.csv.gz` (path,
round, chunks, duration_s), `rounds.csv.gz` (path, phase, round, requests, duration_s, ingress_cpu_s). `--data` is
accepted and not used.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httptools
import psutil
import uvloop

from enova_agent.core.model import LocalEngine, Route, RouteTarget
from enova_agent.ingress.state import State, save_state
from enova_agent.ingress.upstream import Limits, Upstream, UpstreamError, endpoint_of_url

CLIENTS = 32
STREAMS, CHUNKS = 100, 200
PATHS = ("direct", "local", "hop")
BODY = json.dumps({"model": "m", "max_tokens": 16, "messages": [{"role": "user", "content": "word " * 100}]}).encode()
STREAM_BODY = BODY[:-1] + b', "stream": true}'
HEADERS = (("content-type", "application/json"), ("authorization", "Bearer key"))


# The upstream process: as little as an OpenAI server can be


class UpstreamProtocol(asyncio.Protocol):
    """Answers each request at once, or with CHUNKS events of which each is a write of its own."""

    ANSWER = json.dumps({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 16}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 16, "total_tokens": 116},
    }).encode()
    EVENT = b"data: " + json.dumps({
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
        "choices": [{"index": 0, "delta": {"content": "word"}, "finish_reason": None}],
    }, separators=(",", ":")).encode() + b"\n\n"

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)
        self.body = b""
        self.tasks: set[asyncio.Task[None]] = set()

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        streams = b'"stream": true' in self.body
        self.body = b""
        if streams:
            task = asyncio.get_running_loop().create_task(self.stream())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        else:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(self.ANSWER)
                + self.ANSWER
            )

    async def stream(self) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        piece = b"%x\r\n%s\r\n" % (len(self.EVENT), self.EVENT)
        for _ in range(CHUNKS):
            self.transport.write(piece)
            await asyncio.sleep(0)
        done = b"data: [DONE]\n\n"
        self.transport.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(done), done))


async def serve_upstream() -> None:
    server = await asyncio.get_running_loop().create_server(UpstreamProtocol, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# The load generator process: reads one job a line, answers one line


class Load:
    """Sends requests to one address and notes each."""

    def __init__(self, address: str) -> None:
        self.endpoint = endpoint_of_url(address)
        self.upstream = Upstream(Limits(connect_s=5.0))
        self.rows: list[tuple[float, float, int]] = []

    async def one(self, due_s: float | None = None) -> None:
        start_s = time.perf_counter() if due_s is None else due_s
        try:
            answer = await self.upstream.request(
                self.endpoint, "POST", "/v1/chat/completions", headers=HEADERS, body=BODY
            )
            await answer.read(1 << 20)
            status = answer.status
        except UpstreamError as error:
            print(f"a request failed: {error}", file=sys.stderr)
            status = 0
        self.rows.append((start_s, time.perf_counter() - start_s, status))

    async def closed(self, duration_s: float) -> None:
        end_s = time.perf_counter() + duration_s

        async def client() -> None:
            while time.perf_counter() < end_s:
                await self.one()

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def open(self, rate: float, duration_s: float, seed: int) -> None:
        draws = random.Random(seed)
        due_s = time.perf_counter()
        end_s = due_s + duration_s
        async with asyncio.TaskGroup() as group:
            while (due_s := due_s + draws.expovariate(rate)) < end_s:
                wait_s = due_s - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(self.one(due_s))

    async def streams(self) -> int:
        async def stream() -> int:
            answer = await self.upstream.request(
                self.endpoint, "POST", "/v1/chat/completions", headers=HEADERS, body=STREAM_BODY
            )
            assert answer.status == 200, answer.status
            chunks = 0
            while piece := await answer.chunk():
                chunks += piece.count(b'"delta"')
            return chunks

        return sum(await asyncio.gather(*(stream() for _ in range(STREAMS))))


async def serve_load() -> None:
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        load = Load(job["address"])
        start_s = time.perf_counter()
        chunks = 0
        match job["phase"]:
            case "closed":
                await load.closed(job["duration_s"])
            case "open":
                await load.open(job["rate"], job["duration_s"], job["seed"])
            case "streams":
                chunks = await load.streams()
        result = {"duration_s": time.perf_counter() - start_s, "chunks": chunks, "rows": load.rows}
        load.upstream.close()
        print(json.dumps(result), flush=True)


# The measurement


class Bench:
    """The processes, and the results as they come."""

    def __init__(self, addresses: dict[str, str], load: subprocess.Popen[str], ingresses: dict[str, int]) -> None:
        self.addresses = addresses
        self.load = load
        self.ingresses = ingresses
        self.requests: list[tuple[Any, ...]] = []
        self.streams: list[tuple[Any, ...]] = []
        self.rounds: list[tuple[Any, ...]] = []

    def run(self, path: str, phase: str, number: int, **job: Any) -> dict[str, Any]:
        assert self.load.stdin is not None
        assert self.load.stdout is not None
        before_s = self._cpu_s(path)
        self.load.stdin.write(json.dumps({"address": self.addresses[path], "phase": phase, **job}) + "\n")
        self.load.stdin.flush()
        result: dict[str, Any] = json.loads(self.load.stdout.readline())
        cpu_s = self._cpu_s(path) - before_s
        count = len(result["rows"]) or STREAMS
        self.rounds.append((path, phase, number, count, result["duration_s"], cpu_s))
        self.requests += [(path, phase, number, *row) for row in result["rows"]]
        if phase == "streams":
            self.streams.append((path, number, result["chunks"], result["duration_s"]))
            assert result["chunks"] == STREAMS * CHUNKS, result["chunks"]
        return result

    def _cpu_s(self, path: str) -> float:
        if path not in self.ingresses:
            return 0.0
        times = psutil.Process(self.ingresses[path]).cpu_times()
        return float(times.user) + float(times.system)

    def rate(self, path: str) -> float:
        """Median requests a second of the closed loop."""
        return _median(r[3] / r[4] for r in self.rounds if r[0] == path and r[1] == "closed")

    def cpu_us(self, path: str, phase: str, per: int) -> float:
        """CPU of the ingress, for each of `per` things of a request."""
        rows = [r for r in self.rounds if r[0] == path and r[1] == phase]
        cpu_s: float = sum(r[5] for r in rows)
        return 1e6 * cpu_s / (per * int(sum(r[3] for r in rows)))

    def latency_ms(self, path: str, share: float) -> float:
        """A percentile of the open loop: the median of its rounds."""
        by_round: dict[int, list[float]] = {}
        for row in self.requests:
            if row[0] == path and row[1] == "open":
                by_round.setdefault(row[2], []).append(row[4])
        return 1e3 * _median(
            sorted(values)[min(len(values) - 1, int(share * len(values)))] for values in by_round.values()
        )

    def chunk_rate(self, path: str) -> float:
        """Median chunks a second."""
        return _median(row[2] / row[3] for row in self.streams if row[0] == path)


def _median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


@contextmanager
def processes(folder: Path) -> Iterator[Bench]:
    """Upstream, load generator and two ingresses."""
    here = [sys.executable, str(Path(__file__).resolve()), "--role"]
    started: list[subprocess.Popen[str]] = []
    try:
        upstream = subprocess.Popen([*here, "upstream"], stdout=subprocess.PIPE, text=True)
        started.append(upstream)
        assert upstream.stdout is not None
        address = f"127.0.0.1:{upstream.stdout.readline().strip()}"
        load = subprocess.Popen([*here, "load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(load)
        addresses, pids = {"direct": address}, {}
        for path in PATHS[1:]:
            ingress, addresses[path] = start_ingress(folder / path, f"http://{address}", always_hop=path == "hop")
            started.append(ingress)
            pids[path] = ingress.pid
        yield Bench(addresses, load, pids)
    finally:
        for process in started:
            process.terminate()
            process.wait(10)


def start_ingress(folder: Path, upstream: str, *, always_hop: bool) -> tuple[subprocess.Popen[str], str]:
    """An ingress that serves the model from its state on disk; its OpenAI address."""
    folder.mkdir()
    hop = f"127.0.0.1:{free_port()}"
    target = RouteTarget(replica="deployments/d/replicas/r", node="n", hop_address=hop)
    engine = LocalEngine(replica=target.replica, endpoint=upstream, max_concurrency=1024, queue_limit=1024,
                         admitting=True)
    save_state(folder / "data" / "ingress-state.json", State(
        node="n", revision=1, engines=(engine,),
        routes=(Route(served_name="m", deployment="deployments/d", targets=(target,)),),
    ))
    environment = {
        **os.environ, "ENOVA_INGRESS_SOCKET": str(folder / "none.sock"), "ENOVA_INGRESS_DATA_DIR": str(folder / "data"),
        "ENOVA_INGRESS_LISTEN": "127.0.0.1:0", "ENOVA_INGRESS_HOP_LISTEN": hop, "ENOVA_INGRESS_LOG_LEVEL": "WARNING",
        "ENOVA_INGRESS_READY_FILE": str(folder / "ready.json"), "ENOVA_INGRESS_ALWAYS_HOP": str(always_hop).lower(),
    }
    process = subprocess.Popen([sys.executable, "-m", "enova_agent.ingress"], env=environment, text=True)
    deadline_s = time.monotonic() + 20
    while not (folder / "ready.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline_s, "the ingress is not ready"
        time.sleep(0.05)
    return process, json.loads((folder / "ready.json").read_text())["openai_address"]


def free_port() -> int:
    """A port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(bench: Bench, *, seed: int, rounds: int, seconds: float) -> dict[str, Any]:
    """All phases; the figures."""
    for path in PATHS:
        bench.run(path, "closed", -1, duration_s=1.0)  # to warm up; not counted
    bench.rounds.clear()
    bench.requests.clear()
    for number in range(rounds):
        for path in PATHS:
            bench.run(path, "closed", number, duration_s=seconds)
    rate = bench.rate("local") / 2
    for number in range(rounds):
        for path in PATHS:
            bench.run(path, "open", number, rate=min(rate, bench.rate(path) / 2), duration_s=seconds,
                      seed=seed + number)
    for number in range(rounds):
        for path in PATHS:
            bench.run(path, "streams", number)
    figures: dict[str, Any] = {
        "requests_per_s": bench.rate("local"),
        "direct_requests_per_s": bench.rate("direct"),
        "added_p50_ms": bench.latency_ms("local", 0.5) - bench.latency_ms("direct", 0.5),
        "added_p99_ms": bench.latency_ms("local", 0.99) - bench.latency_ms("direct", 0.99),
        "chunks_per_s": bench.chunk_rate("local"),
        "direct_chunks_per_s": bench.chunk_rate("direct"),
        "hop_requests_per_s": bench.rate("hop"),
        "hop_added_p50_ms": bench.latency_ms("hop", 0.5) - bench.latency_ms("direct", 0.5),
        "hop_added_p99_ms": bench.latency_ms("hop", 0.99) - bench.latency_ms("direct", 0.99),
        "hop_chunks_per_s": bench.chunk_rate("hop"),
        "latency_rate_per_s": rate,
        "cpu_us_per_request": bench.cpu_us("local", "closed", 1),
        "cpu_us_per_chunk": bench.cpu_us("local", "streams", CHUNKS),
        "failed": sum(row[5] != 200 for row in bench.requests),
    }
    return {key: round(value, 3) for key, value in figures.items()}


def write_rows(path: Path, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Raw results as gzipped CSV."""
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def main() -> None:
    """The benchmark, or one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--role", choices=["bench", "upstream", "load"], default="bench", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role != "bench":
        uvloop.run(serve_upstream() if arguments.role == "upstream" else serve_load())
        return
    out = arguments.out or Path(tempfile.mkdtemp(prefix="enova-bench-"))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="en") as folder, processes(Path(folder)) as bench:
        figures = measure(bench, seed=arguments.seed, rounds=arguments.rounds, seconds=arguments.seconds)
    write_rows(out / "requests.csv.gz", ("path", "phase", "round", "start_s", "latency_s", "status"), bench.requests)
    write_rows(out / "streams.csv.gz", ("path", "round", "chunks", "duration_s"), bench.streams)
    write_rows(
        out / "rounds.csv.gz", ("path", "phase", "round", "requests", "duration_s", "ingress_cpu_s"), bench.rounds
    )
    for key, value in figures.items():
        print(f"{key:24} {value:12,.3f}")
    print(f"raw results: {out}")
    print(json.dumps({**figures, "notes": {}}))


if __name__ == "__main__":
    main()
