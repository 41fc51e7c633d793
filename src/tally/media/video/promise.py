"""How many bytes a video's own header says that it has: what was cut off has fewer, whatever its duration says."""

from __future__ import annotations

from collections.abc import Callable

Reader = Callable[[int, int], bytes]
"""At most so many bytes of the file from a position on: ``read(start, length)``."""

_HEAD = 4096
_EBML, _SEGMENT = bytes.fromhex("1A45DFA3"), bytes.fromhex("18538067")
_ASF_FILE = bytes.fromhex("A1DCAB8C47A9CF118EE400C00C205365")
_ASF_BROADCAST = 1


def promised(format_name: str, read: Reader) -> int | None:
    """The bytes that the header of an AVI, a Matroska or an ASF (WMV) file promises; None if it does not say.

    format_name: FFmpeg's. A live recording does not say, nor does one whose writer did not come to an end.
    """
    for name, find in (("avi", _riff), ("matroska", _matroska), ("asf", _asf)):
        if name in format_name.split(","):
            return find(read)
    return None


def _riff(read: Reader) -> int | None:
    """Large AVI files consist of several of them: https://learn.microsoft.com/windows/win32/directshow/avi-riff-file-reference"""
    end = 0
    while (head := read(end, 8))[:4] == b"RIFF" and (size := int.from_bytes(head[4:8], "little")):
        end += 8 + size + size % 2
    return end or None


def _matroska(read: Reader) -> int | None:
    """The end of the segment: https://www.rfc-editor.org/rfc/rfc8794#section-4"""
    head = read(0, _HEAD)
    at = 0
    for name in (_EBML, _SEGMENT):
        at += 4
        if head[at - 4 : at] != name or at >= len(head) or not head[at]:
            return None
        length = 9 - head[at].bit_length()
        unknown = (1 << 7 * length) - 1
        size = int.from_bytes(head[at : at + length], "big") & unknown
        if size == unknown:
            return None
        at += length + size
    return at


def _asf(read: Reader) -> int | None:
    """The file size among the file's properties: ASF specification, section 3.2."""
    head = read(0, _HEAD)
    at = head.find(_ASF_FILE)
    found = head[at : at + 104]
    if at < 0 or len(found) < 104 or found[88] & _ASF_BROADCAST:
        return None
    return int.from_bytes(found[40:48], "little") or None
