"""A request in plain values in, the answer or what is wrong with it in plain values out: what other processes call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why a request cannot be answered: the field that is to blame, what is wrong, what to do."""

    field: str
    message: str
    remedy: str = ""


def respond(plain: Mapping[str, object]) -> dict[str, object] | Problem:
    """The answer under the names of `RecommendConfigurationResponse`."""
    # The search brings scipy, which takes a second to import: who only names this function does without.
    from enova_recommender.recommend.advise import advise, evaluate, tier_of
    from enova_recommender.recommend.errors import RecommendError
    from enova_recommender.recommend.explain import answer
    from enova_recommender.recommend.request import RequestError, request_from_plain

    try:
        request = request_from_plain(plain)
        advice, running = advise(request), request.current
        current = None if running is None else evaluate(request, running, assurance=advice.assurance)
        return answer(request, advice, partial(tier_of, request), current)
    except RecommendError as error:
        remedy = error.remedy if isinstance(error, RequestError) else ""
        return Problem(field=error.field, message=error.message, remedy=remedy)
