"""The recordings that are shipped: a real vLLM's faults get their verdicts, and its quiet time gets none."""

from __future__ import annotations

from pathlib import Path

import pytest

from enova_recommender.detection.causes import DESTRUCTIVE
from enova_recommender.detection.episodes import Change
from enova_recommender.detection.folding import FoldSettings
from enova_recommender.detection.watch import FleetWatch, Watched
from enova_recommender.performance import Affine
from enova_testing.recorded_faults import REPLICA, Recording, recordings

SAMPLE = Path(__file__).parent.parent / "samples" / "vllm_cpu_faults"
# Fitted by the benchmark detector_recorded to the steps of train_1 that it found normal.
TIMES = Affine(
    base_s=0.01723, prefill_token_s=4.32e-4, prefill_pair_s=2.43e-6, sequence_s=7.18e-4, context_token_s=9.3e-7
)


@pytest.fixture(scope="module")
def recording() -> Recording:
    (found,) = [each for each in recordings(SAMPLE) if each.name == "test_1"]
    return found


@pytest.fixture(scope="module")
def told(recording: Recording) -> list[Watched]:
    watch = FleetWatch(FoldSettings(bounds=recording.bounds))
    watch.place([recording.placement])
    watch.expect({REPLICA: TIMES})
    found: list[Watched] = []
    for frame in recording.frames:
        watch.add(frame, now_s=frame.end_s)
        found += watch.close(frame.end_s)
    return found


def test_every_fault_is_told_by_its_own_name(recording: Recording, told: list[Watched]) -> None:
    for event in recording.events:
        during = [step for step in told if event.start_s < step.step.end_s <= event.end_s]
        first = next((verdict.kind.value for step in during if (verdict := step.judgement.verdicts.get(REPLICA))), None)
        if event.fault or event.verdict == "UNDERUSED":
            assert first == event.verdict, event
        elif event.fault is False:
            assert first is None, event


def test_quiet_time_between_events_raises_nothing(recording: Recording, told: list[Watched]) -> None:
    for step in told:
        after = [e for e in recording.events if e.start_s <= step.step.end_s <= max(e.recovered_s, e.end_s + 60.0)]
        if not after:
            assert not step.judgement.verdicts, step.step.end_s


def test_nothing_healthy_would_be_destroyed(recording: Recording, told: list[Watched]) -> None:
    hang = next(event for event in recording.events if event.kind == "hang")
    slow = next(event for event in recording.events if event.kind == "slow_engine")
    for step in told:
        verdict = step.judgement.verdicts.get(REPLICA)
        if verdict is not None and verdict.action in DESTRUCTIVE:
            assert any(each.start_s < step.step.end_s <= each.end_s + 60.0 for each in (hang, slow))


def test_each_trouble_is_one_episode_that_ends(told: list[Watched]) -> None:
    changes = [each for step in told for each in step.changes]
    opened = [each.episode for each in changes if each.change is Change.OPENED]
    closed = {each.episode.id for each in changes if each.change is Change.CLOSED}
    assert len({each.id for each in opened}) == len(opened)
    assert {each.id for each in opened[:-1]} <= closed
