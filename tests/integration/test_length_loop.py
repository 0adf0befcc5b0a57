"""The leader learns limits in a child process: kinds to rules, files that outlive it, children that do not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from enova_common.prompt_vectors import METHOD, Projection, vectorise
from enova_coordinator.core.lengths import DIMENSION, projection_seed
from enova_coordinator.core.model import (
    Deployment,
    DeploymentSpec,
    MaxTokensMode,
    MaxTokensPolicy,
    Snapshot,
    Variant,
)
from enova_coordinator.core.routes import LengthRules
from enova_coordinator.core.series import LengthFigures, NodeFrame
from enova_coordinator.known_models import KnownModels
from enova_coordinator.length_loop import LengthLoop
from enova_coordinator.policy_process import PolicyProcess
from enova_coordinator.telemetry import Telemetry, TelemetryLimits

pytestmark = pytest.mark.network  # a child process

NAME = "deployments/d"
MODEL = "meta-llama/Llama-3.1-8B-Instruct"


def _snapshot(mode: MaxTokensMode = MaxTokensMode.APPLY, *, uid: str = "u1", cut_share: float = 0.1) -> Snapshot:
    spec = DeploymentSpec(model=MODEL, max_tokens_policy=MaxTokensPolicy(mode=mode, cut_share=cut_share))
    variant = Variant(name=f"{NAME}/variants/v1", deployment=NAME, model=MODEL, served_names=("d",),
                      configuration={"max_model_len": 4096})  # fmt: skip
    return Snapshot(
        revision=1, deployments={NAME: Deployment(name=NAME, uid=uid, spec=spec)}, variants={variant.name: variant}
    )


def _answers(kind: str, count: int, *, median: float, seed: int, method: int = METHOD) -> list[LengthFigures]:
    """Prompts of one kind with words of their own, and how long their answers were."""
    draw = np.random.default_rng(seed)
    deployment = _snapshot().deployments[NAME]
    projection = Projection(seed=projection_seed(deployment), dimension=DIMENSION)
    lengths = np.ceil(median * np.exp(draw.normal(0.0, 0.3, count))).astype(int).tolist()
    return [
        LengthFigures(NAME, method, vectorise(f"{kind} item{draw.integers(20)}", projection), tokens, stopped=False)
        for tokens in lengths
    ]


SUMS = "a shop sells apples at three dollars each; how many dollars does Tom pay for several of them"
CODE = "write a python function that takes a list and returns another list sorted by some key"


@dataclass
class Fleet:
    """A controller, telemetry and a child process; nothing moves but by `round`."""

    folder: Path
    process: PolicyProcess
    snapshot: Snapshot = field(default_factory=_snapshot)
    rules: Mapping[str, LengthRules] = field(default_factory=dict)
    told: int = 0
    sequence: int = 0
    now_s: float = 1000.0
    telemetry: Telemetry = field(init=False)
    loop: LengthLoop = field(init=False)

    def __post_init__(self) -> None:
        self.telemetry = Telemetry(TelemetryLimits(), now_s=lambda: 1.0, owns=lambda *_: True)
        self.new_leader()

    def new_leader(self) -> None:
        models = KnownModels(now_s=lambda: 0.0)
        self.loop = LengthLoop(
            self, self.telemetry, models, self.process, folder=self.folder, monotonic_s=lambda: self.now_s
        )

    def set_length_rules(self, rules: Mapping[str, LengthRules]) -> None:
        self.told += rules != self.rules
        self.rules = rules

    async def round(self, *answers: LengthFigures) -> None:
        if not self.loop.figures.rounds:
            await self.loop.round()  # only then are lengths wanted
        self.sequence += 1
        frame = NodeFrame("nodes/n", "b", self.sequence, 0.0, 1.0, [], [], [], lengths=answers)
        self.telemetry.add(frame, sender="nodes/n")
        await self.loop.round()

    @property
    def limits(self) -> list[int]:
        return sorted(kind.limit_tokens for kind in self.rules[NAME].kinds)


@contextlib.asynccontextmanager
async def _fleet(folder: Path) -> AsyncIterator[Fleet]:
    process = PolicyProcess(timeout_s=60.0, work="lengths")
    try:
        yield Fleet(folder / "lengths", process)
    finally:
        await process.close()


def _two_kinds(seed: int = 1) -> list[LengthFigures]:
    both = _answers(SUMS, 160, median=50, seed=seed) + _answers(CODE, 160, median=400, seed=seed + 1)
    return [both[place] for place in np.random.default_rng(seed).permutation(len(both))]


async def test_two_kinds_of_answers_become_two_rules(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.round()
        before = fleet.rules[NAME]
        assert (before.apply, before.kinds, before.context_tokens) == (False, (), 4096)
        await fleet.round(*_two_kinds())
        rules = fleet.rules[NAME]
        assert rules.apply
        assert rules.seed == before.seed
        short, long = fleet.limits
        assert short == pytest.approx(50 * np.exp(0.3 * 1.2816), rel=0.2)
        assert long == pytest.approx(400 * np.exp(0.3 * 1.2816), rel=0.2)
        state = fleet.loop.states[NAME]
        assert [kind.answers for kind in state.limits.kinds] == pytest.approx([160, 160], abs=4)
        assert not state.reason
        told = fleet.told
        await fleet.round()
        assert fleet.told == told  # nothing new, nothing said


async def test_what_is_known_outlives_the_leader_and_its_child(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.round(*_two_kinds())
        limits = fleet.limits
        assert fleet.process.pid is not None
        os.kill(fleet.process.pid, signal.SIGKILL)
        await fleet.round(*_answers(SUMS, 5, median=50, seed=9))
        assert fleet.loop.figures.failures <= 1
        await fleet.round(*_answers(SUMS, 5, median=50, seed=10))
        assert fleet.limits == pytest.approx(limits, rel=0.1)
        fleet.new_leader()
        await fleet.round()
        assert fleet.limits == pytest.approx(limits, rel=0.1)
        fleet.snapshot = _snapshot(uid="u2")  # deleted and made anew: nothing of the old one counts
        fleet.new_leader()
        await fleet.round()
        assert fleet.rules[NAME].kinds == ()


async def test_the_file_holds_no_text_and_a_spoiled_one_is_begun_anew(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.round(*_two_kinds())
        path = tmp_path / "lengths" / "d.json"
        text = path.read_text().lower()
        assert not any(word in text for word in ("apples", "dollars", "python", "function"))
        assert set(json.loads(text)) == {"uid", "method", "knowledge"}
        path.write_text(text[:1000])
        fleet.new_leader()
        await fleet.round()
        assert fleet.rules[NAME].kinds == ()


async def test_switched_off_is_forgotten(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.round(*_two_kinds())
        fleet.snapshot = _snapshot(MaxTokensMode.OBSERVE)
        await fleet.round()
        assert not fleet.rules[NAME].apply
        assert fleet.loop.states[NAME].reason == "the policy observes only"
        fleet.snapshot = _snapshot(MaxTokensMode.OFF)
        await fleet.round(*_two_kinds())
        assert not fleet.rules
        assert not fleet.loop.states
        assert not list((tmp_path / "lengths").iterdir())


def _files(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")


def _left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_what_an_earlier_leader_left_of_others_is_removed_in_the_first_round(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.round(*_two_kinds())
        folder = tmp_path / "lengths"
        _files(folder, "gone.json", "gone.draft", "d.draft", "notes.txt")
        fleet.new_leader()
        await fleet.loop.round()
        assert _left(folder) == {"d.json", "notes.txt"}
        assert len(fleet.limits) == 2
        fleet.snapshot = _snapshot(MaxTokensMode.OFF)
        fleet.new_leader()
        await fleet.loop.round()
        assert _left(folder) == {"notes.txt"}


async def test_nothing_is_removed_before_the_store_was_read_or_where_it_cannot_be_read(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        folder = tmp_path / "lengths"
        _files(folder, "gone.json", "strange.json", "d.json")
        fleet.snapshot = Snapshot()
        await fleet.loop.round()
        assert _left(folder) == {"gone.json", "strange.json", "d.json"}
        fleet.snapshot = Snapshot(revision=1, unreadable=frozenset({"deployments/strange", f"{NAME}/variants/v1"}))
        await fleet.loop.round()
        assert _left(folder) == {"strange.json", "d.json"}


async def test_a_file_that_cannot_be_removed_costs_nothing_else_and_is_tried_again(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        folder = tmp_path / "lengths"
        _files(folder, "gone.json")
        (folder / "stuck.json" / "inside").mkdir(parents=True)  # no user can unlink a folder
        await fleet.loop.round()
        assert (fleet.loop.figures.failures, fleet.loop.figures.rounds) == (1, 1)
        assert _left(folder) == {"stuck.json"}
        assert NAME in fleet.rules
        (folder / "stuck.json" / "inside").rmdir()
        (folder / "stuck.json").rmdir()
        _files(folder, "stuck.json")
        await fleet.loop.round()
        assert _left(folder) == {"stuck.json"}
        fleet.now_s += 60
        await fleet.loop.round()
        assert _left(folder) == set()
        assert fleet.loop.figures.failures == 1


async def test_a_deployment_that_was_made_anew_removes_the_file_of_the_old_one(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.round(*_two_kinds())
        fleet.snapshot = _snapshot(uid="u2")
        await fleet.loop.round()
        assert _left(tmp_path / "lengths") == set()
        assert fleet.rules[NAME].kinds == ()


async def test_a_folder_that_cannot_be_listed_ends_no_term(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        (tmp_path / "lengths").write_text("a file where the folder belongs")
        await fleet.loop.round()
        assert fleet.loop.figures.rounds == 1
        assert fleet.loop.figures.failures >= 1


async def test_another_cut_share_gives_other_limits_of_the_same_answers(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.round(*_two_kinds())
        before = fleet.limits
        fleet.snapshot = _snapshot(cut_share=0.4)
        await fleet.round()
        assert all(after < 0.9 * old for old, after in zip(before, fleet.limits, strict=True))


async def test_vectors_of_another_kind_do_not_mix(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.round(*_two_kinds())
        strange = _answers(SUMS, 10, median=9000, seed=3, method=1_234_567)
        await fleet.round(*strange, *_answers(SUMS, 1, median=50, seed=4))
        assert fleet.loop.figures.other_methods == 10
        assert len(fleet.limits) == 2
        await fleet.round(*strange, replace_dimension(strange[0]))
        assert fleet.rules[NAME].method == 1_234_567
        assert fleet.rules[NAME].kinds == ()


def replace_dimension(sample: LengthFigures) -> LengthFigures:
    """The same with a vector that is too short."""
    return sample._replace(vector=sample.vector[:-1])


async def test_limits_wait_until_the_context_of_the_engines_is_known(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        variant = next(iter(fleet.snapshot.variants.values()))
        unknown = replace(variant, model="nobody/knows", configuration={})
        fleet.snapshot = replace(_snapshot(), variants={unknown.name: unknown})
        await fleet.round(*_two_kinds())
        assert fleet.rules[NAME].context_tokens == 0
        assert "context" in fleet.loop.states[NAME].reason
