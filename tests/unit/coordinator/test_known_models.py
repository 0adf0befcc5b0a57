"""What hosts said of models is remembered within bounds of number and age."""

from __future__ import annotations

from enova_coordinator.agents import ModelFacts
from enova_coordinator.known_models import FRESH_S, MODELS_MAX, KnownModels


def facts(digest: str) -> ModelFacts:
    return ModelFacts(node="nodes/n", config_json="{}", weight_bytes=1, digest=digest, vocabulary_size=1)


def test_the_one_not_used_for_longest_is_forgotten() -> None:
    known = KnownModels(now_s=lambda: 0.0)
    for number in range(MODELS_MAX):
        known.put(f"/m/{number}", facts("a"))
    assert known.get("/m/0") == facts("a")
    known.put("/m/new", facts("b"))
    assert known.get("/m/1") is None
    assert known.get("/m/0") == facts("a")
    assert known.get("/m/new") == facts("b")


def test_what_is_old_is_to_be_asked_again_and_replaced() -> None:
    now_s = 0.0
    known = KnownModels(now_s=lambda: now_s)
    assert not known.is_fresh("/m")
    known.put("/m", facts("a"))
    now_s = FRESH_S - 1
    assert known.is_fresh("/m")
    now_s = FRESH_S
    assert not known.is_fresh("/m")
    assert known.get("/m") == facts("a")
    known.put("/m", facts("b"))
    assert known.is_fresh("/m")
    assert known.get("/m") == facts("b")
