"""Request records on this node's disk: JSON lines in files that rotate, bounded in number and size.

Rows are collected in memory and written on a beat. A disk that is full or gone costs rows, which are counted,
and nothing else.
"""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path

from enova_common.records import RequestRecord, row_of_record

PENDING_MAX = 50_000  # rows between two beats; more than that in a quarter of a second is no traffic but a defect
_log = logging.getLogger(__name__)


class RecordFiles:
    """The files `requests-NNNNNNNN.jsonl` of a folder: at most `files_max`, each of `file_bytes_max` and a row."""

    def __init__(self, folder: Path, *, file_bytes_max: int, files_max: int) -> None:
        self.dropped = 0
        self._folder = folder
        self._file_bytes_max = file_bytes_max
        self._files_max = max(1, files_max)
        self._pending: deque[RequestRecord] = deque()
        self._failing = False

    def add(self, record: RequestRecord) -> None:
        """Keep one record for the next beat."""
        if len(self._pending) < PENDING_MAX:
            self._pending.append(record)
        else:
            self.dropped += 1

    def flush(self) -> None:
        """Write what was kept; called on a beat and at the end."""
        if not self._pending:
            return
        rows = [f"{row_of_record(record)}\n".encode() for record in self._pending]
        self._pending.clear()
        try:
            self._append(rows)
        except OSError as error:
            self.dropped += len(rows)
            if not self._failing:
                _log.warning("request records are dropped: %s", error)
            self._failing = True
        else:
            self._failing = False

    def files(self) -> list[Path]:
        """The files there are, oldest first."""
        return sorted(self._folder.glob("requests-*.jsonl"))

    def _append(self, rows: list[bytes]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        files = self.files() or [self._folder / "requests-00000001.jsonl"]
        size = files[-1].stat().st_size if files[-1].exists() else 0
        start = 0
        for index, row in enumerate(rows):
            if size >= self._file_bytes_max:
                _write(files[-1], rows[start:index])
                number = int(files[-1].stem.rsplit("-", 1)[1]) + 1
                files.append(self._folder / f"requests-{number:08d}.jsonl")
                start, size = index, 0
            size += len(row)
        _write(files[-1], rows[start:])
        for old in files[:-self._files_max]:
            old.unlink(missing_ok=True)


def _write(path: Path, rows: list[bytes]) -> None:
    with path.open("ab") as file:
        file.writelines(rows)
