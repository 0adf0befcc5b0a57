"""The record of a ruling on what a policy wanted. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from enova_coordinator.core.model import Configuration, Decision, DecisionInput, Deployment
from enova_coordinator.core.scaling_guard import Ruling


def record_of(
    ruling: Ruling,
    deployment: Deployment,
    *,
    actor: str,
    model_time_s: float,
    inputs: Iterable[DecisionInput] = (),
    frames: tuple[str, ...] = (),
    configuration: Configuration | None = None,
    to_configuration: Configuration | None = None,
) -> Decision:
    """The decision about the deployment as it stands. Without a configuration its own is meant, which then stays."""
    before = dict(deployment.configuration) if configuration is None else configuration
    return Decision(
        name="",                       # it and the term are filled in when it is written
        deployment=deployment.name,
        action=ruling.action,
        actor=actor,
        reason=ruling.reason,
        from_replicas=deployment.status.target_replicas,
        to_replicas=ruling.to_replicas,
        model_time_s=model_time_s,
        inputs=tuple(inputs),
        frames=frames,
        from_configuration=before,
        to_configuration=before if to_configuration is None else to_configuration,
    )
