"""Fleets that several end-to-end tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from enova_testing.fleet import UpFleet, up

# Nine minutes of one scenario, whose parts test_vllm and the simulated demo show: a person's run takes it, CI does not.
collect_ignore = ["test_demo_vllm.py"] if os.environ.get("CI") == "true" else []


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpFleet]:
    """Two simulated nodes with eight GPUs each, model clock twenty times as fast; one for the tests of a module."""
    directory = tmp_path_factory.mktemp("fleet") / "data"
    with up(directory, "--nodes", "2", "--gpu", "H100:8", "--time-scale", "20") as running:
        yield running


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data directory for a fleet of one's own."""
    return tmp_path / "data"
