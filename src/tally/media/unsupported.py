"""Pictures that are intact, and that Pillow cannot read: what they are, by their beginning."""

from __future__ import annotations

from io import BytesIO
from typing import Any

# Where a signature stands, and the format that it stands for.
_FORMATS: tuple[tuple[int, bytes, str], ...] = (
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"heic", b"heix", b"heim", b"heis")),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"II\xbc", "JPEG XR"),
    (0, b"<svg", "SVG"),
    (128, b"DICM", "DICOM"),
    (0, b"%PDF-", "PDF"),
    (0, b"%!PS", "PostScript"),
)

# Markers of JPEG: ITU-T T.81, table B.1; T.87 for JPEG-LS.
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_KINDS = {0xC3: "lossless JPEG", 0xC7: "lossless JPEG", 0xCB: "lossless JPEG", 0xF7: "JPEG-LS"}
_ALONE = {0x01, *range(0xD0, 0xDA)}

_SAMPLES = {1: "unsigned", 2: "signed", 3: "floating-point", 5: "complex", 6: "complex floating-point"}


def unsupported(data: bytes) -> str | None:
    """What kind of picture it is, and what to do about it; None if it is damaged, or no picture at all."""
    what = next((name for at, magic, name in _FORMATS if data[at : at + len(magic)] == magic), None)
    what = what or _svg(data) or _jpeg(data) or _tiff(data)
    return None if what is None else f"{what} is not supported: convert it to a PNG or JPEG of 8 bits first"


def _svg(data: bytes) -> str | None:
    return "SVG" if data[:5] == b"<?xml" and b"<svg" in data[:2048] else None


def _jpeg(data: bytes) -> str | None:
    """A JPEG of a rare kind, by the header of its frame."""
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            bits = data[at + 4]
            kind = _KINDS.get(marker, "JPEG")
            return f"{kind} of {bits} bits" if bits != 8 or marker in _KINDS else None
        at += 1 if marker == 0xFF else 2 if marker in _ALONE else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _tiff(data: bytes) -> str | None:
    """A TIFF of samples that Pillow has no kind of picture for."""
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    try:
        tags: Any = ImageFileDirectory_v2(data[:16] if data[2:4] in (b"+\0", b"\0+") else data[:8])
        file = BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        width, height, bits = tags[256], tags[257], tags.get(258, (1,))
        count, kind = tags.get(277, 1), tags.get(339, (1,))
    except Exception:  # Pillow's parser raises anything on what is damaged
        return None
    if not (isinstance(width, int) and isinstance(height, int) and width and height and isinstance(count, int)):
        return None
    depth = "/".join(map(str, dict.fromkeys(bits)))
    return f"TIFF of {count} samples per pixel ({_SAMPLES.get(kind[0], 'unknown')}, {depth} bits)"
