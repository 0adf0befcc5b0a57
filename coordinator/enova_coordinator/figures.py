"""Which figures a coordinator shows to Prometheus."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from enova_coordinator.core.engine_facts import restored
from enova_coordinator.observability import Figure
from enova_recommender.types import VerdictKind

if TYPE_CHECKING:
    from enova_coordinator.coordinator import Coordinator


def figures(coordinator: Coordinator) -> list[Figure]:
    """All of them, as they are now. Called from the metrics server's thread: it reads, and copies what may change."""
    parts = (_leadership, _telemetry, _policy, _advice, _calibration, _lengths, _detection, _verdicts)
    return [figure for part in parts for figure in part(coordinator)]


def _leadership(coordinator: Coordinator) -> list[Figure]:
    current, controller = coordinator.chair.current, coordinator.controller
    leads = current is not None and current.fence.is_leading()
    snapshot = controller.snapshot
    nodes = Counter(view.state.value for view in snapshot.nodes.values()) if leads else Counter[str]()
    replicas = Counter(each.status.state.value for each in snapshot.replicas.values()) if leads else Counter[str]()
    return [
        Figure(name="leading", help="1 while this coordinator leads", values={"": float(leads)}),
        Figure(name="term", help="Of its leadership", values={"": float(current.fence.term if current else 0)}),
        Figure(name="nodes", help="By state", values={k: float(v) for k, v in nodes.items()}, label="state"),
        Figure(name="replicas", help="By state", values={k: float(v) for k, v in replicas.items()}, label="state"),
        Figure(name="agents", help="Open streams", values={"": float(len(coordinator.agents.sessions()))}),
        Figure(name="loop_lag_seconds", help="Of the event loop", values={"": controller.loop_lag_s}),
        Figure(name="rounds", help="Of reconciling", values={"": float(controller.rounds)}, counter=True),
    ]


def _telemetry(coordinator: Coordinator) -> list[Figure]:
    telemetry, rollups = coordinator.telemetry, coordinator.rollups.figures
    rejected = {reason: float(count) for reason, count in dict(telemetry.rejected).items()}
    dropped = {reason: float(count) for reason, count in dict(rollups.dropped).items()}
    undone = {chore: float(count) for chore, count in dict(coordinator.housekeeping_figures.failures).items()}
    return [
        Figure(name="chores_failed", help="Of housekeeping", values=undone, label="chore", counter=True),
        Figure(name="frames", help="Taken in", values={"": float(telemetry.frames)}, counter=True),
        Figure(name="samples", help="Taken in", values={"": float(telemetry.samples)}, counter=True),
        Figure(
            name="rejected", help="Frames and figures that were refused", values=rejected, label="reason", counter=True
        ),
        Figure(name="rollups", help="Minutes of nodes written", values={"": float(rollups.written)}, counter=True),
        Figure(
            name="rollups_dropped", help="Minutes of nodes not kept", values=dropped, label="reason", counter=True
        ),
    ]


def _policy(coordinator: Coordinator) -> list[Figure]:
    process, loop = coordinator.policies.figures, coordinator.policy_figures
    decisions = {action: float(count) for action, count in dict(loop.decisions).items()}
    recorded = coordinator.recorder.figures
    dropped = {reason: float(count) for reason, count in dict(recorded.dropped).items()}
    return [
        Figure(name="situations", help="Recorded for replay", values={"": float(recorded.written)}, counter=True),
        Figure(
            name="situations_dropped", help="Not recorded, or given up for newer ones", values=dropped, label="reason",
            counter=True,
        ),
        Figure(name="policy_calls", help="Observations asked", values={"": float(process.calls)}, counter=True),
        Figure(name="policy_starts", help="Child processes begun", values={"": float(process.starts)}, counter=True),
        Figure(name="policy_timeouts", help="Killed as hung", values={"": float(process.timeouts)}, counter=True),
        Figure(name="policy_crashes", help="Ended by themselves", values={"": float(process.crashes)}, counter=True),
        Figure(name="decisions", help="Recorded", values=decisions, label="action", counter=True),
    ]  # fmt: skip


def _advice(coordinator: Coordinator) -> list[Figure]:
    loop = coordinator.advice_figures
    outcomes = {outcome: float(count) for outcome, count in dict(loop.outcomes).items()}
    return [
        Figure(name="advice_looks", help="At better configurations", values={"": float(loop.looks)}, counter=True),
        Figure(name="advice_failures", help="Looks that failed", values={"": float(loop.failures)}, counter=True),
        Figure(name="advice_outcomes", help="Of looks", values=outcomes, label="outcome", counter=True),
    ]


def _calibration(coordinator: Coordinator) -> list[Figure]:
    leading = coordinator.chair.current
    loop = leading.calibration if leading is not None else None
    if loop is None:
        return []
    known = {
        name.removeprefix("calibrations/"): found
        for name, value in loop.calibrations.copy().items()
        if (found := restored(value)) is not None
    }
    factors = {name: each.factor for name, each in known.items()}
    spreads = {name: each.spread for name, each in known.items()}
    steps, writes = float(loop.figures.steps), float(loop.figures.writes)
    failures = float(loop.figures.failures)
    return [
        Figure(
            name="calibration_factor",
            help="Measured steps over those of the kernel tables, by GPU type and model",
            values=factors,
            label="calibration",
        ),
        Figure(
            name="calibration_spread",
            help="Relative standard deviation of predicted steps",
            values=spreads,
            label="calibration",
        ),
        Figure(name="calibration_steps", help="Mean steps learnt from", values={"": steps}, counter=True),
        Figure(name="calibration_writes", help="Into the store", values={"": writes}, counter=True),
        Figure(name="calibration_failures", help="Rounds without effect", values={"": failures}, counter=True),
    ]


def _lengths(coordinator: Coordinator) -> list[Figure]:
    loop = coordinator.learning_figures
    return [
        Figure(name="length_answers", help="Learned from", values={"": float(loop.answers)}, counter=True),
        Figure(
            name="length_other_methods",
            help="Answers whose vectors were made otherwise",
            values={"": float(loop.other_methods)},
            counter=True,
        ),
        Figure(name="length_failures", help="Lessons that failed", values={"": float(loop.failures)}, counter=True),
    ]


def _detection(coordinator: Coordinator) -> list[Figure]:
    loop, process = coordinator.detection_figures, coordinator.detector.figures
    dropped = {reason: float(count) for reason, count in dict(coordinator.inbox.dropped).items()}
    rejected = {reason: float(count) for reason, count in dict(loop.rejected).items()}
    opened = {kind: float(count) for kind, count in dict(loop.episodes).items()}
    return [
        Figure(name="detection_steps", help="Of the fleet, judged", values={"": float(loop.steps)}, counter=True),
        Figure(name="detection_step_seconds", help="Of the newest round", values={"": loop.took_s}),
        Figure(name="detection_seconds", help="In all rounds", values={"": loop.total_s}, counter=True),
        Figure(name="detection_failures", help="Rounds in vain", values={"": float(loop.failures)}, counter=True),
        Figure(name="detection_starts", help="Child processes begun", values={"": float(process.starts)}, counter=True),
        Figure(
            name="detection_dropped_frames", help="Not taken in", values=dropped, label="reason", counter=True
        ),
        Figure(
            name="detection_rejected_frames", help="Left out by the detector", values=rejected, label="reason",
            counter=True,
        ),
        Figure(
            name="detection_omitted", help="Findings over the bound of an answer", values={"": float(loop.omitted)},
            counter=True,
        ),
        Figure(name="episodes_opened", help="By verdict", values=opened, label="verdict", counter=True),
    ]  # fmt: skip


def _verdicts(coordinator: Coordinator) -> list[Figure]:
    leading = coordinator.chair.current
    detection = leading.detection if leading is not None else None
    if leading is None or detection is None:
        return []
    standing = {**dict(leading.verdicts), **dict(detection.verdicts)}
    scores: dict[tuple[str, ...], float] = {
        (name, each.kind.value, each.cause): each.score or 1.0
        for name, each in standing.items() if each.kind is not VerdictKind.NORMAL
    }  # fmt: skip
    episodes = Counter(each.verdict.value for each in dict(detection.open_episodes).values())
    return [
        Figure(
            name="verdict",
            help="Score of the verdict on an object that is not NORMAL; 1 where the detector gives no score",
            values=scores,
            label=("object", "verdict", "cause"),
        ),
        Figure(
            name="open_episodes", help="By verdict", values={k: float(v) for k, v in episodes.items()}, label="verdict"
        ),
        Figure(
            name="false_alarms_per_replica_day",
            help="Episodes that users called false, by replica and day of model time watched in this term",
            values={"": detection.false_alarm_rate},
        ),
    ]  # fmt: skip
