"""`enova replay` over a file that was kept: the plan process, a table and JSON out, and what is wrong is named."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from enova_cli.__main__ import main
from enova_testing.recordings import lines_of, recording, write_recording

pytestmark = pytest.mark.network


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return write_recording(tmp_path / "kept.jsonl", recording())


def replay(*words: str) -> Result:
    return CliRunner().invoke(main, ["replay", *words])


def test_the_recorded_policy_differs_nowhere_and_another_knob_is_told_look_by_look(kept: Path) -> None:
    same = replay("--file", str(kept), "-o", "json")
    assert same.exit_code == 0, same.output
    assert json.loads(same.stdout)["differences"] == 0
    table = replay("--file", str(kept), "--conservatism", "4").stdout
    lines = table.splitlines()
    assert lines[0].split() == ["MODEL", "TIME", "RAN", "RECORDED", "REPLAYED", "WHY", "NOW"]
    looks = json.loads(replay("--file", str(kept), "--conservatism", "4", "-o", "json").stdout)["looks"]
    first = next(look for look in looks if look["differs"])
    numbers = [first["target"], first["recorded"]["replicas"], first["replayed"]["replicas"]]
    assert lines[1].split()[1:4] == [str(number) for number in numbers]
    assert numbers[1] != numbers[2]
    assert lines[1].startswith(time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(first["now_s"])))
    assert "120 situations of chat in 0.50 h:" in table
    assert "Recorded: enova with conservatism 1:" in table
    assert "Replayed: the same policy with conservatism 4:" in table


def test_a_compressed_file_and_another_policy(tmp_path: Path) -> None:
    path = tmp_path / "kept.gz"
    path.write_bytes(gzip.compress("\n".join(lines_of(recording(30))).encode()))
    done = replay("--file", str(path), "--policy", "keda-queue", "-o", "json")
    answer: dict[str, Any] = json.loads(done.stdout)
    assert (answer["situations"], answer["replayed"]["policy"]) == (30, "keda-queue")


@pytest.mark.parametrize(
    ("words", "field", "message"),
    [
        (("--policy", "nonsense"), "--policy", "not known"),
        (("--conservatism", "0"), "--conservatism", "does not lie"),
    ],
)
def test_what_cannot_be_asked_is_told_under_its_option(
    kept: Path, words: tuple[str, ...], field: str, message: str
) -> None:
    done = replay("--file", str(kept), *words, "-o", "json")
    assert done.exit_code == 1
    told = json.loads(done.stderr)
    assert told["field"] == field
    assert message in told["message"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "none was recorded"), (b"{}\n", "line 1"), (b"\xff\xfe\n", "cannot be read"), (b'{"kind":"Sit', "line 1")],
    ids=["empty", "no kind", "no text", "cut off"],
)
def test_a_file_that_is_no_recording_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_bytes(content)
    done = replay("--file", str(path), "-o", "json")
    assert done.exit_code == 1
    told = json.loads(done.stderr)
    assert told["field"] == "situations"
    assert message in told["message"]


@pytest.mark.parametrize(
    ("words", "code"),
    [((), 2), (("chat", "--file", "x"), 2), (("--file", "x", "--last", "1h"), 2), (("--file", "none.jsonl"), 4),
     (("node/x",), 2)],
)  # fmt: skip
def test_a_wrong_use_is_refused(words: tuple[str, ...], code: int) -> None:
    assert replay(*words).exit_code == code
