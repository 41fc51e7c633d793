"""What every store must do. Inherit the class, give it a fixture ``store``, and name it ``Test...``."""

from __future__ import annotations

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
        for content in (b"", b"x" * 3_000_000):
            path.write_bytes(content)
            store.upload("a/b", path)
            assert store.read("a/b") == path.read_bytes() == content
        with pytest.raises(StorageError):
            store.upload("a/b", tmp_path / "missing")
        assert store.size("a/b") == 3_000_000

    def test_ranges_end_with_the_object(self, store: Store) -> None:
        store.write("x", b"0123456789")
        assert store.read_range("x", 2, 3) == b"234"
        assert store.read_range("x", 8, 10) == b"89"
        assert store.read_range("x", 10, 5) == b""

    def test_an_exclusive_write_never_replaces(self, store: Store) -> None:
        store.write("claim", b"first", exclusive=True)
        with pytest.raises(OutputExistsError, match="exists already"):
            store.write("claim", b"second", exclusive=True)
        assert store.read("claim") == b"first"
        assert [entry.name for entry in store.list()] == ["claim"]

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

    def test_deleting_a_tree(self, filled: Store) -> None:
        filled.delete_tree("a")
        assert [entry.name for entry in filled.list()] == [name for name in TREE if not name.startswith("a/")]
        filled.delete_tree("a")
        filled.delete_tree()
        assert list(filled.list()) == []

    def test_a_local_path_has_the_content(self, store: Store) -> None:
        store.write("folder/model.onnx", b"one")
        path = store.local_path("folder/model.onnx")
        assert (path.name, path.read_bytes()) == ("model.onnx", b"one")
        assert store.local_path("folder/model.onnx") == path
        store.write("folder/model.onnx", b"another")
        assert store.local_path("folder/model.onnx").read_bytes() == b"another"

    def test_it_opens_again_by_its_url(self, filled: Store) -> None:
        assert open_store(filled.url).read("b/d") == b"b/d"

    @pytest.mark.parametrize("name", ["", "../x", "a/../../x", "/etc/hostname", "nul\0byte"])
    def test_names_stay_inside(self, store: Store, name: str) -> None:
        with pytest.raises(StorageError):
            store.write(name, b"")
        with pytest.raises(StorageError):
            store.read(name)
