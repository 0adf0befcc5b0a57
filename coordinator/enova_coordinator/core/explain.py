"""Explanations in words and numbers: what an object is waiting for, and what was found about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from enova_coordinator.core.advice import MEETS, words
from enova_coordinator.core.lengths import LengthState, length_sentences
from enova_coordinator.core.model import Deployment, DeploymentSpec, Intent, NodeView, Replica, ReplicaState, Snapshot
from enova_coordinator.core.verdicts import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What is to be said about one object; `deployment` is the one whose decisions belong to it."""

    state: str
    sentences: tuple[str, ...]
    deployment: str = ""


def explain(
    snapshot: Snapshot,
    name: str,
    *,
    verdicts: Mapping[str, Verdict],
    lengths: Mapping[str, LengthState] = MappingProxyType({}),
    found: Mapping[str, Verdict] = MappingProxyType({}),
    trouble: str = "",
) -> Explanation | None:
    """What is known of the object; None if there is none of that name.

    `found`: verdicts on replicas. `trouble`: why there are none.
    """
    if (deployment := snapshot.deployments.get(name)) is not None:
        sentences = (
            *_deployment(snapshot, deployment, verdicts.get(name)),
            *length_sentences(deployment.spec.max_tokens_policy, lengths.get(name)),
            *_found(snapshot.replicas_of(name), found, trouble),
        )
        state = "DELETING" if deployment.deleting else deployment.status.state.value
        return Explanation(state=state, sentences=sentences, deployment=name)
    if (replica := snapshot.replicas.get(name)) is not None:
        sentences = (*_replica(replica), *_found([replica], found, trouble))
        return Explanation(state=replica.status.state.value, sentences=sentences, deployment=replica.deployment)
    if (view := snapshot.nodes.get(name)) is not None:
        return Explanation(state=view.state.value, sentences=tuple(_node(snapshot, view)))
    return None


def _deployment(snapshot: Snapshot, deployment: Deployment, verdict: Verdict | None) -> Iterator[str]:
    spec, status = deployment.spec, deployment.status
    least, most = spec.bounds
    how = "fixed" if spec.fixed else f"autoscaled between {least} and {most}{_conservatism(spec)}"
    paused = ", autoscaling is paused" if spec.autoscaling_paused and not spec.fixed else ""
    yield (
        f"It serves {spec.model} as {', '.join(deployment.served_names)}; "
        f"{status.ready_replicas} of {status.target_replicas} replicas are ready ({how}{paused})."
    )
    if deployment.deleting:
        yield "It is being deleted: its replicas drain, then stop."
    if status.observed_generation < deployment.generation:
        yield f"Generation {deployment.generation} is not taken up yet; {status.observed_generation} is."
    if status.reason:
        yield f"It is {status.state}: {status.reason}."
    yield from _configuration(deployment)
    replicas = snapshot.replicas_of(deployment.name)
    counts = Counter(replica.status.state.value for replica in replicas)
    if counts:
        yield f"Replicas by state: {', '.join(f'{count} {state}' for state, count in sorted(counts.items()))}."
    for replica in replicas:
        if replica.status.state is not ReplicaState.READY or not replica.status.in_routing:
            yield from _replica(replica)
    if snapshot.replacement_held:
        yield f"Replacement of what is lost is held: {snapshot.replacement_held}."
    if verdict is not None:
        yield f"The detector {verdict.detector} says {verdict.kind}: {verdict.reason}."
        for each in verdict.evidence:
            yield f"{each.feature} is {each.value:g} (threshold {each.threshold:g})."


def _conservatism(spec: DeploymentSpec) -> str:
    return f" with conservatism {spec.conservatism:g}" if spec.conservatism != 1 else ""


def _found(replicas: Sequence[Replica], found: Mapping[str, Verdict], trouble: str) -> Iterator[str]:
    """What is said of replicas, and on what figures that rests."""
    for replica in replicas:
        verdict = found.get(replica.name)
        if verdict is None:
            continue
        short = replica.name.rsplit("/", 1)[1]
        yield (
            f"Replica {short} is {verdict.kind}, cause {verdict.cause or 'unknown'}: {verdict.reason}; "
            f"{verdict.suggested_action} is suggested (score {verdict.score:.2f}, confidence {verdict.confidence:.2f})."
        )
        for each in verdict.evidence:
            yield f"{short}: {each.feature} is {each.value:.4g} (threshold {each.threshold:.4g})."
    if trouble and replicas:
        yield f"Replicas are not judged at the moment: {trouble}."


def _configuration(deployment: Deployment) -> Iterator[str]:
    advice, proposal = deployment.advice, deployment.proposal
    if advice is not None and not deployment.spec.configuration:
        if advice.gpu_type:
            yield f"Its configuration was {advice.reason}: {words(advice.configuration)} on {advice.gpu_type}."
            yield from advice.explanation
        else:
            yield f"There is no advice for its configuration: {advice.reason}."
    if proposal is not None:
        gain = "meets the objectives" if proposal.gain >= MEETS else f"saves {proposal.gain:.0%} of the cost"
        yield (
            f"A better configuration is proposed, which {gain}: "
            f"{words(proposal.configuration)} on {proposal.gpu_type}, {proposal.reason}."
        )


def _replica(replica: Replica) -> Iterator[str]:
    status = replica.status
    short = replica.name.rsplit("/", 1)[1]
    where = f" on {replica.node}" if replica.node else ""
    phase = f" in phase {status.phase}" if status.phase else ""
    yield f"Replica {short} is {status.state}{where}{phase}{f': {status.reason}' if status.reason else ''}."
    if status.restarts:
        yield f"Its engine was restarted {status.restarts} times."
    if status.gave_up:
        yield "The agent gave up starting it: the restart budget is spent, or it cannot work."
    if status.state is ReplicaState.READY and not status.in_routing:
        yield "It is out of routing: its engine makes no progress."
    if replica.intent is not Intent.RUN:
        yield f"It is on its way out ({replica.intent})."


def _node(snapshot: Snapshot, view: NodeView) -> Iterator[str]:
    node = view.node
    here = [replica for replica in snapshot.replicas.values() if replica.node == node.name]
    held = {gpu for replica in here for gpu in replica.gpus}
    yield f"It is {view.state}{f': {view.reason}' if view.reason else ''}."
    types = Counter(gpu.type for gpu in view.gpus)
    kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(types.items())) or "no GPU"
    yield f"It has {kinds}; {len(held)} of {len(view.gpus)} GPUs are held by {len(here)} replicas."
    if node.draining:
        yield "It is being drained: its replicas move away, and no new ones come."
    if view.report is not None and not view.report.ingress_connected:
        yield "Its ingress is not connected to its agent: it serves by the routes that it last knew."
