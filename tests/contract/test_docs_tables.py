"""Tables of the documentation are whole: each has its header, and each row its columns."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
ROW = re.compile(r"`[^`]*`|\\\|")  # a bar within code, or escaped, divides nothing


def tables(page: Path) -> list[list[str]]:
    """Runs of lines that begin with a bar, outside of blocks of code."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [list(lines) for is_row, lines in groupby(prose.splitlines(), lambda line: line.startswith("|")) if is_row]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_row_stands_in_a_table_with_a_header_and_its_columns(page: Path) -> None:
    for rows in tables(page):
        assert len(rows) > 1, rows[0]
        assert set(rows[1]) <= set("|-: "), f"no header above: {rows[0]}"
        columns = [ROW.sub("", row).count("|") for row in rows]
        assert len(set(columns)) == 1, rows[columns.index(max(columns))]


def test_the_pages_hold_tables() -> None:
    assert sum(len(tables(page)) for page in PAGES) > 5
