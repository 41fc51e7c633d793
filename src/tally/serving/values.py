"""Results as JSON, and as columns: what the protocols have in common. Runs in replicas."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tally.scorers.base import Pictured, Result
from tally.scorers.scripts.answers import plain


def json_value(result: Result) -> Any:
    """A result as JSON has it: a row as an object, rows as a list of objects, a picture as base64 of a PNG; a picture
    with rows as an object of both.

    NaN and infinity become null, bytes base64, dates ISO 8601.
    """
    if is_picture(result):
        return base64.b64encode(png(result)).decode()
    if isinstance(result, Pictured):
        return {"picture": json_value(result.picture), "rows": json_value(result.rows)}
    return finite(plain(result))


def finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return value


def is_picture(result: Any) -> bool:
    """Whether a result is an image: ``uint8[h, w, 3]`` or ``uint8[h, w]``."""
    return getattr(result, "dtype", None) == "uint8" and getattr(result, "ndim", 0) in (2, 3)


def png(picture: Any) -> bytes:
    """A picture as a PNG file."""
    return _encoded(picture, "PNG", compress_level=1)


def jpeg(picture: Any) -> bytes:
    """A picture as a JPEG file."""
    return _encoded(picture, "JPEG", quality=90)


def _encoded(picture: Any, kind: str, **options: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    return buffer.getvalue()


def from_base64(text: str) -> bytes:
    """Raises ValueError for what is not base64; a data URL's beginning is left out."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("not base64") from None


def rows_of(result: Result) -> list[Mapping[str, Any]]:
    """The rows of one item's result."""
    if isinstance(result, Mapping):
        return [result]
    return list(result) if isinstance(result, Sequence) else [{"value": result}]


def columns_of(results: Sequence[Result], known: Mapping[str, str] | None) -> dict[str, list[Any]]:
    """The rows of all results as columns, in the order of ``known``, then as they come; None where a row lacks one."""
    rows = [row for result in results for row in rows_of(result)]
    names = dict.fromkeys([*(known or {}), *(name for row in rows for name in row)])
    return {name: [row.get(name) for row in rows] for name in names}
