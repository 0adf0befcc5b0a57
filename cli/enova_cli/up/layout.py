"""The data directory of `enova up`: who owns it, where each program keeps its files, and what is written for them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from enova_common.errors import Conflict, InvalidField

TOKEN_VARIABLE = "ENOVA_UP_TOKEN"  # noqa: S105 - a name; in the environment of every program of one data directory

PRIVATE = 0o700


@dataclass(slots=True)
class DataDirectory:
    """One directory, owned by one `up` at a time through a lock that dies with the process."""

    path: Path
    token: str = ""
    _lock: int = field(default=-1)

    def acquire(self) -> None:
        """Create and lock it; read or draw its token. Raises Conflict naming the owner, InvalidField if unusable."""
        try:
            self.path.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
            for name in ("coordinator", "etcd", "logs", "nodes"):
                # Settings may hold tokens of engines. A directory that was there before stays as its owner made it.
                (self.path / name).mkdir(mode=PRIVATE, exist_ok=True)
                (self.path / name).chmod(PRIVATE)
            self._lock = os.open(self.path / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            remedy = "give a directory that can be written with --data-dir"
            raise InvalidField(f"{error.strerror}: {self.path}", field="--data-dir", remedy=remedy) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
            remedy = "stop that one first, or give another --data-dir"
            message = f"{self.path} is in use by enova up, pid {owner}"
            raise Conflict(message, reason="IN_USE", field="--data-dir", remedy=remedy) from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)
        self.token = self._read_token()

    def release(self) -> None:
        """Give up the lock."""
        os.close(self._lock)

    def node_path(self, node: str) -> Path:
        """Where one node keeps its files."""
        path = self.path / "nodes" / node
        path.mkdir(parents=True, exist_ok=True)
        return path

    def write_toml(self, path: Path, value: dict[str, Any]) -> Path:
        """Write a settings file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tomli_w.dumps(value).encode())
        return path

    def write_json(self, name: str, value: object) -> None:
        """Write a file of the directory so that readers see the old or the new one, never half."""
        temporary = self.path / f".{name}.{os.getpid()}"
        temporary.write_text(json.dumps(value))
        temporary.replace(self.path / name)

    def remove(self, name: str) -> None:
        """Remove a file of the directory, if there is one."""
        (self.path / name).unlink(missing_ok=True)

    def read_json(self, name: str) -> dict[str, Any]:
        """A file of the directory; empty if there is none that can be read."""
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            value = json.loads((self.path / name).read_text())
            if isinstance(value, dict):
                return value
        return {}

    def _read_token(self) -> str:
        path = self.path / "token"
        if path.exists() and (token := path.read_text().strip()):
            return token
        token = secrets.token_hex(16)
        path.touch(mode=0o600)
        path.write_text(token)
        return token


def socket_path(data: DataDirectory, node: str) -> Path:
    """The agent's local socket: in the node's folder, or, where that path is too long for a socket, in /tmp."""
    path = data.node_path(node) / "agent.sock"
    if len(os.fsencode(path)) < 100:  # the kernel takes 107 bytes
        return path
    folder = Path(f"/tmp/enova-{data.token[:12]}")  # noqa: S108 - mode 0700, named by a random token
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{node}.sock"
