"""Names that come in any order, and are wanted sorted: of a folder with millions of files, in little memory.

Each run of names is sorted and compressed. The runs are merged a block at a time, which takes from each run what is not
beyond the first block's end and sorts that: it is sorted in pieces already, and Python's sort makes use of that.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator

RUN = 2**18
"""Names that are kept as they are, until there are so many; below that, nothing is compressed."""
_BLOCK = 2**12
_SEPARATOR = "\0"
"""In no name of any file system."""


class SortedNames:
    """Names, which :meth:`blocks` gives back in the order of their characters, once."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    def add(self, names: list[str]) -> None:
        """Add names, at most :data:`RUN` of them; the list is sorted, and not to be used any more."""
        if not names:
            return
        names.sort()
        if self._runs:
            self._runs[-1].pack()
        self._runs.append(_Run(names))

    def blocks(self) -> Iterator[list[str]]:
        """All names, as sorted lists that follow each other."""
        runs, self._runs = self._runs, []
        while len(runs) > 1:
            end = min(run.block[-1] for run in runs)
            merged: list[str] = []
            for run in runs:
                merged += run.until(end)
            merged.sort()
            yield merged
            runs = [run for run in runs if run.block]
        for run in runs:
            while run.block:
                yield run.until(run.block[-1])


class _Run:
    """Sorted names. block: those that come next; empty once there are no more."""

    def __init__(self, names: list[str]) -> None:
        self.block, self._at = names, 0
        self._packed: deque[bytes] = deque()

    def pack(self) -> None:
        """Keep the names compressed from now on."""
        names = self.block
        for at in range(0, len(names), _BLOCK):
            text = _SEPARATOR.join(names[at : at + _BLOCK])
            self._packed.append(zlib.compress(text.encode("utf-8", "surrogatepass"), 1))
        self._next()

    def until(self, end: str) -> list[str]:
        """Take the names of the block up to this one."""
        begin, self._at = self._at, bisect_right(self.block, end, self._at)
        taken = self.block[begin : self._at]
        if self._at == len(self.block):
            self._next()
        return taken

    def _next(self) -> None:
        self.block, self._at = [], 0
        if self._packed:
            text = zlib.decompress(self._packed.popleft()).decode("utf-8", "surrogatepass")
            self.block = text.split(_SEPARATOR)
