"""Limits on answers' lengths as a deployment has them: which rules its ingresses get, and how they are told; pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from enova_common.prompt_vectors import quantised
from enova_coordinator.core.engine_facts import shape_of
from enova_coordinator.core.model import Deployment, MaxTokensMode, MaxTokensPolicy, Variant
from enova_coordinator.core.routes import LengthRule, LengthRules
from enova_recommender.recommend.max_tokens import Kind, Limits, NoLimit

DIMENSION = 128                    # of vectors: neighbours of one kind are found in 98 of 100 cases

SAMPLES_PER_S = 20.0               # answers of one deployment that all ingresses report together: 3 kB a second
SAMPLES_PER_S_MIN = 0.05           # of one ingress, however many there are: beyond 400, more in all
LIMIT_STEP = 0.03                  # a limit that moved by less is not said anew

_WHY_NONE = {
    NoLimit.FEW_ANSWERS: "has too few answers for a limit of its own",
    NoLimit.TAIL_UNSEEN: "has no limit: too many answers were stopped for anyone to know the longest",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthState:
    """What was learned of one deployment's answers; `reason` says why no request is limited, empty if some are."""

    limits: Limits
    reason: str = ""


def projection_seed(deployment: Deployment) -> int:
    """The seed of a deployment's vectors: its own, and the same for every leader."""
    return int.from_bytes(hashlib.blake2b(deployment.uid.encode(), digest_size=7).digest(), "big")


def rules_of(
    deployment: Deployment, limits: Limits | None, *, method: int, context_tokens: int, ingresses: int
) -> LengthRules | None:
    """What the deployment's ingresses are told; None where it is off."""
    policy = deployment.spec.max_tokens_policy
    if policy.mode is MaxTokensMode.OFF:
        return None
    apply = policy.mode is MaxTokensMode.APPLY and limits is not None
    kinds = limits.kinds if apply and limits is not None else ()
    return LengthRules(
        method=method,
        seed=projection_seed(deployment),
        dimension=DIMENSION,
        apply=apply,
        context_tokens=context_tokens,
        samples_per_s=max(SAMPLES_PER_S_MIN, SAMPLES_PER_S / max(1, ingresses)),
        limit_tokens=(limits.overall or 0) if apply and limits is not None else 0,
        kinds=tuple(
            LengthRule(
                centroid=quantised(kind.centroid),
                reach=kind.reach,
                limit_tokens=(limits.of(place) if limits is not None else None) or 0,
            )
            for place, kind in enumerate(kinds)
        ),
    )


def steady(said: LengthRules | None, rules: LengthRules) -> LengthRules:
    """What was said before, where the new rules hardly differ: each change is told to every ingress of the fleet."""
    if said is None or replace(said, limit_tokens=0, kinds=()) != replace(rules, limit_tokens=0, kinds=()):
        return rules
    limits = [(said.limit_tokens, rules.limit_tokens)]
    for before, after in zip(said.kinds, rules.kinds, strict=False):
        if replace(before, limit_tokens=0) != replace(after, limit_tokens=0):
            return rules
        limits.append((before.limit_tokens, after.limit_tokens))
    moved = any(abs(after - before) > LIMIT_STEP * before for before, after in limits)
    return rules if moved or len(said.kinds) != len(rules.kinds) else said


def context_tokens(variants: Iterable[Variant], config: Mapping[str, object] | None) -> int:
    """What all of a deployment's engines accept, prompt and answer together; 0 if that is not known."""
    found = []
    for variant in variants:
        given = variant.configuration.get("max_model_len")
        shape = shape_of(variant.model, config) if given is None else ""
        known = int(given) if given is not None else 0 if isinstance(shape, str) else shape.context_tokens
        found.append(known)
    return min(found, default=0)


def why_unlimited(deployment: Deployment, limits: Limits, *, context: int) -> str:
    """Why no request is limited, in words; empty if some are."""
    if deployment.spec.max_tokens_policy.mode is MaxTokensMode.OBSERVE:
        return "the policy observes only"
    if not context:
        return "the context of its engines is not known"
    if limits.overall is None and all(limits.of(place) is None for place in range(len(limits.kinds))):
        return f"{limits.answers} answers are too few, or too many of them were stopped"
    return ""


def length_sentences(policy: MaxTokensPolicy, state: LengthState | None) -> Iterator[str]:
    """What is to be told of a deployment's limits on answers."""
    if policy.mode is MaxTokensMode.OFF:
        return
    if state is None:
        yield f"Limits on answers ({policy.mode}): no answer has been seen yet."
        return
    limits = state.limits
    overall = f"{limits.overall} tokens" if limits.overall is not None else "none"
    yield (
        f"Limits on answers ({policy.mode}) cut {limits.cut_share:.1%} of each kind's, where a request gives none: "
        f"{len(limits.kinds)} kinds of prompts in {limits.answers} answers; the limit of all others is {overall}."
    )
    for place, kind in enumerate(limits.kinds):
        yield f"Kind {place} {_told(kind)}."
    if limits.drifts:
        yield f"Answers of a kind became longer {limits.drifts} times; what was known of it was dropped each time."
    if state.reason:
        yield f"No request is limited: {state.reason}."


def _told(kind: Kind) -> str:
    median = f"median {kind.median}" if kind.median is not None else "median not known"
    seen = f"({kind.answers} answers, {median}, {kind.stopped} stopped)"
    if kind.no_limit is not None:
        return f"{_WHY_NONE[kind.no_limit]} {seen}"
    return f"is limited to {kind.limit} tokens {seen}"
