"""What is wrong with what a user asks for: every problem at once, each with its field and what to do."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from enova_common.vllm import FLAGS
from enova_coordinator.core.model import (
    Configuration,
    Deployment,
    DeploymentSpec,
    Hardware,
    MaxTokensPolicy,
    Reconfiguration,
    ServingClass,
)
from enova_recommender.scaling import FORESEEING

ENGINES = ("vllm", "simulated")
MAX_REPLICAS = 8000                # 1,000 nodes of 8 GPUs: what one coordinator is made for
MAX_SERVED_NAMES = 64
MAX_CLASSES = 16
MAX_TEXT = 512
MAX_CUT_SHARE = 0.5
CONSERVATISM = (0.1, 10.0)         # beyond, a policy would follow noise, or its own quantile's bound

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SERVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,199}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")
_LABEL_RULE = "lower-case letters, digits and dashes, at most 63, beginning and ending with a letter or digit"


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldProblem:
    """One thing that is wrong: where, what, and what to do about it."""

    field: str
    message: str
    remedy: str = ""


def name_problems(deployment_id: str, field: str = "name") -> tuple[FieldProblem, ...]:
    """What is wrong with a deployment's own name (the part after deployments/)."""
    if _LABEL.fullmatch(deployment_id):
        return ()
    message = "must not be empty" if not deployment_id else f"{deployment_id[:80]!r} is not a name"
    return (FieldProblem(field=field, message=message, remedy=f"use {_LABEL_RULE}"),)


def spec_problems(spec: DeploymentSpec, *, policies: Iterable[str]) -> tuple[FieldProblem, ...]:
    """What is wrong with a deployment's desired fields by themselves."""
    return (
        *_model(spec.model),
        *_served_names(spec.served_names),
        *_known("engine", spec.engine, ENGINES),
        *_classes(spec.classes),
        *_replicas(spec),
        *_hardware(spec.hardware),
        *_configuration(spec.configuration),
        *_known("policy", spec.policy, tuple(policies)),
        *_conservatism(spec.conservatism, spec.policy),
        *_max_tokens(spec.max_tokens_policy),
        *_reconfiguration(spec),
    )


def _reconfiguration(spec: DeploymentSpec) -> Iterator[FieldProblem]:
    """A configuration that a user gave is never replaced by itself: to ask for that is a misunderstanding."""
    if spec.configuration and spec.reconfiguration is Reconfiguration.APPLY:
        yield FieldProblem(
            field="reconfiguration",
            message="APPLY replaces configurations that enova chose, and this deployment has one of its own",
            remedy="leave out configuration, or set PROPOSE and take proposals up by enova accept",
        )


def conflicts(
    deployment: str, served_names: tuple[str, ...], others: Mapping[str, Deployment]
) -> tuple[FieldProblem, ...]:
    """Served names that another deployment has already."""
    taken = {name: other for other in others.values() if other.name != deployment for name in other.served_names}
    return tuple(
        FieldProblem(
            field=f"served_names[{index}]",
            message=f"{name!r} is served by {taken[name].name}",
            remedy="choose another name, or delete that deployment first",
        )
        for index, name in enumerate(served_names)
        if name in taken
    )


def context_problems(configuration: Configuration, config_json: str) -> tuple[FieldProblem, ...]:
    """A context beyond what the model's config.json allows: every engine would refuse it at its start.

    Where positions are scaled, or another entry allows more, the engine alone knows the bound.
    """
    wanted = configuration.get("max_model_len")
    try:
        config = json.loads(config_json or "{}")
    except ValueError:  # the engine says what is wrong with it
        return ()
    if wanted is None or not isinstance(config, dict):
        return ()
    rope = config.get("rope_parameters") or {}
    scaled = config.get("rope_scaling") or not isinstance(rope, dict) or rope.get("rope_type", "default") != "default"
    allowed = [config.get(name) for name in ("max_position_embeddings", "model_max_length")]
    lengths = [length for length in allowed if isinstance(length, int)]
    if scaled or not isinstance(allowed[0], int) or float(wanted) <= max(lengths):
        return ()
    message = f"{wanted} is more than the model's {max(lengths)} (max_position_embeddings in its config.json)"
    remedy = f"give at most {max(lengths)}, or leave it out"
    return (FieldProblem(field="configuration.max_model_len", message=message, remedy=remedy),)


def scale_problems(spec: DeploymentSpec, replicas: int) -> tuple[FieldProblem, ...]:
    """What is wrong with a number of replicas that a user asks for."""
    if not 0 <= replicas <= MAX_REPLICAS:
        message = f"must lie between 0 and {MAX_REPLICAS}, not {replicas}"
        return (FieldProblem(field="replicas", message=message, remedy="give the number of replicas that shall run"),)
    if not spec.fixed and spec.clamped(replicas) != replicas:
        least, most = spec.bounds
        message = f"{replicas} is outside the deployment's bounds {least} to {most}"
        return (FieldProblem(field="replicas", message=message, remedy="change min or max with enova apply first"),)
    return ()


def _model(model: str) -> Iterator[FieldProblem]:
    remedy = "give a path on the hosts, a Hugging Face id (org/name), or a name of the catalogue"
    if not model.strip():
        yield FieldProblem(field="model", message="must not be empty", remedy=remedy)
    elif model.startswith("-"):
        yield FieldProblem(field="model", message="must not begin with a dash", remedy=remedy)
    elif len(model) > MAX_TEXT or not model.isprintable():
        message = f"must be at most {MAX_TEXT} printable characters"
        yield FieldProblem(field="model", message=message, remedy=remedy)


def _served_names(names: tuple[str, ...]) -> Iterator[FieldProblem]:
    if len(names) > MAX_SERVED_NAMES:
        message = f"{len(names)} names, at most {MAX_SERVED_NAMES}"
        yield FieldProblem(field="served_names", message=message)
    for index, name in enumerate(names):
        if not _SERVED_NAME.fullmatch(name):
            yield FieldProblem(
                field=f"served_names[{index}]",
                message=f"{name[:80]!r} is not a served name",
                remedy="use letters, digits and . _ : / @ -, at most 200, beginning with a letter or digit",
            )
    yield from _doubled("served_names", names)


def _classes(classes: tuple[ServingClass, ...]) -> Iterator[FieldProblem]:
    if len(classes) > MAX_CLASSES:
        yield FieldProblem(field="classes", message=f"{len(classes)} classes, at most {MAX_CLASSES}")
    for index, serving_class in enumerate(classes):
        yield from _class(f"classes[{index}]", serving_class)
    names = tuple(serving_class.name for serving_class in classes)
    for index, name in enumerate(names):
        if name in names[:index]:
            message = f"{name!r} is given twice"
            yield FieldProblem(field=f"classes[{index}].name", message=message, remedy="remove one of them")


def _class(path: str, serving_class: ServingClass) -> Iterator[FieldProblem]:
    if not _LABEL.fullmatch(serving_class.name):
        message = f"{serving_class.name[:80]!r} is not a name"
        yield FieldProblem(field=f"{path}.name", message=message, remedy=f"use {_LABEL_RULE}")
    for name in ("ttft_p95_s", "tpot_p95_s"):
        value = getattr(serving_class, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            message = f"must be more than 0 seconds, not {value}"
            yield FieldProblem(field=f"{path}.{name}", message=message, remedy="give a duration such as 500ms")
    share = serving_class.attainment
    if share is not None and not 0 < share <= 1:
        message = f"must be a share above 0 and up to 1, not {share}"
        yield FieldProblem(field=f"{path}.attainment", message=message, remedy="0.99 asks for 99 % of requests")


def _replicas(spec: DeploymentSpec) -> Iterator[FieldProblem]:
    for name in ("replicas", "min", "max"):
        value = getattr(spec, name)
        if value is not None and not 0 <= value <= MAX_REPLICAS:
            message = f"must lie between 0 and {MAX_REPLICAS}, not {value}"
            yield FieldProblem(field=name, message=message, remedy="give a number of replicas")
    if spec.max == 0:
        message = "must be at least 1: a policy needs a replica to look at"
        yield FieldProblem(field="max", message=message, remedy="replicas: 0 keeps the deployment without any replica")
    if spec.replicas is not None and (spec.min is not None or spec.max is not None):
        remedy = "give replicas for a fixed number, or min and max for a policy to choose"
        yield FieldProblem(field="replicas", message="does not go with min or max", remedy=remedy)
    if spec.min is not None and spec.max is None and spec.replicas is None:
        yield FieldProblem(field="max", message="is missing beside min", remedy="give the most replicas it may have")
    if spec.min is not None and spec.max is not None and spec.min > spec.max:
        message = f"{spec.min} is more than max, {spec.max}"
        yield FieldProblem(field="min", message=message, remedy="lower min or raise max")


def _hardware(hardware: Hardware) -> Iterator[FieldProblem]:
    for field, words in (("hardware.allow", hardware.allow), ("hardware.clusters", hardware.clusters)):
        for index, word in enumerate(words):
            if not _WORD.fullmatch(word):
                yield FieldProblem(field=f"{field}[{index}]", message=f"{word[:80]!r} is not a name")
        yield from _doubled(field, words)
    if hardware.max_gpus is not None and hardware.max_gpus < 1:
        message = f"must be at least 1, not {hardware.max_gpus}"
        yield FieldProblem(field="hardware.max_gpus", message=message, remedy="leave it out for no bound")


def _configuration(configuration: Configuration) -> Iterator[FieldProblem]:
    for name, value in configuration.items():
        field = f"configuration.{name}"
        flag = FLAGS.get(name)
        if flag is None:
            close = difflib.get_close_matches(name, FLAGS, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"allowed are {', '.join(sorted(FLAGS))}"
            yield FieldProblem(field=field, message="is not a setting that may be given", remedy=remedy)
        elif (problem := flag.problem(value)) is not None:
            yield FieldProblem(field=field, message=problem)
    if configuration.get("data_parallel_size", 1) != 1:
        yield FieldProblem(
            field="configuration.data_parallel_size",
            message="more than 1 is not supported yet",
            remedy="ask for more replicas instead",
        )


def _max_tokens(policy: MaxTokensPolicy) -> Iterator[FieldProblem]:
    if not 0 < policy.cut_share <= MAX_CUT_SHARE:
        message = f"must be a share above 0 and up to {MAX_CUT_SHARE}, not {policy.cut_share}"
        remedy = "0.05 lets the limit cut 5 % of the answers"
        yield FieldProblem(field="max_tokens_policy.cut_share", message=message, remedy=remedy)


def _known(field: str, value: str, known: tuple[str, ...]) -> Iterator[FieldProblem]:
    if value and value not in known:
        yield FieldProblem(
            field=field, message=f"{value[:80]!r} is not known", remedy=f"leave it out, or use {', '.join(known)}"
        )


def _conservatism(value: float, policy: str) -> Iterator[FieldProblem]:
    low, high = CONSERVATISM
    if not low <= value <= high:       # nor NaN
        yield FieldProblem(
            field="conservatism",
            message=f"must lie between {low:g} and {high:g}, not {value:g}",
            remedy="1 is the default; 2 spends GPUs for safety, 0.5 saves them",
        )
    elif value != 1 and policy and policy not in FORESEEING:
        yield FieldProblem(
            field="conservatism",
            message=f"policy {policy[:80]} has no such knob",
            remedy=f"leave it out, or use policy {', '.join(sorted(FORESEEING))}",
        )


def _doubled(field: str, words: tuple[str, ...]) -> Iterator[FieldProblem]:
    for index, word in enumerate(words):
        if word in words[:index]:
            message = f"{word[:80]!r} is given twice"
            yield FieldProblem(field=f"{field}[{index}]", message=message, remedy="remove one of them")
