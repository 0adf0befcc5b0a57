"""The programs that `enova up` runs: restarted whatever happens, known from their first moment, with bounded logs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from enova_cli.up.child import Child
from enova_cli.up.logs import bound_logs
from enova_common.errors import FatalError
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network

PROGRAM = """#!{python}
import json, os, pathlib, sys, time
path = pathlib.Path(sys.argv[1])
path.with_suffix(".new").write_text(json.dumps({{"pid": os.getpid()}}))
path.with_suffix(".new").replace(path)
time.sleep(600)
"""


@pytest.fixture
def child(tmp_path: Path) -> Child:
    """A program that is ready at once and never ends by itself."""
    program = tmp_path / "program"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o700)
    ready = tmp_path / "program.ready.json"
    return Child("program", [str(program), str(ready)], dict(os.environ), tmp_path / "program.log", ready)


async def test_a_program_that_cannot_be_restarted_for_a_while_comes_back(child: Child) -> None:
    await child.start()
    try:
        first = child.pid
        away = Path(child.argv[0]).rename(child.argv[0] + ".away")
        os.kill(first, signal.SIGKILL)
        await until_async(lambda: not psutil.pid_exists(first), timeout_s=5)
        await asyncio.sleep(1.0)  # two attempts fail at the least: the first comes within 0.4 s
        away.rename(child.argv[0])
        await until_async(lambda: child.pid != first and child.ready_facts() is not None, timeout_s=15)
        assert child.restarts == 1
    finally:
        await child.stop()


async def test_a_program_whose_start_is_broken_off_is_ended_too(child: Child) -> None:
    starting = asyncio.create_task(child.start())
    await asyncio.sleep(0)  # its spawning has begun, no more
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await child.stop()
    assert child.pid
    assert not psutil.pid_exists(child.pid)


async def test_a_program_that_is_not_there_is_named(child: Child) -> None:
    child.argv = ["/nowhere/program"]
    with pytest.raises(FatalError, match="program cannot be started: No such file"):
        await child.start()
    await child.stop()


def test_a_log_over_its_bound_is_emptied_and_its_last_words_are_kept(tmp_path: Path) -> None:
    path, small = tmp_path / "agent.log", tmp_path / "small.log"
    small.write_text("little")
    with path.open("ab", buffering=0) as program:
        program.write(b"a" * 100)
        bound_logs(tmp_path, 99)
        program.write(b"b" * 100)
        bound_logs(tmp_path, 99)
        program.write(b"c")
    assert path.read_bytes() == b"c"
    assert (tmp_path / "agent.log.1").read_bytes() == b"b" * 100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["agent.log", "agent.log.1", "small.log"]
    assert small.read_text() == "little"


def test_a_log_that_cannot_be_kept_is_emptied_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "agent.log"
    path.write_bytes(b"a" * 100)
    (tmp_path / "agent.log.1").mkdir()
    bound_logs(tmp_path, 99)
    assert path.stat().st_size == 0
