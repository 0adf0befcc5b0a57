"""A deployment that scales by enova's own policy: out under load, in after it, to zero and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from enova_testing.fleet import MODEL, UpFleet, up
from enova_testing.waiting import until

pytestmark = [pytest.mark.network, pytest.mark.slow]

SCALE = 20


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpFleet]:
    directory = tmp_path_factory.mktemp("ahead") / "data"
    with up(directory, "--nodes", "1", "--gpu", "H100:6", "--time-scale", str(SCALE)) as started:
        yield started


def deploy(fleet: UpFleet, name: str, *, least: int, most: int) -> None:
    arguments = ["--min", str(least), "--max", str(most), "--policy", "enova", "--set=max_model_len=4096"]
    fleet.ok("deploy", MODEL, "--name", name, *arguments, "--set=max_num_seqs=16")
    fleet.ok("wait", f"deployment/{name}", "--for", "ready", "--timeout", "60s")


def target(fleet: UpFleet, name: str) -> int:
    found = fleet.ok("describe", f"deployment/{name}")
    return int(found.get("target_replicas", 0))


def decisions(fleet: UpFleet, name: str) -> list[dict[str, Any]]:
    found = fleet.ok("get", "decisions")
    mine = [each for each in found if each["deployment"] == f"deployments/{name}"]
    return [each for each in mine if each["action"] not in {"HOLD", "ACTION_HOLD"}]


def test_it_scales_out_under_load_and_in_after_it_and_says_what_it_expected(fleet: UpFleet) -> None:
    deploy(fleet, "chat", least=1, most=4)
    load = ("--rate", "6", "--duration", "400s", "--prompt-tokens", "500", "--output-tokens", "300")
    fleet.enova("load", "chat", *load, "--time-scale", str(SCALE))
    ups = [each for each in decisions(fleet, "chat") if each["action"].endswith("SCALE_UP")]
    assert ups, fleet.logs()
    assert all(each["actor"] == "policy/enova" for each in ups)
    features = {each["feature"] for each in ups[0]["inputs"]}
    assert {"arrived", "running", "forecast_requests_per_s"} <= features
    assert "requests/s are to be carried" in ups[0]["reason"]
    until(lambda: target(fleet, "chat") == 1, timeout_s=90, what="one replica again")
    assert any(each["action"].endswith("SCALE_DOWN") for each in decisions(fleet, "chat"))
    again = fleet.ok("replay", "deployment/chat")
    assert again["situations"] > 400 / 15
    assert again["differences"] == 0, [look for look in again["looks"] if look["differs"]][:3]
    wished = {look["now_s"]: look["replayed"]["replicas"] for look in again["looks"]}
    assert all(wished[each["model_time_s"]] == each["to_replicas"] for each in decisions(fleet, "chat"))


def test_it_sleeps_where_nobody_asks_and_the_request_that_wakes_it_is_answered(fleet: UpFleet) -> None:
    deploy(fleet, "rare", least=0, most=2)
    assert fleet.enova("chat", "rare", "hello", "--max-tokens", "4").code == 0
    until(lambda: not fleet.replicas("rare"), timeout_s=180, what="the last replica to leave")
    answered = fleet.enova("chat", "rare", "hello again", "--max-tokens", "4", timeout_s=120)
    assert answered.code == 0, answered.err
    assert target(fleet, "rare") == 1
    woken = decisions(fleet, "rare")[0]
    assert woken["action"].endswith("SCALE_UP")
    assert (woken.get("from_replicas", 0), woken["to_replicas"]) == (0, 1)
