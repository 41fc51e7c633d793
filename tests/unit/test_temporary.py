"""Temporary folders: what a killed process left is removed, what is in use never is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tally.errors import StorageError
from tally.storage import temporary as scratch

HOLD = """
import sys
from tally.storage import temporary as scratch
folder = scratch.make("held")
(folder / "inner").mkdir()
(folder / "inner" / "file").write_text("x")
print(folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def test_a_folder_is_there_while_it_is_used(temporary: Path) -> None:
    with scratch.folder("sort") as folder:
        assert folder.parent == temporary
        assert "sort" in folder.name
        (folder / "file").write_text("x")
        scratch.sweep()
        assert (folder / "file").exists()
    assert os.listdir(temporary) == []
    scratch.remove(folder)


def test_what_a_killed_process_left_is_removed_by_the_next(temporary: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        with scratch.folder("other"):
            assert (left / "inner" / "file").exists()  # it is in use
        process.kill()
        process.wait()
    assert left.exists()
    with scratch.folder("other") as folder:
        assert os.listdir(temporary) == [folder.name]


def test_many_at_once_keep_theirs(temporary: Path) -> None:
    lost = []

    def use() -> None:
        for _ in range(30):
            with scratch.folder("many") as folder:
                (folder / "file").write_text("x")
                scratch.sweep()
                if not (folder / "file").exists():
                    lost.append(folder)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not lost
    assert os.listdir(temporary) == []


def test_other_folders_are_left_alone(temporary: Path) -> None:
    (temporary / "tally-notes").mkdir()
    (temporary / f"{scratch.PREFIX}file").write_text("x")
    scratch.sweep()
    assert sorted(os.listdir(temporary)) == ["tally-notes", f"{scratch.PREFIX}file"]


def test_no_room_is_told(temporary: Path) -> None:
    assert tempfile.gettempdir() == str(temporary)
    temporary.rmdir()
    with pytest.raises(StorageError, match="cannot make a folder for temporary files in"):
        scratch.make("sort")
