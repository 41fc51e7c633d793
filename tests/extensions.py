"""Packages that extend Tally through Python's entry points, installed as pip would: made-up ones, and the example's."""

from __future__ import annotations

import importlib
import os
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "extension"


def install(site: Path, monkeypatch: pytest.MonkeyPatch, group: str, points: Mapping[str, str], **modules: str) -> None:
    """A package with these modules (name to source) and entry points, for this process and those that it starts."""
    _describe(site, next(iter(points)), "1.0", {group: points})
    for module, source in modules.items():
        (site / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    importlib.invalidate_caches()


def install_example(site: Path) -> Path:
    """The package of ``examples/extension``, in a folder that is to be put on ``sys.path`` or ``PYTHONPATH``."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    shutil.copy(EXAMPLE / "tally_lines.py", site)
    _describe(site, project["name"], project["version"], project["entry-points"])
    return site


def uninstall(site: Path) -> None:
    """Remove all that was installed there."""
    shutil.rmtree(site)
    importlib.invalidate_caches()


def _describe(site: Path, name: str, version: str, groups: Mapping[str, Mapping[str, str]]) -> None:
    """The metadata of an installed package."""
    described = site / f"{name.replace('-', '_')}-{version}.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines: list[str] = []
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{point} = {value}" for point, value in points.items())]
    (described / "entry_points.txt").write_text("\n".join([*lines, ""]))
