"""Settings: a TOML file and the environment, read once into frozen dataclasses; every problem is told at once.

A program declares one dataclass; its fields are the keys, nested dataclasses are tables, lists of dataclasses are
arrays of tables. The environment wins over the file: with the prefix ENOVA_AGENT, the key `tls.ca` is given by
ENOVA_AGENT_TLS_CA. Bounds are declared on the field (`metadata=between(0.1, 60)`), or checked in `__post_init__`,
which raises InvalidField.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from enova_common.errors import CallerError, InvalidField

T = TypeVar("T")

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_SEQUENCES = (list, tuple, frozenset, set, Sequence)


class InvalidSettings(CallerError):
    """One or more settings are wrong; `problems` has a line for each, naming its source and key."""

    reason = "INVALID_SETTINGS"

    def __init__(self, problems: Sequence[str], *, field: str = "") -> None:
        super().__init__("\n".join(problems), remedy="correct the settings and start again")
        self.problems = tuple(problems)
        self.first_field = field

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """The files of mutual TLS, in PEM, as `enova certs` writes them."""

    ca: Path
    """Who is trusted: the certificate of the fleet's authority, or several of them during a change."""
    cert: Path
    """This program's certificate, followed by intermediate ones if there are any."""
    key: Path
    """Its private key, readable by this program alone."""


def between(minimum: float = -math.inf, maximum: float = math.inf) -> Mapping[str, float]:
    """Metadata of a field: the range of its value, bounds included; for lists the range of their length."""
    return types.MappingProxyType({"minimum": minimum, "maximum": maximum})


def load_settings(cls: type[T], path: Path | None, env: Mapping[str, str], prefix: str) -> T:
    """Reads `cls` from the file (None: no file) and from the variables in `env` that begin with `prefix`.

    Raises InvalidSettings with all problems found.
    """
    if path is None:
        return settings_from(cls, {}, env, prefix)
    return settings_from(cls, _read_file(path), env, prefix, source=str(path))


def settings_from(
    cls: type[T], document: Mapping[str, Any], env: Mapping[str, str], prefix: str, *, source: str = "the settings"
) -> T:
    """Reads `cls` from a document that is parsed already; `source` names it in what is said of its problems."""
    reader = _Reader(source=source, env=env, prefix=prefix.rstrip("_"))
    value = reader.table(cls, document, ())
    reader.report_unknown_variables()
    if reader.problems or value is None:
        raise InvalidSettings(reader.problems, field=reader.first_field)
    return value


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InvalidSettings([f"{path}: there is no such file"]) from None
    except OSError as error:
        raise InvalidSettings([f"{path}: {error.strerror}"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings([f"{path}: not TOML: {error}"]) from error


class _Wrong(Exception):
    """A value does not fit its type; the text says how."""


@dataclass(slots=True)
class _Reader:
    """Walks a dataclass and a document side by side, and gathers what is wrong."""

    source: str
    env: Mapping[str, str]
    prefix: str
    problems: list[str] = dataclasses.field(default_factory=list)
    first_field: str = ""
    known_variables: set[str] = dataclasses.field(default_factory=set)

    def table(self, cls: type[T], document: Mapping[str, Any], path: tuple[str, ...]) -> T | None:
        """The dataclass made from a table; None if it cannot be made, with the problems noted."""
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        before = len(self.problems)
        for key in document:
            if key not in fields:
                self.note(self.source, (*path, key), "unknown key" + _suggestion(key, fields))
        values: dict[str, Any] = {}
        for name, field in fields.items():
            found, value = self._field(hints[name], document, (*path, name))
            if found:
                self._check_range(field, value, (*path, name))
                values[name] = value
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                self._missing(hints[name], (*path, name))
        if len(self.problems) > before:
            return None
        try:
            return cls(**values)
        except InvalidField as error:
            text = f"{error.message} ({error.remedy})" if error.remedy else error.message
            self.note(self.source, (*path, *filter(None, [error.field])), text)
            return None

    def _field(self, hint: Any, document: Mapping[str, Any], path: tuple[str, ...]) -> tuple[bool, Any]:
        nested = _nested_dataclass(hint)
        if nested is not None:
            return self._nested(nested, document, path)
        variable = self._variable(path)
        self.known_variables.add(variable)
        if variable in self.env:
            return True, self._convert(hint, self.env[variable], path, variable)
        if path[-1] in document:
            return True, self._convert(hint, document[path[-1]], path, "")
        return False, None

    def _nested(self, cls: type[Any], document: Mapping[str, Any], path: tuple[str, ...]) -> tuple[bool, Any]:
        """A table is there if the file has it, or if the environment gives one of its keys."""
        value = document.get(path[-1], {})
        given = path[-1] in document or any(name.startswith(self._variable(path) + "_") for name in self.env)
        if not isinstance(value, Mapping):
            self.note(self.source, path, f"must be a table, not {_kind(value)}")
            return False, None
        if not given:
            self._remember_variables(cls, path)
            return False, None
        return True, self.table(cls, value, path)

    def _remember_variables(self, cls: type[Any], path: tuple[str, ...]) -> None:
        for name, hint in typing.get_type_hints(cls).items():
            nested = _nested_dataclass(hint)
            if nested is not None:
                self._remember_variables(nested, (*path, name))
            else:
                self.known_variables.add(self._variable((*path, name)))

    def _convert(self, hint: Any, value: Any, path: tuple[str, ...], variable: str) -> Any:
        try:
            if variable:
                value = _from_text(hint, value)
            return self._typed(hint, value, path)
        except _Wrong as wrong:
            self.note(variable or self.source, path, str(wrong))
            return None

    def _typed(self, hint: Any, value: Any, path: tuple[str, ...]) -> Any:
        """The value as the hint wants it, tables in lists included. Raises _Wrong."""
        hint = _bare(hint)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if not isinstance(value, Mapping):
                raise _Wrong(f"must be a table, not {_kind(value)}")
            return self.table(hint, value, path)
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in _SEQUENCES:
            if not isinstance(value, list):
                raise _Wrong(f"must be a list, not {_kind(value)}")
            item = arguments[0] if arguments else str
            items = [self._typed(item, entry, (*path, str(index))) for index, entry in enumerate(value)]
            return items if origin in {list, Sequence} else origin(items)
        if origin in {dict, Mapping}:
            if not isinstance(value, Mapping):
                raise _Wrong(f"must be a table, not {_kind(value)}")
            table = {key: self._typed(arguments[1], entry, (*path, key)) for key, entry in value.items()}
            return table if origin is dict else types.MappingProxyType(table)
        if origin is typing.Literal:
            if value not in arguments:
                raise _Wrong(f"{value!r} is not one of {', '.join(map(str, arguments))}")
            return value
        return _scalar(hint, value)

    def _check_range(self, field: dataclasses.Field[Any], value: Any, path: tuple[str, ...]) -> None:
        if "minimum" not in field.metadata or value is None:
            return
        minimum, maximum = field.metadata["minimum"], field.metadata["maximum"]
        size = value if isinstance(value, int | float) else len(value)
        if not minimum <= size <= maximum:
            what = f"{value}" if isinstance(value, int | float) else f"its length, {size},"
            variable = self._variable(path)
            source = variable if variable in self.env else self.source
            self.note(source, path, f"{what} is not {_range_text(minimum, maximum)}")

    def _missing(self, hint: Any, path: tuple[str, ...]) -> None:
        if _nested_dataclass(hint) is not None:
            self.note(self.source, path, f"missing: add a table [{'.'.join(path)}]")
        elif not self._mentioned(path):
            self.note(self.source, path, f"missing: set it there, or in {self._variable(path)}")

    def _mentioned(self, path: tuple[str, ...]) -> bool:
        """Whether a problem with this very key is noted already."""
        return any(f" {'.'.join(path)}: " in problem for problem in self.problems)

    def report_unknown_variables(self) -> None:
        """A variable with our prefix that no field reads is a typing error."""
        for name in sorted(self.env):
            if name.startswith(self.prefix + "_") and name not in self.known_variables:
                self.problems.append(f"{name}: unknown variable" + _suggestion(name, self.known_variables))

    def note(self, source: str, path: tuple[str, ...], text: str) -> None:
        """One problem: where it was given, which key, what is wrong."""
        key = ".".join(path)
        self.first_field = self.first_field or key
        self.problems.append(f"{source}: {key}: {text}")

    def _variable(self, path: tuple[str, ...]) -> str:
        return "_".join([self.prefix, *path]).upper()


def _bare(hint: Any) -> Any:
    """The hint without Optional and without NewType."""
    while hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    if typing.get_origin(hint) in {typing.Union, types.UnionType}:
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        if len(members) == 1:
            return _bare(members[0])
    return hint


def _nested_dataclass(hint: Any) -> type[Any] | None:
    bare = _bare(hint)
    return bare if isinstance(bare, type) and dataclasses.is_dataclass(bare) else None


def _scalar(hint: Any, value: Any) -> Any:
    if hint is Any:
        return value
    if typing.get_origin(hint) in {typing.Union, types.UnionType}:
        return _first_fitting(typing.get_args(hint), value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            choices = [str(member.value) for member in hint]
            raise _Wrong(f"{value!r} is not one of {', '.join(choices)}" + _suggestion(str(value), choices)) from None
    if hint is Path:
        if not isinstance(value, str) or not value:
            raise _Wrong(f"must be a path, not {_kind(value) if value != '' else 'an empty text'}")
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise _Wrong(f"{value} is not a finite number")
        return float(value)
    if hint in {int, str, bool} and type(value) is hint:
        return value
    raise _Wrong(f"must be {_HINT_NAMES.get(hint, str(hint))}, not {_kind(value)}")


def _first_fitting(members: Iterable[Any], value: Any) -> Any:
    reasons = []
    for member in members:
        if member is not type(None):
            try:
                return _scalar(member, value)
            except _Wrong as wrong:
                reasons.append(str(wrong))
    raise _Wrong(" and ".join(reasons))


def _from_text(hint: Any, text: str) -> Any:
    """An environment variable's text as the TOML value that the hint wants."""
    bare = _bare(hint)
    origin = typing.get_origin(bare)
    if origin in _SEQUENCES and not text.lstrip().startswith("["):
        items = [part.strip() for part in text.split(",") if part.strip()]
        item = (typing.get_args(bare) or (str,))[0]
        return [_from_text(item, part) for part in items]
    if origin in {dict, Mapping} or origin in _SEQUENCES:
        return _toml_value(text)
    if bare is bool:
        if text.lower() not in _TRUE | _FALSE:
            raise _Wrong(f"{text!r} is neither true nor false")
        return text.lower() in _TRUE
    if bare in {int, float}:
        try:
            return bare(text)
        except ValueError:
            raise _Wrong(f"{text!r} is not {_HINT_NAMES[bare]}") from None
    return text


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise _Wrong(f"{text!r} is not a TOML value: {error}") from None


_HINT_NAMES: Mapping[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list):
        return "a list"
    return f"{_HINT_NAMES.get(type(value), type(value).__name__)} ({value!r})"


def _range_text(minimum: float, maximum: float) -> str:
    if math.isinf(maximum):
        return f"at least {minimum:g}"
    if math.isinf(minimum):
        return f"at most {maximum:g}"
    return f"between {minimum:g} and {maximum:g}"


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
