"""Sample settings made from the settings themselves: each key with its own documentation and default.

`python -m enova_testing.sample_settings` (in tests/) writes deploy/etc/; a test holds the files equal to that.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enova_agent.ingress.settings import IngressSettings
from enova_agent.settings import AgentSettings
from enova_coordinator.settings import CoordinatorSettings

FOLDER = Path(__file__).parents[2] / "deploy" / "etc"
WIDTH = 110
# For trials and for `enova up` alone; a host in service has no use for them.
LEFT_OUT = frozenset({"simulated_gpus", "simulated_models", "ready_file"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One file: which settings, what stands above them, and the values that an installation needs to set."""

    file: str
    settings: type[Any]
    prefix: str
    header: str
    given: Mapping[str, str]


def _tls(role: str, name: str) -> dict[str, str]:
    folder = "/etc/enova/tls"
    return {"ca": f'"{folder}/ca.crt"', "cert": f'"{folder}/{role}-{name}.crt"', "key": f'"{folder}/{role}-{name}.key"'}


def _table(name: str, values: Mapping[str, str]) -> dict[str, str]:
    return {f"{name}.{key}": value for key, value in values.items()}


SAMPLES = (
    Sample(
        file="coordinator.toml",
        settings=CoordinatorSettings,
        prefix="ENOVA_COORDINATOR",
        header="enova-coordinator on the host coordinator-1, with etcd beside it.",
        given={
            "name": '"coordinator-1"',
            "listen": '"0.0.0.0:7700"',
            "advertise": '"coordinator-1:7700"',
            "data_dir": '"/var/lib/enova-coordinator"',
            **_table("tls", _tls("coordinator", "coordinator-1")),
            "store.kind": '"etcd"',
            "store.endpoints": '["127.0.0.1:2379"]',
        },
    ),
    Sample(
        file="agent.toml",
        settings=AgentSettings,
        prefix="ENOVA_AGENT",
        header="enova-agent on the host gpu-host-1.",
        given={
            "node": '"gpu-host-1"',
            "coordinators": '["coordinator-1:7700"]',
            "data_dir": '"/var/lib/enova/agent"',
            "socket": '"/run/enova/agent.sock"',
            **_table("tls", _tls("agent", "gpu-host-1")),
            "engine.command": '["/opt/vllm/bin/vllm", "serve"]',
        },
    ),
    Sample(
        file="ingress.toml",
        settings=IngressSettings,
        prefix="ENOVA_INGRESS",
        header="enova-ingress on the host gpu-host-1.",
        given={
            "node": '"gpu-host-1"',
            "data_dir": '"/var/lib/enova/ingress"',
            "socket": '"/run/enova/agent.sock"',
            "listen": '"0.0.0.0:8000"',
            "advertise": '"gpu-host-1:8000"',
            "hop_listen": '"0.0.0.0:8001"',
            "hop_advertise": '"gpu-host-1:8001"',
            "tls.cert": '"/etc/enova/tls/openai.crt"',
            "tls.key": '"/etc/enova/tls/openai.key"',
            **_table("hop_tls", _tls("ingress", "gpu-host-1")),
        },
    ),
)


def render(sample: Sample) -> str:
    """The text of the file."""
    about = (
        f"{sample.header} A key that is commented out has its default. Variables {sample.prefix}_KEY win over this "
        f"file ({sample.prefix}_TLS_CA for tls.ca). Durations are in seconds of real time unless said otherwise."
    )
    return "\n".join([*_comment(about), "", *_table_lines(sample.settings, (), sample.given)]).rstrip() + "\n"


def _table_lines(cls: type[Any], path: tuple[str, ...], given: Mapping[str, str]) -> list[str]:
    """The keys of a table, then its nested tables."""
    documentation, hints = _documentation(cls), typing.get_type_hints(cls)
    keys: list[str] = []
    tables: list[str] = []
    for field in dataclasses.fields(cls):
        if field.name in LEFT_OUT:
            continue
        where = (*path, field.name)
        comment = _comment(documentation.get(field.name, ""))
        nested = _nested(hints[field.name])
        if nested is None:
            keys += [*comment, _key_line(field, given.get(".".join(where))), ""]
        else:
            off = "" if field.default is not None or any(key.startswith(".".join(where)) for key in given) else "#"
            tables += [*comment, f"{off}[{'.'.join(where)}]", *_table_lines(nested, where, given)]
    return keys + tables


def _key_line(field: dataclasses.Field[Any], given: str | None) -> str:
    if given is not None:
        return f"{field.name} = {given}"
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    return f"#{field.name} = {_toml(default) if default is not None else '(not set)'}"


def _toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case enum.Enum():
            return f'"{value.value}"'
        case int() | float():
            return str(value)
        case tuple() | list():
            return f"[{', '.join(_toml(item) for item in value)}]"
        case Mapping():
            return f"{{{', '.join(f'{key} = {_toml(item)}' for key, item in value.items())}}}"
        case _:
            return f'"{value}"'


def _nested(hint: Any) -> type[Any] | None:
    if typing.get_origin(hint) in {typing.Union, types.UnionType}:
        hint = next(member for member in typing.get_args(hint) if member is not type(None))
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH)]


def _documentation(cls: type[Any]) -> dict[str, str]:
    """The string below each field."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, after in zip(definition.body, definition.body[1:], strict=False):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = text
    return texts


if __name__ == "__main__":
    for each in SAMPLES:
        (FOLDER / each.file).write_text(render(each))
