"""Settings from real files, and sd_notify over real sockets."""

from __future__ import annotations

import asyncio
import io
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

from enova_common import logs
from enova_common.notify import Notifier, keep_watchdog
from enova_common.settings import InvalidSettings, load_settings

pytestmark = pytest.mark.network


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    port: int = 1


def test_a_file_is_read_and_its_name_is_in_every_problem(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("port = 5\n")
    assert load_settings(Example, path, {}, "X") == Example(port=5)
    for text, problem in (("port = ", "not TOML"), ("port = 'a'", "port: must be a whole number"), ("a = 1", "a: unk")):
        path.write_text(text)
        with pytest.raises(InvalidSettings) as raised:
            load_settings(Example, path, {}, "X")
        assert raised.value.problems[0].startswith(f"{path}: {problem}")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidSettings, match="not TOML"):
        load_settings(Example, path, {}, "X")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="there is no such file"):
        load_settings(Example, tmp_path / "absent.toml", {}, "X")
    with pytest.raises(InvalidSettings, match="directory"):
        load_settings(Example, tmp_path, {}, "X")


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, *, abstract: bool) -> None:
    name = f"@enova-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name[1:] if abstract else name)
        systemd.settimeout(5)
        notifier = Notifier.from_environment({"NOTIFY_SOCKET": name})
        assert notifier.ready("listening on\nport 1")
        assert systemd.recv(1024) == b"READY=1\nSTATUS=listening on port 1"
        assert notifier.watchdog()
        assert systemd.recv(1024) == b"WATCHDOG=1"
        assert notifier.status("well")
        assert systemd.recv(1024) == b"STATUS=well"
        assert notifier.stopping()
        assert systemd.recv(1024) == b"STOPPING=1"


def test_without_systemd_nothing_is_told_and_nothing_fails(tmp_path: Path) -> None:
    assert not Notifier.from_environment({}).ready()
    assert not Notifier(str(tmp_path / "nobody")).ready()


async def test_the_watchdog_is_fed_while_healthy_and_not_otherwise(tmp_path: Path) -> None:
    healthy = True
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)  # noqa: FBT003
        notifier = Notifier(str(tmp_path / "notify"))
        env = {"WATCHDOG_USEC": "20000"}
        beats = asyncio.create_task(keep_watchdog(notifier, healthy=lambda: healthy, env=env))
        loop = asyncio.get_running_loop()
        for _ in range(3):
            assert await asyncio.wait_for(loop.sock_recv(systemd, 64), 5) == b"WATCHDOG=1"
        healthy = False
        while True:  # what was sent before
            try:
                await asyncio.wait_for(loop.sock_recv(systemd, 64), 0.2)
            except TimeoutError:
                break
        healthy = True
        assert await asyncio.wait_for(loop.sock_recv(systemd, 64), 5) == b"WATCHDOG=1"
        beats.cancel()
    await asyncio.wait_for(keep_watchdog(notifier, env={}), 1)  # nobody watches: nothing to do


def test_logs_go_to_the_stream_as_json_or_text_and_survive_its_end() -> None:
    import logging

    root = logging.getLogger()
    before, level, raising = list(root.handlers), root.level, logging.raiseExceptions
    try:
        for form, beginning in ((logs.LogForm.AUTO, "{"), (logs.LogForm.JSON, "{"), (logs.LogForm.TEXT, "")):
            stream = io.StringIO()
            logs.configure("p", level="info", form=form, stream=stream)
            logging.getLogger("enova.x").info("hello")
            logging.getLogger("enova.x").debug("unheard")
            [line] = stream.getvalue().splitlines()
            assert line.startswith(beginning)
            assert "hello" in line
        stream.close()
        logging.getLogger("enova.x").info("into a closed stream")  # must not raise
    finally:
        root.handlers[:], logging.raiseExceptions = before, raising
        root.setLevel(level)
