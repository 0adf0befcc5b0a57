"""The last routes and engines on disk, so that an ingress that restarts while its agent is away goes on serving."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enova_agent.core.local import build
from enova_agent.core.model import LocalEngine, Route

VERSION = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that the agent has told this ingress."""

    node: str = ""
    revision: int = 0
    routes: tuple[Route, ...] = ()
    engines: tuple[LocalEngine, ...] = ()


def load_state(path: Path) -> State:
    """The state on disk; an empty one if there is none. A file that cannot be read is put aside and reported."""
    try:
        value = json.loads(path.read_bytes())
        if value.get("version") != VERSION:
            raise ValueError(f"version {value.get('version')!r} is not {VERSION}")  # noqa: TRY301  one way out
        return build(State, value)
    except FileNotFoundError:
        return State()
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        _log.warning("starting without routes until the agent sends them: %s cannot be used: %s", path, error)
        _put_aside(path)
        return State()


def save_state(path: Path, state: State) -> None:
    """Write the state so that a reader sees the old or the new one, whole. A full disk is reported, not raised."""
    value: dict[str, Any] = {"kind": "ingress-state", "version": VERSION, **dataclasses.asdict(state)}
    draft = path.with_suffix(".draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(json.dumps(value, default=dict).encode())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        _log.warning("routes are not kept on disk: %s", error)


def _put_aside(path: Path) -> None:
    try:
        path.replace(path.with_suffix(".broken"))
    except OSError as error:
        _log.warning("%s could not be put aside: %s", path, error)
