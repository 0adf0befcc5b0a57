"""The ingress with real sockets: two nodes, engines that behave as told, and the twin of the agent."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from enova_agent.core.local import EnginesUpdate, RoutesUpdate
from enova_agent.core.model import ServingClass
from enova_common.records import Outcome
from enova_testing.ingress_node import MODEL, IngressNode, engine, replica, route, serve, settle, started
from enova_testing.scripted_engine import Behaviour, ScriptedEngine
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


async def test_the_official_client_works_unchanged(folder: Path) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)])
        async with openai.AsyncOpenAI(base_url=node.url, api_key="secret", max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == [MODEL]
            whole = await client.chat.completions.create(**CHAT)
            assert whole.choices[0].message.content == "t0 t1 t2 t3 t4 "
            assert whole.usage is not None
            assert whole.usage.completion_tokens == 5
            stream = await client.chat.completions.create(**CHAT, stream=True)
            chunks = [chunk async for chunk in stream]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "t0 t1 t2 t3 t4 "
            text = await client.completions.create(model=MODEL, prompt="hi", stream=True,
                                                   stream_options={"include_usage": True})
            last = [chunk async for chunk in text][-1]
            assert last.usage is not None
            assert last.usage.completion_tokens == 5
            with pytest.raises(openai.NotFoundError) as unknown:
                await client.chat.completions.create(**{**CHAT, "model": "other"})
            assert unknown.value.code == "model_not_found"
            assert MODEL not in unknown.value.message.replace("The model", "").split("`")
        assert "authorization" not in upstream.headers[0]


async def test_tokens_are_counted_and_the_count_is_hidden_unless_asked_for(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with ScriptedEngine(gap_s=0.01) as upstream:
        async with started(node := IngressNode(folder, node="a")):
            await serve([node], [(0, node, upstream.url)])
            async with session.post(f"{node.url}/chat/completions", json={**CHAT, "stream": True}) as answer:
                text = await answer.text()
        assert '"usage"' not in text
        assert text.endswith("data: [DONE]\n\n")
        assert upstream.bodies[0]["stream_options"] == {"include_usage": True}
        (record,) = node.flushed()
    assert record.outcome is Outcome.FINISHED
    assert (record.prompt_tokens, record.output_tokens, record.finish_reason) == (7, 5, "length")
    assert record.replica == replica(0)
    assert record.ttft_s is not None
    assert 0 < record.ttft_s < 5
    assert record.tpot_s is not None
    assert 0.005 < record.tpot_s < 1


async def test_a_replica_of_another_node_is_served_through_its_ingress(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with ScriptedEngine() as upstream, started(
        a := IngressNode(folder, node="a"), b := IngressNode(folder, node="b")
    ):
        await serve([a, b], [(0, b, upstream.url)])
        for stream in (False, True):
            async with session.post(f"{a.url}/completions", json={
                "model": MODEL, "prompt": "x", "stream": stream,
            }, headers={"x-request-id": "abc"}) as answer:
                assert answer.status == 200
                assert "t4" in await answer.text()
        assert [headers["x-request-id"] for headers in upstream.headers] == ["abc", "abc"]
        await until_async(lambda: b.held(0).finished == 2)
        await until_async(lambda: sum(s.finished for s in a.agent.summaries()) == 2)
        assert not b.agent.summaries()


async def test_the_hop_can_be_forced_for_a_replica_of_this_node(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a", always_hop=True)):
        await serve([node], [(0, node, upstream.url)])
        async with session.post(f"{node.url}/chat/completions", json=CHAT) as answer:
            assert answer.status == 200
        async with session.get(node.metrics_url) as answer:
            exposition = await answer.text()
    assert 'enova_ingress_requests_total{deployment="deployments/d",outcome="FINISHED"' in exposition


async def test_killing_a_replica_under_load_fails_no_request_that_was_not_begun(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with ScriptedEngine(tokens=2, gap_s=0.005) as steady, ScriptedEngine(
        tokens=2, gap_s=0.005
    ) as doomed, started(a := IngressNode(folder, node="a"), b := IngressNode(folder, node="b")):
        await serve([a, b], [(0, a, steady.url), (1, b, doomed.url)])
        statuses: list[int] = []

        async def client(count: int) -> None:
            for _ in range(count):
                async with session.post(f"{a.url}/chat/completions", json=CHAT) as answer:
                    await answer.read()
                    statuses.append(answer.status)

        load = asyncio.gather(*(client(40) for _ in range(8)))
        await until_async(lambda: len(doomed.bodies) >= 20)
        await doomed.die()
        await load
        assert statuses.count(200) == 320
        assert len(doomed.bodies) < 320


@pytest.mark.parametrize("behaviour", [
    Behaviour.BUSY_503, Behaviour.BUSY_IN_STREAM, Behaviour.DRAINING_500, Behaviour.RESET,
])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_replica_refuses_is_served_by_another(
    folder: Path, session: aiohttp.ClientSession, behaviour: Behaviour, stream: bool
) -> None:
    async with ScriptedEngine(behaviour=behaviour) as bad, ScriptedEngine() as good, started(
        a := IngressNode(folder, node="a"), b := IngressNode(folder, node="b")
    ):
        await serve([a, b], [(0, a, bad.url), (1, b, good.url)])
        for _ in range(50):  # until chance has sent one there
            async with session.post(f"{a.url}/chat/completions", json={**CHAT, "stream": stream}) as answer:
                text = await answer.text()
                assert answer.status == 200
                assert "error" not in text
            if bad.bodies:
                break
        assert bad.bodies


@pytest.mark.parametrize(("behaviour", "status", "code"), [
    (Behaviour.BUSY_503, 503, 503), (Behaviour.BUSY_IN_STREAM, 503, 503), (Behaviour.RESET, 502, "engine_failed"),
    (Behaviour.BAD_REQUEST, 400, 400), (Behaviour.HANG, 504, "engine_silent"),
])
async def test_what_no_replica_serves_is_a_clear_error(
    folder: Path, session: aiohttp.ClientSession, behaviour: Behaviour, status: int, code: object
) -> None:
    async with ScriptedEngine(behaviour=behaviour) as upstream, started(
        node := IngressNode(folder, node="a", first_byte_timeout_s=0.3)
    ):
        await serve([node], [(0, node, upstream.url)])
        async with session.post(f"{node.url}/chat/completions", json={**CHAT, "stream": True}) as answer:
            assert answer.status == status
            assert (await answer.json())["error"]["code"] == code
            assert (status != 503) or answer.headers["Retry-After"]


async def test_a_model_without_replicas_gets_503_and_an_unknown_one_404(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with started(node := IngressNode(folder, node="a")):
        await serve([node], [])
        async with session.post(f"{node.url}/chat/completions", json=CHAT) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "no_replica")
            assert answer.headers["Retry-After"]
        async with session.post(f"{node.url}/chat/completions", json={**CHAT, "model": "x"}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(("body", "param"), [
    (b"{", None), (b"[]", None), (b"\xff\xfe", None), (b"{}", "model"), (b'{"model":1}', "model"),
    (b'{"model":"m","stream":"yes"}', "stream"), (b'{"model":"m","stream_options":1}', "stream_options"),
    (b"[" * 200_000, None),
])
async def test_a_body_that_is_no_request_is_refused_and_named(
    folder: Path, session: aiohttp.ClientSession, body: bytes, param: str | None
) -> None:
    async with started(node := IngressNode(folder, node="a")):
        async with session.post(f"{node.url}/chat/completions", data=body) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["param"] == param
        async with session.get(f"http://{node.address}/health") as answer:
            assert answer.status == 200


async def test_a_body_over_the_bound_is_refused(folder: Path, session: aiohttp.ClientSession) -> None:
    async with (
        started(node := IngressNode(folder, node="a", body_bytes_max=10_000)),
        session.post(f"{node.url}/chat/completions", data=b"x" * 20_000) as answer,
    ):
        assert (answer.status, (await answer.json())["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("behaviour", [Behaviour.CUT, Behaviour.ENDS_EARLY])
async def test_a_stream_whose_replica_dies_ends_with_an_error_and_is_recorded_as_cut(
    folder: Path, behaviour: Behaviour
) -> None:
    async with ScriptedEngine(behaviour=behaviour) as upstream:
        async with started(a := IngressNode(folder, node="a"), b := IngressNode(folder, node="b")):
            await serve([a, b], [(0, b, upstream.url)])
            async with openai.AsyncOpenAI(base_url=a.url, api_key="k", max_retries=0) as client:
                stream = await client.chat.completions.create(**CHAT, stream=True)
                assert [(await anext(stream)).choices[0].delta.content for _ in range(2)] == ["t0 ", "t1 "]
                with pytest.raises(openai.APIError) as cut:
                    await anext(stream)
            assert cut.value.code == "stream_cut"
            if behaviour is Behaviour.CUT:
                await until_async(lambda: b.held(0).errors == 1)
        assert [record.outcome for record in a.flushed()] == [Outcome.CUT]


async def test_a_stream_that_stalls_is_cut_at_the_idle_limit(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine(behaviour=Behaviour.STALL) as upstream, started(
        node := IngressNode(folder, node="a", idle_timeout_s=0.2)
    ):
        await serve([node], [(0, node, upstream.url)])
        async with session.post(f"{node.url}/chat/completions", json={**CHAT, "stream": True}) as answer:
            events = [line for line in (await answer.text()).split("\n\n") if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "engine_silent"
        await until_async(lambda: upstream.open == 0, timeout_s=1.0)


async def test_a_long_prefill_after_the_head_of_a_stream_is_no_stall(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with ScriptedEngine(behaviour=Behaviour.PREFILL) as upstream, started(
        a := IngressNode(folder, node="a", idle_timeout_s=0.2), b := IngressNode(folder, node="b", idle_timeout_s=0.2)
    ):
        await serve([a, b], [(0, b, upstream.url)])
        upstream.release.clear()
        asking = asyncio.ensure_future(session.post(f"{a.url}/chat/completions", json={**CHAT, "stream": True}))
        await until_async(lambda: b.held(0).silent_s > 0.6)
        upstream.release.set()
        answer = await asking
        assert answer.status == 200
        assert (await answer.text()).rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_client_that_goes_away_ends_the_engines_work_within_a_second(
    folder: Path, session: aiohttp.ClientSession, stream: bool, elsewhere: bool
) -> None:
    async with ScriptedEngine() as upstream:
        upstream.release.clear()
        async with started(a := IngressNode(folder, node="a"), b := IngressNode(folder, node="b")):
            await serve([a, b], [(0, b if elsewhere else a, upstream.url)])
            call = asyncio.create_task(
                session.post(f"{a.url}/chat/completions", json={**CHAT, "stream": stream}).__aenter__()
            )
            await until_async(lambda: upstream.open == 1)
            if stream:
                answer = await call
                answer.close()
            else:
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
            await until_async(lambda: upstream.cancelled == 1, timeout_s=1.0)
            owner = b if elsewhere else a
            await until_async(lambda: owner.held(0).in_flight == 0)
        assert [record.outcome for record in a.flushed()] == [Outcome.CANCELLED]


async def test_a_client_that_hangs_up_on_the_end_marker_was_served(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with ScriptedEngine(behaviour=Behaviour.LINGERS) as upstream:
        async with started(node := IngressNode(folder, node="a")):
            await serve([node], [(0, node, upstream.url)])
            answer = await session.post(f"{node.url}/chat/completions", json={**CHAT, "stream": True})
            while (await answer.content.readline()).strip() != b"data: [DONE]":
                pass
            answer.close()
            await until_async(lambda: upstream.cancelled == 1)
        assert [(record.outcome, record.output_tokens) for record in node.flushed()] == [(Outcome.FINISHED, 5)]


async def test_a_full_queue_answers_429_and_priority_goes_first(folder: Path, session: aiohttp.ClientSession) -> None:
    classes = (ServingClass(name="normal", priority=10), ServingClass(name="urgent", priority=1))
    async with ScriptedEngine(tokens=1) as upstream, started(
        a := IngressNode(folder, node="a"), b := IngressNode(folder, node="b")
    ):
        upstream.release.clear()
        await serve([a, b], [(0, b, upstream.url)], classes=classes, max_concurrency=1, queue_limit=2)
        statuses: dict[str, int] = {}

        async def ask(name: str, serving_class: str) -> None:
            async with session.post(
                f"{a.url}/completions", json={"model": MODEL, "prompt": name}, headers={"x-enova-class": serving_class}
            ) as answer:
                await answer.read()
                statuses[name] = answer.status

        def held() -> tuple[int, int]:
            return (b.held(0).in_flight, b.held(0).queued)

        calls = [asyncio.create_task(ask("first", "normal"))]
        await until_async(lambda: held() == (1, 0))
        calls.append(asyncio.create_task(ask("second", "normal")))
        await until_async(lambda: held() == (1, 1))
        calls.append(asyncio.create_task(ask("urgent", "urgent")))
        await until_async(lambda: held() == (1, 2))
        await ask("over", "normal")
        assert statuses == {"over": 429}
        upstream.release.set()
        await asyncio.gather(*calls)
        assert [body["prompt"] for body in upstream.bodies] == ["first", "urgent", "second"]
        assert [body["priority"] for body in upstream.bodies] == [10, 1, 10]


async def test_waiting_ends_at_the_deadline(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        upstream.release.clear()
        await serve([node], [(0, node, upstream.url)], max_concurrency=1)
        first = asyncio.create_task(session.post(f"{node.url}/chat/completions", json=CHAT).__aenter__())
        await until_async(lambda: upstream.open == 1)
        async with session.post(
            f"{node.url}/chat/completions", json=CHAT, headers={"x-enova-timeout-s": "0.1"}
        ) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (429, "queue_timeout")
        upstream.release.set()
        (await first).close()


async def test_an_agent_that_restarts_cuts_no_stream(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine(tokens=20, gap_s=0.02) as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)])
        async with session.post(f"{node.url}/chat/completions", json={**CHAT, "stream": True}) as answer:
            await answer.content.readany()
            await node.agent.stop()
            node.agent.heard.clear()
            await node.agent.start()
            await settle(node, revision=1)
            assert (await answer.text()).endswith("data: [DONE]\n\n")


async def test_an_ingress_that_starts_without_an_agent_serves_from_disk(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)])
        await node.agent.stop()
        await node.stop()
        await node.start()
        async with session.post(f"{node.url}/chat/completions", json=CHAT) as answer:
            assert answer.status == 200


class BusyThreads(ThreadPoolExecutor):
    """One thread, which waits for the gate first; counts what it was given."""

    def __init__(self) -> None:
        super().__init__(1)
        self.gate = threading.Event()
        super().submit(self.gate.wait)
        self.given = 0

    def submit(self, *args: Any, **words: Any) -> Future[Any]:
        self.given += 1
        return super().submit(*args, **words)


async def test_routes_that_are_being_written_when_it_is_told_to_end_are_on_disk_afterwards(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        loop = asyncio.get_running_loop()
        loop.set_default_executor(threads := BusyThreads())
        await serve([node], [(0, node, upstream.url)])
        await until_async(lambda: threads.given > 0, what="the routes are to be written")
        loop.call_later(0.2, threads.gate.set)
        await node.agent.stop()
        await node.stop()
        await node.start()
        async with session.post(f"{node.url}/chat/completions", json=CHAT) as answer:
            assert answer.status == 200


async def test_a_corrupt_state_is_put_aside_and_the_agent_asked_again(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    node = IngressNode(folder, node="a")
    node.settings.data_dir.mkdir()
    (node.settings.data_dir / "ingress-state.json").write_text('{"version": 1, "routes": [')
    async with ScriptedEngine() as upstream, started(node):
        await serve([node], [(0, node, upstream.url)])
        async with session.post(f"{node.url}/chat/completions", json=CHAT) as answer:
            assert answer.status == 200
    assert (node.settings.data_dir / "ingress-state.broken").exists()


async def test_stopping_finishes_the_streams_that_are_open(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine(tokens=10, gap_s=0.02) as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)])
        async with session.post(f"{node.url}/chat/completions", json={**CHAT, "stream": True}) as answer:
            await answer.content.readany()
            address = node.address
            stopping = asyncio.create_task(node.stop())
            assert (await answer.text()).endswith("data: [DONE]\n\n")
            await stopping
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"http://{address}/health")


async def test_an_engine_that_is_not_admitting_gets_nothing(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine() as ejected, ScriptedEngine() as well, started(node := IngressNode(folder, node="a")):
        table = RoutesUpdate(revision=1, routes=(route([(0, node), (1, node)]),))
        engines = (engine(0, ejected.url, admitting=False), engine(1, well.url))
        node.agent.say(routes=table, engines=EnginesUpdate(engines=engines))
        await settle(node, revision=1)
        for _ in range(5):
            async with session.post(f"{node.url}/chat/completions", json=CHAT) as answer:
                assert answer.status == 200
        assert not ejected.bodies


async def test_canary_requests_are_counted_nowhere(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine() as upstream:
        async with started(node := IngressNode(folder, node="a")):
            await serve([node], [(0, node, upstream.url)])
            for headers in ({"x-enova-canary": "1"}, {}):
                async with session.post(f"{node.url}/chat/completions", json=CHAT, headers=headers) as answer:
                    assert answer.status == 200
            await until_async(lambda: sum(s.finished for s in node.agent.summaries()) == 1)
            assert sum(s.arrived for s in node.agent.summaries()) == 1
        assert len(node.flushed()) == 1
