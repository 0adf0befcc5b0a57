"""The simulated engine starts and ends as vLLM was measured to: exit codes, signals, the death of its core."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from enova_testing.processes import is_alive
from enova_testing.simulated_engine import SimulatedEngine, write_tiny_model
from enova_testing.waiting import until

pytestmark = pytest.mark.network


class Stream(threading.Thread):
    """A streamed completion in the background, read line by line."""

    def __init__(self, engine: SimulatedEngine, *, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._url = f"{engine.url}/v1/completions"
        self._body = {"prompt": "x", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        self._answer: httpx.Response | None = None
        self.lines: list[str] = []
        self.start()
        until(lambda: self.lines)

    def run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=60) as answer:
            self._answer = answer
            self.lines += (line for line in answer.iter_lines() if line)

    @property
    def tokens(self) -> int:
        return len(self.lines)


@contextmanager
def open_stream(engine: SimulatedEngine, *, max_tokens: int) -> Iterator[socket.socket]:
    """A stream on a bare connection, which no client library closes behind our back; its first bytes are read."""
    host, _, port = engine.url.removeprefix("http://").partition(":")
    body = json.dumps({"prompt": "x", "max_tokens": max_tokens, "ignore_eos": True, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall((head + body).encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        yield connection


def read_to_end(connection: socket.socket) -> None:
    while connection.recv(65536):
        continue


def port_is_open(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize(
    ("words", "model", "code", "text"),
    [
        (("--no-such-flag", "1"), None, 2, "error: unrecognized arguments: --no-such-flag 1"),
        (("--max-num-seqs", "0"), None, 2, "argument --max-num-seqs: must lie between 1 and"),
        (("--dtype", "int3"), None, 2, "argument --dtype: invalid choice: 'int3'"),
        ((), "/no/such/model", 1, "Repo id must be in the form"),
        ((), "nobody/nothing", 1, "is not a model of the simulated engine's catalogue"),
        (("--simulated-gpu", "L4"), "meta-llama/Llama-3.1-70B-Instruct", 1, "CUDA out of memory"),
        (("--simulated-gpu", "A10"), "Qwen/Qwen2.5-7B-Instruct", 0, ""),
        (("--gpu-memory-utilization", "0.1"), None, 1, "No available memory for the cache blocks"),
        (("--num-gpu-blocks-override", "10"), None, 1, "larger than the available KV cache memory"),
        (("--max-model-len", "999999"), None, 1, "is greater than the derived max_model_len"),
        (("-tp", "4", "--simulated-gpu-count", "2"), None, 1, "World size (4) is larger than"),
        (("-tp", "3"), None, 1, "must be divisible by tensor parallel size (3)"),
        (("--simulated-gpu", "Z9"), None, 1, "no GPU is called 'Z9'"),
        (("--simulated-step-times", "/no/such/file"), None, 1, "--simulated-step-times /no/such/file"),
        (("--simulated-faults", "/no/such/file"), None, 2, "--simulated-faults /no/such/file"),
    ],
)
def test_what_cannot_start_says_why_and_ends_with_vllms_code(
    tmp_path: Path, words: tuple[str, ...], model: str | None, code: int, text: str
) -> None:
    chosen = {} if model is None else {"model": model}
    with SimulatedEngine(tmp_path, *words, wait=not code, **chosen) as engine:  # type: ignore[arg-type]
        if code:
            assert engine.exit_code() == code
            assert text in engine.log
            assert "Traceback" not in engine.log


def test_a_folder_with_a_config_is_served_and_one_without_is_refused(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, model=str(write_tiny_model(tmp_path / "tiny"))) as engine:
        assert engine.complete(max_tokens=2).status_code == 200
    (tmp_path / "empty").mkdir()
    with SimulatedEngine(tmp_path, model=str(tmp_path / "empty"), wait=False) as engine:
        assert engine.exit_code() == 1
        assert "does not appear to have a file named config.json" in engine.log


def test_a_port_in_use_ends_the_start_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with SimulatedEngine(tmp_path, "--port", port, wait=False) as engine:
            assert engine.exit_code() == 1
            assert "[Errno 98] Address already in use" in engine.log
            assert "Starting to load" not in engine.log


def test_the_log_tells_the_phases_of_a_start_and_the_port_opens_last(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, "--simulated-time-scale", "50", start_s=None) as engine:
        marks = ["Starting to load model", "checkpoint shards: 100%", "torch.compile takes", "GPU KV cache size",
                 "Graph capturing finished", "API server 0 on http", "Application startup complete."]  # fmt: skip
        places = [engine.log.index(mark) for mark in marks]
        assert places == sorted(places)


def test_term_ends_an_idle_engine_at_once_with_code_0(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path) as engine:
        core = engine.core
        engine.process.send_signal(signal.SIGTERM)
        assert engine.exit_code(2) == 0
        until(lambda: not core.is_running())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_with_130(tmp_path: Path, number: signal.Signals) -> None:
    with SimulatedEngine(tmp_path, start_s=600, wait=False) as engine:
        until(lambda: any("EngineCore" in " ".join(child.cmdline()) for child in
                          psutil.Process(engine.process.pid).children()))  # fmt: skip
        engine.process.send_signal(number)
        assert engine.exit_code(5) == 130


def test_term_closes_the_port_and_leaves_streams_hanging_until_the_client_goes(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path) as engine:
        with open_stream(engine, max_tokens=1500) as connection:
            engine.process.send_signal(signal.SIGTERM)
            until(lambda: not port_is_open(engine.url), timeout_s=2)
            connection.settimeout(0.7)
            # What was on its way comes; then neither data nor an end.
            with pytest.raises(TimeoutError):
                read_to_end(connection)
            engine.process.send_signal(signal.SIGTERM)
            assert engine.process.poll() is None
        assert engine.exit_code(3) == 0


def test_draining_finishes_streams_and_refuses_new_requests_with_500(tmp_path: Path) -> None:
    words = ("--shutdown-timeout", "20", "--simulated-time-scale", "4")
    with SimulatedEngine(tmp_path, *words) as engine:
        stream = Stream(engine, max_tokens=600)
        engine.process.send_signal(signal.SIGTERM)
        until(lambda: "mode=drain" in engine.log)
        assert httpx.get(f"{engine.url}/health").status_code == 200
        refused = engine.complete(max_tokens=1)
        assert refused.status_code == 500
        assert "cannot schedule new futures" in refused.json()["error"]["message"]
        stream.join(20)
        assert stream.lines[-1] == "data: [DONE]"
        assert engine.exit_code(5) == 0


def test_a_drain_that_takes_too_long_turns_into_an_abort(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, "--shutdown-timeout", "0.3") as engine:
        with open_stream(engine, max_tokens=1500):
            engine.process.send_signal(signal.SIGTERM)
            until(lambda: not port_is_open(engine.url), timeout_s=3)
            assert engine.process.poll() is None
        assert engine.exit_code(3) == 0


def test_a_killed_core_turns_health_to_503_and_the_process_ends_with_0(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, "--simulated-time-scale", "2") as engine:
        stream = Stream(engine, max_tokens=1500)
        killed_s = time.monotonic()
        engine.core.kill()
        until(lambda: httpx.get(f"{engine.url}/health").status_code == 503, timeout_s=1)
        stream.join(5)
        assert stream.lines[-1] == "data: [DONE]"
        assert "EngineCore encountered an issue" in stream.lines[-2]
        assert engine.complete(max_tokens=1).status_code == 500
        assert engine.exit_code(5) == 0
        assert time.monotonic() - killed_s < 3.3


def test_a_stopped_core_stops_the_tokens_but_not_health(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path) as engine:
        stream = Stream(engine, max_tokens=400)
        engine.core.send_signal(signal.SIGSTOP)
        until(lambda: engine.core.status() == psutil.STATUS_STOPPED)
        settled_s = time.monotonic() + 0.3
        until(lambda: time.monotonic() > settled_s)
        made = engine.metrics()["vllm:generation_tokens_total"]
        later_s = time.monotonic() + 0.5
        until(lambda: time.monotonic() > later_s)
        assert engine.metrics()["vllm:generation_tokens_total"] == made
        assert httpx.get(f"{engine.url}/health").status_code == 200
        assert engine.metrics()["vllm:num_requests_running"] == 1
        engine.core.send_signal(signal.SIGCONT)
        stream.join(20)
        assert stream.lines[-1] == "data: [DONE]"


def test_a_killed_api_server_takes_its_core_along(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path) as engine:
        core = engine.core
        engine.process.kill()
        assert engine.exit_code() == -signal.SIGKILL
        until(lambda: not is_alive(core))
