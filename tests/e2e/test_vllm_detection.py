"""A real vLLM on the CPU that is slowed down, overrun and stopped: each gets its own verdict and episode.

One deployment serves the tests, in the order of this file. The model clock runs ten times as fast, so that what a
detector learns in minutes takes seconds; the engine knows nothing of that clock.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from enova_testing.fleet import UpFleet, up
from enova_testing.waiting import until

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(600)]

ENVIRONMENT = Path(__file__).parents[2] / ".venv-vllm"
MODEL = ENVIRONMENT / "tiny-model"
SCALE = 10
SEQUENCES = 8
START_TIMEOUT_S = 300.0
FOUND_S = 60.0
LEARN_S = 75.0                     # real time: fifty steps, of which some are not quiet
STOPPED_S, RUNS_S = 0.12, 0.04     # of each turn: four times as slow
REQUEST_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpFleet]:
    """One slot with a real vLLM, and the tiny model deployed and ready in it."""
    command = f"{ENVIRONMENT / 'bin' / 'python'} -m vllm.entrypoints.openai.api_server"
    arguments = ["--nodes", "1", "--gpu", "CPU:1", "--engine", "vllm", "--engine-command", command]
    directory = tmp_path_factory.mktemp("vllm") / "data"
    with up(
        directory, *arguments, "--engine-args", "--dtype float32 --enforce-eager", "--time-scale", str(SCALE)
    ) as running:
        settings = ["--set", f"max_num_seqs={SEQUENCES}", "--set", "max_model_len=2048"]
        running.ok("deploy", str(MODEL), "--name", "tiny", "--replicas", "1", *settings)
        running.ok("wait", "deployment/tiny", "--timeout", f"{START_TIMEOUT_S}s", timeout_s=START_TIMEOUT_S + 30)
        running.ok("pause", "deployment/tiny")     # nobody is to replace what is hurt here
        yield running


class Clients:
    """So many clients, each of which asks again as soon as it is answered."""

    def __init__(self, fleet: UpFleet, count: int, *, output_tokens: int) -> None:
        self._url = f"{fleet.openai}/completions"
        self._output_tokens = output_tokens
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(REQUEST_TIMEOUT_S)

    def _ask(self, number: int) -> None:
        body = {
            "model": "tiny", "prompt": [5 + (7 * number + place) % 480 for place in range(40)],
            "max_tokens": self._output_tokens, "ignore_eos": True,
        }  # fmt: skip
        with httpx.Client(timeout=REQUEST_TIMEOUT_S) as client:
            while not self._closing.is_set():
                with contextlib.suppress(httpx.HTTPError):  # of the engine that is stopped and killed
                    if client.post(self._url, json=body).status_code != 200:
                        self._closing.wait(0.5)


@contextlib.contextmanager
def slowed(processes: list[psutil.Process]) -> Iterator[None]:
    """The processes stand still for most of each turn, and are never taken for hung: they go on in between."""
    closing = threading.Event()

    def take_turns() -> None:
        while not closing.is_set():
            for stroke, length_s in ((signal.SIGSTOP, STOPPED_S), (signal.SIGCONT, RUNS_S)):
                for process in processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, stroke)
                closing.wait(length_s)

    thread = threading.Thread(target=take_turns, daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join()
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)


def replica(fleet: UpFleet) -> dict[str, Any]:
    """The one replica."""
    (only,) = fleet.replicas("tiny")
    return only


def workers(fleet: UpFleet) -> list[psutil.Process]:
    """vLLM's core and whatever computes for it."""
    children = psutil.Process(replica(fleet)["pid"]).children(recursive=True)
    return [each for each in children if "VLLM" in " ".join([each.name(), *each.cmdline()])]


def found(fleet: UpFleet, verdict: str, cause: str) -> dict[str, Any]:
    """Wait for an open episode of this kind and cause."""

    def look() -> dict[str, Any] | None:
        episodes = fleet.ok("episodes", "--open")
        return next((each for each in episodes if each["kind"] == verdict and cause in each["causes"]), None)

    def missed() -> str:
        return f"{verdict} {cause} among {fleet.ok('episodes')}\n{fleet.logs()}"

    episode = until(look, timeout_s=FOUND_S, what=missed)
    assert isinstance(episode, dict)
    assert episode["object"] in {replica(fleet)["name"], "deployments/tiny"}
    return episode


def over(fleet: UpFleet, episode: dict[str, Any]) -> None:
    """Wait until an episode is closed."""

    def closed() -> bool:
        return episode["name"] not in {each["name"] for each in fleet.ok("episodes", "--open")}

    until(closed, timeout_s=FOUND_S, what=f"the end of {episode['name']}")


def test_a_serving_engine_lets_those_that_watch_it_go_first(fleet: UpFleet) -> None:
    group = Path(f"/proc/{replica(fleet)['pid']}/autogroup")
    until(lambda: not group.exists() or group.read_text().split()[-1] == "10", what="a nice session")


def test_more_clients_than_it_can_serve_are_an_overload(fleet: UpFleet) -> None:
    with Clients(fleet, 6 * SEQUENCES, output_tokens=300):
        episode = found(fleet, "OVERLOADED", "OVERLOAD")
    assert episode["suggested_action"] == "SCALE_UP"
    over(fleet, episode)


def test_a_slowed_engine_is_degraded_and_not_overloaded(fleet: UpFleet) -> None:
    with Clients(fleet, 3, output_tokens=150):
        began_s = time.monotonic()
        until(lambda: time.monotonic() - began_s > LEARN_S, timeout_s=LEARN_S + 1, what="quiet steps to learn from")
        with slowed(workers(fleet)):
            episode = found(fleet, "DEGRADED", "SLOW")
    assert episode["suggested_action"] in {"INSPECT", "REPLACE"}     # the second only where it has lasted
    assert replica(fleet)["restarts"] == 0


def test_a_stopped_engine_is_hung_and_its_evidence_is_kept(fleet: UpFleet) -> None:
    with Clients(fleet, 3, output_tokens=150):
        for process in workers(fleet):
            os.kill(process.pid, signal.SIGSTOP)
        episode = found(fleet, "DEGRADED", "HUNG")
        assert episode["suggested_action"] in {"EJECT", "RESTART"}
    until(lambda: list(fleet.data_dir.rglob("evidence/*.txt")), timeout_s=FOUND_S, what="evidence")
