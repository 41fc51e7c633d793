"""A part of a source: a first try, a sample, a share of the whole.

Which items belong to a sample or a share is said by the hashes of their keys: it is the same in every job, on every
machine, and an item that is added moves no other.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b

from tally.errors import SourceNotFoundError
from tally.sources.base import Chunk, ChunkLimit, Source

_WHOLE = 2**64
_MOST_AT_ONCE = 64
"""A chunk is chosen from so many times as many items, at most, as it may hold."""


@dataclass(frozen=True)
class Selection:
    """limit: so many items, the first. sample: about this share of all, or so many of them. shard: (i, n): the i-th of
    n shares, from 1 on. Of a sample, shards are parts; the limit is that of the job. may_be_empty: no item need be
    chosen."""

    limit: int | None = None
    sample: float | int | None = None
    shard: tuple[int, int] | None = None
    may_be_empty: bool = False

    def __bool__(self) -> bool:
        return (self.limit, self.sample, self.shard) != (None, None, None)

    def plan(self, source: Source, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        """As :meth:`Source.plan`, of the chosen items. The cursor says after which of the source's own, and how many
        items that are chosen there are planned already."""
        begin, passed, below = (None, 0, None) if after is None else json.loads(after)
        if below is None:
            below = self._below(source)
        found = after is not None
        bound = limit()
        once = self._at_once()

        def wider() -> ChunkLimit:
            items = min(bound.items * once, max(source.chunk_items, bound.items))
            return ChunkLimit(items, bound.bytes * once, bound.seconds)

        for chunk in source.plan(begin, 0, wider):
            positions = self._chosen(source, chunk, below)[passed:]
            if self.limit is not None:
                positions = positions[: self.limit - first]
            while positions:
                taken, positions = positions[: bound.items], positions[bound.items :]
                for part in source.choose(chunk, taken):
                    found = True
                    passed += part.count
                    last = not positions and part.count == len(taken)
                    taken = taken[part.count :]
                    cursor = [chunk.cursor, 0, below] if last else [begin, passed, below]
                    yield replace(part, first=first, cursor=json.dumps(cursor))
                    first += part.count
                bound = limit()
            if self.limit is not None and first >= self.limit:
                return
            begin, passed = chunk.cursor, 0
        if not (found or self.may_be_empty):
            raise SourceNotFoundError(f"nothing to score: none of the items is in {self}")

    def __str__(self) -> str:
        sample = f"{self.sample:.6%}".rstrip("0").rstrip(".") if isinstance(self.sample, float) else self.sample
        said = [
            f"the sample of {sample}" if self.sample is not None else "",
            "the shard {}/{}".format(*self.shard) if self.shard else "",
        ]
        return " and ".join(filter(None, said)) or f"the first {self.limit}"

    def _at_once(self) -> int:
        share = (1.0 if not isinstance(self.sample, float) else self.sample) / (self.shard[1] if self.shard else 1)
        return max(1, min(_MOST_AT_ONCE, round(1 / share)))

    def _below(self, source: Source) -> int:
        """The hash below which items belong to the sample."""
        if self.sample is None:
            return _WHOLE
        if isinstance(self.sample, float):
            return round(self.sample * _WHOLE)
        hashes = (
            _hash(key, b"sample")
            for chunk in source.plan(None, 0, lambda: ChunkLimit(source.chunk_items, 1 << 50))
            for key in source.keys(chunk)
        )
        lowest = heapq.nsmallest(self.sample + 1, hashes)
        return lowest[-1] if len(lowest) > self.sample else _WHOLE

    def _chosen(self, source: Source, chunk: Chunk, below: int) -> list[int]:
        """The positions of the chunk's items that are chosen, but for the limit."""
        if self.sample is None and self.shard is None:
            return list(range(chunk.count))
        keys = source.keys(chunk)
        chosen: list[int] = []
        for position, key in enumerate(keys):
            if below < _WHOLE and _hash(key, b"sample") >= below:
                continue
            if self.shard is not None and _hash(key, b"shard") % self.shard[1] != self.shard[0] - 1:
                continue
            chosen.append(position)
        return chosen


def _hash(key: str, purpose: bytes) -> int:
    """purpose: what shards are made by says nothing of samples."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8, person=purpose).digest(), "little")
