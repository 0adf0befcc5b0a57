"""A leader that is stopped between decision and write changes nothing: real etcd, real processes, 50 trials."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from enova_testing.candidate_process import CandidateProcess
from enova_testing.etcd_server import EtcdServer

pytestmark = [pytest.mark.etcd, pytest.mark.network, pytest.mark.slow]

TTL_S = 2
TRIALS = 50
PAIRS = 10  # trials of different pairs run at the same time: each spends its time waiting for a lease to end
PATIENCE_S = 60.0  # twenty processes on two cores
PREFIX = "/enova/test/"


@dataclass(frozen=True)
class Write:
    """A write as etcd remembers it, and the leader's term at that revision (0: nobody led)."""

    key: str
    term: int
    trial: int | None
    term_then: int

    @property
    def stale(self) -> bool:
        return self.term != self.term_then


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path)
    server.start()
    yield server
    server.kill()


async def test_stopped_leader_writes_nothing_in_fifty_trials(server: EtcdServer, seed: int) -> None:
    draw = random.Random(seed)
    points = [draw.choice(["decided", "decided", "decided", "sending", "anywhere"]) for _ in range(TRIALS)]
    delays_s = [draw.uniform(0.0, 0.5) for _ in range(TRIALS)]
    trials = list(zip(range(TRIALS), points, delays_s, strict=True))
    async with asyncio.TaskGroup() as group:
        for pair in range(PAIRS):
            group.create_task(run_trials(server, f"{PREFIX}{pair}/", trials[pair::PAIRS]))

    writes = [write for pair in range(PAIRS) for write in await history(server, f"{PREFIX}{pair}/")]
    fenced = [write for write in writes if "/fenced/" in write.key]
    unfenced = [write for write in writes if "/unfenced/" in write.key]
    assert [write for write in fenced if write.stale] == []
    # The same write without the guard does land, in each trial that stopped before it: so the test can fail.
    exact = {trial for trial, point, _ in trials if point == "decided"}
    assert len(exact) > TRIALS / 3
    assert exact <= {write.trial for write in unfenced if write.stale}
    # And the guard does not simply refuse everything.
    assert len(fenced) > TRIALS


async def run_trials(server: EtcdServer, prefix: str, trials: list[tuple[int, str, float]]) -> None:
    """Stop the leader, wait for the other to lead, let the old one go on; then the other way round."""
    pair = [
        await CandidateProcess.start(name, prefix=prefix, endpoint=server.endpoint, ttl_s=TTL_S) for name in ("a", "b")
    ]
    term = 0
    try:
        for trial, point, delay_s in trials:
            term, leader = await leading(pair, term)
            other = pair[1] if leader is pair[0] else pair[0]
            await stop(leader, trial, point, delay_s)
            await leading([other], term)
            leader.send(signal.SIGCONT)
            await leader.report(PATIENCE_S, event="ended", term=term)
            if point != "anywhere":
                wrote = await leader.report(PATIENCE_S, event="wrote", trial=trial)
                if point == "decided":
                    assert (wrote["fenced"], wrote["unfenced"]) == (False, True)
    finally:
        for candidate in pair:
            await candidate.end()


async def leading(candidates: list[CandidateProcess], after_term: int) -> tuple[int, CandidateProcess]:
    """The next term, and who leads."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            for candidate in candidates:
                if candidate.term > after_term:
                    return candidate.term, candidate
            await asyncio.sleep(0.01)


async def stop(leader: CandidateProcess, trial: int, point: str, delay_s: float) -> None:
    """Bring the leader to a stop at the point of this trial."""
    await asyncio.sleep(delay_s)  # so that the stop meets leases and keepalives at any age
    if point == "anywhere":
        leader.send(signal.SIGSTOP)
    else:
        leader.order(trial=trial, point=point)
    await leader.stopped(PATIENCE_S)


async def history(server: EtcdServer, prefix: str) -> list[Write]:
    """All writes under the prefix from etcd's own history, read by etcd's own client."""
    server.control("put", f"{prefix}end", "")
    command = [str(server.binaries.client), f"--endpoints={server.endpoint}", "watch", "--rev=1", "--prefix", prefix]
    reader = await asyncio.create_subprocess_exec(
        *command, "--write-out=json", stdout=asyncio.subprocess.PIPE, env={"ETCDCTL_API": "3"}, limit=64 << 20
    )
    assert reader.stdout is not None
    term_now, writes, ended = 0, [], False
    async with asyncio.timeout(PATIENCE_S):
        while not ended:
            for event in json.loads(await reader.stdout.readline())["Events"]:
                key = base64.b64decode(event["kv"]["key"]).decode()
                deleted = event.get("type") == 1
                if key.endswith("/leader"):
                    term_now = 0 if deleted else event["kv"]["create_revision"]
                elif not deleted and "value" in event["kv"]:
                    writes.append(_write(key, event["kv"], term_now))
                ended = ended or key == f"{prefix}end"
    reader.kill()
    await reader.wait()
    return writes


def _write(key: str, kv: dict[str, Any], term_now: int) -> Write:
    value = json.loads(base64.b64decode(kv["value"]))
    return Write(key, value["term"], value["trial"], term_now)
