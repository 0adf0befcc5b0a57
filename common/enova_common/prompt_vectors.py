"""Prompts as short vectors: hashed n-grams under one seeded, versioned random projection; pure.

Theory of operation. A prompt's words and pairs of neighbouring words are its n-grams. Each is hashed under the
projection's seed, and the hash says which `NONZEROS` of the vector's entries it is added to, and with which sign: a
sparse random projection of the n-gram counts that needs no stored matrix, so that all who know version, seed and
dimension make the same vector. Counts are damped by the square root, the sum has length one, and each entry is rounded
to a signed byte. Prompts of one kind share n-grams, so their vectors point alike; the angle is all that is used.

What a vector gives away: order is lost, some thousand n-grams fall onto some dozen rounded sums, so no text can be read
off it. Who knows the seed can still test a guess, by making the vector of a text and comparing: vectors are not
anonymous, they only are no text.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

METHOD = 1                # of making vectors: another number whenever the same projection would give others
DIMENSION_MAX = 256       # an entry is addressed by one byte of the hash
NONZEROS = 4              # entries that one n-gram is added to
HEAD_CHARACTERS = 1536    # of a prompt: instructions stand at its start
TAIL_CHARACTERS = 512     # and the question at its end
WORD_CHARACTERS = 24      # of a word; longer ones are cut: they are data, not language
LENGTH = 127              # of a vector as bytes: the largest entry of a vector with one n-gram still fits
PLACES_REMEMBERED = 256   # projections of embeddings: 5 bytes an entry each, one per deployment that an ingress serves

_WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")
_NUMBER = "0"             # which number it is says nothing about the kind of prompt
_DIGEST = struct.Struct(f"{NONZEROS + 1}B")


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """Which vectors are comparable: those of equal method, seed and dimension."""

    seed: int
    dimension: int = 128
    method: int = METHOD

    def __post_init__(self) -> None:
        if not 8 <= self.dimension <= DIMENSION_MAX:
            raise ValueError(f"dimension {self.dimension} is not within 8..{DIMENSION_MAX}")


def vectorise(text: str, projection: Projection) -> bytes:
    """The vector of a prompt, a signed byte an entry; all zero if it has no word."""
    counts = Counter(_grams(_bounded(text)))
    return _projected(((gram, math.sqrt(count)) for gram, count in counts.items()), projection)


def vectorise_embedding(embedding: Sequence[float], projection: Projection) -> bytes:
    """The vector of a prompt whose meaning another model has put into numbers."""
    dimension = projection.dimension
    sums = [0.0] * dimension
    digests = _digests_of_places(projection.seed, projection.method, len(embedding))
    for value, (one, two, three, four, signs) in zip(embedding, _DIGEST.iter_unpack(digests), strict=True):
        sums[one % dimension] += value if signs & 1 else -value
        sums[two % dimension] += value if signs & 2 else -value
        sums[three % dimension] += value if signs & 4 else -value
        sums[four % dimension] += value if signs & 8 else -value
    return quantised(sums)


@lru_cache(maxsize=PLACES_REMEMBERED)
def _digests_of_places(seed: int, method: int, length: int) -> bytes:
    """The digests of an embedding's places, one after the other: they are the same for every prompt."""
    key = _key(seed, method)
    return b"".join(_digest(f"\0{place}", key) for place in range(length))


def _projected(features: Iterable[tuple[str, float]], projection: Projection) -> bytes:
    dimension = projection.dimension
    sums = [0.0] * dimension
    key = _key(projection.seed, projection.method)
    for name, weight in features:
        digest = _digest(name, key)
        signs = digest[NONZEROS]
        for place in range(NONZEROS):
            sums[digest[place] % dimension] += weight if signs >> place & 1 else -weight
    return quantised(sums)


def _key(seed: int, method: int) -> bytes:
    return seed.to_bytes(8, "big", signed=True) + method.to_bytes(8, "big", signed=True)


def _digest(name: str, key: bytes) -> bytes:
    """Which entries a feature is added to, NONZEROS bytes, and with which signs, one byte."""
    return hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=NONZEROS + 1, key=key).digest()


def quantised(entries: Sequence[float]) -> bytes:
    """A vector as signed bytes, scaled to the length LENGTH; zero if it has none, or none that is finite."""
    norm = math.sqrt(sum(entry * entry for entry in entries))
    if not norm or not math.isfinite(norm):
        return bytes(len(entries))
    return bytes(round(entry * LENGTH / norm) & 0xFF for entry in entries)


def entries_of(vector: bytes) -> tuple[int, ...]:
    """The signed entries of a vector."""
    return tuple(byte - 256 if byte > 127 else byte for byte in vector)


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """How alike two vectors point, -1..1; 0 where one of them is zero."""
    norms = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / norms if norms else 0.0


def _bounded(text: str) -> str:
    if len(text) <= HEAD_CHARACTERS + TAIL_CHARACTERS:
        return text
    return text[:HEAD_CHARACTERS] + "\n" + text[-TAIL_CHARACTERS:]


def _grams(text: str) -> Iterable[str]:
    before = ""
    for found in _WORD.findall(text.lower()):
        word = _NUMBER if found[0].isdecimal() else found[:WORD_CHARACTERS]
        yield word
        if before:
            yield f"{before} {word}"
        before = word
