"""What commands print: tables for people, JSON and YAML for programs, errors with their remedy."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar, assert_never

import yaml
from rich.console import Console
from rich.table import Table

from enova_common.errors import EnovaError

T = TypeVar("T")


class Format(StrEnum):
    """The forms that `-o` takes."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: its heading and the plain field it shows."""

    heading: str
    field: str


# What `get` shows of each kind; -o json shows everything.
COLUMNS: dict[str, Sequence[Column]] = {
    "deployments": (
        Column("NAME", "name"),
        Column("STATE", "state"),
        Column("READY", "ready_replicas"),
        Column("TARGET", "target_replicas"),
        Column("MODEL", "model"),
        Column("REASON", "reason"),
    ),
    "replicas": (
        Column("NAME", "name"),
        Column("STATE", "state"),
        Column("NODE", "node"),
        Column("GPUS", "gpus"),
        Column("PID", "pid"),
        Column("RESTARTS", "restarts"),
        Column("REASON", "reason"),
    ),
    "nodes": (
        Column("NAME", "name"),
        Column("STATE", "state"),
        Column("CLUSTER", "cluster"),
        Column("SCHEDULABLE", "schedulable"),
        Column("GPUS", "gpus"),
        Column("ENGINE", "engine"),
        Column("REASON", "reason"),
    ),
    "variants": (
        Column("NAME", "name"),
        Column("GPU", "gpu_type"),
        Column("TARGET", "target_replicas"),
        Column("WEIGHT", "weight"),
        Column("GENERATION", "generation"),
        Column("RETIRED", "retired"),
    ),
    "decisions": (
        Column("TIME", "create_time"),
        Column("DEPLOYMENT", "deployment"),
        Column("ACTION", "action"),
        Column("FROM", "from_replicas"),
        Column("TO", "to_replicas"),
        Column("ACTOR", "actor"),
        Column("REASON", "reason"),
    ),
    "verdicts": (
        Column("OBJECT", "object"),
        Column("VERDICT", "kind"),
        Column("CAUSE", "cause"),
        Column("SINCE", "since_time"),
        Column("REASON", "reason"),
        Column("SUGGESTED", "suggested_action"),
    ),
    "episodes": (
        Column("NAME", "name"),
        Column("STATE", "state"),
        Column("OBJECT", "object"),
        Column("VERDICT", "kind"),
        Column("CAUSES", "causes"),
        Column("SINCE", "since_time"),
        Column("REPLICAS", "member_count"),
        Column("SCORE", "score"),
        Column("CONFIDENCE", "confidence"),
        Column("SUGGESTED", "suggested_action"),
        Column("LABEL", "label"),
    ),
    "events": (
        Column("TIME", "create_time"),
        Column("SEVERITY", "severity"),
        Column("OBJECT", "object"),
        Column("REASON", "reason"),
        Column("MESSAGE", "message"),
    ),
}


def print_answer(value: T, form: Format, table: Callable[[T], None]) -> None:
    """A plain value for programs, or as `table` shows it to people."""
    match form:
        case Format.JSON:
            print(json.dumps(value, indent=2))
        case Format.YAML:
            print(yaml.safe_dump(value, sort_keys=False), end="")
        case Format.TABLE:
            table(value)
        case _:
            assert_never(form)


def print_objects(kind: str, objects: Iterable[dict[str, Any]], form: Format) -> None:
    """A bare array (json, yaml) or a table of many objects of one kind."""
    def table(rows: list[dict[str, Any]]) -> None:
        _console().print(_table(kind, rows) if rows else f"no {kind}", soft_wrap=not rows)

    print_answer(list(objects), form, table)


def print_object(kind: str, value: dict[str, Any], form: Format) -> None:
    """One object (json, yaml) or a table of one row."""
    print_answer(value, form, lambda only: _console().print(_table(kind, [only])))


def print_line(value: dict[str, Any], form: Format) -> None:
    """One object of a stream, told at once: a line of JSON (for people too, of whom none asked otherwise), or YAML."""
    match form:
        case Format.JSON | Format.TABLE:
            print(json.dumps(value), flush=True)
        case Format.YAML:
            print(yaml.safe_dump([value], sort_keys=False), end="", flush=True)


def print_fact(value: dict[str, Any], sentence: str, form: Format) -> None:
    """What a command has done: a sentence for people, an object for programs."""
    match form:
        case Format.JSON:
            print(json.dumps(value))
        case Format.YAML:
            print(yaml.safe_dump(value, sort_keys=False), end="")
        case Format.TABLE:
            print(sentence)


def print_description(value: dict[str, Any]) -> None:
    """Everything of one object, field by field, for people."""
    print(yaml.safe_dump({k: v for k, v in value.items() if v not in (None, "", [], {})}, sort_keys=False), end="")


def print_error(error: EnovaError, form: Format) -> None:
    """One clear line on stderr with the remedy, or one JSON object."""
    if form is Format.JSON:
        value = {"reason": error.reason, "message": error.message, "field": error.field, "remedy": error.remedy}
        print(json.dumps(value), file=sys.stderr)
    else:
        print(f"enova: {error} [{error.reason}]", file=sys.stderr)


def short(name: str) -> str:
    """A resource name without its collection: deployments/d/replicas/r is d/r."""
    return "/".join(name.split("/")[1::2]) if "/" in name else name


def cell(value: Any) -> str:
    """A plain value as a table shows it."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case list() if value and all(isinstance(each, str) and each.isupper() for each in value):
            return ", ".join(value)
        case list():
            return str(len(value))
        case str() if value.startswith(("deployments/", "nodes/", "decisions/", "episodes/")) and " " not in value:
            return short(value)
        case _:
            return str(value)


def _table(kind: str, rows: Sequence[dict[str, Any]]) -> Table:
    columns = COLUMNS[kind]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.heading, overflow="fold")
    for row in rows:
        table.add_row(*(cell(row.get(column.field)) for column in columns))
    return table


def _console() -> Console:
    # Piped output is not cut to a terminal's width: programs and people grep it.
    return Console(width=None if sys.stdout.isatty() else 240, highlight=False, markup=False)
