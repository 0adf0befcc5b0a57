"""The ways to run one deployment that the allocation of a fleet chooses from, each with what a replica of it carries.

A deployment without a configuration of its own may run the best settings of each layout on each type of GPU; one with
a configuration may run that on each type that it fits. What runs now is among them, so that it may stay. A replica
counts with the lower bound of the interval of its predicted capacity: a fleet that is built on the middle of it lacks
capacity in every second case.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from enova_recommender.recommend.advise import evaluate, searched
from enova_recommender.recommend.allocation_types import OPTIONS_MAX, Option
from enova_recommender.recommend.errors import RecommendError
from enova_recommender.recommend.explain import flags, layout_words
from enova_recommender.recommend.fleet import RUNNING, FleetOptions, OptionFacts, OptionsQuestion
from enova_recommender.recommend.request import AdviceRequest, request_from_plain, settings_of_flags
from enova_recommender.recommend.types import Candidate, Objectives

LAYOUTS_MAX = OPTIONS_MAX // 2

Plain = Mapping[str, object]


def options_for(question: OptionsQuestion) -> FleetOptions:
    """The options of one deployment. Raises RecommendError for what is wrong with its request."""
    request = request_from_plain(question.request)
    found = _options(request, question.pinned)
    nothing = Objectives(percentile=request.objectives.percentile)
    if found.options or request.objectives == nothing:
        return found
    # What misses its objectives is better than what does not start.
    return replace(_options(replace(request, objectives=nothing), question.pinned), within_objectives=False)


def _options(request: AdviceRequest, pinned: Plain | None) -> FleetOptions:
    options: list[Option] = []
    facts: dict[str, OptionFacts] = {}
    for name, candidate in _candidates(request, pinned):
        settings = candidate.settings
        rate = candidate.prediction.capacity_rps if candidate.prediction is not None else None
        if rate is None or not rate.low > 0 or any(settings == each.settings for each in options):
            continue
        options.append(Option(name=name, settings=settings, capacity_rps=rate.low))
        facts[name] = OptionFacts(
            gpu_type=settings.gpu.name, layout=layout_words(settings.parallelism),
            configuration=flags(settings, request.shape), capacity_rps=rate,
        )  # fmt: skip
    return FleetOptions(options=tuple(options), facts=facts)


def _candidates(request: AdviceRequest, pinned: Plain | None) -> Iterator[tuple[str, Candidate]]:
    """What runs first; then what the user's configuration is on each type, or the best of each layout; with names."""
    if request.current is not None and (running := evaluate(request, request.current)) is not None:
        yield RUNNING, running
    for each in _best_of_layouts(request) if pinned is None else _on_each_type(request, pinned):
        yield f"{each.settings.gpu.name} {layout_words(each.settings.parallelism)}", each


def _best_of_layouts(request: AdviceRequest) -> Iterator[Candidate]:
    try:
        yield from searched(request).finalists(LAYOUTS_MAX)
    except RecommendError as error:
        if not error.field.startswith("objectives."):
            raise                      # else nothing ever meets them: no layout is an option


def _on_each_type(request: AdviceRequest, pinned: Plain) -> Iterator[Candidate]:
    for gpu in dict.fromkeys(node.gpu for node in request.nodes):
        found = evaluate(request, settings_of_flags(gpu, pinned, request.shape))
        if found is not None:
            yield found
