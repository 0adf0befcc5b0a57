"""What the recommender is asked about a deployment, and what its answer means for it. Pure.

Requests and answers are plain values under the names of the API's `RecommendConfiguration`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from enova_coordinator.core.gpu_types import GpuTypes, LeftOut, priced
from enova_coordinator.core.model import (
    Configuration,
    Deployment,
    DeploymentAdvice,
    DeploymentSpec,
    FlagValue,
    Gpu,
    NodeState,
    NodeView,
    Reconfiguration,
    Snapshot,
)
from enova_coordinator.core.placement import in_clusters
from enova_recommender import catalog
from enova_recommender.recommend.request import supply_row
from enova_recommender.shape import ShapeError, parse_shape

Plain = Mapping[str, Any]

# What a deployment is taken to carry until its traffic is measured: lengths as of a chat, one request a second.
ASSUMED_WORKLOAD: Plain = {
    "requests_per_s": 1.0,
    "prompt_tokens": {"p50": 512, "p95": 2048},
    "output_tokens": {"p50": 128, "p95": 512},
}
CATALOGUE = GpuTypes()      # no type but those of the catalogue, and what drivers tell
REQUESTS_MIN = 50          # counted, before lengths are taken from them
LENGTHS_MAX = 512          # pairs of a request: percentiles up to the 99th need no more
SENTENCES_MAX = 12
# Flags that a proposal speaks of, be it by leaving them at vLLM's default. Types of weights and cache are not among
# them: another one changes answers.
PROPOSED_FLAGS = frozenset({
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel",
    "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "enable_prefix_caching",
})
MEETS = 1.0                # as a gain: what runs cannot meet the objectives, the advice can
IMPOSSIBLE = frozenset({"MEMORY", "CONTEXT", "LAYOUT", "PRECISION"})  # reasons against what never ran
# Of log-normal lengths whose deviation is their mean, as far as only the mean is known: median and 95th percentile.
MEDIAN_OF_MEAN = math.exp(-math.log(2) / 2)
P95_OF_MEAN = MEDIAN_OF_MEAN * math.exp(1.6449 * math.sqrt(math.log(2)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What was counted of a deployment's requests: the busiest minute's rate, mean lengths, and lengths together."""

    requests_per_s: float
    prompt_tokens: float
    output_tokens: float
    requests: int
    lengths: tuple[tuple[int, int], ...] = ()  # prompt and answer of a sample of the newest


def is_asked(before: Deployment | None, wanted: DeploymentSpec) -> bool:
    """Whether a spec needs advice anew: it has no configuration, and something that advice rests on is different.

    A deployment that runs without advice is left alone by changes of other things: it gets a proposal.
    """
    if wanted.configuration or wanted.reconfiguration is Reconfiguration.OFF:
        return False
    return before is None or _grounds(before.spec) != _grounds(wanted)


def _grounds(spec: DeploymentSpec) -> tuple[object, ...]:
    hardware = (spec.hardware.allow, spec.hardware.max_gpus, spec.hardware.clusters)
    return spec.model, spec.engine, hardware, objectives_of(spec), bool(spec.configuration)


def kept(before: Deployment, wanted: DeploymentSpec) -> DeploymentAdvice | None:
    """The advice that stays in force under a spec that does not need it anew."""
    if wanted.configuration or wanted.reconfiguration is Reconfiguration.OFF:
        return None
    return before.advice


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the recommender is asked about a deployment, and what of the fleet that leaves out."""

    request: Plain
    left_out: tuple[LeftOut, ...] = ()


def request_for(
    snapshot: Snapshot,
    name: str,
    spec: DeploymentSpec,
    *,
    config_json: str,
    observed: Observed | None = None,
    types: GpuTypes = CATALOGUE,
) -> Question | str:
    """The request about a deployment, or why none can be made."""
    supply = fleet_supply(snapshot, spec, without=name, types=types)
    if not supply.rows:
        return _no_supply(spec, supply.left_out)
    model = model_of(spec.model, config_json)
    if isinstance(model, str):
        return model
    request = {**model, "gpus": list(supply.rows), "workload": workload(observed), "deployable": True}
    if objectives := objectives_of(spec):
        request["objectives"] = objectives
    if spec.hardware.max_gpus is not None:
        request["max_gpus"] = spec.hardware.max_gpus
    return Question(request=request, left_out=supply.left_out)


@dataclass(frozen=True, slots=True)
class Supply:
    """GPUs to choose from, as a request has them; types that could have been there but for what is not known."""

    rows: tuple[Plain, ...]
    left_out: tuple[LeftOut, ...] = ()


def fleet_supply(
    snapshot: Snapshot, spec: DeploymentSpec | None = None, *, without: str = "", types: GpuTypes = CATALOGUE
) -> Supply:
    """GPUs on nodes that are ready, which no deployment but `without` holds, by type and number."""
    held = {gpu for each in snapshot.replicas.values() if each.deployment != without for gpu in each.gpus}
    probe = None if spec is None else Deployment(name=without or "deployments/new", uid="", spec=spec)
    allowed = spec.hardware.allow if spec is not None else ()
    by_node = [
        [gpu for gpu in view.gpus if gpu.uuid not in held and (not allowed or gpu.type in allowed)]
        for view in snapshot.nodes.values()
        if takes_replicas(view) and (probe is None or _takes(view, probe))
    ]
    known = priced((gpu for gpus in by_node for gpu in gpus), types)
    free: Counter[tuple[str, int]] = Counter()
    for gpus in by_node:
        free.update(Counter(gpu.type for gpu in gpus if gpu.type in known.models).items())
    return Supply(
        tuple(
            {**supply_row(known.models[kind]), "count": count * nodes, "gpus_per_node": count}
            for (kind, count), nodes in sorted(free.items(), key=lambda item: (item[0][0], -item[0][1]))
        ),
        known.left_out,
    )


def takes_replicas(view: NodeView) -> bool:
    """Whether a node may be given anything at all."""
    return view.state is NodeState.READY and not view.node.draining and view.node.schedulable


def _takes(view: NodeView, deployment: Deployment) -> bool:
    return in_clusters(view, deployment) and deployment.spec.engine in {"", view.node.engine}


def _no_supply(spec: DeploymentSpec, left_out: tuple[LeftOut, ...]) -> str:
    if left_out:
        return f"of the GPUs that are free, {in_words(left_out)}"
    allowed = f" of {' or '.join(spec.hardware.allow)}" if spec.hardware.allow else ""
    return f"no GPU{allowed} is free on a node that is ready"


def in_words(left_out: Iterable[LeftOut]) -> str:
    """What is left out, as part of a sentence."""
    return "; ".join(f"{each.object} {each.reason}" for each in left_out)


def model_of(name: str, config_json: str) -> dict[str, Any] | str:
    """The model's part of a request: by its config.json where that is understood, else by the catalogue; or why not."""
    reason = f"no host has said what {name} is, and the catalogue does not know it"
    if config_json.strip() not in {"", "{}"}:
        try:
            config = json.loads(config_json)
            parse_shape(config, name=name)
            return {"model": name, "config_json": config_json}
        except ShapeError as error:
            reason = f"its config.json is not understood: {error}"
        except (ValueError, AttributeError) as error:
            reason = f"its config.json is not JSON: {error}"
    return {"model": name} if name in catalog.models() else reason


def workload(observed: Observed | None) -> Plain:
    """The workload to be carried: as it was counted, or as it is assumed."""
    if observed is None:
        return ASSUMED_WORKLOAD
    if len(observed.lengths) >= REQUESTS_MIN:
        pairs = [{"prompt_tokens": prompt, "output_tokens": output} for prompt, output in _sampled(observed.lengths)]
        return {"requests_per_s": observed.requests_per_s, "lengths": pairs}
    means = {"prompt_tokens": observed.prompt_tokens, "output_tokens": observed.output_tokens}
    return {
        "requests_per_s": observed.requests_per_s,
        **{
            name: {"p50": max(1.0, MEDIAN_OF_MEAN * mean), "p95": max(1.0, P95_OF_MEAN * mean)}
            for name, mean in means.items()
        },
    }


def _sampled(lengths: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """At most LENGTHS_MAX of the pairs, taken evenly over them as they are sorted, so that the tails stay."""
    ordered = sorted(lengths, key=sum)
    if len(ordered) <= LENGTHS_MAX:
        return tuple(ordered)
    return tuple(ordered[(2 * place + 1) * len(ordered) // (2 * LENGTHS_MAX)] for place in range(LENGTHS_MAX))


def objectives_of(spec: DeploymentSpec) -> dict[str, float]:
    """The strictest objectives of all classes."""
    found: dict[str, float] = {}
    for field, name in (("ttft_p95_s", "ttft_s"), ("tpot_p95_s", "tpot_s")):
        values = [value for each in spec.classes if (value := getattr(each, field)) is not None]
        if values:
            found[name] = min(values)
    return found


def advice_of(answer: Plain, *, reason: str, now_s: float, gain: float = 0.0) -> DeploymentAdvice:
    """What an answer with a chosen configuration means for a deployment."""
    chosen = answer["chosen"]
    prediction = chosen["prediction"]
    configuration: dict[str, FlagValue] = dict(chosen["configuration"])
    return DeploymentAdvice(
        gpu_type=chosen["gpu_type"],
        configuration=configuration,
        reason=reason,
        explanation=tuple(each["text"] for each in answer["explanation"][:SENTENCES_MAX]),
        cost_per_hour=chosen["cost_per_hour"] / chosen["replicas"],
        capacity_rps=prediction["capacity_rps"]["value"],
        gain=gain,
        create_time_s=now_s,
    )


def none_for(reason: str, *, now_s: float) -> DeploymentAdvice:
    """That there is no advice, and why."""
    return DeploymentAdvice(reason=f"engines run with their own defaults: {reason}", create_time_s=now_s)


def grounds_of(observed: Observed | None, left_out: Sequence[LeftOut] = ()) -> str:
    """What advice rests on, and what it leaves out, in words."""
    without = f" (of the GPUs that are free, {in_words(left_out)})" if left_out else ""
    if observed is None:
        assumed = ASSUMED_WORKLOAD
        return (
            f"advised for an assumed {assumed['requests_per_s']:g} request/s with a median of "
            f"{assumed['prompt_tokens']['p50']} prompt and {assumed['output_tokens']['p50']} output tokens{without}"
        )
    by = f", with the lengths of {len(observed.lengths)} of them" if len(observed.lengths) >= REQUESTS_MIN else ""
    return (
        f"advised for the {observed.requests_per_s:.3g} requests/s that were counted, on average "
        f"{observed.prompt_tokens:.0f} prompt and {observed.output_tokens:.0f} output tokens{by}{without}"
    )


def observed_of(
    arrivals_per_minute: Sequence[float],
    totals: Iterable[tuple[int, int, int]],
    lengths: Sequence[tuple[int, int]] = (),
) -> Observed | None:
    """What was counted: the arrivals of each minute, (requests, prompt tokens, output tokens) of each sum, lengths."""
    finished = prompts = outputs = 0
    for requests, prompt_tokens, output_tokens in totals:
        finished, prompts, outputs = finished + requests, prompts + prompt_tokens, outputs + output_tokens
    counted = [count for count in arrivals_per_minute if math.isfinite(count)]
    if finished < REQUESTS_MIN or not counted or max(counted) <= 0:
        return None
    return Observed(
        requests_per_s=max(counted) / 60,
        prompt_tokens=max(1.0, prompts / finished),
        output_tokens=max(1.0, outputs / finished),
        requests=finished,
        lengths=tuple(lengths),
    )


def gain_of(answer: Plain) -> float | None:
    """The share of the cost that the chosen configuration saves against the current one, for the same workload.

    Both with as many whole replicas as the workload takes. MEETS where the current one cannot meet the objectives
    and the chosen one can; None where that cannot be said: what runs is possible, whatever the model says of it.
    """
    chosen, current = answer.get("chosen"), answer.get("current")
    if not chosen or not current or not chosen.get("cost_per_hour"):
        return None
    if not current.get("replicas") or not current.get("cost_per_hour"):
        return None if current.get("constraint") in IMPOSSIBLE else MEETS
    return float(1 - chosen["cost_per_hour"] / current["cost_per_hour"])


def current_of(
    snapshot: Snapshot, deployment: Deployment, *, types: GpuTypes = CATALOGUE
) -> Plain | None:
    """What runs, as the request names it; None where no replica has found its place yet, or its GPU is not known."""
    living = [each for each in snapshot.variants_of(deployment.name) if not each.retired and each.gpu_type]
    if not living:
        return None
    kind, allowed = living[-1].gpu_type, deployment.spec.hardware.allow
    gpus = [gpu for view in snapshot.nodes.values() for gpu in view.gpus if not allowed or gpu.type in allowed]
    model = priced(gpus or [Gpu(uuid="", type=kind)], types).models.get(kind)
    if model is None:
        return None
    row = {**supply_row(model), "count": 1}
    return {"gpu_type": kind, "gpu": row, "configuration": dict(deployment.configuration)}


def words(configuration: Configuration) -> str:
    """A configuration as flags."""
    return ", ".join(f"{name}={value}" for name, value in sorted(configuration.items())) or "vLLM's defaults"


def is_same(one: DeploymentAdvice | None, other: DeploymentAdvice | None) -> bool:
    """Whether two advices ask for the same engines."""
    if one is None or other is None:
        return one is other
    return (one.gpu_type, dict(one.configuration)) == (other.gpu_type, dict(other.configuration))


def proposal_etag(deployment: Deployment) -> str:
    """Changes with what is proposed and with the deployment's desired fields; empty without a proposal."""
    proposal = deployment.proposal
    if proposal is None:
        return ""
    content = json.dumps([proposal.gpu_type, dict(proposal.configuration)], sort_keys=True)
    return f"{deployment.etag}.{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def accepted(deployment: Deployment, *, now_s: float) -> Deployment:
    """The deployment with its proposal in force, which must be there.

    A configuration that a user gave is turned over to enova: of its flags those stay that no proposal speaks of, and
    from now on the GPU type is the proposal's.
    """
    proposal = deployment.proposal
    assert proposal is not None, "there is nothing to accept"
    kept_flags = {name: value for name, value in deployment.spec.configuration.items() if name not in PROPOSED_FLAGS}
    advice = replace(proposal, configuration={**kept_flags, **proposal.configuration})
    spec = replace(deployment.spec, configuration={})
    return applied(replace(deployment, spec=spec), advice, now_s=now_s)


def applied(deployment: Deployment, advice: DeploymentAdvice, *, now_s: float) -> Deployment:
    """The deployment with other advice in force: a new generation, which rolls out."""
    return replace(
        deployment, advice=advice, proposal=None, generation=deployment.generation + 1, update_time_s=now_s
    )
