"""The fixture that keeps unit tests pure does so, from a test and from what it tests."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from enova_common.clock import ModelClock
from enova_common.settings import load_settings


# ruff: noqa: PLW0108
# Lambdas, not the functions themselves: a name bound before the fixture acts would escape it.
@pytest.mark.parametrize(
    "act",
    [
        lambda: time.time(),
        lambda: time.monotonic(),
        ModelClock().now,
        lambda: time.sleep(0),
        lambda: open("/dev/null"),  # noqa: SIM115
        lambda: Path("/dev/null").read_text(),
        lambda: load_settings(ModelClock, Path("/dev/null"), {}, "X"),
        lambda: subprocess.run([sys.executable, "-V"], check=False),
        lambda: socket.socket(),
        lambda: random.random(),
        lambda: numpy.random.default_rng(),
    ],
)
def test_a_way_out_is_closed(act: Callable[[], object]) -> None:
    with pytest.raises(AssertionError, match="unit test"):
        act()


def test_a_seeded_generator_passes() -> None:
    assert numpy.random.default_rng(7).integers(10) == numpy.random.default_rng(7).integers(10)
