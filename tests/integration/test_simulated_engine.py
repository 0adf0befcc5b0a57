"""The simulated engine serves what vLLM serves: counted exactly, named the same, told by the same metrics."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from enova_testing.simulated_engine import MODEL, SimulatedEngine, write_tiny_model
from enova_testing.waiting import until

pytestmark = pytest.mark.network
FIXTURE = Path(__file__).parents[1] / "fixtures" / "vllm_metrics.txt"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatedEngine]:
    with SimulatedEngine(tmp_path_factory.mktemp("engine")) as running:
        yield running


@pytest.fixture
def client(engine: SimulatedEngine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as official:
        yield official


def test_the_official_client_gets_chat_answers_whole_and_streamed(client: openai.OpenAI) -> None:
    extra = {"ignore_eos": True}
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "how are you?"}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=9, extra_body=extra)
    assert whole.choices[0].finish_reason == "length"
    assert len((whole.choices[0].message.content or "").split()) == 9
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4 + 3, 9)
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=30, stream=True, stream_options={"include_usage": True},
        extra_body=extra,
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert len(text.split()) == 30
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30


def test_the_official_client_gets_completions_and_the_model_card(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=[1, 2, 3], max_tokens=25, stream=True, extra_body={"ignore_eos": True}
    )
    assert len("".join(chunk.choices[0].text for chunk in stream).split()) == 25
    card = client.models.list().data[0]
    assert card.id == MODEL
    assert card.model_dump()["max_model_len"] == 2048
    assert card.model_dump()["simulated"] is True


def test_prompts_count_ids_exactly_and_text_by_four_bytes(engine: SimulatedEngine) -> None:
    for prompt, tokens in (([7] * 321, 321), ("abcd", 1), ("abcde", 2), ("ü" * 6, 3)):
        answered = engine.complete(prompt, max_tokens=2).json()
        assert answered["usage"]["prompt_tokens"] == tokens
        assert answered["usage"]["completion_tokens"] == 2
        if isinstance(prompt, str):
            counted = httpx.post(f"{engine.url}/tokenize", json={"prompt": prompt}).json()
            assert (counted["count"], len(counted["tokens"])) == (tokens, tokens)


def test_an_answer_that_nobody_cuts_has_the_length_that_seed_and_id_give(engine: SimulatedEngine) -> None:
    def lengths(name: str) -> tuple[int, str]:
        answered = httpx.post(
            f"{engine.url}/v1/completions",
            json={"prompt": "x", "max_tokens": 2000},
            headers={"X-Request-Id": name},
            timeout=60,
        ).json()
        assert answered["id"] == f"cmpl-{name}"
        return answered["usage"]["completion_tokens"], answered["choices"][0]["finish_reason"]

    first = lengths("a-1")
    assert first == lengths("a-1")
    assert first[1] == "stop"
    assert first[0] != lengths("a-2")[0]


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        ({"prompt": "x", "max_tokens": 5000}, 400, "BadRequestError", "max_tokens=5000 cannot be greater"),
        ({"prompt": [1] * 2000, "max_tokens": 100}, 400, "BadRequestError", "100 > 2048 - 2000"),
        ({"prompt": [1] * 2048}, 400, "BadRequestError", "maximum context length is 2048"),
        ({"prompt": "x", "model": "other"}, 404, "NotFoundError", "`other` does not exist"),
        ({"prompt": "x", "n": 2}, 400, "BadRequestError", "n must be 1"),
        ({"prompt": {"a": 1}}, 400, "BadRequestError", "one text or one list"),
        ({"prompt": "x", "max_tokens": 0}, 400, "BadRequestError", "at least 1"),
    ],
)
def test_bad_requests_are_refused_as_vllm_refuses_them(
    engine: SimulatedEngine, body: dict[str, object], status: int, kind: str, words: str
) -> None:
    answered = httpx.post(f"{engine.url}/v1/completions", json=body)
    error = answered.json()["error"]
    assert (answered.status_code, error["code"], error["type"]) == (status, status, kind)
    assert words in error["message"]


def test_it_never_hides_that_it_is_simulated(engine: SimulatedEngine) -> None:
    version = httpx.get(f"{engine.url}/version").json()
    assert version["simulated"] is True
    assert "simulated" in version["version"]


def series(text: str) -> set[tuple[str, ...]]:
    """Name and labels of each series; of labels that tell of the host or of traffic only their names."""
    found = set()
    for line in text.splitlines():
        match = re.match(r"^([a-zA-Z_:][\w:]*)(\{.*\})? \S+$", line)
        if line.startswith("#") or match is None:
            continue
        labels = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2] or "")
        by_name_only = match[1].startswith("http_") or match[1] in {"vllm:cache_config_info", "python_info"}
        kept = [name if by_name_only and name != "le" else f"{name}={value}" for name, value in labels]
        found.add((match[1], *kept))
    return found


def test_metrics_have_the_names_labels_and_buckets_of_the_captured_exposition(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    with SimulatedEngine(tmp_path, "--served-model-name", "tiny", model=str(model)) as tiny:
        assert tiny.complete(max_tokens=3).status_code == 200
        exposed = httpx.get(f"{tiny.url}/metrics")
        assert exposed.headers["Content-Type"] == "text/plain; version=1.0.0; charset=utf-8"
        assert series(exposed.text) == series(FIXTURE.read_text())


def test_metrics_count_what_was_sent(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, "--simulated-time-scale", "10") as engine:
        for prompt, output in ((10, 5), (600, 40), (30, 1)):
            assert engine.complete([prompt] * prompt, max_tokens=output).status_code == 200
        values = engine.metrics()
    assert values["vllm:prompt_tokens_total"] == 640
    assert values["vllm:generation_tokens_total"] == 46
    assert values['vllm:request_success_total{finished_reason="length"}'] == 3
    assert values["vllm:time_to_first_token_seconds_count"] == 3
    assert values["vllm:inter_token_latency_seconds_count"] == 43
    assert values["vllm:e2e_request_latency_seconds_count"] == 3
    assert values["vllm:request_prompt_tokens_sum"] == 640
    assert values["vllm:iteration_tokens_total_sum"] == 640 + 46
    # Model seconds, not real ones: 46 tokens at 5 to 15 ms each.
    assert 0.2 < values["vllm:e2e_request_latency_seconds_sum"] < 0.8
    assert values["vllm:num_requests_running"] == values["vllm:kv_cache_usage_perc"] == 0


def test_a_repeated_prompt_is_found_in_the_prefix_cache(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path) as engine:
        engine.complete(list(range(100)), max_tokens=1)
        engine.complete(list(range(100)), max_tokens=1)
        values = engine.metrics()
    assert values["vllm:prefix_cache_queries_total"] == 200
    assert values["vllm:prefix_cache_hits_total"] == 96
    assert values['vllm:prompt_tokens_by_source_total{source="local_compute"}'] == 104


class Call(threading.Thread):
    """A completion in the background, with the time it ended."""

    def __init__(self, engine: SimulatedEngine, **body: object) -> None:
        super().__init__()
        self._engine, self._body = engine, body
        self.ended_s = 0.0
        self.status = 0
        self.start()

    def run(self) -> None:
        self.status = self._engine.complete(**self._body).status_code  # type: ignore[arg-type]
        self.ended_s = time.monotonic()


def test_requests_beyond_max_num_seqs_wait_and_the_urgent_are_served_first(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, "--max-num-seqs", "1", "--scheduling-policy", "priority") as engine:
        first = Call(engine, max_tokens=150)
        until(lambda: engine.metrics()["vllm:num_requests_running"] == 1)
        idle = Call(engine, max_tokens=150, priority=5)
        until(lambda: engine.metrics()["vllm:num_requests_waiting"] == 1)
        urgent = Call(engine, max_tokens=150, priority=-5)
        until(lambda: engine.metrics()['vllm:num_requests_waiting_by_reason{reason="capacity"}'] == 2)
        for call in (first, idle, urgent):
            call.join()
    assert first.ended_s < urgent.ended_s < idle.ended_s


def test_scarce_blocks_preempt_and_all_are_served_in_the_end(tmp_path: Path) -> None:
    words = ("--num-gpu-blocks-override", "128", "--simulated-time-scale", "20", "--no-enable-prefix-caching")
    with SimulatedEngine(tmp_path, *words) as engine:
        calls = [Call(engine, prompt=[1] * 100, max_tokens=500) for _ in range(8)]
        for call in calls:
            call.join()
        assert all(call.status == 200 for call in calls)
        values = engine.metrics()
    assert values["vllm:num_preemptions_total"] > 0
    assert values["vllm:generation_tokens_total"] == 4000
    assert values["vllm:iteration_tokens_total_sum"] == 4000 + 800
    assert values["vllm:request_num_preemptions_sum"] == values["vllm:num_preemptions_total"]
    # A gap that a preemption made is a gap between tokens.
    assert values["vllm:inter_token_latency_seconds_count"] == 4000 - 8
    decode_s = values["vllm:request_decode_time_seconds_sum"]
    assert values["vllm:inter_token_latency_seconds_sum"] == pytest.approx(decode_s)


def test_a_full_queue_refuses_alone_with_503_and_in_a_burst_inside_a_200(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, "--max-num-queued-reqs", "1") as engine:
        held = Call(engine, max_tokens=300)
        until(lambda: engine.metrics()["vllm:num_requests_running"] == 1)
        refused = engine.complete(max_tokens=1)
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "Service Unavailable"
        time_out_of_burst = time.monotonic() + 0.1
        until(lambda: time.monotonic() > time_out_of_burst)
        late = engine.complete(max_tokens=1, stream=True)
        assert late.status_code == 503
        rejections = engine.metrics()['vllm:admission_rejections_total{reason="max_num_queued_reqs"}']
        assert rejections == 2
        held.join()


def test_in_a_burst_a_refusal_hides_in_a_200(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, "--max-num-queued-reqs", "1") as engine, httpx.Client() as client:

        def burst() -> list[httpx.Response]:
            answers: list[httpx.Response] = []
            body = {"prompt": "x", "max_tokens": 20, "ignore_eos": True, "stream": True}
            threads = [
                threading.Thread(
                    target=lambda: answers.append(client.post(f"{engine.url}/v1/completions", json=body, timeout=30))
                )
                for _ in range(6)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return answers

        def hidden() -> bool:
            refusals = [answer for answer in burst() if '"code": 503' in answer.text and answer.status_code == 200]
            return any(answer.text.endswith("data: [DONE]\n\n") for answer in refusals)

        assert until(hidden, timeout_s=20)


def test_a_client_that_leaves_frees_its_place_and_is_not_counted(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path) as engine:
        body = {"prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{engine.url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert engine.metrics()["vllm:num_requests_running"] == 1
        until(lambda: engine.metrics()["vllm:num_requests_running"] == 0, timeout_s=3)
        values = engine.metrics()
        assert values["vllm:kv_cache_usage_perc"] == 0
        assert values['vllm:request_success_total{finished_reason="abort"}'] == 0
        assert httpx.get(f"{engine.url}/load").json() == {"server_load": 0}


def test_the_key_guards_v1_only(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, "--api-key", "sekret", "--enable-request-id-headers") as engine:
        assert httpx.get(f"{engine.url}/v1/models").status_code == 401
        assert httpx.get(f"{engine.url}/v1/models").json() == {"error": "Unauthorized"}
        headers = {"Authorization": "Bearer sekret", "X-Request-Id": "q-9"}
        answered = httpx.get(f"{engine.url}/v1/models", headers=headers)
        assert answered.status_code == 200
        assert answered.headers["X-Request-Id"] == "q-9"
        for path in ("/health", "/metrics", "/version", "/load", "/ping"):
            assert httpx.get(engine.url + path).status_code == 200


def test_time_scale_makes_model_seconds_pass_faster(tmp_path: Path) -> None:
    times = tmp_path / "times.json"
    times.write_text('{"format": "enova.step_times/v1", "base_s": 0.1}')
    words = ("--simulated-step-times", str(times), "--simulated-time-scale", "20")
    with SimulatedEngine(tmp_path, *words) as engine:
        started_s = time.monotonic()
        engine.complete(max_tokens=101)
        real_s = time.monotonic() - started_s
        values = engine.metrics()
    assert 0.5 <= real_s < 1.5  # 10.1 model seconds
    assert values["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(10.1, rel=0.02)
    assert values["vllm:inter_token_latency_seconds_sum"] == pytest.approx(10.0, rel=1e-6)


def test_gpu_readings_follow_the_load(tmp_path: Path) -> None:
    words = ("--tensor-parallel-size", "2", "--simulated-gpu", "A100-80G", "--simulated-time-scale", "3")
    visible = {"CUDA_VISIBLE_DEVICES": "GPU-aa,GPU-bb"}
    with SimulatedEngine(tmp_path, *words, environment=visible) as engine:

        def read() -> list[dict[str, Any]]:
            gpus: list[dict[str, Any]] = httpx.get(f"{engine.url}/simulated/gpu").json()["gpus"]
            return gpus

        idle = read()
        assert [gpu["uuid"] for gpu in idle] == ["GPU-aa", "GPU-bb"]
        assert idle[0]["name"] == "NVIDIA A100-SXM4-80GB"
        assert idle[0]["utilization"] == 0
        assert 0.85 < idle[0]["memory_used_bytes"] / idle[0]["memory_total_bytes"] < 0.95
        call = Call(engine, max_tokens=1500)  # seconds of work, however late the readings come
        until(lambda: read()[0]["utilization"] > 0.95)
        assert read()[0]["power_w"] > idle[0]["power_w"]
        call.join()
        until(lambda: read()[0]["utilization"] == 0)


def test_an_idle_engine_is_small_and_sleeps(engine: SimulatedEngine) -> None:
    process = psutil.Process(engine.process.pid)
    assert process.memory_info().rss < 70 << 20
    before = process.cpu_times()
    began_s = time.monotonic()
    until(lambda: time.monotonic() > began_s + 2)
    after = process.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.1


def test_engines_with_one_epoch_and_scale_agree_on_model_time(tmp_path: Path) -> None:
    epoch_s = time.time() - 100
    words = ("--simulated-time-scale", "50", "--simulated-clock-epoch", str(epoch_s))
    with SimulatedEngine(tmp_path, *words) as one, SimulatedEngine(tmp_path, *words) as other:
        for engine in (one, other):
            before_s = epoch_s + (time.time() - epoch_s) * 50
            created_s = engine.complete(max_tokens=1).json()["created"]
            assert before_s - 1 <= created_s <= epoch_s + (time.time() - epoch_s) * 50
