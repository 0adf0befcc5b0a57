"""Hang detection in virtual time: found in ten seconds, and never mistaken for hard work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from enova_agent.core.progress import Activity, HangLimits, Judgement, Observation, Verdict, Watch, judge

TICK_S = 0.25
SCRAPE_S = 1.0
SERVER, CORE, WORKER = 10, 11, 12
LIMITS = HangLimits()


@dataclass
class World:
    """An engine with its agent, in virtual time: scraped each second, asked when the watch wants it.

    `works(now)`: its core makes iterations; `computes(now)`: its worker burns CPU; `stopped(now)`: in state T.
    """

    works: Callable[[float], bool] = lambda _: True
    computes: Callable[[float], bool] = lambda _: False
    stopped: Callable[[float], bool] = lambda _: False
    held: Callable[[float], int | None] = lambda _: 0
    running: Callable[[float], float] = lambda _: 0.0
    scrapes: Callable[[float], bool] = lambda _: True
    gpu: Callable[[float], float | None] = lambda _: None
    server_share: float = 0.02
    spins: bool = False            # workers burn CPU while they wait, as tensor parallel ones do
    iterations: float = 0.0
    cpu_s: dict[int, float] = field(default_factory=lambda: {SERVER: 0.0, CORE: 0.0, WORKER: 0.0})
    verdicts: list[tuple[float, Verdict]] = field(default_factory=list)
    canaries: int = 0
    reason: str = ""

    def run(self, until_s: float) -> World:
        watch, judgement = Watch.begin(0.0), Judgement(verdict=Verdict.NORMAL)
        since_s: float | None = None
        ok_s: float | None = None
        marks: tuple[float | None, ...] | None = None
        running: float | None = None
        for tick in range(1, int(until_s / TICK_S) + 1):
            now_s = tick * TICK_S
            self._advance(now_s)
            if judgement.wants_canary and since_s is None:
                since_s = now_s
                self.canaries += 1
            if since_s is not None and self.works(now_s) and not self.stopped(now_s) and now_s > since_s:
                since_s, ok_s = None, now_s
            if tick % int(SCRAPE_S / TICK_S) == 0:
                scraped = self.scrapes(now_s)
                marks = (self.iterations,) if scraped else None
                running = self.running(now_s) if scraped else None
            watch, judgement = judge(
                watch,
                Observation(
                    now_s=now_s, marks=marks, running=running, held=self.held(now_s), silent_s=now_s,
                    canary_since_s=since_s, canary_ok_s=ok_s,
                    activity=self._activity(now_s) if judgement.wants_activity else None,
                ),
                LIMITS,
            )
            if not self.verdicts or self.verdicts[-1][1] is not judgement.verdict:
                self.verdicts.append((now_s, judgement.verdict))
            self.reason = judgement.reason or self.reason
        return self

    def _advance(self, now_s: float) -> None:
        if self.works(now_s) and self.running(now_s) > 0 and not self.stopped(now_s):
            self.iterations += 1
        self.cpu_s[SERVER] += self.server_share * TICK_S
        if (self.computes(now_s) and not self.stopped(now_s)) or self.spins:
            self.cpu_s[WORKER] += TICK_S

    def _activity(self, now_s: float) -> Activity:
        stopped = (CORE,) if self.stopped(now_s) else ()
        return Activity(
            time_s=now_s, server_pid=SERVER, cpu_s=dict(self.cpu_s), stopped=stopped, gpu_utilization=self.gpu(now_s)
        )

    def first(self, verdict: Verdict) -> float | None:
        return next((time_s for time_s, found in self.verdicts if found is verdict), None)


def after(start_s: float) -> Callable[[float], bool]:
    return lambda now_s: now_s >= start_s


def never(_: float) -> bool:
    return False


@pytest.mark.parametrize("offset_s", [0.0, 0.6, 1.3, 1.9, 2.4])
def test_a_stopped_core_of_an_idle_engine_is_found_within_ten_seconds(offset_s: float) -> None:
    world = World(stopped=after(20.0 + offset_s), works=lambda now: now < 20.0 + offset_s).run(40.0)
    suspect_s, hung_s = world.first(Verdict.SUSPECT), world.first(Verdict.HUNG)
    assert suspect_s is not None
    assert hung_s is not None
    assert 20.0 + offset_s < suspect_s < hung_s <= 30.0 + offset_s
    assert "stopped processes: 11" in world.reason


@pytest.mark.parametrize("frozen_running", [0.0, 4.0])
@pytest.mark.parametrize("spins", [False, True])
def test_a_stopped_core_of_a_busy_engine_is_found_whatever_the_gauge_says_and_the_workers_burn(
    frozen_running: float, spins: bool
) -> None:
    world = World(
        stopped=after(20.0), held=lambda _: 4, running=lambda now: 4.0 if now < 20.0 else frozen_running, spins=spins
    ).run(40.0)
    hung_s = world.first(Verdict.HUNG)
    assert hung_s is not None
    assert 20.0 < hung_s <= 30.0


def test_a_deadlocked_core_that_is_not_stopped_is_found_while_its_server_answers_probes() -> None:
    world = World(works=lambda now: now < 20.0, held=lambda _: 4, running=lambda _: 4.0, server_share=0.1).run(40.0)
    hung_s = world.first(Verdict.HUNG)
    assert hung_s is not None
    assert hung_s <= 30.0
    assert "4 requests are held" in world.reason


def test_a_prefill_of_300_seconds_is_never_a_suspicion() -> None:
    # No token, no iteration counted for 300 s: only the worker's CPU time moves.
    world = World(works=never, computes=lambda _: True, held=lambda _: 1, running=lambda _: 1.0).run(300.0)
    assert [verdict for _, verdict in world.verdicts] == [Verdict.NORMAL]
    assert world.canaries == 0


def test_a_prefill_of_300_seconds_on_gpus_that_leave_the_cpu_idle_is_never_a_suspicion() -> None:
    world = World(works=never, held=lambda _: 1, running=lambda _: 1.0, gpu=lambda _: 0.98).run(300.0)
    assert [verdict for _, verdict in world.verdicts] == [Verdict.NORMAL]


def test_a_prefill_for_a_client_that_bypasses_the_ingress_is_never_a_suspicion() -> None:
    # The ingress holds nothing, so a canary is asked; it waits behind the prefill without harm.
    world = World(works=never, computes=lambda _: True, running=lambda _: 1.0).run(300.0)
    assert [verdict for _, verdict in world.verdicts] == [Verdict.NORMAL]
    assert world.canaries == 1


def test_saturation_is_never_a_suspicion_and_sends_no_canary() -> None:
    world = World(held=lambda _: 500, running=lambda _: 500.0).run(24 * 60.0)
    assert [verdict for _, verdict in world.verdicts] == [Verdict.NORMAL]
    assert world.canaries == 0


def test_saturation_with_a_metrics_page_that_times_out_is_never_a_suspicion() -> None:
    world = World(held=lambda _: 500, computes=lambda _: True, scrapes=never).run(300.0)
    assert [verdict for _, verdict in world.verdicts] == [Verdict.NORMAL]


def test_a_client_that_reads_slowly_is_told_from_a_hang_by_a_canary() -> None:
    # All is generated, the ingress still holds the request, the engine rightly runs nothing.
    world = World(held=lambda _: 1, running=lambda _: 0.0).run(120.0)
    assert [verdict for _, verdict in world.verdicts] == [Verdict.NORMAL]
    assert world.canaries > 10


def test_an_idle_engine_is_asked_every_few_seconds_and_stays_normal() -> None:
    world = World().run(600.0)
    assert [verdict for _, verdict in world.verdicts] == [Verdict.NORMAL]
    assert 600 / 4 < world.canaries < 600 / 2


def test_a_suspect_heals_when_it_goes_on() -> None:
    world = World(stopped=lambda now: 20.0 <= now < 24.5, held=lambda _: 2, running=lambda _: 2.0).run(40.0)
    assert [verdict for _, verdict in world.verdicts] == [
        Verdict.NORMAL, Verdict.SUSPECT, Verdict.HEALED, Verdict.NORMAL,
    ]


def test_an_engine_that_spins_without_progress_is_given_up_after_the_long_limit() -> None:
    world = World(works=never, computes=lambda _: True, held=lambda _: 1, running=lambda _: 1.0).run(1000.0)
    assert world.first(Verdict.SUSPECT) == pytest.approx(600.0, abs=3.0)
    assert world.first(Verdict.HUNG) == pytest.approx(900.0, abs=3.0)


def test_unknown_activity_never_counts_against_an_engine() -> None:
    watch, verdicts = Watch.begin(0.0), set()
    for tick in range(1, 400):
        observation = Observation(now_s=tick * TICK_S, marks=(1.0,), running=1.0, held=1, silent_s=60.0)
        watch, judgement = judge(watch, observation, LIMITS)
        verdicts.add(judgement.verdict)
        assert judgement.wants_activity or tick * TICK_S < 2.0
    assert verdicts == {Verdict.NORMAL}


def test_time_in_which_the_agent_stood_still_counts_for_nobody() -> None:
    watch = Watch.begin(0.0)
    frozen = Activity(time_s=0.0, server_pid=SERVER, cpu_s={SERVER: 1.0, CORE: 1.0})
    for now_s in (1.0, 2.0, 62.0, 62.25):
        watch, judgement = judge(
            watch,
            Observation(now_s=now_s, marks=(1.0,), running=1.0, held=1, silent_s=60.0, activity=frozen),
            LIMITS,
        )
        assert judgement.verdict is Verdict.NORMAL
