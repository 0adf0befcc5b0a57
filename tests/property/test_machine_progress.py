"""The hang watch under arbitrary timing: a stopped engine is always found, a working one never suspected."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from enova_agent.core.progress import Activity, HangLimits, Judgement, Observation, Verdict, Watch, judge
from enova_testing.examples import examples

LIMITS = HangLimits()
SERVER, CORE = 1, 2
_TICKS = st.lists(st.floats(0.05, 0.6), min_size=1, max_size=40)


@dataclass
class Engine:
    """One engine in virtual time: it answers canaries and moves its counters unless it is stopped."""

    held: int | None
    running: float | None
    scraped: bool
    answer_s: float = 0.1          # how long a canary takes
    counts: bool = True            # its counters move while it runs something
    share: float = 0.5             # of a core that its worker uses while it runs something
    spins: bool = False            # it uses that share even when stopped elsewhere
    now_s: float = 0.0
    iterations: float = 0.0
    cpu_s: float = 0.0
    since_s: float | None = None
    ok_s: float | None = None
    watch: Watch = field(default_factory=lambda: Watch.begin(0.0))
    judgement: Judgement = field(default_factory=lambda: Judgement(verdict=Verdict.NORMAL))

    def tick(self, step_s: float, *, stopped: bool) -> Verdict:
        self.now_s += step_s
        if not stopped and self.counts and self.running:
            self.iterations += 1.0
        if not stopped or self.spins:
            self.cpu_s += self.share * step_s
        if self.judgement.wants_canary and self.since_s is None:
            self.since_s = self.now_s
        if self.since_s is not None and not stopped and self.now_s - self.since_s >= self.answer_s:
            self.since_s, self.ok_s = None, self.now_s
        activity = Activity(
            time_s=self.now_s, server_pid=SERVER, cpu_s={SERVER: 0.01 * self.now_s, CORE: self.cpu_s},
            stopped=(CORE,) if stopped else (),
        )
        self.watch, self.judgement = judge(
            self.watch,
            Observation(
                now_s=self.now_s, marks=(self.iterations,) if self.scraped else None,
                running=self.running if self.scraped else None, held=self.held, silent_s=100.0,
                canary_since_s=self.since_s, canary_ok_s=self.ok_s,
                activity=activity if self.judgement.wants_activity else None,
            ),
            LIMITS,
        )
        return self.judgement.verdict


_ENGINES = st.builds(
    Engine,
    held=st.one_of(st.none(), st.integers(0, 300)),
    running=st.sampled_from([0.0, 1.0, 256.0]),
    scraped=st.booleans(),
    spins=st.booleans(),
)


@examples()  # a loaded machine is slow, not wrong
@given(_ENGINES, _TICKS, st.floats(0.0, 30.0))
def test_a_stopped_engine_is_found_within_ten_seconds_whatever_it_did(
    engine: Engine, ticks: list[float], healthy_s: float
) -> None:
    steps = 0
    while engine.now_s < healthy_s:
        engine.tick(ticks[steps % len(ticks)], stopped=False)
        steps += 1
    stopped_s = engine.now_s
    verdicts = []
    while engine.now_s < stopped_s + 10.0:
        verdicts.append(engine.tick(ticks[steps % len(ticks)], stopped=True))
        steps += 1
    assert Verdict.HUNG in verdicts
    assert Verdict.SUSPECT in verdicts
    assert verdicts.index(Verdict.SUSPECT) < verdicts.index(Verdict.HUNG)


@examples()
@given(_ENGINES, _TICKS, st.booleans(), st.floats(0.06, 4.0), st.floats(0.1, 400.0))
def test_an_engine_that_computes_is_never_suspected(
    engine: Engine, ticks: list[float], counts: bool, share: float, answer_s: float
) -> None:
    engine.counts, engine.share, engine.answer_s = counts, share, answer_s
    steps = 0
    while engine.now_s < 120.0:
        assert engine.tick(ticks[steps % len(ticks)], stopped=False) is Verdict.NORMAL
        steps += 1


@examples()
@given(_ENGINES, _TICKS)
def test_an_engine_that_goes_on_heals_or_never_was_a_suspect(engine: Engine, ticks: list[float]) -> None:
    steps, was_suspect = 0, False
    while engine.now_s < 4.0:
        was_suspect = engine.tick(ticks[steps % len(ticks)], stopped=True) is Verdict.SUSPECT
        steps += 1
    begun_s, verdicts = engine.now_s, []
    while engine.now_s < begun_s + 10.0:
        verdicts.append(engine.tick(ticks[steps % len(ticks)], stopped=False))
        steps += 1
    assert verdicts[-1] is Verdict.NORMAL
    assert Verdict.HUNG not in verdicts
    assert (Verdict.HEALED in verdicts) == (was_suspect or Verdict.SUSPECT in verdicts)
