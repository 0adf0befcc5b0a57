"""ServerlessLLM's router: instances by requests in flight (P13).

Formula, each 1 s: desired = ceil(requests in flight / target), target 2. More at once; less at once as well, but only
instances that have been idle for keep_alive (0 s) go. From zero and to zero within the bounds (published: 0 to 10).
Missing: an instance that does not report adds nothing, and is not idle. Knob: target / knob.
Source: ServerlessLLM, sllm/routers/roundrobin_router.py (2; the command line's file says 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from enova_recommender.scaling.peers.answers import answer
from enova_recommender.scaling.peers.sights import concurrency, measured, unready, whole
from enova_recommender.scaling.situation import Decided, Memory, Situation

TARGET = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerlessLlm:
    """The reimplemented policy."""

    name: str = "serverless-llm"
    target: float = TARGET
    interval_s: float = 1.0

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """One look of the router."""
        held = measured(concurrency(situation, window_s=self.interval_s))
        total = sum(held) + situation.held
        desired, current = whole(total / self.target), situation.target
        idle = sum(one == 0 for one in held) + unready(situation)
        reason = f"{total:.3g} requests in flight at {self.target:.3g} an instance ask for {desired}, {idle} are idle"
        wish = desired if desired >= current else max(desired, current - idle)
        return answer(situation, wish, reason=reason, memory=memory, zero=True)


def serverless_llm(knob: float) -> ServerlessLlm:
    """With the published target over the knob."""
    return ServerlessLlm(target=TARGET / knob)
