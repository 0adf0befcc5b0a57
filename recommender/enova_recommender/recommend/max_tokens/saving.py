"""What is known of answers' lengths as plain JSON values and back; pure, and nothing in it can run."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from enova_recommender.recommend.max_tokens.communities import KINDS_MAX, NOWHERE
from enova_recommender.recommend.max_tokens.drift import Chart
from enova_recommender.recommend.max_tokens.learning import SAMPLES_MAX, Knowledge
from enova_recommender.recommend.max_tokens.types import Centres, LengthSamples

KIND = "enova.length-knowledge"
VERSION = 1
DIMENSION_MAX = 256


class UnreadableKnowledge(ValueError):
    """The values are not what this release wrote."""


def to_plain(known: Knowledge) -> dict[str, Any]:
    """JSON values that `from_plain` makes the same knowledge of."""
    return {
        "kind": KIND,
        "version": VERSION,
        "dimension": known.samples.vectors.shape[1],
        "vectors": _text(known.samples.vectors.astype("i1")),
        "tokens": _text(known.samples.tokens.astype("<i4")),
        "stopped": _text(known.samples.stopped.astype("u1")),
        "kinds": _text(known.kinds.astype("<i2")),
        "centroids": _text(known.centres.centroids.astype("<f8")),
        "reaches": known.centres.reaches.tolist(),
        "charts": [[each.longer, each.longer_for] for each in known.charts],
        "grouped_at": known.grouped_at,
        "fresh": known.fresh,
        "drifts": known.drifts,
    }


def from_plain(plain: Mapping[str, Any]) -> Knowledge:
    """The knowledge of some JSON values. Raises UnreadableKnowledge for anything else."""
    try:
        if plain["kind"] != KIND or plain["version"] != VERSION:
            raise UnreadableKnowledge(f"{plain['kind']!r} version {plain['version']!r} is not known here")
        known = _knowledge(plain)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise UnreadableKnowledge(f"knowledge of lengths cannot be read: {error}") from error
    problem = _problem(known)
    if problem:
        raise UnreadableKnowledge(f"knowledge of lengths contradicts itself: {problem}")
    return known


def _knowledge(plain: Mapping[str, Any]) -> Knowledge:
    dimension = int(plain["dimension"])
    if not 1 <= dimension <= DIMENSION_MAX:
        raise UnreadableKnowledge(f"dimension {dimension}")
    return Knowledge(
        samples=LengthSamples(
            vectors=_array(plain["vectors"], "i1").reshape(-1, dimension),
            tokens=_array(plain["tokens"], "<i4").astype(np.int64),
            stopped=_array(plain["stopped"], "u1").astype(np.bool_),
        ),
        kinds=_array(plain["kinds"], "<i2").astype(np.int64),
        centres=Centres(
            _array(plain["centroids"], "<f8").reshape(-1, dimension), np.array(plain["reaches"], np.float64)
        ),
        charts=tuple(Chart(float(longer), int(longer_for)) for longer, longer_for in plain["charts"]),
        grouped_at=int(plain["grouped_at"]),
        fresh=int(plain["fresh"]),
        drifts=int(plain["drifts"]),
    )


def _problem(known: Knowledge) -> str:
    samples, kinds = known.samples, len(known.centres.reaches)
    if not len(samples.vectors) == len(samples.tokens) == len(samples.stopped) == len(known.kinds) <= SAMPLES_MAX:
        return "its samples are not equally many"
    if not len(known.centres.centroids) == len(known.charts) == kinds <= KINDS_MAX:
        return "its kinds are not equally many"
    if len(known.kinds) and not (known.kinds.min() >= NOWHERE and known.kinds.max() < kinds):
        return "a sample is of no kind that there is"
    if not (np.isfinite(known.centres.centroids).all() and np.isfinite(known.centres.reaches).all()):
        return "a centroid is not finite"
    return "" if not len(samples) or samples.tokens.min() >= 0 else "a length is negative"


def _text(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


def _array(text: str, kind: str) -> npt.NDArray[Any]:
    return np.frombuffer(base64.b64decode(text, validate=True), np.dtype(kind)).copy()
