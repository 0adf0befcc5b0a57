"""What this host knows of a model: its config.json, the size of its weights, a digest, its vocabulary."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from enova_agent.core.node import ModelFacts
from enova_common.errors import Denied, InvalidField, NotFound, TooLarge

CONFIG_BYTES_MAX = 1 << 20
TOKENIZER_BYTES_MAX = 256 << 20
HEADER_BYTES_MAX = 100 << 20     # the format's own bound for the header of a safetensors file
WEIGHT_FILES_MAX = 2_000
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def inspect_directory(model: str, *, roots: Sequence[Path] = ()) -> ModelFacts:
    """The facts of a model directory. Links are followed first, so that none leads out of the roots."""
    path = Path(model)
    if not path.is_absolute():
        raise InvalidField(f"{model!r} is not an absolute path", field="model", remedy="give the path on the hosts")
    real = path.resolve()
    allowed = [root.resolve() for root in roots]
    if allowed and not any(real.is_relative_to(root) for root in allowed):
        raise Denied(
            f"{model} is outside of this host's model_roots", field="model", remedy="add its folder to model_roots"
        )
    if not real.is_dir():
        what = "is a file, not a model directory" if real.exists() else "does not exist on this host"
        raise NotFound(f"{model} {what}", reason="MODEL_NOT_FOUND", field="model", remedy="check the path on the hosts")
    config, text = _config(real, model)
    files = _weight_files(real)
    return ModelFacts(
        config_json=text,
        weight_bytes=sum(_tensor_bytes(file) for file in files),
        digest=_digest(text, files),
        vocabulary_size=_vocabulary_size(real, config),
    )


def inspect_simulated(model: str, catalogue: Path) -> ModelFacts:
    """The facts of a catalogue name, from the file that `enova up` wrote for hosts with simulated engines."""
    try:
        models = json.loads(catalogue.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise NotFound(
            f"the catalogue of simulated models cannot be read: {error}", reason="MODEL_NOT_FOUND", field="model"
        ) from error
    entry = _entry(models, model)
    if entry is None:
        raise NotFound(
            f"{model} is no name of the catalogue", reason="MODEL_NOT_FOUND", field="model",
            remedy="take a name of the catalogue, or the absolute path of a model directory",
        )
    config = entry.get("config", entry)
    text = config if isinstance(config, str) else json.dumps(config, sort_keys=True)
    return ModelFacts(
        config_json=text,
        weight_bytes=int(entry.get("weight_bytes", 0)),
        digest=hashlib.sha256(text.encode()).hexdigest(),
        vocabulary_size=int(entry.get("vocabulary_size", entry.get("vocab_size", 0))),
    )


def _entry(models: Any, name: str) -> Mapping[str, Any] | None:
    """The entry of one model, in a mapping by name or in a list of entries with a name."""
    if isinstance(models, Mapping):
        models = models.get("models", models)
    if isinstance(models, Mapping):
        return models.get(name)
    return next((entry for entry in models if isinstance(entry, Mapping) and entry.get("name") == name), None)


def _config(directory: Path, model: str) -> tuple[Mapping[str, Any], str]:
    path = directory / "config.json"
    try:
        if path.stat().st_size > CONFIG_BYTES_MAX:
            raise TooLarge(f"{path} is larger than {CONFIG_BYTES_MAX} bytes", field="model")
        text = path.read_text("utf-8")
        config = json.loads(text)
    except FileNotFoundError as error:
        raise NotFound(
            f"{model} has no config.json", reason="MODEL_HAS_NO_CONFIG", field="model",
            remedy="give the directory that holds config.json and the weights",
        ) from error
    except (OSError, ValueError) as error:
        raise InvalidField(
            f"config.json of {model} cannot be read: {error}", reason="MODEL_HAS_NO_CONFIG", field="model"
        ) from error
    if not isinstance(config, Mapping):
        raise InvalidField(f"config.json of {model} is no JSON object", reason="MODEL_HAS_NO_CONFIG", field="model")
    return config, text


def _weight_files(directory: Path) -> list[Path]:
    """The files of the first weight format that the directory has: several formats are the same weights twice."""
    for pattern in _WEIGHT_PATTERNS:
        files = sorted(directory.glob(pattern))
        if len(files) > WEIGHT_FILES_MAX:
            raise TooLarge(f"{directory} has more than {WEIGHT_FILES_MAX} weight files", field="model")
        if files:
            return files
    return []


def _tensor_bytes(path: Path) -> int:
    """Bytes of tensors: of a safetensors file all but its header."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return size
    with path.open("rb") as file:
        prefix = file.read(8)
    if len(prefix) < 8:
        raise InvalidField(f"{path} is cut off: not a safetensors file", field="model")
    header = struct.unpack("<Q", prefix)[0]
    if header > min(HEADER_BYTES_MAX, size - 8):
        raise InvalidField(f"{path} is cut off: its header says {header} bytes", field="model")
    return int(size - 8 - header)


def _digest(config: str, files: Sequence[Path]) -> str:
    """SHA-256 over config.json and the names and sizes of the weight files."""
    digest = hashlib.sha256(config.encode())
    for file in files:
        digest.update(f"\0{file.name}\0{file.stat().st_size}".encode())
    return digest.hexdigest()


def _vocabulary_size(directory: Path, config: Mapping[str, Any]) -> int:
    """How many tokens the tokenizer has; by the configuration where there is none to read."""
    for source in (config, config.get("text_config")):
        if isinstance(source, Mapping) and isinstance(source.get("vocab_size"), int):
            return int(source["vocab_size"])
    path = directory / "tokenizer.json"
    try:
        if path.stat().st_size > TOKENIZER_BYTES_MAX:
            return 0
        tokenizer = json.loads(path.read_bytes())
        return len(tokenizer["model"]["vocab"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # not known: the field says so by 0, as the proto's default
