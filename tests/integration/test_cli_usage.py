"""A wrong use of the command: code 2, in JSON where JSON was asked for."""

from __future__ import annotations

import pytest

from enova_testing.fleet import run_enova

pytestmark = [pytest.mark.network]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("get", "nonsense"), ""),
        (("scale", "deployment/x", "--replicas", "many"), "--replicas"),
        (("get", "nodes", "--no-such-option"), ""),
        (("scale", "deployment/x"), "--replicas"),
        (("no-such-command",), ""),
    ],
)
def test_with_json_a_wrong_use_is_one_json_object(arguments: tuple[str, ...], field: str) -> None:
    result = run_enova(*arguments, "-o", "json")
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1
    assert (result.error["reason"], result.error["field"]) == ("USAGE", field)
    assert "--help" in result.error["remedy"]


def test_without_json_it_is_told_to_people() -> None:
    result = run_enova("get", "nonsense")
    assert result.code == 2
    assert "unknown kind 'nonsense'" in result.err


def test_what_goes_well_and_what_fails_otherwise_keep_their_codes() -> None:
    assert run_enova("version", "-o", "json").code == 0
    assert run_enova("get", "--help", "-o", "json").code == 0
    assert run_enova("get", "nodes", "-o", "json").code == 3
