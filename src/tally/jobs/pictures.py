"""The pictures that a job's items are, or that it has made: small enough to look at, with results drawn onto them."""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from tally.errors import ItemError, SourceNotFoundError
from tally.sources.locations import compile_glob, locate
from tally.sql import sql_name
from tally.storage import Store, is_url, open_store

if TYPE_CHECKING:
    from PIL.Image import Image

    from tally.scorers.base import Thumbnail

MAX_BOXES = 20
MAX_PIXELS = 50_000_000
MAX_BYTES = 64 << 20
LEGIBLE = 320
"""Pixels of the longer side of a picture on which captions can be read."""
DRAWN = ("label", "score", "share", "xmin", "ymin", "xmax", "ymax", "corners", "keypoints", "keypoint_scores", "mask")
"""The columns that are drawn."""

Ask: TypeAlias = Callable[[str, int], tuple[Collection[str], list[dict[str, Any]]]]
"""Answers a query about a job's results, by so many rows at most: the columns, and the rows."""


def items_of(
    ask: Ask, *, limit: int, offset: int = 0, where: str | None = None, rows: int, without: Collection[str] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Of items in the order of their keys: what is drawn of each, and the name of the file that was made of it.

    where: a condition in SQL, which one row of an item has to meet. rows: the most that are read. without: columns
    that are left out.
    """
    there = ask("from results limit 0", 0)[0]
    condition = "" if where is None else f"where {where}"
    chosen = f"select key from results {condition} group by key order by key limit {limit} offset {offset}"  # noqa: S608
    names = ", ".join(sql_name(each) for each in ("key", *DRAWN, "file") if each in there and each not in without)
    sql = f"with chosen as ({chosen}) select {names} from results where key in (from chosen) order by key"  # noqa: S608
    found: dict[str, list[dict[str, Any]]] = {}
    for row in ask(sql, rows)[1]:
        found.setdefault(row.pop("key"), []).append(row)
    return found


def _or_nothing(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Numbers, which CSV holds as text; None of what is none: the row's box is drawn without it."""
    try:
        return check(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, RecursionError):
        return None


_Numbers = Annotated[list[float] | None, WrapValidator(_or_nothing)]
_Corners = Annotated[list[float] | None, Field(min_length=8, max_length=8), WrapValidator(_or_nothing)]
_Lengths = Annotated[
    list[Annotated[int, Field(ge=0, le=MAX_PIXELS)]] | None, Field(max_length=1 << 20), WrapValidator(_or_nothing)
]


class Row(BaseModel):
    """What is drawn onto a thumbnail: a box in pixels of the original, with a quadrangle, keypoints or a mask, or a
    label. See :class:`tally.scorers.vision.overlay.Overlay`."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    label: str | None = None
    score: float | None = None
    share: float | None = None
    xmin: float | None = None
    ymin: float | None = None
    xmax: float | None = None
    ymax: float | None = None
    corners: _Corners = None
    keypoints: _Numbers = None
    keypoint_scores: _Numbers = None
    mask: _Lengths = None

    def fitting(self, width: int, height: int) -> dict[str, Any]:
        """What there is of it, for a picture of so many pixels; without what cannot be of that picture."""
        points, scores = self.keypoints or [], self.keypoint_scores
        left_out = {
            "keypoints": len(points) % 2,
            "keypoint_scores": scores is not None and 2 * len(scores) != len(points),
            "mask": sum(self.mask or ()) > width * height,
        }
        return self.model_dump(exclude_none=True, exclude={name for name, wrong in left_out.items() if wrong})


def drawable(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What of the rows is drawn, those with the highest scores first; of those that are something else, nothing."""
    found = []
    for row in rows:
        try:
            found.append(Row.model_validate(dict(row)).model_dump(exclude_none=True))
        except ValidationError:
            continue
    return sorted(filter(None, found), key=lambda row: -(row.get("score") or 0))[:MAX_BOXES]


def is_media(name: str, kind: str) -> bool:
    """Whether a file's name says that it is an ``image`` or a ``video``."""
    return (mimetypes.guess_type(name)[0] or "").startswith(f"{kind}/")


def find(sources: Sequence[str], key: str, *, check: Callable[[str], None] | None = None) -> tuple[Store, str]:
    """Where the item with that key is. Raises SourceNotFoundError where there is none.

    check: is given the path of a local one, and raises where it may not be looked at.
    """
    for location in locate(sources, missing=True):
        name = key.removeprefix(location.prefix)
        if not key.startswith(location.prefix) or (location.names and name not in location.names):
            continue
        if location.pattern is not None and not compile_glob(location.pattern).fullmatch(name):
            continue
        if check is not None and not is_url(location.root):
            check(location.within + name)
        store = open_store(location.root)
        if store.exists(name):
            return store, name
    raise SourceNotFoundError(f"{key!r} is not there any more")


def read_thumbnail(store: Store, name: str, size: int, rows: Sequence[Mapping[str, Any]] = ()) -> bytes:
    """As :func:`thumbnail`, of a file. Raises ItemError also for one of more than ``MAX_BYTES``; StorageError."""
    if (length := store.size(name)) > MAX_BYTES:
        raise ItemError(f"the file has {length:,} bytes: too many to show", stage="decode")
    return thumbnail(store.read(name), size, rows)


def thumbnail(content: bytes, size: int, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A picture whose longer side has so many pixels at most, with the rows drawn onto it, as JPEG.

    rows: as :func:`drawable` gives them. Raises ItemError. The picture may be damaged, or a bomb: a process
    that serves others makes it in another one.
    """
    from PIL import Image

    from tally.media.images import decode

    pixels, info = decode(content, (size // 2, size // 2), max_pixels=MAX_PIXELS)
    image = Image.fromarray(pixels)
    image.thumbnail((size, size))
    return _with_rows(image, info["width"], info["height"], rows)


def kept_thumbnail(kept: Thumbnail, size: int, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """As :func:`thumbnail`, of what the job has kept of a picture. It is enlarged if captions could not be read."""
    from PIL import Image

    from tally.media.images import decode

    pixels, _ = decode(kept.jpeg, max_pixels=MAX_PIXELS)
    image = Image.fromarray(pixels)
    longest = max(image.size)
    side = max(min(longest, size), min(size, LEGIBLE) if rows else 0)
    if side != longest:
        image = image.resize((max(1, image.width * side // longest), max(1, image.height * side // longest)))
    return _with_rows(image, kept.width, kept.height, rows)


def _with_rows(image: Image, width: int, height: int, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A small picture with rows drawn onto it that are about one of this width and height, as JPEG."""
    import numpy as np

    from tally.scorers.vision.overlay import draw
    from tally.sinks.files import encode

    given = [Row.model_validate(row).fitting(width, height) for row in rows]
    return encode(draw(np.asarray(image), given, scale=(image.width / width, image.height / height)), "jpg")
