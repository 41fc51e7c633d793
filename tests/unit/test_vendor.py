"""The scripts of the pages are what the npm registry had, and nothing else lies beside them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import tally

VENDOR = Path(tally.__file__).parent / "server" / "pages" / "static" / "vendor"


def test_vendored_files_have_the_hashes_that_were_written_down() -> None:
    written = json.loads((VENDOR / "vendor.json").read_text())
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in VENDOR.iterdir()}
    del found["vendor.json"]
    assert found == {name: each["sha256"] for name, each in written.items()}
    assert any(name.endswith(".min.js") for name in found)
