"""What one agent costs its host: memory and share of a core, with 8 GPUs and 8 engines at one frame a second.

The agent is the real program: it starts 8 engines from an assignment that comes over real gRPC, reads 8 GPUs through
NVML (a compiled stand-in), scrapes the captured /metrics of vLLM from each engine each second, and sends a frame a
second to a sink in this process. Only the agent's own process is counted: user and system time and resident memory
from /proc, after a warm-up.

Raw results (--out): agent_overhead.csv.gz with t_s, cpu_s (user + system since the agent's start), rss_bytes, frames
(received by the sink so far), one row a second. core_share = (last cpu_s - first cpu_s) / (last t_s - first t_s) over
the measured rows, rss_mib = largest rss_bytes / 2**20.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from enova.v1 import agent_service_pb2 as wire
from enova.v1 import cluster_pb2
from enova_testing.fake_nvml import FakeDriver
from enova_testing.scripted_coordinator import ScriptedCoordinator
from enova_testing.waiting import until_async

ENGINES = 8
GPUS = 8
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
ENGINE = Path(__file__).parents[1] / "enova_testing" / "exposition_engine.py"


@dataclass(frozen=True, slots=True)
class Row:
    """One look at the agent's process."""

    t_s: float
    cpu_s: float
    rss_bytes: int
    frames: int


def look(pid: int, frames: int) -> Row:
    """User and system time and resident memory of one process, threads included, children not."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    rss_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    cpu_s = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return Row(time.monotonic(), cpu_s, rss_pages * os.sysconf("SC_PAGE_SIZE"), frames)


def assignment() -> wire.Assignment:
    """Eight replicas, one GPU each."""
    members = [
        wire.AssignedMember(
            replica=f"deployments/d/replicas/r{index}",
            uid=f"u{index}",
            desired=wire.AssignedMember.DESIRED_RUN,
            model="tiny",
            member=cluster_pb2.Member(
                claims=[cluster_pb2.Claim(gpu_uuid=f"GPU-{0xE0A0 + index:08x}-1111-2222-3333-{index:012x}")]
            ),
            member_count=1,
            drain_timeout_s=1.0,
            queue_limit=8,
        )
        for index in range(ENGINES)
    ]
    return wire.Assignment(revision=1, members=members)


async def measure(folder: Path, *, warm_up_s: float, measured_s: float) -> list[Row]:
    """The rows of the measured time."""
    sink = ScriptedCoordinator()
    await sink.start()
    driver = FakeDriver(folder, gpus=GPUS)
    driver.say(*(f"gpu {index} util {40 + index}" for index in range(GPUS)))
    config = folder / "agent.toml"
    config.write_text(
        f'node = "node-0"\ncoordinators = ["{sink.address}"]\ndata_dir = "{folder}/agent"\n'
        f'[engine]\ncommand = ["{sys.executable}", "{ENGINE}"]\n'
    )
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "enova_agent", "--config", str(config), env={**os.environ, **driver.environment},
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await until_async(lambda: sink.streams and sink.stream.status, timeout_s=30.0, what="the agent connects")
        sink.send(wire.ConnectResponse(assignment=assignment()))
        await until_async(lambda: _ready(sink) == ENGINES, timeout_s=60.0, what="all engines are ready")
        await asyncio.sleep(warm_up_s)
        rows = []
        frames = 0
        until_s = time.monotonic() + measured_s
        while time.monotonic() < until_s:
            frames += _forget_frames(sink)
            rows.append(look(agent.pid, frames))
            await asyncio.sleep(1.0)
        _check(sink)
        return rows
    finally:
        stop = [sys.executable, "-m", "enova_agent", "--config", str(config), "--stop-engines", "--drain-timeout", "1"]
        await (await asyncio.create_subprocess_exec(*stop, stderr=asyncio.subprocess.DEVNULL)).wait()
        agent.terminate()
        await agent.wait()
        await sink.stop()


def _ready(sink: ScriptedCoordinator) -> int:
    status = sink.stream.status
    return 0 if status is None else sum(r.state == cluster_pb2.Replica.STATE_READY for r in status.replicas)


def _forget_frames(sink: ScriptedCoordinator) -> int:
    """How many frames came since the last time; only the newest is kept, with the newest status."""
    received = sink.stream.received
    frames = [message for message in received if message.HasField("frame")]
    states = [message for message in received if message.HasField("status")]
    received[:] = [*states[-1:], *frames[-1:]]
    return max(0, len(frames) - 1)


def _check(sink: ScriptedCoordinator) -> None:
    """The last frame holds what it should: else cheapness proves nothing."""
    frame = sink.stream.frames[-1]
    assert [gpu.utilization for gpu in frame.gpus] == [(40 + index) / 100 for index in range(GPUS)]
    assert len(frame.replicas) == ENGINES
    for replica in frame.replicas:
        assert not replica.scrape_error, replica.scrape_error
        assert replica.running == 100.0
        assert replica.age_s < 2.5
        assert len(replica.histograms) == 8


def report(rows: Sequence[Row]) -> dict[str, object]:
    """The figures."""
    first, last = rows[0], rows[-1]
    return {
        "rss_mib": round(max(row.rss_bytes for row in rows) / 2**20, 1),
        "core_share": round((last.cpu_s - first.cpu_s) / (last.t_s - first.t_s), 5),
        "frames": last.frames - first.frames,
        "seconds": round(last.t_s - first.t_s, 1),
        "notes": {},
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="accepted like in every benchmark; nothing of it is used")
    parser.add_argument("--seed", type=int, default=1000, help="accepted like in every benchmark; nothing is drawn")
    parser.add_argument("--out", type=Path, help="where the raw results go")
    parser.add_argument("--warm-up", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--seconds", type=float, default=120.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = asyncio.run(measure(Path(folder), warm_up_s=arguments.warm_up, measured_s=arguments.seconds))
    out = arguments.out or Path(tempfile.mkdtemp(prefix="agent_overhead-"))
    out.mkdir(parents=True, exist_ok=True)
    with gzip.open(out / "agent_overhead.csv.gz", "wt", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    figures = report(rows)
    print(f"raw results: {out}")
    print(f"{'figure':<12} {'reached':>10} {'goal':>10}")
    print(f"{'rss_mib':<12} {figures['rss_mib']:>10} {'< 80':>10}")
    print(f"{'core_share':<12} {figures['core_share']:>10} {'< 0.01':>10}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
