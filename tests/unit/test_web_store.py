"""Files of the web as a store: in parts, within limits, and never those of another content."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.https import https
from tests.ports import free_ports
from tests.websites import Website, website

from tally import network
from tally.errors import SourceChangedError, SourceNotFoundError, StorageAwayError, StorageError
from tally.storage import Store, open_store, web

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Website]:
    monkeypatch.setattr(web, "_PATIENT", (0.001, 0.001))
    monkeypatch.setattr(web, "_fetched", {})
    with website() as site:
        site.files |= {"/folder/a b.bin": CONTENT, "/folder/empty": b""}
        yield site


@pytest.fixture
def store(site: Website) -> Store:
    return open_store(f"{site.url}/folder/")


@pytest.mark.parametrize("parts", [True, False])
def test_parts_end_with_the_file(site: Website, store: Store, parts: bool) -> None:
    site.parts = parts
    size, mark = store.marked("a b.bin")
    assert (size, store.size("empty"), store.exists("a b.bin"), store.exists("c")) == (10_240, 0, True, False)
    for start, length in ((0, 10), (5000, 3), (10_239, 5), (10_240, 5), (99_999, 1), (7, 0)):
        assert store.read_range("a b.bin", start, length, mark=mark) == CONTENT[start : start + length]
    assert store.read_range("empty", 0, 5) == b""
    assert store.read("a b.bin", mark=mark) == CONTENT
    for attempt in (store.read, store.size, store.local_path, lambda name: store.read_range(name, 0, 1)):
        with pytest.raises(SourceNotFoundError, match="404"):
            attempt("nothing")


def test_of_a_server_that_gives_no_parts_a_file_is_fetched_once(site: Website, store: Store, tmp_path: Path) -> None:
    site.parts = False
    _, mark = store.marked("a b.bin")
    assert store.gives_parts("a b.bin")  # as far as is known
    store.read_range("a b.bin", 0, 10, mark=mark)
    assert not store.gives_parts("a b.bin")
    asked = len(site.asked)
    assert store.read_range("a b.bin", 10_000, 500, mark=mark) == CONTENT[10_000:]
    assert len(site.asked) == asked
    [kept] = (tmp_path / "tally-home" / "cache").rglob("a b.bin")
    assert kept.read_bytes() == CONTENT
    assert store.local_path("a b.bin") == kept


@pytest.mark.parametrize("mark", ["ETag", "Last-Modified", ""])
@pytest.mark.parametrize("parts", [True, False])
def test_another_content_is_found_out(site: Website, store: Store, tmp_path: Path, mark: str, parts: bool) -> None:
    site.mark, site.parts = mark, parts
    _, before = store.marked("a b.bin")
    site.files["/folder/a b.bin"] = CONTENT[::-1] + (b"" if mark else b"x")  # without a mark, only its size tells
    attempts: list[Callable[[], Any]] = [
        lambda: store.read_range("a b.bin", 5, 5, mark=before),
        lambda: store.read_range("a b.bin", 99_999, 5, mark=before),
        lambda: store.read("a b.bin", mark=before),
        lambda: store.local_path("a b.bin", mark=before),
        lambda: store.download("a b.bin", tmp_path / "copy", mark=before),
        lambda: store.check_mark("a b.bin", before),
    ]
    for attempt in attempts:
        with pytest.raises(SourceChangedError, match="has changed since the job was planned"):
            attempt()


@pytest.mark.parametrize("trouble", ["503", "429", "cut"])
def test_what_passes_is_tried_again(site: Website, store: Store, trouble: str) -> None:
    site.troubles = [trouble] * 2
    assert store.read_range("a b.bin", 100, 50) == CONTENT[100:150]
    site.troubles = [trouble] * 2
    assert store.read("a b.bin") == CONTENT
    site.troubles = [trouble] * 3
    with pytest.raises(StorageAwayError, match=r"tried 3 times"):
        store.read_range("a b.bin", 100, 50)


def test_a_part_that_was_not_asked_for_is_refused(site: Website, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = web._opened
    monkeypatch.setattr(web, "_opened", lambda url, part=None: real(url, "0-9"))
    with pytest.raises(StorageError, match=r"gives another part of it than was asked for\n.*curl"):
        store.read_range("a b.bin", 5, 5)


@pytest.mark.parametrize("parts", [True, False])
def test_without_a_size_it_is_only_read_whole(site: Website, store: Store, parts: bool) -> None:
    site.sized, site.parts = False, parts
    assert store.read("a b.bin") == CONTENT
    with pytest.raises(StorageError, match=r"does not say how large it is\n.*Download it"):
        store.marked("a b.bin")


@pytest.mark.parametrize("parts", [True, False])
def test_what_a_server_packs_by_itself_is_not_taken_for_the_file(site: Website, store: Store, parts: bool) -> None:
    site.parts, site.encoding = parts, "gzip"
    site.files["/folder/a.tar.gz"] = CONTENT
    for attempt in (store.read, store.size, lambda name: store.read_range(name, 0, 1)):
        with pytest.raises(StorageError, match=r"sends it packed \(gzip\)"):
            attempt("a b.bin")
    assert store.read("a.tar.gz") == CONTENT
    site.encoding = "aws-chunked"  # as buckets tell of how it was written
    assert store.read("a b.bin") == CONTENT


def test_files_have_limits(site: Website, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "LARGEST_KEPT", 1000)
    site.parts = False
    with pytest.raises(StorageError, match=r"it has 10,240 bytes, and a file from the web may have 1,000 bytes"):
        store.read_range("a b.bin", 0, 5)
    monkeypatch.setattr(web, "PATIENCE_SECONDS", -1.0)
    site.parts = True
    with pytest.raises(StorageError, match="too slowly"):
        store.read_range("a b.bin", 0, 5)


def test_a_web_server_neither_lists_nor_is_written_to(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"does not list its files\n.*Name the files themselves"):
        next(iter(store.list()))
    attempts: list[Callable[[], Any]] = [
        lambda: store.write("x", b""),
        lambda: store.upload("x", tmp_path),
        lambda: store.move("a b.bin", "x"),
        lambda: store.delete(["a b.bin"]),
        store.delete_tree,
    ]
    for attempt in attempts:
        with pytest.raises(StorageError, match="are read, and not written"):
            attempt()


def test_private_addresses_are_read_where_that_is_allowed(
    site: Website, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(network.ALLOWED, "127.0.0.1")
    assert store.size("a b.bin") == 10_240
    monkeypatch.setenv(network.ALLOWED, "")
    asked = len(site.asked)
    for attempt in (store.size, store.read, lambda name: store.read_range(name, 0, 5)):
        with pytest.raises(StorageError, match=r"is a private address.*\n.*--allow-host"):
            attempt("a b.bin")
    assert len(site.asked) == asked


def test_a_certificate_that_nobody_has_signed_is_not_trusted(
    site: Website, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    [port] = free_ports(1)
    with https(tmp_path, port, int(site.url.rpartition(":")[2])):
        store = open_store(f"https://127.0.0.1:{port}/folder")
        with pytest.raises(StorageError, match="its certificate is not to be trusted: self-signed") as caught:
            store.size("a b.bin")
        assert not isinstance(caught.value, StorageAwayError)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        monkeypatch.setattr(web, "_made", [])
        assert store.read_range("a b.bin", 100, 4) == CONTENT[100:104]


def test_a_host_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(StorageAwayError, match=r"there is no host of this name$"):
        open_store("https://host.invalid").size("x")


def test_secrets_are_not_told(site: Website) -> None:
    with pytest.raises(StorageError, match="carries credentials") as caught:
        open_store("https://name:hush@example.com/folder")
    assert "hush" not in str(caught.value)
    with pytest.raises(StorageError, match="404") as caught:
        open_store(site.url).read("x?token=hush")
    assert "hush" not in str(caught.value)
