"""What runs here, on disk, so that an agent that restarts takes its engines over instead of ending them.

One JSON file, replaced atomically and synced, with a digest over its records. A file that is damaged or of an
unknown version is put aside, never obeyed and never fatal: each engine also carries its record in its own
environment, from which the journal is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from enova_agent.core.model import Claim, Desired, MemberSpec, Role
from enova_common.errors import Corrupt

KIND = "enova.agent.journal"
VERSION = 1
_QUARANTINED_MAX = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One engine: what it is for, and how to know it again. A pid of 0: it was about to be started.

    With `gave_up`, the reason, there is no engine: it failed too often in this boot, and is not to be tried again.
    """

    spec: MemberSpec
    token: str
    port: int
    log_path: str
    pid: int = 0
    start_ticks: int = 0
    boot_id: str = ""
    ready: bool = False
    stopping: bool = False
    start_time_s: float = 0.0
    ready_time_s: float = 0.0
    restarts: int = 0
    shared_memory: tuple[str, ...] = ()
    gave_up: str = ""


class Journal:
    """The file of records."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> tuple[Record, ...] | None:
        """The records; None where there is no file. Raises Corrupt after putting an unusable file aside."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return _decode(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            aside = self._quarantine()
            raise Corrupt(
                f"the journal of engines cannot be used: {error}; it was put aside as {aside.name}",
                remedy="nothing: engines are found again by their processes",
            ) from error

    def save(self, records: Iterable[Record]) -> None:
        """Replace the file. Raises OSError; the old file is then still whole."""
        items = [encode_record(record) for record in records]
        value = {"kind": KIND, "version": VERSION, "sha256": _digest(items), "records": items}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".new")
        with temporary.open("w") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _quarantine(self) -> Path:
        """Move the file aside; of those put aside the newest few are kept."""
        number = 1 + max((_number(path) for path in self._aside()), default=0)
        aside = self.path.with_name(f"{self.path.name}.corrupt-{number}")
        self.path.replace(aside)
        for old in sorted(self._aside(), key=_number)[:-_QUARANTINED_MAX]:
            old.unlink(missing_ok=True)
        return aside

    def _aside(self) -> list[Path]:
        return [path for path in self.path.parent.glob(f"{self.path.name}.corrupt-*") if _number(path)]


def _decode(value: Mapping[str, Any]) -> tuple[Record, ...]:
    if value["kind"] != KIND or value["version"] != VERSION:
        raise ValueError(f"is {value['kind']!r} of version {value['version']!r}")
    if value["sha256"] != _digest(value["records"]):
        raise ValueError("does not match its digest")
    return tuple(decode_record(item) for item in value["records"])


def encode_record(record: Record) -> dict[str, Any]:
    """A record as plain JSON values."""
    # A read-only mapping cannot be copied, and asdict copies.
    plain = replace(record.spec, configuration=dict(record.spec.configuration))
    return asdict(replace(record, spec=plain))


def decode_record(value: Mapping[str, Any]) -> Record:
    """The record of plain values, unknown ones ignored. Raises ValueError, KeyError or TypeError."""
    known: dict[str, type | tuple[type, ...]] = {
        "token": str, "port": int, "log_path": str, "pid": int, "start_ticks": int, "boot_id": str, "ready": bool,
        "stopping": bool, "start_time_s": (int, float), "ready_time_s": (int, float), "restarts": int,
        "gave_up": str,
    }
    fields = {name: _checked(name, value[name], kind) for name, kind in known.items() if name in value}
    names = tuple(_checked("shared_memory", name, str) for name in value.get("shared_memory", ()))
    return Record(spec=_spec(value["spec"]), shared_memory=names, **fields)


def _spec(value: Mapping[str, Any]) -> MemberSpec:
    plain: dict[str, type | tuple[type, ...]] = {
        "replica": str, "uid": str, "model": str, "engine": str, "rank": int, "member_count": int,
        "drain_timeout_s": (int, float), "restart_nonce": int, "queue_limit": int,
    }
    fields = {name: _checked(name, value[name], kind) for name, kind in plain.items() if name in value}
    configuration = {
        _checked("configuration", name, str): _checked(name, item, (bool, int, float, str))
        for name, item in dict(value.get("configuration", {})).items()
    }
    claims = tuple(
        Claim(
            gpu_uuid=_checked("gpu_uuid", claim["gpu_uuid"], str),
            memory_bytes=_checked("memory_bytes", claim.get("memory_bytes", 0), int),
            shared=_checked("shared", claim.get("shared", False), bool),
        )
        for claim in value.get("claims", ())
    )
    return MemberSpec(
        desired=Desired(value.get("desired", Desired.RUN)),
        role=Role(value.get("role", Role.AGGREGATED)),
        served_names=tuple(_checked("served_names", name, str) for name in value.get("served_names", ())),
        configuration=configuration,
        claims=claims,
        **fields,
    )


def _checked(name: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} is {value!r}")
    return value


def _digest(items: Any) -> str:
    return hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()


def _number(path: Path) -> int:
    suffix = path.name.rsplit("-", 1)[-1]
    return int(suffix) if suffix.isdecimal() else 0
