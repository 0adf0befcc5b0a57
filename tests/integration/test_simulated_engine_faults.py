"""Each fault that the simulated engine can be told to suffer shows as it would on a real one."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from enova_testing.processes import is_alive
from enova_testing.simulated_engine import SimulatedEngine
from enova_testing.waiting import until

pytestmark = pytest.mark.network


def script(folder: Path, *faults: dict[str, object]) -> tuple[str, str]:
    path = folder / "faults.json"
    path.write_text(json.dumps({"faults": list(faults)}))
    return "--simulated-faults", str(path)


def post(engine: SimulatedEngine, **fault: object) -> httpx.Response:
    return httpx.post(f"{engine.url}/simulated/fault", json=fault)


def lift(engine: SimulatedEngine) -> None:
    assert httpx.delete(f"{engine.url}/simulated/fault").status_code == 200


def completion_s(engine: SimulatedEngine, *, max_tokens: int) -> float:
    before_s = engine.metrics()["vllm:e2e_request_latency_seconds_sum"]
    assert engine.complete(max_tokens=max_tokens).status_code == 200
    return engine.metrics()["vllm:e2e_request_latency_seconds_sum"] - before_s


def test_slow_start_takes_longer(tmp_path: Path) -> None:
    began_s = time.monotonic()
    with SimulatedEngine(tmp_path, *script(tmp_path, {"kind": "slow_start", "extra_s": 1.2})):
        assert time.monotonic() - began_s > 1.2


def test_out_of_memory_refuses_to_start(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, *script(tmp_path, {"kind": "out_of_memory"}), wait=False) as engine:
        assert engine.exit_code() == 1
        assert "torch.OutOfMemoryError: CUDA out of memory" in engine.log


def test_crash_comes_after_so_many_requests(tmp_path: Path) -> None:
    fault = {"kind": "crash", "after_requests": 3, "exit_code": 7}
    with SimulatedEngine(tmp_path, *script(tmp_path, fault)) as engine:
        core = engine.core
        for _ in range(2):
            assert engine.complete(max_tokens=1).status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            engine.complete(max_tokens=1)
        assert engine.exit_code() == 7
        until(lambda: not is_alive(core))


def test_core_crash_turns_health_bad(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path) as engine:
        assert post(engine, kind="core_crash").status_code == 200
        assert httpx.get(f"{engine.url}/health").status_code == 503


def test_hang_stops_tokens_while_health_stays_good_until_it_is_lifted(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path) as engine:
        assert post(engine, kind="hang").status_code == 200
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{engine.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=0.5)
        assert httpx.get(f"{engine.url}/health").status_code == 200
        assert engine.metrics()["vllm:generation_tokens_total"] == 0
        lift(engine)
        assert engine.complete(max_tokens=1).status_code == 200


def test_a_hang_ends_by_itself_after_its_time(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, "--simulated-time-scale", "10") as engine:
        assert post(engine, kind="hang", for_s=5).status_code == 200
        assert engine.complete(max_tokens=1).status_code == 200
        assert httpx.get(f"{engine.url}/simulated/fault").json() == {"faults": []}
        assert engine.metrics()["vllm:e2e_request_latency_seconds_sum"] > 4


def test_slow_stretches_steps_by_its_factor_and_lowers_the_clock(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, "--simulated-time-scale", "10") as engine:
        normal_s = completion_s(engine, max_tokens=200)
        assert post(engine, kind="slow", factor=3).status_code == 200
        assert completion_s(engine, max_tokens=200) == pytest.approx(3 * normal_s, rel=0.05)
        gpu = httpx.get(f"{engine.url}/simulated/gpu").json()["gpus"][0]
        assert gpu["sm_clock_mhz"] < 0.4 * 1980
        lift(engine)
        assert completion_s(engine, max_tokens=200) == pytest.approx(normal_s, rel=0.05)


def test_throttle_is_slow_and_the_gpu_says_why(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, "--simulated-time-scale", "10") as engine:
        normal_s = completion_s(engine, max_tokens=200)
        assert post(engine, kind="throttle", factor=2).status_code == 200
        assert completion_s(engine, max_tokens=200) == pytest.approx(2 * normal_s, rel=0.05)
        hot = httpx.get(f"{engine.url}/simulated/gpu").json()["gpus"][0]
        assert hot["throttle_reasons"] == 0x40
        assert hot["temperature_c"] > 85
        lift(engine)
        assert httpx.get(f"{engine.url}/simulated/gpu").json()["gpus"][0]["throttle_reasons"] == 0


def test_leak_grows_the_process_and_eats_kv_blocks(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, "--num-gpu-blocks-override", "200") as engine:
        process = psutil.Process(engine.process.pid)
        before = process.memory_info().rss
        assert post(engine, kind="leak", bytes_per_s=50 << 20, blocks_per_s=100).status_code == 200
        until(lambda: process.memory_info().rss > before + (20 << 20))
        until(lambda: 0.1 < engine.metrics()["vllm:kv_cache_usage_perc"] < 1, what="what is lost is in use")
        until(lambda: engine.metrics()["vllm:kv_cache_usage_perc"] == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{engine.url}/v1/completions", json={"prompt": "x"}, timeout=0.3)


def test_ignore_sigterm_leaves_only_sigkill(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, *script(tmp_path, {"kind": "ignore_sigterm"})) as engine:
        engine.process.send_signal(signal.SIGTERM)
        assert engine.complete(max_tokens=20).status_code == 200
        assert engine.process.poll() is None


def test_grandchild_stays_behind_in_a_session_of_its_own(tmp_path: Path) -> None:
    with SimulatedEngine(tmp_path, *script(tmp_path, {"kind": "grandchild"})) as engine:

        def found() -> psutil.Process | None:
            children = psutil.Process(engine.process.pid).children()
            return next((child for child in children if "sleep" in child.name()), None)

        left = until(found)
        assert isinstance(left, psutil.Process)
        try:
            assert os.getsid(left.pid) == left.pid
            engine.process.send_signal(signal.SIGTERM)
            assert engine.exit_code() == 0
            assert left.is_running()
        finally:
            left.kill()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"kind": "boredom"}, "'boredom' is none of"),
        ({"kind": "slow", "speed": 2}, "speed: unknown"),
        ({"kind": "slow", "factor": -1}, "factor: must be a number of at least 0"),
        ({"kind": "slow", "factor": 0}, "factor: must be above 0"),
        ({"kind": "slow_start"}, "strikes at the start only"),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(tmp_path: Path, fault: dict[str, object], words: str) -> None:
    with SimulatedEngine(tmp_path) as engine:
        answered = post(engine, **fault)
        assert answered.status_code == 400
        assert words in answered.json()["error"]["message"]
        assert engine.complete(max_tokens=1).status_code == 200
