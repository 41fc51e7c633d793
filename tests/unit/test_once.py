"""In one process a model's content is read once, its code run once and its file inspected once, until it changes."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.colours import model

import tally
from tally.models import hashing
from tally.models.load import create, load, verify
from tally.models.registry import open_registry
from tally.models.resolve import resolve
from tally.scorers.onnx import session


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file's content is read from now on."""
    counted: Counter[str] = Counter()
    real = hashing.file_hash

    def file_hash(path: Path) -> bytes:
        counted[path.name] += 1
        return real(path)

    monkeypatch.setattr(hashing, "file_hash", file_hash)
    return counted


def settled(folder: Path) -> None:
    """Returns when a change of any file in a folder would be seen in its times: at the clock's next tick."""
    for path in folder.rglob("*"):
        while time.time_ns() - path.stat().st_ctime_ns <= 4 * hashing._TICK:
            os.sched_yield()


def brightness(path: Path, columns: str, runs: Path, neighbour: str = "threshold_for_once") -> None:
    path.write_text(
        f"import {neighbour} as threshold\nfrom tally import Scorer\n"
        f"with open({str(runs)!r}, 'a') as file:\n    file.write('ran\\n')\n"
        f"class Bright(Scorer):\n    input = 'bytes'\n    columns = {{{columns!r}: 'int64'}}\n"
        "    batch_size = threshold.SIZE\n"
        f"    def score(self, batch): return [{{{columns!r}: 1}} for _ in batch]\n"
    )


def test_code_is_run_once_until_it_changes(tmp_path: Path, reads: Counter[str]) -> None:
    runs, folder = tmp_path / "runs", tmp_path / "code"
    folder.mkdir()
    path, neighbour = folder / "bright.py", folder / "threshold_for_once.py"
    neighbour.write_text("SIZE = 3\n")
    brightness(path, "one", runs)
    settled(folder)

    ref = resolve(path)
    for _ in range(2):
        assert (create(ref).columns, create(ref).batch_size) == ({"one": "int64"}, 3)
    verify(ref)
    load(ref, "cpu")
    assert resolve(path) == ref

    assert runs.read_text() == "ran\n"
    assert reads == {"bright.py": 1, "threshold_for_once.py": 1}

    brightness(path, "another", runs)
    changed = resolve(path)
    assert changed.hash != ref.hash
    assert create(changed).columns == {"another": "int64"}
    assert runs.read_text() == "ran\nran\n"

    neighbour.write_text("SIZE = 3 + 4\n")
    assert resolve(path).hash not in (ref.hash, changed.hash)
    assert create(resolve(path)).batch_size == 7
    assert runs.read_text() == "ran\nran\nran\n"


def test_a_neighbour_that_changed_is_new_to_every_file_that_imports_it(tmp_path: Path) -> None:
    for name in ("one", "two"):
        brightness(tmp_path / f"{name}.py", name, tmp_path / "runs", "shared_for_once")
    neighbour = tmp_path / "shared_for_once.py"
    neighbour.write_text("SIZE = 3\n")
    assert create(resolve(tmp_path / "one.py")).batch_size == 3
    neighbour.write_text("SIZE = 3 + 4\n")
    assert [create(resolve(tmp_path / f"{name}.py")).batch_size for name in ("two", "one")] == [7, 7]


def test_a_change_that_hides_is_noticed(tmp_path: Path, reads: Counter[str]) -> None:
    """Same size, and the old time of modification."""
    path = tmp_path / "m" / "score.py"
    path.parent.mkdir()
    path.write_text("def init(): ...\ndef run(mini_batch): return [1]\n")
    settled(path.parent)
    before, ref = path.stat(), resolve(path)
    resolve(path)
    assert reads == {"score.py": 1}
    path.write_text("def init(): ...\ndef run(mini_batch): return [2]\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(tally.TallyError, match="it changed since the job began"):
        verify(ref)
    assert resolve(path).hash != ref.hash


def test_a_file_as_young_as_the_clocks_tick_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(b"1")
    monkeypatch.setattr(hashing, "_TICK", 3600 * 10**9)
    first = hashing.known_hash(path)
    # A write that the file system stamps with the same time.
    identity = hashing._identity(path)
    monkeypatch.setattr(hashing, "_identity", lambda _: identity)
    path.write_bytes(b"2")
    assert hashing.known_hash(path) != first


def test_an_onnx_model_is_opened_once_to_inspect_it(
    tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model(tmp_path / "m" / "colours.onnx", external="colours.weights")
    settled(path.parent)
    opened = []
    real = session.open_session

    def open_session(path: Path, *given: Any, **more: Any) -> Any:
        opened.append(path.name)
        return real(path, *given, **more)

    monkeypatch.setattr(session, "open_session", open_session)
    ref = resolve(path)
    assert resolve(path, settings={"top": 2}).options["top"] == 2
    create(ref)
    verify(ref)
    assert opened == ["colours.onnx"]
    assert reads == {"colours.onnx": 1, "colours.weights": 1}
    (path.parent / "colours.weights").unlink()
    model(path)
    resolve(path)
    assert opened == ["colours.onnx"] * 2


def test_a_registered_model_is_read_once(tmp_path: Path, home: Path, reads: Counter[str]) -> None:
    path = model(tmp_path / "m" / "colours.onnx")
    open_registry().add("colours", resolve(path))
    settled(home / "models")
    reads.clear()
    ref = resolve("models:/colours")
    create(ref)
    verify(ref)
    assert set(reads.values()) == {1}
    assert "colours.onnx" in reads
    reads.clear()
    open_registry().verify("colours", 1)  # asked to look for damage, it reads
    assert reads["colours.onnx"] == 1


def test_a_job_runs_code_once_in_each_process(tmp_path: Path, reads: Counter[str]) -> None:
    folder, items = tmp_path / "code", tmp_path / "items"
    folder.mkdir()
    items.mkdir()
    (items / "1.bin").write_bytes(b"1")
    (folder / "counted.py").write_text(
        f"import os\nfrom tally import Scorer\nwith open({str(tmp_path / 'runs')!r}, 'a') as file:\n"
        "    file.write(f'{os.getpid()}\\n')\n"
        "class Counted(Scorer):\n    input = 'bytes'\n    columns = {'n': 'int64'}\n"
        "    def score(self, batch): return [{'n': 1} for _ in batch]\n"
    )
    settled(folder)
    job = tally.score(items, folder / "counted.py", tmp_path / "out", workers=1, quiet=True)
    assert job.results()["n"].to_pylist() == [1]
    processes = (tmp_path / "runs").read_text().split()
    assert len(processes) == 2
    assert processes[0] == str(os.getpid())
    assert processes[1] != processes[0]
    assert reads["counted.py"] == 1
