"""Two kinds of prompts get two limits: learned from answers, applied by the ingress, told to operators."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from enova_testing.fleet import MODEL, UpFleet, up
from enova_testing.waiting import until

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(400)]  # hundreds of long answers

ASKED = 80                 # of each kind at a time; with 100 answers a kind may have a limit
AT_ONCE = 24
SHORT = "Item {number}: a shop sells pears at {number} dollars each, how much do {number} pears cost altogether?"
LONG = "Write a long python program number {number} that parses a file and prints a report of what it found."
LONG_TOKENS = 1500         # the engine is told so as no answer to a long prompt is shorter


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its tokens, why it ended, and the limit that its header tells."""

    tokens: int
    finish: str
    limit: int | None


async def _ask(client: httpx.AsyncClient, number: int, *, long: bool, **fields: Any) -> Answer:
    prompt = (LONG if long else SHORT).format(number=number)
    least = {"min_tokens": LONG_TOKENS} if long else {}
    body = {"model": "chat", "messages": [{"role": "user", "content": prompt}], **least, **fields}
    answer = await client.post("chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    told = answer.headers.get("x-enova-max-tokens")
    value = answer.json()
    return Answer(
        tokens=value["usage"]["completion_tokens"],
        finish=value["choices"][0]["finish_reason"],
        limit=int(told) if told else None,
    )


async def _load(url: str, count: int) -> list[tuple[bool, Answer]]:
    """So many of each kind, some at once."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, long: bool) -> tuple[bool, Answer]:
        async with gate:
            return long, await _ask(client, number, long=long)

    async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:
        return await asyncio.gather(*(one(number, long) for number in range(count) for long in (False, True)))


def _apply(fleet: UpFleet, folder: Path, policy: dict[str, Any]) -> None:
    manifest = {
        "name": "chat", "model": MODEL, "replicas": 1, "max_tokens_policy": policy,
        "configuration": {"max_model_len": 8192, "max_num_seqs": 64},
    }  # fmt: skip
    path = folder / "deployment.yaml"
    path.write_text(yaml.safe_dump(manifest))
    fleet.ok("apply", "-f", str(path))
    fleet.ok("wait", "deployment/chat", "--for", "ready", "--timeout", "60s")


def _limits(fleet: UpFleet) -> dict[str, Any]:
    limits: dict[str, Any] = fleet.ok("get", "deployment/chat")["length_limits"] or {}
    return limits


def test_two_kinds_of_prompts_get_two_limits(tmp_path: Path) -> None:
    with up(tmp_path / "data", "--nodes", "1", "--gpu", "H100:1", "--time-scale", "60") as fleet:
        _apply(fleet, tmp_path, {"mode": "OBSERVE", "cut_share": 0.1})
        unlimited: list[tuple[bool, Answer]] = []

        def learned() -> bool:
            unlimited.extend(asyncio.run(_load(fleet.openai, ASKED)))
            return len([kind for kind in _limits(fleet).get("kinds", ()) if kind.get("limit_tokens")]) == 2

        until(learned, timeout_s=90, what="two kinds have limits")
        assert all(answer.limit is None for _, answer in unlimited)
        kinds = sorted(_limits(fleet)["kinds"], key=lambda kind: int(kind["limit_tokens"]))
        limits = [kind["limit_tokens"] for kind in kinds]
        assert limits[0] < LONG_TOKENS <= limits[1]
        short = sorted(answer.tokens for long, answer in unlimited if not long)
        assert short[int(0.8 * len(short))] < limits[0] < short[-1]

        _apply(fleet, tmp_path, {"mode": "APPLY", "cut_share": 0.1})
        until(lambda: _any_limit(fleet.openai), timeout_s=30, what="limits are applied")
        limited = asyncio.run(_load(fleet.openai, 20))
        by_kind = {long: [answer for kind, answer in limited if kind is long] for long in (False, True)}
        for long, answers in by_kind.items():
            told = {answer.limit for answer in answers} - {None}
            assert len(told) == 1
            (limit,) = told
            assert limit == pytest.approx(limits[long], rel=0.15)  # it goes on learning meanwhile
            assert limit is not None
            assert all(answer.tokens <= limit for answer in answers if answer.limit == limit)
            assert sum(answer.limit is None for answer in answers) < 10  # 1 of 20 is left open, so that tails are seen
        own = asyncio.run(_own(fleet.openai))
        assert (own.limit, own.tokens, own.finish) == (None, 1900, "length")

        until(lambda: _told(fleet), timeout_s=30, what="operators are told what is learned")
        assert "length_limits" in fleet.enova("describe", "deployment/chat").out
        kept = b"".join(path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()).lower()
        for word in (b"pears", b"altogether", b"parses"):
            assert word not in kept

        _apply(fleet, tmp_path, {"mode": "OFF"})
        until(lambda: not _limits(fleet), timeout_s=30, what="what was learned is forgotten")
        until(lambda: all(answer.limit is None for _, answer in asyncio.run(_load(fleet.openai, 2))), timeout_s=30)


def _told(fleet: UpFleet) -> bool:
    """Whether the explanation has the very figures of the deployment; both move while answers are learned from."""
    kinds = _limits(fleet)["kinds"]
    told = "\n".join(fleet.ok("explain", "deployment/chat")["sentences"])
    return "2 kinds of prompts" in told and all(
        f"is limited to {kind['limit_tokens']} tokens ({kind['answers']} answers" in told for kind in kinds
    )


def _any_limit(url: str) -> bool:
    return any(answer.limit is not None for _, answer in asyncio.run(_load(url, 2)))


async def _own(url: str) -> Answer:
    async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:
        return await _ask(client, 1, long=False, max_tokens=1900, ignore_eos=True)


def test_a_policy_that_makes_no_sense_is_refused_with_its_field(tmp_path: Path) -> None:
    with up(tmp_path / "data", "--nodes", "1", "--gpu", "H100:1", "--time-scale", "60") as fleet:
        path = tmp_path / "deployment.yaml"
        for policy, field in (
            ({"mode": "APPLY", "cut_share": 0.9}, "max_tokens_policy.cut_share"),
            ({"mode": "SOMETIMES"}, "max_tokens_policy.mode"),
            ({"quantile": 0.9}, "max_tokens_policy.quantile"),
        ):
            path.write_text(yaml.safe_dump({"name": "x", "model": MODEL, "max_tokens_policy": policy}))
            result = fleet.enova("apply", "-f", str(path), "-o", "json")
            assert result.code == 1
            assert json.loads(result.err.strip().splitlines()[-1])["field"].endswith(field)
