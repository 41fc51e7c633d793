"""Objects read as files, by ranges: what is fetched, when, and what is said when it goes wrong."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable
from contextlib import closing

import pytest

from tally.errors import SourceNotFoundError, StorageError
from tally.storage import open_store, ranges
from tally.storage.buckets import ObjectStore
from tally.storage.ranges import RangeFile

BLOCK = 64
CONTENT = random.Random(0).randbytes(200 * BLOCK + 7)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """Holds ``x``; blocks are small."""
    monkeypatch.setattr(ranges, "BLOCK", BLOCK)
    store = open_store(f"memory://{uuid.uuid4().hex}")
    store.write("x", CONTENT)
    assert isinstance(store, ObjectStore)
    return store


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Start and length of every request, in the order in which they began."""
    found: list[tuple[int, int]] = []
    read_range = ObjectStore.read_range

    def counting(self: ObjectStore, name: str, start: int, length: int, *, mark: str = "") -> bytes:
        found.append((start, length))
        return read_range(self, name, start, length, mark=mark)

    monkeypatch.setattr(ObjectStore, "read_range", counting)
    return found


def exactly(file: RangeFile, length: int) -> bytes:
    """So many bytes, as far as there are."""
    found = b""
    while len(found) < length and (data := file.read(length - len(found))):
        found += data
    return found


def test_any_part_is_what_it_is(store: ObjectStore) -> None:
    chance = random.Random(1)
    with closing(RangeFile(store, "x")) as file:
        assert (file.size, file.seekable(), file.readable(), file.tell()) == (len(CONTENT), True, True, 0)
        for _ in range(300):
            start, length = chance.randrange(len(CONTENT) + 50), chance.randrange(5 * BLOCK)
            assert file.seek(start) == start
            assert exactly(file, length) == CONTENT[start : start + length]
        assert file.seek(-10, 2) == len(CONTENT) - 10
        assert file.seek(3, 1) == len(CONTENT) - 7
        assert file.read() == CONTENT[-7:]
        assert file.read(1) == file.read() == b""


def test_an_empty_object_is_an_empty_file(store: ObjectStore) -> None:
    store.write("nothing", b"")
    with closing(RangeFile(store, "nothing")) as file:
        assert file.read(10) == file.readall() == b""


def test_from_end_to_end_each_byte_is_fetched_once_in_few_requests(
    store: ObjectStore, asked: list[tuple[int, int]]
) -> None:
    with closing(RangeFile(store, "x")) as file:
        assert file.readall() == CONTENT
        assert file.fetched == len(CONTENT)
    assert sum(length for _, length in asked) == len(CONTENT)
    assert asked[0] == (0, BLOCK)
    assert max(length for _, length in asked) == 16 * BLOCK
    assert len(asked) < 30


def test_a_reader_that_stops_early_has_caused_little_more_to_be_fetched(
    store: ObjectStore, asked: list[tuple[int, int]]
) -> None:
    for wanted in (1, 3, 10, 40):
        asked.clear()
        with closing(RangeFile(store, "x")) as file:
            file.seek(30 * BLOCK)
            assert exactly(file, wanted * BLOCK) == CONTENT[30 * BLOCK : (30 + wanted) * BLOCK]
        assert asked[0][0] == 30 * BLOCK
        assert sum(length for _, length in asked) <= (wanted * 1.5 + 2) * BLOCK


def test_two_places_are_read_on_from_in_turns(store: ObjectStore, asked: list[tuple[int, int]]) -> None:
    with closing(RangeFile(store, "x")) as file:
        for block in range(80):
            for begin in (0, 110 * BLOCK):
                for half in (0, BLOCK // 2):
                    start = begin + block * BLOCK + half
                    file.seek(start)
                    assert exactly(file, BLOCK // 2) == CONTENT[start : start + BLOCK // 2]
    assert sum(length for _, length in asked) <= len(CONTENT)
    assert len(asked) < 90


def test_no_more_is_kept_than_is_said(store: ObjectStore) -> None:
    with closing(RangeFile(store, "x")) as file:
        for block in range(190):
            file.seek(block * BLOCK)
            file.read(1)
            assert len(file.blocks) <= 64


def test_what_follows_is_fetched_meanwhile(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, threads = threading.Semaphore(0), []
    read_range = ObjectStore.read_range

    def telling(self: ObjectStore, name: str, start: int, length: int, *, mark: str = "") -> bytes:
        threads.append(threading.current_thread())
        begun.release()
        return read_range(self, name, start, length, mark=mark)

    monkeypatch.setattr(ObjectStore, "read_range", telling)
    with closing(RangeFile(store, "x")) as file:
        exactly(file, 2 * BLOCK)  # the third block is asked for though nobody has read it
        assert all(begun.acquire(timeout=60) for _ in range(3))
    assert threads[:2] == [threading.current_thread()] * 2
    assert threads[2].name == "tally-range"
    assert not threads[2].is_alive()  # closing waits


def fail(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> list[int]:
    """Requests fail where their number (from 0) is one of those; returns the starts of all."""
    starts: list[int] = []
    read_range = ObjectStore.read_range

    def failing(self: ObjectStore, name: str, start: int, length: int, *, mark: str = "") -> bytes:
        starts.append(start)
        if when(len(starts) - 1):
            raise StorageError("cannot read memory://x: the network is down")
        return read_range(self, name, start, length, mark=mark)

    monkeypatch.setattr(ObjectStore, "read_range", failing)
    return starts


def test_a_failure_ahead_is_none_before_it_is_reached(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = fail(monkeypatch, lambda number: number == 2)
    with closing(RangeFile(store, "x")) as file:
        assert file.readall() == CONTENT
    assert starts.count(2 * BLOCK) == 2


def test_a_failure_that_lasts_is_raised(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, lambda number: number >= 2)
    with closing(RangeFile(store, "x")) as file:
        assert exactly(file, 2 * BLOCK) == CONTENT[: 2 * BLOCK]
        with pytest.raises(StorageError, match="the network is down"):
            file.readall()


@pytest.mark.parametrize("content", [CONTENT[::-1], CONTENT[: 3 * BLOCK], CONTENT + b"more", b""])
def test_another_content_under_the_same_name_is_noticed(store: ObjectStore, content: bytes) -> None:
    with closing(RangeFile(store, "x")) as file:
        assert exactly(file, BLOCK) == CONTENT[:BLOCK]
        store.write("x", content)
        file.seek(100 * BLOCK)
        with pytest.raises(StorageError, match=r"memory://.*/x has changed since the job was planned"):
            file.read(1)
    known = file.size, file.mark
    with (
        closing(RangeFile(store, "x", known)) as file,
        pytest.raises(StorageError, match="has changed since the job was planned"),
    ):
        file.read(1)


def test_an_object_that_is_gone_is_not_found(store: ObjectStore) -> None:
    with closing(RangeFile(store, "x")) as file:
        store.delete(["x"])
        with pytest.raises(SourceNotFoundError):
            file.read(1)
    with pytest.raises(SourceNotFoundError):
        RangeFile(store, "x")
