"""A source and a sink for Tally, of a package of its own: lines of a text file as items, rows with rounded numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tally.errors import SourceNotFoundError, SpecError
from tally.sinks.base import OutputDescription, Writer
from tally.sinks.layout import OutputLayout
from tally.sinks.rows import RowsSink
from tally.sources.base import Chunk, Source
from tally.sources.values import read_values


class LinesSource(Source):
    """``lines:///notes.txt``: each line of the file is an item, of bytes, whose key is its number."""

    accepts = frozenset({"bytes"})

    def __init__(self, request):
        if len(request.uris) > 1:
            raise SpecError(f"lines:// takes one file, not {len(request.uris)}")
        self.path = request.uris[0].removeprefix("lines://")

    def plan(self, after, first, limit):
        total, start = len(self._lines()), int(after or 0)
        if not total:
            raise SourceNotFoundError(f"{self.path} holds no lines")
        while start < total:
            stop = min(start + limit().items, total)
            yield Chunk(start, stop - start, {"start": start, "stop": stop}, cursor=str(stop))
            start = stop

    def read(self, chunk, scorer, timings):
        lines = self._lines()[chunk.payload["start"] : chunk.payload["stop"]]
        return read_values(self.keys(chunk), lines.__getitem__, scorer, timings)

    def keys(self, chunk):
        return [f"line-{number + 1}" for number in range(chunk.payload["start"], chunk.payload["stop"])]

    def slice(self, chunk, start, stop):
        begin = chunk.payload["start"]
        return Chunk(chunk.first + start, stop - start, {"start": begin + start, "stop": begin + stop}, chunk.cursor)

    def _lines(self):
        try:
            return Path(self.path).read_bytes().splitlines()
        except OSError as error:
            raise SourceNotFoundError(f"{self.path} cannot be read: {error.strerror}") from None


class RoundedSink(RowsSink):
    """``rounded:///folder``: rows as Parquet, their numbers with three digits after the point."""

    def __init__(self, description: OutputDescription):
        folder = description.place.removeprefix("rounded://")
        super().__init__(OutputLayout(folder), "parquet", description.columns, description.order)

    def describe(self):
        described = super().describe()
        return replace(described, place=f"rounded://{described.place}")

    def open(self, attempt, chunk):
        return RoundedWriter(super().open(attempt, chunk))


class RoundedWriter(Writer):
    def __init__(self, rows):
        self._rows = rows

    def add(self, keys, results, info=None):
        return self._rows.add(keys, [_rounded(result) for result in results], info)

    def close(self):
        return self._rows.close()

    def abort(self):
        self._rows.abort()


def _rounded(result):
    if isinstance(result, list):
        return [_rounded(row) for row in result]
    if not isinstance(result, dict):
        return result
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in result.items()}
