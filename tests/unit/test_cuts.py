"""Where a listing is cut, so that each of several coordinators lists its own part."""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from tally.sources import listing as listings
from tally.sources.base import ChunkLimit
from tally.sources.files import FileSource
from tally.storage import open_store


def planned(source: FileSource) -> list[str]:
    return [key for chunk in source.plan(None, 0, lambda: ChunkLimit(7, 1 << 30)) for key in source.keys(chunk)]


def parts(source: FileSource, cuts: Sequence[str]) -> list[list[str]]:
    return [planned(source.between(*pair)) for pair in pairwise([None, *cuts, None])]


def filled(folder: Path, names: Sequence[str]) -> FileSource:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"1")
    return FileSource.describe([str(folder)], "bytes")


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_folder_is_cut_into_equal_parts(tmp_path: Path, count: int) -> None:
    names = sorted(f"{number % 4}/a-b{'/' if number % 3 else '.'}{number:03}" for number in range(100))
    source = filled(tmp_path, names)
    cuts = source.cuts(count)
    assert cuts is not None
    found = parts(source, cuts)
    assert len(found) == count
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert [key for part in found for key in part] == planned(source) == names


def test_of_few_files_each_is_a_part(tmp_path: Path) -> None:
    source = filled(tmp_path, ["a", "b", "c"])
    cuts = source.cuts(10)
    assert cuts is not None
    assert parts(source, cuts) == [["a"], ["b"], ["c"]]
    assert filled(tmp_path / "b1", ["x"]).cuts(4) == []


def test_a_glob_and_files_by_name_are_cut(tmp_path: Path) -> None:
    filled(tmp_path, [f"{number}.bin" for number in range(10)] + ["other.txt"])
    source = FileSource.describe([str(tmp_path / "*.bin")], "bytes")
    cuts = source.cuts(2)
    assert cuts is not None
    assert [len(part) for part in parts(source, cuts)] == [5, 5]
    assert FileSource.describe([str(tmp_path), str(tmp_path / "0.bin")], "bytes").cuts(2) is None


def test_a_name_that_is_no_text_is_no_cut(tmp_path: Path) -> None:
    source = filled(tmp_path, ["a", "b\udce9", "c", "d"])
    cuts = source.cuts(4)
    assert cuts is not None
    assert all(cut.isprintable() and cut.encode() for cut in cuts)
    found = parts(source, cuts)
    assert [key for part in found for key in part] == planned(source)
    assert len(planned(source)) == 4


def test_planning_a_part_goes_on_after_a_crash(tmp_path: Path) -> None:
    source = filled(tmp_path, [f"{number:02}" for number in range(40)])
    part = source.between("09", "29")
    first, second, *_ = part.plan(None, 0, lambda: ChunkLimit(7, 1 << 30))
    rest = [key for chunk in part.plan(first.cursor, 7, lambda: ChunkLimit(7, 1 << 30)) for key in part.keys(chunk)]
    assert part.keys(first) + rest == [f"{number:02}" for number in range(10, 30)]
    assert part.keys(second) == rest[:7]
    assert planned(source.between("39", None)) == []  # what was there is gone, say


KEYS = {
    "numbered": [f"photos/{number:06}.jpg" for number in range(600)],
    "dated": [f"y={2020 + number % 5}/m={number % 12:02}/{number:05}.jpg" for number in range(600)],
    "hashed": [f"{random.Random(number).randbytes(8).hex()}.bin" for number in range(600)],
    "words": [f"{'äß☃🎈'[number % 4]}/{number}" for number in range(600)],
}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty names are too many to look at."""
    monkeypatch.setattr(listings, "_LOOKED_AT", 50)


@pytest.fixture(params=KEYS)
def bucket(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[str]]]:
    place = f"memory://cuts/{secrets.token_hex(4)}"
    store = open_store(place)
    for key in KEYS[request.param]:
        store.write(key, b"1")
    yield place, sorted(KEYS[request.param])
    store.delete_tree()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("count", [2, 5])
def test_a_large_bucket_is_cut_by_beginnings_of_names(bucket: tuple[str, list[str]], count: int) -> None:
    place, keys = bucket
    source = FileSource.describe([place], "bytes")
    cuts = source.cuts(count)
    assert cuts is not None
    found = parts(source, cuts)
    assert len(found) == count
    assert [key for part in found for key in part] == keys
    assert max(map(len, found)) <= 2 * len(keys) / count


@pytest.mark.usefixtures("few")
def test_a_bucket_that_lists_from_the_beginning_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"memory://cuts/{secrets.token_hex(4)}"
    for number in range(60):
        open_store(place).write(f"{number}", b"1")
    source = FileSource.describe([place], "bytes")
    assert source.cuts(2) is not None
    monkeypatch.setattr(type(open_store(place)), "seeks", False)
    assert source.cuts(2) is None
