"""Traces become requests of a wanted density, and what is wrong with one is said."""

from __future__ import annotations

import numpy as np
import pytest

from enova_common.traces import Scenario, TraceError
from enova_simulator.cluster.setup import SetupError
from enova_simulator.cluster.trace import Rows, drawn, merged, read, refuse_gaps, requests_of, scaled, steepest

HEADER = "arrival_s,prompt_tokens,output_tokens"


def rows(count: int = 2000, *, every_s: float = 0.5) -> Rows:
    return Rows(
        arrival_s=np.linspace(0.0, every_s * (count - 1), count), prompt_tokens=np.arange(1, count + 1),
        output_tokens=np.full(count, 7, dtype=np.int64),
    )  # fmt: skip


def test_a_trace_of_requests_is_read_from_its_first_arrival() -> None:
    found = read([HEADER, "10.0,5,6", "12.5,7,8"])
    assert found.arrival_s.tolist() == [0.0, 2.5]
    assert found.lengths == ((5, 6), (7, 8))


def test_windows_of_counts_need_lengths_and_keep_gaps_empty() -> None:
    lines = ["t_s,n_requests,recording_gap", "0,300,0", "600,0,1", "1200,300,0"]
    with pytest.raises(TraceError, match="windows need lengths"):
        read(lines)
    found = read(lines, scenario=Scenario(lengths=[(10, 20)]))
    assert 450 < len(found) < 750
    assert not np.any((found.arrival_s >= 600) & (found.arrival_s < 1200))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([HEADER], "holds no request"),
        ([HEADER, "2.0,1,1", "1.0,1,1"], "line 3"),
        (["time,prompt,output", "1,2,3"], "unknown header"),
        ([HEADER, "1700000000000,1,1", "1800000000000,1,1"], "are these milliseconds"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said(lines: list[str], message: str) -> None:
    with pytest.raises((TraceError, SetupError), match=message):
        read(lines)


def test_a_silence_out_of_proportion_is_a_gap_unless_allowed() -> None:
    lines = [HEADER, *(f"{second},5,5" for second in [0, 1, 2, 3, 5000, 5001])]
    with pytest.raises(SetupError, match="nothing for 4997 s after 3 s"):
        read(lines)
    assert len(read(lines, allow_gaps=True)) == 6


def test_a_sparse_trace_has_no_gap() -> None:
    refuse_gaps(np.arange(0.0, 100_000.0, 3000.0))


def test_thinning_keeps_that_share_in_order() -> None:
    found = scaled(rows(), 0.25, seed=1)
    assert len(found) == pytest.approx(500, rel=0.15)
    assert set(found.prompt_tokens.tolist()) <= set(range(1, 2001))
    assert np.all(np.diff(found.arrival_s) >= 0)


def test_superposing_repeats_every_request_and_keeps_the_span() -> None:
    found = scaled(rows(), 3.5, seed=1)
    counts = np.bincount(found.prompt_tokens, minlength=2001)[1:]
    assert set(counts.tolist()) == {3, 4}
    assert len(found) == pytest.approx(7000, rel=0.05)
    assert found.arrival_s.max() <= rows().arrival_s.max()
    assert np.all(np.diff(found.arrival_s) >= 0)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_a_factor_must_be_positive(factor: float) -> None:
    with pytest.raises(SetupError, match="must be positive"):
        scaled(rows(), factor, seed=1)


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_drawn_requests_have_the_counts_that_were_asked(cv: float) -> None:
    counts = np.array([2000.0, 0.0, 4000.0])
    found = drawn(counts, width_s=600.0, lengths=[(3, 4)], cv=cv, seed=2)
    got = np.histogram(found.arrival_s, [0, 600, 1200, 1800])[0]
    assert got[1] == 0
    assert got[[0, 2]] == pytest.approx([2000, 4000], rel=0.05 + 0.05 * cv)


def test_more_variation_makes_gaps_vary_more() -> None:
    spreads = []
    for cv in (0.5, 1.0, 3.0):
        gaps = np.diff(drawn(np.array([5000.0]), width_s=600.0, lengths=[(1, 1)], cv=cv, seed=3).arrival_s)
        spreads.append(gaps.std() / gaps.mean())
    assert spreads == pytest.approx([0.5, 1.0, 3.0], rel=0.25)


def test_negative_counts_are_refused() -> None:
    with pytest.raises(SetupError, match="not negative"):
        drawn(np.array([1.0, -2.0]), width_s=60.0, lengths=[(1, 1)], cv=1.0, seed=1)


def test_the_steepest_window_holds_the_rise() -> None:
    counts = np.full(1000, 10.0)
    counts[600:] = 50.0
    [first] = steepest(counts, width_s=10.0, window_s=1800.0, requests_max=1e9, windows=1)
    assert first <= 600 < first + 180


def test_windows_do_not_overlap_nor_exceed_their_requests() -> None:
    counts = 10 + 5 * np.sin(np.arange(2000) / 50)
    places = steepest(counts, width_s=10.0, window_s=1800.0, requests_max=1900.0, windows=4)
    assert len(places) > 1
    assert all(abs(one - other) >= 180 for one in places for other in places if one != other)
    assert all(counts[place : place + 180].sum() <= 1900 for place in places)


def test_prefix_ids_become_blocks_that_equal_prompts_share() -> None:
    found = requests_of(Rows(
        arrival_s=np.array([0.0, 1.0]), prompt_tokens=np.array([1100, 600]), output_tokens=np.array([5, 5]),
        prefixes=((7, 8, 9), (7, 3)),
    ))  # fmt: skip
    first, second = found.hashes[: found.hash_ends[0]], found.hashes[found.hash_ends[0] :]
    assert len(first) == 1100 // 16, "no more than the prompt's full blocks"
    assert len(second) == 600 // 16
    assert first[:32].tolist() == second[:32].tolist()
    assert not set(first[32:].tolist()) & set(second[32:].tolist())


def test_merging_keeps_each_request_with_its_deployment_and_hashes() -> None:
    one = requests_of(Rows(
        arrival_s=np.array([0.0, 2.0]), prompt_tokens=np.array([600, 30]), output_tokens=np.array([5, 6]),
        prefixes=((1, 2), ()),
    ))  # fmt: skip
    two = requests_of(Rows(
        arrival_s=np.array([1.0]), prompt_tokens=np.array([700]), output_tokens=np.array([9]), prefixes=((4, 5),)
    ))  # fmt: skip
    both, places = merged([one, two])
    assert both.arrival_s.tolist() == [0.0, 1.0, 2.0]
    assert places.tolist() == [0, 1, 0]
    assert both.output_tokens.tolist() == [5, 9, 6]
    ends = both.hash_ends.tolist()
    assert both.hashes[: ends[0]].tolist() == one.hashes[: one.hash_ends[0]].tolist()
    assert both.hashes[ends[0] : ends[1]].tolist() == two.hashes.tolist()
    assert ends[1] == ends[2]
