"""Kubernetes' horizontal pod autoscaler, on concurrency or on GPU utilisation (P2), and the rules that KEDA shares.

Each 15 s, with m the mean of the metric over the pods that report and T its target:
    ratio = m / T; |ratio - 1| <= 0.1 keeps R; else ceil(ratio x pods that report).
Pods that do not report count T when ratio < 1 and 0 when ratio > 1; pods not ready yet count 0 when ratio > 1, and are
left out otherwise. If that turns the direction round or lands within the tolerance, R stays. Without any figure: R.
Then: up at most to max(2 R, R + 4) per 15 s, no stabilisation; down to the *largest* wish of the last 300 s.
T is not published for LLM serving; as deployed guides do: concurrency 0.7 x max_num_seqs, GPU utilisation 60 %.
Knob: T / knob.
Source: kubernetes.io/docs, horizontal pod autoscaling, "algorithm details" and "configurable scaling behavior".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from enova_recommender.scaling.peers.answers import answer, keep, numbers
from enova_recommender.scaling.peers.sights import concurrency, means, measured, unready, whole
from enova_recommender.scaling.situation import Decided, Memory, Signal, Situation

SYNC_S = 15.0
TOLERANCE = 0.1
CONCURRENCY_SHARE = 0.7
GPU_UTILIZATION = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """Stabilisation windows and limits of one autoscaler. The sync period is that of the limits: none carries over."""

    up_window_s: float = 0.0
    down_window_s: float = 300.0
    up_share: float = 1.0
    up_pods: int = 4


DEFAULT_BEHAVIOUR = Behaviour()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """Replicas after the behaviour, and the wishes to remember."""

    replicas: int
    memory: dict[str, tuple[float, ...]]


def settled(
    wished: int, *, current: int, now_s: float, memory: Memory, behaviour: Behaviour = DEFAULT_BEHAVIOUR, key: str = ""
) -> Settled:
    """A wish after stabilisation and limits. `key` tells the autoscalers of several variants apart."""
    times_key, wishes_key = f"wished_at{key}", f"wished{key}"
    times, wishes = numbers(memory, times_key), numbers(memory, wishes_key)
    if not times:                      # the first sight of the object is remembered as a wish for what there is
        times, wishes = (now_s,), (float(current),)
    up = down = float(wished)
    for time_s, wish in zip(times, wishes, strict=True):
        if time_s > now_s - behaviour.up_window_s:
            up = min(up, wish)
        if time_s > now_s - behaviour.down_window_s:
            down = max(down, wish)
    stable = int(min(max(current, up), down))
    most = max(whole(current * (1 + behaviour.up_share)), current + behaviour.up_pods)
    window_s = max(behaviour.up_window_s, behaviour.down_window_s)
    kept = [(at, wish) for at, wish in zip(times, wishes, strict=True) if at > now_s - window_s]
    kept.append((now_s, float(wished)))
    remembered = {times_key: tuple(at for at, _ in kept), wishes_key: tuple(wish for _, wish in kept)}
    return Settled(replicas=min(stable, most), memory=remembered)


def wished_by_pods(values: Mapping[str, float], *, starting: int, current: int, target: float) -> int | None:
    """Replicas by a metric of each pod (NaN: it does not report); None where no pod reports."""
    known = [value for value in values.values() if not math.isnan(value)]
    if not known:
        return None
    silent = len(values) - len(known)
    ratio = sum(known) / len(known) / target
    starting = starting if ratio > 1 else 0
    if silent == 0 and starting == 0:
        return current if abs(ratio - 1) <= TOLERANCE + 1e-12 else whole(ratio * len(known))
    pods = len(known) + silent + starting
    filled = (sum(known) + (silent * target if ratio < 1 else 0.0)) / pods / target
    if abs(filled - 1) <= TOLERANCE + 1e-12 or (filled > 1) != (ratio > 1):
        return current
    wished = whole(filled * pods)
    return current if (wished > current) != (filled > 1) else wished


def wished_by_total(total: float, *, current: int, target: float) -> int:
    """Replicas by an external metric with a target average value: ceil(total / T) outside the tolerance."""
    if current > 0 and abs(total / (target * current) - 1) <= TOLERANCE + 1e-12:
        return current
    return whole(total / target)


def wished_by_value(value: float, *, current: int, target: float) -> int:
    """Replicas by one metric of the whole with a target value: ceil(R x value / T) outside the tolerance."""
    if abs(value / target - 1) <= TOLERANCE + 1e-12:
        return current
    return whole(current * value / target)


@dataclass(frozen=True, slots=True, kw_only=True)
class HorizontalPodAutoscaler:
    """The reimplemented policy, on one of the two metrics."""

    name: str
    signal: Signal                     # RUNNING stands for all requests that a pod has, waiting ones included
    target: float                      # of GPU utilisation; of concurrency the share of max_num_seqs
    interval_s: float = SYNC_S

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """One sync."""
        if self.signal is Signal.RUNNING:
            values = concurrency(situation, window_s=SYNC_S)
            target = self.target * situation.variants[0].capacity.max_num_seqs
        else:
            values = means(situation, self.signal, window_s=SYNC_S)
            target = self.target
        current = situation.target
        wished = wished_by_pods(values, starting=unready(situation), current=current, target=target)
        if wished is None:
            return keep(situation, reason="no pod reports its metric", memory=memory, missing=True)
        after = settled(wished, current=current, now_s=situation.now_s, memory=memory)
        known = measured(values)
        reason = f"mean {sum(known) / len(known):.3g} against {target:.3g} asks for {wished}"
        return answer(situation, after.replicas, reason=reason, memory=after.memory)


def hpa_concurrency(knob: float) -> HorizontalPodAutoscaler:
    """On requests per pod."""
    return HorizontalPodAutoscaler(name="hpa-concurrency", signal=Signal.RUNNING, target=CONCURRENCY_SHARE / knob)


def hpa_gpu(knob: float) -> HorizontalPodAutoscaler:
    """On GPU utilisation."""
    target = GPU_UTILIZATION / knob
    return HorizontalPodAutoscaler(name="hpa-gpu", signal=Signal.GPU_UTILIZATION, target=target)
