"""The pictures and videos that a job's items are and its results hold, for people to look at.

Thumbnails are made in a process beside the server's, with its bounds: a picture may be damaged, or a bomb.
"""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tally.errors import ItemError, SourceNotFoundError, SpecError
from tally.jobs.facade import Jobs
from tally.jobs.store import JobRecord
from tally.server.aside import Aside
from tally.server.places import check_places
from tally.server.results import Results
from tally.sources.locations import compile_glob, locate
from tally.sql import sql_name, sql_text
from tally.storage import Store, is_url, open_store

PER_PAGE = 12
SIZES = (320, 1280)
"""Pixels of the longer side of a thumbnail, and of a picture to look at closely."""
MAX_BOXES = 20
MAX_PIXELS = 50_000_000
MAX_BYTES = 64 << 20
SECONDS = 10.0
_MOST_ROWS = 1000
_DRAWN = ("label", "score", "share", "xmin", "ymin", "xmax", "ymax")


class Row(BaseModel):
    """What is drawn onto a thumbnail: a box in pixels of the original, or a label."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    label: str | None = None
    score: float | None = None
    share: float | None = None
    xmin: float | None = None
    ymin: float | None = None
    xmax: float | None = None
    ymax: float | None = None


_ROWS = TypeAdapter(list[Row])


def drawable(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What of the rows is drawn, those with the highest scores first; of those that are something else, nothing."""
    found = []
    for row in rows:
        try:
            found.append(Row.model_validate(dict(row)).model_dump(exclude_none=True))
        except ValidationError:
            continue
    return sorted(filter(None, found), key=lambda row: -(row.get("score") or 0))[:MAX_BOXES]


def rows_from(text: str) -> list[Row]:
    """The rows that a thumbnail's address carries; see :attr:`Shown.drawn`. Raises SpecError."""
    try:
        return _ROWS.validate_json(text)[:MAX_BOXES]
    except ValidationError as error:
        raise SpecError(f"rows: {error.errors()[0]['msg']}") from None


@dataclass(frozen=True, slots=True)
class Shown:
    """One item. rows: what its result says. before: whether the item itself can be shown. after: the name of the file
    that was made of it, if the job makes files."""

    key: str
    rows: list[dict[str, Any]]
    before: bool
    after: str | None = None

    @property
    def says(self) -> str:
        """Its labels in words."""
        labels = [str(row["label"]) for row in self.rows if row.get("label") is not None]
        each = [f"{labels.count(one)} x {one}" if labels.count(one) > 1 else one for one in dict.fromkeys(labels)]
        return ", ".join(each)

    @property
    def drawn(self) -> str:
        """What is drawn onto its picture, as JSON."""
        return json.dumps(drawable(self.rows), separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Page:
    """Some items of a job in the order of their keys. more: there are others behind them. videos: whether they are."""

    items: list[Shown]
    more: bool
    videos: bool = False


class Gallery:
    """Shows items. roots: folders that local items must lie in. Safe to use from several threads."""

    def __init__(self, jobs: Jobs, results: Results, aside: Aside, roots: Sequence[Path]) -> None:
        self._jobs, self._results, self._aside, self._roots = jobs, results, aside, tuple(roots)

    def page(self, job: str, *, number: int, label: str | None = None) -> Page | None:
        """A page of items, from 1; those with a label. None if the job's items are neither pictures nor videos."""
        record = self._jobs.store.get(job)
        if record.output.get("kind") == "video":
            return _videos(record, number)
        columns = self._results.query(job, "from results limit 0", limit=0).columns
        where = f"where label::varchar = {sql_text(label)}" if label is not None and "label" in columns else ""
        chosen = f"select key from results {where} group by key order by key limit {PER_PAGE + 1}"  # noqa: S608
        chosen += f" offset {(number - 1) * PER_PAGE}"
        names = ", ".join(map(sql_name, ["key", *(each for each in (*_DRAWN, "file") if each in columns)]))
        found = self._results.query(
            job,
            f"with chosen as ({chosen}) select {names} from results where key in (from chosen) order by key",  # noqa: S608
            limit=_MOST_ROWS,
        ).rows
        by_key: dict[str, list[dict[str, Any]]] = {}
        for row in found:
            by_key.setdefault(row.pop("key"), []).append(row)
        makes = record.output.get("kind") == "images" and record.manifest is not None
        items = [
            Shown(key, rows, _is(key, "image"), rows[0].get("file") if makes else None) for key, rows in by_key.items()
        ]
        shown = [each for each in items[:PER_PAGE] if each.before or each.after]
        if items and not shown:
            return None
        return Page(shown, len(items) > PER_PAGE)

    def item(self, job: str, key: str, *, size: int, rows: Sequence[Row] = ()) -> bytes:
        """The item's picture with the rows drawn onto it, as JPEG. Raises ItemError, SourceNotFoundError, SpecError."""
        record = self._jobs.store.get(job)
        if not _is(key, "image"):
            raise SourceNotFoundError(f"{key!r} is no picture")
        given = [row.model_dump(exclude_none=True) for row in rows]
        return self._made(_item, record.spec["source"], self._roots, key, size, given)

    def made(self, job: str, file: str, *, size: int) -> bytes:
        """The picture that the job made, smaller, as JPEG. Raises as :meth:`item`."""
        record = self._jobs.store.get(job)
        if record.output.get("kind") != "images" or not _is(file, "image"):
            raise SourceNotFoundError(f"{file!r} is no picture")
        return self._made(_file, self._jobs.sink(record.id).place, file, size)

    def video(self, job: str, key: str) -> tuple[Store, str]:
        """Where the video is that the job has made another of. Raises SourceNotFoundError, SpecError."""
        record = self._jobs.store.get(job)
        if key not in {file.get("key") for file in (record.manifest or {}).get("files", ())} or not _is(key, "video"):
            raise SourceNotFoundError(f"job {job} has made no video of {key!r}")
        return _find(record.spec["source"], self._roots, key)

    def _made(self, function: Any, *args: Any) -> bytes:
        made: bytes = self._aside.call(function, *args, seconds=SECONDS, what="the thumbnail")
        return made


def _videos(record: JobRecord, number: int) -> Page:
    files = (record.manifest or {}).get("files", ())
    begin = (number - 1) * PER_PAGE
    items = [
        Shown(key, [], _is(key, "video"), str(each["path"]))
        for each in files[begin : begin + PER_PAGE]
        if (key := str(each.get("key") or each["path"]))
    ]
    return Page(items, len(files) > begin + PER_PAGE, videos=True)


def _is(name: str, kind: str) -> bool:
    return (mimetypes.guess_type(name)[0] or "").startswith(f"{kind}/")


def _find(sources: Sequence[str], roots: Sequence[Path], key: str) -> tuple[Store, str]:
    """Where the item with that key is. Raises SourceNotFoundError where there is none, SpecError outside of roots."""
    for location in locate(sources):
        name = key.removeprefix(location.prefix)
        if not key.startswith(location.prefix) or (location.names and name not in location.names):
            continue
        if location.pattern is not None and not compile_glob(location.pattern).fullmatch(name):
            continue
        if not is_url(location.root):
            check_places([("source", location.within + name)], roots)
        store = open_store(location.root)
        if store.exists(name):
            return store, name
    raise SourceNotFoundError(f"{key!r} is not there any more")


# -- in a process beside the server's ----------------------------------------------------------------------------------


def _item(sources: Sequence[str], roots: Sequence[Path], key: str, size: int, rows: list[dict[str, Any]]) -> bytes:
    store, name = _find(sources, roots, key)
    return _thumbnail(store, name, size, rows)


def _file(place: str, file: str, size: int) -> bytes:
    store = open_store(place)
    if store.is_local and not Path(place, file).resolve().is_relative_to(Path(place).resolve()):
        raise SourceNotFoundError(f"{file!r} is a link that leads out of the output")
    return _thumbnail(store, file, size, [])


def _thumbnail(store: Store, name: str, size: int, rows: list[dict[str, Any]]) -> bytes:
    if (length := store.size(name)) > MAX_BYTES:
        raise ItemError(f"the file has {length:,} bytes: too many to show", stage="decode")
    return thumbnail(store.read(name), size, rows)


def thumbnail(content: bytes, size: int, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A picture whose longer side has so many pixels at most, with the rows drawn onto it, as JPEG.

    rows: boxes in pixels of the original, or labels. Raises ItemError. For a process beside the server's.
    """
    import numpy as np
    from PIL import Image

    from tally.media.images import decode
    from tally.scorers.vision.overlay import draw
    from tally.sinks.files import encode

    pixels, info = decode(content, (size // 2, size // 2), max_pixels=MAX_PIXELS)
    image = Image.fromarray(pixels)
    image.thumbnail((size, size))
    small = np.asarray(image)
    height, width = small.shape[:2]
    return encode(draw(small, rows, scale=(width / info["width"], height / info["height"])), "jpg")
