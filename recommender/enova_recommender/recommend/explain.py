"""Advice as plain JSON values, and in sentences whose every number is one of those values.

Theory of operation. A sentence is a template with places such as `{chosen.cost_per_hour|dollars}`: the path of a field
of the answer and the form in which it is shown. The words around the places hold no figure of their own. Both the text
and its template are part of the answer, so that anybody can fill in the template again from the answer's fields and
must get the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from enova_recommender.performance import Tier
from enova_recommender.recommend.request import AdviceRequest
from enova_recommender.recommend.types import (
    ASSURANCES,
    Advice,
    Candidate,
    Constraint,
    EngineSettings,
    Mix,
    Objectives,
    Prediction,
    Sensitivity,
)
from enova_recommender.types import Interval, ModelShape, Parallelism

Answer = dict[str, object]
Flags = dict[str, bool | int | float | str]

RUNNERS_UP_EXPLAINED = 3
# What capacity ends at, for the sentence "what ends it is ...".
BINDING = MappingProxyType({
    Constraint.MEMORY: "memory for weights",
    Constraint.LAYOUT: "how heads, layers and experts can be cut",
    Constraint.PRECISION: "the types that the GPU computes in",
    Constraint.CONTEXT: "the context length",
    Constraint.TTFT: "the time to the first token",
    Constraint.TPOT: "the time between tokens",
    Constraint.KV_CACHE: "memory for the KV cache",
    Constraint.MAX_NUM_SEQS: "the batch limit max_num_seqs",
    Constraint.COMPUTE: "the GPU's arithmetic and bandwidth",
    Constraint.INVENTORY: "the number of GPUs",
    Constraint.COST: "the price",
})
# What the step times of a configuration rest on.
RESTS_ON = MappingProxyType({
    Tier.MEASURED: "kernels that were measured on this type of GPU",
    Tier.TRANSFERRED: "its data sheet and kernels that were measured on another type of GPU",
    Tier.CALIBRATED: "the step times of live engines",
})
# How likely it is that the objectives hold, where no configuration keeps them with the first of ASSURANCES.
CHANCES = MappingProxyType(
    dict(zip(ASSURANCES, ("almost always", "in three cases of four", "as likely as not"), strict=True))
)
_PLACE = re.compile(r"\{([A-Za-z0-9_.]+)(?:\|([a-z]+))?\}")


def answer(
    request: AdviceRequest, advice: Advice, tier_of: Callable[[EngineSettings], Tier], current: Candidate | None = None
) -> Answer:
    """The advice as plain values under the names of `RecommendConfigurationResponse`, with its explanation."""
    chosen, shape = advice.chosen, request.shape
    plain: Answer = {
        "model": request.shape.name,
        "parameters": request.shape.parameters,
        "requests_per_s": request.workload.requests_per_s,
        "objectives": _objectives(request.objectives),
        **({"current": _candidate(current, shape)} if current is not None else {}),
        "capacity_rps": capacity_rps(chosen),
        "sensitivities": [_sensitivity(each) for each in advice.sensitivities],
        "runners_up": [_candidate(each, shape) for each in advice.runners_up],
        "pareto": [_candidate(each, shape) for each in advice.pareto],
        "evaluated": advice.evaluated,
        "rejected": [{"constraint": constraint.value, "count": count} for constraint, count in advice.rejected],
        "not_modelled": list(request.shape.not_modelled),
        **({"mix": _mix(advice.mix, shape)} if advice.mix is not None else {}),
    }
    if chosen is not None:
        plain["chosen"] = _candidate(chosen, shape) | {"rests_on": RESTS_ON[tier_of(chosen.settings)]}
    plain["explanation"] = [{"text": fill(each, plain), "template": each} for each in templates(request, advice)]
    return plain


def flags(settings: EngineSettings, shape: ModelShape) -> Flags:
    """The settings under vLLM's flag names; what vLLM does by itself is left out."""
    sizes = settings.parallelism
    found: Flags = {}
    for name, value in (
        ("tensor_parallel_size", sizes.tensor),
        ("pipeline_parallel_size", sizes.pipeline),
        ("data_parallel_size", sizes.data),
    ):
        if value != 1:
            found[name] = value
    if sizes.expert:
        found["enable_expert_parallel"] = True
    found |= {
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
    }
    if settings.max_model_len != shape.context_tokens:
        found["max_model_len"] = settings.max_model_len
    precision = settings.precision
    if precision.dtype != "auto":
        found["dtype"] = precision.dtype
    if precision.quantization is not None:
        found["quantization"] = precision.quantization
    if precision.kv_cache_dtype != "auto":
        found["kv_cache_dtype"] = precision.kv_cache_dtype
    if not settings.enable_prefix_caching:
        found["enable_prefix_caching"] = False
    return found


def capacity_rps(candidate: Candidate | None) -> float:
    """Requests per second that all replicas of a candidate carry."""
    if candidate is None or candidate.prediction is None:
        return 0.0
    return candidate.replicas * candidate.prediction.capacity_rps.value


def fill(template: str, plain: Mapping[str, object]) -> str:
    """The template with its places filled in from the answer."""

    def shown(place: re.Match[str]) -> str:
        value: object = plain
        for step in place[1].split("."):
            if isinstance(value, Sequence):
                value = value[int(step)]
            else:
                assert isinstance(value, Mapping), place[1]
                value = value[step]
        return FORMS[place[2] or "text"](value)

    return _PLACE.sub(shown, template)


def templates(request: AdviceRequest, advice: Advice) -> Iterator[str]:
    """The sentences that belong to an advice, with places in place of figures."""
    if advice.chosen is None:
        yield from _nothing(advice)
    else:
        yield from _chosen(request, advice)
    if advice.mix is not None:
        yield from _mixed(advice.mix, instead=advice.chosen is not None)
    yield from _others(advice)
    if request.shape.not_modelled:
        parts = ", ".join(f"{{not_modelled.{index}}}" for index in range(len(request.shape.not_modelled)))
        yield f"The figures leave out: {parts}."


def _chosen(request: AdviceRequest, advice: Advice) -> Iterator[str]:
    assert advice.chosen is not None
    yield (
        "Run {model} on {chosen.gpu_type}: {chosen.replicas|count} x {chosen.gpus_per_replica|count} GPUs, "
        "{chosen.cost_per_hour|dollars} an hour."
    )
    if advice.chosen.prediction is None:
        return
    at = (
        "At {chosen.prediction.requests_per_s|figure} requests a second each, {objectives.percentile|percentile} of "
        "requests get their first token within {chosen.prediction.ttft_s.value|seconds} "
        "({chosen.prediction.ttft_s.low|seconds} to {chosen.prediction.ttft_s.high|seconds})"
    )
    ttft = "; {objectives.ttft_s|seconds} is asked for" if request.objectives.ttft_s is not None else ""
    yield f"{at}{ttft}."
    between = (
        "Between tokens pass {chosen.prediction.tpot_s.value|seconds} "
        "({chosen.prediction.tpot_s.low|seconds} to {chosen.prediction.tpot_s.high|seconds})"
    )
    tpot = "; {objectives.tpot_s|seconds} is asked for" if request.objectives.tpot_s is not None else ""
    yield f"{between}{tpot}."
    if advice.assurance != ASSURANCES[0]:
        chance = CHANCES[advice.assurance]
        yield f"The objectives are kept {chance} only: nothing of what there is keeps them for sure."
    yield (
        "A replica carries {chosen.prediction.capacity_rps.value|figure} requests a second "
        "({chosen.prediction.capacity_rps.low|figure} to {chosen.prediction.capacity_rps.high|figure}), all together "
        "{capacity_rps|figure}, of which {requests_per_s|figure} are needed; what ends it is "
        f"{BINDING[advice.chosen.prediction.binding]}."
    )
    yield (
        "On average {chosen.prediction.mean_sequences|figure} requests are in the batch, and the cache holds "
        "{chosen.prediction.kv_tokens|count} tokens. The step times rest on {chosen.rests_on}."
    )
    for index, sensitivity in enumerate(advice.sensitivities):
        place = f"sensitivities.{index}"
        limit = f" of {{{place}.limit_s|seconds}}" if sensitivity.limit_s is not None else ""
        yield (
            f"With {{{place}.change}}{limit}: {{{place}.cost_per_hour|dollars}} an hour for "
            f"{{{place}.capacity_rps|figure}} requests a second."
        )


def _nothing(advice: Advice) -> Iterator[str]:
    binding = f"; most of all it lacks {BINDING[advice.binding]}" if advice.binding is not None else ""
    yield f"Nothing of what there is carries {{requests_per_s|figure}} requests a second of {{model}}{binding}."
    for index, sensitivity in enumerate(advice.sensitivities):
        place = f"sensitivities.{index}"
        limit = f" of {{{place}.limit_s|seconds}}" if sensitivity.limit_s is not None else ""
        yield (
            f"With {{{place}.change}}{limit} it would be {{{place}.capacity_rps|figure}} requests a second for "
            f"{{{place}.cost_per_hour|dollars}} an hour."
        )


def _mixed(mix: Mix, *, instead: bool) -> Iterator[str]:
    parts = " and ".join(
        f"{{mix.parts.{index}.replicas|count}} x {{mix.parts.{index}.gpus_per_replica|count}} "
        f"{{mix.parts.{index}.gpu_type}} with {{mix.parts.{index}.weight|percentile}} of the requests"
        for index in range(len(mix.parts))
    )
    if instead:
        yield f"A mix is cheaper, {{mix.cost_per_hour|dollars}} an hour: {parts}."
        return
    yield f"{{mix.carried_rps|figure}} requests a second go for {{mix.cost_per_hour|dollars}} an hour: {parts}."
    for index in range(len(mix.missing)):
        place = f"mix.missing.{index}"
        what = f"{{{place}.count|count}} {{{place}.gpu_type}}"
        yield f"For the rest {what} are missing, {{{place}.cost_per_hour|dollars}} an hour."


def _mix(mix: Mix, shape: ModelShape) -> Answer:
    return {
        "parts": [_candidate(each.candidate, shape) | {"weight": each.weight} for each in mix.parts],
        "cost_per_hour": mix.cost_per_hour,
        "carried_rps": mix.carried_rps,
        "missing": [{"gpu_type": gpu, "count": count, "cost_per_hour": cost} for gpu, count, cost in mix.missing],
    }


def _others(advice: Advice) -> Iterator[str]:
    for index, candidate in enumerate(advice.runners_up[:RUNNERS_UP_EXPLAINED]):
        yield _loser(f"runners_up.{index}", candidate)
    if advice.rejected:
        parts = (
            f"{{rejected.{index}.count|count}} to {BINDING[constraint]}"
            for index, (constraint, _) in enumerate(advice.rejected)
        )
        yield f"Of {{evaluated|count}} configurations fell {', '.join(parts)}."


def _loser(place: str, candidate: Candidate) -> str:
    """Why a runner-up lost, from its own figures where they say it."""
    name = f"Not {{{place}.gpus_per_replica|count}} x {{{place}.gpu_type}} ({{{place}.layout}}):"
    prediction = candidate.prediction
    match candidate.constraint:
        case Constraint.COST:
            return (
                f"{name} {{{place}.replicas|count}} of them cost {{{place}.cost_per_hour|dollars}} an hour and carry "
                f"{{{place}.capacity_rps|figure}} requests a second."
            )
        case Constraint.INVENTORY if candidate.replicas:
            return f"{name} {{{place}.replicas|count}} of them would be needed, more than there is room for."
        case Constraint.TTFT if prediction is not None and math.isfinite(prediction.ttft_s.high):
            took = f"the first token takes {{{place}.prediction.ttft_s.value|seconds}}"
            return f"{name} {took} at best, {{objectives.ttft_s|seconds}} is asked for."
        case Constraint.TPOT if prediction is not None and math.isfinite(prediction.tpot_s.high):
            took = f"{{{place}.prediction.tpot_s.value|seconds}} pass between tokens"
            return f"{name} {took} at best, {{objectives.tpot_s|seconds}} is asked for."
        case _:
            return f"Not {{{place}.reason}}."


def _sensitivity(sensitivity: Sensitivity) -> Answer:
    plain: Answer = {
        "change": sensitivity.change,
        "cost_per_hour": sensitivity.cost_per_hour,
        "capacity_rps": sensitivity.capacity_rps,
    }
    if sensitivity.limit_s is not None:
        plain["limit_s"] = sensitivity.limit_s
    return plain


def layout_words(sizes: Parallelism) -> str:
    """How a replica is cut, in vLLM's abbreviations."""
    parts = [f"TP {sizes.tensor}"]
    parts += [f"{word} {size}" for word, size in (("PP", sizes.pipeline), ("DP", sizes.data)) if size > 1]
    return " ".join([*parts, *(["EP"] if sizes.expert else [])])


def _objectives(objectives: Objectives) -> Answer:
    given = {"ttft_s": objectives.ttft_s, "tpot_s": objectives.tpot_s, "percentile": objectives.percentile}
    return {name: value for name, value in given.items() if value is not None}


def _candidate(candidate: Candidate, shape: ModelShape) -> Answer:
    settings, prediction = candidate.settings, candidate.prediction
    plain: Answer = {
        "gpu_type": settings.gpu.name,
        "gpus_per_replica": settings.parallelism.gpus,
        "replicas": candidate.replicas,
        "gpus": candidate.replicas * settings.parallelism.gpus,
        "configuration": flags(settings, shape),
        "reason": candidate.reason,
        "layout": layout_words(settings.parallelism),
        "capacity_rps": capacity_rps(candidate),
    }
    if math.isfinite(candidate.cost_per_hour):
        plain["cost_per_hour"] = candidate.cost_per_hour
    if prediction is not None:
        plain["prediction"] = _prediction(prediction)
    if candidate.constraint is not None:
        plain["constraint"] = candidate.constraint.value
    return plain


def _prediction(prediction: Prediction) -> Answer:
    times = {"ttft_s": prediction.ttft_s, "tpot_s": prediction.tpot_s}
    return {
        "requests_per_s": prediction.requests_per_s,
        # A queue that grows without bound has no such time.
        **{name: _interval(time) for name, time in times.items() if math.isfinite(time.high)},
        "capacity_rps": _interval(prediction.capacity_rps),
        "prefill_tokens_per_s": prediction.prefill_tokens_per_s,
        "decode_tokens_per_s": prediction.decode_tokens_per_s,
        "mean_sequences": prediction.mean_sequences,
        "kv_tokens": prediction.kv_tokens,
        "binding": prediction.binding.value,
    }


def _interval(interval: Interval) -> Answer:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def figure(value: float) -> str:
    """A number to three significant digits, without an exponent: 0.0123, 1.5, 12300."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def seconds(value: float) -> str:
    """A duration: milliseconds below one second."""
    return f"{figure(value * 1000)} ms" if value < 1 else f"{figure(value)} s"


def _number(form: Callable[[float], str]) -> Callable[[object], str]:
    def shown(value: object) -> str:
        assert isinstance(value, int | float), value
        return form(value)

    return shown


FORMS: Mapping[str, Callable[[object], str]] = MappingProxyType({
    "text": str,
    "count": _number(lambda value: f"{value:.0f}"),
    "figure": _number(figure),
    "seconds": _number(seconds),
    "dollars": _number(lambda value: f"${value:.2f}"),
    "percentile": _number(lambda value: f"{figure(value * 100)} %"),
})
