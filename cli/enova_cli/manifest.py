"""deployment.yaml: from text to a Deployment, strictly, and its JSON schema from the proto.

Its fields are the desired fields of `enova.v1.Deployment`; a single class may be written as `objectives`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from enova.v1 import cluster_pb2
from enova_cli.plain import enum_words, from_plain
from enova_common.errors import InvalidField, NotFound

DESIRED_FIELDS = (
    "name",
    "model",
    "served_names",
    "engine",
    "classes",
    "replicas",
    "min",
    "max",
    "hardware",
    "configuration",
    "policy",
    "priority",
    "autoscaling_paused",
    "reconfiguration",
    "max_tokens_policy",
    "conservatism",
)
DEFAULT_CLASS = "default"
FILE_BYTES_MAX = 1 << 20  # a deployment takes a few kilobytes; more is a mistake


@dataclass(frozen=True, slots=True)
class Manifest:
    """One deployment, and which of its fields an update writes."""

    deployment: cluster_pb2.Deployment
    update_paths: tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """YAML's own loader keeps the last of two equal keys: here the second is an error, as an unknown field is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys differ."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_manifests(path: Path) -> list[Manifest]:
    """Every deployment of a YAML file (documents apart by `---`). `-` stands for standard input."""
    try:
        text = _read_text(path)
        documents = [document for document in yaml.load_all(text, Loader=_Loader) if document is not None]
    except FileNotFoundError as error:
        remedy = "give the path of a deployment.yaml"
        raise NotFound(f"no file {path}", reason="FILE_NOT_FOUND", remedy=remedy) from error
    except OSError as error:
        raise InvalidField(f"cannot be read: {error.strerror}", field=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        message = f"not YAML: {' '.join(str(error).split())}"
        raise InvalidField(message, field=str(path), reason="INVALID_YAML") from error
    if not documents:
        raise InvalidField("holds no deployment", field=str(path), remedy="write at least name and model")
    return [Manifest(parse_manifest(document), update_paths(document)) for document in documents]


def parse_manifest(document: object) -> cluster_pb2.Deployment:
    """One deployment from plain values. Raises InvalidField naming the field; bounds are the coordinator's to check."""
    if not isinstance(document, dict):
        raise InvalidField("expected a mapping with name, model, ...", field="deployment")
    value = dict(document)
    objectives = value.pop("objectives", None)
    if objectives is not None:
        if "classes" in value:
            raise InvalidField("given beside classes", field="objectives", remedy="keep one of the two")
        if not isinstance(objectives, dict):
            raise InvalidField("expected a mapping", field="objectives")
        value["classes"] = [{"name": DEFAULT_CLASS, **objectives}]
    for key in value:
        if key not in DESIRED_FIELDS and key in cluster_pb2.Deployment.DESCRIPTOR.fields_by_name:
            raise InvalidField("is output only", field=str(key), reason="UNKNOWN_FIELD", remedy="remove it")
    deployment = from_plain(cluster_pb2.Deployment, value, known=DESIRED_FIELDS)
    if not deployment.name:
        raise InvalidField("is missing", field="name", remedy="name: my-deployment")
    deployment.name = f"deployments/{deployment.name.removeprefix('deployments/')}"
    return deployment


def update_paths(document: object) -> tuple[str, ...]:
    """The desired fields that applying a manifest writes: what it leaves out goes back to its default.

    But not the pause of a policy: `enova pause` is an operator's, and only a manifest that names it changes it.
    """
    named = isinstance(document, dict) and document.get("autoscaling_paused") is not None
    return tuple(field for field in DESIRED_FIELDS if field != "name" and (named or field != "autoscaling_paused"))


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of deployment.yaml, derived from the proto."""
    properties = {
        field.name: _field_schema(field)
        for field in cluster_pb2.Deployment.DESCRIPTOR.fields
        if field.name in DESIRED_FIELDS
    }
    objectives = _message_schema(cluster_pb2.ServingClass.DESCRIPTOR)
    del objectives["properties"]["name"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "enova deployment.yaml",
        "type": "object",
        "properties": properties | {"objectives": objectives},
        "required": ["name", "model"],
        "additionalProperties": False,
    }


def _read_text(path: Path) -> str:
    if str(path) == "-":
        import sys

        return sys.stdin.read(FILE_BYTES_MAX)
    if path.stat().st_size > FILE_BYTES_MAX:
        raise InvalidField(f"is over {FILE_BYTES_MAX} bytes", field=str(path), remedy="give a deployment.yaml")
    return path.read_text(encoding="utf-8")


def _message_schema(message: Descriptor) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {field.name: _field_schema(field) for field in message.fields},
        "additionalProperties": False,
    }


def _field_schema(field: FieldDescriptor) -> dict[str, Any]:
    schema: dict[str, Any]
    if field.message_type is not None:
        schema = _message_schema(field.message_type)
    elif field.enum_type is not None:
        schema = {"enum": enum_words(field)}
    elif field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        schema = {"type": "number"}
    elif field.type == FieldDescriptor.TYPE_BOOL:
        schema = {"type": "boolean"}
    elif field.type == FieldDescriptor.TYPE_STRING:
        schema = {"type": "string"}
    else:
        schema = {"type": "integer"}
    return {"type": "array", "items": schema} if field.is_repeated else schema
