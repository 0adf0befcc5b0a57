"""The README's five-minute walk, word for word, in one shell as a reader would type it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
WALK_TIMEOUT_S = 280.0
READY = "until enova get nodes >/dev/null 2>&1; do sleep 0.2; done"


def walk() -> list[str]:
    """The commands of the section, without the set-up, which has been done."""
    section = re.search(r"^## Five minutes\n(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert section is not None
    lines = [line[4:] for line in section[1].splitlines() if line.startswith("    ")]
    return [line for line in lines if not line.startswith(("make setup", "export PATH"))]


def test_the_five_minute_walk_works_word_for_word(tmp_path: Path) -> None:
    commands = walk()
    up = next(index for index, line in enumerate(commands) if line.startswith("enova up"))
    # A reader waits for the line that up prints; a script has to ask.
    commands.insert(up + 1, READY)
    script = "\n".join(["set -euo pipefail", *commands, "wait"])
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=WALK_TIMEOUT_S,
        check=False,
    )
    said = f"{done.stdout}\n{done.stderr}"
    # `wait` gives the code of `enova up`, ended by kill: it ends in order and says so by 0.
    assert done.returncode == 0, said
    assert '"served": ' in done.stdout, said
    assert "chat is READY" in done.stdout or "chat is UPDATING" in done.stdout, said
    assert '"usage"' in done.stdout, said
