"""The files of one or more locations, in a stable order, each once."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Literal

from tally.errors import SourceNotFoundError, SpecError
from tally.media import images
from tally.sources.locations import (
    Location,
    both,
    compile_glob,
    count_suffixes,
    enters,
    locate,
    not_hidden,
    not_the_output,
)
from tally.sources.tables.formats import SUFFIXES as TABLES
from tally.storage import Entry, Store, is_url, key_of, open_store

Kind = Literal["image", "video", "table"]

VIDEOS = frozenset(
    {".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".flv", ".f4v", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg"}
    | {".m2v", ".vob", ".3gp", ".3g2", ".wmv", ".asf", ".ogv", ".mxf", ".mjpeg", ".y4m", ".h264", ".hevc", ".ivf"}
)
"""File name suffixes of videos, lower case, with the dot."""

_COUNTED_SUFFIXES = 1000


def is_video(name: str) -> bool:
    """Whether a file is a video, judged by its name."""
    return _suffix(name) in VIDEOS


def is_table(name: str) -> bool:
    """Whether a file is a table, judged by its name."""
    return _suffix(name) in TABLES


def is_image(name: str) -> bool:
    """Whether a file is a picture, judged by its name."""
    return _suffix(name) in images.suffixes()


@dataclass(frozen=True)
class Listing:
    """The files at ``uris``. Small and picklable; immutable except for the count of files passed over.

    kind: what folders give, judged by the file's suffix; None: every file. Single files and globs give all.
    without: a folder or file, absolute or a URL, that is never taken, even if it lies within the locations.
    sizes: whether entries carry their size, and the mark of their content.
    """

    uris: tuple[str, ...]
    locations: tuple[Location, ...] = field(repr=False)
    kind: Kind | None = None
    without: str | None = None
    sizes: bool = True
    passed: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls, uris: Sequence[str], kind: Kind | None = None, *, without: str | None = None, sizes: bool = True
    ) -> Listing:
        """The listing of the files at ``uris``: folders, files and globs, paths or URLs.

        Raises SourceNotFoundError if one of the locations is missing or gives nothing, StorageError if it cannot be
        read.
        """
        if not uris:
            raise SpecError("no source is given", hint="name a folder, a file or a glob")
        uris = (uris,) if isinstance(uris, str) else tuple(map(os.fspath, uris))
        listing = cls(uris, locate(uris), kind, without, sizes)
        for location in listing.locations:
            passed: Counter[str] = Counter()
            if not location.names and next(listing._entries(location, None, passed), None) is None:
                raise nothing(location, passed, kind)
        return listing

    @property
    def local(self) -> bool:
        """Whether all files are on this machine."""
        return all(not is_url(location.root) for location in self.locations)

    def entries(self, index: int, after: str | None = None) -> Iterator[Entry]:
        """The files of one location beyond the name ``after``, without those that an earlier location holds too."""
        location = self.locations[index]
        entries = self._entries(location, after, self.passed)
        earlier = [
            (other.within, self._taker(other))
            for other in self.locations[:index]
            if other.within.startswith(location.within) or location.within.startswith(other.within)
        ]
        if not earlier:
            return entries
        return (
            entry
            for entry in entries
            if not any(
                (whole := location.within + entry.name).startswith(within) and takes(whole[len(within) :])
                for within, takes in earlier
            )
        )

    def several(self) -> bool:
        """Whether there is more than one file."""
        found = chain.from_iterable(self.entries(index) for index in range(len(self.locations)))
        return len(list(islice(found, 2))) > 1

    def remark(self) -> str | None:
        """One line about the files that were passed over."""
        total = sum(self.passed.values())
        if not total:
            return None
        folder = next(location.root for location in self.locations if not location.names and location.pattern is None)
        for uri in self.uris:
            if not is_url(uri) and os.path.abspath(uri) == folder:  # noqa: PTH100
                folder = uri
        files = "1 file" if total == 1 else f"{total:,} files"
        return (
            f"{files} passed over, not {self.kind}s by their name: {count_suffixes(self.passed)}; "
            f"a glob such as '{key_of(folder).rstrip('/')}/**/*' takes them all"
        )

    def _entries(self, location: Location, after: str | None, passed: Counter[str]) -> Iterator[Entry]:
        """The location's files beyond ``after``, in order. Files of another kind are counted by suffix."""
        store = open_store(location.root)
        if location.names:
            start = 0 if after is None else bisect_right(location.names, after)
            for name in location.names[start:]:
                yield _entry(store, name) if self.sizes else Entry(name, 0)
            return
        location.check_root()
        takes = self._taker(location)
        enter = not_hidden if location.pattern is None else enters(location.pattern)
        own = not_the_output(location, self.without)
        if own is not None:
            enter = both(enter, own)
        listed = store.list(after=after, enter=enter, sizes=self.sizes, marks=self.sizes)
        if own is not None:
            listed = (entry for entry in listed if own(entry.name))
        if location.pattern is not None:
            for entry in listed:
                if takes(entry.name):
                    yield entry
            return
        suffixes = self._suffixes()
        for entry in listed:
            name = entry.name
            start = name.rfind("/") + 1
            if name.startswith(".", start):
                continue
            if suffixes is not None:
                suffix = _suffix_from(name, start)
                if suffix not in suffixes:
                    if len(passed) >= _COUNTED_SUFFIXES and suffix not in passed:
                        suffix = "others"
                    passed[suffix] += 1
                    continue
            yield entry

    def _taker(self, location: Location) -> Callable[[str], bool]:
        """Tells whether the location gives the file of a name below its root."""
        if location.names:
            return frozenset(location.names).__contains__
        if location.pattern is not None:
            match = compile_glob(location.pattern).fullmatch
            return lambda name: match(name) is not None
        suffixes = self._suffixes()
        return lambda name: all(map(not_hidden, name.split("/"))) and (suffixes is None or _suffix(name) in suffixes)

    def _suffixes(self) -> frozenset[str] | None:
        return None if self.kind is None else _suffixes_of(self.kind)


def nothing(location: Location, passed: Counter[str], kind: Kind | None = None) -> SourceNotFoundError:
    """The error for a location that gives no file. passed: files of other kinds, counted by suffix."""
    root = key_of(location.root)
    if location.pattern is not None:
        hint = "'*' stays within one folder; '**' crosses folders, as in 'photos/**/*.jpg'"
        return SourceNotFoundError(
            f"no file matches {root.rstrip('/')}/{key_of(location.pattern)}",
            hint=None if "**" in location.pattern else hint,
        )
    if not passed or kind is None:
        return SourceNotFoundError(f"{root} holds no files to score", hint="hidden files are not taken")
    total, shown = sum(passed.values()), f"{_A[kind]} ({count_suffixes(passed)})"
    message = (
        f"the only file in {root} does not have the name of {shown}"
        if total == 1
        else f"none of the {total:,} files in {root} has the name of {shown}"
    )
    if kind == "table":
        hint = "the names of tables end in .parquet, .csv, .tsv, .jsonl, .arrow ..."
    elif all(any(suffix in _suffixes_of(other) for other in _A if other != kind) for suffix in passed):
        hint = f"name a place with {kind}s, or choose a model for the files that are there"
    else:
        hint = f"To score all of them whatever their names, give a glob: '{root.rstrip('/')}/**/*'"
    return SourceNotFoundError(message, hint=hint)


_A: dict[Kind, str] = {"image": "an image", "video": "a video", "table": "a table"}


def _suffixes_of(kind: Kind) -> frozenset[str]:
    return images.suffixes() if kind == "image" else VIDEOS if kind == "video" else frozenset(TABLES)


def _suffix(name: str) -> str:
    return _suffix_from(name, name.rfind("/") + 1)


def _suffix_from(name: str, start: int) -> str:
    """The suffix, in lower case, of a name whose last segment begins at ``start``; of a packed file, both suffixes."""
    dot = name.rfind(".")
    if dot <= start:
        return ""
    suffix = name[dot:].lower()
    if suffix == ".gz" and (inner := name.rfind(".", start + 1, dot)) > start:
        return name[inner:].lower()
    return suffix


def _entry(store: Store, name: str) -> Entry:
    try:
        return Entry(name, *store.marked(name))
    except OSError:
        return Entry(name, 0)  # reading it will say what is wrong
