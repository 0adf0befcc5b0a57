"""AIBrix's two pod autoscalers, on the mean KV usage of the pods (P3, P4).

APA, each 10 s: v = mean over pods and 180 s, ratio = v / T. Over 1.1: min(ceil(R x ratio), 2 R); under 0.9:
max(ceil(R x ratio), floor(R / 2)); else R.
KPA, each 10 s: v(180 s) and v(60 s); d(v) = ceil(v / T) outside T x (1 +- 0.1), else R; kept within
[floor(R / 2), max(1, 2 R)]. In panic (v(60) / v(180) > 2, or v(180) <= 0) the larger of both, else d(v(180)). v is
the mean of the pods although the formula treats it as a total, so that with KV usage it never asks for more than
ceil(1 / T): as shipped.
Both: more at once; less to the *smallest* wish of the last 300 s (one old low sample drags it down). No guard while
pods start. T = 0.5 (the shipped sample on gpu_cache_usage_perc). Missing: pods that do not report are left out of the
mean; with none R stays. Never to zero. Knob: T / knob.
Source: vllm-project/aibrix, pkg/controller/podautoscaler (scaler, algorithm, metrics client), samples/autoscaling.
"""

from __future__ import annotations

from dataclasses import dataclass

from enova_recommender.scaling.peers.answers import answer, keep, numbers
from enova_recommender.scaling.peers.sights import means, measured, whole
from enova_recommender.scaling.situation import Decided, Memory, Signal, Situation

TARGET = 0.5
STABLE_S, PANIC_S = 180.0, 60.0
TOLERANCE = 0.1
PANIC_RATIO = 2.0
UP_RATE, DOWN_RATE = 2.0, 2.0
DOWN_WINDOW_S = 300.0
INTERVAL_S = 10.0


def apa_wish(value: float, *, target: float, current: int) -> int:
    """Replicas by the mean of the pods."""
    ratio = value / target
    if ratio > 1 + TOLERANCE:
        return min(whole(current * ratio), whole(UP_RATE * current))
    if ratio < 1 - TOLERANCE:
        return max(whole(current * ratio), int(current // DOWN_RATE))
    return current


def kpa_wish(stable: float, panic: float, *, target: float, current: int) -> int:
    """Replicas by a slow and a fast window."""
    slow, fast = (_kpa_one(value, target, current) for value in (stable, panic))
    panicking = stable <= 0 or panic / stable > PANIC_RATIO
    return max(slow, fast) if panicking else slow


def cooled(
    wish: int, *, current: int, now_s: float, memory: Memory, key: str = ""
) -> tuple[int, dict[str, tuple[float, ...]]]:
    """A wish after the cooldown, and the wishes to remember."""
    times, wishes = numbers(memory, f"wished_at{key}"), numbers(memory, f"wished{key}")
    kept = [(at, one) for at, one in zip(times, wishes, strict=True) if at > now_s - DOWN_WINDOW_S]
    kept.append((now_s, float(wish)))
    after = int(min(one for _, one in kept)) if wish < current else wish
    return after, {f"wished_at{key}": tuple(at for at, _ in kept), f"wished{key}": tuple(one for _, one in kept)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Apa:
    """The reimplemented policy."""

    name: str = "aibrix-apa"
    target: float = TARGET
    interval_s: float = INTERVAL_S

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """One look."""
        usage = measured(means(situation, Signal.KV_CACHE_USAGE, window_s=STABLE_S))
        if not usage or situation.target == 0:
            return _without_figures(situation, memory)
        value = sum(usage) / len(usage)
        wish = apa_wish(value, target=self.target, current=situation.target)
        total, kept = cooled(wish, current=situation.target, now_s=situation.now_s, memory=memory)
        reason = f"KV usage {value:.3g} against {self.target:.3g} asks for {wish}"
        return answer(situation, total, reason=reason, memory=kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kpa:
    """The reimplemented policy."""

    name: str = "aibrix-kpa"
    target: float = TARGET
    interval_s: float = INTERVAL_S

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """One look."""
        slow = measured(means(situation, Signal.KV_CACHE_USAGE, window_s=STABLE_S))
        fast = measured(means(situation, Signal.KV_CACHE_USAGE, window_s=PANIC_S))
        if not slow or not fast or situation.target == 0:
            return _without_figures(situation, memory)
        stable, panic = sum(slow) / len(slow), sum(fast) / len(fast)
        wish = kpa_wish(stable, panic, target=self.target, current=situation.target)
        total, kept = cooled(wish, current=situation.target, now_s=situation.now_s, memory=memory)
        reason = f"KV usage {stable:.3g} in 180 s, {panic:.3g} in 60 s, against {self.target:.3g}: {wish}"
        return answer(situation, total, reason=reason, memory=kept)


def apa(knob: float) -> Apa:
    """With the shipped target over the knob."""
    return Apa(target=TARGET / knob)


def kpa(knob: float) -> Kpa:
    """With the shipped target over the knob."""
    return Kpa(target=TARGET / knob)


def _kpa_one(value: float, target: float, current: int) -> int:
    wished = current if abs(value / target - 1) <= TOLERANCE + 1e-12 else whole(value / target)
    return min(max(wished, int(current // DOWN_RATE)), max(1, whole(UP_RATE * current)))


def _without_figures(situation: Situation, memory: Memory) -> Decided:
    """A target of 0 means that autoscaling is off, and without figures there is nothing to go by; min still holds."""
    if situation.target < situation.bounds.min_replicas:
        return answer(situation, situation.target, reason="under the minimum", memory=memory)
    return keep(situation, reason="no pod reports its KV usage", memory=memory, missing=True)
