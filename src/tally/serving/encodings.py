"""Bodies that come compressed: ``Content-Encoding`` gzip and deflate."""

from __future__ import annotations

import re
import zlib

ENCODINGS = ("gzip", "x-gzip", "deflate")
_GZIP, _ZLIB, _RAW = 31, 15, -15
"""How zlib is told what to expect."""
_PADDING = re.compile(rb"\0+")
MEMBERS = 1 << 14
"""Members that a gzip body may have: a GiB as block compressors cut it."""
_PIECES = 1 << 10, 1 << 20
"""Bytes that are given to zlib at once, first and at most. It copies what follows a member within a piece, so that many
small members of a large body would otherwise take time with the square of its size."""


class TooLargeError(ValueError):
    """More than may be comes out of it."""


def decoded(body: bytes, encoding: str, limit: int) -> bytes:
    """What was compressed. encoding: one of :data:`ENCODINGS`. limit: bytes that it may have.

    Of gzip, several members may follow each other; deflate is zlib's form (RFC 1950), and also the bare one (RFC 1951)
    that some clients send. Never makes more than ``limit`` bytes and one. Raises ValueError for what is damaged or ends
    too early, TooLargeError.
    """
    if encoding != "deflate":
        parts: list[bytes] = []
        at = 0
        while True:
            if len(parts) == MEMBERS:
                raise ValueError(f"it has more than {MEMBERS:,} members")
            part, at = _member(body, at, _GZIP, limit)
            parts.append(part)
            limit -= len(part)
            if (padding := _PADDING.match(body, at)) is not None:  # with which tools fill up blocks
                at = padding.end()
            if at == len(body):
                return parts[0] if len(parts) == 1 else b"".join(parts)
    try:
        found, end = _member(body, 0, _ZLIB, limit)
    except TooLargeError:
        raise
    except ValueError as error:
        try:
            found, end = _member(body, 0, _RAW, limit)
        except TooLargeError:
            raise
        except ValueError:
            raise error from None
    if end < len(body):
        raise ValueError(f"{len(body) - end:,} bytes follow its end")
    return found


def _member(body: bytes, at: int, form: int, limit: int) -> tuple[bytes, int]:
    """What the compressed stream that begins at ``at`` holds, and where it ends."""
    stream = zlib.decompressobj(form)
    parts: list[bytes] = []
    size = 0
    piece, most = _PIECES
    with memoryview(body) as view:
        while not stream.eof and at < len(body):
            given = view[at : at + piece]
            at += len(given)
            piece = min(2 * piece, most)
            try:
                found = stream.decompress(given, limit + 1 - size)
            except zlib.error as error:
                raise ValueError(str(error)) from None
            size += len(found)
            if size > limit:
                raise TooLargeError(f"more than {limit:,} bytes come out of it")
            parts.append(found)
    if not stream.eof:
        raise ValueError("it ends too early")
    return parts[0] if len(parts) == 1 else b"".join(parts), at - len(stream.unused_data)
