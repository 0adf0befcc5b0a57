"""Limits on answers at a real ingress: set where a client gives none, told in a header, learned without any text."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from enova.v1 import agent_service_pb2
from enova_agent import convert
from enova_agent.core.local import LengthSample, LengthsUpdate
from enova_agent.core.model import LengthRule, LengthRules
from enova_agent.frames import LENGTHS_MAX, FrameMaker
from enova_common.prompt_vectors import METHOD, Projection, vectorise, vectorise_embedding
from enova_testing.ingress_node import DEPLOYMENT, MODEL, IngressNode, serve, started
from enova_testing.scripted_engine import ScriptedEngine
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network

PROJECTION = Projection(seed=77)
SUM = "Zebediah tallies 3 marbles and finds 4 others beneath Winifred's wardrobe: how many marbles altogether"
CODE = "Write a python function which reverses the quokka list without recursion please"
SECRET_WORDS = sorted({word.lower() for word in re.findall("[A-Za-z]{5,}", SUM + CODE)})


def _rules(**fields: Any) -> LengthRules:
    def rule(prompt: str, limit: int) -> LengthRule:
        centroid = base64.b64encode(vectorise(f"user\n{prompt}", PROJECTION)).decode()
        return LengthRule(centroid=centroid, reach=0.6, limit_tokens=limit)

    return LengthRules(**{
        "method": METHOD, "seed": 77, "dimension": 128, "apply": True, "context_tokens": 8192,
        "samples_per_s": 50.0, "kinds": (rule(SUM, 111), rule(CODE, 222)), **fields,
    })  # fmt: skip


@pytest.fixture(autouse=True)
def _never_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enova_agent.ingress.lengths.OPEN_SHARE", 0.0)  # chance has no place in these tests


async def _ask(
    session: aiohttp.ClientSession, node: IngressNode, prompt: str, *, headers: dict[str, str] | None = None,
    path: str = "chat/completions", **fields: Any,
) -> str | None:
    """The limit that the answer's header tells."""
    said = {"prompt": prompt} if path == "completions" else {"messages": [{"role": "user", "content": prompt}]}
    body = {"model": MODEL, **said, **fields}
    async with session.post(f"{node.url}/{path}", json=body, headers=headers) as answer:
        assert answer.status == 200
        await answer.read()
        return answer.headers.get("x-enova-max-tokens")


def _samples(node: IngressNode) -> list[LengthSample]:
    return [sample for message in node.agent.heard if isinstance(message, LengthsUpdate) for sample in message.samples]


async def test_two_kinds_of_prompts_get_two_limits(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)], lengths=_rules())
        told = [await _ask(session, node, prompt, stream=stream) for prompt in (SUM, CODE) for stream in (False, True)]
    assert told == ["111", "111", "222", "222"]
    assert [body["max_tokens"] for body in upstream.bodies] == [111, 111, 222, 222]
    assert all(body["messages"][0]["content"] in {SUM, CODE} for body in upstream.bodies)


async def test_what_a_client_said_of_its_limit_is_the_last_word(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)], lengths=_rules())
        assert await _ask(session, node, SUM, max_tokens=7000) is None
        assert await _ask(session, node, SUM, max_completion_tokens=3) is None
        assert await _ask(session, node, SUM, headers={"x-enova-canary": "1"}) is None
        assert await _ask(session, node, SUM, path="completions") is None
    assert [body.get("max_tokens") for body in upstream.bodies] == [7000, None, None, None]
    assert upstream.bodies[1]["max_completion_tokens"] == 3


async def test_a_deployment_that_only_observes_changes_no_request(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)], lengths=_rules(apply=False, kinds=()))
        assert await _ask(session, node, SUM) is None
        await until_async(lambda: len(_samples(node)) == 1)
        assert "max_tokens" not in upstream.bodies[0]
        await serve([node], [(0, node, upstream.url)], lengths=None, revision=2)
        assert await _ask(session, node, SUM) is None
        await until_async(lambda: sum(s.finished for s in node.agent.summaries()) == 2)
        assert len(_samples(node)) == 1


async def test_of_a_prompt_only_its_vector_leaves_the_ingress(folder: Path, session: aiohttp.ClientSession) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)], lengths=_rules())
        for prompt in (SUM, CODE):
            await _ask(session, node, prompt)
        await until_async(lambda: len(_samples(node)) == 2)
        await until_async(lambda: len(node.flushed()) == 2)
    samples = _samples(node)
    expected = [base64.b64encode(vectorise(f"user\n{prompt}", PROJECTION)).decode() for prompt in (SUM, CODE)]
    assert [sample.vector for sample in samples] == expected
    assert [(sample.tokens, sample.stopped) for sample in samples] == [(5, True)] * 2  # the engine says "length"
    frame = _frame(samples)
    sent = b"".join(node.agent.lines) + frame
    kept = b"".join(path.read_bytes() for path in node.folder.rglob("*") if path.is_file())
    assert len(kept) > 500
    for word in SECRET_WORDS:
        assert word.encode() not in sent.lower()
        assert word.encode() not in kept.lower()
    (first, second) = agent_service_pb2.ConnectRequest.FromString(frame).frame.lengths
    # 128 rounded numbers: far fewer bytes than the text has, and none of them its letters.
    assert first.vector == vectorise(f"user\n{SUM}", PROJECTION)
    assert (first.deployment, first.method, first.tokens, first.stopped) == (DEPLOYMENT, METHOD, 5, True)
    assert len(second.vector) == 128
    assert {field.name for field in first.DESCRIPTOR.fields} == {"deployment", "method", "vector", "tokens", "stopped"}


class _NoGpus:
    def describe(self) -> tuple[()]:
        return ()

    def sample(self) -> tuple[()]:
        return ()


class _NoEngines:
    def views(self) -> tuple[()]:
        return ()

    def scrapes(self) -> dict[str, Any]:
        return {}


def _maker() -> FrameMaker:
    return FrameMaker(node="nodes/a", boot="b", gpus=_NoGpus(), engines=_NoEngines(), model_time_s=lambda: 1.0,
                      monotonic_s=lambda: 1.0)  # fmt: skip


def _frame(samples: list[LengthSample]) -> bytes:
    maker = _maker()
    maker.add_lengths(samples)
    return convert.frame_request(maker.make(None))


def test_a_frame_bears_a_bounded_number_of_lengths_once() -> None:
    maker = _maker()
    sample = LengthSample(deployment=DEPLOYMENT, method=1, vector="AAEC", tokens=1, stopped=False)
    maker.add_lengths([sample] * (LENGTHS_MAX + 3))
    first, second = maker.make(None), maker.make(None)
    assert (len(first.lengths), first.dropped_samples) == (LENGTHS_MAX, 3)
    assert (second.lengths, second.dropped_samples) == ((), 0)


async def test_an_ingress_that_restarts_without_its_agent_goes_on_limiting(
    folder: Path, session: aiohttp.ClientSession
) -> None:
    async with ScriptedEngine() as upstream, started(node := IngressNode(folder, node="a")):
        await serve([node], [(0, node, upstream.url)], lengths=_rules())
        await node.stop()
        await node.agent.stop()
        await node.start()
        assert await _ask(session, node, CODE) == "222"


class _Embeddings:
    """A server of /v1/embeddings that answers as it is told."""

    def __init__(self) -> None:
        self.answer: dict[str, Any] = {"data": [{"embedding": [0.5, -1.0, 0.25, 2.0]}]}
        self.asked: list[dict[str, Any]] = []
        self._runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=0.1)
        self.address = ""

    async def __aenter__(self) -> _Embeddings:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.address = f"127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        assert request.path == "/v1/embeddings"
        self.asked.append(json.loads(await request.read()))
        return web.json_response(self.answer)


async def test_an_own_embedding_model_takes_the_place_of_n_grams(folder: Path, session: aiohttp.ClientSession) -> None:
    async with _Embeddings() as model, ScriptedEngine() as upstream, started(
        node := IngressNode(folder, node="a", embeddings_address=model.address, embeddings_model="small")
    ):
        await serve([node], [(0, node, upstream.url)], lengths=_rules())
        assert await _ask(session, node, SUM) is None  # these kinds were learned from other vectors
        await until_async(lambda: len(_samples(node)) == 1)
        (sample,) = _samples(node)
        assert base64.b64decode(sample.vector) == vectorise_embedding(
            [0.5, -1.0, 0.25, 2.0], Projection(seed=77, method=sample.method)
        )
        assert sample.method >= 1_000_000
        assert model.asked == [{"model": "small", "input": f"user\n{SUM}"}]
        everything = LengthRule(centroid=sample.vector, reach=0.9, limit_tokens=33)
        mine = _rules(method=sample.method, kinds=(everything,))
        await serve([node], [(0, node, upstream.url)], lengths=mine, revision=2)
        assert await _ask(session, node, SUM) == "33"
        answers: tuple[dict[str, Any], ...] = (
            {"error": "no"}, {"data": []}, {"data": [{"embedding": ["x"]}]}, {"data": [{"embedding": []}]},
        )
        for useless in answers:
            model.answer = useless
            assert await _ask(session, node, SUM) is None
    assert upstream.bodies[-1].get("max_tokens") is None
