"""How many frames GIF and APNG promise: FFmpeg reads both, and takes one that is cut off for a short one."""

from __future__ import annotations

from tally.media.video.promise import Reader

FORMATS = frozenset({"gif", "apng"})
"""FFmpeg's names of the formats whose frames change what the frame before has shown."""
_TRAILER = b";"
_SIGNATURE = 8


def cut(format_name: str, read: Reader, size: int) -> str | None:
    """Why a GIF counts as cut off: its last byte is not the one that ends each GIF. None if it does not."""
    if format_name != "gif" or read(max(0, size - 16), min(16, size)).rstrip(b"\0").endswith(_TRAILER):
        return None
    return "the mark at the end of the file is missing: it is cut off"


def listed(format_name: str, read: Reader) -> int | None:
    """How many frames the header of an APNG lists. None for other files."""
    if format_name != "apng":
        return None
    at = _SIGNATURE
    while len(head := read(at, 12)) == 12 and head[4:8] != b"IDAT":
        if head[4:8] == b"acTL":
            return int.from_bytes(head[8:12], "big")
        at += 12 + int.from_bytes(head[:4], "big")
    return None
