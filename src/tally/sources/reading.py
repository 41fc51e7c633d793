"""Reading files ahead of scoring, in a few threads that a worker keeps for its life."""

from __future__ import annotations

import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, overload

from tally.errors import ItemError, SourceNotFoundError, StorageAwayError, TallyError, error_line
from tally.scorers.base import Input, Item, Scorer
from tally.scorers.run import prepare
from tally.sources.base import Batch, Timings
from tally.sources.locations import Location
from tally.storage import Store, file_name, temporary

LOCAL_THREADS = 2
REMOTE_THREADS = 16

AHEAD = 2
"""Batches that are read ahead of the one being scored. Of small batches, as many items per thread."""

AHEAD_BYTES = 256 * 2**20
"""Bytes of prepared values that may wait. The batch that is asked for is read in any case."""

WORTH_LOOKING = 5e-4
"""Seconds. Files whose paths are handed out are looked at if a scorer takes longer for one: looking, when the file is
planned and before and after it is scored, costs 2 % of that, and a scorer that is faster has hardly opened it."""

_RUN_ITEMS = 32
"""The most items that a thread takes at once. Handing over one by one costs more than reading small files."""


class Reader(ABC):
    """Reads, decodes and prepares the items of one chunk; called from several threads."""

    def __init__(self, keys: Sequence[str], scorer: Scorer) -> None:
        self.keys = keys
        self.closed = False
        self._scorer = scorer
        self._folder: Path | None = None

    @abstractmethod
    def fetch(self, position: int) -> Any:
        """What the scorer's ``input`` says of the item at a position (of pictures, the file's content). Raises
        ItemError; StorageAwayError."""

    @abstractmethod
    def open(self) -> None:
        """Make ready what :meth:`fetch` needs."""

    def run(self, start: int, stop: int) -> tuple[list[Any], float, float, int]:
        """Values (or the ItemError) of a run of positions, seconds of reading and of decoding, bytes held."""
        values: list[Any] = []
        reading = decoding = 0.0
        held = 0
        for position in range(start, stop):
            if self.closed:
                break
            began = time.perf_counter()
            try:
                value: Any = self.fetch(position)
                read = time.perf_counter()
                value = prepare(self._scorer, self.item(position, value))
            except ItemError as error:
                value = error.bare()
                read = time.perf_counter()
            values.append(value)
            held += _weight(value)
            reading += read - began
            decoding += time.perf_counter() - read
        return values, reading, decoding, held

    def item(self, position: int, value: Any) -> Item:
        """What the scorer is given of what was fetched. Raises ItemError."""
        return Item(self.keys[position], value)

    def settle(self, batch: Batch) -> None:
        """The consumer is done with a batch: check that files that it was given the paths of are what they were, and
        remove downloads. Raises SourceChangedError."""
        if self._folder is not None:
            for position in range(batch.start, batch.stop):
                shutil.rmtree(Path(self._folder, str(position)), ignore_errors=True)

    def close(self) -> None:
        if self._folder is not None:
            temporary.remove(self._folder)

    def handed(self, position: int, content: bytes) -> bytes | Path:
        """Content that was read, as the scorer wants it: itself, or a file that :meth:`settle` removes."""
        if self._folder is None:
            return content
        target = self._target(position, self.keys[position])
        target.write_bytes(content)
        return target

    def _target(self, position: int, name: str) -> Path:
        """Where an item is downloaded to, under a name of its own."""
        assert self._folder is not None
        target = Path(self._folder, str(position), file_name(name))
        target.parent.mkdir()
        return target


class FileReader(Reader):
    """Reads files of one store."""

    def __init__(
        self,
        location: Location,
        store: Store,
        names: Sequence[str],
        keys: Sequence[str],
        marks: Sequence[str],
        input: Input,  # noqa: A002
        scorer: Scorer,
    ) -> None:
        super().__init__(keys, scorer)
        self._location, self._store, self._names, self._marks = location, store, names, marks
        self._input = input

    def open(self) -> None:
        """Make the folder for downloads, if remote files are given as paths. :meth:`close` removes it."""
        if self._input == "path" and not self._store.is_local:
            self._folder = temporary.make("items")

    def fetch(self, position: int) -> Any:
        """See :meth:`Reader.fetch`."""
        name, mark = self._names[position], self._marks[position]
        try:
            if self._store.is_local and not mark:
                mark = self._store.marked(name)[1]  # it may be written at this moment
            if self._input != "path":
                return self._store.read(name, mark=mark)
            if self._folder is None:
                return self._store.local_path(name, mark=mark)
            target = self._target(position, name)
            self._store.download(name, target, mark=mark)
            return target
        except StorageAwayError:
            raise
        except TallyError as error:
            self._location.check_root()
            raise ItemError(error.message, stage="read", hint=error.hint) from None
        except Exception as error:
            raise ItemError(error_line(error), stage="read") from None

    def settle(self, batch: Batch) -> None:
        """See :meth:`Reader.settle`."""
        if self._input == "path" and self._folder is None:
            check_after(self._location, self._store, self._names, self._marks, batch.positions)
        super().settle(batch)


_Run = tuple[int, int, "Future[tuple[list[Any], float, float, int]]"]


def read_ahead(reader: Reader, size: int, threads: int, timings: Timings) -> Iterator[Batch]:
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
        """Start the runs that the batch ending at ``stop`` needs, and those that may be read ahead."""
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
            batch = collect(window)
            yield batch
            reader.settle(batch)
    finally:
        # Runs that have not begun are cancelled; the others end with their current item.
        reader.closed = True
        for _, _, run in runs:
            run.cancel()
        wait([run for _, _, run in runs])
        reader.close()


_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def _pool(threads: int) -> ThreadPoolExecutor:
    """This process's threads for reading, kept so that small chunks do not pay for starting them."""
    key = (os.getpid(), threads)
    with _pools_lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(threads, thread_name_prefix="tally-read")
        return _pools[key]


class _Paths(Sequence[Path]):
    """Paths, made when they are asked for: making a Path costs more than the rest of the work on such an item."""

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


def read_paths(
    location: Location, store: Store, names: Sequence[str], keys: list[str], marks: Sequence[str] | None, size: int
) -> Iterator[Batch]:
    """Batches of paths of this machine. marks: those that the files must have, before and after they are scored."""
    for start in range(0, len(names), size):
        stop = min(start + size, len(names))
        positions = list(range(start, stop))
        if marks is None:
            yield Batch(start, stop, keys[start:stop], _Paths(location.within, names[start:stop]), positions)
            continue
        dead: list[tuple[int, ItemError]] = []
        for position in positions:
            try:
                store.check_mark(names[position], marks[position])
            except TallyError as error:
                location.check_root()
                dead.append((position, ItemError(error.message, stage="read", hint=error.hint)))
        if dead:
            failed = {position for position, _ in dead}
            positions = [position for position in positions if position not in failed]
        paths = _Paths(location.within, [names[position] for position in positions])
        began = time.perf_counter()
        yield Batch(start, stop, [keys[position] for position in positions], paths, positions, dead=dead)
        if time.perf_counter() - began >= WORTH_LOOKING * len(positions):
            check_after(location, store, names, marks, positions)


def check_after(
    location: Location, store: Store, names: Sequence[str], marks: Sequence[str], positions: Sequence[int]
) -> None:
    """Check that files whose paths were handed out are still what they were. Raises SourceChangedError."""
    for position in positions:
        try:
            store.check_mark(names[position], marks[position])
        except SourceNotFoundError:  # what was read of it before was right; else, the scorer has failed on it
            location.check_root()


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
