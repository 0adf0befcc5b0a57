"""A real vLLM on the CPU, through the whole of enova: deploy, serve, count, saturate, kill, stop, drain, end.

One deployment serves all tests, in the order of this file; each fault costs one start of vLLM.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
import openai
import psutil
import pytest

from enova_common.records import RequestRecord, records_of_bytes
from enova_common.vllm import METRIC_ALIASES, METRIC_PREFIX, METRICS, MetricKind
from enova_testing.fleet import UpFleet, up
from enova_testing.processes import is_alive
from enova_testing.telemetry import settled, telemetry
from enova_testing.waiting import until

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(600)]

ENVIRONMENT = Path(__file__).parents[2] / ".venv-vllm"
MODEL = ENVIRONMENT / "tiny-model"
CONTEXT = 2048
SEQUENCES = 16
START_TIMEOUT_S = 300.0  # 26 s alone; minutes beside other tests on two cores
REQUEST_TIMEOUT_S = 180.0
COUNTED_TIMEOUT_S = 30.0
BROKEN_DOWN_TIMEOUT_S = 60.0  # the coordinator looks every ten seconds, and at a busy engine later
OTHER_WORK_SHARE = 0.1  # of what a client waits may lie in no part: 0.012 alone, 0.059 seen with ten programs beside it
HANG_FOUND_S = 10.0
POLL_SLACK_S = 2.0  # a poll by the command line, on a loaded machine
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpFleet]:
    """One slot with a real vLLM, and the tiny model deployed and ready in it."""
    command = f"{ENVIRONMENT / 'bin' / 'python'} -m vllm.entrypoints.openai.api_server"
    arguments = ["--nodes", "1", "--gpu", "CPU:1", "--engine", "vllm", "--engine-command", command]
    directory = tmp_path_factory.mktemp("vllm") / "data"
    before = shared_memory()
    with up(directory, *arguments, "--engine-args", "--dtype float32 --enforce-eager") as running:
        settings = ["--set", f"max_num_seqs={SEQUENCES}", "--set", f"max_model_len={CONTEXT}"]
        running.ok("deploy", str(MODEL), "--name", "tiny", "--replicas", "1", *settings)
        running.ok("wait", "deployment/tiny", "--timeout", f"{START_TIMEOUT_S}s", timeout_s=START_TIMEOUT_S + 30)
        yield running
    assert not shared_memory() - before


def replica(fleet: UpFleet) -> dict[str, Any]:
    """The one replica."""
    (only,) = fleet.replicas("tiny")
    return only


def family_of(fleet: UpFleet) -> list[psutil.Process]:
    """The API server and everything below it."""
    server = psutil.Process(replica(fleet)["pid"])
    return [server, *server.children(recursive=True)]


def core_of(family: list[psutil.Process]) -> psutil.Process:
    """vLLM's core process."""
    return next(p for p in family if "EngineCore" in " ".join([p.name(), *p.cmdline()]))


def shared_memory() -> set[str]:
    """Segments as vLLM's processes leave them behind when nobody cleans up."""
    return {name for name in os.listdir(SHARED_MEMORY) if name.startswith(("psm_", "sem.mp-"))}


def mapped_by(family: list[psutil.Process]) -> set[str]:
    """The segments that these processes use."""
    text = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in family if is_alive(process))
    return {name for name in shared_memory() if name in text}


def ready_again(fleet: UpFleet, old: dict[str, Any]) -> dict[str, Any]:
    """Wait until another process serves, and see that it does."""
    # Polled slowly: each look is a process, and vLLM needs all cores to start.
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        now = replica(fleet)
        if now["state"] == "READY" and now["pid"] not in (0, old["pid"]):
            assert now["restarts"] == old["restarts"] + 1
            assert complete(fleet, [5, 6], 2)["usage"]["completion_tokens"] == 2
            return now
        fleet.enova("wait", "deployment/tiny", "--timeout", "2s")
    raise AssertionError(f"no new engine within {START_TIMEOUT_S} s\n{fleet.logs()}")


def becomes(fleet: UpFleet, what: str, wanted: object) -> None:
    """Wait until a figure of the telemetry (counted, engine_tokens) is exactly this."""
    deadline = time.monotonic() + COUNTED_TIMEOUT_S
    while (seen := getattr(telemetry(fleet, "deployments/tiny"), what)) != wanted:
        assert time.monotonic() < deadline, f"{what} is {seen}, not {wanted}\n{fleet.logs()}"
        time.sleep(0.2)  # frames come each second


def complete(fleet: UpFleet, prompt: list[int], output_tokens: int) -> dict[str, Any]:
    """One completion through the ingress."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True}
    answer = httpx.post(f"{fleet.openai}/completions", json=body, timeout=REQUEST_TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    value: dict[str, Any] = answer.json()
    return value


async def stream(
    client: httpx.AsyncClient, fleet: UpFleet, prompt: list[int], output_tokens: int, begun: asyncio.Event
) -> str:
    """One streamed completion: "served" if it came whole, else what went wrong. `begun` is set by its first line."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True, "stream": True}
    last = ""
    try:
        async with client.stream("POST", f"{fleet.openai}/completions", json=body) as answer:
            if answer.status_code != 200:
                return f"{answer.status_code} {(await answer.aread()).decode()}"
            async for line in answer.aiter_lines():
                begun.set()
                if '"error"' in line:
                    return line
                last = line or last
    except httpx.HTTPError as error:
        return repr(error)
    return "served" if last == "data: [DONE]" else f"ended with {last}"


async def streams(
    fleet: UpFleet, count: int, prompt_tokens: int, output_tokens: int, begun: asyncio.Event | None = None
) -> list[str]:
    """That many at once, no two prompts alike from the first token on: no prefix is cached."""
    first = begun or asyncio.Event()
    prompts = [[5 + (7 * n + place * (n + 3)) % 480 for place in range(prompt_tokens)] for n in range(count)]
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, limits=limits) as client:
        return list(await asyncio.gather(*(stream(client, fleet, prompt, output_tokens, first) for prompt in prompts)))


def test_a_streamed_completion_goes_through_the_ingress_and_is_counted(fleet: UpFleet) -> None:
    before = settled(fleet, "deployments/tiny")
    client = openai.OpenAI(base_url=fleet.openai, api_key="none", max_retries=0)
    sent = output = 0
    for _ in range(4):
        chunks = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello there"}],
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        usage = list(chunks)[-1].usage
        assert usage is not None
        assert usage.completion_tokens == 12
        sent, output = sent + usage.prompt_tokens, output + usage.completion_tokens
    becomes(fleet, "counted", before.plus(4, sent, output))


def test_the_engines_own_counters_agree_without_the_canaries(fleet: UpFleet) -> None:
    # Canaries go on all the time: what the agent reports must move by what was sent and by nothing else.
    settled(fleet, "deployments/tiny")
    before = telemetry(fleet, "deployments/tiny").engine_tokens
    assert before is not None
    raw_before = raw_tokens(fleet)
    for _ in range(3):
        complete(fleet, [20, 21, 22, 23, 24], 7)
    wanted = (before[0] + 15, before[1] + 21)
    becomes(fleet, "engine_tokens", wanted)
    # The engine itself goes on counting canaries: two of them later the reported figures are still the same.
    until(lambda: raw_tokens(fleet) >= raw_before + 21 + 2, timeout_s=30, what="two canaries")
    settled(fleet, "deployments/tiny")
    assert telemetry(fleet, "deployments/tiny").engine_tokens == wanted


def test_the_parts_of_the_time_add_up_to_what_the_client_waited(fleet: UpFleet) -> None:
    # Twice as many as the gate lets in: until the first ones end, the others cannot but wait in the ingress. Long
    # answers: what programs add to the engine's own time is some tenths of a second where two cores carry all.
    finished = settled(fleet, "deployments/tiny").finished
    before = broken_down(fleet, requests=finished)
    prompts = [[5 + (7 * n + place * (n + 3)) % 480 for place in range(200)] for n in range(2 * SEQUENCES)]
    began_s = time.time()
    limits = httpx.Limits(max_connections=len(prompts))
    with httpx.Client(timeout=REQUEST_TIMEOUT_S, limits=limits) as client, ThreadPoolExecutor(len(prompts)) as pool:
        waited_s = list(pool.map(lambda prompt: timed(client, fleet, prompt, CONTEXT - 400), prompts))
    after = broken_down(fleet, requests=finished + len(prompts))
    parts_s = {name: part.since(before[name]) for name, part in after.items()}
    whole_s = parts_s.pop("end_to_end")

    # What the ingress wrote down of each request says the same, to the last digit.
    rows = recorded(fleet, since_s=began_s, count=len(prompts))
    queued_s = [row.queue_s or 0.0 for row in rows]
    served_s = [row.duration_s - row.queue_s for row in rows if row.duration_s and row.queue_s is not None]
    assert whole_s == pytest.approx(mean(row.duration_s or 0.0 for row in rows), rel=1e-6)
    assert parts_s["ingress_queue"] == pytest.approx(mean(queued_s), rel=1e-6)
    assert sum(parts_s.values()) == pytest.approx(whole_s, rel=1e-6)
    assert sum(each_s > min(served_s) / 2 for each_s in queued_s) == SEQUENCES
    assert parts_s["ingress_queue"] > 0.2 * whole_s

    # The engine's clock and the client's are others; between them lies whatever else the machine does.
    client_s = mean(waited_s)
    known_s = whole_s - parts_s["remainder"]
    assert known_s <= whole_s <= client_s, (parts_s, whole_s, client_s)
    assert client_s - known_s < OTHER_WORK_SHARE * client_s, (parts_s, whole_s, client_s)


@dataclass(frozen=True)
class Part:
    """One part of the time of requests, since the leader began."""

    count: int
    sum_s: float

    def since(self, older: Part) -> float:
        """The mean of what came since."""
        return (self.sum_s - older.sum_s) / (self.count - older.count)


def broken_down(fleet: UpFleet, *, requests: int) -> dict[str, Part]:
    """The parts and the whole, once all of them have seen just these requests: canaries are in none."""
    deadline = time.monotonic() + BROKEN_DOWN_TIMEOUT_S
    while True:
        answer = fleet.ok("breakdown", "deployment/tiny", "--window", "0")
        parts = {part["name"]: Part(part["count"], part["sum_s"]) for part in (*answer["parts"], answer["end_to_end"])}
        if {part.count for part in parts.values()} == {requests}:
            return parts
        assert time.monotonic() < deadline, f"not {requests} requests: {parts}\n{fleet.logs()}"
        time.sleep(1)  # the coordinator looks every ten seconds


def recorded(fleet: UpFleet, *, since_s: float, count: int) -> list[RequestRecord]:
    """What the ingress wrote down of the requests that arrived since then, once they are so many."""

    def found() -> list[RequestRecord]:
        files = sorted(fleet.data_dir.glob("nodes/*/ingress/records/*.jsonl"))
        rows = [row for file in files for row in records_of_bytes(file.read_bytes()) if row.arrival_s >= since_s]
        return rows if len(rows) == count else []

    rows = until(found, timeout_s=COUNTED_TIMEOUT_S, what=f"{count} records")
    assert isinstance(rows, list)
    return rows


def timed(client: httpx.Client, fleet: UpFleet, prompt: list[int], output_tokens: int) -> float:
    """How long the client waited for one completion."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True}
    began_s = time.perf_counter()
    answer = client.post(f"{fleet.openai}/completions", json=body)
    waited_s = time.perf_counter() - began_s
    assert answer.json()["usage"]["completion_tokens"] == output_tokens, answer.text
    return waited_s


def raw_tokens(fleet: UpFleet) -> float:
    """Generated tokens as vLLM itself counts them, canaries included."""
    page = httpx.get(f"{replica(fleet)['endpoint']}/metrics", timeout=REQUEST_TIMEOUT_S).text
    return sum(float(value) for value in re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)$", page, re.MULTILINE))


def test_each_metric_of_our_table_is_on_the_live_page_with_its_kind_labels_and_buckets(fleet: UpFleet) -> None:
    page = httpx.get(f"{replica(fleet)['endpoint']}/metrics", timeout=REQUEST_TIMEOUT_S).text
    kinds = dict(re.findall(r"^# TYPE (vllm:\S+) (\S+)$", page, re.MULTILINE))
    ours = {metric.series_name: metric.kind.value for metric in METRICS}
    theirs = {name: kind for name, kind in kinds.items() if not name.endswith("_created")}
    assert set(theirs) - set(ours) <= {"vllm:cache_config_info"}
    assert {name: theirs.get(name) for name in ours} == ours
    assert not any(f"{old}{{" in page for old in METRIC_ALIASES)
    for metric in METRICS:
        series = re.findall(rf"^{METRIC_PREFIX}{metric.name}\S*{{(.*)}} \S+$", page, re.MULTILINE)
        assert series, metric.name
        if metric.label:
            values = {match for labels in series for match in re.findall(rf'{metric.label}="([^"]*)"', labels)}
            assert values == set(metric.values), metric.name
        if metric.kind is MetricKind.HISTOGRAM and metric.buckets:
            bounds = {float(bound) for labels in series for bound in re.findall(r'le="([^"]*)"', labels)}
            assert bounds == {*metric.buckets, float("inf")}, metric.name


async def test_long_prompts_and_saturation_are_served_and_taken_for_no_hang(fleet: UpFleet) -> None:
    before = await asyncio.to_thread(replica, fleet)
    assert await streams(fleet, 12, CONTEXT - 48, 20) == ["served"] * 12
    # Far beyond max_num_seqs: most wait in the engine or in the ingress, all are served in the end.
    assert await streams(fleet, 200, 30, 60) == ["served"] * 200
    after = await asyncio.to_thread(replica, fleet)
    assert (after["pid"], after["restarts"], after["state"]) == (before["pid"], before["restarts"], "READY")
    events = await asyncio.to_thread(fleet.ok, "events")
    assert not [event for event in events if event["reason"] in ("ReplicaSuspect", "EngineRestarted")]


async def test_a_killed_agent_fails_no_stream_and_adopts_the_engine(fleet: UpFleet) -> None:
    before = await asyncio.to_thread(replica, fleet)
    agent = fleet.pids()["agents"]["node-0"]
    begun = asyncio.Event()
    running = asyncio.create_task(streams(fleet, SEQUENCES, 20, CONTEXT - 100, begun))
    await asyncio.wait_for(begun.wait(), REQUEST_TIMEOUT_S)
    os.kill(agent, signal.SIGKILL)
    assert await running == ["served"] * SEQUENCES
    await asyncio.to_thread(until, lambda: fleet.pids()["agents"]["node-0"] != agent, timeout_s=20)

    def adopted() -> bool:
        return all(n["state"] == "READY" for n in fleet.ok("get", "nodes")) and replica(fleet)["state"] == "READY"

    await asyncio.to_thread(until, adopted, timeout_s=60)
    after = await asyncio.to_thread(replica, fleet)
    assert (after["pid"], after["restarts"]) == (before["pid"], before["restarts"])
    assert (await asyncio.to_thread(complete, fleet, [5, 6], 3))["usage"]["completion_tokens"] == 3
    # The adopted one is counted on, and not from nothing.
    wanted = await asyncio.to_thread(settled, fleet, "deployments/tiny")
    await asyncio.to_thread(complete, fleet, [5, 6], 3)
    await asyncio.to_thread(becomes, fleet, "counted", wanted.plus(1, 2, 3))


def test_a_stopped_core_process_is_found_within_ten_seconds_and_mended(fleet: UpFleet) -> None:
    old = replica(fleet)
    family = family_of(fleet)
    os.kill(core_of(family).pid, signal.SIGSTOP)
    stopped_at = time.monotonic()
    assert httpx.get(f"{old['endpoint']}/health", timeout=5).status_code == 200

    def found() -> bool:
        now = replica(fleet)
        return bool(now["state"] != "READY" or now["pid"] != old["pid"])

    until(found, timeout_s=30, what=f"the hang to be found\n{fleet.logs()}")
    assert time.monotonic() - stopped_at < HANG_FOUND_S + POLL_SLACK_S
    ready_again(fleet, old)
    assert not any(map(is_alive, family))
    reasons = [event["message"] for event in fleet.ok("events") if event["reason"] == "EngineRestarted"]
    assert "no progress" in reasons[-1]


async def test_a_dead_core_process_is_a_crash_though_the_server_ends_with_zero(fleet: UpFleet) -> None:
    old = await asyncio.to_thread(replica, fleet)
    family = await asyncio.to_thread(family_of, fleet)
    begun = asyncio.Event()
    running = asyncio.create_task(streams(fleet, 4, 20, CONTEXT - 100, begun))
    await asyncio.wait_for(begun.wait(), REQUEST_TIMEOUT_S)
    os.kill(core_of(family).pid, signal.SIGKILL)
    killed_at = time.monotonic()
    answers = await running
    assert time.monotonic() - killed_at < 30  # its streams end; none hangs
    assert all('"error"' in answer for answer in answers), answers
    await asyncio.to_thread(ready_again, fleet, old)
    events = await asyncio.to_thread(fleet.ok, "events")
    reason = [event["message"] for event in events if event["reason"] == "EngineRestarted"][-1]
    assert "exit code 0" in reason
    assert "engine core exited unexpectedly" in reason


def test_a_killed_api_server_takes_its_children_and_shared_memory_along(fleet: UpFleet) -> None:
    old = replica(fleet)
    family = family_of(fleet)
    assert len(family) > 2
    segments = mapped_by(family)
    assert segments
    os.kill(old["pid"], signal.SIGKILL)
    until(lambda: not any(map(is_alive, family)), timeout_s=15)
    until(lambda: not segments & shared_memory(), timeout_s=15, what=f"shared memory of the dead: {segments}")
    ready_again(fleet, old)


def test_a_model_that_cannot_be_is_refused_with_its_field(fleet: UpFleet, tmp_path: Path) -> None:
    cases = (
        ("/nonexistent/model", "MODEL_NOT_FOUND", "check the path on the hosts"),
        (str(tmp_path), "MODEL_HAS_NO_CONFIG", "give the directory that holds config.json"),
    )
    for path, reason, remedy in cases:
        result = fleet.enova("deploy", path, "--name", "bad", "--replicas", "1", "-o", "json")
        assert result.code == 1
        assert (result.error["field"], result.error["reason"]) == ("model", reason)
        assert path in result.error["message"]
        assert remedy in result.error["remedy"]
    assert [deployment["name"] for deployment in fleet.ok("get", "deployments")] == ["deployments/tiny"]


async def test_deleting_finishes_what_runs_and_leaves_no_process_port_or_shared_memory(fleet: UpFleet) -> None:
    family = await asyncio.to_thread(family_of, fleet)
    segments = mapped_by(family)
    endpoint = (await asyncio.to_thread(replica, fleet))["endpoint"]
    begun = asyncio.Event()
    running = asyncio.create_task(streams(fleet, 4, 20, CONTEXT - 100, begun))
    await asyncio.wait_for(begun.wait(), REQUEST_TIMEOUT_S)
    await asyncio.to_thread(fleet.ok, "delete", "deployment/tiny")
    assert await running == ["served"] * 4
    assert not any(map(is_alive, family))
    host, port = endpoint.removeprefix("http://").split(":")
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0
    assert not segments & shared_memory()
