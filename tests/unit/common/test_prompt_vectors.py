"""Prompts become vectors that show their kind and not their text."""

from __future__ import annotations

import hashlib

import pytest

from enova_common.prompt_vectors import (
    HEAD_CHARACTERS,
    LENGTH,
    TAIL_CHARACTERS,
    Projection,
    cosine,
    entries_of,
    quantised,
    vectorise,
    vectorise_embedding,
)

PROJECTION = Projection(seed=11)
SUM = "Tom has 3 apples and buys 4 more. How many apples does he have now?"
OTHER_SUM = "Ann has 17 pears and buys 25 more. How many pears does she have now?"
CODE = "Write a python function to find the shared elements of two given lists."


def _alike(one: str, other: str, projection: Projection = PROJECTION) -> float:
    return cosine(entries_of(vectorise(one, projection)), entries_of(vectorise(other, projection)))


def test_the_same_projection_makes_the_same_vector_on_every_host() -> None:
    # Kept bytes: another result means another METHOD, or hosts of two releases misunderstand each other.
    vector = vectorise("Write a function", Projection(seed=1, dimension=16))
    assert entries_of(vector) == (28, -28, -28, 0, 0, -28, -28, 0, -28, 0, 57, -57, -57, -28, 28, 0)


def test_prompts_of_one_kind_point_alike_and_others_do_not() -> None:
    assert _alike(SUM, OTHER_SUM) > 0.5
    assert _alike(SUM, CODE) < 0.3
    assert _alike(SUM, SUM.upper()) == pytest.approx(1.0)


def test_vectors_of_another_seed_or_dimension_say_nothing_about_each_other() -> None:
    mine = entries_of(vectorise(SUM, PROJECTION))
    theirs = entries_of(vectorise(SUM, Projection(seed=12)))
    assert abs(cosine(mine, theirs)) < 0.35
    assert len(vectorise(SUM, Projection(seed=11, dimension=64))) == 64


def test_a_vector_is_no_text() -> None:
    prompt = "the patient Jane Roe of Springfield, number 555-0199, asks about her diagnosis of lupus " * 4
    vector = vectorise(prompt, PROJECTION)
    assert len(vector) == PROJECTION.dimension < len(prompt)
    as_text = vector.decode("latin-1").lower()
    assert not any(word in as_text for word in prompt.lower().split() if len(word) > 2)
    # Order is lost beyond neighbours: several texts share one vector.
    assert vectorise("a b a c a", PROJECTION) == vectorise("a c a b a", PROJECTION)


def test_an_embedding_of_another_model_becomes_a_vector_that_keeps_its_angles() -> None:
    one = [1.0 if place % 3 else -0.5 for place in range(384)]
    near = [value + (0.2 if place % 7 == 0 else 0.0) for place, value in enumerate(one)]
    far = [1.0 if place % 5 < 2 else -1.0 for place in range(384)]
    vectors = [entries_of(vectorise_embedding(each, PROJECTION)) for each in (one, near, far)]
    assert cosine(vectors[0], vectors[1]) > 0.9
    assert cosine(vectors[0], vectors[2]) < 0.5


def test_the_same_projection_makes_the_same_vector_of_an_embedding_on_every_host() -> None:
    vector = vectorise_embedding([0.5, -1.0, 0.25, 2.0], Projection(seed=-1, dimension=16, method=1_000_001))
    assert entries_of(vector) == (0, 59, -37, 0, 29, -88, 37, -7, 0, 0, 0, 15, -7, 0, -15, -29)


def test_the_places_of_embeddings_are_hashed_once_a_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = [1.0] * 384, [float(place % 5) for place in range(384)]
    expected = vectorise_embedding(other, Projection(seed=77, dimension=128))
    vectorise_embedding(one, Projection(seed=78))
    monkeypatch.delattr(hashlib, "blake2b")
    assert vectorise_embedding(other, Projection(seed=77, dimension=128)) == expected
    assert len(vectorise_embedding(other, Projection(seed=77, dimension=64))) == 64
    with pytest.raises(AttributeError):
        vectorise_embedding(other[:-1], Projection(seed=77))


def test_a_prompt_without_words_has_the_zero_vector() -> None:
    assert vectorise("", PROJECTION) == bytes(PROJECTION.dimension)
    assert vectorise(" \n\t", PROJECTION) == bytes(PROJECTION.dimension)
    assert cosine((0, 0), (1, 2)) == 0.0


def test_only_the_head_and_the_tail_of_a_long_prompt_count() -> None:
    head, tail = "h " * (HEAD_CHARACTERS // 2), "t " * (TAIL_CHARACTERS // 2)
    assert vectorise(head + "x " * 50_000 + tail, PROJECTION) == vectorise(head + "y " * 50_000 + tail, PROJECTION)


def test_which_number_a_prompt_names_says_nothing() -> None:
    assert vectorise("add 3 and 4", PROJECTION) == vectorise("add 999 and 12345", PROJECTION)


@pytest.mark.parametrize("text", ["\ud800 broken", "日本語のテキスト", "\x00\x01", "🙂" * 10])
def test_any_text_has_a_vector(text: str) -> None:
    assert len(vectorise(text, PROJECTION)) == PROJECTION.dimension


def test_every_entry_is_a_signed_byte() -> None:
    assert entries_of(quantised((1.0, 0.0, 0.0))) == (LENGTH, 0, 0)
    assert entries_of(quantised((-1.0, 0.0, 0.0))) == (-LENGTH, 0, 0)
    assert quantised((float("inf"), 1.0)) == bytes(2)


@pytest.mark.parametrize("dimension", [0, 7, 257])
def test_a_dimension_out_of_range_is_refused(dimension: int) -> None:
    with pytest.raises(ValueError, match="dimension"):
        Projection(seed=1, dimension=dimension)
