"""Keeps what can be known of a hung engine before it is killed: the only chance to learn why."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path

from enova_agent import procfs

_FILES_MAX = 20
_DUMP_TIMEOUT_S = 3.0
_DUMP_BYTES_MAX = 256 << 10
_DUMPED_PROCESSES_MAX = 8


async def keep(
    folder: Path, name: str, *, reason: str, pids: Sequence[int], metrics: bytes, lines: Sequence[str], program: str
) -> Path:
    """Writes one file and returns its path; the oldest of too many are removed. Raises OSError.

    `program` is what started the engine: py-spy is looked for beside it, too.
    """
    parts = [f"reason: {reason}", ""]
    for pid in pids:
        parts += _process(pid)
    for pid in pids[:_DUMPED_PROCESSES_MAX]:
        parts += await _python_stack(pid, program)
    parts += ["== last lines of its log", *lines, "", "== last page of /metrics", metrics.decode(errors="replace")]
    path = folder / f"{name}.txt"
    await asyncio.to_thread(_write, path, "\n".join(parts))
    return path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    files = sorted(path.parent.glob("*.txt"), key=lambda file: file.stat().st_mtime)
    for old in files[:-_FILES_MAX]:
        old.unlink(missing_ok=True)


def _process(pid: int) -> list[str]:
    """What the kernel tells of one process; a stack only to root."""
    entry = procfs.stat(pid)
    if entry is None:
        return [f"== process {pid}: gone", ""]
    parts = [f"== process {pid}: state {entry.state}, {entry.cpu_s:.1f} s of CPU, {entry.resident_bytes} bytes"]
    for name in ("cmdline", "wchan", "stack"):
        try:
            text = (procfs.PROC / str(pid) / name).read_text(errors="replace")
        except OSError as error:
            text = f"not readable: {error.strerror}"
        parts.append(f"-- {name}: {text.replace(chr(0), ' ').strip()}")
    return [*parts, ""]


async def _python_stack(pid: int, engine: str) -> list[str]:
    """Where its Python code stands, if py-spy is installed on this host; without stopping the process."""
    program = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(engine).parent))
    if program is None:
        return []
    process = await asyncio.create_subprocess_exec(
        program, "dump", "--nonblocking", "--pid", str(pid),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(_DUMP_TIMEOUT_S):
            text, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return [f"== Python stack of {pid}: py-spy took too long", ""]
    return [f"== Python stack of {pid}", text[:_DUMP_BYTES_MAX].decode(errors="replace"), ""]
