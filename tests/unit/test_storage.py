from __future__ import annotations

import errno
import os
import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tally.errors import OutputExistsError, SourceNotFoundError, StorageError
from tally.masking import mask
from tally.storage import (
    TEMPORARY,
    Entry,
    LocalStore,
    buckets,
    failure,
    file_name,
    key_of,
    local,
    open_store,
    sorted_names,
)
from tally.storage.base import PAGE
from tally.storage.buckets import ObjectStore

AWKWARD = [
    os.fsdecode(b"caf\xe9.jpg"),
    "line\nbreak.jpg",
    "100%.jpg",
    "a%20b.jpg",
    "a#b?c*d[e].jpg",
    "back\\slash.jpg",
    "-rf.jpg",
    "~.jpg",
    " .jpg",
    "😀.jpg",
    "n" * 251 + ".jpg",
    "é" * 125 + ".jpg",
]


@pytest.mark.parametrize("name", AWKWARD)
def test_any_name_of_the_file_system_round_trips(tmp_path: Path, name: str) -> None:
    store = LocalStore(tmp_path)
    store.write(name, b"x")
    assert list(store.list()) == [Entry(name, 1)]
    assert store.read(name) == b"x"
    assert list(store.list(after=name)) == []
    key_of(name).encode()
    store.delete([name])
    assert list(store.list()) == []


def test_keys_are_text_and_readable() -> None:
    assert key_of(os.fsdecode(b"caf\xe9.jpg")) == r"caf\xe9.jpg"
    assert key_of("café😀\n.jpg") == "café😀\n.jpg"


def test_paths_near_the_limit_of_the_system(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    room = os.pathconf(tmp_path, "PC_PATH_MAX") - len(os.fsencode(tmp_path)) - 40
    name = "/".join(["d" * 200] * (room // 201)) + "/x.jpg"
    store.write(name, b"deep")
    assert list(store.list()) == [Entry(name, 4)]
    assert store.read(name) == b"deep"
    with pytest.raises(StorageError, match="the file name is too long") as caught:
        store.write(f"{name[:-6]}/{'e' * 250}", b"")
    assert caught.value.errno == errno.ENAMETOOLONG
    assert len(str(caught.value)) < 400


def test_a_folder_too_deep_to_list_is_named(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("d" * 200, dir_fd=here)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    with pytest.raises(StorageError, match=r"cannot list .*ddd.*: the file name is too long"):
        list(LocalStore(tmp_path).list())


def test_linked_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    real = tmp_path / "real"
    (real / "in").mkdir(parents=True)
    (real / "in" / "x").write_bytes(b"1")
    (real / "up").symlink_to(tmp_path)
    (real / "self").symlink_to(".")
    (real / "in" / "back").symlink_to(real)
    (tmp_path / "link").symlink_to(real)
    names = [entry.name for entry in LocalStore(tmp_path).list()]
    assert names == ["link/in/x", "real/in/x"]


def test_two_folders_linked_to_each_other_end(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).mkdir()
        (tmp_path / one / "x").write_bytes(b"")
        (tmp_path / one / "to").symlink_to(tmp_path / other)
    names = [entry.name for entry in LocalStore(tmp_path).list()]
    assert names == ["a/to/x", "a/x", "b/to/x", "b/x"]


def test_broken_links_are_items_and_pipes_are_not(tmp_path: Path) -> None:
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "good").write_bytes(b"12")
    (tmp_path / "link").symlink_to("good")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    store = LocalStore(tmp_path)
    assert [entry[:2] for entry in store.list()] == [("broken", 0), ("circle", 0), ("good", 2), ("link", 2)]
    with pytest.raises(SourceNotFoundError, match="there is no such file"):
        store.read("broken")
    with pytest.raises(StorageError, match="lead in a circle"):
        store.read("circle")


def test_half_written_files_are_never_listed(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY}123").write_bytes(b"half")
    assert list(LocalStore(tmp_path).list()) == []


def test_sizes_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    assert list(LocalStore(tmp_path).list(sizes=False)) == [Entry("x", -1)]


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def guarded(path: str) -> Iterator[os.DirEntry[str]]:
        if path.endswith("locked/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(StorageError, match=r"cannot list .*locked/: permission denied") as caught:
        list(LocalStore(tmp_path).list())
    assert caught.value.errno == errno.EACCES


def test_a_file_that_vanishes_during_the_listing_stays_an_item(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(b"1")
    entries = LocalStore(tmp_path).list()
    assert next(entries) == Entry("a", 1)
    (tmp_path / "b").unlink()
    assert next(entries) == Entry("b", 0)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.write("x", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*/x: the disk is full") as caught:
        store.write("x", b"new")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["x"]
    assert store.read("x") == b"old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_in_plain_words() -> None:
    with pytest.raises(OSError, match="No space") as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    error = failure("write", "/x", caught.value)
    assert error.message == "cannot write /x: the disk is full"
    assert error.hint == "Make room there, or choose another place."


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_exclusive_writes_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    store = LocalStore(tmp_path)
    store.write("x", b"first", exclusive=True)
    with pytest.raises(OutputExistsError):
        store.write("x", b"second", exclusive=True)
    assert store.read("x") == b"first"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        LocalStore(tmp_path).write("x/y", b"")
    with pytest.raises(SourceNotFoundError, match="a part of the path is a file"):
        LocalStore(tmp_path).read("x/y")


def test_missing_folders_are_missing_and_not_made(tmp_path: Path) -> None:
    store = open_store(tmp_path / "none")
    assert list(store.list()) == []
    store.delete(["x"])
    store.delete_tree()
    assert not (tmp_path / "none").exists()


def test_linked_trees_are_unlinked_and_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x").write_bytes(b"")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "kept")
    LocalStore(tmp_path).delete_tree("tree")
    assert (tmp_path / "kept" / "x").exists()


def test_file_urls_are_paths(tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_bytes(b"x")
    store = open_store(f"file://{tmp_path}/")
    assert store.read("a b.txt") == b"x"
    assert open_store((tmp_path / "a b").as_uri()).url == str(tmp_path / "a b")
    with pytest.raises(StorageError, match="another machine"):
        open_store("file://elsewhere/x")


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAKEY:secret@bucket/x",
        "az://container/x?sv=2024&sig=secret",
        "https://account.blob.core.windows.net/c?sig=secret",
        "ftp://user:secret@host/x",
    ],
)
def test_secrets_in_urls_are_refused_and_never_shown(url: str) -> None:
    with pytest.raises(StorageError) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)
    assert "***" in str(caught.value)
    assert "secret" not in mask(url)


def test_urls_without_secrets_pass() -> None:
    for url in ("s3://bucket/a#b", "s3://bucket/photo?.jpg", "abfss://c@account.dfs.core.windows.net/x", "gs://b"):
        assert mask(url) == url
        assert repr(open_store(url)) == f"ObjectStore({url!r})"
        assert open_store(open_store(url).url).url == url
        assert pickle.loads(pickle.dumps(open_store(url))).url == url


def test_unknown_kinds_of_storage() -> None:
    with pytest.raises(StorageError, match=r"ftp:// is not a known kind of storage.*\n.*known.*s3://.*gs://.*az://"):
        open_store("ftp://host/x")
    with pytest.raises(StorageError, match="names no bucket"):
        open_store("s3://")


def test_a_missing_account_says_which_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AZURE_"):
            monkeypatch.delenv(name)
    with pytest.raises(StorageError, match=r"cannot open az://container: .*\n.*AZURE_STORAGE_ACCOUNT_NAME") as caught:
        open_store("az://container/x").read("y")
    assert "Debug source" not in str(caught.value)


def test_markers_of_empty_folders_are_no_items() -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    for name, data in (("a", b""), ("a/b", b""), ("a/b/x", b"1"), ("empty", b""), ("z", b"1")):
        store.write(name, data)
    assert [entry.name for entry in store.list()] == ["a/b/x", "empty", "z"]


def test_listings_out_of_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    pages = [[{"path": name, "size": 1, "e_tag": "1"} for name in ("a/x", "a-b")]]
    monkeypatch.setattr(obstore, "list", lambda *_, **__: iter(pages))
    with pytest.raises(StorageError, match="out of order"):
        list(open_store(f"memory://{uuid.uuid4().hex}").list())


def test_a_bucket_is_listed_a_page_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that are taken as they are, between some that have to be looked at: markers of folders, folders that are
    left out, and a listing that breaks off."""
    import obstore

    names = [*(f"a/{number:04}" for number in range(2500)), "b", "b/x", "c/1", "c/2", "d/1", "d/e/1", "d/f", "g"]
    objects = [{"path": name, "size": int(name != "b"), "e_tag": f'"{name}"'} for name in names]
    asked: list[str | None] = []

    def pages(client: object, where: str | None, offset: str | None, chunk_size: int) -> Iterator[Any]:
        asked.append(offset)
        there = [each for each in objects if offset is None or each["path"] > offset]
        for start in range(0, len(there), 500):
            if start == 1000 and len(asked) < 3:
                raise buckets.s3_listing.AgainError("cut")
            yield there[start : start + 500]

    monkeypatch.setattr(obstore, "list", pages)
    monkeypatch.setattr(buckets, "_PAUSE", 0.0)
    store = open_store(f"memory://{uuid.uuid4().hex}")
    found = list(store.pages(enter=lambda folder: folder not in ("c", "d/e")))
    assert [entry.name for page in found for entry in page] == [
        name for name in names if name != "b" and not name.startswith(("c/", "d/e/"))
    ]
    assert all(entry == Entry(entry.name, 1, entry.name) for page in found for entry in page)
    assert all(found)
    assert asked == [None, "a/0999", "a/1999"]
    assert [entry.name for entry in store.list(after="a/1200")][:2] == ["a/1201", "a/1202"]
    assert next(store.pages()).names == names[:500]


@pytest.mark.parametrize("sizes", [True, False])
def test_a_folder_is_listed_a_page_at_a_time(tmp_path: Path, *, sizes: bool) -> None:
    """The first page is short: who wants one file does not wait for the others to be looked at."""
    names = sorted(
        [*(f"a/{number}" for number in range(1500)), "a.b", "a-b", "b/c/1", "b/c.d", "b/d/1", *map(str, range(9))]
    )
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
    store = LocalStore(tmp_path)
    pages = list(store.pages(sizes=sizes))
    assert [name for page in pages for name in page.names] == names
    assert len(pages[0]) == 1
    assert max(map(len, pages)) <= PAGE
    assert {size for page in pages for size in page.sizes} == ({1} if sizes else {-1})
    for after in ("a", "a/", "a/1", "a/10", "a/999", "a0", "b/c", "b/c/", "b/c/1", "b/c.d", "b/c0", "c"):
        assert [entry.name for entry in store.list(after=after)] == [name for name in names if name > after]


def test_a_folder_of_many_names_is_sorted_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are kept as compressed runs, which are merged: with folders between them, and any bytes."""
    monkeypatch.setattr(local, "RUN", 64)
    monkeypatch.setattr(sorted_names, "_BLOCK", 8)
    shuffled = Random(7)
    names = [f"{shuffled.randrange(10**6)}.jpg" for _ in range(500)]
    names += [f"{shuffled.randrange(10**3)}/{each}" for each in ("1", "2/3") for _ in range(60)]
    names = sorted({*names, *AWKWARD})
    for name in shuffled.sample(names, len(names)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    store = LocalStore(tmp_path)
    assert [entry.name for entry in store.list()] == names
    for after in shuffled.sample(names, 40):
        assert [entry.name for entry in store.list(after=after)] == names[names.index(after) + 1 :]


def test_bad_names_of_objects() -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    assert isinstance(store, ObjectStore)
    with pytest.raises(StorageError, match="cannot write"):
        store.write("two//slashes", b"")


def test_file_names_fit_every_file_system() -> None:
    assert file_name("a/b/x.jpg") == "x.jpg"
    long = file_name("a/" + "ü" * 400 + ".jpeg")
    assert len(long.encode()) <= 255
    assert long.endswith(".jpeg")
    assert len(file_name("." + "x" * 400)) <= 255


def test_a_tree_is_deleted_though_somebody_still_writes_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.write("a/1", b"x")
    monkeypatch.setattr(local, "_DELETION_PAUSE", 0.0)
    rmdir, late = os.rmdir, iter([b"y", b"z"])

    def busy(path: Any, **more: Any) -> None:
        if (data := next(late, None)) is not None:
            store.write("a/2", data)  # between the last file and the folder
        rmdir(path, **more)

    monkeypatch.setattr(os, "rmdir", busy)
    store.delete_tree("a")
    assert not (tmp_path / "a").exists()
    store.delete_tree("a")
    assert next(late, None) is None
