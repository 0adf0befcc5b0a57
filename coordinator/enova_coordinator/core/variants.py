"""Which variant of a deployment is the current one: the one whose engines are what the spec asks for."""

from __future__ import annotations

from dataclasses import replace

from enova_coordinator.core.model import Deployment, Variant
from enova_coordinator.core.plan import Draft, Note


def current_variant(draft: Draft, deployment: Deployment, *, target: int) -> Variant:
    """The deployment's current variant, made if none fits; all others are retired.

    A spec that changed only in what engines do not see (bounds, classes, policy) keeps its variant; one that
    returns to what a retired variant has takes that variant back, with the replicas that still run.
    """
    variants = draft.variants_of(deployment.name)
    fitting = [variant for variant in variants if _fits(variant, deployment)]
    current = fitting[-1] if fitting else _made(draft, deployment)
    for variant in variants:
        if variant.name != current.name and not variant.retired:
            draft.put(replace(variant, retired=True, target_replicas=0))
            draft.note(deployment.name, Note(
                object=deployment.name, reason="VariantRetired", message=f"{variant.id} gives way to {current.id}"
            ))
    if current.generation != deployment.generation:
        # A person changed something: what failed before may be tried again at once.
        current = replace(current, generation=deployment.generation, failures=0, failed_nodes=(), failure_reason="")
    current = replace(current, retired=False, target_replicas=target)
    draft.put(current)
    return current


def _fits(variant: Variant, deployment: Deployment) -> bool:
    spec = deployment.spec
    return (
        (variant.model, variant.engine, variant.served_names) == (spec.model, spec.engine, deployment.served_names)
        and dict(variant.configuration) == dict(deployment.configuration)
        and deployment.advised_gpu_type in {"", variant.gpu_type}
        and (not variant.gpu_type or not spec.hardware.allow or variant.gpu_type in spec.hardware.allow)
    )


def _made(draft: Draft, deployment: Deployment) -> Variant:
    variant = Variant(
        name=f"{deployment.name}/variants/v{deployment.generation}",
        deployment=deployment.name,
        model=deployment.spec.model,
        served_names=deployment.served_names,
        engine=deployment.spec.engine,
        gpu_type=deployment.advised_gpu_type,
        configuration=dict(deployment.configuration),
        generation=deployment.generation,
    )
    message = f"{variant.id} for generation {deployment.generation}"
    draft.note(deployment.name, Note(object=deployment.name, reason="VariantCreated", message=message))
    return variant
