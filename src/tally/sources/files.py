"""Items that are files: of folders, one by one, or by a glob; of this machine or of a bucket.

Reading runs ahead of scoring in a few threads that a worker keeps for its life. A chunk's payload is the
list of its names, so that any worker reads exactly those files, whatever has been added since.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, overload

from tally.errors import ItemError, SourceNotFoundError, SpecError, TallyError
from tally.scorers.base import Input, Item, Scorer
from tally.sources import images
from tally.sources.base import Batch, Chunk, ChunkLimit, Source, Timings
from tally.storage import (
    Entry,
    LocalStore,
    ObjectStore,
    Store,
    failure,
    file_name,
    is_url,
    key_of,
    local_of,
    open_store,
)

LOCAL_THREADS = 2
REMOTE_THREADS = 16

AHEAD = 2
"""Batches that are read ahead of the one being scored (or, of small batches, as many items per thread)."""

AHEAD_BYTES = 256 * 2**20
"""Prepared values that may wait; the batch being asked for is read in any case."""

_RUN_ITEMS = 32
"""Items that a thread takes at once, at most: handing over one by one costs more than reading small files."""

_COMBINE = 4096
_SHOWN_SUFFIXES = 5
_COUNTED_SUFFIXES = 1000


@dataclass(frozen=True, slots=True)
class Place:
    """One root to list, and which of its files are taken.

    root: an absolute path or URL. prefix: what keys begin with. names: exactly these, sorted; or
    pattern: a glob relative to the root; or neither: everything that is not hidden.
    """

    root: str
    prefix: str = ""
    names: tuple[str, ...] = ()
    pattern: str | None = None

    @property
    def within(self) -> str:
        """What the whole path of a file of this place begins with."""
        return self.root.rstrip("/") + "/"


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
        source = cls(uris, input, _with_prefixes(_merge_files([_locate(uri) for uri in uris])), without)
        for place in source.places:
            passed: Counter[str] = Counter()
            if not place.names and next(source._entries(place, None, passed), None) is None:
                raise _nothing(place, passed)
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
            raise _nothing(self.places[0], self._passed)

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
        enter = _not_hidden if place.pattern is None else _enters(place.pattern)
        own = _own(place, self.without)
        if own is not None:
            enter = _both(enter, own)
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
            match = _compile(place.pattern).fullmatch
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
            f"{files} passed over, not images by their name: {_tally_suffixes(self._passed)}; "
            f"a glob such as '{key_of(folder).rstrip('/')}/**/*' takes them all"
        )

    def read(self, chunk: Chunk, scorer: Scorer, timings: Timings) -> Iterator[Batch]:
        place = self.places[chunk.payload["place"]]
        names = _unpack(chunk.payload["names"])
        keys = _keys(place.prefix, names)
        store = open_store(place.root)
        local = isinstance(store, LocalStore)
        if self.input == "path" and local and type(scorer).prepare is Scorer.prepare:
            return _paths(place.within, names, keys, scorer.batch_size)
        reader = _Reader(store, names, keys, self.input, scorer)
        return _read_ahead(reader, scorer.batch_size, LOCAL_THREADS if local else REMOTE_THREADS, timings)


# Reading ---------------------------------------------------------------------------------------------


class _Reader:
    """Reads, decodes and prepares the items of one chunk; called from several threads."""

    def __init__(
        self,
        store: Store,
        names: Sequence[str],
        keys: Sequence[str],
        input: Input,  # noqa: A002
        scorer: Scorer,
    ) -> None:
        self.keys = keys
        self.closed = False
        self._store, self._names, self._input, self._scorer = store, names, input, scorer
        self._folder: str | None = None

    def open(self) -> None:
        """Make ready what :meth:`close` removes: remote files that are wanted as paths are downloaded."""
        if self._input == "path" and isinstance(self._store, ObjectStore):
            self._folder = tempfile.mkdtemp(prefix="tally-")

    def run(self, start: int, stop: int) -> tuple[list[Any], float, float, int]:
        """Values (or the ItemError) of a run of positions, seconds of reading and of decoding, bytes held."""
        values: list[Any] = []
        reading = decoding = 0.0
        held = 0
        for position in range(start, stop):
            if self.closed:
                break
            began = time.perf_counter()
            read = began
            try:
                value: Any = self._fetch(position)
                read = time.perf_counter()
                value = self._prepare(self.keys[position], value)
            except ItemError as error:
                value = error.bare()
                if error.stage == "read":
                    read = time.perf_counter()
            values.append(value)
            held += _weight(value)
            reading += read - began
            decoding += time.perf_counter() - read
        return values, reading, decoding, held

    def _fetch(self, position: int) -> Any:
        name = self._names[position]
        try:
            if self._input != "path":
                return self._store.read(name)
            if self._folder is None:
                return self._store.local_path(name)
            assert isinstance(self._store, ObjectStore)
            target = Path(self._folder, str(position), file_name(name))
            target.parent.mkdir()
            self._store.download(name, target)
            return target
        except TallyError as error:
            raise ItemError(error.message, stage="read", hint=error.hint) from None
        except Exception as error:
            raise ItemError(_told(error), stage="read") from None

    def _prepare(self, key: str, value: Any) -> Any:
        info: dict[str, Any] = {}
        if self._input == "image":
            value, info = images.decode(value, self._scorer.size)
        try:
            return self._scorer.prepare(Item(key, value, info))
        except TallyError as error:
            raise ItemError(error.message, stage="prepare", hint=error.hint) from None
        except Exception as error:
            raise ItemError(_told(error), stage="prepare") from None

    def forget(self, start: int, stop: int) -> None:
        """The consumer is done with these positions: downloaded files are removed."""
        if self._folder is not None:
            for position in range(start, stop):
                shutil.rmtree(Path(self._folder, str(position)), ignore_errors=True)

    def close(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


_Run = tuple[int, int, "Future[tuple[list[Any], float, float, int]]"]


def _read_ahead(reader: _Reader, size: int, threads: int, timings: Timings) -> Iterator[Batch]:
    """Batches in order, while threads work on the items that follow."""
    pool = _pool(threads)
    count = len(reader.keys)
    length = min(-(-size // threads), _RUN_ITEMS)
    bounds = (
        (start, min(start + length, window + size, count))
        for window in range(0, count, size)
        for start in range(window, min(window + size, count), length)
    )
    upcoming = next(bounds, None)
    runs: deque[_Run] = deque()
    measured = [0, 0]  # items, bytes

    def room() -> bool:
        """Whether one more run may be started ahead."""
        if not measured[0]:
            return False
        mean = measured[1] / measured[0]
        held = sum(run.result()[3] if run.done() else (stop - start) * mean for start, stop, run in runs)
        return held + length * mean <= AHEAD_BYTES

    def fill(stop: int) -> None:
        """Start what the batch that ends at ``stop`` needs, and what may be read ahead of it."""
        nonlocal upcoming
        horizon = stop + AHEAD * max(size, threads)
        while upcoming is not None and (upcoming[0] < stop or (upcoming[0] < horizon and room())):
            runs.append((*upcoming, pool.submit(reader.run, *upcoming)))
            upcoming = next(bounds, None)

    def collect(window: int) -> Batch:
        batch = Batch(window, min(window + size, count))
        at = window
        while at < batch.stop:
            fill(batch.stop)
            start, at, run = runs[0]
            values, reading, decoding, held = run.result()
            runs.popleft()
            measured[0] += at - start
            measured[1] += held
            timings.read += reading
            timings.decode += decoding
            for position, value in enumerate(values, start):
                if isinstance(value, ItemError):
                    batch.dead.append((position, value))
                else:
                    batch.keys.append(reader.keys[position])
                    batch.values.append(value)
                    batch.positions.append(position)
        fill(batch.stop)  # the consumer is about to be busy
        return batch

    try:
        reader.open()
        for window in range(0, count, size):
            yield collect(window)
            reader.forget(window, min(window + size, count))
    finally:
        # What has not begun never does; what runs ends with the item it is at.
        reader.closed = True
        for _, _, run in runs:
            run.cancel()
        wait([run for _, _, run in runs])
        reader.close()


_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def _pool(threads: int) -> ThreadPoolExecutor:
    """This process's threads for reading; kept, so that small chunks do not pay for starting them."""
    key = (os.getpid(), threads)
    with _pools_lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(threads, thread_name_prefix="tally-read")
        return _pools[key]


class _Paths(Sequence[Path]):
    """Paths made when asked for: a Path costs more than all else that is done for such an item."""

    __slots__ = ("_names", "_within")

    def __init__(self, within: str, names: Sequence[str]) -> None:
        self._within, self._names = within, names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | Sequence[Path]:
        if isinstance(index, slice):
            return _Paths(self._within, self._names[index])
        return Path(self._within + self._names[index])

    def __repr__(self) -> str:
        return repr(list(self))


def _paths(within: str, names: Sequence[str], keys: list[str], size: int) -> Iterator[Batch]:
    for start in range(0, len(names), size):
        stop = min(start + size, len(names))
        yield Batch(start, stop, keys[start:stop], _Paths(within, names[start:stop]), list(range(start, stop)))


def _weight(value: Any) -> int:
    """Bytes that a prepared value takes, roughly."""
    if isinstance(value, bytes | bytearray):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(map(_weight, value))
    if isinstance(value, dict):
        return sum(map(_weight, value.values()))
    size = getattr(value, "nbytes", 0)
    return size if isinstance(size, int) else 0


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# Names -----------------------------------------------------------------------------------------------


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


def _own(place: Place, without: str | None) -> Callable[[str], bool] | None:
    """Tells names that are not the output's; None where the output cannot be among the place's names.

    A merged output ``out.csv`` has its manifest, its dead items and its staging folder beside it, all of
    whose names begin with ``out.``.
    """
    if without is None or not without.startswith(place.within):
        return None
    name = without[len(place.within) :].rstrip("/")
    if without.endswith("/") or not _suffix(name):
        return lambda other: other != name and not other.startswith(name + "/")
    stem = name[: -len(_suffix(name))]
    beside = (f"{name}.", f"{stem}.dead.")
    return lambda other: other != name and not other.startswith(beside)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix


def _both(first: Callable[[str], bool], second: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda name: first(name) and second(name)


def _not_hidden(folder: str) -> bool:
    return folder[folder.rfind("/") + 1] != "."


# Places ----------------------------------------------------------------------------------------------

_MAGIC = re.compile(r"[*?\[]")


def _locate(uri: str) -> Place:
    """What a path or URL names. A name that exists is itself, even where it looks like a glob."""
    if is_url(uri) and not uri.lower().startswith("file://"):
        return _locate_remote(uri)
    given = local_of(uri) if is_url(uri) else os.path.expanduser(uri)  # noqa: PTH111
    if not given or "\0" in given:
        raise SpecError(f"{uri!r} names no file or folder")
    path = os.path.abspath(given)  # noqa: PTH100  # symbolic links stay as the user knows them
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        if Path(path).is_symlink():
            raise SourceNotFoundError(
                f"{key_of(path)} is a link to {key_of(os.fspath(Path(path).readlink()))}, which is not there"
            ) from None
        if not _MAGIC.search(given):
            raise _missing(path) from None
        root, pattern = _split(path)
        if not Path(root).is_dir():
            raise _missing(root) from None
        return Place(root, pattern=pattern)
    except OSError as error:
        raise failure("read", path, error) from None
    if stat.S_ISDIR(mode):
        return Place(path)
    if not stat.S_ISREG(mode):
        raise SourceNotFoundError(
            f"{key_of(path)} is neither a file nor a folder", hint="pipes and devices cannot be read twice"
        )
    folder, _, name = path.rpartition("/")
    return Place(folder or "/", names=(name,))


def _locate_remote(uri: str) -> Place:
    # Checks the kind of URL, and that it carries no secrets.
    open_store(uri)
    scheme, _, rest = uri.partition("://")
    bucket, _, name = rest.partition("/")
    bucket = f"{scheme.lower()}://{bucket}"
    whole = name.strip("/")
    if not whole:
        return Place(bucket)
    store = open_store(bucket)
    magic = _MAGIC.search(whole)
    if not magic and (name.endswith("/") or next(store.list(whole), None) is not None):
        return Place(f"{bucket}/{whole}")
    if store.exists(whole):
        folder, _, last = whole.rpartition("/")
        return Place(f"{bucket}/{folder}".rstrip("/"), names=(last,))
    if not magic:
        raise SourceNotFoundError(f"there is no object and no folder {uri}", hint="names of objects are case-sensitive")
    root, pattern = _split(whole)
    return Place(f"{bucket}/{root}".rstrip("/"), pattern=pattern)


def _split(path: str) -> tuple[str, str]:
    """A glob as the folders before its first wildcard, and the rest."""
    parts = path.split("/")
    cut = next(index for index, part in enumerate(parts) if _MAGIC.search(part))
    root = "/".join(parts[:cut])
    return root or ("/" if path.startswith("/") else ""), "/".join(parts[cut:])


def _missing(path: str) -> SourceNotFoundError:
    """Says how far the path exists, and what there is of a similar name."""
    parent, _, name = path.rpartition("/")
    while not Path(parent or "/").is_dir() and parent:
        parent, _, name = parent.rpartition("/")
    try:
        there = os.listdir(parent or "/")
    except OSError:
        there = []
    by_lower: dict[str, str] = {each.lower(): each for each in there}
    close = [by_lower[each] for each in difflib.get_close_matches(name.lower(), by_lower, n=3)]
    message = f"there is no file or folder {key_of(path)}"
    if close:
        shown = ", ".join(repr(f"{parent}/{each}") for each in map(key_of, close))
        return SourceNotFoundError(message, hint=f"did you mean {shown}?")
    if (f"{parent}/{name}") != path:
        return SourceNotFoundError(message, hint=f"{key_of(parent) or '/'} is there, but holds no {key_of(name)!r}")
    names = "1 name" if len(there) == 1 else f"{len(there):,} names"
    return SourceNotFoundError(message, hint=f"its folder {key_of(parent) or '/'} is there and holds {names}")


def _nothing(place: Place, passed: Counter[str]) -> SourceNotFoundError:
    root = key_of(place.root)
    if place.pattern is not None:
        hint = "'*' stays within one folder; '**' crosses folders, as in 'photos/**/*.jpg'"
        return SourceNotFoundError(
            f"no file matches {root.rstrip('/')}/{key_of(place.pattern)}", hint=None if "**" in place.pattern else hint
        )
    if passed:
        total = sum(passed.values())
        files = "1 file" if total == 1 else f"{total:,} files"
        return SourceNotFoundError(
            f"no image by its name among the {files} of {root} ({_tally_suffixes(passed)})",
            hint=f"a glob such as '{root.rstrip('/')}/**/*' takes them all",
        )
    return SourceNotFoundError(f"{root} holds no files to score", hint="hidden files are not taken")


def _tally_suffixes(passed: Counter[str]) -> str:
    most = passed.most_common(_SHOWN_SUFFIXES)
    shown = [
        f"{key_of(suffix)[:20] or 'without suffix'} {count:,}"
        for suffix, count in sorted(most, key=lambda each: (not each[0], each[0]))
    ]
    rest = sum(passed.values()) - sum(count for _, count in most)
    return ", ".join([*shown, f"others {rest:,}"] if rest else shown)


def _merge_files(places: list[Place]) -> list[Place]:
    """Neighbouring single files become one place: a shell expands ``*.jpg`` to thousands of them."""
    merged: list[Place] = []
    group: list[Place] = []
    for place in [*places, None]:
        if group and (place is None or not place.names or _anchor(place.root) != _anchor(group[0].root)):
            root = _common([each.root for each in group])
            cut = len(root.rstrip("/")) + 1
            names = {(each.within + name)[cut:] for each in group for name in each.names}
            merged.append(Place(root, names=tuple(sorted(names))))
            group = []
        if place is not None and place.names:
            group.append(place)
        elif place is not None and place not in merged:
            merged.append(place)
    return merged


def _with_prefixes(places: list[Place]) -> tuple[Place, ...]:
    """Keys of several places are relative to their common folder; with none in common, the place is in the key."""
    if len(places) == 1:
        return tuple(places)
    common = ""
    if len({_anchor(place.root) for place in places}) == 1:
        common = _common([place.root for place in places]).rstrip("/") + "/"
    return tuple(Place(place.root, key_of(place.within[len(common) :]), place.names, place.pattern) for place in places)


def _anchor(root: str) -> str:
    """What two places must share to have a common folder."""
    return "/".join(root.split("/")[:3]) if is_url(root) else "/"


def _common(roots: list[str]) -> str:
    """The deepest folder that holds all of the roots, of one anchor."""
    parts = [root.rstrip("/").split("/") for root in roots]
    shortest, longest = min(parts), max(parts)
    same = 0
    while same < min(len(shortest), len(longest)) and shortest[same] == longest[same]:
        same += 1
    return "/".join(shortest[:same]) or "/"


# Globs -----------------------------------------------------------------------------------------------


def _compile(pattern: str) -> re.Pattern[str]:
    """A glob, relative to its root, as a regular expression over whole names.

    ``**`` is any number of folders (as the last part: everything below), ``*`` and ``?`` stay within one
    part, ``[ab-c]`` and ``[!a]`` are sets. No wildcard matches a part's leading dot.
    """
    parts = pattern.split("/")
    out = ""
    for index, part in enumerate(parts):
        final = index == len(parts) - 1
        if part == "**":
            out += r"(?:[^/.][^/]*/)*" + (r"[^/.][^/]*" if final else "")
        else:
            out += ("" if part.startswith(".") else r"(?!\.)") + _compile_part(part) + ("" if final else "/")
    try:
        return re.compile(out, re.DOTALL)
    except re.error as error:
        raise SpecError(f"{key_of(pattern)!r} is not a glob: {error.msg}", hint="sets are written [a-z]") from None


def _compile_part(part: str) -> str:
    out = ""
    at = 0
    while at < len(part):
        char = part[at]
        at += 1
        if char == "*":
            out += "[^/]*" if not out.endswith("[^/]*") else ""
        elif char == "?":
            out += "[^/]"
        elif char == "[" and (end := part.find("]", at + 1 + (part[at : at + 1] == "!"))) > 0:
            inside = part[at:end]
            negated = inside.startswith("!")
            inside = re.sub(r"([\\\[\]^&~|])", r"\\\1", inside[1:] if negated else inside)
            out += f"(?!/)[{'^' if negated else ''}{inside}]"
            at = end + 1
        else:
            out += re.escape(char)
    return out


def _enters(pattern: str) -> Callable[[str], bool]:
    """Whether a folder can hold what the glob matches: by its depth, and by being hidden."""
    parts = pattern.split("/")
    depth = None if "**" in parts else len(parts)
    hidden = any(part.startswith(".") for part in parts)

    def enter(folder: str) -> bool:
        return (hidden or _not_hidden(folder)) and (depth is None or folder.count("/") + 1 < depth)

    return enter
