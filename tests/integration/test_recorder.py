"""The recorder: what policies were told survives a restart, its file is bounded, and a broken disk delays nobody."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from enova_common.errors import Unavailable
from enova_coordinator.core.recording import Recorded, read_lines
from enova_coordinator.recorder import LINE_BYTES_MAX, QUEUE_MAX, Place, Recorder
from enova_recommender.scaling.enova import EnovaPolicy
from enova_recommender.scaling.situation import Demand, Signal
from enova_testing.situations import situation
from enova_testing.waiting import until

pytestmark = pytest.mark.network
CHAT, OTHER = "deployments/chat", "deployments/other"


def history(minutes: int) -> Demand:
    counts = np.random.default_rng(3).poisson(40.0, size=minutes).astype(float)
    return Demand(
        end_s=60.0 * minutes, step_s=60.0, arrived=counts, finished=counts, prompt_tokens=counts, output_tokens=counts
    )


def question(number: int, *, minutes: int = 50, noise: int = 0) -> Recorded:
    """One look, 15 s after the one before; `noise`: replicas whose gauges no file can compress."""
    rows = np.random.default_rng(number).random((max(noise, 1), 600))
    told = situation(now_s=15.0 * number, history=history(minutes), ready=max(noise, 1))
    told = replace(told, recent=replace(told.recent, values={Signal.RUNNING: rows}))
    return Recorded(uid="u", policy="enova", situation=told, memory={}, wish=EnovaPolicy().decide(told, {}).wish)


def read(recorder: Recorder, deployment: str = CHAT, *, last_s: float = float("inf")) -> tuple[list[Recorded], int]:
    """All situations, and how many histories were told on the way."""
    lines: list[str] = []
    place: Place | None = Place()
    while place is not None:
        page = recorder.read(deployment, last_s=last_s, place=place).result(10)
        lines += page.lines
        place = page.rest
    return list(read_lines(lines)), sum(line.startswith('{"kind":"History"') for line in lines)


def put(recorder: Recorder, *questions: Recorded, deployment: str = CHAT) -> None:
    for each in questions:
        before = recorder.figures.written + sum(recorder.figures.dropped.values())
        recorder.put(deployment, each)
        until(
            lambda: recorder.figures.written + sum(recorder.figures.dropped.values()) > before,  # noqa: B023
            what="it is written",
        )


def test_situations_are_read_back_after_a_restart_page_by_page_and_by_deployment(tmp_path: Path) -> None:
    path = tmp_path / "situations.sqlite"
    first = Recorder(path)
    put(first, *(question(number, minutes=40 + number) for number in range(1, 31)))
    put(first, question(99), deployment=OTHER)
    first.close()
    second = Recorder(path)
    put(second, *(question(number, minutes=40 + number) for number in range(31, 71)))
    found, histories = read(second)
    others, _ = read(second, OTHER)
    newest, _ = read(second, last_s=60.0)
    nothing, _ = read(second, "deployments/none")
    second.close()
    assert [each.situation.now_s for each in found] == [15.0 * number for number in range(1, 71)]
    assert [len(each.situation.history.arrived) for each in found] == [40 + number for number in range(1, 71)]
    assert histories == 2, "one by each life of the recorder"
    assert [each.situation.now_s for each in others] == [15.0 * 99]
    assert [each.situation.now_s for each in newest] == [15.0 * number for number in range(66, 71)]
    assert nothing == []


def test_a_full_file_gives_up_its_oldest_situations_and_stays_readable(tmp_path: Path) -> None:
    path = tmp_path / "situations.sqlite"
    recorder = Recorder(path, file_bytes_max=1 << 20)
    put(recorder, *(question(number, noise=8) for number in range(1, 61)))
    found, _ = read(recorder)
    dropped = dict(recorder.figures.dropped)
    recorder.close()
    assert dropped["file_full"] > 0
    stamps = [each.situation.now_s / 15.0 for each in found]
    assert stamps == list(range(61 - len(stamps), 61)), "the newest, without a gap"
    assert len(stamps) + dropped["file_full"] == 60
    assert path.stat().st_size <= 1 << 20


def test_what_is_older_than_the_bound_goes_with_its_history(tmp_path: Path) -> None:
    now_s = [1_000.0]
    path = tmp_path / "situations.sqlite"
    recorder = Recorder(path, keep_s=100.0, prune_every_s=0.0, wall_s=lambda: now_s[0])
    put(recorder, question(1), question(2))
    now_s[0] += 101.0
    put(recorder, question(3))
    found, _ = read(recorder)
    recorder.close()
    assert [each.situation.now_s for each in found] == [45.0]
    with sqlite3.connect(path) as connection:
        (count,) = connection.execute("SELECT count(*) FROM histories").fetchone()
    connection.close()
    assert count == 1


def test_looking_for_what_is_old_writes_no_history_anew(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "situations.sqlite", prune_every_s=0.0)
    put(recorder, *(question(number, minutes=40 + number) for number in range(1, 21)))
    found, histories = read(recorder)
    recorder.close()
    assert (len(found), histories) == (20, 1)


def test_a_situation_that_no_message_could_carry_is_counted_and_left_out(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "situations.sqlite")
    put(recorder, question(1), question(2, noise=LINE_BYTES_MAX // (600 * 8)), question(3))
    found, _ = read(recorder)
    recorder.close()
    assert recorder.figures.dropped == {"too_large": 1}
    assert [each.situation.now_s for each in found] == [15.0, 45.0]


def test_a_disk_that_does_not_write_costs_what_it_loses(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.write_text("a file where a folder should be")
    recorder = Recorder(folder / "situations.sqlite")
    for number in range(3):
        recorder.put(CHAT, question(number))
    until(lambda: recorder.figures.dropped.get("disk") == 3, what="all are counted")
    with pytest.raises(Unavailable, match="cannot be read at the moment") as caught:
        read(recorder)
    assert caught.value.reason == "RECORDING_UNREADABLE"
    folder.unlink()
    put(recorder, question(4))
    found, _ = read(recorder)
    recorder.close()
    assert len(found) == 1


def test_a_damaged_file_is_started_anew(tmp_path: Path) -> None:
    path = tmp_path / "situations.sqlite"
    path.write_bytes(b"this is no database, and longer than a header of one would be" * 20)
    recorder = Recorder(path)
    put(recorder, question(1))
    found, _ = read(recorder)
    recorder.close()
    assert len(found) == 1


def test_who_hands_over_never_waits(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "situations.sqlite")
    one = question(1)
    for _ in range(4 * QUEUE_MAX):
        recorder.put(CHAT, one)
    figures = recorder.figures
    until(lambda: figures.written + figures.dropped.get("queue_full", 0) == 4 * QUEUE_MAX, what="all are counted")
    recorder.close()
    assert figures.written >= QUEUE_MAX
