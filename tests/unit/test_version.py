"""The commit is that of the checkout, of what pip took from a repository, or what an image says."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import tally
from tally import version

REPOSITORY = Path(tally.__file__).parents[2]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    version.commit.cache_clear()
    monkeypatch.delenv(version.COMMIT, raising=False)
    yield
    version.commit.cache_clear()


def test_of_a_checkout() -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("this is no checkout")
    told = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert version.commit() == told.stdout.strip()
    assert version.shown() == f"{tally.__version__} ({told.stdout[:9]})"


def test_of_what_pip_took_from_a_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = json.dumps({"url": "https://example.org/tally.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee" * 6}})
    monkeypatch.setattr(version, "distribution", lambda name: SimpleNamespace(read_text=lambda file: origin))
    assert version.commit() == "c0ffee" * 6


def test_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(version.COMMIT, "0123456789abcdef")
    assert version.shown() == f"{tally.__version__} (012345678)"


def test_of_a_wheel_nobody_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lib/tally").mkdir(parents=True)
    monkeypatch.setattr(tally, "__file__", str(tmp_path / "lib/tally/__init__.py"))
    assert version.commit() is None
    assert version.shown() == tally.__version__
