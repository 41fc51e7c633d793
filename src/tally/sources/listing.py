"""The files of one or more locations, in a stable order, each once."""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, Literal, Self

from tally.errors import SourceNotFoundError, SpecError
from tally.media import images
from tally.sources.base import Source
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
from tally.sources.tables.packed import PACKED
from tally.storage import Entry, Page, Store, changed, is_url, key_of, name_from_json, name_to_json, open_store

Kind = Literal["image", "video", "table", "archive"]

VIDEOS = frozenset(
    {".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".avi", ".flv", ".f4v", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg"}
    | {".m2v", ".vob", ".3gp", ".3g2", ".wmv", ".asf", ".ogv", ".mxf", ".mjpeg", ".y4m", ".h264", ".hevc", ".ivf"}
)
"""File name suffixes of videos, lower case, with the dot."""

ANIMATIONS = frozenset({".gif", ".apng", ".webp"})
"""File name suffixes of pictures that can be videos, if videos are asked for."""

_ANIMATED = frozenset({".gif", ".apng"})
"""Those of them that a folder gives as videos: they hardly ever are still."""

ARCHIVES = frozenset({".tar", ".tar.gz", ".tgz", ".tar.zst", ".zip"})
"""File name suffixes of archives whose members can be items."""

_COUNTED_SUFFIXES = 1000
_LOOKED_AT = 100_000
"""Names of a bucket, at most, that are looked at to find where it can be cut."""
_KEPT = 65_536
_BEGINNINGS = 8
"""Beginnings of names for each part, at least, so that no part has much more than another."""
_PROBES = 4096
_LAST = "\U0010ffff"

_COVER = re.compile(
    r"(?:cover|folder|front|poster|thumb|thumbnail|album(?:art)?|artwork|fanart|preview)\b", re.IGNORECASE
)
"""What the name of a picture begins with that media libraries put beside a video."""


def is_video(name: str) -> bool:
    """Whether a file is a video, judged by its name."""
    return _suffix(name) in VIDEOS


def is_animation(name: str) -> bool:
    """Whether a file may be an animation, judged by its name: such a picture is a video if videos are asked for."""
    return _suffix(name) in ANIMATIONS


def is_table(name: str) -> bool:
    """Whether a file is a table, judged by its name."""
    return _suffix(name) in TABLES


def is_archive(name: str) -> bool:
    """Whether a file is an archive whose members can be items, judged by its name."""
    return _suffix(name) in ARCHIVES


def is_image(name: str) -> bool:
    """Whether a file is a picture, judged by its name."""
    return _suffix(name) in images.suffixes()


def _is_cover(name: str) -> bool:
    return _COVER.match(name.rpartition("/")[2]) is not None


@dataclass(frozen=True)
class Listing:
    """The files at ``uris``. Small and picklable; immutable except for the count of files passed over.

    kind: what folders give, judged by the file's suffix; None: every file. Single files and globs give all.
    without: a folder or file, absolute or a URL, that is never taken, even if it lies within the locations.
    sizes: whether entries carry their size, and the mark of their content.
    several_pictures: that one look has told that a folder has more pictures than covers.
    between: names that are greater than the first and not greater than the second; None: from the first, to the last.
    """

    uris: tuple[str, ...]
    locations: tuple[Location, ...] = field(repr=False)
    kind: Kind | None = None
    without: str | None = None
    sizes: bool = True
    several_pictures: bool = field(default=False, repr=False, compare=False)
    between: tuple[str | None, str | None] = (None, None)
    passed: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        uris: Sequence[str],
        kind: Kind | None = None,
        *,
        without: str | None = None,
        sizes: bool = True,
        missing: bool = False,
    ) -> Listing:
        """The listing of the files at ``uris``: folders, files and globs, paths or URLs.

        missing: one of several files may not be there: reading it will say so.
        Raises SourceNotFoundError if one of the locations is missing or gives nothing, StorageError if it cannot be
        read.
        """
        if not uris:
            raise SpecError("no source is given", hint="name a folder, a file or a glob")
        uris = (uris,) if isinstance(uris, str) else tuple(map(os.fspath, uris))
        listing = cls(uris, locate(uris, missing=missing), kind, without, sizes)
        several = False
        for location in listing.locations:
            passed: Counter[str] = Counter()
            if location.names:
                continue
            first = list(islice(chain.from_iterable(listing._pages(location, None, passed)), 2))
            if not first:
                raise nothing(location, passed, kind)
            several = several or (len(first) > 1 and not all(_is_cover(each.name) for each in first))
        return replace(listing, several_pictures=kind == "image" and several)

    @property
    def local(self) -> bool:
        """Whether all files are on this machine."""
        return all(not is_url(location.root) for location in self.locations)

    @property
    def is_part(self) -> bool:
        """Whether it is cut from another: then there may be nothing in it."""
        return self.between != (None, None)

    def entries(self, index: int, after: str | None = None) -> Iterator[Entry]:
        """The files of one location beyond the name ``after``, without those that an earlier location holds too."""
        return chain.from_iterable(self.pages(index, after))

    def pages(self, index: int, after: str | None = None) -> Iterator[Page]:
        """The same as :meth:`entries`, many at once; no page is empty."""
        location = self.locations[index]
        pages = self._pages(location, after, self.passed)
        earlier = [
            (other.within, self._taker(other))
            for other in self.locations[:index]
            if other.within.startswith(location.within) or location.within.startswith(other.within)
        ]
        if not earlier:
            return pages

        def is_new(name: str) -> bool:
            whole = location.within + name
            return not any(whole.startswith(within) and takes(whole[len(within) :]) for within, takes in earlier)

        return filter(len, (page.where(map(is_new, page.names)) for page in pages))

    def remaining(self, cursor: str | None) -> Iterator[tuple[int, Entry, int]]:
        """The files from a cursor on, each with its location's index and how many of its items are planned already.

        Raises SourceChangedError if the file that was being planned is not what it was.
        """
        began, last = 0, None
        if cursor is not None:
            began, packed, skip, mark = json.loads(cursor)
            last = name_from_json(packed)
            store = open_store(self.locations[began].root)
            size, now = store.marked(last)
            if now != mark:
                raise changed(f"{store.url}/{last}", mark, now)
            yield began, Entry(last, size, mark), skip
        for index in range(began, len(self.locations)):
            for entry in self.entries(index, last if index == began else None):
                yield index, entry, 0

    @staticmethod
    def cursor(index: int, entry: Entry, planned: int) -> str:
        """For :meth:`remaining`: so many items of this file, of the location with this index, are planned."""
        return json.dumps([index, name_to_json(entry.name), planned, entry.mark])

    def several(self) -> bool:
        """Whether there is more than one file."""
        found = chain.from_iterable(self.entries(index) for index in range(len(self.locations)))
        return len(list(islice(found, 2))) > 1

    def cuts(self, count: int) -> list[str] | None:
        """See :meth:`tally.sources.base.Source.cuts`: between names of one location.

        All names are looked at, if they are not too many or on this machine. Of a bucket with more, the names are
        followed letter by letter until there are enough beginnings, which are taken for equally frequent.
        """
        if len(self.locations) > 1:
            return None
        location, store = self.locations[0], open_store(self.locations[0].root)
        kept: list[str] = []
        stride = 1
        pages = replace(self, sizes=False)._pages(location, None, Counter())
        for number, entry in enumerate(chain.from_iterable(pages)):
            if number == _LOOKED_AT and not store.is_local:
                if not store.seeks:
                    return None
                kept = [begin + _LAST for begin in _beginnings(store, _BEGINNINGS * count)]
                break
            if number % stride == 0:
                kept.append(entry.name)
                if len(kept) == _KEPT:
                    kept, stride = kept[::2], 2 * stride
        places = (len(kept) * number // count for number in range(1, count))
        return list(dict.fromkeys(kept[place - 1] for place in places if place and _is_plain(kept[place - 1])))

    def has_covers_only(self) -> bool:
        """Whether folders give one picture alone, or nothing but pictures that are named as covers, beside videos."""
        if (
            self.kind != "image"
            or self.several_pictures
            or any(location.names or location.pattern is not None for location in self.locations)
        ):
            return False
        passed: Counter[str] = Counter()
        others = count = 0
        for location in self.locations:
            for entry in chain.from_iterable(self._pages(location, None, passed)):
                count += 1
                others += not _is_cover(entry.name)
                if others and count > 1:
                    return False
        return not passed.keys().isdisjoint(VIDEOS)

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
        said = f"{files} passed over, not {self.kind}s by their name: {count_suffixes(self.passed)}; "
        if self.kind == "video" and images.suffixes() >= self.passed.keys():
            return said + "--media image scores pictures, and not the videos beside them"
        if self.kind == "image" and self.passed.keys() <= VIDEOS:
            return said + "--media video scores videos, and not the pictures beside them"
        return said + f"a glob such as '{key_of(folder).rstrip('/')}/**/*' takes them all"

    def _pages(self, location: Location, after: str | None, passed: Counter[str]) -> Iterator[Page]:
        """The location's files beyond ``after``, in order. Files of another kind are counted by suffix."""
        store = open_store(location.root)
        begin, end = self.between
        if begin is not None and (after is None or after < begin):
            after = begin
        if location.names:
            start = 0 if after is None else bisect_right(location.names, after)
            stop = None if end is None else bisect_right(location.names, end)
            for name in location.names[start:stop]:
                yield Page.of([_entry(store, name) if self.sizes else Entry(name, 0)])
            return
        location.check_root()
        takes = self._taker(location)
        enter = not_hidden if location.pattern is None else enters(location.pattern)
        own = not_the_output(location, self.without)
        if own is not None:
            enter = both(enter, own)
        listed = store.pages(after=after, enter=enter, sizes=self.sizes, marks=self.sizes)
        if end is not None:
            listed = _until(listed, end)
        if own is not None:
            listed = (page.where(map(own, page.names)) for page in listed)
        if location.pattern is not None:
            taken = (page.where(map(takes, page.names)) for page in listed)
        else:
            suffixes = self._suffixes()
            taken = (page if _all_of(page, suffixes) else page.where(_of(page, suffixes, passed)) for page in listed)
        yield from filter(len, taken)

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


def _all_of(page: Page, suffixes: frozenset[str] | None) -> bool:
    """Whether it is clear at a glance that none of the files is hidden or of another kind."""
    if "/." in "/" + "/".join(page.names):
        return False
    return suffixes is None or all(
        (suffix := name[name.rfind(".") :]) in suffixes and suffix not in PACKED for name in page.names
    )


def _of(page: Page, suffixes: frozenset[str] | None, passed: Counter[str]) -> Iterator[bool]:
    """Of each file whether it is taken. Those of another kind are counted by suffix."""
    for name in page.names:
        start = name.rfind("/") + 1
        if name.startswith(".", start):
            yield False
            continue
        if suffixes is not None:
            suffix = _suffix_from(name, start)
            if suffix not in suffixes:
                if len(passed) >= _COUNTED_SUFFIXES and suffix not in passed:
                    suffix = "others"
                passed[suffix] += 1
                yield False
                continue
        yield True


def _until(pages: Iterable[Page], end: str) -> Iterator[Page]:
    """Pages in order, without the names beyond ``end``."""
    for page in pages:
        if len(page) and page.names[-1] > end:
            yield page.where(name <= end for name in page.names)
            return
        yield page


class ListedSource(Source):
    """A source whose items, in the order of a listing, are files or what is in them."""

    listing: Listing

    def cuts(self, count: int) -> list[str] | None:
        """See :meth:`Source.cuts`. What is in few files is rather shared out item by item."""
        found = self.listing.cuts(count)
        return None if found is not None and len(found) < count - 1 and self.media in ("table", "archive") else found

    def between(self, after: str | None, until: str | None) -> Self:
        narrowed: dict[str, Any] = {"listing": replace(self.listing, between=(after, until))}
        return replace(self, **narrowed)  # type: ignore[type-var]  # every one of them is a dataclass


def _beginnings(store: Store, wanted: int) -> list[str]:
    """So many beginnings of the store's names, ascending, or more; fewer if that takes too many requests."""
    found, probes = [""], 0
    while len(found) < wanted and probes < _PROBES:
        longer: list[str] = []
        for begin in found:
            after = begin
            while (entry := next(iter(store.list(after=after or None)), None)) is not None:
                probes += 1
                begun = entry.name[: len(begin) + 1]
                if not begun.startswith(begin) or begun == begin:
                    break
                longer.append(begun)
                after = begun + _LAST
        if not longer:
            break
        found = longer
    return found


def _is_plain(name: str) -> bool:
    """Whether the name can be kept as text."""
    return key_of(name) is name


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
    if all(any(suffix in _suffixes_of(other) for other in _A if other != kind) for suffix in passed):
        hint = f"the model takes {kind}s: name a place with {kind}s, or choose a model for the files that are there"
    elif kind == "table":
        hint = "the names of tables end in .parquet, .csv, .tsv, .jsonl, .arrow ..."
    else:
        hint = f"To score all of them whatever their names, give a glob: '{root.rstrip('/')}/**/*'"
    return SourceNotFoundError(message, hint=hint)


_A: dict[Kind, str] = {"image": "an image", "video": "a video", "table": "a table", "archive": "an archive"}


def _suffixes_of(kind: Kind) -> frozenset[str]:
    if kind == "image":
        return images.suffixes()
    return {"video": VIDEOS | _ANIMATED, "table": frozenset(TABLES), "archive": ARCHIVES}[kind]


def _suffix(name: str) -> str:
    return _suffix_from(name, name.rfind("/") + 1)


def _suffix_from(name: str, start: int) -> str:
    """The suffix, in lower case, of a name whose last segment begins at ``start``; of a packed file, both suffixes."""
    dot = name.rfind(".")
    if dot <= start:
        return ""
    suffix = name[dot:].lower()
    if suffix in PACKED and (inner := name.rfind(".", start + 1, dot)) > start:
        both = name[inner:].lower()
        return both if suffix in (".gz", ".zst") or both in TABLES else suffix
    return suffix


def _entry(store: Store, name: str) -> Entry:
    try:
        return Entry(name, *store.marked(name))
    except OSError:
        return Entry(name, 0)  # reading it will say what is wrong
