"""What a host says of a model directory, and why it says nothing of some."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from enova_agent.core.hub import HubModel, hub_cache
from enova_agent.hub import INDEX, NOT_INSPECTED, inspect_hub, is_fetched, room_problem
from enova_agent.inspect_model import CONFIG_BYTES_MAX, inspect_directory, inspect_simulated
from enova_common.errors import Denied, EnovaError, InvalidField, NotFound, TooLarge

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 512}


def safetensors(path: Path, *, tensor_bytes: int) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [tensor_bytes // 4], "data_offsets": [0, tensor_bytes]}})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(tensor_bytes))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "models" / "tiny"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    safetensors(directory / "model-1.safetensors", tensor_bytes=4_000)
    safetensors(directory / "model-2.safetensors", tensor_bytes=1_000)
    return directory


def test_weights_are_counted_without_headers_and_one_format_only(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(bytes(9_999))
    facts = inspect_directory(str(model))
    assert facts.weight_bytes == 5_000
    assert json.loads(facts.config_json) == CONFIG
    assert facts.vocabulary_size == 512


def test_the_digest_follows_config_and_files_but_not_the_place(model: Path, tmp_path: Path) -> None:
    digest = inspect_directory(str(model)).digest
    moved = model.rename(tmp_path / "moved")
    assert inspect_directory(str(moved)).digest == digest
    safetensors(moved / "model-3.safetensors", tensor_bytes=4)
    grown = inspect_directory(str(moved)).digest
    (moved / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 513}))
    assert len({digest, grown, inspect_directory(str(moved)).digest}) == 3


def test_the_vocabulary_is_the_tokenizers_where_the_config_says_none(model: Path) -> None:
    (model / "config.json").write_text("{}")
    assert inspect_directory(str(model)).vocabulary_size == 0
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}))
    assert inspect_directory(str(model)).vocabulary_size == 3
    (model / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 77}}))
    assert inspect_directory(str(model)).vocabulary_size == 77


def test_models_outside_of_the_roots_are_refused_also_through_links(model: Path, tmp_path: Path) -> None:
    roots = [tmp_path / "models"]
    assert inspect_directory(str(model), roots=roots).weight_bytes == 5_000
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "config.json").write_text("{}")
    (tmp_path / "models" / "link").symlink_to(secret)
    for path in (secret, tmp_path / "models" / "link", tmp_path / "models" / ".." / "secret"):
        with pytest.raises(Denied, match="outside of this host's model_roots"):
            inspect_directory(str(path), roots=roots)
    inside = tmp_path / "models" / "alias"
    inside.symlink_to(model)
    assert inspect_directory(str(inside), roots=roots).weight_bytes == 5_000


@pytest.mark.parametrize(
    ("spoil", "kind", "reason"),
    [
        (lambda d: (d / "config.json").unlink(), NotFound, "MODEL_HAS_NO_CONFIG"),
        (lambda d: (d / "config.json").write_text("{"), InvalidField, "MODEL_HAS_NO_CONFIG"),
        (lambda d: (d / "config.json").write_text("[1]"), InvalidField, "MODEL_HAS_NO_CONFIG"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xff"), InvalidField, "MODEL_HAS_NO_CONFIG"),
        (lambda d: (d / "config.json").write_text(" " * (CONFIG_BYTES_MAX + 1)), TooLarge, "TOO_LARGE"),
        (lambda d: (d / "model-1.safetensors").write_bytes(b"abc"), InvalidField, "INVALID_FIELD"),
        (lambda d: (d / "model-1.safetensors").write_bytes(bytes([255] * 16)), InvalidField, "INVALID_FIELD"),
    ],
)
def test_a_directory_that_is_no_model_says_why(model: Path, spoil: object, kind: type[EnovaError], reason: str) -> None:
    assert callable(spoil)
    spoil(model)
    with pytest.raises(kind) as caught:
        inspect_directory(str(model))
    assert caught.value.reason == reason
    assert caught.value.field == "model"


def test_a_path_that_leads_nowhere_is_named(model: Path) -> None:
    for path in (model / "nothing", model / "config.json"):
        with pytest.raises(NotFound) as caught:
            inspect_directory(str(path))
        assert caught.value.reason == "MODEL_NOT_FOUND"
        assert str(path) in str(caught.value)
    with pytest.raises(InvalidField, match="not an absolute path"):
        inspect_directory("models/tiny")


def test_catalogue_names_are_looked_up_in_the_file_of_simulated_models(tmp_path: Path) -> None:
    catalogue = tmp_path / "models.json"
    entry = {"name": "org/small", "layers": 2, "vocabulary_size": 100, "weight_bytes": 12}
    catalogue.write_text(json.dumps([entry]))
    facts = inspect_simulated("org/small", catalogue)
    assert (facts.weight_bytes, facts.vocabulary_size, json.loads(facts.config_json)) == (12, 100, entry)
    with pytest.raises(NotFound) as caught:
        inspect_simulated("org/other", catalogue)
    assert caught.value.reason == "MODEL_NOT_FOUND"
    catalogue.write_text("{")
    with pytest.raises(NotFound, match="cannot be read"):
        inspect_simulated("org/small", catalogue)


COMMIT = "0123456789abcdef0123456789abcdef01234567"
QWEN = HubModel(name="Qwen/Qwen2.5-0.5B")


def fetched(cache: Path, *, weights: bool = True) -> Path:
    """The hub's cache as its client leaves it: blobs, and a snapshot of links to them."""
    folder = cache / "models--Qwen--Qwen2.5-0.5B"
    snapshot, blobs = folder / "snapshots" / COMMIT, folder / "blobs"
    for path in (snapshot, blobs, folder / "refs"):
        path.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (blobs / "c0").write_text(json.dumps(CONFIG))
    (snapshot / "config.json").symlink_to("../../blobs/c0")
    if weights:
        safetensors(blobs / "w0", tensor_bytes=4_000)
        (snapshot / "model.safetensors").symlink_to("../../blobs/w0")
    return snapshot


def test_a_model_of_the_hub_is_inspected_where_it_was_fetched(tmp_path: Path) -> None:
    fetched(tmp_path)
    by_branch = inspect_hub(QWEN, tmp_path)
    assert (json.loads(by_branch.config_json), by_branch.weight_bytes) == (CONFIG, 4_000)
    assert inspect_hub(HubModel(name=QWEN.name, revision=COMMIT), tmp_path) == by_branch
    assert is_fetched(QWEN, tmp_path)


def test_a_model_that_is_not_fetched_yet_is_unknown_and_not_refused(tmp_path: Path) -> None:
    assert inspect_hub(QWEN, tmp_path) == NOT_INSPECTED
    assert inspect_hub(QWEN, None) == NOT_INSPECTED
    (fetched(tmp_path) / "config.json").unlink()
    assert inspect_hub(QWEN, tmp_path) == NOT_INSPECTED
    assert inspect_hub(HubModel(name=QWEN.name, revision="v2"), tmp_path) == NOT_INSPECTED
    (tmp_path / "models--Qwen--Qwen2.5-0.5B" / "refs" / "main").write_text("../../../..")
    assert inspect_hub(QWEN, tmp_path) == NOT_INSPECTED


def test_half_of_the_weights_is_not_fetched(tmp_path: Path) -> None:
    snapshot = fetched(tmp_path, weights=False)
    assert not is_fetched(QWEN, tmp_path)
    (snapshot / INDEX).write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    safetensors(snapshot / "m-1.safetensors", tensor_bytes=4)
    assert not is_fetched(QWEN, tmp_path)
    safetensors(snapshot / "m-2.safetensors", tensor_bytes=4)
    assert is_fetched(QWEN, tmp_path)


def test_a_download_wants_room_and_what_is_here_wants_none(tmp_path: Path) -> None:
    cache = tmp_path / "not" / "there" / "yet"
    problem = room_problem(QWEN, cache, free_bytes_min=1 << 60)
    assert "engine.download_free_bytes_min" in problem
    assert str(tmp_path) in problem
    assert room_problem(QWEN, cache, free_bytes_min=1) == ""
    fetched(cache)
    assert room_problem(QWEN, cache, free_bytes_min=1 << 60) == ""


def test_the_cache_is_where_the_hub_s_client_looks_for_it() -> None:
    home = {"HOME": "/root"}
    assert str(hub_cache(home)) == "/root/.cache/huggingface/hub"
    assert str(hub_cache({**home, "XDG_CACHE_HOME": "/c"})) == "/c/huggingface/hub"
    assert str(hub_cache({**home, "HF_HOME": "/big"})) == "/big/hub"
    assert str(hub_cache({**home, "HF_HOME": "/big", "HF_HUB_CACHE": "/h"})) == "/h"
    assert hub_cache({}) is None
