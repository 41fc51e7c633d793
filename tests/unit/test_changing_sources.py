"""Sources that change while a job is at them: results never mix what was there with what is there now.

A job is played here, step by step: chunks are planned and read, and now and then it is killed and resumed. The source
changes at one of the steps, in one of the ways in which files do. Whatever is committed comes from what was planned.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.videos import number_in, write_clip

from tally.errors import ItemError, SourceChangedError, SourceNotFoundError, StorageAwayError, StorageError
from tally.jobs.policy import JobFails, RetryPolicy, RunAgain
from tally.media.video.probe import Prober
from tally.scorers.base import Scorer
from tally.sources.base import Chunk, ChunkLimit, Source, Timings
from tally.sources.files import FileSource
from tally.sources.listing import Listing
from tally.sources.reading import WORTH_LOOKING
from tally.sources.tables.source import TableSource
from tally.sources.video import VideoSource
from tally.storage import LocalStore, open_store
from tally.testing.sources import Recorder, chunks_of, listed

Change = Callable[[Path, Path], None]


# -- ways to change a file -----------------------------------------------------------------------------


def rename_over(path: Path, new: Path) -> None:
    Path(shutil.copy(new, path.with_name(".new"))).replace(path)


def rename_over_with_its_time(path: Path, new: Path) -> None:
    """As rsync does: only the file's number tells."""
    before = path.stat()
    copy = shutil.copy(new, path.with_name(".new"))
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    Path(copy).replace(path)


def rewrite(path: Path, new: Path) -> None:
    with path.open("r+b") as file:
        file.write(new.read_bytes())
        file.truncate()


def remove_and_write(path: Path, new: Path) -> None:
    path.unlink()
    path.write_bytes(new.read_bytes())


def append(path: Path, new: Path) -> None:
    with path.open("ab") as file:
        file.write(new.read_bytes())


def remove(path: Path, new: Path) -> None:
    path.unlink()


CHANGES: list[Change] = [rename_over, rename_over_with_its_time, rewrite, remove_and_write, append, remove]


# -- sources of two versions ---------------------------------------------------------------------------


class Kind(ABC):
    """A folder of files, each in two versions of the same size; rows say which they come from."""

    input: Any = "image"
    items = 3
    suffix = ""
    steps = 24

    def __init__(self, folder: Path) -> None:
        self.folder, self.other = folder / "in", folder / "other"
        for version, place in enumerate((self.folder, self.other)):
            place.mkdir()
            for name in "ab":
                self.write(place / f"{name}{self.suffix}", version)

    @abstractmethod
    def write(self, path: Path, version: int) -> None: ...

    @abstractmethod
    def source(self) -> Source: ...

    @abstractmethod
    def versions(self, value: Any) -> set[int]:
        """The versions that a batch's values, or a part of them, come from."""


class Bytes(Kind):
    input = "bytes"
    items = 1
    steps = 8

    def write(self, path: Path, version: int) -> None:
        path.write_bytes(bytes([version]) * 100_000)

    def source(self) -> Source:
        return FileSource.describe([str(self.folder)], self.input)

    def versions(self, value: Any) -> set[int]:
        whole = [bytes([version]) * 100_000 for version in (0, 1)]
        known = {whole[0]: 0, whole[1]: 1, whole[0] + whole[1]: 2}
        return {version for each in value for version in ([known[each]] if each in known else [0, 1])}


class Paths(Bytes):
    """The scorer reads the files."""

    input = "path"

    def versions(self, value: Any) -> set[int]:
        return super().versions([path.read_bytes() for path in value if path.exists()])


class Table(Kind):
    input = "table"
    items = 4
    suffix = ".parquet"

    def write(self, path: Path, version: int) -> None:
        """Of the same size, with the same footer."""
        table = pa.table({"version": [version] * 10})
        pq.write_table(table, path, compression="none", write_statistics=False, use_dictionary=False, row_group_size=5)

    def source(self) -> Source:
        return TableSource.describe([str(self.folder)], features=["version"])

    def versions(self, value: Any) -> set[int]:
        return set(value["version"].to_pylist())


class Clip(Kind):
    items = 5
    suffix = ".mp4"

    def write(self, path: Path, version: int) -> None:
        write_clip(path, 12, gop=4, first=1000 * version)

    def source(self) -> Source:
        return VideoSource.describe([str(self.folder)])

    def versions(self, value: Any) -> set[int]:
        return {number_in(each) // 1000 for each in value}


class Job:
    """A job of one worker, step by step. committed: the versions of the rows of each file. dead: by key."""

    def __init__(self, kind: Kind, tick: Callable[[], None]) -> None:
        self.committed: dict[str, set[int]] = {}
        self.dead: dict[str, ItemError] = {}
        self._kind, self._tick = kind, tick
        self._retry = RetryPolicy(attempts=3, batch_size=2)

    def run(self, *, kill_after: int) -> None:
        """Raises what makes the job fail. kill_after: chunks after which it is killed and resumed."""
        cursor, first = None, 0
        for _ in range(kill_after):
            self._tick()
            chunk = next(self._plan(cursor, first), None)
            if chunk is None:
                return
            cursor, first = chunk.cursor, chunk.first + chunk.count
            self._attempt(chunk, 0)
        self._tick()
        for chunk in list(self._plan(cursor, first)):
            self._attempt(chunk, 0)

    def _plan(self, cursor: str | None, first: int) -> Iterator[Chunk]:
        """As after a kill: nothing of the source is known but the cursor."""
        self.source = self._kind.source()
        return self.source.plan(cursor, first, lambda: ChunkLimit(self._kind.items, 1 << 40))

    def _attempt(self, chunk: Chunk, losses: int) -> None:
        scorer = Scorer()
        scorer.input, scorer.batch_size = self._kind.input, 2
        found: dict[str, set[int]] = {}
        dead: dict[str, ItemError] = {}
        self._tick()
        try:
            for batch in self.source.read(chunk, scorer, Timings()):
                self._tick()
                for key in listed(batch.keys):
                    found.setdefault(key[0], set()).update(self._kind.versions(batch.values))
                dead.update((self.source.keys(chunk)[position], error) for position, error in batch.dead)
                self._tick()
        except Exception as error:
            match self._retry.decide(chunk.count, error, losses=losses, handed_out=1):
                case RunAgain([again]):
                    return self._attempt(chunk, again.losses)
                case decision:
                    assert isinstance(decision, JobFails)
                    raise
        for name, versions in found.items():
            self.committed.setdefault(name, set()).update(versions)
        self.dead |= dead
        return None


@pytest.fixture
def prober() -> Iterator[Prober]:
    prober = Prober()
    close = prober.close
    yield prober
    close()


@pytest.mark.parametrize("kind", [Bytes, Paths, Table, Clip])
def test_versions_are_never_mixed_whenever_and_however_a_file_changes(
    tmp_path: Path, kind: type[Kind], prober: Prober, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tally.sources.reading.WORTH_LOOKING", 0.0)  # scorers here take no time at all
    monkeypatch.setattr("tally.sources.video.Prober", lambda: prober)
    monkeypatch.setattr(prober, "close", lambda: None)  # one process for all of them
    chooser = random.Random(kind.__name__)
    made = kind(tmp_path)
    kept = tmp_path / "kept"
    shutil.copytree(made.folder, kept)
    noticed = 0
    for change in CHANGES:
        for _ in range(4 if kind is Clip else 12):
            shutil.rmtree(made.folder)
            shutil.copytree(kept, made.folder)
            at, steps = chooser.randrange(made.steps), 0
            file = f"{chooser.choice('ab')}{made.suffix}"

            def tick() -> None:
                nonlocal steps
                if steps == at:  # noqa: B023
                    change(made.folder / file, made.other / file)  # noqa: B023
                steps += 1

            job = Job(made, tick)
            refused = None
            try:
                job.run(kill_after=chooser.randrange(4))
            except StorageError as error:
                refused = error
            where = f"{change.__name__} of {file} at step {at}: {job.committed}"
            assert all(len(versions) <= 1 for versions in job.committed.values()), where
            for error in filter(None, [refused, *job.dead.values()]):
                noticed += 1
                assert isinstance(error, (ItemError, SourceChangedError, SourceNotFoundError)), where
                if "has changed" in error.message:
                    assert "--overwrite" in (error.hint or "")
                    assert "retry OUT --dead" in (error.hint or "")
            other = "b" if file[0] == "a" else "a"
            if kind is not Table:  # whose rows have no identity of their own
                assert refused is None, where
                assert job.committed[other] == {0}, where
                assert all(key[0] != other for key in job.dead), where
    assert noticed > 5


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read_is_never_half_of_each(
    tmp_path: Path, change: Change, marked: bool
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"0" * 100)
    new.write_bytes(b"1" * 100)
    os.utime(old, (0, 0))
    store = LocalStore(tmp_path)

    def read(file: BinaryIO) -> bytes:
        half = file.read(50)
        change(old, new)
        return half + file.read()

    mark = store.marked("old")[1] if marked else ""
    if change in (rewrite, append):
        with pytest.raises(SourceChangedError):
            store._read("old", mark, read)
    else:  # the file that was opened is as it was
        assert store._read("old", mark, read) == b"0" * 100


# -- what is a change ----------------------------------------------------------------------------------


def test_a_change_is_said_in_words(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "x").write_bytes(b"1")
    (tmp_path / "y").write_bytes(b"3")
    mark = store.marked("x")[1]
    assert store.read("x", mark=mark) == store.read_range("x", 0, 1, mark=mark) == b"1"
    store.check_mark("x", mark)
    store.check_mark("x", "")  # of a job of an earlier version
    rename_over_with_its_time(tmp_path / "x", tmp_path / "y")
    for look in (
        lambda: store.read("x", mark=mark),
        lambda: store.read_range("x", 0, 1, mark=mark),
        lambda: store.check_mark("x", mark),
        lambda: store.local_path("x", mark=mark),
        lambda: store.download("x", tmp_path / "copy", mark=mark),
    ):
        with pytest.raises(SourceChangedError, match=r"x has changed .*: another file has taken its name\n"):
            look()
    os.utime(tmp_path / "x", (0, 1_000_000_000))
    with pytest.raises(SourceChangedError, match=r"it was written \(or touched\) at 2001-09-09 01:46:40 UTC\n"):
        store.read("x", mark=mark)
    append(tmp_path / "x", tmp_path / "y")
    with pytest.raises(SourceChangedError, match="it had 1 bytes, and has 2 now"):
        store.read("x", mark=mark)


def test_a_write_within_the_same_step_of_the_clock_shows(tmp_path: Path) -> None:
    """Marks of a file that was written a moment ago are taken when the clock has gone on."""
    path = tmp_path / "x"
    for number in range(15):
        path.write_bytes(b"%02d" % number)
        mark = LocalStore(tmp_path).marked("x")[1]
        path.write_bytes(b"%02d" % (number + 1))
        assert LocalStore(tmp_path).marked("x")[1] != mark


def test_file_systems_that_number_their_files_anew_are_known_by_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with FAT gives other numbers to the same files, once it is mounted again."""
    store = LocalStore(tmp_path)
    (tmp_path / "x").write_bytes(b"1")
    mark = store.marked("x")[1]
    rename_over_with_its_time(tmp_path / "x", tmp_path / "x")
    mount = type("Mount", (), {"mountpoint": str(tmp_path.resolve()), "fstype": "ext4"})
    monkeypatch.setattr("psutil.disk_partitions", lambda all: [mount])  # noqa: A006
    with pytest.raises(SourceChangedError):
        store.read("x", mark=mark)
    monkeypatch.setattr(mount, "fstype", "exfat")
    assert store.read("x", mark=mark) == b"1"
    store.check_mark("x", mark)
    rewrite(tmp_path / "x", tmp_path / "x")
    with pytest.raises(SourceChangedError):
        store.read("x", mark=mark)


def test_what_failed_is_scored_as_it_is_by_then(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"1")
    source = FileSource.describe([str(tmp_path)], "bytes")
    [chunk] = chunks_of(source, 10)
    (tmp_path / "a").write_bytes(b"2")
    scorer = Recorder()
    scorer.input = "bytes"
    [batch] = source.read(chunk, scorer, Timings())
    assert (batch.keys, batch.values) == (["b"], [b"1"])
    [(position, error)] = batch.dead
    assert (position, error.stage) == (0, "read")
    [again] = source.combine([source.slice(chunk, 0, 1)])
    [batch] = source.read(again, scorer, Timings())
    assert (batch.keys, batch.values, batch.dead) == (["a"], [b"2"], [])


def test_chunks_of_earlier_versions_have_no_marks(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    source = FileSource.describe([str(tmp_path)], "bytes")
    scorer = Recorder()
    scorer.input = "bytes"
    (tmp_path / "a").write_bytes(b"2")
    [batch] = source.read(Chunk(0, 1, {"place": 0, "names": ["a"]}), scorer, Timings())
    assert batch.values == [b"2"]


def test_files_are_not_looked_at_for_a_scorer_that_hardly_opens_them(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    source = FileSource.describe([str(tmp_path)], "path")
    for seconds, marked in ((WORTH_LOOKING / 2, False), (WORTH_LOOKING, True), (float("inf"), True)):
        [chunk] = source.plan(None, 0, lambda seconds=seconds: ChunkLimit(9, 9, seconds))  # type: ignore[misc]
        assert ("marks" in chunk.payload) is marked


# -- a folder that goes away ---------------------------------------------------------------------------


@pytest.fixture(params=["gone", "empty"])
def unmount(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    """What is seen of a folder on a disk, and of a disk's own folder, once the disk is unmounted."""

    def away(folder: Path) -> None:
        folder.rename(folder.with_name("disk"))
        if request.param == "empty":
            folder.mkdir()

    return away


@pytest.mark.parametrize("kind", [Bytes, Paths, Clip])
def test_a_disk_that_is_unmounted_is_no_item_s_fault(
    tmp_path: Path, kind: type[Kind], unmount: Callable[[Path], None]
) -> None:
    made = kind(tmp_path)
    source = made.source()
    chunks = chunks_of(source, 100)
    scorer = Scorer()
    scorer.input = made.input
    unmount(made.folder)
    with pytest.raises(StorageAwayError, match=r"in is gone, or is not the folder that it was.*\n.*resume the job"):
        list(source.read(chunks[0], scorer, Timings()))
    with pytest.raises(StorageAwayError):
        chunks_of(source, 100)


def test_tables_on_a_disk_that_is_unmounted_are_refused(tmp_path: Path, unmount: Callable[[Path], None]) -> None:
    made = Table(tmp_path)
    source = made.source()
    [chunk] = chunks_of(source, 100)
    scorer = Scorer()
    scorer.input = "table"
    unmount(made.folder)
    with pytest.raises(StorageError, match="there is no such file"):
        list(source.read(chunk, scorer, Timings()))
    with pytest.raises(StorageAwayError):
        chunks_of(source, 100)


def test_a_disk_that_is_unmounted_during_the_listing_does_not_end_it(
    tmp_path: Path, unmount: Callable[[Path], None]
) -> None:
    for name in ("a/1", "b/1"):
        LocalStore(tmp_path / "in").write(name, b"")
    listing = Listing.of([str(tmp_path / "in")])
    entries = listing.entries(0)
    assert next(entries).name == "a/1"
    unmount(tmp_path / "in")
    with pytest.raises(StorageAwayError):
        list(entries)


def test_a_folder_that_is_removed_during_the_listing_holds_nothing(tmp_path: Path) -> None:
    for name in ("a/1", "b/1", "c/1"):
        LocalStore(tmp_path / "in").write(name, b"")
    entries = Listing.of([str(tmp_path / "in")]).entries(0)
    assert next(entries).name == "a/1"
    shutil.rmtree(tmp_path / "in" / "b")
    assert [entry.name for entry in entries] == ["c/1"]


@pytest.mark.parametrize("machine", [os.uname().nodename, "another"])
def test_a_file_that_is_gone_costs_its_item(tmp_path: Path, machine: str) -> None:
    """Also on another machine, whose file system knows the folder by another number."""
    made = Bytes(tmp_path)
    source = FileSource.describe([str(made.folder)], "bytes")
    [chunk] = chunks_of(source, 100)
    if machine == "another":
        location = replace(source.locations[0], identity=(machine, 1))
        source = replace(source, listing=replace(source.listing, locations=(location,)))
    (made.folder / "a").unlink()
    scorer = Scorer()
    scorer.input = "bytes"
    [batch] = source.read(chunk, scorer, Timings())
    assert batch.keys == ["b"]
    assert "there is no such file" in batch.dead[0][1].message


# -- work files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
def test_a_table_that_changes_while_it_is_converted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    from tally.sources.tables import ingest

    path, new = tmp_path / "a.csv", tmp_path / "new"
    path.write_text("x\n1\n2\n")
    new.write_text("x\n3\n4\n")

    def describe() -> TableSource:
        return TableSource.describe([str(path)], features=["x"]).located(str(tmp_path / "work"))

    source = describe()
    convert = ingest._convert
    with monkeypatch.context() as patched:

        def converted(*given: Any) -> Any:
            found = convert(*given)
            change(path, new)
            return found

        patched.setattr(ingest, "_convert", converted)
        with pytest.raises((SourceChangedError, SourceNotFoundError)):
            source.prepare()
    assert not list((tmp_path / "work").glob("*")), "nothing is left, and nothing was scored"
    if change is remove:
        return
    with contextlib.suppress(StorageError):  # two headers, after appending
        again = describe()
        again.prepare()
        assert again.unread in (0, 1)


def test_an_object_in_a_bucket_that_changes(tmp_path: Path) -> None:
    store = open_store("memory://changing")
    store.write("a", b"1")
    store.write("b", b"1")
    source = FileSource.describe([store.url], "bytes")
    [chunk] = chunks_of(source, 10)
    assert len(chunk.payload["marks"]) == 2
    store.write("a", b"2")
    scorer = Recorder()
    scorer.input = "bytes"
    [batch] = source.read(chunk, scorer, Timings())
    assert (batch.keys, batch.values) == (["b"], [b"1"])
    assert batch.dead[0][1].message == "memory://changing/a has changed since the job was planned"
    for look in (
        lambda: store.read_range("a", 0, 1, mark=chunk.payload["marks"][0]),
        lambda: store.local_path("a", mark=chunk.payload["marks"][0]),
        lambda: store.download("a", tmp_path / "a", mark=chunk.payload["marks"][0]),
        lambda: store.check_mark("a", chunk.payload["marks"][0]),
    ):
        with pytest.raises(SourceChangedError):
            look()
