"""The scaling rules that ENOVA 0.0.7 was released with, faithful and mended: the baseline that later work must beat.

Each decision asks twice. `detect` says whether something is wrong (a queue of 50 in each of the last three minutes; or
next to no use of batch and KV cache), `recover` what to run instead. The release returned no direction, looked at no
latency, and had no cool-down; nothing of that is added here.

Faithful: as released, defects included. With no success in the window it raises OverflowError; where nothing fits it
puts the utilization where the tensor-parallel size belongs. Mended, and nothing else: that swap; success 0 keeps the
replicas; missing stays missing; data older than three minutes mean no action; KV elements of the real model; the
recommended tensor-parallel size is applied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from enova_recommender.scaling.enova_007_model import (
    DTYPE_BYTES,
    MEMORY_SHARE,
    RECOVER_ACTIVATION_GIB,
    Layout,
    TableRow,
    head_divisors,
    lay_out,
    max_num_seqs,
    mended_row,
    one_sequence_bytes,
    released_row,
)
from enova_recommender.scaling.enova_007_window import (
    DATA_AGE_MAX_S,
    WINDOW_MINUTES,
    Array,
    data_age_s,
    summed,
)
from enova_recommender.scaling.types import (
    Action,
    EngineSizes,
    Evidence,
    Feature,
    Observation,
    Proposal,
    VerdictKind,
)

PENDING_OVERLOADED = 50        # requests, absolute, whatever the fleet
KV_IDLE_PERCENT = 10.0
BATCH_IDLE_SHARE = 0.1
KV_FULL_PERCENT = 90.0
BATCH_FULL_SHARE = 0.9
PERCENTILE = 90
_DECIDING = (Feature.PENDING, Feature.KV_USAGE, Feature.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The last three minutes of a deployment, its usable replicas added together; percent and share are means."""

    pending: Array
    running: Array
    kv_percent: Array
    counts: dict[Feature, int]
    up: bool

    @property
    def running_p90(self) -> float:
        """The 90th percentile of running requests of a replica."""
        return float(np.percentile(self.running, PERCENTILE))

    @property
    def kv_p90(self) -> float:
        """The 90th percentile of KV usage, in per cent."""
        return float(np.percentile(self.kv_percent, PERCENTILE))


@dataclass(frozen=True, slots=True)
class Enova007:
    """The released policy; `mended` chooses which of the two."""

    mended: bool

    @property
    def name(self) -> str:
        """The name in the deployment's `policy` field."""
        return "enova-0.0.7-mended" if self.mended else "enova-0.0.7-faithful"

    def decide(self, observation: Observation) -> Proposal:
        """Detect, and where something is wrong, recover."""
        missing = self._missing(observation) if self.mended else ""
        load = self._load(observation)
        if missing:
            return _keep(observation, VerdictKind.UNKNOWN, missing, _evidence(observation, load))
        verdict = detect(load, observation)
        if verdict is VerdictKind.NORMAL:
            reason = f"fewer than {PENDING_OVERLOADED} requests pend, and replicas are not idle"
            return _keep(observation, verdict, reason, _evidence(observation, load))
        return self._recover(observation, load, verdict)

    def row(self, observation: Observation) -> TableRow:
        """The model as this policy believes it to be."""
        model = observation.model
        return mended_row(model) if self.mended else released_row(model.framework, model.size_billion)

    def _missing(self, observation: Observation) -> str:
        for feature in _DECIDING:
            age_s = data_age_s(observation.series, feature, now_s=observation.now_s)
            if age_s > DATA_AGE_MAX_S:
                known = f"{age_s:.0f} s old" if math.isfinite(age_s) else "missing"
                return f"{feature.value} of a replica is {known}; the limit is {DATA_AGE_MAX_S:.0f} s"
            total, count = summed(observation.series, feature, hole=math.nan)
            if count != observation.replicas:
                return f"{feature.value} is usable of {count} of {observation.replicas} replicas"
            if np.isnan(total[-WINDOW_MINUTES:]).any():
                return f"{feature.value} has a gap in the last {WINDOW_MINUTES} minutes"
        return ""

    def _load(self, observation: Observation) -> Load:
        hole = math.nan if self.mended else 0.0
        sums = {feature: summed(observation.series, feature, hole=hole) for feature in _DECIDING}
        last = {feature: total[-WINDOW_MINUTES:] for feature, (total, _) in sums.items()}
        counts = {feature: count for feature, (_, count) in sums.items()}
        pending = last[Feature.PENDING]
        return Load(
            pending=pending,
            running=last[Feature.RUNNING] / max(counts[Feature.RUNNING], 1),
            kv_percent=last[Feature.KV_USAGE] / max(counts[Feature.KV_USAGE], 1),
            counts=counts,
            up=bool((pending >= PENDING_OVERLOADED).all()),
        )

    def _recover(self, observation: Observation, load: Load, verdict: VerdictKind) -> Proposal:
        evidence = _evidence(observation, load)
        if any(count != observation.replicas for count in load.counts.values()):
            return _keep(observation, verdict, "not every replica has a usable series", evidence)
        down = _idle_share(observation, load) < BATCH_IDLE_SHARE and load.kv_p90 < KV_IDLE_PERCENT
        row = self.row(observation)
        if load.up:
            return self._scale_up(observation, load, row, evidence)
        if not down:
            return _keep(observation, verdict, "detected as idle, but not by the 90th percentiles", evidence)
        replicas = math.ceil(observation.replicas / 2)
        recommended = replace(observation.configuration, max_num_seqs=max_num_seqs(row))
        reason = (
            f"KV usage p90 {load.kv_p90:.1f} % is under {KV_IDLE_PERCENT:.0f} % and {load.running_p90:.1f} requests "
            f"run in {observation.configuration.max_num_seqs} places: replicas are halved"
        )
        return self._proposal(
            observation, verdict, replicas=replicas, recommended=recommended, reason=reason, evidence=evidence
        )

    def _scale_up(
        self, observation: Observation, load: Load, row: TableRow, evidence: tuple[Evidence, ...]
    ) -> Proposal:
        verdict = VerdictKind.OVERLOADED
        layout = self._layout(observation, load, row)
        if layout is None:
            reason = "requests pend although neither batch nor KV cache is full: the figures may be wrong"
            return _keep(observation, verdict, reason, evidence)
        recommended = EngineSizes(
            tensor_parallel_size=layout.tensor_parallel_size,
            gpu_memory_utilization=layout.gpu_memory_utilization,
            max_num_seqs=max_num_seqs(row),
        )
        ratio = self._demand_ratio(observation)
        if ratio is None:
            reason = "requests pend, but no success was measured in the last three minutes: replicas are kept"
            kept = observation.replicas
            return self._proposal(
                observation, verdict, replicas=kept, recommended=recommended, reason=reason, evidence=evidence
            )
        replicas = _replicas_for(observation, row, layout, ratio)
        reason = (
            f"{load.pending.min():.0f} or more requests pend in each of the last {WINDOW_MINUTES} minutes "
            f"(limit {PENDING_OVERLOADED}); new/success is {ratio:.2f}"
        )
        evidence = (*evidence, Evidence(feature="new_per_success", value=ratio, threshold=1.0))
        return self._proposal(
            observation, verdict, replicas=replicas, recommended=recommended, reason=reason, evidence=evidence
        )

    def _layout(self, observation: Observation, load: Load, row: TableRow) -> Layout | None:
        """The layout for the KV cache that the load needs; None where the rule doubts its figures."""
        kv_need = _kv_need_bytes(observation, load, row)
        if kv_need is None:
            return None
        bound = one_sequence_bytes(row, activation_gib=RECOVER_ACTIVATION_GIB)
        layout = lay_out(max(kv_need + row.parameters * DTYPE_BYTES, bound), row, observation.gpu)
        if layout is not None:
            return layout
        divisor = max(head_divisors(row, observation.gpu.count), default=1)
        if self.mended:
            return Layout(tensor_parallel_size=divisor, gpu_memory_utilization=MEMORY_SHARE)
        # As released: each value lands in the other's variable, and a tensor-parallel size of int(0.9) is 0.
        return Layout(tensor_parallel_size=int(MEMORY_SHARE), gpu_memory_utilization=float(divisor))

    def _demand_ratio(self, observation: Observation) -> float | None:
        """New requests per success. None keeps the replicas (mended); the release divides by zero."""
        hole = math.nan if self.mended else 0.0
        new, success = (
            summed(observation.series, feature, hole=hole)[0][-WINDOW_MINUTES:]
            for feature in (Feature.NEW, Feature.SUCCESS)
        )
        new_p90 = float(np.percentile(new, PERCENTILE))
        success_p90 = float(np.percentile(success, PERCENTILE))
        if self.mended and (math.isnan(new_p90 + success_p90) or success_p90 == 0):
            return None
        return new_p90 / success_p90 if success_p90 > 0 else math.inf

    def _proposal(
        self,
        observation: Observation,
        verdict: VerdictKind,
        *,
        replicas: int,
        recommended: EngineSizes,
        reason: str,
        evidence: tuple[Evidence, ...],
    ) -> Proposal:
        # The release computed a configuration, but applied the number of replicas only.
        applied = observation.configuration
        if self.mended:
            applied = replace(applied, tensor_parallel_size=recommended.tensor_parallel_size)
        return Proposal(
            verdict=verdict,
            action=_action(observation, replicas, applied),
            replicas=replicas,
            configuration=applied,
            recommended=recommended,
            reason=reason,
            evidence=evidence,
        )


def detect(load: Load, observation: Observation) -> VerdictKind:
    """0.0.7's performance detection, with the direction that the release knew but did not return."""
    if load.up:
        return VerdictKind.OVERLOADED
    measured = min(load.counts.values()) > 0
    idle = bool(
        (load.kv_percent <= KV_IDLE_PERCENT).all()
        and (load.running <= BATCH_IDLE_SHARE * observation.configuration.max_num_seqs).all()
    )
    return VerdictKind.UNDERUSED if observation.replicas > 1 and measured and idle else VerdictKind.NORMAL


def _idle_share(observation: Observation, load: Load) -> float:
    return load.running_p90 / observation.configuration.max_num_seqs


def _kv_need_bytes(observation: Observation, load: Load, row: TableRow) -> float | None:
    kv, batch = load.kv_p90, _idle_share(observation, load)
    held = _kv_bytes(observation, row, observation.configuration)
    if kv < KV_FULL_PERCENT and batch < BATCH_FULL_SHARE:
        return None
    if kv > KV_FULL_PERCENT and batch < BATCH_FULL_SHARE:
        return held / batch if batch > 0 else math.inf
    if kv < KV_FULL_PERCENT and batch > BATCH_FULL_SHARE:
        return kv / 100 * held
    return held  # on either edge, too


def _kv_bytes(observation: Observation, row: TableRow, sizes: EngineSizes | Layout) -> float:
    """What a replica of these sizes has for its KV cache."""
    total = sizes.tensor_parallel_size * sizes.gpu_memory_utilization * observation.gpu.memory_bytes
    return total - row.parameters * DTYPE_BYTES


def _replicas_for(observation: Observation, row: TableRow, layout: Layout, ratio: float) -> int:
    """clip(ceil(old KV / new KV x new/success x R), R, GPUs // TP); OverflowError where the ratio is infinite."""
    current = observation.replicas
    if layout.tensor_parallel_size == 0:
        return current  # what does not fit needs no count: the release kept R, as its own run shows
    scale = _kv_bytes(observation, row, observation.configuration) / _kv_bytes(observation, row, layout)
    wanted = math.ceil(scale * ratio * current)
    return min(max(wanted, current), observation.gpu.count // layout.tensor_parallel_size)


def _action(observation: Observation, replicas: int, applied: EngineSizes) -> Action:
    if replicas > observation.replicas:
        return Action.SCALE_UP
    if replicas < observation.replicas:
        return Action.SCALE_DOWN
    return Action.KEEP if applied == observation.configuration else Action.RECONFIGURE


def _keep(
    observation: Observation, verdict: VerdictKind, reason: str, evidence: tuple[Evidence, ...]
) -> Proposal:
    return Proposal(
        verdict=verdict,
        action=Action.KEEP,
        replicas=observation.replicas,
        configuration=observation.configuration,
        reason=reason,
        evidence=evidence,
    )


def _evidence(observation: Observation, load: Load) -> tuple[Evidence, ...]:
    """The figures that decided; one that no replica measured, or not in each of the minutes, is left out."""
    places = BATCH_IDLE_SHARE * observation.configuration.max_num_seqs
    figures = (
        (Feature.PENDING, float(load.pending.min()), float(PENDING_OVERLOADED)),
        (Feature.KV_USAGE, float(load.kv_percent.max()), float(KV_IDLE_PERCENT)),
        (Feature.RUNNING, float(load.running.max()), places),
    )
    return tuple(
        Evidence(feature=feature.value, value=value, threshold=threshold)
        for feature, value, threshold in figures
        if load.counts[feature] > 0 and not math.isnan(value)
    )


FAITHFUL = Enova007(mended=False)
MENDED = Enova007(mended=True)
