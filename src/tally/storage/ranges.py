"""An object of a store as a file, read by ranges, and read ahead where reading goes in order."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

from tally.errors import StorageError
from tally.storage import Store, changed

BLOCK = 256 * 2**10
"""Bytes of a block: the least that is fetched, except at an object's end."""
_RUN = 16
"""The most blocks that one request fetches."""
_KEPT = 64
"""Blocks that are kept. Together with a run that is being fetched, a file takes at most 24 MiB."""
_SEEN = 8
"""Blocks that are kept though they were read: readers go back a little."""
_LINES = 4
"""Positions that reading alternates between: sound and pictures may lie apart."""


class Seekable(io.RawIOBase):
    """A readable file of ``size`` bytes, at position ``at``."""

    def __init__(self, size: int) -> None:
        self.size, self.at = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        self.at = max(0, base + offset)
        return self.at


class RangeFile(Seekable):
    """An object as a seekable file, for one thread.

    A block is fetched when it is read. While blocks are read in order, a thread fetches those that follow: a quarter
    as many as have been read in order so far. A reader that stops early has then caused little more than half as much
    again, and two blocks, to be fetched.

    known: size and mark of the content, from :meth:`Store.marked`; None asks for them.
    begun: :attr:`blocks` of another file of the same content.
    fetched: bytes that were waited for. jumps: how often reading went on at a new position.
    told: called with :attr:`fetched` after each request that was waited for.
    Reading raises StorageError if the store fails, or the content has changed since the beginning.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        known: tuple[int, str] | None = None,
        begun: Mapping[int, bytes] | None = None,
        told: Callable[[int], None] | None = None,
    ) -> None:
        size, self.mark = store.marked(name) if known is None else known
        super().__init__(size)
        self.fetched = self.jumps = 0
        self._store, self._name, self._told = store, name, told
        self._count = -(-self.size // BLOCK)
        self._ready: OrderedDict[int, bytes] = OrderedDict()  # not read yet
        self._seen: OrderedDict[int, bytes] = OrderedDict(begun or {})
        self._lines: OrderedDict[int, int] = OrderedDict()  # the next block: how many were read in order before it
        self._ahead: _Fetch | None = None

    @property
    def blocks(self) -> dict[int, bytes]:
        """The blocks that are kept, by number."""
        return {**self._ready, **self._seen}

    def read(self, size: int | None = -1) -> bytes:
        """At most ``size`` bytes, fewer at the end of a block; -1: all that is left."""
        if size is None or size < 0:
            return self.readall()
        if not size or self.at >= self.size:
            return b""
        index, start = divmod(self.at, BLOCK)
        data = self._block(index)[start : start + size]
        self.at += len(data)
        return data

    def readall(self) -> bytes:
        """All that is left."""
        return b"".join(iter(lambda: self.read(BLOCK), b""))

    def close(self) -> None:
        """Close the file. Returns when nothing is being fetched any more."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.join()
        self._ready.clear()
        self._seen.clear()
        super().close()

    # -- blocks ------------------------------------------------------------------------------------

    def _block(self, index: int) -> bytes:
        read = self._follow(index)
        run = min(max(1, read // 4), _RUN)
        if not self._has(index) and self._ahead is not None and index in self._ahead.blocks:
            self._collect()
        if not self._has(index):
            fetch = self._fetch(index, run)
            fetch.run()
            self._keep(fetch)
        if index in self._ready:
            self._seen[index] = self._ready.pop(index)
        self._seen.move_to_end(index)
        if read > 1:
            self._go_ahead(index, run)
        return self._seen[index]

    def _has(self, index: int) -> bool:
        return index in self._seen or index in self._ready

    def _follow(self, index: int) -> int:
        """How many blocks have been read in order up to this one."""
        if index + 1 not in self._lines:
            self.jumps += index not in self._lines
            self._lines[index + 1] = self._lines.pop(index, 0) + 1
            if len(self._lines) > _LINES:
                self._lines.popitem(last=False)
        self._lines.move_to_end(index + 1)
        return self._lines[index + 1]

    def _go_ahead(self, index: int, run: int) -> None:
        """Fetch the blocks that follow in a thread, unless there are enough."""
        if self._ahead is not None:
            if self._ahead.is_alive():
                return
            self._collect()
        begin = index + 1
        while self._has(begin):
            begin += 1
        if begin < self._count and begin - index <= max(1, run // 2):
            self._ahead = self._fetch(begin, run)
            self._ahead.start()

    def _collect(self) -> None:
        """Take over what the thread fetched. A failure does not count yet: those blocks are asked for again."""
        ahead, self._ahead = self._ahead, None
        assert ahead is not None
        ahead.join()
        if ahead.error is None:
            self._keep(ahead)

    def _fetch(self, index: int, run: int) -> _Fetch:
        stop = min(index + run, self._count)
        coming = self._ahead.blocks if self._ahead is not None else ()
        stop = next((each for each in range(index + 1, stop) if self._has(each) or each in coming), stop)
        return _Fetch(range(index, stop), self._read_range)

    def _keep(self, fetch: _Fetch) -> None:
        if fetch.error is not None:
            raise fetch.error
        for position, index in enumerate(fetch.blocks):
            self._ready[index] = fetch.data[position * BLOCK : (position + 1) * BLOCK]
        while len(self._ready) + len(self._seen) > _KEPT:
            (self._seen if len(self._seen) > _SEEN else self._ready).popitem(last=False)
        self.fetched += len(fetch.data)
        if self._told is not None:
            self._told(self.fetched)

    def _read_range(self, blocks: range) -> bytes:
        start = blocks.start * BLOCK
        length = min(blocks.stop * BLOCK, self.size) - start
        try:
            data = self._store.read_range(self._name, start, length, mark=self.mark)
        except StorageError as error:
            # If an object has become shorter, each store says in its own words that there is no such range.
            said = error.message.lower()
            if ("range" in said or "changed" in said) and self._store.marked(self._name) != (self.size, self.mark):
                raise self._changed() from None
            raise
        if len(data) != length:
            raise self._changed()
        return data

    def _changed(self) -> StorageError:
        return changed(f"{self._store.url}/{self._name}")


class _Fetch(threading.Thread):
    """One request. Started, it runs in a thread of its own; :meth:`run` runs it here."""

    def __init__(self, blocks: range, read: Callable[[range], bytes]) -> None:
        super().__init__(name="tally-range", daemon=True)
        self.blocks, self.data = blocks, b""
        self.error: StorageError | None = None
        self._read = read

    def run(self) -> None:
        try:
            self.data = self._read(self.blocks)
        except StorageError as error:
            self.error = error
        except Exception as error:
            self.error = StorageError(f"reading failed: {type(error).__name__}: {error}")
