"""How many examples of a property are tried: never more than it asks for, never next to none."""

from __future__ import annotations

import pytest

from enova_testing.examples import SHARE_VARIABLE, examples


@pytest.mark.parametrize(
    ("share", "asked", "tried"), [("1", 300, 300), ("0.25", 300, 75), ("0.25", 10, 5), ("0.25", 3, 3), ("2", 40, 40)]
)
def test_a_share_of_the_examples_is_tried(monkeypatch: pytest.MonkeyPatch, share: str, asked: int, tried: int) -> None:
    monkeypatch.setenv(SHARE_VARIABLE, share)
    assert examples(asked).max_examples == tried


def test_all_are_tried_where_nobody_asks_for_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARE_VARIABLE, raising=False)
    assert examples(40).max_examples == 40
