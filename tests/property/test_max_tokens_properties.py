"""Censored lengths: for any mixture and any independent caps, the limit cuts the wanted share of what comes next."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr

from enova_recommender.recommend.max_tokens import density_of, limit_of, product_limit
from enova_recommender.recommend.max_tokens.survival import worth_at
from enova_testing.examples import examples

ANSWERS = 3000
SIGMAS = 5.0               # of the estimate's own error; the tail of 200 examples stays far below

lengths = st.lists(st.integers(1, 5000), min_size=1, max_size=80)


def _sample(values: list[int], flags: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(values, np.int64), np.resize(np.array(flags or [False], np.bool_), len(values))


@examples(60)
@given(
    seed=st.integers(0, 2**32 - 1),
    centre=st.floats(3.0, 7.0),
    spread=st.floats(0.1, 0.9),
    cap_at=st.floats(1.7, 3.0),
    cap_spread=st.floats(0.2, 0.6),
    cut_share=st.sampled_from([0.02, 0.05, 0.1, 0.25]),
)
def test_the_limit_of_a_known_distribution_cuts_the_wanted_share(
    *, seed: int, centre: float, spread: float, cap_at: float, cap_spread: float, cut_share: float
) -> None:
    draw = np.random.default_rng(seed)
    whole = np.exp(draw.normal(centre, spread, ANSWERS))
    caps = np.ceil(np.exp(draw.normal(centre + cap_at * spread, cap_spread, ANSWERS))).astype(np.int64)
    tokens = np.maximum(1, np.ceil(whole)).astype(np.int64)
    stopped = tokens > caps
    masses = product_limit(np.minimum(tokens, caps), stopped)
    limit = limit_of(masses, cut_share)
    if limit is None:
        assert masses.beyond >= cut_share / 2  # only a tail that was hidden is an excuse
        return
    # A length is a whole number, rounded up: it passes the limit if the draw does.
    cut = 1.0 - float(ndtr((math.log(limit) - centre) / spread))
    one_token = float(ndtr((math.log(limit + 1) - centre) / spread) - ndtr((math.log(limit - 1) - centre) / spread))
    error = math.sqrt(cut_share * (1 - cut_share) / worth_at(masses, cut_share))
    assert abs(cut - cut_share) < SIGMAS * error + one_token + 0.01


@given(values=lengths, flags=st.lists(st.booleans(), max_size=80))
def test_mass_is_never_made_or_lost(values: list[int], flags: list[bool]) -> None:
    tokens, stopped = _sample(values, flags)
    masses = product_limit(tokens, stopped)
    assert (masses.mass >= -1e-12).all()
    assert math.isclose(float(masses.mass.sum()) + masses.beyond, 1.0, abs_tol=1e-9)
    assert set(masses.lengths.tolist()) == set(tokens[~stopped].tolist())


@given(values=lengths, flags=st.lists(st.booleans(), max_size=80), seed=st.integers(0, 2**32 - 1))
def test_the_order_of_answers_does_not_matter(values: list[int], flags: list[bool], seed: int) -> None:
    tokens, stopped = _sample(values, flags)
    order = np.random.default_rng(seed).permutation(len(values))
    one, other = product_limit(tokens, stopped), product_limit(tokens[order], stopped[order])
    assert np.allclose(one.mass, other.mass)
    assert one.beyond == other.beyond


@given(values=lengths, flags=st.lists(st.booleans(), max_size=80))
def test_a_smaller_cut_share_never_gives_a_smaller_limit(values: list[int], flags: list[bool]) -> None:
    density = density_of(product_limit(*_sample(values, flags)))
    found = [density.limit(share) for share in (0.5, 0.2, 0.1, 0.05, 0.01)]
    known = [limit for limit in found if limit is not None]
    assert known == sorted(known)
    assert found[: len(known)] == known  # once the tail is unseen, it stays so further out


@given(values=lengths, flags=st.lists(st.booleans(), max_size=80), place=st.integers(0, 79))
def test_learning_that_an_answer_was_stopped_never_shortens_the_limit(
    values: list[int], flags: list[bool], place: int
) -> None:
    tokens, stopped = _sample(values, flags)
    place %= len(values)
    told = stopped.copy()
    told[place] = True
    ended = stopped.copy()
    ended[place] = False
    survival_told = 1.0 - _cumulative(tokens, told)
    survival_ended = 1.0 - _cumulative(tokens, ended)
    assert (survival_told >= survival_ended - 1e-9).all()


def _cumulative(tokens: np.ndarray, stopped: np.ndarray) -> np.ndarray:
    masses = product_limit(tokens, stopped)
    return np.array([float(masses.mass[masses.lengths <= each].sum()) for each in np.unique(tokens)])
