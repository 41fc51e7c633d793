"""Which Tally this is: its version, and the commit that it was built from, where that is known."""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import tally

COMMIT = "TALLY_COMMIT"
"""The environment variable with the commit, set where an image is built."""


@cache
def commit() -> str | None:
    """The commit's hash, whole: as ``TALLY_COMMIT`` says, pip (of what it took from a repository), or git here."""
    if given := os.environ.get(COMMIT):
        return given
    origin = json.loads(distribution("tally-scoring").read_text("direct_url.json") or "{}")
    if found := origin.get("vcs_info", {}).get("commit_id"):
        return str(found)
    repository = Path(tally.__file__).parents[2]
    if not (repository / ".git").exists():
        return None
    try:
        told = subprocess.run(
            ["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None


def shown() -> str:
    """The version, with the commit's first characters."""
    known = commit()
    return f"{tally.__version__} ({known[:9]})" if known else str(tally.__version__)
