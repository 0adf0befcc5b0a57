"""What frames cost the coordinator: 100 agents x 8 GPUs x 8 replicas at one frame a second, over real gRPC.

The coordinator is the real program in its own process, with its store, its reconciler and its rollups; it places a
replica on every GPU. The agents are streams in one other process, which speak the real protocol: heartbeats, status,
and one frame a second each, made before the run and stamped as it is sent. Only the coordinator's own process is
counted: user and system time and resident memory from /proc, after all replicas are READY and a warm-up.

A second phase sends frames as fast as they are taken, to find what one core takes in: its figures are
`frames_per_cpu_s` and `samples_per_cpu_s`; `rss_mib` is the largest of both phases. A sample is one figure that is
present in a frame: a field of a GPU or replica, a bucket of a histogram, a count or bucket of a request summary.

Raw results (--out): coordinator_frames.csv.gz with t_s, phase (paced or flood), cpu_s (user + system of the
coordinator since its start), rss_bytes, frames (taken in, as its own /metrics says), one row a second.
frames_per_cpu_s = (last frames - first frames) / (last cpu_s - first cpu_s) over the rows of the flood,
core_share = the same quotient of cpu_s and t_s over the paced rows, rss_mib = largest rss_bytes / 2**20.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import gzip
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import grpc

from enova.v1 import cluster_pb2, deployment_service_pb2, deployment_service_pb2_grpc, telemetry_pb2
from enova_agent.core.exposition import HISTOGRAMS
from enova_common.vllm import METRICS
from enova_testing.coordinator_process import Config, CoordinatorProcess, running_coordinator
from enova_testing.scripted_agent import MODEL, ScriptedAgent
from enova_testing.waiting import until_async

AGENTS = 100
GPUS = 8
DEPLOYMENTS = 10                       # ten models of eighty replicas
CLASSES = 2
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
READY_TIMEOUT_S = 300.0
FLOOD_AHEAD = 4                        # frames of each agent that wait to be sent


@dataclass(frozen=True, slots=True)
class Row:
    """One second of the run."""

    t_s: float
    phase: str
    cpu_s: float
    rss_bytes: int
    frames: float


def make_frame(agent: ScriptedAgent, draw: random.Random) -> tuple[telemetry_pb2.Frame, int]:
    """A frame with everything in it, and how many samples that is."""
    gpus = [
        telemetry_pb2.GpuSample(
            uuid=f"GPU-{agent.name}-{index}", utilization=draw.random(), memory_utilization=draw.random(),
            memory_used_bytes=draw.randrange(80 << 30), memory_total_bytes=80 << 30, power_w=draw.uniform(70, 700),
            power_limit_w=700, temperature_c=draw.uniform(30, 80), sm_clock_mhz=1980, memory_clock_mhz=2619,
            throttle_reasons=0, ecc_errors_total=0, age_s=0.1,
        )
        for index in range(GPUS)
    ]  # fmt: skip
    replicas, requests = [], []
    for replica in agent.running:
        histograms = [
            telemetry_pb2.BucketCounts(
                metric=metric.name, counts=range(len(metric.buckets) + 1), sum=draw.uniform(0, 1e4)
            )
            for metric in METRICS
            if metric.name in HISTOGRAMS
        ]
        replicas.append(
            telemetry_pb2.ReplicaSample(
                replica=replica, running=draw.randrange(256), waiting=draw.randrange(9), kv_cache_usage=draw.random(),
                prompt_tokens_total=1e6, generation_tokens_total=1e6, preemptions_total=0, iterations_total=1e5,
                prefix_cache_queries_total=1e6, prefix_cache_hits_total=1e5,
                finished_total={"stop": 1e4, "length": 1e3, "abort": 0, "error": 0}, histograms=histograms, age_s=0.2,
                state="READY", resident_memory_bytes=2 << 30, held=draw.randrange(300), instance="one",
            )
        )  # fmt: skip
        for serving_class in range(CLASSES):
            sketch = telemetry_pb2.Sketch(
                relative_accuracy=0.01, offset=-60, counts=[draw.randrange(3) for _ in range(40)], sum=9.0, min=0.3,
                max=0.9,
            )  # fmt: skip
            requests.append(
                telemetry_pb2.RequestSummary(
                    deployment=replica.split("/replicas/")[0], replica=replica, serving_class=f"class-{serving_class}",
                    arrived=30, finished=29, prompt_tokens=9000, output_tokens=5000, held=7, ttft_s=sketch,
                    tpot_s=sketch, queue_s=sketch,
                )
            )  # fmt: skip
    frame = telemetry_pb2.Frame(node=agent.node, boot=agent.instance, gpus=gpus, replicas=replicas, requests=requests)
    return frame, count_samples(frame)


def count_samples(frame: telemetry_pb2.Frame) -> int:
    """The figures that are present in a frame."""
    total = sum(len(each.ListFields()) - 2 for each in frame.gpus)
    for replica in frame.replicas:
        total += len(replica.ListFields()) - 6 + len(replica.finished_total)
        total += sum(len(each.counts) + 1 for each in replica.histograms)
    for request in frame.requests:
        total += 10 + sum(len(each.counts) + 4 for each in (request.ttft_s, request.tpot_s, request.queue_s))
    return total


async def agents_main(address: str, seed: int, pipe: Connection) -> None:
    """The agents' process: connects all, tells how many samples a frame has, then sends as it is told."""
    agents = [ScriptedAgent(address, name=f"node-{index}", gpus=GPUS) for index in range(AGENTS)]
    for agent in agents:
        agent.start()
    await until_async(lambda: all(agent.welcome for agent in agents), timeout_s=READY_TIMEOUT_S, what="all agents")
    pipe.send("connected")
    await until_async(
        lambda: all(len(agent.running) == GPUS for agent in agents), timeout_s=READY_TIMEOUT_S, what="all replicas"
    )
    draw = random.Random(seed)
    frames = [make_frame(agent, draw) for agent in agents]
    pipe.send(frames[0][1])
    phase: list[str] = ["paced"]
    sending = [
        asyncio.create_task(send(agent, frame, phase, index / AGENTS))
        for index, (agent, (frame, _)) in enumerate(zip(agents, frames, strict=True))
    ]
    while (word := await asyncio.to_thread(pipe.recv)) != "end":
        phase[0] = word
    for task in sending:
        task.cancel()
    await asyncio.gather(*sending, *(agent.stop() for agent in agents), return_exceptions=True)


async def send(agent: ScriptedAgent, frame: telemetry_pb2.Frame, phase: list[str], offset_s: float) -> None:
    """One frame a second, or as fast as the stream takes them."""
    await asyncio.sleep(offset_s)
    while True:
        frame.sequence += 1
        frame.start_s, frame.end_s = frame.end_s or time.time() - 1, time.time()
        copied = telemetry_pb2.Frame()
        copied.CopyFrom(frame)
        agent.say(frame=copied)
        if phase[0] == "paced":
            await asyncio.sleep(1.0)
        else:
            while agent.waiting > FLOOD_AHEAD:
                await asyncio.sleep(0.002)


def run_agents(address: str, seed: int, pipe: Connection) -> None:
    """The entry of the agents' process."""
    asyncio.run(agents_main(address, seed, pipe))


def usage(pid: int) -> tuple[float, int]:
    """User and system seconds of a process, and its resident bytes."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S, resident


async def deploy(address: str) -> None:
    """Ask for a replica on every GPU."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
        for index in range(DEPLOYMENTS):
            await stub.CreateDeployment(
                deployment_service_pb2.CreateDeploymentRequest(
                    deployment_id=f"model-{index}",
                    deployment=cluster_pb2.Deployment(model=MODEL, replicas=AGENTS * GPUS // DEPLOYMENTS),
                )
            )


def measure(coordinator: CoordinatorProcess, phase: str, seconds: int, begun_s: float) -> list[Row]:
    """A row a second."""
    rows = []
    for _ in range(seconds + 1):
        cpu_s, resident = usage(coordinator.pid)
        taken = coordinator.figures()["enova_coordinator_frames_total"]
        rows.append(Row(round(time.monotonic() - begun_s, 3), phase, cpu_s, resident, taken))
        time.sleep(1.0)
    return rows


def run(seed: int, warm_up_s: int, paced_s: int, flood_s: int) -> tuple[list[Row], int, dict[str, float]]:
    """Both phases; the rows, the samples of a frame, and what was refused."""
    with tempfile.TemporaryDirectory() as directory:
        config = Config(settings={"lost_after_s": 60.0, "suspect_after_s": 30.0})
        with running_coordinator(Path(directory), config) as coordinator, agents(coordinator.address, seed) as pipe:
            asyncio.run(deploy(coordinator.address))
            samples = int(pipe.recv())
            time.sleep(warm_up_s)
            begun_s = time.monotonic()
            rows = measure(coordinator, "paced", paced_s, begun_s)
            pipe.send("flood")
            time.sleep(1.0)
            rows += measure(coordinator, "flood", flood_s, begun_s)
            figures = coordinator.figures()
            refused = {name: value for name, value in figures.items() if "rejected" in name and value}
            return rows, samples, refused


@contextlib.contextmanager
def agents(address: str, seed: int) -> Iterator[Connection]:
    """The agents' process, connected."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_agents, args=(address, seed, theirs), daemon=True)
    process.start()
    try:
        assert ours.recv() == "connected"
        yield ours
    finally:
        ours.send("end")
        process.join(20)
        process.kill()


def summary(rows: list[Row], samples: int, refused: dict[str, float]) -> dict[str, object]:
    """The figures, from the rows."""

    def quotients(phase: str) -> tuple[float, float]:
        found = [row for row in rows if row.phase == phase]
        first, last = found[0], found[-1]
        cpu_s = last.cpu_s - first.cpu_s
        return (last.frames - first.frames) / cpu_s, cpu_s / (last.t_s - first.t_s)

    flood, _ = quotients("flood")
    paced, share = quotients("paced")
    return {
        "frames_per_cpu_s": round(flood, 1),
        "samples_per_cpu_s": round(flood * samples),
        "rss_mib": round(max(row.rss_bytes for row in rows) / 2**20, 1),
        "paced_frames_per_cpu_s": round(paced, 1),
        "core_share": round(share, 4),
        "samples_per_frame": samples,
        "refused": refused,
        "agents": AGENTS,
        "notes": {},
    }


def main() -> None:
    """Run, write the rows, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not used: the load is made here")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "enova-bench")
    parser.add_argument("--warm-up", type=int, default=20, help="seconds at one frame a second before it counts")
    parser.add_argument("--paced", type=int, default=30, help="seconds measured at one frame a second")
    parser.add_argument("--flood", type=int, default=15, help="seconds measured as fast as they are taken")
    arguments = parser.parse_args()
    rows, samples, refused = run(arguments.seed, arguments.warm_up, arguments.paced, arguments.flood)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with gzip.open(arguments.out / "coordinator_frames.csv.gz", "wt", newline="") as output:
        writer = csv.DictWriter(output, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    figures = summary(rows, samples, refused)
    for name, value in figures.items():
        print(f"{name:24} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
