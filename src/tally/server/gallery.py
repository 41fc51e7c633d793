"""The pictures and videos that a job's items are and its results hold, for people to look at.

Thumbnails are made in a process beside the server's, with its bounds: a picture may be damaged, or a bomb.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tally.errors import SourceNotFoundError, SpecError, TallyError
from tally.jobs.facade import Jobs
from tally.jobs.pictures import (
    MAX_BOXES,
    Ask,
    Row,
    drawable,
    find,
    is_media,
    items_of,
    kept_thumbnail,
    read_thumbnail,
)
from tally.jobs.store import JobRecord
from tally.server.aside import Aside
from tally.server.places import check_places
from tally.server.results import Results
from tally.sinks.base import Output, OutputDescription
from tally.sinks.factory import reopen
from tally.sql import sql_text
from tally.storage import Store, open_store

PER_PAGE = 12
SIZES = (320, 1280)
"""Pixels of the longer side of a thumbnail, and of a picture to look at closely."""
SECONDS = 10.0
AS_FOUND = "*"
"""In place of the rows that a thumbnail's address carries: what the results say, which is too long for an address."""
_MOST_ROWS = 1000
_LONGEST = 4000
"""Characters of the rows in an address."""

_ROWS = TypeAdapter(list[Row])


def rows_from(text: str) -> list[Row]:
    """The rows that a thumbnail's address carries; see :attr:`Shown.drawn`. Raises SpecError."""
    try:
        return _ROWS.validate_json(text)[:MAX_BOXES]
    except ValidationError as error:
        raise SpecError(f"rows: {error.errors()[0]['msg']}") from None


@dataclass(frozen=True, slots=True)
class Shown:
    """One item. rows: what its result says, but for masks. before: whether the item itself can be shown. after: the
    name of the file that was made of it, if the job makes files. masked: whether its rows have masks, maybe."""

    key: str
    rows: list[dict[str, Any]]
    before: bool
    after: str | None = None
    masked: bool = False

    @property
    def says(self) -> str:
        """Its labels in words."""
        labels = [str(row["label"]) for row in self.rows if row.get("label") is not None]
        each = [f"{labels.count(one)} x {one}" if labels.count(one) > 1 else one for one in dict.fromkeys(labels)]
        return ", ".join(each)

    @property
    def drawn(self) -> str:
        """What is drawn onto its picture, as JSON, or :data:`AS_FOUND`."""
        text = "" if self.masked else json.dumps(drawable(self.rows), separators=(",", ":"))
        return text if text and len(text) <= _LONGEST else AS_FOUND


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
        found = items_of(
            self._asked(job),
            limit=PER_PAGE + 1,
            offset=(number - 1) * PER_PAGE,
            where=f"label::varchar = {sql_text(label)}" if label is not None and "label" in columns else None,
            rows=_MOST_ROWS,
            without=["mask"],
        )
        makes = record.output.get("kind") == "images" and record.manifest is not None
        kept = self._kept(record, _kept_keys, list(found)) if _keeps(record) else ()
        items = [
            Shown(
                key,
                rows,
                key in kept or is_media(key, "image"),
                rows[0].get("file") if makes else None,
                "mask" in columns,
            )
            for key, rows in found.items()
        ]
        shown = [each for each in items[:PER_PAGE] if each.before or each.after]
        if items and not shown:
            return None
        return Page(shown, len(items) > PER_PAGE)

    def _asked(self, job: str) -> Ask:
        def ask(sql: str, limit: int) -> tuple[Collection[str], list[dict[str, Any]]]:
            found = self._results.query(job, sql, limit=limit)
            return found.columns, found.rows

        return ask

    def item(self, job: str, key: str, *, size: int, rows: str = "[]") -> bytes:
        """The item's picture with the rows drawn onto it, as JPEG. rows: as :attr:`Shown.drawn`.

        Raises ItemError, SourceNotFoundError, SpecError.
        """
        record = self._jobs.store.get(job)
        named, keeps = is_media(key, "image"), _keeps(record)
        if not (named or keeps):
            raise SourceNotFoundError(f"{key!r} is no picture")
        if rows == AS_FOUND:
            mine = items_of(self._asked(job), limit=1, where=f"key = {sql_text(key)}", rows=_MOST_ROWS)
            given = drawable(mine.get(key, ()))
        else:
            given = [row.model_dump(exclude_none=True) for row in rows_from(rows)]

        def original() -> bytes:
            made: bytes = self._made(_item, record.spec["source"], self._roots, key, size, given)
            return made

        if not keeps:
            return original()
        if named and size > SIZES[0]:  # to look at closely, if it is still where it was
            with suppress(TallyError):
                return original()
        small: bytes | None = self._kept(record, _kept_item, key, size, given)
        return original() if small is None else small

    def made(self, job: str, file: str, *, size: int) -> bytes:
        """The picture that the job made, smaller, as JPEG. Raises as :meth:`item`."""
        record = self._jobs.store.get(job)
        if record.output.get("kind") != "images" or not is_media(file, "image"):
            raise SourceNotFoundError(f"{file!r} is no picture")
        made: bytes = self._made(_file, self._jobs.sink(record.id).place, file, size)
        return made

    def video(self, job: str, key: str) -> tuple[Store, str]:
        """Where the video is that the job has made another of. Raises SourceNotFoundError, SpecError."""
        record = self._jobs.store.get(job)
        if key not in {file.get("key") for file in (record.manifest or {}).get("files", ())} or not is_media(
            key, "video"
        ):
            raise SourceNotFoundError(f"job {job} has made no video of {key!r}")
        return _find(record.spec["source"], self._roots, key)

    def _kept(self, record: JobRecord, function: Any, *args: Any) -> Any:
        """What a function makes of the thumbnails that the job has kept."""
        self._jobs.sink(record.id)  # says where its results have gone
        return self._made(function, record.output, list(self._jobs.outputs(record.id)), *args)

    def _made(self, function: Any, *args: Any) -> Any:
        return self._aside.call(function, *args, seconds=SECONDS, what="the thumbnail")


def _keeps(record: JobRecord) -> bool:
    """Whether the job keeps thumbnails."""
    return bool((record.output.get("options") or {}).get("thumbnails"))


def _videos(record: JobRecord, number: int) -> Page:
    files = (record.manifest or {}).get("files", ())
    begin = (number - 1) * PER_PAGE
    items = [
        Shown(key, [], is_media(key, "video"), str(each["path"]))
        for each in files[begin : begin + PER_PAGE]
        if (key := str(each.get("key") or each["path"]))
    ]
    return Page(items, len(files) > begin + PER_PAGE, videos=True)


def _find(sources: Sequence[str], roots: Sequence[Path], key: str) -> tuple[Store, str]:
    """See :func:`tally.jobs.pictures.find`. Raises SpecError outside of roots, too."""
    return find(sources, key, check=lambda path: check_places([("source", path)], roots))


# -- in a process beside the server's ----------------------------------------------------------------------------------


def _item(sources: Sequence[str], roots: Sequence[Path], key: str, size: int, rows: list[dict[str, Any]]) -> bytes:
    store, name = _find(sources, roots, key)
    return read_thumbnail(store, name, size, rows)


def _kept_keys(output: dict[str, Any], outputs: Sequence[Output], keys: Sequence[str]) -> set[str]:
    return set(reopen(OutputDescription.from_json(output)).thumbnails_of(outputs, keys))


def _kept_item(
    output: dict[str, Any], outputs: Sequence[Output], key: str, size: int, rows: list[dict[str, Any]]
) -> bytes | None:
    found = reopen(OutputDescription.from_json(output)).thumbnails_of(outputs, [key])
    return kept_thumbnail(found[key], size, rows) if key in found else None


def _file(place: str, file: str, size: int) -> bytes:
    store = open_store(place)
    if store.is_local and not Path(place, file).resolve().is_relative_to(Path(place).resolve()):
        raise SourceNotFoundError(f"{file!r} is a link that leads out of the output")
    return read_thumbnail(store, file, size)
