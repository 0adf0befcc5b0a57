"""Names of models on the hub, org/name[@revision]: what is one, and where the hub's own cache keeps it; pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

MAIN = "main"
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<name>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9_./-]{{0,199}}))?")
_MISLEADING = re.compile(r"\.\.|--|//|/$|\.git$")  # the hub allows none; folders are made of names


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """One model of the hub; without a revision it is the newest of its main branch."""

    name: str
    revision: str = ""

    @property
    def folder(self) -> str:
        """The name of its folder in the cache."""
        return f"models--{self.name.replace('/', '--')}"


def hub_model(text: str) -> HubModel | None:
    """The model that a text names, None if it is no name of the hub's kind."""
    match = _NAME.fullmatch(text)
    if match is None or _MISLEADING.search(match["name"]) or _MISLEADING.search(match["revision"] or ""):
        return None
    return HubModel(name=match["name"], revision=match["revision"] or "")


def hub_cache(environment: Mapping[str, str]) -> PurePosixPath | None:
    """Where an engine with this environment keeps what it fetches; None if the environment does not say."""
    if environment.get("HF_HUB_CACHE"):
        return PurePosixPath(environment["HF_HUB_CACHE"])
    if environment.get("HF_HOME"):
        return PurePosixPath(environment["HF_HOME"]) / "hub"
    if environment.get("XDG_CACHE_HOME"):
        return PurePosixPath(environment["XDG_CACHE_HOME"]) / "huggingface" / "hub"
    home = environment.get("HOME")
    return PurePosixPath(home) / ".cache" / "huggingface" / "hub" if home else None
