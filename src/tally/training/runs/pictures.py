"""Pictures that a training logs: from what its author has, to files that every viewer opens."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tally.errors import ItemError, SpecError
from tally.media.images import decode


def as_picture(given: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """``uint8[height, width, 3]`` RGB from an array (height × width, or that × 1, 3 or 4; uint8, or floats from 0
    to 1), a PIL image, a matplotlib figure, encoded bytes, or a file's path. Raises SpecError."""
    if isinstance(given, (str, Path)):
        try:
            given = Path(given).read_bytes()
        except OSError as error:
            raise SpecError(f"the picture {str(given)!r} cannot be read: {error.strerror}") from None
    if isinstance(given, (bytes, bytearray)):
        try:
            return decode(bytes(given))[0]
        except ItemError as error:
            raise SpecError(f"the picture cannot be read: {error.message}") from None
    if hasattr(given, "savefig"):  # matplotlib's
        drawn = io.BytesIO()
        given.savefig(drawn, format="png")
        return as_picture(drawn.getvalue())
    if isinstance(given, Image.Image):
        return np.asarray(given.convert("RGB"))
    array = np.asarray(given)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] not in (3, 4) or not array.size:
        raise SpecError(f"a picture is an array of height × width × 3, or height × width, not of shape {array.shape}")
    array = array[:, :, :3]
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise SpecError(f"a picture's values are uint8 (0 to 255) or floats from 0 to 1, not {array.dtype}")
    least, most = float(array.min()), float(array.max())
    if not (least >= 0 and most <= 1):
        raise SpecError(f"a picture's floats are from 0 to 1, but these are from {least:g} to {most:g}")
    return np.asarray(np.rint(array * 255), np.uint8)


def png(picture: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """``uint8[height, width, 3]`` as a PNG file."""
    written = io.BytesIO()
    Image.fromarray(picture).save(written, "PNG", compress_level=1)
    return written.getvalue()
