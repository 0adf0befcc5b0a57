"""What an ingress does at its bounds, and when those around it misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from enova_agent.core.local import VERSION, AgentHello, EnginesUpdate, RoutesUpdate, encode
from enova_agent.ingress.listener import Listener
from enova_agent.ingress.server import guarded
from enova_common.records import records_of_bytes
from enova_testing.ingress_node import MODEL, IngressNode, engine, replica, route, serve, settle, started
from enova_testing.scripted_engine import Behaviour, ScriptedEngine
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "my secret prompt"}]}


@contextlib.asynccontextmanager
async def connection(node: IngressNode) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = node.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_connections_to_an_engine_are_used_again(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)])
        for stream in (False, True, False, True):
            async with session.post(f"{node.url}/chat/completions", json={**CHAT, "stream": stream}) as answer:
                await answer.read()
        assert (len(upstream.bodies), len(upstream.peers)) == (4, 1)


async def test_headers_that_never_end_cost_a_connection_only_for_a_while(folder: Path) -> None:
    async with started(node := IngressNode(folder, node="a", keepalive_s=0.3)), connection(node) as (reader, writer):
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        async with asyncio.timeout(2.0):
            assert await reader.read() == b""


async def test_a_body_that_does_not_arrive_is_given_up(folder: Path) -> None:
    async with started(node := IngressNode(folder, node="a", body_timeout_s=0.2)), connection(node) as (reader, writer):
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        async with asyncio.timeout(2.0):
            assert b" 408 " in await reader.readline()


async def test_a_client_that_asks_before_it_sends_is_told_to_go_on(folder: Path) -> None:
    body = json.dumps(CHAT).encode()
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)])
        async with connection(node) as (reader, writer), asyncio.timeout(2.0):
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body)
            )
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert b" 200 " in await reader.readline()


async def test_a_proxy_that_speaks_http_1_0_gets_its_stream(folder: Path) -> None:
    body = json.dumps({**CHAT, "stream": True}).encode()
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)])
        async with connection(node) as (reader, writer), asyncio.timeout(2.0):
            writer.write(b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            answer = await reader.read()
        assert b" 200 " in answer
        assert b"chunked" not in answer.lower()
        assert answer.endswith(b"data: [DONE]\n\n")


async def test_bodies_of_unannounced_length_count_as_the_longest(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield json.dumps(CHAT).encode()

    async with ScriptedEngine() as upstream, started(
        node := IngressNode(folder, node="a", body_bytes_max=10_000, bodies_bytes_max=15_000)
    ):
        upstream.release.clear()
        await serve([node], [(0, node, upstream.url)])
        first = asyncio.create_task(session.post(f"{node.url}/chat/completions", data=pieces()).__aenter__())
        await until_async(lambda: upstream.open == 1)
        async with session.post(f"{node.url}/chat/completions", data=pieces()) as answer:
            assert answer.status == 503
        upstream.release.set()
        assert (await first).status == 200
        (await first).close()


async def test_connections_over_the_bound_are_closed_and_the_others_served(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with started(node := IngressNode(folder, node="a", connections_max=2)):
        async with session.get(f"http://{node.address}/health") as answer:
            assert answer.status == 200
        async with connection(node), connection(node) as (over, _), asyncio.timeout(2.0):
            with contextlib.suppress(ConnectionError):
                assert await over.read() == b""
            async with session.get(f"http://{node.address}/health") as answer:
                assert answer.status == 200


async def test_requests_over_the_bound_are_answered_503(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a", requests_max=1)):
        upstream.release.clear()
        await serve([node], [(0, node, upstream.url)])
        first = asyncio.create_task(session.post(f"{node.url}/chat/completions", json=CHAT).__aenter__())
        await until_async(lambda: upstream.open == 1)
        async with session.post(f"{node.url}/chat/completions", json=CHAT) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "ingress_full")
            assert answer.headers["Retry-After"]
        upstream.release.set()
        assert (await first).status == 200
        (await first).close()


async def test_a_replica_that_does_not_even_refuse_is_left_within_a_second(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    with contextlib.ExitStack() as stack:
        hole = stack.enter_context(socket.socket())
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for _ in range(4):  # fill the backlog: from now on connecting is answered by silence
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0)
            filler.connect_ex(hole.getsockname())
        async with ScriptedEngine() as well, started(node := IngressNode(folder, node="a", connect_timeout_s=0.3)):
            await serve([node], [(0, node, f"http://127.0.0.1:{hole.getsockname()[1]}"), (1, node, well.url)])
            slowest_s = 0.0
            for _ in range(20):
                start_s = time.monotonic()
                async with session.post(f"{node.url}/chat/completions", json=CHAT) as answer:
                    assert answer.status == 200
                slowest_s = max(slowest_s, time.monotonic() - start_s)
            assert 0.25 < slowest_s < 1.0  # it was tried, and left


async def test_a_node_that_is_gone_is_left_with_all_its_replicas(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine() as upstream, started(
        a := IngressNode(folder, node="a"), b := IngressNode(folder, node="b")
    ):
        there = [(number, b, upstream.url) for number in range(20)]
        await serve([a, b], [*there, (20, a, upstream.url)])
        await b.stop()
        for _ in range(5):
            async with session.post(f"{a.url}/chat/completions", json=CHAT) as answer:
                assert answer.status == 200


async def test_the_agent_hears_at_once_when_something_is_held_and_when_nothing_is(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with ScriptedEngine() as upstream, started(
        node := IngressNode(folder, node="a", held_interval_s=10.0, frame_interval_s=10.0)
    ):
        upstream.release.clear()
        await serve([node], [(0, node, upstream.url)])
        call = asyncio.create_task(session.post(f"{node.url}/chat/completions", json=CHAT).__aenter__())
        await until_async(lambda: node.held(0).in_flight == 1, timeout_s=2.0)
        upstream.release.set()
        (await call).close()
        await until_async(lambda: (node.held(0).in_flight, node.held(0).finished) == (0, 1), timeout_s=2.0)


async def test_silence_of_an_engine_that_holds_requests_is_reported(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with ScriptedEngine(behaviour=Behaviour.STALL) as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)])
        async with session.post(f"{node.url}/chat/completions", json={**CHAT, "stream": True}):
            await until_async(lambda: node.held(0).silent_s > 0.3)
        await until_async(lambda: node.held(0).silent_s == 0.0)


@pytest.mark.parametrize("line", [b"not json\n", b'{"type":"routes","revision":"x"}\n', b"\xff\n",
                                  encode(AgentHello(node="a", version=VERSION + 1))])
async def test_an_agent_that_says_nonsense_is_connected_to_again(
    folder: Path, session: aiohttp.ClientSession, line: bytes
) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)])
        node.agent.heard.clear()
        node.agent.say_raw(line)
        await settle(node, revision=1)  # said again on a new connection
        async with session.post(f"{node.url}/chat/completions", json=CHAT) as answer:
            assert answer.status == 200


async def test_an_engine_without_a_usable_address_takes_nothing_from_the_others(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        node.agent.say(
            routes=RoutesUpdate(revision=1, routes=(route([(0, node), (1, node)]),)),
            engines=EnginesUpdate(engines=(engine(0, ""), engine(1, upstream.url))),
        )
        await settle(node, revision=1)
        for _ in range(4):
            async with session.post(f"{node.url}/chat/completions", json=CHAT) as answer:
                assert answer.status == 200


async def test_an_engine_that_is_removed_keeps_its_streams_and_gets_no_more(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with ScriptedEngine(tokens=10, gap_s=0.02) as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)])
        async with session.post(f"{node.url}/chat/completions", json={**CHAT, "stream": True}) as answer:
            await answer.content.readany()
            node.agent.say(routes=RoutesUpdate(revision=2, routes=(route([(0, node)]),)), engines=EnginesUpdate())
            await settle(node, revision=2)
            async with session.post(f"{node.url}/chat/completions", json=CHAT) as refused:
                assert refused.status == 503
            assert (await answer.text()).endswith("data: [DONE]\n\n")
        await until_async(lambda: node.agent.held() is not None and not node.agent.held().replicas)  # type: ignore[union-attr]


async def test_records_hold_no_text_and_no_key_and_are_bounded(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine() as upstream, started(
        node := IngressNode(folder, node="a", record_file_bytes_max=4096, record_files_max=2)
    ):
        await serve([node], [(0, node, upstream.url)])
        headers = {"authorization": "Bearer my-api-key"}
        for _ in range(80):
            async with session.post(f"{node.url}/chat/completions", json=CHAT, headers=headers) as answer:
                await answer.read()
        await node.stop()
        files = sorted((node.settings.data_dir / "records").iterdir())
        assert len(files) == 2
        assert files[0].name != "requests-00000001.jsonl"
        content = b"".join(file.read_bytes() for file in files)
        assert b"secret" not in content
        assert b"my-api-key" not in content
        assert len({record.tenant_hash for record in records_of_bytes(content)}) == 1
        assert sum(file.stat().st_size for file in files) < 2 * (4096 + 600)


async def test_a_disk_that_takes_no_records_costs_records_only(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        (node.settings.data_dir / "records").write_text("a file where a folder should be")
        await serve([node], [(0, node, upstream.url)])
        async with session.post(f"{node.url}/chat/completions", json=CHAT) as answer:
            assert answer.status == 200

        async def dropped() -> bool:
            async with session.get(node.metrics_url) as answer:
                return "enova_ingress_dropped_records 1.0" in await answer.text()

        await until_async(dropped)


async def test_nobody_learns_what_is_inside(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)])
        for method, path in (("GET", "/"), ("GET", "/metrics"), ("POST", "/tokenize"), ("GET", "/v1/chat/completions"),
                             ("POST", "/enova/hop/v1/chat/completions"), ("DELETE", "/v1/models")):
            async with session.request(method, f"http://{node.address}{path}") as answer:
                assert answer.status in {404, 405}
                text = await answer.text() + str(answer.headers)
                for word in ("aiohttp", replica(0), upstream.url, "127.0.0.1"):
                    assert word not in text
        assert not upstream.bodies


async def test_a_defect_of_the_ingress_is_answered_in_the_shape_that_clients_parse(
    session: aiohttp.ClientSession,
) -> None:
    async def broken(request: web.BaseRequest) -> web.StreamResponse:
        raise ZeroDivisionError(request.path)

    listener = Listener(guarded(broken), connections_max=4, body_bytes_max=100, keepalive_s=1.0)
    await listener.start("127.0.0.1", 0)
    try:
        async with session.post(f"http://{listener.address}/v1/chat/completions", json=CHAT) as answer:
            assert answer.status == 500
            assert answer.content_type == "application/json"
            assert (await answer.json())["error"]["code"] == "internal_error"
    finally:
        await listener.close()


async def test_metrics_forget_a_deployment_without_a_route(folder: Path, session: aiohttp.ClientSession) -> None:
    async def labels() -> int:
        async with session.get(node.metrics_url) as answer:
            return (await answer.text()).count('deployment="deployments/')

    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a", frame_interval_s=0.2)):
        await serve([node], [(0, node, upstream.url)])
        async with session.post(f"{node.url}/chat/completions", json=CHAT) as answer:
            await answer.read()
        assert await labels() > 0
        node.agent.say(routes=RoutesUpdate(revision=99, routes=()))
        deadline_s = asyncio.get_running_loop().time() + 5.0
        while await labels():
            assert asyncio.get_running_loop().time() < deadline_s
            await asyncio.sleep(0.05)
