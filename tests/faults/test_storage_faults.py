"""What an object store does to its clients on a bad day, and what they make of it."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from tests.faulty import KINDS, FaultyProxy
from tests.objectstores import Service

from tally.errors import OutputExistsError, SourceNotFoundError, StorageAwayError, StorageError
from tally.scorers.base import Scorer
from tally.sources.base import ChunkLimit, Timings
from tally.sources.files import FileSource
from tally.storage import Store, buckets, cache_folder, open_store


class ByteScorer(Scorer):
    input = "bytes"
    batch_size = 10

    def score(self, batch: Any) -> Any:
        return batch


CONTENT = os.urandom(3_000_000)
LARGE = os.urandom(20_000_000)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_SILENCE", timedelta(seconds=1))
    monkeypatch.setattr(buckets, "_SILENCE_LARGE", timedelta(seconds=2))
    backoff = {"init_backoff": timedelta(milliseconds=10), "base": 3, "max_backoff": timedelta(seconds=1)}
    monkeypatch.setattr(buckets, "_RETRY", {**buckets._RETRY, "backoff": backoff})
    monkeypatch.setattr(buckets, "_PAUSE", 0.01)


@pytest.fixture(params=["s3_server", "azure_server"])
def server(request: pytest.FixtureRequest) -> Service:
    service = request.getfixturevalue(request.param)
    assert isinstance(service, Service)
    return service


@pytest.fixture
def proxy(server: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.url) as proxy:
        server.through(proxy.url).enter(monkeypatch)
        yield proxy


@pytest.fixture
def store(server: Service, proxy: FaultyProxy) -> Store:
    return open_store(f"{server.make(f'test-{uuid.uuid4().hex}')}/folder")


def _read(store: Store) -> None:
    assert store.read("content") == CONTENT


def _range(store: Store) -> None:
    assert store.read_range("content", 1000, 2_000_000) == CONTENT[1000:2_001_000]


def _size(store: Store) -> None:
    assert store.size("content") == len(CONTENT)


def _download(store: Store) -> None:
    shutil.rmtree(cache_folder(), ignore_errors=True)
    assert store.local_path("content").read_bytes() == CONTENT


def _list(store: Store) -> None:
    assert [entry.name for entry in store.list()] == ["content", "gone", "old"]


def _write(store: Store) -> None:
    store.write("new", CONTENT)
    assert store.read("new") == CONTENT


def _exclusive(store: Store) -> None:
    store.write("new", b"mine", exclusive=True)
    assert store.read("new") == b"mine"
    with pytest.raises(OutputExistsError):
        store.write("new", b"mine", exclusive=True)


def _large(store: Store) -> None:
    store.write("new", LARGE)
    assert store.read("new") == LARGE


def _move(store: Store) -> None:
    store.move("old", "new")
    assert store.read("new") == b"old"
    assert not store.exists("old")


def _delete(store: Store) -> None:
    store.delete(["gone"])
    assert not store.exists("gone")


OPERATIONS = [
    (_read, "GET"),
    (_range, "GET"),
    (_size, "HEAD"),
    (_download, "HEAD"),
    (_download, "GET"),
    (_list, "GET"),
    (_write, "PUT"),
    (_exclusive, "PUT"),
    (_large, "PUT .*(partNumber=2|comp=block&)"),
    (_large, "POST .*uploads=|comp=blocklist"),
    (_large, "POST .*uploadId=|comp=blocklist"),
    (_move, "PUT"),
    (_move, "POST"),
    (_delete, "POST"),
]
STALLED = [(_read, "GET"), (_list, "GET"), (_exclusive, "PUT"), (_delete, "POST")]
"""Each takes a client's patience."""


@pytest.mark.parametrize("kind", KINDS)
def test_what_passes_is_repeated(proxy: FaultyProxy, store: Store, kind: str) -> None:
    for operation, match in STALLED if kind.startswith("stall") else OPERATIONS:
        for name, data in (("content", CONTENT), ("old", b"old"), ("gone", b"")):
            store.write(name, data)
        store.delete(["new"])
        before = proxy.injected[kind]
        proxy.inject(kind, match=match, seconds=60)
        operation(store)
        assert proxy.injected[kind] == before + 1, (operation.__name__, match)


def test_a_storm(proxy: FaultyProxy, store: Store) -> None:
    proxy.random(0.2, seed=3)
    names = [f"{number:03d}" for number in range(150)]

    def there_and_back(name: str) -> None:
        store.write(name, name.encode(), exclusive=True)
        assert store.read(name) == name.encode()
        store.move(name, f"moved/{name}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(there_and_back, names))
    assert [entry.name for entry in store.list()] == [f"moved/{name}" for name in names]
    store.delete_tree()
    assert list(store.list()) == []
    assert proxy.injected.total() > 50


def test_a_listing_that_breaks_off_goes_on(proxy: FaultyProxy, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number:03d}" for number in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.write(name, b"x"), names))
    monkeypatch.setattr(buckets, "PAGE", 20)  # of what is handed over, not of what is asked for
    listed = store.list()
    found = [next(listed).name for _ in range(30)]
    proxy.inject("cut", match="GET")
    found += [entry.name for entry in listed]
    assert found == names


def test_pages_that_are_cut(s3_server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyProxy(s3_server.url) as proxy:
        s3_server.through(proxy.url).enter(monkeypatch)
        store = open_store(s3_server.make(f"test-{uuid.uuid4().hex}"))
        names = [f"{number:03d}" for number in range(250)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: store.write(name, b"x"), names))
        monkeypatch.setattr(buckets, "PAGE", 100)  # as the service's
        proxy.inject("cut", match="GET .*continuation-token")
        proxy.inject("503", match="GET .*start-after")
        assert [entry.name for entry in store.list()] == names
        assert proxy.injected == {"cut": 1, "503": 1}


@pytest.mark.parametrize("kind", ["403", "404"])
def test_what_lasts_is_not_repeated(proxy: FaultyProxy, store: Store, server: Service, kind: str) -> None:
    if kind == "404":
        with pytest.raises(SourceNotFoundError, match="there is no such object"):
            store.read("nothing")
    elif server.scheme == "s3":
        pytest.skip("moto checks no signatures")
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(buckets, "_clients", {})
            patch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "bm90IHRoZSBrZXk=")
            with pytest.raises(StorageError, match=r"answered 403 Forbidden.*\n.*AZURE_STORAGE_ACCOUNT_KEY"):
                store.read("nothing")
    assert proxy.count("nothing") == 1


def test_a_service_that_stays_away_is_reported(
    proxy: FaultyProxy, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "_GIVE_UP", 1.0)
    proxy.inject("503", count=10_000)
    with pytest.raises(StorageAwayError, match=r"the service answered 503.*\(tried for \d+ s\)") as caught:
        store.read("content")
    assert store.url in str(caught.value)
    assert proxy.injected["503"] > 3


def test_no_item_is_to_blame_for_a_service_that_stays_away(
    proxy: FaultyProxy, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        store.write(f"items/{number}", b"%d" % number)
    source = FileSource.describe([f"{store.url}/items"], "bytes")
    (chunk,) = source.plan(None, 0, lambda: ChunkLimit(10, 1000))
    scorer = ByteScorer()
    monkeypatch.setattr(buckets, "_GIVE_UP", 1.0)
    proxy.inject("503", count=10_000)
    with pytest.raises(StorageAwayError):
        list(source.read(chunk, scorer, Timings()))
    proxy.calm()
    store.delete(["items/2"])
    (batch,) = source.read(chunk, scorer, Timings())
    assert [(position, error.stage) for position, error in batch.dead] == [(2, "read")]
    assert list(batch.values) == [b"0", b"1", b"3"]


def test_an_address_where_nobody_is(server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_GIVE_UP_UNKNOWN", 0.5)
    server.through("http://127.0.0.1:9").enter(monkeypatch)
    with pytest.raises(StorageError, match=r"the connection to http://127.0.0.1:9 failed.*\n.*_ENDPOINT"):
        open_store(f"{server.scheme}://bucket/x").read("y")


def test_a_bucket_that_is_not_there(server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    server.enter(monkeypatch)
    store = open_store(f"{server.scheme}://no-such-place/x")
    attempts: list[Callable[[], object]] = [
        lambda: list(store.list()),
        lambda: store.read("y"),
        lambda: store.write("y", b""),
        lambda: store.write("y", b"", exclusive=True),
        lambda: store.write("y", LARGE),
        lambda: store.delete(["y"]),
        lambda: store.move("y", "z"),
    ]
    for attempt in attempts:
        with pytest.raises(StorageError, match=r"there is no (bucket|container) 'no-such-place'\n.*make it first"):
            attempt()


def test_a_failed_upload_leaves_no_parts(s3_server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_GIVE_UP", 0.5)
    with FaultyProxy(s3_server.url) as proxy:
        s3_server.through(proxy.url).enter(monkeypatch)
        bucket = s3_server.make(f"test-{uuid.uuid4().hex}")
        proxy.inject("500", count=10_000, match="partNumber=2")
        with pytest.raises(StorageError, match=r"cannot write .*/x: the service answered 500"):
            open_store(bucket).write("x", LARGE)
        with urllib.request.urlopen(f"{s3_server.url}/{bucket.removeprefix('s3://')}?uploads") as answer:
            assert re.findall(b"<UploadId>", answer.read()) == []
        assert list(open_store(bucket).list()) == []


def _fetch(url: str, ready: threading.Barrier, digests: multiprocessing.Queue[bytes]) -> None:
    ready.wait(60)
    digests.put(open_store(url).local_path("content").read_bytes())


def test_processes_of_one_machine_download_once(proxy: FaultyProxy, store: Store) -> None:
    store.write("content", CONTENT)
    context = multiprocessing.get_context("spawn")
    ready, digests = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_fetch, args=(store.url, ready, digests)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [digests.get(timeout=60) for _ in processes] == [CONTENT] * 2
    for process in processes:
        process.join(60)
    assert proxy.count("GET .*/content") == 1


def test_a_damaged_download_is_made_again(server: Service, store: Store) -> None:
    store.write("content", CONTENT)
    path = store.local_path("content")
    path.write_bytes(CONTENT[:1000])
    assert store.local_path("content") == path
    assert path.read_bytes() == CONTENT
    assert [each.name for each in sorted(cache_folder().rglob("*")) if each.is_file()] == [".lock", "content"]


def test_what_is_too_large_to_be_copied_at_once_is_moved(s3_server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore
    from obstore.exceptions import GenericError

    s3_server.enter(monkeypatch)
    store = open_store(f"{s3_server.make(f'test-{uuid.uuid4().hex}')}/folder")
    store.write("old", LARGE)

    def refuse(*args: object) -> None:
        raise GenericError(
            "Error performing PUT: Server returned non-2xx status code: 400 Bad Request: <Error><Code>InvalidRequest"
            "</Code><Message>The specified copy source is larger than the maximum allowable size for a copy source: "
            "5368709120</Message></Error>"
        )

    monkeypatch.setattr(obstore, "copy", refuse)
    store.move("old", "new")
    assert [(entry.name, entry.size) for entry in store.list()] == [("new", len(LARGE))]
    assert store.read("new") == LARGE
