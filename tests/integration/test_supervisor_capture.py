"""The logs of engines: bounded, read in order over truncations, harmless to terminals."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from enova_agent.capture import LINE_LENGTH_MAX, READ_BYTES_MAX, LogReader, follow, printable, rotate, tail


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"plain", "plain"),
        (b"\x1b[0;36m(EngineCore pid=7)\x1b[0;0m INFO", "(EngineCore pid=7) INFO"),
        (b"\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        (b"\x1b[2J\x1b[H", "\\x1b[2J\\x1b[H"),
        (b"50%\r100%\r", "50%\\x0d100%"),
        (b"tab\tstays", "tab\tstays"),
        (b"\xff\xfe", "��"),
        ("\u202egnp.exe".encode(), "\\u202egnp.exe"),
        (b"x" * (LINE_LENGTH_MAX + 5), "x" * LINE_LENGTH_MAX + "..."),
    ],
)
def test_a_line_can_do_nothing_to_a_terminal(line: bytes, text: str) -> None:
    assert printable(line) == text


def test_the_tail_reaches_over_a_rotation(tmp_path: Path) -> None:
    log = tmp_path / "e.log"
    log.write_text("".join(f"old {n}\n" for n in range(5000)))
    assert rotate(log, 1000)
    assert log.stat().st_size == 0
    assert (tmp_path / "e.log.1").stat().st_size == 1000
    with log.open("a") as file:
        file.write("new 0\nnew 1\nunfinished")
    assert tail(log, 2) == ["new 1", "unfinished"]
    assert tail(log, 5) == ["old 4998", "old 4999", "new 0", "new 1", "unfinished"]
    assert tail(log, 0) == []
    assert tail(tmp_path / "none.log", 5) == []


def test_a_log_within_its_bound_is_left_alone(tmp_path: Path) -> None:
    log = tmp_path / "e.log"
    log.write_text("x")
    assert not rotate(log, 1)
    assert not rotate(tmp_path / "none.log", 1)
    assert log.read_text() == "x"


def test_a_writer_goes_on_after_a_rotation_at_the_new_beginning(tmp_path: Path) -> None:
    log = tmp_path / "e.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"x" * 2000)
        assert rotate(log, 1000)
        writer.write(b"after\n")
    assert log.read_bytes() == b"after\n"


def test_a_reader_gives_whole_lines_once_and_survives_truncation(tmp_path: Path) -> None:
    log = tmp_path / "e.log"
    reader = LogReader(log)
    assert reader.read() == []
    with log.open("ab", buffering=0) as writer:
        writer.write(b"one\ntw")
        assert reader.read() == ["one"]
        writer.write(b"o\nthree\n")
        assert reader.read() == ["two", "three"]
        assert reader.read() == []
        rotate(log, 1)
        writer.write(b"four\n")
        assert reader.read() == ["four"]


def test_of_a_flood_the_newest_part_is_read(tmp_path: Path) -> None:
    log = tmp_path / "e.log"
    log.write_bytes(b"flood\n" * READ_BYTES_MAX + b"last\n")
    lines = LogReader(log).read()
    assert len(lines) <= READ_BYTES_MAX / 6 + 2
    assert lines[-1] == "last"


async def test_following_gives_the_tail_and_then_what_comes(tmp_path: Path) -> None:
    log = tmp_path / "e.log"
    log.write_text("a\nb\nc\n")
    following = follow(log, tail_lines=2)
    assert await anext(following) == ["b", "c"]
    with log.open("a") as file:
        file.write("d\n")
    assert await asyncio.wait_for(anext(following), 5.0) == ["d"]
    await following.aclose()  # type: ignore[attr-defined]  # an async generator, said to be an iterator


def test_a_bar_that_overwrites_itself_is_read_state_by_state(tmp_path: Path) -> None:
    log = tmp_path / "e.log"
    reader = LogReader(log)
    log.write_bytes(b"start\r\n\n\rfetch:  1%|\rfetch:  2%|\rfetch:  3%|")
    assert reader.read() == ["start", "", "fetch:  1%|", "fetch:  2%|"]
    with log.open("ab") as file:
        file.write(b"\rfetch: 99%|\nend\n")
    assert reader.read() == ["fetch:  3%|", "fetch: 99%|", "end"]
