"""Limits on the length of answers, by kind of prompt: communities, censored densities, drift; pure."""

from enova_recommender.recommend.max_tokens.communities import NOWHERE, assign, centres, communities
from enova_recommender.recommend.max_tokens.learning import (
    Knowledge,
    Lesson,
    Taught,
    density_of_kind,
    grouped,
    learned,
    limits,
    nothing_known,
    taught,
)
from enova_recommender.recommend.max_tokens.saving import UnreadableKnowledge, from_plain, to_plain
from enova_recommender.recommend.max_tokens.survival import (
    LengthDensity,
    Masses,
    density_of,
    limit_of,
    product_limit,
)
from enova_recommender.recommend.max_tokens.types import Centres, Kind, LengthSamples, Limits, NoLimit, no_samples

__all__ = [
    "Knowledge", "nothing_known", "learned", "grouped", "limits", "density_of_kind", "Lesson", "Taught", "taught",
    "LengthSamples", "no_samples", "Limits", "Kind", "NoLimit", "Centres",
    "communities", "centres", "assign", "NOWHERE",
    "product_limit", "density_of", "limit_of", "Masses", "LengthDensity",
    "to_plain", "from_plain", "UnreadableKnowledge",
]  # fmt: skip
