"""Made-up packages that extend Tally through Python's entry points, installed as pip would."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest


def install(site: Path, monkeypatch: pytest.MonkeyPatch, group: str, points: Mapping[str, str], **modules: str) -> None:
    """A package with these modules (name to source) and entry points, for this process and those that it starts."""
    name = next(iter(points))
    described = site / f"{name}-1.0.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{point} = {value}" for point, value in points.items()]
    (described / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
    for module, source in modules.items():
        (site / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    importlib.invalidate_caches()


def uninstall(site: Path) -> None:
    """Remove all that was installed there."""
    shutil.rmtree(site)
    importlib.invalidate_caches()
