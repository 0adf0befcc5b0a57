"""Questions about a whole fleet in, answers or what is wrong with the questions out: what other processes call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from enova_recommender.recommend.allocation_types import Allocation, AllocationRequest, Option, SolveLimits
from enova_recommender.recommend.errors import RecommendError
from enova_recommender.recommend.request import RequestError
from enova_recommender.recommend.respond import Problem
from enova_recommender.types import Interval

CAPACITY_BASIS = "the lower bound of the 80 % interval of its predicted capacity"
RUNNING = "as it runs now"         # the name of the option that runs

Plain = Mapping[str, object]
Flags = Mapping[str, bool | int | float | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionsQuestion:
    """A deployment: its request (`current` is what runs), and the configuration that a user gave it, if any."""

    request: Plain
    pinned: Plain | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionFacts:
    """What an option is, for whoever is shown it."""

    gpu_type: str
    layout: str
    configuration: Flags
    capacity_rps: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """The options of a deployment, and by their names what they are."""

    options: tuple[Option, ...]
    facts: Mapping[str, OptionFacts]
    within_objectives: bool = True     # False: nothing meets them, so they are left out


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationQuestion:
    """A whole fleet, and when to be content."""

    request: AllocationRequest
    limits: SolveLimits


def fleet_options(question: OptionsQuestion) -> FleetOptions | Problem:
    """The ways to run one deployment."""
    # The search and the programme bring scipy, which takes a second to import: who only names them does without.
    from enova_recommender.recommend.fleet_options import options_for

    try:
        return options_for(question)
    except RecommendError as error:
        remedy = error.remedy if isinstance(error, RequestError) else ""
        return Problem(field=error.field, message=error.message, remedy=remedy)


def allocated(question: AllocationQuestion) -> Allocation | Problem:
    """The allocation of a fleet."""
    from enova_recommender.recommend.allocation import allocate

    try:
        return allocate(question.request, question.limits)
    except RecommendError as error:
        return Problem(field=error.field, message=error.message)
