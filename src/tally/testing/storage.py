"""What every store must do. Inherit the class, give it a fixture ``store``, and name it ``Test...``."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tally.errors import OutputExistsError, SourceNotFoundError, StorageError
from tally.storage import Store, open_store

TREE = ["a-b", "a.txt", "a/1", "a/2/x", "a/3", "a0", "b/c/d", "b/d", "ü/é.jpg", "😀"]
"""Names in their one right order, which a walk folder by folder gets wrong."""


class StoreContract:
    """Override the fixture ``store`` to return an empty store."""

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError("override the fixture store")

    @pytest.fixture
    def filled(self, store: Store) -> Store:
        for name in reversed(TREE):
            store.write(name, name.encode())
        return store

    def test_an_empty_store_lists_nothing(self, store: Store) -> None:
        assert list(store.list()) == []
        assert list(store.list("no/such/folder")) == []

    def test_names_ascend_as_a_whole(self, filled: Store) -> None:
        assert [entry.name for entry in filled.list()] == TREE

    def test_sizes_are_in_bytes(self, filled: Store) -> None:
        assert all(entry.size == len(entry.name.encode()) for entry in filled.list())

    @pytest.mark.parametrize("after", [*TREE, "a/", "a/2", "a/2/", "a/2/xx", "b", "", "zz", "a/9"])
    def test_a_listing_goes_on_after_any_name(self, filled: Store, after: str) -> None:
        assert [entry.name for entry in filled.list(after=after)] == [name for name in TREE if name > after]

    @pytest.mark.parametrize("prefix", ["a", "a/"])
    def test_a_prefix_is_a_folder(self, filled: Store, prefix: str) -> None:
        assert [entry.name for entry in filled.list(prefix)] == ["a/1", "a/2/x", "a/3"]
        assert [entry.name for entry in filled.list(prefix, after="a/1")] == ["a/2/x", "a/3"]

    def test_folders_can_be_left_out(self, filled: Store) -> None:
        names = [entry.name for entry in filled.list(enter=lambda folder: folder not in ("a/2", "b"))]
        assert names == [name for name in TREE if not name.startswith(("a/2/", "b/"))]

    def test_what_is_written_is_read(self, store: Store) -> None:
        for data in (b"", b"one", bytearray(b"two"), memoryview(b"three")):
            store.write("folder/name.bin", data)
            assert store.read("folder/name.bin") == bytes(data)
            assert store.size("folder/name.bin") == len(data)

    def test_a_file_is_uploaded(self, store: Store, tmp_path: Path) -> None:
        path = tmp_path / "content"
        for content in (b"", b"x" * 3_000_000, os.urandom(20_000_000)):
            path.write_bytes(content)
            store.upload("a/b", path)
            assert store.read("a/b") == path.read_bytes() == content
        with pytest.raises(StorageError):
            store.upload("a/b", tmp_path / "missing")
        assert store.size("a/b") == 20_000_000

    def test_ranges_end_with_the_object(self, store: Store) -> None:
        store.write("x", b"0123456789")
        assert store.read_range("x", 2, 3) == b"234"
        assert store.read_range("x", 8, 10) == b"89"
        assert store.read_range("x", 10, 5) == store.read_range("x", 99, 5) == store.read_range("x", 2, 0) == b""
        store.write("empty", b"")
        assert store.read_range("empty", 0, 5) == b""

    def test_an_exclusive_write_never_replaces(self, store: Store) -> None:
        store.write("claim", b"first", exclusive=True)
        with pytest.raises(OutputExistsError, match="exists already"):
            store.write("claim", b"second", exclusive=True)
        assert store.read("claim") == b"first"
        assert [entry.name for entry in store.list()] == ["claim"]

    def test_of_several_exclusive_writes_one_succeeds(self, store: Store) -> None:
        barrier = threading.Barrier(6)

        def write(number: int) -> int | None:
            barrier.wait()
            try:
                # All write the same content, so that it does not tell who wrote it.
                store.write("claim", b"taken", exclusive=True)
            except OutputExistsError:
                return None
            return number

        with ThreadPoolExecutor(6) as pool:
            winners = [each for each in pool.map(write, range(6)) if each is not None]
        assert len(winners) == 1

    def test_what_is_missing_is_not_found(self, store: Store) -> None:
        assert not store.exists("nothing")
        for attempt in (store.read, store.size, store.local_path, lambda name: store.read_range(name, 0, 1)):
            with pytest.raises(SourceNotFoundError, match="nothing"):
                attempt("nothing")

    def test_a_folder_is_no_object(self, filled: Store) -> None:
        assert filled.exists("a/1")
        assert not filled.exists("a")
        with pytest.raises(StorageError):
            filled.read("a")

    def test_moving_replaces(self, store: Store) -> None:
        store.write("old/name", b"new content")
        store.write("new/name", b"replaced")
        store.move("old/name", "new/name")
        assert [entry.name for entry in store.list()] == ["new/name"]
        assert store.read("new/name") == b"new content"
        with pytest.raises(StorageError):
            store.move("old/name", "elsewhere")

    def test_deleting_what_is_not_there_is_no_error(self, filled: Store) -> None:
        filled.delete(["a/1", "nothing", "a/2/x"])
        assert [entry.name for entry in filled.list("a")] == ["a/3"]
        filled.delete([])

    def test_many_are_deleted_at_once(self, store: Store) -> None:
        names = [f"many/{number:04d}" for number in range(300)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda name: store.write(name, b""), names))
        assert [entry.name for entry in store.list("many", after="many/0297")] == ["many/0298", "many/0299"]
        assert [entry.name for entry in store.list("many")] == names
        store.delete(["many/none", *names[5:], "many/neither"])
        assert [entry.name for entry in store.list("many")] == names[:5]
        store.delete_tree("many")
        assert list(store.list()) == []

    def test_deleting_a_tree(self, filled: Store) -> None:
        filled.delete_tree("a")
        assert [entry.name for entry in filled.list()] == [name for name in TREE if not name.startswith("a/")]
        filled.delete_tree("a")
        filled.delete_tree()
        assert list(filled.list()) == []

    @pytest.mark.parametrize(
        "name", ["a b.jpg", "100%.jpg", "a%20b.jpg", "a#b?c*d[e].jpg", "-rf", "~", " x", "a+b=c&d", "x:y", "é😀.jpg"]
    )
    def test_special_characters_stay_as_they_are(self, store: Store, name: str) -> None:
        for whole in (name, f"{name}/{name}"):
            store.write(whole, b"x", exclusive=True)
            assert [entry[:2] for entry in store.list(whole.rpartition("/")[0])] == [(whole, 1)]
            assert store.read(whole) == store.read_range(whole, 0, 9) == store.local_path(whole).read_bytes() == b"x"
            store.move(whole, f"to/{whole}")
            assert [entry.name for entry in store.list()] == [f"to/{whole}"]
            store.delete([f"to/{whole}"])
            assert list(store.list()) == []

    def test_a_local_path_has_the_content(self, store: Store) -> None:
        store.write("folder/model.onnx", b"one")
        path = store.local_path("folder/model.onnx")
        assert (path.name, path.read_bytes()) == ("model.onnx", b"one")
        assert store.local_path("folder/model.onnx") == path
        store.write("folder/model.onnx", b"another")
        assert store.local_path("folder/model.onnx").read_bytes() == b"another"

    def test_a_download_has_the_content(self, store: Store, tmp_path: Path) -> None:
        content = os.urandom(3_000_000)
        store.write("folder/model.onnx", content)
        store.download("folder/model.onnx", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == store.read("folder/model.onnx") == content
        with pytest.raises(SourceNotFoundError):
            store.download("nothing", tmp_path / "none")

    def test_the_version_changes_with_the_content(self, store: Store) -> None:
        store.write("x", b"one")
        before = store.version("x")
        assert store.version("x") == before
        store.write("x", b"three")
        assert store.version("x") != before

    def test_folders_are_those_at_the_top(self, filled: Store) -> None:
        assert filled.folders() == {"a", "b", "ü"}
        filled.delete_tree()
        assert filled.folders() == set()

    def test_what_is_local_is_a_file_of_this_machine(self, filled: Store) -> None:
        if filled.is_local:
            assert filled.local_path("a/1") == Path(filled.url, "a/1")
        else:
            assert "://" in filled.url

    def test_tidying_takes_no_objects(self, filled: Store) -> None:
        filled.remove_partial()
        filled.remove_partial("a/")
        filled.remove_folder("b/")
        assert [entry.name for entry in filled.list()] == TREE

    def test_it_opens_again_by_its_url(self, filled: Store) -> None:
        assert open_store(filled.url).read("b/d") == b"b/d"

    @pytest.mark.parametrize("name", ["", "../x", "a/../../x", "/etc/hostname", "nul\0byte"])
    def test_names_stay_inside(self, store: Store, name: str) -> None:
        with pytest.raises(StorageError):
            store.write(name, b"")
        with pytest.raises(StorageError):
            store.read(name)
