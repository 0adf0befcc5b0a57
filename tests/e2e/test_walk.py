"""The five-minute walk: a fleet comes up, a model is deployed, serves, is scaled, explained and deleted."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from enova_common.records import records_of_bytes
from enova_testing.fleet import MODEL, UpFleet, up
from enova_testing.processes import is_alive
from enova_testing.telemetry import settled, telemetry
from enova_testing.waiting import until

pytestmark = [pytest.mark.network, pytest.mark.slow]


@pytest.fixture(scope="module")
def chat(fleet: UpFleet) -> UpFleet:
    """The fleet with a deployment `chat` of two replicas."""
    fleet.deploy("chat", replicas=2, max_num_seqs=32)
    return fleet


def test_up_says_where_everything_is(fleet: UpFleet) -> None:
    assert fleet.facts["api"].startswith("127.0.0.1:")
    assert fleet.facts["openai"].endswith("/v1")
    assert set(fleet.facts["pids"]["agents"]) == set(fleet.facts["pids"]["ingresses"]) == {"node-0", "node-1"}
    assert json.loads((fleet.data_dir / "up.json").read_text()) == fleet.facts


def test_nodes_are_registered_with_their_simulated_gpus(fleet: UpFleet) -> None:
    nodes = fleet.ok("get", "nodes")
    assert [(n["name"], n["state"], len(n["gpus"])) for n in nodes] == [
        ("nodes/node-0", "READY", 8),
        ("nodes/node-1", "READY", 8),
    ]
    assert all(gpu["type"] == "H100" and gpu["simulated"] for node in nodes for gpu in node["gpus"])


def test_replicas_are_spread_ready_and_on_gpus_of_their_own(chat: UpFleet) -> None:
    replicas = chat.replicas()
    assert {r["state"] for r in replicas} == {"READY"}
    assert {r["node"] for r in replicas} == {"nodes/node-0", "nodes/node-1"}
    assert all(r["pid"] > 0 and r["endpoint"].startswith("http://127.0.0.1:") and r["ready_time"] for r in replicas)
    assert all(len(r["gpus"]) == 1 for r in replicas)


def test_the_official_client_streams_and_counts(chat: UpFleet) -> None:
    client = openai.OpenAI(base_url=chat.openai, api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["chat"]
    stream = client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 20
    answer = client.completions.create(model="chat", prompt=[5, 6, 7], max_tokens=3, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 3)


def test_an_unknown_model_is_an_openai_style_404(chat: UpFleet) -> None:
    client = openai.OpenAI(base_url=chat.openai, api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(model="nobody", prompt="x")


def test_chat_answers(chat: UpFleet) -> None:
    result = chat.enova("chat", "chat", "Why is the sky blue?", "--max-tokens", "8")
    assert result.code == 0, result.err
    assert result.out.strip()


def test_load_serves_everything_and_ends_in_one_line_of_json(chat: UpFleet, tmp_path: Path) -> None:
    arguments = ("--rate", "3", "--duration", "60s", "--prompt-tokens", "100", "--output-tokens", "20")
    records = tmp_path / "records.jsonl"
    result = chat.enova("load", "chat", *arguments, "--time-scale", "20", "--records", str(records))
    assert result.code == 0, result.err
    report = json.loads(result.out.strip().splitlines()[-1])
    assert report["sent"] == report["served"] > 100
    assert report["failed"] == report["cut"] == 0
    assert 0 < report["ttft_s"]["p50"] < 5
    assert report["gpu_seconds"] > 60
    assert report["decisions"] == []
    rows = list(records_of_bytes(records.read_bytes()))
    assert len(rows) == report["sent"]
    assert all((row.prompt_tokens, row.output_tokens) == (100, 20) for row in rows)


def test_the_coordinator_has_counted_what_was_sent(chat: UpFleet) -> None:
    before = settled(chat, "deployments/chat")
    for _ in range(5):
        body = {"model": "chat", "prompt": [1, 2, 3, 4], "max_tokens": 6, "ignore_eos": True}
        assert httpx.post(f"{chat.openai}/completions", json=body, timeout=30).status_code == 200
    until(lambda: telemetry(chat, "deployments/chat").counted == before.plus(5, 20, 30), timeout_s=15)


def test_logs_of_an_engine_can_be_read(chat: UpFleet) -> None:
    name = chat.replicas()[0]["name"].split("/")[-1]
    result = chat.enova("logs", f"replica/{name}", "--tail", "50")
    assert result.code == 0, result.err
    assert "Application startup complete" in result.out
    lines = chat.enova("logs", f"replica/{name}", "--tail", "2", "-o", "json").out.splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"replica", "line"}] * 2


def test_what_is_asked_for_in_json_or_yaml_is_given_so(chat: UpFleet, tmp_path: Path) -> None:
    answer = chat.ok("chat", "chat", "Why?", "--max-tokens", "4")
    assert (answer["role"], answer["model"], bool(answer["content"])) == ("assistant", "chat", True)
    made = chat.ok("certs", "init", "--dir", str(tmp_path / "certs"))
    assert Path(made["certificate"]).exists()
    issued = chat.ok("certs", "issue", "agent", "gpu-host-1", "--dir", str(tmp_path / "certs"))
    assert Path(issued["key"]).exists()
    load = chat.enova("load", "chat", "--rate", "2", "--duration", "20s", "--time-scale", "20", "-o", "yaml")
    assert yaml.safe_load(load.out)["failed"] == 0


def test_scale_up_and_down_by_hand_is_a_decision_by_a_user(chat: UpFleet) -> None:
    chat.ok("scale", "deployment/chat", "--replicas", "3")
    chat.ok("wait", "deployment/chat", "--replicas", "3", "--timeout", "30s")
    assert sum(r["state"] == "READY" for r in chat.replicas()) == 3
    chat.ok("scale", "deployment/chat", "--replicas", "2")
    until(lambda: len(chat.replicas()) == 2, timeout_s=30)
    decisions = chat.ok("get", "decisions")
    assert [(d["from_replicas"], d["to_replicas"], d["actor"].split("/")[0]) for d in decisions[:2]] == [
        (3, 2, "user"),
        (2, 3, "user"),
    ]


def test_explain_and_events_say_what_happened(chat: UpFleet) -> None:
    explained = chat.enova("explain", "deployment/chat")
    assert explained.code == 0, explained.err
    assert "chat is READY" in explained.out
    events = chat.ok("events", "deployment/chat")
    assert any(event["reason"] == "ReplicaReady" for event in events)


def test_a_changed_spec_replaces_replicas_one_at_a_time_without_a_failed_request(chat: UpFleet) -> None:
    before = {r["name"] for r in chat.replicas()}
    manifest = f"name: chat\nmodel: {MODEL}\nreplicas: 2\nconfiguration: {{max_num_seqs: 16, max_model_len: 4096}}\n"
    assert chat.enova("apply", "-f", "-", stdin=manifest).code == 0
    smallest = 2
    failures = 0

    def replaced() -> bool:
        nonlocal smallest, failures
        replicas = chat.replicas()
        smallest = min(smallest, sum(r["state"] == "READY" for r in replicas))
        body = {"model": "chat", "prompt": [1], "max_tokens": 2}
        failures += httpx.post(f"{chat.openai}/completions", json=body, timeout=30).status_code != 200
        return (
            len(replicas) == 2
            and not before & {r["name"] for r in replicas}
            and {r["state"] for r in replicas} == {"READY"}
        )

    until(replaced, timeout_s=60)
    assert smallest >= 2
    assert failures == 0


def test_apply_leaves_a_paused_policy_paused_unless_the_manifest_says_otherwise(chat: UpFleet) -> None:
    manifest = f"name: chat\nmodel: {MODEL}\nmin: 2\nmax: 3\nconfiguration: {{max_num_seqs: 16, max_model_len: 4096}}\n"
    assert chat.enova("apply", "-f", "-", stdin=manifest).code == 0
    chat.ok("pause", "deployment/chat")
    applied = chat.enova("apply", "-f", "-", "-o", "json", stdin=manifest.replace("max: 3", "max: 4"))
    assert [(d["autoscaling_paused"], d["max"]) for d in applied.value] == [(True, 4)]
    deployed = chat.ok("deploy", MODEL, "--name", "chat", "--min", "2", "--max", "3", "--set=max_model_len=4096")
    assert (deployed["autoscaling_paused"], deployed["max"]) == (True, 3)
    assert "max_num_seqs" not in deployed["configuration"]
    resumed = chat.enova("apply", "-f", "-", "-o", "json", stdin=manifest + "autoscaling_paused: false\n")
    assert [d["autoscaling_paused"] for d in resumed.value] == [False]


def test_delete_frees_every_process(chat: UpFleet) -> None:
    pids = [r["pid"] for r in chat.replicas()]
    assert chat.ok("delete", "deployment/chat") == {"name": "deployments/chat", "state": "DELETED"}
    assert chat.enova("get", "deployment/chat").code == 4
    until(lambda: not any(is_alive(pid) for pid in pids), timeout_s=10)


def test_up_ends_everything_and_a_second_one_restores_its_deployments(data_dir: Path) -> None:
    with up(data_dir, "--nodes", "1", "--gpu", "H100:2", "--time-scale", "20") as fleet:
        fleet.deploy("kept")
        assert fleet.stop() == 0
        assert fleet.left() == []
    with up(data_dir, "--nodes", "1", "--gpu", "H100:2", "--time-scale", "20") as fleet:
        assert [d["name"] for d in fleet.ok("get", "deployments")] == ["deployments/kept"]
        fleet.ok("wait", "deployment/kept", "--timeout", "60s")
