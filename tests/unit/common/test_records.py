"""The format of request records."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enova_common.records import (
    FORMAT,
    MalformedRecord,
    Outcome,
    RequestRecord,
    record_of_row,
    records_of_bytes,
    records_of_lines,
    row_of_record,
)

counts = st.none() | st.integers(0, 10**9)
seconds = st.none() | st.integers(0, 10**9).map(lambda micro: micro / 10**6)
texts = st.text(max_size=20)
records = st.builds(
    RequestRecord, arrival_s=st.integers(0, 2 * 10**9).map(float), outcome=st.sampled_from(Outcome), deployment=texts,
    serving_class=texts, tenant_hash=texts, replica=texts, stream=st.booleans(), status=st.integers(0, 599),
    prompt_tokens=counts, output_tokens=counts, max_tokens=counts, queue_s=seconds, ttft_s=seconds, tpot_s=seconds,
    prefix_hashes=st.lists(texts, max_size=3).map(tuple),
)


@given(records)
def test_a_row_is_read_as_it_was_written(record: RequestRecord) -> None:
    row = row_of_record(record)
    assert "\n" not in row
    assert record_of_row(row) == record


@given(st.lists(records, max_size=5), st.booleans())
def test_files_are_read_gzipped_or_not(items: list[RequestRecord], zipped: bool) -> None:
    data = "".join(f"{row_of_record(item)}\n" for item in items).encode()
    assert list(records_of_bytes(gzip.compress(data, mtime=0) if zipped else data)) == items


def test_missing_is_not_zero() -> None:
    row = row_of_record(RequestRecord(arrival_s=1.0, outcome=Outcome.REFUSED))
    assert json.loads(row) == {"format": FORMAT, "arrival_s": 1.0, "outcome": "REFUSED"}
    assert record_of_row(row).ttft_s is None
    assert '"output_tokens":0' in row_of_record(RequestRecord(arrival_s=1.0, outcome=Outcome.CUT, output_tokens=0))


def test_a_row_cut_by_a_crash_is_left_out() -> None:
    row = row_of_record(RequestRecord(arrival_s=1.0, outcome=Outcome.FINISHED)).encode()
    assert len(list(records_of_bytes(row + b"\n" + row[:10]))) == 1
    assert list(records_of_bytes(b"")) == []


def test_keys_of_a_later_minor_version_are_ignored() -> None:
    row = json.dumps({"format": FORMAT, "arrival_s": 1, "outcome": "FINISHED", "new": 5})
    assert record_of_row(row).arrival_s == 1.0


@pytest.mark.parametrize(("change", "named"), [
    ({"format": "enova.request/v2"}, "format"), ({"arrival_s": "x"}, "arrival_s"), ({"arrival_s": None}, "arrival_s"),
    ({"outcome": "GOOD"}, "outcome"), ({"prompt_tokens": -1}, "prompt_tokens"), ({"prompt_tokens": 1.5}, "prompt"),
    ({"output_tokens": True}, "output_tokens"), ({"ttft_s": -0.1}, "ttft_s"), ({"tpot_s": True}, "tpot_s"),
    ({"stream": 1}, "stream"), ({"replica": 3}, "replica"), ({"prefix_hashes": [1]}, "prefix_hashes"),
])
def test_a_wrong_row_is_refused_by_line_and_field(change: dict[str, Any], named: str) -> None:
    row = json.dumps({"format": FORMAT, "arrival_s": 1, "outcome": "FINISHED", **change})
    with pytest.raises(MalformedRecord, match=f"line 2: {named}"):
        list(records_of_lines(["", row]))


@pytest.mark.parametrize("row", ['{"format":"enova.request/v1","outcome":"CUT"}', "[]", "{", '{"arrival_s":NaN}'])
def test_what_is_no_record_is_refused(row: str) -> None:
    with pytest.raises(MalformedRecord):
        record_of_row(row)


def test_not_a_number_is_refused() -> None:
    with pytest.raises(MalformedRecord, match="arrival_s"):
        record_of_row('{"format":"enova.request/v1","outcome":"CUT","arrival_s":NaN}')


def test_a_broken_gzip_file_is_refused() -> None:
    with pytest.raises(MalformedRecord, match="gzip"):
        list(records_of_bytes(b"\x1f\x8bnonsense"))
