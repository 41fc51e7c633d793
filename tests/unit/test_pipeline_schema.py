"""The table of Argo's fields says what Argo's schema says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tally.pipelines import document

ROOT = Path(__file__).parent.parent.parent


def test_it_is_made_from_the_schema() -> None:
    schema = ROOT.parent / "shared/schemas/argo/schema.json"
    if not schema.exists():
        pytest.skip(f"Argo's schema is not at {schema}")
    spec = importlib.util.spec_from_file_location("argo_fields", ROOT / "scripts/argo_fields.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    table = script.condensed(json.loads(schema.read_text("utf-8")))
    assert script.OUT.read_text("utf-8") == script.text_of(table)
    assert table == document.fields()
