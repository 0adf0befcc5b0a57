"""The leader's learning of limits on answers: lengths that ingresses reported to rules that their routes bear.

Each round takes, for every deployment that asks for it, the answers that came since the last, and has its own child
process learn from them; nothing here computes. What is known lies in a file of this coordinator, written at most once a
minute, so that its restart costs nothing; another leader learns anew, with the same projection. A deployment that is
switched off, or gone, is forgotten, its file included: in its first round, and then each minute, a leader removes all
files but those of deployments that want them, or that it cannot read; so does a coordinator that led before, as long as
another one leads. Vectors and lengths are all that there is: no text comes here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from enova_common.errors import EnovaError
from enova_common.prompt_vectors import METHOD
from enova_coordinator.core.lengths import (
    DIMENSION,
    LengthState,
    context_tokens,
    projection_seed,
    rules_of,
    steady,
    why_unlimited,
)
from enova_coordinator.core.model import Deployment, MaxTokensMode, Snapshot
from enova_coordinator.core.routes import LengthRules
from enova_coordinator.core.series import LengthFigures
from enova_coordinator.known_models import KnownModels
from enova_coordinator.policy_process import PolicyProcess
from enova_coordinator.telemetry import Telemetry
from enova_recommender.recommend.max_tokens import (
    Knowledge,
    LengthSamples,
    Lesson,
    from_plain,
    no_samples,
    nothing_known,
    taught,
    to_plain,
)

INTERVAL_REAL_S = 5.0              # between two rounds
WRITE_EVERY_S = 60.0               # real time, of one deployment's file
SWEEP_EVERY_S = 60.0               # real time, of the folder; at once when a deployment is forgotten

_KEPT, _DRAFT = ".json", ".draft"   # files of a deployment

log = logging.getLogger(__name__)


class Control(Protocol):
    """The part of the controller that learning needs."""

    snapshot: Snapshot

    def set_length_rules(self, rules: Mapping[str, LengthRules]) -> None:
        """Routes say these rules from now on."""
        ...


@dataclass(slots=True)
class LearningFigures:
    """What the loop did, for the coordinator's own metrics."""

    rounds: int = 0
    answers: int = 0
    failures: int = 0
    other_methods: int = 0


@dataclass(slots=True)
class _Learner:
    """What is known of one deployment; another uid is another deployment of the same name."""

    uid: str
    method: int
    known: Knowledge
    cut_share: float = 0.0         # of the limits that were last made; 0: none were
    written_s: float = field(default=0.0)
    unwritten: bool = False


class LengthLoop:
    """Learns while this coordinator leads. `folder` keeps what is known."""

    def __init__(
        self,
        control: Control,
        telemetry: Telemetry,
        models: KnownModels,
        process: PolicyProcess,
        *,
        folder: Path,
        monotonic_s: Callable[[], float] = time.monotonic,
        interval_s: float = INTERVAL_REAL_S,
    ) -> None:
        self.figures = LearningFigures()
        self.states: dict[str, LengthState] = {}
        """What was learned, by deployment."""
        self._control = control
        self._telemetry = telemetry
        self._models = models
        self._process = process
        self._folder = folder
        self._monotonic_s = monotonic_s
        self._interval_s = interval_s
        self._learners: dict[str, _Learner] = {}
        self._said: dict[str, LengthRules] = {}
        self._swept_s = -math.inf

    async def run(self) -> None:
        """Learn round after round, until cancelled; what is known is written at the end."""
        try:
            while True:
                await self.round()
                await asyncio.sleep(self._interval_s)
        finally:
            for name, learner in self._learners.items():
                if learner.unwritten:
                    self._write(name, learner)

    async def round(self) -> None:
        """Learn from what came since the last round, and say the rules."""
        snapshot = self._control.snapshot
        wanted = _wanted(snapshot)
        await self._forget(snapshot, wanted)
        self._telemetry.want_lengths(wanted)
        rules: dict[str, LengthRules] = {}
        for name, deployment in wanted.items():
            try:
                learner = await self._learner(deployment)
                await self._learn(deployment, learner)
                rules[name] = steady(self._said.get(name), self._rules(deployment, learner))
            except EnovaError as error:
                self.figures.failures += 1
                log.warning("nothing was learned of the answers of %s: %s", name, error)
            except Exception:
                # A defect here must cost the limits of one deployment, not the leader its term.
                self.figures.failures += 1
                log.exception("nothing was learned of the answers of %s", name)
        self._said = {name: said for name in wanted if (said := rules.get(name) or self._said.get(name)) is not None}
        self._control.set_length_rules(self._said)
        self.figures.rounds += 1

    async def _learner(self, deployment: Deployment) -> _Learner:
        known = self._learners.get(deployment.name)
        if known is None or known.uid != deployment.uid:
            self.states.pop(deployment.name, None)
            read = await asyncio.to_thread(read_knowledge, self._path(deployment.name), deployment.uid)
            if read is None:  # it may be of a deployment of this name that is gone
                self.figures.failures += await asyncio.to_thread(_remove, self._path(deployment.name))
            method, knowledge = read or (METHOD, nothing_known(DIMENSION))
            known = self._learners[deployment.name] = _Learner(deployment.uid, method, knowledge)
        return known

    async def _learn(self, deployment: Deployment, learner: _Learner) -> None:
        answers = self._samples(learner, self._telemetry.take_lengths(deployment.name))
        cut_share = deployment.spec.max_tokens_policy.cut_share
        if not len(answers) and (cut_share == learner.cut_share or not len(learner.known.samples)):
            return
        lesson = Lesson(
            known=learner.known, answers=answers, cut_share=cut_share, seed=projection_seed(deployment) % 2**32
        )
        result = await self._process.run(taught, lesson)
        learner.known, learner.cut_share = result.known, cut_share
        learner.unwritten = True
        self.figures.answers += len(answers)
        self.states[deployment.name] = LengthState(limits=result.limits)
        if self._monotonic_s() - learner.written_s >= WRITE_EVERY_S:
            await asyncio.to_thread(self._write, deployment.name, learner)

    def _samples(self, learner: _Learner, came: Sequence[LengthFigures]) -> LengthSamples:
        """The answers whose vectors are of the way that is learned from; of another way alone, it is begun with."""
        usable = [each for each in came if len(each.vector) == DIMENSION]
        methods = {each.method for each in usable}
        if methods and learner.method not in methods:
            learner.method = usable[-1].method  # nodes make vectors otherwise now: the old say nothing of the new
            learner.known = nothing_known(DIMENSION)
        taken = [each for each in usable if each.method == learner.method]
        self.figures.other_methods += len(came) - len(taken)
        if not taken:
            return no_samples(DIMENSION)
        vectors = np.frombuffer(b"".join(each.vector for each in taken), np.int8)
        return LengthSamples(
            vectors=vectors.reshape(-1, DIMENSION),
            tokens=np.array([each.tokens for each in taken], np.int64),
            stopped=np.array([each.stopped for each in taken], np.bool_),
        )

    def _rules(self, deployment: Deployment, learner: _Learner) -> LengthRules:
        known = self._models.get(deployment.spec.model)
        config = json.loads(known.config_json) if known is not None and known.config_json else None
        snapshot = self._control.snapshot
        variants = [each for each in snapshot.variants.values() if each.deployment == deployment.name]
        context = context_tokens(variants, config)
        state = self.states.get(deployment.name)
        if state is not None:
            reason = why_unlimited(deployment, state.limits, context=context)
            self.states[deployment.name] = LengthState(limits=state.limits, reason=reason)
        limits = state.limits if state is not None else None
        reports = [view.report for view in snapshot.nodes.values() if view.report is not None]
        ingresses = sum(report.ingress_connected for report in reports)
        rules = rules_of(
            deployment, limits, method=learner.method, context_tokens=context, ingresses=ingresses
        )
        assert rules is not None, deployment.name
        return rules

    async def _forget(self, snapshot: Snapshot, wanted: Mapping[str, Deployment]) -> None:
        gone = self._learners.keys() - wanted.keys()
        for name in gone:
            del self._learners[name]
            self.states.pop(name, None)
        now_s = self._monotonic_s()
        if not snapshot.revision or not (gone or now_s - self._swept_s >= SWEEP_EVERY_S):
            return                 # before the store was read, nothing is known to be unwanted
        self._swept_s = now_s
        self.figures.failures += await asyncio.to_thread(_sweep, self._folder, _kept(snapshot))

    def _path(self, deployment: str) -> Path:
        return self._folder / _file(deployment)

    def _write(self, name: str, learner: _Learner) -> None:
        value = {"uid": learner.uid, "method": learner.method, "knowledge": to_plain(learner.known)}
        path = self._path(name)
        draft = path.with_suffix(_DRAFT)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(value), "utf-8")
            draft.replace(path)
        except OSError as error:
            log.warning("what is known of the answers of %s is not kept: %s", name, error)
            return
        learner.written_s, learner.unwritten = self._monotonic_s(), False


async def sweep_while_following(
    folder: Path, *, snapshot: Callable[[], Snapshot], leads: Callable[[], bool], every_s: float = SWEEP_EVERY_S
) -> None:
    """Remove what is known of answers that nobody wants any more while another coordinator leads, until cancelled."""
    while True:
        found = snapshot()
        if found.revision and not leads():
            await asyncio.to_thread(_sweep, folder, _kept(found))
        await asyncio.sleep(every_s)


def _wanted(snapshot: Snapshot) -> dict[str, Deployment]:
    """The deployments whose answers are to be learned from."""
    return {
        deployment.name: deployment
        for deployment in snapshot.deployments.values()
        if deployment.spec.max_tokens_policy.mode is not MaxTokensMode.OFF and not deployment.deleting
    }


def _kept(snapshot: Snapshot) -> frozenset[str]:
    """The files that stay."""
    return frozenset(_file(name) for name in (*_wanted(snapshot), *snapshot.frozen))


def _file(deployment: str) -> str:
    return f"{deployment.removeprefix('deployments/')}{_KEPT}"


def _sweep(folder: Path, kept: frozenset[str]) -> int:
    """Remove the files of all deployments but those to be kept, and drafts that were given up; how many stayed."""
    try:
        found = [path for path in folder.iterdir() if path.suffix in {_KEPT, _DRAFT} and path.name not in kept]
    except FileNotFoundError:
        return 0                   # nothing was ever written
    except OSError as error:
        log.warning("what is known of answers is not looked through: %s", error)
        return 1
    return sum(_remove(path) for path in found)


def _remove(path: Path) -> int:
    """Remove a file if there is one; 1 if it stays."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("what was known of the answers of a deployment stays on disk: %s", error)
        return 1
    return 0


def read_knowledge(path: Path, uid: str) -> tuple[int, Knowledge] | None:
    """The method and what is known of the deployment with this uid; None if nothing that can be used was kept."""
    try:
        value = json.loads(path.read_text("utf-8"))
        method, known = int(value["method"]), from_plain(value["knowledge"])
        usable = value["uid"] == uid and known.samples.vectors.shape[1] == DIMENSION
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("answers are learned from anew: %s cannot be used: %s", path, error)
        return None
    return (method, known) if usable else None
