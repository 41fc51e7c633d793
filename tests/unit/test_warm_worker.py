"""A worker that serves another job of the same model: what it keeps, and what it forgets or refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.given import Given, rows

from tally import demo
from tally.engines import watchdog
from tally.errors import TallyError
from tally.jobs import imported, worker
from tally.jobs.worker import Setup, setup
from tally.media.images import Decoding
from tally.models import kinds
from tally.models.resolve import resolve
from tally.scorers.base import Item
from tally.scorers.run import run
from tally.scorers.vision.scorer import CHECKED

SCRIPT = "def init():\n    pass\n\ndef run(image):\n    return {'n': 1}\n"


@pytest.fixture(autouse=True)
def in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_kept", None)
    monkeypatch.setattr(watchdog, "is_watched", lambda: True)
    monkeypatch.setattr(imported, "is_current", lambda: True)


@pytest.fixture
def given() -> Setup:
    parts: Any = object(), object()
    return Setup(resolve(demo.model("shapes")), *parts, device="cpu", batch_size=None, timeout=10)


def pictures(count: int) -> list[Item]:
    made = np.random.default_rng(1).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return [Item(f"{number}.png", picture) for number, picture in enumerate(made)]


@pytest.mark.parametrize("overlay", [False, True])
def test_another_job_finds_the_scorer_as_it_was_loaded(given: Setup, overlay: bool) -> None:
    given = replace(given, overlay=overlay)
    first = setup(given)
    inner: Any = first.scorer.scorer if overlay else first.scorer  # type: ignore[attr-defined]
    session = inner._runtime
    run(inner, pictures(8))
    first.scorer.assume("the first job's pictures are odd")
    assert inner._unchecked == CHECKED - 8

    source, sink = (object() for _ in range(2))
    second = setup(replace(given, source=source, sink=sink, timeout=20))  # type: ignore[arg-type]
    assert second.scorer is first.scorer
    assert inner._runtime is session
    assert (inner._unchecked, tuple(second.scorer.assumed)) == (CHECKED, ())
    assert (second.source, second.sink, second.timeout) == (source, sink, 20)
    assert second.scorer.describe() == first.description


def test_what_decides_the_results_must_be_the_same(given: Setup) -> None:
    setup(given)
    others = {
        "device": "auto", "batch_size": 7, "overlay": True, "decoding": Decoding(max_pixels=1000),
        "model": replace(given.model, hash="sha256:another"),
    }  # fmt: skip
    for name, value in others.items():
        with pytest.raises(TallyError, match="something else"):
            setup(replace(given, **{name: value}))
    setup(given)


def test_a_worker_that_is_older_than_its_code_is_not_used(given: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup(given)
    monkeypatch.setattr(imported, "is_current", lambda: False)
    with pytest.raises(TallyError, match="older than the code"):
        setup(given)


def test_code_serves_one_job_only(given: Setup, tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(SCRIPT)
    script = replace(given, model=resolve(tmp_path / "score.py"))
    setup(script)
    with pytest.raises(TallyError, match="one job only"):
        setup(script)


def test_outside_of_an_engine_nothing_is_kept(given: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "is_watched", lambda: False)
    assert setup(given).scorer is not setup(replace(given, batch_size=3)).scorer


def test_what_is_data(tmp_path: Path) -> None:
    shapes = resolve(demo.model("shapes"))
    (tmp_path / "score.py").write_text(SCRIPT)
    (tmp_path / "given.py").write_text(
        "import tally\n\nclass Mine(tally.Scorer):\n    def score(self, batch):\n        return []\n"
    )
    assert kinds.is_data(shapes)
    assert not kinds.is_data(replace(shapes, trusted=True)), "it may carry code"
    assert not kinds.is_data(replace(shapes, kind="of-another-package"))
    for code in (resolve(tmp_path / "score.py"), resolve(tmp_path / "given.py"), resolve(Given(rows))):
        assert not kinds.is_data(code)


def test_a_process_knows_whether_its_code_has_changed(tmp_path: Path) -> None:
    """In a process of its own: this one has imported what tests made."""
    program = f"""
import os, sys, time
from pathlib import Path
from tally.jobs import imported
assert imported.is_current()
imported._BEGAN = time.time_ns() + 10**10  # what is made now is old enough
folder = Path({str(tmp_path)!r})
sys.path.insert(0, str(folder))
(folder / "beside.py").write_text("a = 1")
import beside
assert imported.is_current()
imported._BEGAN = (folder / "beside.py").stat().st_ctime_ns - 1
(folder / "beside.py").write_text("a = 2")
os.utime(folder / "beside.py", (0, 0))
assert not imported.is_current(), "changed"
(folder / "beside.py").unlink()
assert not imported.is_current(), "removed"
del sys.modules["beside"]
assert imported.is_current()
sys.prefix = str(folder)
assert not imported.is_current(), "another environment"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
