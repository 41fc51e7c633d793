"""Pictures that Pillow cannot read: what they are, by their beginning, and what reads them if the extra ``pictures`` is
installed. Each reader's library is imported when such a picture comes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import numpy as np

Size: TypeAlias = "tuple[int, int]"

SUFFIXES = (".heic", ".heif", ".jxl", ".jxr", ".jls", ".dcm", ".svg")
"""File name suffixes of such pictures."""


class Samples(NamedTuple):
    """What a reader gives, upright: ``[height, width]`` or ``[height, width, bands]``, unsigned or floats.

    most: what stands for full brightness; None for floats, whose range tells. alpha: the fourth band is opacity.
    """

    values: np.ndarray[Any, Any]
    most: float | None
    alpha: bool = False


@dataclass(frozen=True, slots=True)
class Rare:
    """One such picture. size: width and height by its header, or None where it does not tell.

    module: what reads it; None: nothing does. pages: how many pictures it holds. read: the n-th of them.
    first: the one that stands for the file. sizes: of each, where they differ.
    """

    name: str
    module: str | None = None
    size: Size | None = None
    pages: int = 1
    read: Callable[[int], Samples] | None = None
    first: int = 0
    sizes: Sequence[Size] = ()


def find(data: bytes) -> Rare | None:
    """The picture, if it is intact and one of these. Raises what a reader of its header raises."""
    for at, magic, kind in _SIGNATURES:
        if data[at : at + len(magic)] == magic:
            return kind(data)
    if data[:5] == b"<?xml" and b"<svg" in data[:2048]:
        return _svg(data)
    return _jpeg(data) or _tiff(data)


def installed(module: str | None) -> bool:
    return module is not None and find_spec(module) is not None


# ---------------------------------------------------------------------------------------------------------- HEIC


def _heic(data: bytes) -> Rare:
    if not installed("pillow_heif"):
        return Rare("HEIC", "pillow_heif")
    import pillow_heif

    pictures = pillow_heif.open_heif(BytesIO(data))

    def read(page: int) -> Samples:
        import numpy as np

        one = pictures[page]
        values = np.asarray(one)
        return Samples(values, 255 if values.dtype == np.uint8 else 65535, alpha=one.has_alpha)

    sizes = [one.size for one in pictures]
    return Rare("HEIC", "pillow_heif", pictures.size, len(pictures), read, pictures.primary_index, sizes)


# ---------------------------------------------------------------------------------------- what imagecodecs reads


def _codec(name: str, data: bytes, codec: str, size: Size | None, bits: int = 8) -> Rare:
    def read(_page: int) -> Samples:
        import imagecodecs

        values = getattr(imagecodecs, f"{codec}_decode")(data)
        if values.ndim == 4:  # an animation
            values = values[0]
        most = None if values.dtype.kind == "f" else 65535 if bits > 12 else (1 << bits) - 1
        if values.dtype == "uint16" and bits == 8:
            most = 65535
        return Samples(values, most, alpha=values.ndim == 3 and values.shape[2] in (2, 4))

    return Rare(name, "imagecodecs", size, 1, read)


def _jpeg_xl(data: bytes) -> Rare:
    return _codec("JPEG XL", data, "jpegxl", _size_of_jpeg_xl(data))


def _size_of_jpeg_xl(data: bytes) -> Size | None:
    """By ISO/IEC 18181-1, C.3: a codestream's first bits."""
    start = data.find(b"\xff\x0a", 0 if data[:2] == b"\xff\x0a" else 12)
    if start < 0:
        return None
    bits = int.from_bytes(data[start + 2 : start + 16], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else 1 + take((9, 13, 18, 30)[take(2)])

    height = side()
    over, under = ((0, 0), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[take(3)]
    return (height * over // under if under else side(), height)


# Markers of JPEG: ITU-T T.81, table B.1; T.87 for JPEG-LS.
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_KINDS = {0xC3: "lossless JPEG", 0xC7: "lossless JPEG", 0xCB: "lossless JPEG", 0xF7: "JPEG-LS"}
_ALONE = {0x01, *range(0xD0, 0xDA)}


def _jpeg(data: bytes) -> Rare | None:
    """A JPEG of a rare kind, by the header of its frame."""
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            bits = data[at + 4]
            if bits == 8 and marker not in _KINDS:
                return None
            size = (int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big"))
            name = f"{_KINDS.get(marker, 'JPEG')} of {bits} bits"
            if data.find(b"\xff\xd9", at) < 0:  # the decoder would fill up what is missing
                raise EOFError
            return _codec(name, data, "jpegls" if marker == 0xF7 else "jpeg", size, bits)
        at += 1 if marker == 0xFF else 2 if marker in _ALONE else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


_SAMPLES = {1: "unsigned", 2: "signed", 3: "floating-point", 5: "complex", 6: "complex floating-point"}


def _tiff(data: bytes) -> Rare | None:
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
    name = f"TIFF of {count} samples per pixel ({_SAMPLES.get(kind[0], 'unknown')}, {depth} bits)"
    if kind[0] not in (1, 3) or len(set(bits)) > 1:
        return Rare(name)  # no brightness, or none of one scale

    def read(_page: int) -> Samples:
        import imagecodecs

        values = imagecodecs.tiff_decode(data)
        if values.ndim == 3 and values.shape != (height, width, count) and values.shape == (count, height, width):
            values = values.transpose(1, 2, 0)
        return Samples(values, None if kind[0] == 3 else (1 << bits[0]) - 1)

    return Rare(name, "imagecodecs", (width, height), 1, read)


# --------------------------------------------------------------------------------------------------------- DICOM


def _dicom(data: bytes) -> Rare:
    if not installed("pydicom"):
        return Rare("DICOM", "pydicom")
    import pydicom
    from pydicom import config

    config.settings.reading_validation_mode = config.IGNORE  # it warns of what does not matter to the picture
    found = pydicom.dcmread(BytesIO(data))
    syntax = found.file_meta.TransferSyntaxUID
    if "Rows" not in found or "PixelData" not in found:
        return Rare("DICOM without a picture")
    size = (int(found.Columns), int(found.Rows))

    def read(page: int) -> Samples:
        from pydicom.pixels.processing import apply_modality_lut, apply_voi, convert_color_space
        from pydicom.pixels.utils import pixel_array

        values = pixel_array(found, index=page)
        if found.SamplesPerPixel > 1:
            return Samples(convert_color_space(values, found.PhotometricInterpretation, "RGB"), 255)
        values = apply_modality_lut(values, found).astype("float32")
        low, high = 0.0, float((1 << found.BitsStored) - 1)
        if found.get("VOILUTSequence"):  # how it is meant to be looked at
            values = apply_voi(values, found)
            high = float(values.max())
        elif (window := _window(found)) is not None:
            values, high = window(values), 1.0
        elif found.get("PixelRepresentation") or "RescaleSlope" in found:
            low, high = float(values.min()), float(values.max())
        values = (values - low) / ((high - low) or 1.0)
        return Samples(1 - values if found.PhotometricInterpretation == "MONOCHROME1" else values, 1)

    if syntax.is_compressed and not _decodes(syntax):
        return Rare(f"DICOM compressed as {syntax.name}")
    return Rare("DICOM", "pydicom", size, int(found.get("NumberOfFrames") or 1), read)


def _window(found: Any) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] | None:
    """The first window that a file gives, from its values to 0 ... 1, whatever those mean; by DICOM PS3.3, C.11.2.1.2.

    pydicom's own gives values of a range that depends on how they are stored and rescaled, and does not tell which.
    """
    if found.get("WindowCenter") is None or found.get("WindowWidth") is None:
        return None
    given = (found.WindowCenter, found.WindowWidth)
    centre, width = (float(each[0] if isinstance(each, Sequence) else each) for each in given)
    form = str(found.get("VOILUTFunction") or "LINEAR").upper()
    if form == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if form not in ("LINEAR", "LINEAR_EXACT", "SIGMOID") or width < 0:
        raise ValueError(f"its window is {given[1]} wide, {form}")

    def seen(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        import numpy as np

        if not width:  # what is not black is white
            return (values > centre).astype(np.float32)
        if form == "SIGMOID":
            return np.asarray(0.5 * (1 + np.tanh(2 * (values - centre) / width)))
        return np.clip((values - centre) / width + 0.5, 0, 1)

    return seen


def _decodes(syntax: Any) -> bool:
    from pydicom.pixels.decoders.base import get_decoder

    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


# ----------------------------------------------------------------------------------------------------------- SVG


_OUTWARD = re.compile(
    rb"""(?:href|src)\s*=\s*["']\s*(?!#|data:)[^"']|url\(\s*["']?\s*(?!#|data:)|<!ENTITY|@import""", re.IGNORECASE
)
"""What would be read beside the file itself."""


def _svg(data: bytes) -> Rare:
    if not installed("resvg_py"):
        return Rare("SVG", "resvg_py")
    if _OUTWARD.search(data):
        return Rare("SVG that refers to other files")
    if (size := _size_of_svg(data)) is None:
        return Rare("SVG without a size")

    def read(_page: int) -> Samples:
        import numpy as np
        import resvg_py
        from PIL import Image

        assert size is not None
        drawn = bytes(resvg_py.svg_to_bytes(svg_string=data.decode("utf-8-sig"), width=size[0], height=size[1]))
        return Samples(np.asarray(Image.open(BytesIO(drawn)).convert("RGBA")), 255, alpha=True)

    return Rare("SVG", "resvg_py", size, 1, read)


def _size_of_svg(data: bytes) -> Size | None:
    root = re.search(rb"<svg\b[^>]*>", data, re.DOTALL)
    said = root[0].decode("utf-8", "replace") if root else ""
    sides = [re.search(rf"""\s{side}\s*=\s*["']\s*([\d.]+)\s*(?:px)?\s*["']""", said) for side in ("width", "height")]
    box = re.search(r"""viewBox\s*=\s*["']([^"']+)["']""", said)
    shape = re.findall(r"[-\d.e+]+", box[1])[2:4] if box else []
    found = [float(side[1] if side else shape[at]) for at, side in enumerate(sides) if side or len(shape) == 2]
    return (max(1, round(found[0])), max(1, round(found[1]))) if len(found) == 2 else None


_SIGNATURES: tuple[tuple[int, bytes, Callable[[bytes], Rare]], ...] = (
    *((4, b"ftyp" + brand, _heic) for brand in (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")),
    (0, b"\xff\x0a", _jpeg_xl),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", _jpeg_xl),
    (0, b"II\xbc", lambda _: Rare("JPEG XR")),  # what reads it crashes on damaged ones
    (0, b"<svg", _svg),
    (128, b"DICM", _dicom),
    (0, b"%PDF-", lambda _: Rare("PDF")),
    (0, b"%!PS", lambda _: Rare("PostScript")),
)
"""Where a signature stands, and what such a picture is."""
