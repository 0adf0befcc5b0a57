"""An agent that comes back takes its engines over: same process, no restart, whatever its disk says."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from enova_agent.core.command import TOKEN_VARIABLE, Command
from enova_agent.core.model import Desired, MemberSpec, ReplicaState
from enova_agent.journal import Journal, Record
from enova_agent.process import LocalProcesses
from enova_common.errors import Corrupt
from enova_testing.supervised import QUICK, Supervised, complete, exists, member, with_program
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network
HASTY = replace(QUICK, canary_interval_s=0.8, suspect_after_s=0.8, hung_after_s=2.0)


@pytest.mark.parametrize("end", ["SIGTERM", "SIGKILL"])
async def test_an_agent_that_comes_back_finds_its_engine_ready_with_the_same_pid(tmp_path: Path, end: str) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member(max_num_seqs=8))
        before = await agent.reaches(ReplicaState.READY)
        await until_async(lambda: '"ready": true' in (tmp_path / "engines.json").read_text())
        await (agent.close() if end == "SIGTERM" else agent.die())
        assert await complete(before.endpoint) == 200
        await agent.begin()
        after = agent.view()       # at once, before any assignment
        assert (after.pid, after.state, after.endpoint) == (before.pid, ReplicaState.READY, before.endpoint)
        assert after.start_time_s == before.start_time_s
        (engine,) = agent.supervisor.local_engines()
        assert engine.admitting
        agent.assign(member(max_num_seqs=8))
        await until_async(lambda: agent.supervisor.scrapes()[before.replica].metrics)
        assert (agent.view().pid, agent.view().restarts) == (before.pid, 0)


async def test_an_adopted_engine_is_watched_restarted_and_stopped_like_any_other(tmp_path: Path) -> None:
    async with Supervised(tmp_path, HASTY) as agent:
        agent.assign(member())
        before = await agent.reaches(ReplicaState.READY)
        await agent.close()
        await agent.begin()        # and no coordinator ever comes
        os.kill(agent.children(before.pid)[0], signal.SIGSTOP)
        hung = await agent.restarted(before)
        await agent.close()
        await agent.begin()
        os.kill(hung.pid, signal.SIGKILL)
        crashed = await agent.restarted(hung)
        await agent.close()
        await agent.begin()
        agent.assign()
        await until_async(lambda: not agent.supervisor.views())
        assert agent.living() == []
        assert not exists(crashed.pid)


async def test_an_engine_that_died_while_no_agent_watched_is_started_again_and_its_children_end(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member())
        before = await agent.reaches(ReplicaState.READY)
        children = agent.children(before.pid)
        await agent.close()
        os.kill(before.pid, signal.SIGKILL)
        await agent.begin()
        after = await agent.restarted(before)
        assert not any(map(exists, children))
        assert after.restarts == 1
        assert "found dead" in agent.noticed("EngineFailed")[0]


async def test_an_agent_that_ended_between_start_and_note_finds_the_engine_by_its_token(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member())
        before = await agent.reaches(ReplicaState.READY)
        await agent.close()
        journal = Journal(tmp_path / "engines.json")
        records = journal.load()
        assert records is not None
        journal.save([replace(record, pid=0, start_ticks=0, boot_id="", ready=False) for record in records])
        await agent.begin()
        assert agent.view().pid == before.pid
        after = await agent.reaches(ReplicaState.READY)
        assert (after.pid, after.restarts) == (before.pid, 0)


async def test_an_agent_that_ended_before_the_start_starts_it(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member())
        await agent.reaches(ReplicaState.READY)
        await agent.close()
        journal = Journal(tmp_path / "engines.json")
        records = journal.load()
        assert records is not None
        token = records[0].token
        for process in LocalProcesses().found(token):
            await until_async(lambda p=process: LocalProcesses().kill_all(p) == 0)  # type: ignore[misc]
        journal.save([replace(record, pid=0, start_ticks=0, boot_id="", ready=False) for record in records])
        await agent.begin()
        await agent.reaches(ReplicaState.READY)


async def test_what_was_given_up_stays_so_over_agents_until_a_restart_is_wanted_or_the_host_boots(
    tmp_path: Path,
) -> None:
    words = (sys.executable, "-I", "-c", "print('Traceback: the end is near'); raise SystemExit(1)")
    settings = replace(with_program(QUICK, *words), restart_attempts_max=1, restart_maximum_s=0.2)
    async with Supervised(tmp_path, settings) as agent:
        agent.assign(member())
        before = await agent.reaches(ReplicaState.FAILED)
        await agent.close()
        await agent.begin()
        agent.assign(member())
        assert agent.view() == before
        agent.assign(replace(member(), restart_nonce=1))
        await until_async(lambda: agent.view().restarts > before.restarts)
        failed = await agent.reaches(ReplicaState.FAILED)
        await agent.close()
        journal = Journal(tmp_path / "engines.json")
        records = journal.load()
        assert records is not None
        assert records[0].gave_up == failed.reason
        journal.save([replace(record, boot_id="another boot") for record in records])
        await agent.begin()
        agent.assign(member())
        await until_async(lambda: not agent.view().gave_up)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage", "older", "one byte"])
async def test_whatever_happened_to_the_journal_engines_are_adopted(tmp_path: Path, damage: str) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member())
        before = await agent.reaches(ReplicaState.READY)
        await agent.close()
        path = tmp_path / "engines.json"
        text = path.read_bytes()
        broken = {
            "empty": b"",
            "truncated": text[: len(text) // 2],
            "garbage": bytes(range(256)) * 8,
            "older": json.dumps({**json.loads(text), "version": 0}).encode(),
            "one byte": text.replace(f'"pid": {before.pid}'.encode(), f'"pid": {before.pid + 1}'.encode()),
        }
        if damage == "missing":
            path.unlink()
        else:
            assert broken[damage] != text
            path.write_bytes(broken[damage])
        await agent.begin()
        assert agent.view().pid == before.pid
        after = await agent.reaches(ReplicaState.READY)
        assert (after.pid, after.restarts) == (before.pid, 0)
        assert bool(agent.noticed("JournalCorrupt")) == (damage != "missing")
        assert len(list(tmp_path.glob("engines.json.corrupt-*"))) == (damage != "missing")


async def test_a_process_with_our_token_that_the_journal_does_not_know_is_ended(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member())
        known = await agent.reaches(ReplicaState.READY)
        await agent.close()
        environment = {TOKEN_VARIABLE: f"{agent.uid}.stray", "PATH": os.environ["PATH"]}
        stray = LocalProcesses().spawn(Command(argv=("sleep", "600"), environment=environment), tmp_path / "stray.log")
        await agent.begin()
        assert not exists(stray.pid)
        assert exists(known.pid)
        assert agent.noticed("StrayEnded")


async def test_a_pid_that_now_names_another_process_is_not_adopted(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member())
        before = await agent.reaches(ReplicaState.READY)
        await agent.close()
        journal = Journal(tmp_path / "engines.json")
        records = journal.load()
        assert records is not None
        innocent = LocalProcesses().spawn(
            Command(argv=("sleep", "600"), environment={TOKEN_VARIABLE: "x.y", "PATH": os.environ["PATH"]}),
            tmp_path / "innocent.log",
        )
        journal.save([replace(record, pid=innocent.pid, token="gone") for record in records])
        await agent.begin()
        after = await agent.restarted(before)
        assert after.pid != innocent.pid
        assert exists(innocent.pid)
        assert not exists(before.pid)  # it bears our token, and the journal named no such engine
        await until_async(lambda: LocalProcesses().kill_all(innocent) == 0)


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "engines.json")
    assert journal.load() is None
    bare = MemberSpec(replica="deployments/d/replicas/r", uid="u", model="m")
    full = replace(
        member(max_num_seqs=8, gpu_memory_utilization=0.9, enforce_eager=True, dtype="float32", gpu="GPU-1"),
        served_names=("x", "y"), desired=Desired.DRAIN, restart_nonce=3,
    )
    records = tuple(
        Record(spec=spec, token="t", port=1, log_path="/l", pid=5, ready=True, shared_memory=("psm_1",))
        for spec in (bare, full)
    )
    journal.save(records)
    assert journal.load() == records


def test_ten_thousand_damaged_journals_are_put_aside_or_read_never_fatal(tmp_path: Path) -> None:
    rng = random.Random(7)
    path = tmp_path / "engines.json"
    record = Record(spec=member(max_num_seqs=8, gpu="GPU-1"), token="t", port=1, log_path="/l", pid=5)
    Journal(path).save([record])
    assert Journal(path).load() == (record,)
    text = path.read_bytes()
    unharmed = 0
    for _ in range(10_000):
        damaged = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(bytes(damaged[: rng.randint(0, len(damaged))] if rng.random() < 0.3 else damaged))
        try:
            assert Journal(path).load() == (record,)  # damage that changes nothing, as in white space
            unharmed += 1
        except Corrupt:
            assert not path.exists()
    assert unharmed < 500
    assert len(list(tmp_path.glob("*.corrupt-*"))) <= 5
