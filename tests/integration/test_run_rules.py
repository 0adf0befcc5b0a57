"""The rules of a test run, on a run of its own: skips in CI, the seed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.network

SKIPS = 'import pytest\n\n\ndef test_it():\n    pytest.skip("not here")\n'
SHOWS_SEED = "def test_it(seed):\n    assert seed == 0, f'drawn: {seed}'\n"


def run(folder: Path, test: str, allowed: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """A run of one test below this project's own conftest."""
    tests = Path(__file__).parents[1]
    shutil.copy(tests / "conftest.py", folder)
    (folder / "allowed_skips.txt").write_text(allowed)
    (folder / "test_planted.py").write_text(test)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(folder)]
    base = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tests)}
    return subprocess.run(
        [*words, str(folder)], capture_output=True, text=True, check=False, timeout=60, env=base | env, cwd=folder
    )


def test_in_ci_a_skip_that_is_not_in_the_list_fails_the_run(tmp_path: Path) -> None:
    done = run(tmp_path, SKIPS, CI="true")
    assert done.returncode == 1
    assert "unexpected skip: test_planted.py::test_it" in done.stdout


def test_a_second_try_of_what_failed_cannot_make_up_for_a_skip(tmp_path: Path) -> None:
    done = run(tmp_path, f"{SKIPS}\n\ndef test_other():\n    assert False\n", CI="true")
    assert done.returncode == 7


def test_a_skip_in_the_list_and_a_skip_outside_ci_pass(tmp_path: Path) -> None:
    assert run(tmp_path, SKIPS, "test_planted.py::test_it # no such device here", CI="true").returncode == 0
    assert run(tmp_path, SKIPS).returncode == 0


def test_a_run_says_its_seed_and_takes_a_given_one(tmp_path: Path) -> None:
    first = run(tmp_path, SHOWS_SEED)
    [seed] = re.findall(r"replay with ENOVA_TEST_SEED=(\d+)", first.stdout)
    assert f"drawn: {seed}" in first.stdout
    again = run(tmp_path, SHOWS_SEED, ENOVA_TEST_SEED="0")
    assert again.returncode == 0, again.stdout
