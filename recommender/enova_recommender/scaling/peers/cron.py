"""Replicas by the hour of the day, as an operator writes them after looking at last week: gpustack's schedule (P14).

gpustack: inside a rule's window its replicas hold (of several, the rule whose window began last; of equal ones the
larger), else the baseline. There is no published schedule: here each hour of the day has one rule, the replicas that
its highest minute on the days before needed, written anew at each midnight; the baseline is the least of them.
Formula: R(hour) = ceil(knob x highest minute of that hour / requests_per_s of one replica). Knob: that factor.
Missing minutes are left out; hours nobody saw have the baseline; before a whole day is known, the target stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from enova_recommender.scaling.peers.answers import answer, keep, number, numbers
from enova_recommender.scaling.peers.sights import whole
from enova_recommender.scaling.situation import Decided, Demand, Memory, Situation

HOUR_S = 3600.0
DAY_S = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cron:
    """The reimplemented policy."""

    name: str = "cron"
    knob: float = 1.0
    interval_s: float = 60.0

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """The replicas of this hour."""
        day = situation.now_s // DAY_S
        rules = numbers(memory, "replicas")
        if not rules or number(memory, "day", -1.0) < day:
            rules = self._rules(situation) or rules
        if not rules:
            return keep(situation, reason="no whole day of history to write a schedule from", memory={}, missing=True)
        hour = int(situation.now_s % DAY_S // HOUR_S)
        reason = f"the schedule has {rules[hour]:.0f} replicas from {hour}:00"
        return answer(situation, int(rules[hour]), reason=reason, memory={"replicas": rules, "day": day})

    def _rules(self, situation: Situation) -> tuple[float, ...]:
        peaks = _hourly_peaks(situation.history)
        if not peaks:
            return ()
        one = situation.variants[0].capacity.requests_per_s.value
        baseline = min(peaks.values())
        return tuple(float(whole(self.knob * peaks.get(hour, baseline) / one)) for hour in range(24))


def _hourly_peaks(history: Demand) -> dict[int, float]:
    """Requests a second in the highest minute of each hour of the day; empty without a whole day."""
    known = ~np.isnan(history.arrived)
    if known.sum() * history.step_s < DAY_S:
        return {}
    begins_s = history.end_s - history.step_s * np.arange(history.arrived.size, 0, -1)
    hours = (begins_s % DAY_S // HOUR_S).astype(int)
    rates = history.arrived / history.step_s
    return {int(hour): float(rates[known & (hours == hour)].max()) for hour in np.unique(hours[known])}
