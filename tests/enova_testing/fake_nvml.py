"""Builds the fake libnvidia-ml.so.1 and says what its GPUs are like."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_nvml.c")
LIBRARY = "libnvidia-ml.so.1"
STATE_VARIABLE = "ENOVA_FAKE_NVML"


def compiler() -> list[str]:
    """The host's C compiler, or the one that the test dependencies bring."""
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    return [sys.executable, "-m", "ziglang", "cc"]


def build(folder: Path | None = None, *, without: Sequence[str] = ()) -> Path:
    """The folder that holds the library, for LD_LIBRARY_PATH; `without` leaves functions out. Built once a content."""
    options = [f"-DWITHOUT_{name}" for name in without]
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(options).encode()).hexdigest()[:16]
    place = (folder or Path(tempfile.gettempdir()) / f"enova-fake-nvml-{os.getuid()}") / key
    library = place / LIBRARY
    if not library.exists():
        place.mkdir(parents=True, exist_ok=True)
        fresh = place / f"{LIBRARY}.{os.getpid()}"
        command = [*compiler(), "-shared", "-fPIC", "-O2", "-Wall", *options, "-o", str(fresh), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        fresh.replace(library)
    return place


class FakeDriver:
    """The state of the fake GPUs: a file that the library reads at every call."""

    def __init__(self, folder: Path, *, gpus: int = 2, without: Sequence[str] = ()) -> None:
        self._path = folder / "nvml-state"
        self._lines = [f"gpus {gpus}"]
        self._library = build(without=without)
        self._write()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to see these GPUs."""
        return {"LD_LIBRARY_PATH": str(self._library), STATE_VARIABLE: str(self._path)}

    def say(self, *lines: str) -> None:
        """Adds lines to the state."""
        self._lines += lines
        self._write()

    def unsay(self, line: str) -> None:
        """Takes a line away."""
        self._lines.remove(line)
        self._write()

    def _write(self) -> None:
        fresh = self._path.with_name("nvml-state.new")
        fresh.write_text("".join(f"{line}\n" for line in self._lines))
        fresh.replace(self._path)
