"""A request for a deployment at zero: it waits as long as it says, and that time is told as time in a queue."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from enova_agent.core.local import EnginesUpdate, RoutesUpdate
from enova_common.records import Outcome
from enova_testing.ingress_node import MODEL, IngressNode, engine, route, serve, settle, started
from enova_testing.scripted_engine import ScriptedEngine
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


async def asleep(node: IngressNode) -> None:
    """The model's deployment has no replica, and wakes when it is asked for."""
    table = RoutesUpdate(revision=1, routes=(replace(route([]), wakes=True),))
    node.agent.say(routes=table, engines=EnginesUpdate(engines=()))
    await settle(node, revision=1)


async def post(session: aiohttp.ClientSession, node: IngressNode, **headers: str) -> tuple[int, dict[str, Any]]:
    async with session.post(f"{node.url}/chat/completions", json=CHAT, headers=headers) as answer:
        return answer.status, await answer.json()


def waiting(node: IngressNode) -> int:
    """Requests that the ingress last said it holds for no replica."""
    return next((each.held for each in reversed(node.agent.summaries()) if not each.replica), 0)


async def test_the_wait_for_the_first_replica_is_time_in_the_queue(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        await asleep(node)
        asked_s = time.monotonic()
        call = asyncio.create_task(post(session, node))
        await until_async(lambda: waiting(node) == 1, what="the request is told as waiting")
        held_s = time.monotonic() - asked_s
        await serve([node], [(0, node, upstream.url)], revision=2)
        status, _ = await call
        assert status == 200
        await node.stop()
        (record,) = node.flushed()
        assert record.outcome is Outcome.FINISHED
        assert record.queue_s is not None
        assert record.duration_s is not None
        assert held_s - 0.1 <= record.queue_s <= record.duration_s


async def test_a_requests_own_time_covers_both_waits(folder: Path, session: aiohttp.ClientSession) -> None:
    header = {"x-enova-timeout-s": "1.5"}
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        await asleep(node)
        status, body = await post(session, node, **{"x-enova-timeout-s": "0.05"})
        assert (status, body["error"]["code"]) == (429, "queue_timeout")
        status, body = await post(session, node, **{"x-enova-timeout-s": "soon"})
        assert status == 400
        # What is left after the wait for a replica is all that its queue is given.
        upstream.release.clear()
        first = asyncio.create_task(post(session, node))
        await until_async(lambda: waiting(node) == 1, what="the first request waits")
        second = asyncio.create_task(post(session, node, **header))
        table = RoutesUpdate(revision=2, routes=(replace(route([(0, node)]), wakes=True),))
        await until_async(lambda: waiting(node) == 2, what="the second request waits")
        node.agent.say(routes=table, engines=EnginesUpdate(engines=(engine(0, upstream.url, max_concurrency=1),)))
        status, body = await second
        assert (status, body["error"]["code"]) == (429, "queue_timeout")
        upstream.release.set()
        assert (await first)[0] == 200
