"""Settings: what is accepted, and that every problem is told at once, by source and key."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NewType

import pytest

from enova_common.errors import InvalidField
from enova_common.settings import InvalidSettings, TlsSettings, between, settings_from

NodeName = NewType("NodeName", str)


class Gpus(StrEnum):
    NVML = "nvml"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    type: str
    memory_bytes: int = field(default=1, metadata=between(1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    command: tuple[str, ...] = ("vllm", "serve")
    timeout_s: float = field(default=30.0, metadata=between(0.1, 600))


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    node: NodeName
    data_dir: Path = Path("/var/lib/enova")
    gpus: Gpus = Gpus.NONE
    port: int = field(default=0, metadata=between(0, 65535))
    coordinators: list[str] = field(default_factory=list, metadata=between(0, 2))
    verbose: bool = False
    ready_file: Path | None = None
    store: Literal["etcd", "sqlite"] = "sqlite"
    engine: Engine = field(default_factory=Engine)
    tls: TlsSettings | None = None
    cards: tuple[Card, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.store == "etcd" and not self.coordinators:
            raise InvalidField("etcd needs coordinators", field="coordinators")


def read(document: dict[str, Any], **env: str) -> Example:
    return settings_from(Example, document, env, "ENOVA_X", source="x.toml")


def problems(document: dict[str, Any], **env: str) -> list[str]:
    with pytest.raises(InvalidSettings) as raised:
        read(document, **env)
    assert str(raised.value) == "\n".join(raised.value.problems)
    return list(raised.value.problems)


def test_defaults_fill_what_is_not_given() -> None:
    assert read({"node": "n1"}) == Example(node=NodeName("n1"))


def test_every_type_is_read_from_the_document() -> None:
    document = {
        "node": "n1", "data_dir": "/d", "gpus": "nvml", "port": 7, "coordinators": ["a:1"], "verbose": True,
        "ready_file": "/r", "store": "etcd", "engine": {"command": ["x"], "timeout_s": 5},
        "tls": {"ca": "/ca", "cert": "/c", "key": "/k"}, "cards": [{"type": "H100", "memory_bytes": 2}],
        "labels": {"rack": "7"},
    }
    assert read(document) == Example(
        node=NodeName("n1"), data_dir=Path("/d"), gpus=Gpus.NVML, port=7, coordinators=["a:1"], verbose=True,
        ready_file=Path("/r"), store="etcd", engine=Engine(command=("x",), timeout_s=5.0),
        tls=TlsSettings(ca=Path("/ca"), cert=Path("/c"), key=Path("/k")), cards=(Card(type="H100", memory_bytes=2),),
        labels={"rack": "7"},
    )


def test_the_environment_wins_over_the_document_and_reaches_into_tables() -> None:
    value = read(
        {"node": "n1", "port": 1, "engine": {"timeout_s": 9.0}},
        ENOVA_X_PORT="2", ENOVA_X_ENGINE_TIMEOUT_S="3.5", ENOVA_X_ENGINE_COMMAND='["a b", "c"]', ENOVA_X_VERBOSE="yes",
        ENOVA_X_COORDINATORS="h1:1, h2:2", ENOVA_X_GPUS="nvml", ENOVA_X_READY_FILE="/r", ENOVA_X_LABELS='{a = "b"}',
        ENOVA_X_TLS_CA="/ca", ENOVA_X_TLS_CERT="/c", ENOVA_X_TLS_KEY="/k", PATH="/bin",
    )
    assert value == Example(
        node=NodeName("n1"), port=2, engine=Engine(command=("a b", "c"), timeout_s=3.5), verbose=True, gpus=Gpus.NVML,
        coordinators=["h1:1", "h2:2"], ready_file=Path("/r"), labels={"a": "b"},
        tls=TlsSettings(ca=Path("/ca"), cert=Path("/c"), key=Path("/k")),
    )


def test_every_problem_is_told_at_once_with_its_source_and_key() -> None:
    document = {
        "prot": 1, "port": 70000, "gpus": "nvlm", "verbose": 1, "engine": {"timeout_s": "long"},
        "coordinators": ["a", "b", "c"], "tls": {"ca": "/ca"}, "cards": [{"type": "H100"}, {"memory_bytes": 0}],
    }
    assert problems(document, ENOVA_X_STORE="redis", ENOVA_X_PROT="1") == [
        "x.toml: prot: unknown key; did you mean port?",
        "x.toml: node: missing: set it there, or in ENOVA_X_NODE",
        "x.toml: gpus: 'nvlm' is not one of nvml, none; did you mean nvml?",
        "x.toml: port: 70000 is not between 0 and 65535",
        "x.toml: coordinators: its length, 3, is not between 0 and 2",
        "x.toml: verbose: must be true or false, not a whole number (1)",
        "ENOVA_X_STORE: store: 'redis' is not one of etcd, sqlite",
        "x.toml: engine.timeout_s: must be a number, not a text ('long')",
        "x.toml: tls.cert: missing: set it there, or in ENOVA_X_TLS_CERT",
        "x.toml: tls.key: missing: set it there, or in ENOVA_X_TLS_KEY",
        "x.toml: cards.1.type: missing: set it there, or in ENOVA_X_CARDS_1_TYPE",
        "x.toml: cards.1.memory_bytes: 0 is not at least 1",
        "ENOVA_X_PROT: unknown variable; did you mean ENOVA_X_PORT?",
    ]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("node", 1, "must be a text, not a whole number (1)"),
        ("node", True, "must be a text, not true or false (True)"),
        ("port", True, "must be a whole number, not true or false (True)"),
        ("port", 1.0, "must be a whole number, not a number (1.0)"),
        ("data_dir", "", "must be a path, not an empty text"),
        ("coordinators", "a", "must be a list, not a text ('a')"),
        ("coordinators", [1], "must be a text, not a whole number (1)"),
        ("engine", 3, "must be a table, not a whole number (3)"),
        ("labels", [], "must be a table, not a list"),
        ("cards", [1], "must be a table, not a whole number (1)"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(key: str, value: object, problem: str) -> None:
    assert problems({"node": "n1", key: value}) == [f"x.toml: {key}: {problem}"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_must_be_finite(value: float) -> None:
    assert problems({"node": "n1", "engine": {"timeout_s": value}}) == [
        f"x.toml: engine.timeout_s: {value} is not a finite number"
    ]


@pytest.mark.parametrize(
    ("variable", "text", "problem"),
    [
        ("ENOVA_X_PORT", "many", "port: 'many' is not a whole number"),
        ("ENOVA_X_VERBOSE", "maybe", "verbose: 'maybe' is neither true nor false"),
        ("ENOVA_X_PORT", "70000", "port: 70000 is not between 0 and 65535"),
        ("ENOVA_X_CARDS", "[{", "cards: '[{' is not a TOML value:"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, text: str, problem: str) -> None:
    [line] = problems({"node": "n1"}, **{variable: text})
    assert line.startswith(f"{variable}: {problem}")


def test_what_the_dataclass_itself_refuses_names_the_key() -> None:
    assert problems({"node": "n1", "store": "etcd"}) == ["x.toml: coordinators: etcd needs coordinators"]


def test_an_error_has_the_first_key_and_a_remedy() -> None:
    with pytest.raises(InvalidSettings) as raised:
        read({})
    assert raised.value.first_field == "node"
    assert raised.value.reason == "INVALID_SETTINGS"


def test_settings_cannot_be_changed_after_they_are_read() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        read({"node": "n1"}).port = 3  # type: ignore[misc]
