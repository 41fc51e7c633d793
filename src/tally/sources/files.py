"""Items that are files: of folders, single ones, or by a glob, on this machine or in a bucket.

A chunk's payload lists the names of its files, so that any worker reads exactly those; and the marks that they had, so
that it reads what was planned. A file that has changed since is a dead item.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any, ClassVar

from tally.errors import SpecError
from tally.scorers.base import Input, Scorer
from tally.sources.base import Batch, Chunk, ChunkLimit, Timings
from tally.sources.listing import Kind, ListedSource, Listing, nothing
from tally.sources.locations import Location
from tally.sources.reading import (
    AHEAD,
    LOCAL_THREADS,
    REMOTE_THREADS,
    WORTH_LOOKING,
    FileReader,
    read_ahead,
    read_paths,
)
from tally.storage import Store, key_of, name_from_json, name_to_json, open_store

_COMBINE = 4096


@dataclass(frozen=True)
class FileSource(ListedSource):
    """Files as images, bytes or paths. Make it with :meth:`describe`; small, immutable, picklable."""

    accepts: ClassVar = frozenset[Input]({"image", "bytes", "path"})

    listing: Listing
    input: Input

    @classmethod
    def describe(
        cls,
        uris: Sequence[str],
        input: Input,  # noqa: A002  # the scorer's word
        *,
        without: str | None = None,
    ) -> FileSource:
        """The source of all files at ``uris``: folders, files and globs, paths or URLs.

        without: a folder or file, absolute or a URL, that is never taken, even if it lies within the locations:
        the job's own output.

        ``*`` and ``?`` stay within a folder, ``**`` crosses folders, and none of them matches a hidden
        name. For images, a folder gives the files with a picture's suffix; files and globs give all.
        A file that several of the locations hold is taken once. Keys are paths relative to the folder, to
        the part of the glob before its first wildcard, or to the common folder of several locations.

        A missing path among several is an item that cannot be read.

        Raises SourceNotFoundError if the only location is missing, or one of them gives nothing, StorageError if it
        cannot be read, SpecError if files cannot be given as ``input``.
        """
        if input not in cls.accepts:
            raise SpecError(f"files can be scored as image, bytes or path, not as {input}")
        kind: Kind | None = "image" if input == "image" else None
        return cls(Listing.of(uris, kind, without=without, sizes=input != "path", missing=True), input)

    @property
    def locations(self) -> tuple[Location, ...]:
        """Where the files are. A chunk's payload names its location by index."""
        return self.listing.locations

    def plan(self, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        self.listing.passed.clear()
        began, last = (0, None) if after is None else _parse_cursor(after)
        found = after is not None
        for index in range(began, len(self.locations)):
            store = open_store(self.locations[index].root)
            free = self.listing.sizes or not store.is_local  # marks come with the names
            names: list[str] = []
            marks: list[str] = []
            total = 0
            bound: ChunkLimit | None = None
            for page in self.listing.pages(index, last if index == began else None):
                found = True
                at = 0
                while at < len(page):
                    if bound is None:
                        bound = limit()
                    sizes = page.sizes[at : at + bound.items - len(names)]
                    stop = at + _fitting(sizes, bound.bytes - total, first=not names)
                    names += page.names[at:stop]
                    if free or bound.seconds >= WORTH_LOOKING:
                        known = zip(page.names[at:stop], page.marks[at:stop], strict=True)
                        marks += [mark or _mark_of(store, name) for name, mark in known]
                    total += sum(page.sizes[at:stop])
                    if stop < at + len(sizes) or len(names) >= bound.items:
                        yield _chunk(index, first, names, marks)
                        first += len(names)
                        names, marks, total, bound = [], [], 0, None
                    at = stop
            if names:
                yield _chunk(index, first, names, marks)
                first += len(names)
        if not (found or self.listing.is_part):
            raise nothing(self.locations[0], self.listing.passed, self.listing.kind)

    def ahead(self, batch_size: int) -> int:
        return AHEAD * max(batch_size, LOCAL_THREADS if self.listing.local else REMOTE_THREADS)

    def keys(self, chunk: Chunk) -> list[str]:
        return _keys(self.locations[chunk.payload["place"]].prefix, _unpack(chunk.payload["names"]))

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        payload = {**chunk.payload, "names": chunk.payload["names"][start:stop]}
        if "marks" in payload:
            payload["marks"] = payload["marks"][start:stop]
        return Chunk(chunk.first + start, len(payload["names"]), payload, chunk.cursor)

    def choose(self, chunk: Chunk, positions: Sequence[int]) -> list[Chunk]:
        """See :meth:`Source.choose`."""
        payload = dict(chunk.payload)
        for name in payload.keys() & {"names", "marks"}:
            payload[name] = [payload[name][at] for at in positions]
        return [Chunk(chunk.first + positions[0], len(positions), payload, chunk.cursor)]

    def combine(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """See :meth:`Source.combine`. Files are their own items: what is there by now is scored."""
        combined: list[Chunk] = []
        for chunk in chunks:
            before = combined[-1] if combined else None
            place, names = chunk.payload["place"], chunk.payload["names"]
            first = chunk.first
            if before is not None and before.payload["place"] == place and before.count + chunk.count <= _COMBINE:
                first, names = before.first, before.payload["names"] + names
                combined.pop()
            combined.append(Chunk(first, len(names), {"place": place, "names": names}, chunk.cursor))
        return combined

    def unmarked(self, chunk: Chunk) -> Chunk:
        """See :meth:`Source.unmarked`."""
        payload = {name: value for name, value in chunk.payload.items() if name != "marks"}
        return Chunk(chunk.first, chunk.count, payload, chunk.cursor)

    def several(self) -> bool:
        return self.listing.several()

    def remark(self) -> str | None:
        return self.listing.remark()

    def read(self, chunk: Chunk, scorer: Scorer, timings: Timings) -> Iterator[Batch]:
        location = self.locations[chunk.payload["place"]]
        names = _unpack(chunk.payload["names"])
        keys = _keys(location.prefix, names)
        store = open_store(location.root)
        marks = chunk.payload.get("marks")  # not of jobs of earlier versions
        local = store.is_local
        if self.input == "path" and local and type(scorer).prepare is Scorer.prepare:
            return read_paths(location, store, names, keys, marks, scorer.batch_size)
        reader = FileReader(location, store, names, keys, marks or [""] * len(names), self.input, scorer)
        return read_ahead(reader, scorer.batch_size, LOCAL_THREADS if local else REMOTE_THREADS, timings)


def _chunk(index: int, first: int, names: list[str], marks: list[str]) -> Chunk:
    """marks: of all of the names, or empty."""
    packed = _pack(names)
    payload: dict[str, Any] = {"place": index, "names": packed}
    if marks:
        payload["marks"] = marks
    return Chunk(first, len(names), payload, json.dumps([index, packed[-1]]))


def _fitting(sizes: Sequence[int], room: int, *, first: bool) -> int:
    """How many files of these sizes fit into the room of a chunk, in bytes; at least one if it is the chunk's first."""
    if sum(sizes) <= room:
        return len(sizes)
    return max(sum(1 for _ in takewhile(room.__ge__, accumulate(sizes))), int(first))


def _mark_of(store: Store, name: str) -> str:
    """The mark of a file that was listed without; empty if it cannot be looked at: reading it will say why."""
    try:
        return store.marked(name)[1]
    except OSError:
        return ""


def _parse_cursor(cursor: str) -> tuple[int, str]:
    index, name = json.loads(cursor)
    return index, _unpack([name])[0]


def _pack(names: list[str]) -> list[Any]:
    """Names as JSON; see :func:`name_to_json`."""
    if _valid(names):
        return names
    return [name_to_json(name) for name in names]


def _unpack(packed: list[Any]) -> list[str]:
    if all(type(name) is str for name in packed):
        return packed
    return [name_from_json(name) for name in packed]


def _keys(prefix: str, names: list[str]) -> list[str]:
    if not _valid(names):
        names = [key_of(name) for name in names]
    return [prefix + name for name in names] if prefix else names


def _valid(names: list[str]) -> bool:
    whole = "".join(names)
    return key_of(whole) is whole
