"""Keys of rows, built as columns: a chunk may hold millions of them."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tally.arrays import array_of, numbers_of, scalar_of, texts_of
from tally.sources.tables.ingest import BAD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tally.sources.tables.work_files import WorkFiles

_LOWER = 4
"""The last digits of a number, which are looked up. Those before them are the same for ten thousand keys in a row."""
_DIGITS = np.frombuffer("".join(f"{n:04d}" for n in range(10**_LOWER)).encode(), np.uint8).reshape(-1, _LOWER)


def numbered(name: str, start: int, count: int) -> pa.StringArray:
    """``<name>#<number>`` of ``count`` rows from ``start`` on, which counts from 0; numbers count from 1."""
    parts = []
    first, stop = start + 1, start + 1 + count
    while first < stop:
        # Numbers of one length make keys of one length: a matrix of characters.
        digits = len(str(first))
        last = min(stop, 10**digits)
        parts.append(_matrix(f"{name}#", first, last, digits))
        first = last
    if len(parts) == 1:
        return parts[0]
    return pa.concat_arrays(parts) if parts else pa.array([], pa.string())


def _matrix(prefix: str, first: int, last: int, digits: int) -> pa.StringArray:
    """The keys of the numbers ``first <= number < last``, all of ``digits`` digits."""
    pattern = _pattern(prefix, digits)
    cells = np.empty((last - first, pattern.shape[1]), np.uint8)
    upper = slice(pattern.shape[1] - digits, pattern.shape[1] - _LOWER)
    number = first
    while number < last:
        block, within = divmod(number, 10**_LOWER)
        stop = min(last, (block + 1) * 10**_LOWER)
        rows = cells[number - first : stop - first]
        rows[:] = pattern[within : within + len(rows)]
        if digits > _LOWER:
            rows[:, upper] = np.frombuffer(str(block).encode(), np.uint8)
        number = stop
    return _strings(cells)


@lru_cache(maxsize=8)
def _pattern(prefix: str, digits: int) -> np.ndarray[Any, Any]:
    """The characters of keys of one length, for all values of the number's last digits."""
    start = np.frombuffer(prefix.encode(), np.uint8)
    cells = np.empty((10**_LOWER, len(start) + digits), np.uint8)
    cells[:, : len(start)] = start
    lower = min(_LOWER, digits)
    cells[:, -lower:] = _DIGITS[:, _LOWER - lower :]
    return cells


def _strings(cells: np.ndarray[Any, Any]) -> pa.StringArray:
    """A matrix of characters, at most 2 GiB, as strings, one per row."""
    rows, width = cells.shape
    if rows * width >= 2**31:
        half = rows // 2
        return pa.chunked_array([_strings(cells[:half]), _strings(cells[half:])]).cast(pa.string()).combine_chunks()
    ends = np.arange(0, (rows + 1) * width, width, dtype=np.int32)
    return pa.StringArray.from_buffers(rows, pa.py_buffer(ends), pa.py_buffer(cells))


def plain_text(column: pa.ChunkedArray | pa.Array) -> pa.StringArray:
    """The column's values as text."""
    found = column.cast(pa.string())
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def joined(columns: Sequence[pa.ChunkedArray | pa.Array]) -> pa.StringArray:
    """The columns' values as text, joined by ``/``; a slash within a text is written ``%2F``."""
    texts = [_text(column) for column in columns]
    found = texts[0] if len(texts) == 1 else pc.binary_join_element_wise(*texts, scalar_of("/"))
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def _text(column: Any) -> Any:
    text = column.cast(pa.string())
    if not pa.types.is_string(column.type):
        return text.fill_null(scalar_of("null"))
    text = pc.replace_substring(pc.replace_substring(text, "%", "%25"), "/", "%2F")
    return text.fill_null(scalar_of("null"))


def times(column: Any, window: int) -> Any:
    """Times in ISO 8601. window: microseconds; whole seconds need no fraction."""
    zoned = column.type.tz is not None
    unit = "us" if window % 1_000_000 else "s"
    text = pc.replace_substring(column.cast(pa.timestamp("us")).cast(pa.timestamp(unit)).cast(pa.string()), " ", "T")
    return pc.binary_join_element_wise(text, scalar_of("Z"), scalar_of("")) if zoned else text


class Rows:
    """Keys of rows by their position in the input. Lines that could not be read count, too."""

    def __init__(self, work: WorkFiles) -> None:
        self._files, self._work = work.made.files, work

    @cached_property
    def _starts(self) -> np.ndarray[Any, Any]:
        return np.cumsum([0, *(rows for _, rows in self._files)], dtype=np.int64)

    @cached_property
    def _lost(self) -> dict[int, np.ndarray[Any, Any]]:
        """For each file with lines that could not be read: how many good rows come before each of them."""
        if not self._work.made.bad:
            return {}
        with self._work.parquet(BAD) as file:
            table = file.read(["file", "before"])
        files, before = (numbers_of(table[name]) for name in ("file", "before"))
        return {int(number): before[files == number] for number in np.unique(files)}

    def of_file(self, file: int, start: int, count: int) -> pa.StringArray:
        """The keys of consecutive rows of a file."""
        if file not in self._lost:
            return numbered(self._files[file][0], start, count)
        return self._of(np.full(count, file), np.arange(start, start + count, dtype=np.int64))

    def at(self, positions: np.ndarray[Any, Any]) -> pa.StringArray:
        """The keys of rows anywhere in the input. positions: ``int64[n]``, counted from 0 over all files."""
        files = np.searchsorted(self._starts, positions, "right") - 1
        return self._of(files, positions - self._starts[files])

    def _of(self, files: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> pa.StringArray:
        numbers = rows + 1
        for file, lost in self._lost.items():
            of = files == file
            numbers[of] += np.searchsorted(lost, rows[of], "right")
        texts = array_of(numbers).cast(pa.string())
        first = files[0] if len(files) else 0
        if (files == first).all():
            return pc.binary_join_element_wise(scalar_of(f"{self._files[first][0]}#"), texts, scalar_of(""))
        known, which = np.unique(files, return_inverse=True)
        names = texts_of([f"{self._files[file][0]}#" for file in known])
        return pc.binary_join_element_wise(names.take(array_of(which)), texts, scalar_of(""))
