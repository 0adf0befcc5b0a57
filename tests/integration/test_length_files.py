"""What a coordinator keeps of answers while it does not lead: nothing of deployments that are gone or switched off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from enova_coordinator.core.model import (
    Deployment,
    DeploymentSpec,
    MaxTokensMode,
    MaxTokensPolicy,
    Snapshot,
)
from enova_coordinator.length_loop import sweep_while_following
from enova_testing.waiting import until_async


def deployment(name: str, mode: MaxTokensMode) -> Deployment:
    spec = DeploymentSpec(model="m", max_tokens_policy=MaxTokensPolicy(mode=mode))
    return Deployment(name=f"deployments/{name}", uid=name, spec=spec)


SNAPSHOT = Snapshot(
    revision=7,
    deployments={
        each.name: each
        for each in (deployment("wanted", MaxTokensMode.OBSERVE), deployment("off", MaxTokensMode.OFF))
    },
    unreadable=frozenset({"deployments/odd"}),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("wanted.json", "off.json", "gone.json", "gone.draft", "odd.json", "notes.txt"):
        (tmp_path / name).write_text("{}")
    return tmp_path


@asynccontextmanager
async def sweeping(
    folder: Path, *, snapshot: Callable[[], Snapshot] = lambda: SNAPSHOT, leads: Callable[[], bool] = lambda: False
) -> AsyncIterator[None]:
    task = asyncio.create_task(sweep_while_following(folder, snapshot=snapshot, leads=leads, every_s=0.01))
    try:
        yield
    finally:
        task.cancel()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_a_follower_removes_what_nobody_wants(folder: Path) -> None:
    async with sweeping(folder):
        await until_async(lambda: names(folder) == {"wanted.json", "odd.json", "notes.txt"}, what="the sweep")


async def test_a_leader_and_one_that_has_read_nothing_yet_leave_all(folder: Path) -> None:
    before, looks = names(folder), 0

    def unread() -> Snapshot:
        nonlocal looks
        looks += 1
        return Snapshot()

    async with sweeping(folder, snapshot=unread), sweeping(folder, leads=lambda: True):
        await until_async(lambda: looks > 3, what="some looks")
    assert names(folder) == before
