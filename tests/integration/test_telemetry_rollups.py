"""Rollups: minutes survive a restart, the file is bounded, and a broken disk delays nobody."""

from __future__ import annotations

import sqlite3
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from enova_coordinator.rollups import KEEP_S, NodeMinute, Rollups, pack, unpack
from enova_testing.waiting import until

pytestmark = pytest.mark.network
REPLICA = "deployments/d/replicas/r"


def minute(number: int, value: float = 1.0, *, features: int = 18, objects: int = 1) -> NodeMinute:
    draw = np.random.default_rng(number)
    rows = {f"{REPLICA}{index or ''}": draw.random(features).astype("f4") for index in range(objects)}
    rows[REPLICA][0] = value
    return NodeMinute(end_s=60.0 * number, node="nodes/n", objects=rows)


def written(rollups: Rollups, count: int) -> None:
    until(lambda: rollups.figures.written >= count, what=f"{count} minutes are written")


def test_a_minute_is_packed_and_unpacked_with_its_gaps() -> None:
    row = np.array([1.0, np.nan, 3.5], dtype="f4")
    found = unpack(pack(NodeMinute(end_s=60.0, node="nodes/n", objects={"a": row, "b": row[:1]})))
    assert np.array_equal(found["a"], row, equal_nan=True)
    assert found["b"].tolist() == [1.0]


def test_minutes_are_read_back_after_a_restart_on_a_grid_with_gaps(tmp_path: Path) -> None:
    path = tmp_path / "rollups.sqlite"
    first = Rollups(path)
    for number, value in ((10, 1.0), (11, 2.0), (13, 4.0)):
        first.write(minute(number, value))
    first.close()
    second = Rollups(path)
    found = second.read(REPLICA, nodes=("nodes/n",), start_s=600.0).result(10)
    second.close()
    start_s, grid = found.on_grid()
    assert start_s == 540.0
    assert grid[:, 0].tolist() == pytest.approx([1, 2, np.nan, 4], nan_ok=True)


def test_a_full_file_gives_up_its_oldest_minutes(tmp_path: Path) -> None:
    rollups = Rollups(tmp_path / "rollups.sqlite", file_bytes_max=1 << 20)
    for number in range(1, 1200):
        one = minute(number, float(number), objects=20)
        until(partial(_accepted, rollups, one), what="room in the queue")
    until(lambda: rollups.figures.dropped.get("file_full", 0) > 0, what="the oldest minutes are dropped")
    found = rollups.read(REPLICA, nodes=("nodes/n",), start_s=0.0).result(10)
    rollups.close()
    assert found.ends_s[-1] == 60.0 * 1199
    assert found.ends_s[0] > 60.0
    assert (tmp_path / "rollups.sqlite").stat().st_size <= 1 << 20


def test_minutes_older_than_fourteen_days_go_and_younger_ones_stay(tmp_path: Path) -> None:
    day = 24 * 60
    assert 14 * day * 60 == KEEP_S
    path = tmp_path / "rollups.sqlite"
    rollups = Rollups(path, prune_every_s=0.0)
    for number in (1, day, day + 1, 7 * day):
        rollups.write(minute(number))
    written(rollups, 4)
    assert rollups.read(REPLICA, nodes=("nodes/n",), start_s=0.0).result(10).ends_s[0] == 60.0

    def ends(of: Rollups) -> list[float]:
        return [end_s / 60 for end_s in of.read(REPLICA, nodes=("nodes/n",), start_s=0.0).result(10).ends_s]

    # Age counts from the newest minute in the file: a fleet that rested a month forgets nothing until it goes on.
    rollups.write(minute(15 * day))
    until(lambda: ends(rollups) == [day, day + 1, 7 * day, 15 * day], what="only the minute that is too old went")
    rollups.write(minute(15 * day + 1))
    until(lambda: ends(rollups) == [day + 1, 7 * day, 15 * day, 15 * day + 1], what="the next one went in its turn")
    rollups.close()
    assert rollups.figures.dropped == {}, "what is too old is not counted as lost"


def _accepted(rollups: Rollups, one: NodeMinute) -> bool:
    before = rollups.figures.dropped.get("queue_full", 0)
    rollups.write(one)
    return rollups.figures.dropped.get("queue_full", 0) == before


def test_a_damaged_file_is_started_anew(tmp_path: Path) -> None:
    path = tmp_path / "rollups.sqlite"
    path.write_bytes(b"no database at all, " * 1000)
    rollups = Rollups(path)
    rollups.write(minute(1))
    written(rollups, 1)
    rollups.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM minutes").fetchone() == (1,)
    connection.close()


def test_a_disk_that_takes_nothing_is_counted_and_nobody_waits(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    rollups = Rollups(blocked / "rollups.sqlite")
    rollups.write(minute(1))
    until(lambda: rollups.figures.dropped.get("disk") == 1)
    assert rollups.read(REPLICA, nodes=("nodes/n",), start_s=0.0).result(10).rows == ()
    rollups.close()
