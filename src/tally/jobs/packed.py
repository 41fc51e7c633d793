"""Chunks as they are stored and sent: small, and unpacked by who needs what is in them, which is mostly a worker."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tally.sources.base import Chunk

_COMPRESSED_FROM = 1024
"""Bytes from which a chunk's payload is compressed; for less, that takes longer than it is worth."""


@dataclass(frozen=True, slots=True)
class PackedChunk:
    """A chunk without a cursor, whose payload is packed. Pickled, it arrives as the :class:`Chunk` that it is."""

    first: int
    count: int
    payload: bytes

    def unpacked(self) -> Chunk:
        text = self.payload if self.payload[:1] == b"{" else zlib.decompress(self.payload)
        return Chunk(self.first, self.count, json.loads(text))

    def __reduce__(self) -> tuple[Callable[..., Chunk], tuple[Any, ...]]:
        return _unpack, (self.first, self.count, self.payload)


def pack(chunk: Chunk) -> bytes:
    """A chunk's payload as stored."""
    text = as_json(chunk.payload)
    return zlib.compress(text, 1) if len(text) >= _COMPRESSED_FROM else text


def _unpack(first: int, count: int, payload: bytes) -> Chunk:
    return PackedChunk(first, count, payload).unpacked()


def as_json(value: Any) -> bytes:
    """Compact JSON, in a fraction of the time that Python's own takes."""
    from pydantic_core import to_json  # takes time, and workers need none of it

    try:
        return to_json(value)
    except ValueError:  # half of a surrogate pair, which is no UTF-8, but JSON's escape of it is
        return json.dumps(value, separators=(",", ":")).encode("ascii")
