"""The shipped JSON schema of deployment.yaml is the one that follows from the proto."""

from __future__ import annotations

import json
from pathlib import Path

from enova_cli.manifest import json_schema


def test_the_shipped_schema_is_the_derived_one() -> None:
    shipped = Path(__file__).parents[2] / "docs" / "deployment.schema.json"
    assert json.loads(shipped.read_text()) == json_schema()
