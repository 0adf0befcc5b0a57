"""deployment.yaml as a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from enova_cli.manifest import read_manifests
from enova_common.errors import InvalidField


@pytest.mark.parametrize("text", ["name: a\nname: b\n", "name: a\nconfiguration: {seed: 1, seed: 2}\n"])
def test_a_key_that_is_given_twice_is_an_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_text(text)
    with pytest.raises(InvalidField, match="given twice"):
        read_manifests(path)


def test_documents_apart_by_dashes_are_several_deployments(tmp_path: Path) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_text("name: a\nmodel: m\n---\nname: b\nmodel: m\n")
    assert [manifest.deployment.name for manifest in read_manifests(path)] == ["deployments/a", "deployments/b"]
