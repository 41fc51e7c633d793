from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tally.storage import LocalStore
from tally.storage.base import TEMPORARY
from tally.storage.publish import make_folder, whole, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_at_the_end_and_whole(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with whole(target) as temporary:
        Path(temporary).write_bytes(b"new")
        assert target.read_bytes() == b"old"
        assert Path(temporary).parent == tmp_path
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail() -> None:
        with whole(target) as temporary:
            Path(temporary).write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_an_exclusive_file_replaces_none(tmp_path: Path) -> None:
    target = tmp_path / "file"
    for content in (b"first", b"second"):
        try:
            with whole(target, exclusive=True) as temporary:
                Path(temporary).write_bytes(content)
        except FileExistsError:
            assert content == b"second"
    assert target.read_bytes() == b"first"
    assert names(tmp_path) == ["file"]


def test_a_private_file_is_so_from_the_beginning(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with whole(target, private=True) as temporary:
        assert stat.S_IMODE(Path(temporary).stat().st_mode) == 0o600
        Path(temporary).write_bytes(b"secret")
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    write_whole(target, b"another", private=True)
    assert (target.read_bytes(), stat.S_IMODE(target.stat().st_mode)) == (b"another", 0o600)


def test_folders_that_were_made_in_vain_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert make_folder(f"{tmp_path}/a/b/c") == [f"{tmp_path}/a/b", f"{tmp_path}/a/b/c"]
    assert make_folder(f"{tmp_path}/a/b/c") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        make_folder(f"{tmp_path}/file/d")
    assert names(tmp_path) == ["a", "file"]


def test_half_written_files_are_removed_and_no_others(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for name in ("keep", f"{TEMPORARY}1", f"inner/{TEMPORARY}2"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    store.remove_partial()
    assert names(tmp_path) == ["inner", "keep"]
    store.remove_folder("inner/")
    assert (tmp_path / "inner").is_dir()
    store.remove_partial("inner/")
    store.remove_folder("inner/")
    store.remove_folder("inner/")
    assert names(tmp_path) == ["keep"]
