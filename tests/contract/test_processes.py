"""What every implementation of Processes must do: one suite for real processes and for their twin."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from enova_agent import procfs
from enova_agent.core.command import TOKEN_VARIABLE, Command
from enova_agent.core.failure import Ending
from enova_agent.process import EngineProcess, LocalProcesses, Processes
from enova_testing.fake_processes import FakeProcesses
from enova_testing.waiting import until_async

_SHARING = """
import mmap, os, sys, time
descriptor = os.open(f"/dev/shm/{sys.argv[1]}", os.O_RDWR | os.O_CREAT, 0o600)
os.ftruncate(descriptor, 4096)
memory = mmap.mmap(descriptor, 4096)
print("up", flush=True)
time.sleep(600)
"""
_LISTENER = """
import socket, sys, time
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("up", flush=True)
time.sleep(600)
"""
_REAL = {
    "polite": ["sh", "-c", "echo up; exec sleep 600"],
    "exits": ["sh", "-c", 'echo last words; exit "$0"'],
    "stubborn": ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done"],
    # A child in the session, and one that left it: its parent forked twice and is gone.
    "family": ["sh", "-c", "sleep 600 & setsid sh -c 'sleep 600 &'; echo up; wait"],
    "listener": [sys.executable, "-I", "-c", _LISTENER],
    "busy": ["sh", "-c", "echo up; while :; do :; done"],
    "sharing": [sys.executable, "-I", "-c", _SHARING],
}


class World:
    """Processes of one kind, with what a test needs to reach around them."""

    def __init__(self, processes: Processes, folder: Path, prefix: str) -> None:
        self.processes = processes
        self.folder = folder
        self.prefix = prefix
        self.engines: list[EngineProcess] = []
        self.real = isinstance(processes, LocalProcesses)

    async def start(self, behaviour: str, *arguments: str) -> EngineProcess:
        """An engine that is up."""
        token = f"{self.prefix}{secrets.token_hex(4)}"
        words = (*_REAL.get(behaviour, [behaviour]), *arguments) if self.real else (behaviour, *arguments)
        environment = {TOKEN_VARIABLE: token, "PATH": os.environ["PATH"]}
        engine = self.processes.spawn(Command(argv=words, environment=environment), self.log(token))
        self.engines.append(engine)
        if self.real and behaviour != "exits":
            await until_async(lambda: "up" in self.log(token).read_text(), timeout_s=20.0)
        return engine

    def log(self, token: str) -> Path:
        return self.folder / f"{token}.log"

    def kill_first(self, engine: EngineProcess) -> None:
        if isinstance(self.processes, FakeProcesses):
            self.processes.end(engine.pid, Ending(signal=9))
        else:
            os.kill(engine.pid, signal.SIGKILL)

    def stop_first(self, engine: EngineProcess) -> None:
        if isinstance(self.processes, FakeProcesses):
            self.processes.table[engine.pid].stopped = True
        else:
            os.kill(engine.pid, signal.SIGSTOP)

    def living(self, engine: EngineProcess) -> int:
        """How many processes bear its token, looked at from outside."""
        if isinstance(self.processes, FakeProcesses):
            return sum(e.token == engine.token and e.ending is None for e in self.processes.table.values())
        return sum(
            entry.alive and procfs.environment(entry.pid).get(TOKEN_VARIABLE) == engine.token
            for entry in procfs.processes().values()
        )

    def segment_exists(self, name: str) -> bool:
        if isinstance(self.processes, FakeProcesses):
            return name in self.processes.segments
        return Path("/dev/shm", name).exists()

    async def killed(self, engine: EngineProcess) -> None:
        await until_async(lambda: self.processes.kill_all(engine) == 0, timeout_s=10.0)


@pytest_asyncio.fixture(params=["twin", pytest.param("real", marks=pytest.mark.network)])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    makers: dict[str, Callable[[], Processes]] = {"twin": FakeProcesses, "real": LocalProcesses}
    made = World(makers[request.param](), tmp_path, f"test-{secrets.token_hex(4)}.")
    yield made
    for engine in made.engines:
        await made.killed(engine)
        with contextlib.suppress(ChildProcessError):  # the twin's were never there
            if made.real:
                os.waitid(os.P_PID, engine.pid, os.WEXITED | os.WNOHANG)
    made.processes.sweep()
    made.processes.sweep()


async def test_what_was_started_is_found_by_its_token_and_can_be_adopted(world: World) -> None:
    engine = await world.start("polite")
    assert world.processes.found(world.prefix) == (engine,)
    assert world.processes.adopt(engine)
    assert world.processes.environment(engine)[TOKEN_VARIABLE] == engine.token
    assert world.processes.found("somebody-else.") == ()


async def test_only_exactly_the_process_that_was_meant_is_adopted(world: World) -> None:
    engine = await world.start("polite")
    for other in (
        replace(engine, start_ticks=engine.start_ticks + 1),
        replace(engine, boot_id="another boot"),
        replace(engine, token="another token"),
        replace(engine, pid=engine.pid + 1),
    ):
        assert not world.processes.adopt(other)


async def test_a_process_named_wrongly_is_neither_ended_nor_waited_for(world: World) -> None:
    engine = await world.start("polite")
    reused = replace(engine, start_ticks=engine.start_ticks + 1, token="gone")
    world.processes.terminate(reused)
    assert world.processes.kill_all(reused) == 0
    assert await asyncio.wait_for(world.processes.wait(reused), 5.0) == Ending()
    assert world.processes.kill_all(replace(engine, boot_id="another boot")) == 0
    assert world.processes.adopt(engine)


async def test_output_and_exit_code_are_kept(world: World) -> None:
    engine = await world.start("exits", "3")
    assert await asyncio.wait_for(world.processes.wait(engine), 10.0) == Ending(code=3)
    assert world.log(engine.token).read_text() == "last words\n"
    assert not world.processes.adopt(engine)


async def test_a_program_that_is_not_there_is_an_error_that_says_so(world: World) -> None:
    with pytest.raises(FileNotFoundError):
        await world.start("/no/such/engine")


async def test_a_polite_engine_ends_when_told(world: World) -> None:
    engine = await world.start("polite")
    waiting = asyncio.create_task(world.processes.wait(engine))
    world.processes.terminate(engine)
    assert await asyncio.wait_for(waiting, 10.0) == Ending(signal=15)


async def test_a_stubborn_engine_outlives_term_but_not_kill(world: World) -> None:
    engine = await world.start("stubborn")
    world.processes.terminate(engine)
    assert world.processes.adopt(engine)
    await world.killed(engine)
    assert world.living(engine) == 0
    assert await asyncio.wait_for(world.processes.wait(engine), 10.0) == Ending(signal=9)


async def test_killing_reaches_children_and_orphans_in_other_sessions(world: World) -> None:
    engine = await world.start("family")
    assert world.living(engine) >= 3
    await world.killed(engine)
    assert world.living(engine) == 0


async def test_what_the_first_process_left_behind_is_found_and_killed(world: World) -> None:
    engine = await world.start("family")
    world.kill_first(engine)
    assert await asyncio.wait_for(world.processes.wait(engine), 10.0) == Ending(signal=9)
    assert world.living(engine) >= 2
    found = world.processes.found(world.prefix)
    assert [left.token for left in found] == [engine.token]
    assert found[0].pid != engine.pid
    await world.killed(engine)
    assert world.living(engine) == 0


async def test_other_engines_are_not_touched(world: World) -> None:
    engine, other = await world.start("family"), await world.start("polite")
    await world.killed(engine)
    assert world.processes.adopt(other)
    assert world.processes.found(world.prefix) == (other,)


async def test_activity_shows_cpu_time_and_stopped_processes(world: World) -> None:
    engine = await world.start("busy")
    before = world.processes.activity(engine, 1.0)
    assert before.server_pid == engine.pid
    assert before.stopped == ()

    def used_more() -> bool:
        return world.processes.activity(engine, 2.0).cpu_s[engine.pid] > before.cpu_s[engine.pid]

    await until_async(used_more, timeout_s=10.0)
    assert world.processes.usage(engine).cpu_s > before.cpu_s[engine.pid]
    world.stop_first(engine)
    await until_async(lambda: world.processes.activity(engine, 3.0).stopped == (engine.pid,), timeout_s=10.0)


async def test_a_stopped_engine_is_killed_all_the_same(world: World) -> None:
    engine = await world.start("polite")
    world.stop_first(engine)
    await world.killed(engine)
    assert world.living(engine) == 0


async def test_shared_memory_is_removed_once_nobody_uses_it(world: World) -> None:
    name = f"psm_{secrets.token_hex(4)}"
    engine, other = await world.start("sharing", name), await world.start("sharing", name)
    assert world.processes.shared_memory(engine) == {name}
    await world.killed(engine)
    assert world.processes.remove_shared_memory({name}) == ()
    assert world.segment_exists(name)
    await world.killed(other)
    assert world.processes.remove_shared_memory({name}) == (name,)
    assert not world.segment_exists(name)
    assert world.processes.remove_shared_memory({name}) == ()


async def test_a_port_is_the_engine_s_only_if_its_own_process_listens(world: World) -> None:
    port = world.processes.free_port(())
    engine, other = await world.start("listener", str(port)), await world.start("polite")
    assert world.processes.owns_port(engine, port)
    assert not world.processes.owns_port(other, port)
    assert not world.processes.owns_port(engine, world.processes.free_port({port}))


async def test_free_ports_avoid_those_that_are_taken(world: World) -> None:
    ports = {world.processes.free_port(())}
    for _ in range(20):
        port = world.processes.free_port(ports)
        assert port not in ports
        ports.add(port)


@pytest.mark.network
async def test_a_semaphore_of_python_is_known_although_its_mapping_bears_another_name(tmp_path: Path) -> None:
    processes = LocalProcesses()
    code = "import multiprocessing as m, time; lock = m.Lock(); print('up', flush=True); time.sleep(600)"
    code = code.replace("m.Lock", "m.get_context('spawn').Lock")  # others are unlinked at once
    environment = {TOKEN_VARIABLE: f"test-{secrets.token_hex(4)}.x", "PATH": os.environ["PATH"]}
    engine = processes.spawn(Command(argv=(sys.executable, "-c", code), environment=environment), tmp_path / "log")
    await until_async(lambda: "up" in (tmp_path / "log").read_text(), timeout_s=20.0)
    names = processes.shared_memory(engine)
    assert len(names) == 1
    await until_async(lambda: processes.kill_all(engine) == 0, timeout_s=10.0)
    assert processes.remove_shared_memory(names) == tuple(names)
    await processes.wait(engine)


@pytest.mark.network
async def test_an_engine_that_has_started_yields_to_what_computes_beside_it(tmp_path: Path) -> None:
    group = Path("/proc/self/autogroup")
    if not group.exists():
        return  # a kernel without such groups has nothing to set
    processes = LocalProcesses(session_nice=7)
    environment = {TOKEN_VARIABLE: f"test-{secrets.token_hex(4)}.x", "PATH": os.environ["PATH"]}
    own = group.read_text()
    engine = processes.spawn(Command(argv=("sleep", "600"), environment=environment), tmp_path / "log")
    others = Path(f"/proc/{engine.pid}/autogroup")
    assert others.read_text().split()[-1] == "0"
    processes.step_back(engine)
    assert others.read_text().split()[-1] == "7"
    assert group.read_text() == own
    await until_async(lambda: processes.kill_all(engine) == 0, timeout_s=10.0)
    await processes.wait(engine)


@pytest.mark.network
@pytest.mark.root
async def test_with_a_cgroup_even_a_process_that_hides_everything_ends_with_its_engine(tmp_path: Path) -> None:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    tops = [Path(fields[1]) for fields in mounts if fields[2] == "cgroup2" and os.access(fields[1], os.W_OK)]
    if os.geteuid() != 0 or not tops:
        pytest.skip("needs root and cgroups of version 2")
    folder = tops[0] / f"enova-test-{secrets.token_hex(4)}"
    folder.mkdir()
    processes = LocalProcesses(cgroup=folder)
    environment = {TOKEN_VARIABLE: f"test-{secrets.token_hex(4)}.x", "PATH": os.environ["PATH"]}
    # A session of its own, no parent, no token: nothing but the cgroup knows where it came from.
    hide = "sleep 0.3; env -i setsid sh -c 'sleep 600 & echo $! > \"$0\"' \"$0\"; echo up; exec sleep 600"
    engine = processes.spawn(
        Command(argv=("sh", "-c", hide, str(tmp_path / "pid")), environment=environment), tmp_path / "log"
    )
    await until_async(lambda: "up" in (tmp_path / "log").read_text(), timeout_s=10.0)
    hidden = int((tmp_path / "pid").read_text())
    entry = procfs.stat(hidden)
    assert entry is not None
    assert entry.alive
    await until_async(lambda: processes.kill_all(engine) == 0, timeout_s=10.0)
    assert await processes.wait(engine) == Ending(signal=9)

    def is_gone() -> bool:
        processes.sweep()
        return procfs.stat(hidden) is None

    await until_async(is_gone, timeout_s=10.0)
    processes.kill_all(engine)     # the last zombie is reaped: the engine's own cgroup can go
    folder.rmdir()


@pytest.mark.network
async def test_a_free_port_can_be_bound() -> None:
    with socket.create_server(("127.0.0.1", LocalProcesses().free_port(()))) as server:
        assert server.getsockname()[1] > 0


@pytest.mark.network
async def test_an_orphan_that_ends_by_itself_is_reaped(tmp_path: Path) -> None:
    processes = LocalProcesses()
    environment = {TOKEN_VARIABLE: f"test-{secrets.token_hex(4)}.x", "PATH": os.environ["PATH"]}
    words = ("sh", "-c", "setsid sh -c 'sleep 0.1 & echo $! > \"$0\"' \"$0\"; exec sleep 600", str(tmp_path / "pid"))
    engine = processes.spawn(Command(argv=words, environment=environment), tmp_path / "log")
    await until_async(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip(), timeout_s=10.0)
    orphan = int((tmp_path / "pid").read_text())

    def is_reaped() -> bool:
        processes.sweep()
        return procfs.stat(orphan) is None

    await until_async(is_reaped, timeout_s=10.0)
    await until_async(lambda: processes.kill_all(engine) == 0, timeout_s=10.0)
    assert await processes.wait(engine) == Ending(signal=9)
