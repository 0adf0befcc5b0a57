"""Unit tests are pure: no clock, no socket, no process, no file, no unseeded randomness; here they fail at once."""

from __future__ import annotations

import builtins
import io
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import numpy
import pytest

# What may do I/O beneath a unit test: the import system (package data included) and the test tools themselves.
ALLOWED = frozenset({
    "importlib", "_frozen_importlib", "_frozen_importlib_external", "zipimport",
    "hypothesis", "_pytest", "pytest", "pluggy", "logging", "linecache", "tokenize", "inspect", "warnings",
    # Package data, read once: the one exception that the pure library has.
    "enova_recommender.catalog", "enova_recommender.catalog.kernels",
})


class Impure(AssertionError):
    """A unit test, or what it tests, reached for the world."""


def _is_allowed(frame: FrameType | None) -> bool:
    """Whether the first caller that is either ours or one of the allowed is one of the allowed."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module in ALLOWED or module.split(".")[0] in ALLOWED:
            return True
        if module.startswith("enova") or "/tests/" in frame.f_code.co_filename:
            return False
        frame = frame.f_back
    return True


def _forbidden(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def guard(*args: Any, **kwargs: Any) -> Any:
        if _is_allowed(sys._getframe(1)):
            return real(*args, **kwargs)
        raise Impure(f"{name} in a unit test: give the value as an argument, or move the test to tests/integration")

    return guard


def _seeded_only(real: Callable[..., Any]) -> Callable[..., Any]:
    def guard(seed: Any = None, *args: Any, **kwargs: Any) -> Any:
        if seed is None and not _is_allowed(sys._getframe(1)):
            raise Impure("numpy.random.default_rng() without a seed in a unit test")
        return real(seed, *args, **kwargs)

    return guard


class _NoSocket(socket.socket):
    def __init__(self, *args: object, **kwargs: object) -> NoReturn:
        raise Impure("a socket in a unit test: move the test to tests/integration")


@pytest.fixture(autouse=True)
def pure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closes the ways out."""
    for module, names in (
        (time, ("time", "time_ns", "monotonic", "monotonic_ns", "sleep")),
        (random, ("random", "randint", "uniform", "choice", "gauss", "shuffle")),
        (subprocess, ("Popen",)),
        (os, ("fork", "open", "urandom")),
        (builtins, ("open",)),
        (io, ("open",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, _forbidden(f"{module.__name__}.{name}", getattr(module, name)))
    monkeypatch.setattr(numpy.random, "default_rng", _seeded_only(numpy.random.default_rng))
    monkeypatch.setattr(socket, "socket", _NoSocket)
