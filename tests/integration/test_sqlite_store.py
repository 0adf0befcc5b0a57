"""What only a file can suffer: SIGKILL, a second process, damage, a full disk, a history without bound."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from enova_common.errors import Conflict, Corrupt, Exhausted, FatalError, InvalidField, Unavailable
from enova_coordinator.store import NO_SPACE, Compacted, Delete, ModRevisionIs, Put
from enova_coordinator.store.sqlite import MEMORY, SqliteStore
from enova_testing.store_harness import fill
from enova_testing.store_tools import put, watched

pytestmark = pytest.mark.network
TRIALS = 20

WRITER = """
import asyncio, sys
from enova_coordinator.store import ModRevisionIs, Put
from enova_coordinator.store.sqlite import SqliteStore

async def main(path, begin):
    store = await SqliteStore.open(path)
    print("open", flush=True)
    for number in range(int(begin), 10**9):
        key = f"/enova/test/{number:09}"
        await store.transact([ModRevisionIs(key, 0)], [Put(key, b"x" * (number % 5000)), Put(key + "/twin", b"")])
        print(number, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def start_writer(path: Path, begin: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(begin)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


async def test_every_acknowledged_write_survives_sigkill(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    path, acknowledged = tmp_path / "store.db", -1
    for _ in range(TRIALS):
        writer = start_writer(path, acknowledged + 1000)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        for _ in range(draw.randrange(1, 40)):
            acknowledged = int(writer.stdout.readline())
        time.sleep(draw.uniform(0.0, 0.005))  # anywhere in the life of a write
        writer.kill()
        rest = [int(line) for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        acknowledged = max([acknowledged, *rest])
        writer.wait()
        writer.stdout.close()

        store = await SqliteStore.open(path)
        entries, revision = await store.range("/enova/test/")
        keys = {entry.key for entry in entries}
        whole = {key for key in keys if not key.endswith("/twin")}
        assert f"/enova/test/{acknowledged:09}" in whole
        assert keys == whole | {f"{key}/twin" for key in whole}, "a transaction is whole or not at all"
        assert all(len(entry.value) == int(entry.key[-9:]) % 5000 for entry in entries if entry.key in whole)
        # Revisions go on from what was acknowledged: none is used twice.
        assert revision == 1 + len(whole)
        await store.close()


async def test_second_process_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    writer = start_writer(path)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "open\n"
    with pytest.raises(Conflict, match=f"is open in process {writer.pid}") as refusal:
        await SqliteStore.open(path)
    assert refusal.value.reason == "STORE_IN_USE"
    assert refusal.value.metadata == {"pid": str(writer.pid)}
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    await (await SqliteStore.open(path)).close()


async def test_file_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE theirs (x)")
    other.close()
    with pytest.raises(InvalidField, match="another program"):
        await SqliteStore.open(path)
    text = tmp_path / "notes.txt"
    text.write_text("no database at all, but long enough to have a header of its own" * 20)
    with pytest.raises(Corrupt, match="damaged"):
        await SqliteStore.open(text)
    assert text.read_text().startswith("no database")


async def test_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await (await SqliteStore.open(path)).close()
    file = sqlite3.connect(path)
    file.execute("PRAGMA user_version = 99")
    file.close()
    with pytest.raises(FatalError, match="format 99") as refusal:
        await SqliteStore.open(path)
    assert refusal.value.reason == "STORE_FORMAT"


async def test_damaged_file_is_found_when_it_is_opened(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "store.db"
    store = await SqliteStore.open(path)
    for number in range(50):
        await put(store, f"/enova/test/{number}", os.urandom(3000))
    await store.close()
    content = bytearray(path.read_bytes())
    draw = random.Random(seed)
    for page in range(1, len(content) // 4096):
        start = page * 4096 + draw.randrange(8)
        content[start : start + 16] = b"\xff" * 16
    path.write_bytes(content)
    with pytest.raises(Corrupt, match="damaged") as refusal:
        await SqliteStore.open(path)
    assert "backup" in refusal.value.remedy


async def test_folder_that_does_not_exist_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="No such file"):
        await SqliteStore.open(tmp_path / "none" / "store.db")


async def test_full_file_takes_puts_again_after_deletes(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db", max_bytes=1 << 20)
    await fill(store, "/enova/test/")
    entries, _ = await store.range("/enova/test-filler/")
    assert 2 < len(entries) < 10
    with pytest.raises(Exhausted):
        await put(store, "/enova/test/again", b"x" * 50_000)
    for entry in entries[:2]:
        await store.transact([ModRevisionIs(entry.key, entry.mod_revision)], [Delete(entry.key)])
    await put(store, "/enova/test/again", b"x" * 50_000)
    await store.close()


async def test_full_disk_refuses_the_write_whole_and_keeps_the_rest(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db")
    await put(store, "/enova/test/before", b"1")
    # SQLite's own bound answers as a disk without space does, in the middle of a transaction.
    pages = store._database._connection.execute("PRAGMA page_count").fetchone()[0]
    store._database._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(Exhausted) as refusal:
        await store.transact(
            [ModRevisionIs("/enova/test/a", 0)], [Put("/enova/test/a", b"1"), Put("/enova/test/b", b"x" * 500_000)]
        )
    assert refusal.value.reason == NO_SPACE
    assert [entry.key for entry in (await store.range("/enova/test/"))[0]] == ["/enova/test/before"]
    await store.close()


async def test_history_is_bounded_in_revisions(tmp_path: Path) -> None:
    store = await SqliteStore.open(MEMORY, history_revisions=100)
    first = await put(store, "/enova/test/a", b"")
    for number in range(1200):
        await put(store, "/enova/test/a", b"%d" % number)
    rows = store._database._connection.execute("SELECT count(*) FROM history").fetchone()[0]
    assert rows <= 100 + 500
    async with watched(store, "/enova/test/", first) as watch:
        await watch.until_error(2.0)
    assert isinstance(watch.error, Compacted)
    await store.close()


async def test_history_is_bounded_in_bytes() -> None:
    store = await SqliteStore.open(MEMORY, history_bytes=1 << 20)
    for number in range(40):
        await put(store, "/enova/test/a", bytes([number]) * 500_000)
    kept = store._database._connection.execute("SELECT sum(length(value)) FROM history").fetchone()[0]
    assert kept <= (1 << 20) + (8 << 20)
    await store.close()


async def test_quiet_watch_is_not_overtaken_by_the_bound_on_history() -> None:
    store = await SqliteStore.open(MEMORY, history_revisions=100)
    start = await put(store, "/enova/test/quiet", b"")
    async with watched(store, "/enova/test/quiet", start) as watch:
        for number in range(1200):
            await put(store, "/enova/other", b"%d" % number)
            await asyncio.sleep(0)
        await put(store, "/enova/test/quiet", b"end")
        await watch.until_key("/enova/test/quiet", 2.0)
    assert watch.error is None
    assert len(watch.batches) == 1
    await store.close()


async def test_lease_ends_on_time_by_itself(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db")
    lease = await store.lease(1)
    start = await put(store, "/enova/test/a", b"", lease.id)
    began = time.monotonic()
    async with watched(store, "/enova/test/", start) as watch:
        await watch.until_key("/enova/test/a", 3.0)
    assert 0.9 < time.monotonic() - began < 2.0
    await store.close()


async def test_cancelled_caller_does_not_hide_its_write_from_watchers(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db")
    start = await put(store, "/enova/test/a", b"")
    async with watched(store, "/enova/test/", start) as watch:
        for turns in range(12):
            key = f"/enova/test/{turns}"
            write = asyncio.create_task(store.transact([ModRevisionIs(key, 0)], [Put(key, b"")]))
            for _ in range(turns):
                await asyncio.sleep(0)
            write.cancel()
            await asyncio.wait([write])
            # It was either taken back before it began, or it happened and is told.
            if await store.get(key) is not None:
                await watch.until_key(key, 2.0)
        # How many were taken back is the scheduler's affair; one that nobody cancels is told in any case.
        await put(store, "/enova/test/last", b"")
        await watch.until_key("/enova/test/last", 2.0)
    await store.close()


async def test_closed_store_says_so_and_ends_its_watches(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "store.db")
    start = await put(store, "/enova/test/a", b"")
    batches = store.watch("/enova/test/", after=start)
    waiting = asyncio.ensure_future(anext(batches, None))
    await asyncio.sleep(0)
    await store.close()
    assert await asyncio.wait_for(waiting, 2.0) is None
    with pytest.raises(Unavailable) as refusal:
        await store.get("/enova/test/a")
    assert refusal.value.reason == "STORE_CLOSED"
    await store.close()
