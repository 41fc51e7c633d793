"""Decoding one picture of any format.

Everything here may be called from several threads at once. Pillow is imported, and its warnings are silenced, on
first use, so that only workers pay for it.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

from tally.errors import ItemError
from tally.media import rare

# NumPy and Pillow are imported by the functions that need them: commands that look at jobs decode nothing.
if TYPE_CHECKING:
    import numpy as np
    from PIL import Image as PillowImage

MAX_PIXELS = 128_000_000
"""Larger pictures are refused by their header. Decoding one of this size takes about 1 GiB."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How pictures are decoded, as a job says it.

    max_pixels: a picture with more, by its header, is refused. background: red, green, blue that transparent pictures
    are laid on; None: transparency is dropped. pages: of a file with several pictures, the first or all.
    """

    max_pixels: int = MAX_PIXELS
    background: tuple[int, int, int] | None = None
    pages: Literal["first", "all"] = "first"


NOT_INSTALLED = "is not supported without more libraries"
NO_MEMORY = "not enough memory to decode"
"""Parts of reasons why a picture cannot be read that are none of the picture."""

# Pillow lists these as readable, but they are stubs, or (EPS) run another program on the file's content.
_UNUSABLE = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
_ANIMATED = frozenset({"GIF", "WEBP", "PNG", "AVIF"})
_COMMON = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_SIGNATURES = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"8BPS": "PSD",
}
_OTHERS = {
    b"pk\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "packed with gzip",
    b"par1": "a Parquet file",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"version http": "a Git LFS pointer: fetch the content with 'git lfs pull'",
}
"""What files that have the name of a picture are instead, by their beginning in lower case."""
_IN_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_STRIP_PIXELS = 1 << 20
_SMALL_QUALITY = 85

_filter_lock = threading.Lock()


def decode(
    data: bytes,
    size: tuple[int, int] | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] | None = None,
    page: int | None = None,
    tell: Callable[[str], object] | None = None,
    opened: PillowImage.Image | None = None,
) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], dict[str, int]]:
    """Decode one picture to upright RGB.

    data: the file's content, in any format that Pillow reads, or that the extra ``pictures`` brings.
    page: which of several frames or pages; None: the first, and there being others is told.
    background: what is transparent is laid on this colour; None: transparency is dropped, and told.
    size: (width, height) in pixels that the caller is going to resize to. A JPEG is then decoded at
        1/2, 1/4 or 1/8, as long as the result is at least twice that size in both directions.
    max_pixels: a picture with more, by its header, is not decoded.
    tell: called with a sentence if something of the picture is left out: further frames, or transparency.
    opened: the same file, open at an earlier page: an animation is played from there, and not from its beginning.

    Returns a writable, C-contiguous ``uint8[height, width, 3]`` in RGB order, and ``width`` and
    ``height`` in pixels of the original, upright picture. EXIF orientation is applied, transparency is
    dropped. Samples of 16 bits are divided by 257. Other integers and floats are taken as they are
    if they lie within 0 ... 255 (floats also within 0 ... 1, as shares of 255), or else stretched from smallest to
    largest.

    Raises ItemError (stage ``decode``) for everything that is not a complete, readable picture.
    """
    if not data:
        raise ItemError("the file is empty (0 bytes)", stage="decode")
    _quiet()
    from PIL import Image, UnidentifiedImageError

    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels // 2 + 1
    what = "image"
    try:
        with Image.open(BytesIO(data), formats=_formats()) if opened is None else nullcontext(opened) as image:
            what = f"{image.format} image"
            _check(image, max_pixels)
            if page is not None and page != image.tell():
                image.seek(page)
                _check(image, max_pixels)
            width, height = image.size
            if image.format in ("JPEG", "MPO"):
                orientation = _orientation(image)
                turned = orientation >= 5
                if turned:
                    width, height = height, width
                if size is not None:
                    wanted = (2 * size[0], 2 * size[1])
                    image.draft(None, wanted[::-1] if turned else wanted)
                image.load()
                pixels = _upright(image, orientation)
            else:
                # In other formats the orientation may follow the pixels, or be applied while loading.
                image.load()
                _refuse_large(*image.size, max_pixels)
                pixels = _upright(image, _orientation(image))
                width, height = pixels.size
                if tell is not None:
                    _tell_left_out(image, tell, several=page is None, transparent=background is None)
                if background is not None and _is_transparent(pixels):
                    return _laid_on(pixels.convert("RGBA"), background), {"width": width, "height": height}
            return _rgb(pixels), {"width": width, "height": height}
    except ItemError:
        raise
    except UnidentifiedImageError:
        return _decode_rare(data, max_pixels, background, page, tell)
    except Image.DecompressionBombError as error:
        pixels_announced = re.search(r"\d+", str(error))
        amount = f"{int(pixels_announced[0]) / 1e6:.1f} million pixels" if pixels_announced else "the picture"
        message = f"{amount} is over the limit of {max_pixels / 1e6:g} million (max_pixels raises it)"
    except MemoryError:
        message = f"{NO_MEMORY} this {what}"
    except Exception as error:
        message = _explain(error, what, len(data))
    raise ItemError(message, stage="decode")


def each_page(
    data: bytes,
    size: tuple[int, int] | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] | None = None,
    tell: Callable[[str], object] | None = None,
) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.uint8]], dict[str, int]]]:
    """Each picture of a file, in order, as :func:`decode` gives it. An animation is played once."""
    count = pages(data)
    with ExitStack() as stack:
        opened = None
        if count > 1:
            from PIL import Image, UnidentifiedImageError

            with suppress(UnidentifiedImageError):
                opened = stack.enter_context(Image.open(BytesIO(data), formats=_formats()))
            if opened is not None and opened.format not in _ANIMATED:
                opened = None
        for page in range(count):
            yield decode(
                data,
                size,
                max_pixels=max_pixels,
                background=background,
                page=page,
                tell=tell,
                opened=opened,
            )


def thumbnail(pixels: np.ndarray[Any, np.dtype[np.uint8]], side: int) -> bytes:
    """A picture ``uint8[height, width, 3]`` as a small JPEG, whose longer side has so many pixels at most."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((side, side), reducing_gap=1.0)  # Pillow's own choice takes half as long again, and shows as much
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=_SMALL_QUALITY)
    return buffer.getvalue()


def for_png(image: PillowImage.Image) -> PillowImage.Image:
    """A picture that Pillow has opened or made, as PNG can keep it: upright, as :func:`decode` makes a file's, and of
    floats and large integers as that takes them."""
    from PIL import Image

    upright = _upright(image, _orientation(image))
    if opacity := {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}.get(upright.mode):
        upright = upright.convert(opacity)
    return upright if upright.mode in _IN_PNG else Image.fromarray(_rgb(upright))


def pages(data: bytes) -> int:
    """How many pictures a file holds. Raises ItemError as :func:`decode`."""
    _quiet()
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(data), formats=_formats()) as image:
            return int(getattr(image, "n_frames", 1)) if image.format in (*_ANIMATED, "TIFF") else 1
    except UnidentifiedImageError:
        return _rare(data).pages
    except Exception as error:
        raise ItemError(_explain(error, "image", len(data)), stage="decode") from None


def _rare(data: bytes) -> rare.Rare:
    """The picture, of a kind that Pillow cannot read. Raises ItemError for what is none, or has no reader here."""
    try:
        found = rare.find(data)
    except Exception as error:
        raise ItemError(_explain(error, "image", len(data)), stage="decode") from None
    if found is None:
        raise ItemError(_unidentified(data), stage="decode")
    if found.module is not None and not rare.installed(found.module):
        raise ItemError(
            f"{found.name} {NOT_INSTALLED}: pip install 'tally-scoring[pictures]', or convert "
            "it to a PNG or JPEG of 8 bits first",
            stage="decode",
        )
    if found.read is None:
        raise ItemError(f"{found.name} is not supported: convert it to a PNG or JPEG of 8 bits first", stage="decode")
    return found


def _decode_rare(
    data: bytes,
    max_pixels: int,
    background: tuple[int, int, int] | None,
    page: int | None,
    tell: Callable[[str], object] | None,
) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], dict[str, int]]:
    import numpy as np
    from PIL import Image

    found = _rare(data)
    assert found.read is not None
    if found.size is None:
        raise ItemError(f"damaged {found.name} image: its header does not tell its size", stage="decode")
    page_read = found.first if page is None else page
    _refuse_large(*(found.sizes[page_read] if found.sizes else found.size), max_pixels)
    try:
        values, most, alpha = found.read(page_read)
    except MemoryError:
        raise ItemError(f"{NO_MEMORY} this {found.name} image", stage="decode") from None
    except Exception as error:
        raise ItemError(_explain(error, f"{found.name} image", len(data)), stage="decode") from None
    values = values[:, :, np.newaxis] if values.ndim == 2 else values
    bands = values.shape[2]
    clear = alpha and bands in (2, 4) and bool((values[:, :, -1] < most).any())
    if tell is not None:
        if found.pages > 1 and page is None:
            tell(_SEVERAL)
        if clear and background is None:
            tell(_TRANSPARENT)
        if bands > 4 or (bands in (2, 4) and not alpha):
            tell("some pictures have more bands than red, green and blue: the first three are scored")
    low, high = 0.0, most
    if high is None:
        finite = values[np.isfinite(values)]
        low, high = _range_of(float(finite.min(initial=0)), float(finite.max(initial=0)))
    if values.dtype != np.uint8 or high != 255:
        values = _scale(values, low, high)
    height, width = values.shape[:2]
    info = {"width": width, "height": height}
    if clear and background is not None:
        mode = Image.fromarray(np.ascontiguousarray(values), "RGBA" if bands == 4 else "LA").convert("RGBA")
        return _laid_on(mode, background), info
    colour = values[:, :, :3] if bands >= 3 else values[:, :, :1]
    return np.ascontiguousarray(np.broadcast_to(colour, (height, width, 3))), info


@cache
def suffixes() -> frozenset[str]:
    """File name suffixes of pictures, lower case, with the dot. Those that nothing reads here count: such a file is
    named as not supported, and not passed over."""
    from PIL import Image

    usable = set(_formats())
    common = (suffix for suffix, kind in Image.registered_extensions().items() if kind in usable)
    return frozenset([*common, *rare.SUFFIXES])


@cache
def _formats() -> tuple[str, ...]:
    """Formats in the order in which they are tried."""
    from PIL import Image

    Image.init()
    return (*_COMMON, *sorted(set(Image.OPEN) - _UNUSABLE - set(_COMMON)))


_FILTER = ("ignore", None, Warning, re.compile(rf"PIL\.|{re.escape(__name__)}"), 0)


def _quiet() -> None:
    """Silence Pillow's warnings for the process: ``warnings.catch_warnings`` is not safe in threads."""
    if _FILTER in warnings.filters:
        return
    with _filter_lock:
        if _FILTER not in warnings.filters:
            warnings.filterwarnings("ignore", module=_FILTER[3].pattern)


def _check(image: PillowImage.Image, max_pixels: int) -> None:
    """Refuse by its header a picture that would need too much memory."""
    _refuse_large(*image.size, max_pixels)
    tags = getattr(image, "tag_v2", {})
    tile = (tags.get(322, 0), tags.get(323, 0))
    if all(isinstance(side, int) for side in tile):
        _refuse_large(*tile, max_pixels)
    for part in getattr(image, "tile", ()):
        if part[0] == "fits_gzip":
            raise ItemError("compressed FITS images are not read: their size is not known in advance", stage="decode")


def _refuse_large(width: int, height: int, max_pixels: int) -> None:
    pixels = width * height
    if pixels > max_pixels:
        raise ItemError(
            f"{width}x{height} = {pixels / 1e6:.1f} million pixels is over the limit of {max_pixels / 1e6:g} million "
            "(max_pixels raises it)",
            stage="decode",
        )


def _orientation(image: PillowImage.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if the EXIF block is broken."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: PillowImage.Image, orientation: int) -> PillowImage.Image:
    if orientation == 1:
        return image
    from PIL.Image import Transpose

    turn = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turn[orientation])


def _rgb(image: PillowImage.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    mode = image.mode
    if mode == "RGB":
        return _pixels(image)
    if mode.startswith("I;16"):
        return _pixels(image, lambda strip: _scale(strip, 0, 65535))
    if mode == "I":
        low, high = _extremes(image)
        if low >= 0 and high <= 65535:
            low, high = 0, 65535
        return _pixels(image, lambda strip: _scale(strip, low, high))
    if mode == "F":
        low, high = _range_of(*_extremes(image))
        return _pixels(image, lambda strip: _scale(strip, low, high))
    if mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return _pixels(converted)
    if mode in ("RGBa", "La"):
        image = image.convert("RGBA" if mode == "RGBa" else "LA")
    return _pixels(image.convert("RGB"))


def _range_of(low: float, high: float) -> tuple[float, float]:
    """What becomes black, and white, of floats between these."""
    return (0, 1 if high <= 1 else 255) if low >= 0 and high <= 255 else (low, high)


_SEVERAL = "some files hold several pictures (frames or pages): the first of each is scored (--pages all scores each)"
_TRANSPARENT = (
    "some pictures are partly transparent: transparency is dropped, and what is stored beneath it is scored "
    "(--background white lays them on white)"
)


def _laid_on(image: PillowImage.Image, colour: tuple[int, int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture with opacity, over a colour."""
    import numpy as np

    out = np.empty((image.height, image.width, 3), np.uint8)
    for top, strip in _strips(image):
        opaque = strip[:, :, 3:].astype(np.float32) / 255
        out[top : top + len(strip)] = np.rint(strip[:, :, :3] * opaque + np.array(colour, np.float32) * (1 - opaque))
    return out


def _tell_left_out(
    image: PillowImage.Image, tell: Callable[[str], object], *, several: bool, transparent: bool
) -> None:
    """Say what :func:`decode` leaves out of a picture that was loaded. The image goes to no other frame."""
    if transparent and _is_transparent(image):
        tell(_TRANSPARENT)
    if not several:
        return
    if image.format == "TIFF":
        several = bool(getattr(getattr(image, "tag_v2", None), "next", 0))
    else:
        several = image.format in _ANIMATED and bool(getattr(image, "is_animated", False))
    if several:
        tell(_SEVERAL)


def _is_transparent(image: PillowImage.Image) -> bool:
    if image.mode in ("RGBA", "LA", "RGBa", "La", "PA"):
        low: Any = image.getchannel(image.getbands()[-1]).getextrema()[0]
        return bool(low < 255)
    return "transparency" in image.info


def _strips(image: PillowImage.Image) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """Rows from the top, some at a time: converting all at once would hold a large picture three times."""
    import numpy as np

    width, height = image.size
    rows = max(1, _STRIP_PIXELS // max(width, 1))
    if rows >= height:
        yield 0, np.asarray(image)
        return
    for top in range(0, height, rows):
        yield top, np.asarray(image.crop((0, top, width, min(top + rows, height))))


def _pixels(
    image: PillowImage.Image, convert: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] | None = None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    import numpy as np

    out = np.empty((image.height, image.width, 3), np.uint8)
    for top, strip in _strips(image):
        if convert is not None:
            strip = convert(strip)[:, :, np.newaxis]
        out[top : top + len(strip)] = strip
    return out


def _extremes(image: PillowImage.Image) -> tuple[float, float]:
    """Smallest and largest finite sample; (0, 0) where there is none."""
    import numpy as np

    low, high = np.inf, -np.inf
    for _, strip in _strips(image):
        finite = strip[np.isfinite(strip)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return (low, high) if low <= high else (0.0, 0.0)


def _scale(samples: np.ndarray[Any, Any], low: float, high: float) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Map low ... high to 0 ... 255, rounded; NaN becomes 0."""
    import numpy as np

    spread = (high - low) or 1.0
    with np.errstate(all="ignore"):
        scaled = (samples.astype(np.float64) - low) * (255.0 / spread) + 0.5
    return np.clip(np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0), 0, 255).astype(np.uint8)


def _unidentified(data: bytes) -> str:
    start = data[:12]
    for signature, kind in _SIGNATURES.items():
        if start.startswith(signature):
            return f"damaged {kind} image: its header cannot be read (the file has {len(data):,} bytes)"
    for signature, kind in _OTHERS.items():
        if start.lower().startswith(signature):
            return f"not an image, but {kind} (starts with {start!r})"
    return f"not an image: cannot identify the format (starts with {start!r})"


def _explain(error: Exception, what: str, length: int) -> str:
    text = " ".join(str(error).split())
    lower = text.lower()
    if "truncated" in lower or "not enough" in lower or "unexpected end" in lower or isinstance(error, EOFError):
        return f"truncated: the {what} ends early (the file has {length:,} bytes)"
    detail = re.sub(r"<[^>]* object at 0x[0-9a-f]+>", "it", text)[:160] or type(error).__name__
    return f"damaged {what}: {detail}"
