"""Which pictures an AVI still has, if bytes are missing in it.

Its packets carry no times: a picture's number is how many are stored before it. FFmpeg reads on behind a gap and counts
on, too low. The index at the file's end tells each packet's place, and so its number, also where all that follows the
gap has moved. Without an index, nothing behind the gap can be numbered.
https://learn.microsoft.com/windows/win32/directshow/avi-riff-file-reference
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tally.media.video.promise import Reader

CHUNK_HEADER = 8
"""Bytes before the packet: what it is, and its length."""
_LIST_HEADER = 12
_ENTRY = 16
_BLOCK = 2**20
_KNOWN = re.compile(rb"\d\d(dc|db|wb|pc|tx|sb)|ix\d\d|JUNK|LIST|RIFF|idx1")


class Entry(NamedTuple):
    """A packet as an index tells it: where its chunk begins in the intact file, and its length."""

    at: int
    length: int


def moved_index(read: Reader, size: int, promised: int | None, stream: int) -> list[Entry]:
    """The index of a file from which bytes are missing before it: the packets of one stream. Empty if there is none.

    promised: how many bytes the file should have. stream: its number.
    """
    found = _movies(read)
    if promised is None or promised <= size or found is None:
        return []
    begin, end = found
    moved = end - (promised - size)
    if moved < begin or (head := read(moved, CHUNK_HEADER))[:4] != b"idx1":
        return []
    table = read(moved + CHUNK_HEADER, int.from_bytes(head[4:], "little"))
    rows = [table[at : at + _ENTRY] for at in range(0, len(table) - _ENTRY + 1, _ENTRY)]
    if not rows:
        return []
    # Places count from the beginning of the file, or from the word "movi".
    base = 0 if int.from_bytes(rows[0][8:12], "little") > begin else begin
    wanted = (b"%02ddc" % stream, b"%02ddb" % stream)
    return [
        Entry(base + int.from_bytes(row[8:12], "little"), int.from_bytes(row[12:], "little"))
        for row in rows
        if row[:4] in wanted
    ]


def ordinals(entries: Sequence[Entry], chunks: Sequence[Entry], missing: int) -> list[int | None]:
    """Which entry of the index each chunk is that was read, ascending; None: none for certain.

    chunks: those of the file as it is, in their order. missing: how many bytes there are too few.
    """
    places = {entry: number for number, entry in enumerate(entries)}
    found: list[int | None] = []
    next_one, moved = 0, 0
    for chunk in chunks:
        steps = (moved,) if moved == missing else (0, missing)
        fitting = {
            (number, step)
            for step in steps
            if (number := places.get(Entry(chunk.at + step, chunk.length), -1)) >= next_one
        }
        if len(fitting) != 1:
            found.append(None)
            continue
        [(number, moved)] = fitting
        next_one = number + 1
        found.append(number)
    return found


def intact_until(read: Reader, size: int) -> int:
    """Up to where packets may begin: where a chunk lies that another does not follow, or behind the last one that is
    begun. The last may reach beyond its end: the file is cut off, if nothing follows."""
    found = _movies(read)
    if found is None:
        return 0
    blocks = _Blocks(read)
    at, last = found[0] + 4, found[0]
    while at + CHUNK_HEADER <= size:
        head = blocks.read(at, CHUNK_HEADER)
        if not _KNOWN.fullmatch(head[:4]):
            return last
        length = int.from_bytes(head[4:], "little")
        last = at
        if head[:4] in (b"LIST", b"RIFF"):
            at += _LIST_HEADER
            continue
        at += CHUNK_HEADER + length
        # Writers do not always keep to even places.
        if length % 2 and not (at < size and _KNOWN.fullmatch(blocks.read(at, 4))):
            at += 1
    return last + 1


def _movies(read: Reader) -> tuple[int, int] | None:
    """Where the word "movi" stands, and where the list of packets ends."""
    for at, name, length in _chunks(read):
        if name == b"movi":
            return at + CHUNK_HEADER, at + CHUNK_HEADER + length + length % 2
    return None


def _chunks(read: Reader) -> Iterator[tuple[int, bytes, int]]:
    """The chunks and lists at the top of the first file: where, what, how long."""
    if read(0, 4) != b"RIFF":
        return
    at = _LIST_HEADER
    while len(head := read(at, _LIST_HEADER)) == _LIST_HEADER and _TOP.fullmatch(head[:4]):
        length = int.from_bytes(head[4:8], "little")
        yield at, head[8:] if head[:4] == b"LIST" else head[:4], length
        at += CHUNK_HEADER + length + length % 2


_TOP = re.compile(rb"[A-Za-z0-9_ ]{4}")


class _Blocks:
    """Small reads out of large ones."""

    def __init__(self, read: Reader) -> None:
        self._read, self._at, self._block = read, 0, b""

    def read(self, at: int, length: int) -> bytes:
        if not self._at <= at <= at + length <= self._at + len(self._block):
            self._at, self._block = at, self._read(at, _BLOCK)
        return self._block[at - self._at : at - self._at + length]
