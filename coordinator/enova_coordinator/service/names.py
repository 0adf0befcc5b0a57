"""Resource names as callers write them, checked before they reach the store."""

from __future__ import annotations

import re

from enova_common.errors import InvalidField

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}"
_PATTERNS = {
    "deployments/{deployment}": re.compile(rf"deployments/{_PART}"),
    "deployments/{deployment}/replicas/{replica}": re.compile(rf"deployments/{_PART}/replicas/{_PART}"),
    "nodes/{node}": re.compile(rf"nodes/{_PART}"),
    "episodes/{episode}": re.compile(rf"episodes/{_PART}"),
    "decisions/{decision}": re.compile(rf"decisions/{_PART}"),
}


def _checked(name: str, form: str, field: str) -> str:
    if not _PATTERNS[form].fullmatch(name):
        raise InvalidField(f"{name[:120]!r} is not a name of this kind", field=field, remedy=f"write {form}")
    return name


def deployment_name(name: str, field: str = "name") -> str:
    """The name, if it can be a deployment's. Raises InvalidField."""
    return _checked(name, "deployments/{deployment}", field)


def replica_name(name: str, field: str = "name") -> str:
    """The name, if it can be a replica's. Raises InvalidField."""
    return _checked(name, "deployments/{deployment}/replicas/{replica}", field)


def node_name(name: str, field: str = "name") -> str:
    """The name, if it can be a node's. Raises InvalidField."""
    return _checked(name, "nodes/{node}", field)


def decision_name(name: str, field: str = "name") -> str:
    """The name, if it can be a decision's. Raises InvalidField."""
    return _checked(name, "decisions/{decision}", field)


def episode_name(name: str, field: str = "name") -> str:
    """The name, if it can be an episode's. Raises InvalidField."""
    return _checked(name, "episodes/{episode}", field)


def parent_deployment(parent: str) -> str:
    """A parent that may be one deployment, or all: "" and deployments/- become "". Raises InvalidField."""
    return "" if parent in {"", "deployments/-"} else deployment_name(parent, "parent")
