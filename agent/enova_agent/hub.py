"""What of the hub's models this host has in the hub's own cache, and whether there is room to fetch one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from enova_agent.core.hub import MAIN, HubModel
from enova_agent.core.node import ModelFacts
from enova_agent.inspect_model import inspect_directory
from enova_common.errors import NotFound

INDEX = "model.safetensors.index.json"
_REFERENCE_BYTES_MAX = 200
NOT_INSPECTED = ModelFacts(config_json="", weight_bytes=0, digest="", vocabulary_size=0)
"""The answer for a model that is not fetched yet: an engine will fetch it, and until then nothing is known."""


def snapshot(model: HubModel, cache: Path) -> Path | None:
    """The folder of the model's files, None if nothing of that revision was fetched."""
    folder = cache / model.folder
    revision = model.revision or MAIN
    try:
        with (folder / "refs" / revision).open("rb") as file:
            commit = file.read(_REFERENCE_BYTES_MAX).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        commit = revision          # a commit has no reference to itself
    found = folder / "snapshots" / commit
    inside = "/" not in commit and commit not in ("", ".", "..")
    return found if inside and found.is_dir() else None


def inspect_hub(model: HubModel, cache: Path | None) -> ModelFacts:
    """The facts of a model of the hub as far as it was fetched; NOT_INSPECTED before that, never a download."""
    found = None if cache is None else snapshot(model, cache)
    if found is None:
        return NOT_INSPECTED
    try:
        return inspect_directory(str(found))
    except (NotFound, FileNotFoundError):
        return NOT_INSPECTED       # it is being fetched: the folder is there, some files are not


def is_fetched(model: HubModel, cache: Path) -> bool:
    """Whether its weights lie here whole, so that a start fetches next to nothing."""
    found = snapshot(model, cache)
    if found is None:
        return False
    try:
        names = set(json.loads((found / INDEX).read_bytes())["weight_map"].values())
    except FileNotFoundError:
        return any(path.exists() for pattern in ("*.safetensors", "*.bin") for path in found.glob(pattern))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return all((found / str(name)).exists() for name in names)


def room_problem(model: HubModel, cache: Path, *, free_bytes_min: int) -> str:
    """Why a model must not be fetched now, in words; empty if it is here or there is room for it."""
    if is_fetched(model, cache):
        return ""
    folder = cache.absolute()
    while not folder.exists():     # the first download makes it
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes >= free_bytes_min:
        return ""
    return (
        f"the disk is too full to fetch {model.name}: {free_bytes >> 20} MiB are free at {folder}, and "
        f"engine.download_free_bytes_min asks for {free_bytes_min >> 20} MiB; make room, or put HF_HOME on another disk"
    )
