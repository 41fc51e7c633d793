"""Bodies that come compressed: ``Content-Encoding`` gzip and deflate."""

from __future__ import annotations

import zlib

ENCODINGS = ("gzip", "x-gzip", "deflate")
_GZIP, _ZLIB, _RAW = 31, 15, -15
"""How zlib is told what to expect."""


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
        while True:
            part, body = _member(body, _GZIP, limit)
            parts.append(part)
            limit -= len(part)
            body = body.lstrip(b"\0")  # with which tools fill up blocks
            if not body:
                return parts[0] if len(parts) == 1 else b"".join(parts)
    try:
        found, rest = _member(body, _ZLIB, limit)
    except TooLargeError:
        raise
    except ValueError as error:
        try:
            found, rest = _member(body, _RAW, limit)
        except TooLargeError:
            raise
        except ValueError:
            raise error from None
    if rest:
        raise ValueError(f"{len(rest):,} bytes follow its end")
    return found


def _member(body: bytes, form: int, limit: int) -> tuple[bytes, bytes]:
    """What one compressed stream holds, and what follows it."""
    stream = zlib.decompressobj(form)
    try:
        found = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(found) > limit:
        raise TooLargeError(f"more than {limit:,} bytes come out of it")
    if not stream.eof:
        raise ValueError("it ends too early")
    return found, stream.unused_data
