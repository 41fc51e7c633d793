"""Fixtures that every kind of test shares."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data() -> Path:
    """Real models, photos and hostile files; not part of the repository."""
    path = Path(os.environ.get("TALLY_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (path / "images").is_dir():
        pytest.skip(f"no test data at {path}; set TALLY_TEST_DATA to the folder that holds images/ and models/")
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder (jobs, registry) of the test's own."""
    path = tmp_path / "tally-home"
    monkeypatch.setenv("TALLY_HOME", str(path))
    monkeypatch.delenv("TALLY_DATABASE", raising=False)
    return path


@dataclass(frozen=True)
class Ran:
    """What a command answered."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """The ``tally`` command in this process, with nobody at the keyboard."""

    def run(*arguments: object) -> Ran:
        from tally.cli.main import main

        monkeypatch.setattr(sys, "argv", ["tally", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Ran(int(ended.value.code or 0), *capsys.readouterr())

    return run
