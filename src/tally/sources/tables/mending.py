"""Dead items whose table was mended: which rows they are now, and whether the others are what they were.

The work files are gone when a job is finished, and are made anew when its dead items are replayed. If nothing has
changed meanwhile, an item is where it was. If lines that could not be read were mended, the rows after them have moved.
So what is kept of a dead item says in which record of which file it is, how that file was marked, and a digest of its
healthy lines: all but those that could not be read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tally.errors import StorageError
from tally.sources.base import Chunk
from tally.sources.tables.ingest import BAD, ROWS
from tally.sources.tables.row_ranges import RowRange
from tally.sources.tables.select import ORDER

if TYPE_CHECKING:
    from collections.abc import Callable

    from tally.sources.tables.work_files import WorkFiles

_AGAIN = (
    "To score all of it as it is now, give the command that began the job again, with --overwrite; the results that "
    "are there stay until then."
)


class Positions:
    """Where the records of the input files are in the work files. A record is a row, or a line that could not be read;
    records of a file count from 0."""

    lines: np.ndarray[Any, Any]
    """The numbers of the lines that could not be read."""

    def __init__(self, work: WorkFiles) -> None:
        self.work = work
        self.numbers = {name: number for number, (name, _) in enumerate(work.made.files)}

    @cached_property
    def bad(self) -> dict[int, np.ndarray[Any, Any]]:
        """For each file with lines that could not be read: their records, in order."""
        if not self.work.made.bad:
            return {}
        with self.work.parquet(BAD) as file:
            table = file.read(["file", "before", "line"])
        files, before, self.lines = (table[name].to_numpy() for name in ("file", "before", "line"))
        found = {}
        for number in np.unique(files):
            good = before[files == number]
            found[int(number)] = good + np.arange(len(good))
        return found

    @cached_property
    def _bad_before(self) -> dict[int, int]:
        """For each of those files: how many such lines there are in the files before it."""
        before, found = 0, {}
        for number in sorted(self.bad):
            found[number] = before
            before += len(self.bad[number])
        return found

    @cached_property
    def _starts(self) -> np.ndarray[Any, Any]:
        """The position of each file's first row in the whole input."""
        return np.cumsum([0, *(rows for _, rows in self.work.made.files)], dtype=np.int64)

    @cached_property
    def _order(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Of sorted rows: their positions in the whole input, in ascending order, and in the work file."""
        with self.work.parquet(ROWS) as file:
            order = file.read([ORDER])[ORDER].to_numpy()
        places = np.argsort(order, kind="stable")
        return order[places], places

    def of_bad(self, index: int) -> tuple[int, int, int]:
        """File, record and line of one that could not be read."""
        for file, before in self._bad_before.items():
            if index < before + len(self.bad[file]):
                return file, int(self.bad[file][index - before]), int(self.lines[index])
        raise IndexError(index)

    def records(self, file: int) -> int:
        """How many records a file has."""
        return int(self.work.made.files[file][1]) + len(self.bad.get(file, ()))

    def find(self, file: int, record: int) -> RowRange | None:
        """The row range of one record; None if a condition passes it over. Raises IndexError if there is none."""
        lost = self.bad.get(file, np.array([], dtype=np.int64))
        before = int(np.searchsorted(lost, record))
        if before < len(lost) and lost[before] == record:
            index = self._bad_before[file] + before
            return ["bad", index, index + 1]
        row, rows = record - before, self.work.made.files[file][1]
        if not 0 <= row < rows:
            raise IndexError(record)
        if self.work.made.kind == "files":
            return ["rows", -1, f"{file:06d}.parquet", row, row + 1, rows]
        order, places = self._order
        position = int(self._starts[file]) + row
        at = int(np.searchsorted(order, position))
        if at == len(order) or order[at] != position:
            return None
        place = int(places[at])
        return ["rows", -1, ROWS, place, place + 1, len(order)]


def kept(row_range: RowRange, key: str, positions: Positions, by: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a dead item, besides its row range. by: the values of the key that it stands for, if it does."""
    made = positions.work.made
    item: dict[str, Any] = {"made": positions.work.fingerprint}
    if row_range[0] == "key":
        return item | {"by": {name: str(value) for name, value in by.items()}}
    if row_range[0] == "bad":
        file, record, line = positions.of_bad(row_range[1])
        item["line"] = line
    elif made.kind == "windows":
        return item
    else:
        name, _, number = key.rpartition("#")
        file, record = positions.numbers[name], int(number) - 1
    name = made.files[file][0]
    version = made.versions[file] if made.versions else None
    known = {"file": name, "version": version, "record": record, "healthy": made.healthy.get(str(file))}
    return item | known | {"records": positions.records(file)}


def found_again(
    chunks: Sequence[Chunk],
    positions: Positions,
    keys: Sequence[Mapping[str, Any]],
    digest: Callable[[int, Collection[int]], str],
) -> list[Chunk]:
    """The dead items where they are now.

    keys: the values of each key of the source, in order. digest: of the lines of the file of that number, but for some.
    Raises StorageError if more has changed than the lines that could not be read.
    """

    def has_moved(chunk: Chunk) -> bool:
        return bool(chunk.payload.get("item", {}).get("made", now) != now)

    now = positions.work.fingerprint
    moved = [each.payload["item"] for each in chunks if has_moved(each)]
    if not moved:
        return list(chunks)
    _check_healthy(moved, positions, digest)
    ordinals = {tuple(str(value) for value in each.values()): ordinal for ordinal, each in enumerate(keys)}
    found = []
    for chunk in chunks:
        [row_range] = chunk.payload["pieces"]
        if has_moved(chunk):
            row_range = _moved(chunk.payload["item"], row_range, positions, ordinals)
        if row_range is not None:
            found.append(Chunk(chunk.first, chunk.count, {"pieces": [row_range]}, chunk.cursor))
    return found


def _moved(
    item: Mapping[str, Any], row_range: RowRange, positions: Positions, ordinals: Mapping[tuple[str, ...], int]
) -> RowRange | None:
    if "by" in item:
        ordinal = ordinals.get(tuple(item["by"].values()))
        if ordinal is None:
            told = ",".join(f"{name}={value}" for name, value in item["by"].items())
            raise StorageError(f"there are no rows of {told} any more", hint=_AGAIN)
        return ["key", ordinal, row_range[2]]
    try:
        return positions.find(positions.numbers[item["file"]], item["record"])
    except IndexError:
        raise StorageError(f"{item['file']} has fewer rows than it had", hint=_AGAIN) from None


def _check_healthy(
    items: Sequence[Mapping[str, Any]], positions: Positions, digest: Callable[[int, Collection[int]], str]
) -> None:
    """Raises StorageError unless nothing has changed in the files of these items but lines that could not be read."""
    if positions.work.made.kind == "windows":
        raise StorageError(
            "the source has changed since its rows were gathered over windows: scored windows may be others now",
            hint=_AGAIN,
        )
    files: dict[str, list[Mapping[str, Any]]] = {}
    for item in items:
        if "file" in item:
            files.setdefault(item["file"], []).append(item)
    for name, those in files.items():
        number = positions.numbers.get(name)
        if number is None:
            raise StorageError(f"{name} is no longer there", hint=_AGAIN)
        if those[0]["version"] == positions.work.made.versions[number]:
            continue
        lines = {each["line"] for each in those if "line" in each}
        if those[0]["healthy"] is None or digest(number, lines) != those[0]["healthy"]:
            more = ", and not only the lines that could not be read" if lines else ": its rows may be others now"
            raise StorageError(f"{name} has changed since it was scored{more}", hint=_AGAIN)
        before, now = those[0].get("records"), positions.records(number)
        if before not in (None, now):  # a quote was closed, or opened
            raise StorageError(
                f"{name} has changed since it was scored: it has {now:,} rows now, of which a line that could not be "
                f"read hid some, as it had {before:,}",
                hint=_AGAIN,
            )
