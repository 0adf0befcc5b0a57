"""The supervisor over real processes of the simulated engine: start, stop, crash, hang, limits."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from enova_agent.core.local import HeldReplica, HeldUpdate
from enova_agent.core.model import Desired, ReplicaState
from enova_agent.process import LocalProcesses
from enova_common.errors import NotFound
from enova_testing.supervised import QUICK, Supervised, complete, exists, gpu_utilization, inject, member, with_program
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network
# As the defaults, in a third of the time.
HASTY = replace(QUICK, canary_interval_s=0.8, suspect_after_s=0.8, hung_after_s=2.0)
PYTHON = (sys.executable, "-I", "-c")


async def test_an_assigned_replica_becomes_ready_serves_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member(max_num_seqs=8))
        view = await agent.reaches(ReplicaState.READY)
        (engine,) = agent.supervisor.local_engines()
        assert (engine.endpoint, engine.admitting, engine.max_concurrency) == (view.endpoint, True, 8)
        assert engine.served_names == ("chat",)
        assert await complete(view.endpoint) == 200
        assert view.ready_time_s >= view.start_time_s > 0
        await until_async(lambda: agent.supervisor.scrapes()[view.replica].canaries.output_tokens >= 1)
        agent.assign()
        await until_async(lambda: not agent.supervisor.views(), timeout_s=10.0)
        assert agent.living() == []
        assert not exists(view.pid)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", int(view.endpoint.rsplit(":", 1)[1])), timeout=1.0)
        assert agent.noticed("ReplicaReady")
        assert not agent.noticed("AgentDefect")


async def test_scrapes_come_with_figures_of_the_engine(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member())
        view = await agent.reaches(ReplicaState.READY)
        assert await complete(view.endpoint, max_tokens=7) == 200

        def counted() -> bool:
            metrics = agent.supervisor.scrapes()[view.replica].metrics
            canaries = agent.supervisor.scrapes()[view.replica].canaries
            return metrics is not None and (metrics.generation_tokens_total or 0) - canaries.output_tokens == 7

        await until_async(counted)


async def test_the_log_of_an_engine_is_shown_and_followed(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member())
        view = await agent.reaches(ReplicaState.READY)
        chunks = [lines async for lines in agent.supervisor.logs(view.replica, tail_lines=5, follow=False)]
        assert any("startup complete" in line for line in chunks[0])
        following = agent.supervisor.logs(view.replica, tail_lines=1, follow=True)
        assert len(await anext(following)) == 1
        os.kill(view.pid, signal.SIGKILL)
        assert any("Loading" in line or "load" in line for line in await asyncio.wait_for(anext(following), 20.0))
        with pytest.raises(NotFound):
            await anext(agent.supervisor.logs("deployments/x/replicas/y", tail_lines=5, follow=False))


async def test_a_sigkill_of_the_api_server_alone_leaves_no_child_and_is_mended(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member())
        before = await agent.reaches(ReplicaState.READY)
        children = agent.children(before.pid)
        assert children
        os.kill(before.pid, signal.SIGKILL)
        await until_async(lambda: not agent.supervisor.local_engines(), timeout_s=1.0)
        await until_async(lambda: not any(map(exists, children)), timeout_s=3.0)
        after = await agent.restarted(before)
        assert after.restarts == 1
        assert "signal 9" in agent.noticed("RestartScheduled")[0]


async def test_an_exit_with_code_0_that_nobody_asked_for_is_a_crash(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member())
        before = await agent.reaches(ReplicaState.READY)
        await inject_crash(before.endpoint, exit_code=0)
        await agent.restarted(before)
        assert "exit code 0" in agent.noticed("EngineFailed")[0]


async def inject_crash(endpoint: str, *, exit_code: int) -> None:
    """The engine ends while it answers, so the answer may be lost."""
    with pytest.raises(aiohttp.ClientError):
        await inject(endpoint, "crash", exit_code=exit_code)


@pytest.mark.parametrize("held", [0, 2])
async def test_a_stopped_core_leaves_routing_then_is_restarted_with_evidence(tmp_path: Path, held: int) -> None:
    async with Supervised(tmp_path, HASTY) as agent:
        agent.assign(member())
        before = await agent.reaches(ReplicaState.READY)
        agent.supervisor.held(HeldUpdate(replicas={before.replica: HeldReplica(in_flight=held, silent_s=9.0)}))
        (core,) = agent.children(before.pid)
        os.kill(core, signal.SIGSTOP)
        await until_async(lambda: not agent.view().in_routing, timeout_s=4.0)
        (engine,) = agent.supervisor.local_engines()
        assert not engine.admitting
        after = await agent.restarted(before)
        assert str(core) in agent.noticed("EngineFailed")[0]
        assert not exists(core)
        (kept,) = (tmp_path / "evidence").glob("*.txt")
        assert "state T" in kept.read_text()
        assert (await complete(after.endpoint)) == 200


async def test_with_default_limits_a_stopped_core_is_found_within_ten_seconds(tmp_path: Path) -> None:
    async with Supervised(tmp_path, replace(QUICK, tick_s=0.25, scrape_interval_s=1.0)) as agent:
        agent.assign(member())
        before = await agent.reaches(ReplicaState.READY)
        os.kill(agent.children(before.pid)[0], signal.SIGSTOP)
        stopped_s = time.monotonic()
        await until_async(lambda: agent.view().state is not ReplicaState.READY, timeout_s=15.0)
        assert time.monotonic() - stopped_s <= 10.0


async def test_a_core_that_goes_on_comes_back_into_routing_without_a_restart(tmp_path: Path) -> None:
    async with Supervised(tmp_path, replace(HASTY, hung_after_s=20.0)) as agent:
        agent.assign(member())
        before = await agent.reaches(ReplicaState.READY)
        core = agent.children(before.pid)[0]
        os.kill(core, signal.SIGSTOP)
        await until_async(lambda: not agent.view().in_routing, timeout_s=5.0)
        os.kill(core, signal.SIGCONT)
        await until_async(lambda: agent.view().in_routing, timeout_s=5.0)
        after = agent.view()
        assert (after.pid, after.state, after.restarts) == (before.pid, ReplicaState.READY, 0)
        assert agent.noticed("ReplicaHealed")


async def test_an_engine_that_hangs_with_health_200_is_restarted(tmp_path: Path) -> None:
    async with Supervised(tmp_path, HASTY) as agent:
        agent.assign(member())
        before = await agent.reaches(ReplicaState.READY)
        await inject(before.endpoint, "hang")
        await agent.restarted(before, timeout_s=20.0)
        assert "no progress" in agent.noticed("EngineFailed")[0]


async def test_an_engine_deep_in_a_step_is_left_alone_and_the_same_engine_hung_is_not(tmp_path: Path) -> None:
    async with Supervised(tmp_path, HASTY) as agent:
        agent.assign(member())
        before = await agent.reaches(ReplicaState.READY)
        request = asyncio.create_task(complete(before.endpoint, max_tokens=1000))
        agent.supervisor.held(HeldUpdate(replicas={before.replica: HeldReplica(in_flight=1, silent_s=60.0)}))
        await inject(before.endpoint, "slow", factor=100_000)  # one step now takes longer than the test
        begun_s = time.monotonic()

        async def time_passed() -> bool:
            agent.gpu_utilization = await gpu_utilization(before.endpoint)
            assert agent.view().in_routing, agent.view()
            return time.monotonic() - begun_s > 3 * HASTY.hung_after_s

        await until_async(time_passed, timeout_s=30.0)
        assert (agent.view().pid, agent.view().state) == (before.pid, ReplicaState.READY)
        await inject(before.endpoint, "hang")
        agent.gpu_utilization = 0.0
        await until_async(lambda: agent.view().state is not ReplicaState.READY, timeout_s=HASTY.hung_after_s + 3.0)
        with pytest.raises(aiohttp.ClientError):
            await request


async def test_an_engine_that_ignores_sigterm_and_left_a_grandchild_ends_in_time(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member())
        view = await agent.reaches(ReplicaState.READY)
        await inject(view.endpoint, "grandchild")
        await inject(view.endpoint, "ignore_sigterm")
        assert len(agent.living()) >= 3
        agent.assign()
        await until_async(lambda: not agent.supervisor.views(), timeout_s=QUICK.term_timeout_s + 3.0)
        assert agent.living() == []


async def test_a_stop_waits_for_what_the_ingress_holds_and_takes_it_out_of_routing_first(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member())
        view = await agent.reaches(ReplicaState.READY)
        agent.supervisor.held(HeldUpdate(replicas={view.replica: HeldReplica(in_flight=1)}))
        agent.assign(replace(member(), desired=Desired.DRAIN))
        assert (await agent.reaches(ReplicaState.DRAINING)).in_flight == 1
        (engine,) = agent.supervisor.local_engines()
        assert not engine.admitting
        checked = agent.supervisor.scrapes()[view.replica].time_s
        await until_async(lambda: agent.supervisor.scrapes()[view.replica].time_s > checked)  # it looked, and stayed
        assert agent.view().state is ReplicaState.DRAINING
        agent.supervisor.held(HeldUpdate(replicas={}))
        await agent.reaches(ReplicaState.STOPPED, timeout_s=5.0)
        assert agent.living() == []
        agent.assign(member())     # wanted again after all
        await agent.reaches(ReplicaState.READY)


async def test_a_crash_loop_is_given_up_with_the_last_words_and_others_go_on(tmp_path: Path) -> None:
    words = (*PYTHON, "print('Traceback: the end is near'); raise SystemExit(1)")
    settings = replace(with_program(QUICK, *words), restart_attempts_max=3, restart_maximum_s=0.2)
    async with Supervised(tmp_path, settings) as agent:
        agent.assign(member())
        view = await agent.reaches(ReplicaState.FAILED)
        assert view.gave_up
        assert view.restarts == 3
        assert "the end is near" in view.reason
        agent.assign(replace(member(), restart_nonce=1))
        await until_async(lambda: not agent.view().gave_up)
        assert (await agent.reaches(ReplicaState.FAILED)).restarts == 6


async def test_a_wrong_setting_a_wrong_program_and_a_wrong_model_are_named(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(
            member("flag", trust_remote_code=True), replace(member("model"), model=str(tmp_path / "nothing-here"))
        )
        view = await agent.reaches(ReplicaState.FAILED, "flag")
        assert "trust_remote_code" in view.reason
        view = await agent.reaches(ReplicaState.FAILED, "model")
        assert "model" in view.reason
        assert view.restarts <= 2
        agent.assign(member("batch", max_num_seqs=100, max_num_batched_tokens=10))
        view = await agent.reaches(ReplicaState.FAILED, "batch")
        assert "max_num_batched_tokens (10)" in view.reason
        assert view.restarts == 0
    async with Supervised(tmp_path / "other", with_program(QUICK, "/no/such/engine")) as agent:
        agent.assign(member())
        assert "/no/such/engine" in (await agent.reaches(ReplicaState.FAILED)).reason


async def test_a_model_of_the_hub_shows_its_download_and_a_gated_one_is_not_asked_twice(tmp_path: Path) -> None:
    program = """if 1:
        import os, sys, time
        bar = "\\rmodel.safetensors:  12%|#  | 594M/4.98G [00:10<01:12, 60.4MB/s]"
        print("Starting to load model org/name...", flush=True)
        while not os.path.exists(os.environ["SEEN"]):
            print(bar, end="", flush=True)
            time.sleep(0.05)
        print("\\nAccess to model org/name is restricted. You must have access to it. " + str(sys.argv))
        raise SystemExit(1)
        """
    seen = tmp_path / "seen"
    settings = replace(
        with_program(QUICK, *PYTHON, program), kind="vllm", allow_downloads=True, download_free_bytes_min=1,
        environment={"SEEN": str(seen), "HF_HOME": str(tmp_path / "hub")},
    )
    async with Supervised(tmp_path, settings) as agent:
        agent.assign(replace(member(), model="org/name@v1"))
        await until_async(lambda: agent.view().reason == "downloads model.safetensors: 12 %")
        assert agent.view().phase == "fetch"
        seen.touch()
        view = await agent.reaches(ReplicaState.FAILED)
        assert (view.gave_up, view.restarts) == (True, 0)
        assert "HF_TOKEN" in view.reason


async def test_a_model_is_not_fetched_onto_a_disk_without_room(tmp_path: Path) -> None:
    settings = replace(
        with_program(QUICK, *PYTHON, "raise SystemExit('started')"), kind="vllm", allow_downloads=True,
        download_free_bytes_min=1 << 60, environment={"HF_HOME": str(tmp_path / "hub")},
    )
    async with Supervised(tmp_path, settings) as agent:
        agent.assign(replace(member(), model="org/name"))
        view = await agent.reaches(ReplicaState.FAILED)
        assert "engine.download_free_bytes_min" in view.reason
        assert not (tmp_path / "logs").exists() or not list((tmp_path / "logs").glob("*.log"))


async def test_two_replicas_never_hold_one_gpu(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member("a", gpu="GPU-1"))
        first = await agent.reaches(ReplicaState.READY)
        await inject(first.endpoint, "ignore_sigterm")
        agent.assign(member("b", gpu="GPU-1"))
        await until_async(lambda: "GPU-1" in agent.view("b").reason)
        assert exists(first.pid)
        assert agent.view("b").pid == 0
        await agent.reaches(ReplicaState.READY, "b")
        assert not exists(first.pid)


async def test_another_configuration_replaces_the_process(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member(max_num_seqs=8))
        before = await agent.reaches(ReplicaState.READY)
        agent.assign(member(max_num_seqs=16))
        await agent.restarted(before)
        (engine,) = agent.supervisor.local_engines()
        assert engine.max_concurrency == 16
        assert not exists(before.pid)


async def test_a_port_that_another_program_answers_is_never_taken_for_the_engine(tmp_path: Path) -> None:
    class Crowded(LocalProcesses):
        """A host where another program grabs the port between the look and the start."""

        port = 0

        def free_port(self, taken: Iterable[int]) -> int:
            return self.port

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()

    processes = Crowded()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    processes.port = server.sockets[0].getsockname()[1]
    settings = with_program(QUICK, *PYTHON, "import time; time.sleep(600)")
    async with server, Supervised(tmp_path, settings, processes=processes) as agent:
        agent.assign(member())
        await until_async(lambda: "not this engine" in agent.view().reason)
        assert agent.view().state is ReplicaState.STARTING
        assert not agent.supervisor.local_engines()


async def test_stop_all_ends_everything_and_starts_nothing_again(tmp_path: Path) -> None:
    async with Supervised(tmp_path) as agent:
        agent.assign(member("a"), member("b"))
        await agent.reaches(ReplicaState.READY, "a")
        await agent.reaches(ReplicaState.READY, "b")
        assert await agent.supervisor.stop_all(2.0) == 2
        assert agent.living() == []
        agent.assign(member("a"), member("b"))
        agent.assign(member("a"), member("b"), member("c"))
        assert agent.living() == []


async def test_a_journal_that_cannot_be_written_stops_nothing_and_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "engines.json.new").mkdir()
    async with Supervised(tmp_path) as agent:
        agent.assign(member())
        await agent.reaches(ReplicaState.READY)
        assert len(agent.noticed("JournalNotWritten")) == 1
        (tmp_path / "engines.json.new").rmdir()
        await until_async((tmp_path / "engines.json").exists)


async def test_a_log_that_floods_stays_bounded(tmp_path: Path) -> None:
    words = (*PYTHON, "while True: print('\\x1b[2Jflood' * 100)")
    settings = replace(with_program(QUICK, *words), log_bytes_max=1 << 20)
    async with Supervised(tmp_path, settings) as agent:
        agent.assign(member())
        await agent.reaches(ReplicaState.STARTING)
        await until_async(lambda: list((tmp_path / "logs").glob("*.log.1")))
        (log,) = (tmp_path / "logs").glob("*.log.1")
        await until_async(lambda: log.stat().st_size == 1 << 20)
        chunks = [lines async for lines in agent.supervisor.logs(agent.view().replica, tail_lines=3, follow=False)]
        assert len(chunks[0]) == 3
        assert "\x1b" not in "".join(chunks[0])
