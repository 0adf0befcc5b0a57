"""Each fault, put into a simulated engine of a running fleet, gets its verdict and its episode."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from enova_testing.fleet import ENOVA, UpFleet, up
from enova_testing.waiting import until

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(300)]

SCALE = 10.0
LEARN_S = 45.0             # real time: what a model is wrong by is known after so many steps
FOUND_S = 60.0
OVER_S = 60.0
MEASURED_S = 2.5
GIVES_UP = 8               # restarts, after which an agent leaves an engine alone
KILL_EVERY_S = 0.1
LOAD_S = 36_000.0          # of model time: until it is ended


@dataclass(slots=True)
class Watched:
    """A fleet of deployments: two replicas to hurt, two to crowd, one with a small cache, one that nobody asks."""

    fleet: UpFleet
    began_s: float

    def replica(self, deployment: str) -> dict[str, Any]:
        """The first one."""
        return sorted(self.fleet.replicas(deployment), key=lambda each: str(each["name"]))[0]

    def hurt(self, deployment: str, **fault: object) -> str:
        """Put a fault into a deployment's first replica; its name."""
        replica = self.replica(deployment)
        assert httpx.post(f"{replica['endpoint']}/simulated/fault", json=fault).status_code == 200
        return str(replica["name"])

    def heal(self, deployment: str) -> None:
        """Lift the faults of its replicas."""
        for replica in self.fleet.replicas(deployment):
            with contextlib.suppress(httpx.HTTPError):  # it may be on its way down or up
                httpx.delete(f"{replica['endpoint']}/simulated/fault")

    def open_episodes(self, deployment: str) -> list[dict[str, Any]]:
        """As the command tells them."""
        found: list[dict[str, Any]] = self.fleet.ok("episodes", "--open", "--of", f"deployment/{deployment}")
        return found

    def found(self, deployment: str, verdict: str, cause: str) -> dict[str, Any]:
        """Wait for an episode of this kind and cause."""

        def look() -> dict[str, Any] | None:
            episodes = self.open_episodes(deployment)
            return next((each for each in episodes if each["kind"] == verdict and cause in each["causes"]), None)

        episode = until(look, timeout_s=FOUND_S, what=f"{verdict} {cause} of {deployment}")
        assert isinstance(episode, dict)
        return episode

    def verdicts(self, deployment: str) -> dict[str, dict[str, Any]]:
        """What stands of its replicas."""
        found = self.fleet.ok("get", "verdicts")
        return {each["object"]: each for each in found if each["object"].startswith(f"deployments/{deployment}/")}

    def over(self, deployment: str) -> None:
        """Wait until nothing is said of it any more."""
        until(
            lambda: not self.open_episodes(deployment), timeout_s=OVER_S,
            what=lambda: f"the end of {self.open_episodes(deployment)}",
        )  # fmt: skip


@contextlib.contextmanager
def load(fleet: UpFleet, deployment: str, *, rate: float, prompt: int, output: int) -> Iterator[None]:
    """Steady traffic while the block runs."""
    arguments = ["--rate", f"{rate:g}", "--duration", f"{LOAD_S:g}s", "--prompt-tokens", str(prompt)]
    process = subprocess.Popen(
        [str(ENOVA), "load", deployment, *arguments, "--output-tokens", str(output), "--time-scale", f"{SCALE:g}",
         "-o", "json"],
        env={**os.environ, "ENOVA_API": fleet.facts["api"]}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """The fleet, with traffic on what is to be hurt."""
    directory = tmp_path_factory.mktemp("watched") / "data"
    with up(directory, "--nodes", "1", "--gpu", "H100:8", "--time-scale", f"{SCALE:g}") as fleet:
        fleet.deploy("busy", replicas=2, max_num_seqs=8, max_model_len=1024, num_gpu_blocks_override=1200)
        fleet.deploy("small", replicas=1, max_num_seqs=8, max_model_len=1024, num_gpu_blocks_override=160)
        fleet.deploy("crowded", replicas=2, max_num_seqs=4, max_model_len=1024, num_gpu_blocks_override=100)
        fleet.deploy("quiet", replicas=1, max_num_seqs=8, max_model_len=1024)
        # Nobody is to replace what is hurt here.
        fleet.ok("pause", "deployment/busy")
        began_s = time.monotonic()
        with load(fleet, "busy", rate=1.2, prompt=100, output=120):
            yield Watched(fleet, began_s)


def test_what_nobody_asks_is_underused_and_what_is_busy_is_well(watched: Watched) -> None:
    episode = watched.found("quiet", "UNDERUSED", "IDLE")
    assert episode["suggested_action"] == "SCALE_DOWN"
    assert [e for e in watched.open_episodes("busy") if e["kind"] != "UNDERUSED"] == []


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ({"kind": "slow", "factor": 3.0}, "SLOW"),
        ({"kind": "throttle", "factor": 2.0}, "THROTTLED"),
    ],
)
def test_a_slow_engine_is_degraded_for_its_own_reason(watched: Watched, fault: dict[str, Any], cause: str) -> None:
    until(lambda: time.monotonic() - watched.began_s >= LEARN_S, timeout_s=LEARN_S + 1.0, what="time to learn")
    name = watched.hurt("busy", **fault)
    try:
        episode = watched.found("busy", "DEGRADED", cause)
        assert episode["object"] == name
        assert episode["suggested_action"] in {"INSPECT", "REPLACE"}       # the second only where it has lasted
        assert watched.verdicts("busy")[name]["cause"] == cause
        assert {each["feature"] for each in episode["series"]} >= {"step_s", "running"}
    finally:
        watched.heal("busy")
    watched.over("busy")


def test_a_hung_engine_is_degraded_and_its_episode_ends_when_the_agent_has_mended_it(watched: Watched) -> None:
    name = watched.hurt("busy", kind="hang")
    episode = watched.found("busy", "DEGRADED", "HUNG")
    assert episode["object"] == name
    watched.over("busy")
    until(lambda: all(e["state"] == "READY" for e in watched.fleet.replicas("busy")), timeout_s=OVER_S)
    evidence = list(Path(watched.fleet.data_dir).rglob("evidence/*.txt"))
    assert evidence, "the agent kept what it could see of the hung engine"


def test_too_much_traffic_is_an_overload_of_the_deployment(watched: Watched) -> None:
    # Four at once, whose answers take 1.1 s, on each of two replicas; twice as many would not fit into the cache.
    def crowded() -> list[dict[str, Any]]:
        every = watched.open_episodes("crowded")
        return [each for each in every if each["kind"] == "OVERLOADED" and each["object"] == "deployments/crowded"]

    with load(watched.fleet, "crowded", rate=10.0, prompt=100, output=160):
        until(crowded, timeout_s=2 * FOUND_S, what="an overload of both")
        (episode,) = crowded()
    assert episode["suggested_action"] == "SCALE_UP"
    assert "OVERLOAD" in episode["causes"]
    assert episode["member_count"] == 2


def test_a_cache_that_is_too_small_for_its_batch_is_a_misconfiguration(watched: Watched) -> None:
    with load(watched.fleet, "small", rate=2.0, prompt=200, output=500):
        episode = watched.found("small", "MISCONFIGURED", "KV_THRASH")
        assert episode["suggested_action"] == "RECONFIGURE"


def test_blocks_that_get_lost_are_a_leak(watched: Watched) -> None:
    name = watched.hurt("busy", kind="leak", blocks_per_s=40.0)
    episode = watched.found("busy", "DEGRADED", "LEAK")
    assert (episode["object"], episode["suggested_action"]) == (name, "RESTART")
    watched.fleet.ok("restart", f"replica/busy/{name.rsplit('/', 1)[1]}")
    watched.over("busy")


def test_an_engine_that_crashes_again_and_again_is_a_crash_loop(watched: Watched) -> None:
    replica = watched.replica("busy")
    ready_s: dict[int, float] = {}      # by pid: when it was first seen to be ready

    def crash() -> bool:
        now = watched.replica("busy")
        if now["state"] == "READY":
            # It is let live until it was measured: what dies before is known to the agent alone.
            since_s = ready_s.setdefault(now["pid"], time.monotonic())
            if time.monotonic() - since_s > MEASURED_S:
                with contextlib.suppress(httpx.HTTPError):  # it ends before it answers
                    httpx.post(f"{now['endpoint']}/simulated/fault", json={"kind": "crash"}, timeout=2.0)
        return any("CRASH_LOOP" in each["causes"] for each in watched.open_episodes("busy"))

    until(crash, timeout_s=2 * FOUND_S, what="a crash loop")
    (episode,) = [each for each in watched.open_episodes("busy") if "CRASH_LOOP" in each["causes"]]
    assert (episode["kind"], episode["object"]) == ("DEGRADED", replica["name"])


@contextlib.contextmanager
def killing(name: str) -> Iterator[None]:
    """Every engine of a replica is killed as soon as it is there, faster than a command could tell of it."""
    closing = threading.Event()

    def kill() -> None:
        while not closing.wait(KILL_EVERY_S):
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):  # it ended, or is another user's
                    if process.environ().get("ENOVA_REPLICA") == name:
                        process.kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join()


def test_an_engine_that_dies_before_it_was_measured_is_a_crash_loop_long_before_its_agent_gives_up(
    watched: Watched,
) -> None:
    watched.fleet.deploy("doomed", replicas=1, max_num_seqs=8, max_model_len=1024)
    name = watched.replica("doomed")["name"]
    with killing(name):
        episode = watched.found("doomed", "DEGRADED", "CRASH_LOOP")
        replica = watched.replica("doomed")
    assert episode["object"] == name
    assert replica["state"] != "FAILED"
    assert replica["restarts"] < GIVES_UP
    watched.fleet.ok("delete", "deployment/doomed", "--no-wait")


def followed(fleet: UpFleet, *, count: int) -> list[dict[str, Any]]:
    """The first lines of `enova episodes -f`."""
    process = subprocess.Popen(
        [str(ENOVA), "episodes", "-f", "-o", "json"], env={**os.environ, "ENOVA_API": fleet.facts["api"]},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    giving_up = threading.Timer(FOUND_S, process.kill)
    giving_up.start()
    try:
        return [json.loads(process.stdout.readline()) for _ in range(count)]
    finally:
        giving_up.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_person_follows_labels_and_draws_episodes(watched: Watched, tmp_path: Path) -> None:
    every = watched.fleet.ok("episodes")
    assert every
    name = next(each["name"] for each in every if each["series"])
    labelled = watched.fleet.ok("episodes", "label", name.removeprefix("episodes/"), "--cause", "slow")
    assert (labelled["label"], labelled["label_cause"]) == ("TRUE", "SLOW")
    assert name not in {each["name"] for each in watched.fleet.ok("episodes", "--uncertain")}
    drawn = watched.fleet.enova("episodes", "show", name, "--plot", str(tmp_path / "evidence.svg"))
    assert drawn.code == 0, drawn.err
    assert (tmp_path / "evidence.svg").read_text().startswith("<?xml")
    assert name in {each["name"] for each in followed(watched.fleet, count=len(every))}
    shown = watched.fleet.enova("episodes")
    assert "DEGRADED" in shown.out
    refused = watched.fleet.enova("episodes", "label", name, "--cause", "sunspots", "-o", "json")
    assert refused.error["field"] == "cause"
