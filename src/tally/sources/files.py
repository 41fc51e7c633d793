"""Items that are files: of folders, one by one, or by a glob; of this machine or of a bucket.

A chunk's payload is the list of its names, so that any worker reads exactly those files, whatever has been
added since.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tally.errors import SpecError
from tally.scorers.base import Input, Scorer
from tally.sources import images
from tally.sources.base import Batch, Chunk, ChunkLimit, Source, Timings
from tally.sources.places import (
    Place,
    both,
    compile_glob,
    count_suffixes,
    enters,
    locate,
    not_hidden,
    not_the_output,
    nothing,
)
from tally.sources.reading import AHEAD, LOCAL_THREADS, REMOTE_THREADS, Reader, read_ahead, read_paths
from tally.storage import Entry, LocalStore, Store, is_url, key_of, open_store

_COMBINE = 4096
_COUNTED_SUFFIXES = 1000


@dataclass(frozen=True)
class FileSource(Source):
    """Files as images, bytes or paths. Make it with :meth:`describe`; small, immutable, picklable."""

    uris: tuple[str, ...]
    input: Input
    places: tuple[Place, ...] = field(repr=False)
    without: str | None = None
    _passed: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

    @classmethod
    def describe(
        cls,
        uris: Sequence[str],
        input: Input,  # noqa: A002  # the scorer's word
        *,
        without: str | None = None,
    ) -> FileSource:
        """The source of all files at ``uris``: folders, files and globs, paths or URLs.

        without: a folder or file, absolute or a URL, that is never taken, though it may lie within the places:
        the job's own output.

        ``*`` and ``?`` stay within a folder, ``**`` crosses folders, and none of them matches a hidden
        name. For images, a folder gives the files with a picture's suffix; files and globs give all.
        A file that several of the places hold is taken once. Keys are paths relative to the folder, to
        the part of the glob before its first wildcard, or to the common folder of several places.

        Raises SourceNotFoundError when one of the places is not there or gives nothing, StorageError
        when it cannot be read, SpecError when files cannot be given as ``input``.
        """
        if input not in ("image", "bytes", "path"):
            raise SpecError(f"files can be scored as image, bytes or path, not as {input}")
        if not uris:
            raise SpecError("no source is given", hint="name a folder, a file or a glob")
        uris = (uris,) if isinstance(uris, str) else tuple(map(os.fspath, uris))
        source = cls(uris, input, locate(uris), without)
        for place in source.places:
            passed: Counter[str] = Counter()
            if not place.names and next(source._entries(place, None, passed), None) is None:
                raise nothing(place, passed)
        return source

    def plan(self, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        self._passed.clear()
        began, last = (0, None) if after is None else _parse_cursor(after)
        found = after is not None
        for index in range(began, len(self.places)):
            entries = self._fresh(index, last if index == began else None)
            names: list[str] = []
            total = 0
            bound: ChunkLimit | None = None
            for name, size in entries:
                if bound is None:
                    bound = limit()
                if names and total + size > bound.bytes:
                    yield _chunk(index, first, names)
                    first += len(names)
                    names, total = [], 0
                    bound = limit()
                names.append(name)
                total += size
                if len(names) >= bound.items:
                    yield _chunk(index, first, names)
                    first += len(names)
                    names, total, bound = [], 0, None
                found = True
            if names:
                yield _chunk(index, first, names)
                first += len(names)
        if not found:
            raise nothing(self.places[0], self._passed)

    def _fresh(self, index: int, after: str | None) -> Iterator[Entry]:
        """A place's entries without those that an earlier place holds too."""
        place = self.places[index]
        entries = self._entries(place, after, self._passed)
        earlier = [
            (other.within, self._taker(other))
            for other in self.places[:index]
            if other.within.startswith(place.within) or place.within.startswith(other.within)
        ]
        if not earlier:
            return entries
        return (
            entry
            for entry in entries
            if not any(
                (whole := place.within + entry.name).startswith(within) and takes(whole[len(within) :])
                for within, takes in earlier
            )
        )

    def _entries(self, place: Place, after: str | None, passed: Counter[str]) -> Iterator[Entry]:
        """The place's files beyond ``after``, in order; counts by suffix those that are no pictures by name."""
        store = open_store(place.root)
        sizes = self.input != "path"
        if place.names:
            start = 0 if after is None else bisect_right(place.names, after)
            known = sizes and isinstance(store, LocalStore)
            for name in place.names[start:]:
                yield Entry(name, _size(store, name) if known else 0)
            return
        takes = self._taker(place)
        enter = not_hidden if place.pattern is None else enters(place.pattern)
        own = not_the_output(place, self.without)
        if own is not None:
            enter = both(enter, own)
        listed = store.list(after=after, enter=enter, sizes=sizes)
        if own is not None:
            listed = (entry for entry in listed if own(entry.name))
        if place.pattern is not None:
            for entry in listed:
                if takes(entry.name):
                    yield entry
            return
        suffixes = images.suffixes() if self.input == "image" else None
        for entry in listed:
            name = entry.name
            start = name.rfind("/") + 1
            if name[start] == ".":
                continue
            if suffixes is not None:
                dot = name.rfind(".")
                suffix = name[dot:].lower() if dot > start else ""
                if suffix not in suffixes:
                    if len(passed) >= _COUNTED_SUFFIXES and suffix not in passed:
                        suffix = "others"
                    passed[suffix] += 1
                    continue
            yield entry

    def _taker(self, place: Place) -> Callable[[str], bool]:
        """Tells of a name below the place's root whether the place gives it."""
        if place.names:
            return frozenset(place.names).__contains__
        if place.pattern is not None:
            match = compile_glob(place.pattern).fullmatch
            return lambda name: match(name) is not None
        suffixes = images.suffixes() if self.input == "image" else None
        return lambda name: (
            not any(part.startswith(".") for part in name.split("/"))
            and (suffixes is None or os.path.splitext(name)[1].lower() in suffixes)  # noqa: PTH122
        )

    def ahead(self, batch_size: int) -> int:
        local = all(not is_url(place.root) for place in self.places)
        return AHEAD * max(batch_size, LOCAL_THREADS if local else REMOTE_THREADS)

    def keys(self, chunk: Chunk) -> list[str]:
        return _keys(self.places[chunk.payload["place"]].prefix, _unpack(chunk.payload["names"]))

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        names = chunk.payload["names"][start:stop]
        return Chunk(chunk.first + start, len(names), {**chunk.payload, "names": names}, chunk.cursor)

    def combine(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        combined: list[Chunk] = []
        for chunk in chunks:
            before = combined[-1] if combined else None
            if (
                before is not None
                and before.payload["place"] == chunk.payload["place"]
                and before.count + chunk.count <= _COMBINE
            ):
                names = before.payload["names"] + chunk.payload["names"]
                combined[-1] = Chunk(before.first, len(names), {**before.payload, "names": names}, chunk.cursor)
            else:
                combined.append(chunk)
        return combined

    def remark(self) -> str | None:
        total = sum(self._passed.values())
        if not total:
            return None
        folder = next(place.root for place in self.places if not place.names and place.pattern is None)
        for uri in self.uris:
            if not is_url(uri) and os.path.abspath(uri) == folder:  # noqa: PTH100
                folder = uri
        files = "1 file" if total == 1 else f"{total:,} files"
        return (
            f"{files} passed over, not images by their name: {count_suffixes(self._passed)}; "
            f"a glob such as '{key_of(folder).rstrip('/')}/**/*' takes them all"
        )

    def read(self, chunk: Chunk, scorer: Scorer, timings: Timings) -> Iterator[Batch]:
        place = self.places[chunk.payload["place"]]
        names = _unpack(chunk.payload["names"])
        keys = _keys(place.prefix, names)
        store = open_store(place.root)
        local = isinstance(store, LocalStore)
        if self.input == "path" and local and type(scorer).prepare is Scorer.prepare:
            return read_paths(place.within, names, keys, scorer.batch_size)
        reader = Reader(store, names, keys, self.input, scorer)
        return read_ahead(reader, scorer.batch_size, LOCAL_THREADS if local else REMOTE_THREADS, timings)


def _chunk(index: int, first: int, names: list[str]) -> Chunk:
    packed = _pack(names)
    return Chunk(first, len(names), {"place": index, "names": packed}, json.dumps([index, packed[-1]]))


def _parse_cursor(cursor: str) -> tuple[int, str]:
    index, name = json.loads(cursor)
    return index, _unpack([name])[0]


def _pack(names: list[str]) -> list[Any]:
    """Names as JSON that every database takes: one that is not valid UTF-8 becomes its bytes in hexadecimal."""
    if _valid(names):
        return names
    return [name if key_of(name) is name else {"bytes": os.fsencode(name).hex()} for name in names]


def _unpack(packed: list[Any]) -> list[str]:
    if all(type(name) is str for name in packed):
        return packed
    return [name if isinstance(name, str) else os.fsdecode(bytes.fromhex(name["bytes"])) for name in packed]


def _keys(prefix: str, names: list[str]) -> list[str]:
    if not _valid(names):
        names = [key_of(name) for name in names]
    return [prefix + name for name in names] if prefix else names


def _valid(names: list[str]) -> bool:
    whole = "".join(names)
    return key_of(whole) is whole


def _size(store: Store, name: str) -> int:
    try:
        return store.size(name)
    except OSError:
        return 0  # reading it will say what is wrong
