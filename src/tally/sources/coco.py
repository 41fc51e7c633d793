"""COCO JSON as a list: the pictures that it names, with what is annotated in them as columns.

The file is read whole, as its annotations may stand anywhere in it; of masks, only that they are there.
"""

from __future__ import annotations

import json
import math
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tally.errors import ItemError, SourceNotFoundError, SpecError
from tally.masking import mask
from tally.sources.lists import PAGE, ItemList, Page
from tally.sources.tables.formats import format_of
from tally.storage import is_url, is_web, key_of, open_store
from tally.text import did_you_mean

COLUMNS = ("image_id", "annotation_ids", "annotation_labels", "annotation_boxes", "annotation_crowds")
"""What rows carry of a picture: one value for each annotation, in the order of the file. Boxes are xmin, ymin, xmax,
ymax in pixels."""
_FOLDER = "images"
"""Where pictures lie, too, beside the file that names them."""
_MOST_BYTES = 1 << 30
_START = 1024
"""Bytes that are looked at to tell an object from a list."""
_SHOWN = 3


def is_coco(place: str) -> bool:
    """Whether a list is taken for COCO's: a file ``.json`` that holds one object, and no list of objects.

    Raises SourceNotFoundError, StorageError.
    """
    if format_of(place) != "json" or not place.lower().endswith(".json"):
        return False
    folder, _, name = place.rpartition("/")
    try:
        start = open_store(folder or "/").read_range(name, 0, _START)
    except SourceNotFoundError:
        raise SourceNotFoundError(f"there is no list {key_of(place)}") from None
    return not start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def open_coco(
    place: str,
    *,
    base: str | None = None,
    item_column: str | None = None,
    key: str | None = None,
    keep: Sequence[str] = (),
    where: str | None = None,
    csv: Mapping[str, Any] | None = None,
) -> CocoList:
    """The list at a path or URL. Relative names begin in base (by default its own folder), or in ``images/`` there.

    key: ``image_id``, else a picture's key is its name. keep: some of :data:`COLUMNS`, else all. Raises SpecError for
    a file that is not COCO's or contradicts itself, and for options that it has no use for.
    """
    asked = {"item_column": item_column, "where": where, "csv": csv}
    if name := next((name for name, given in asked.items() if given), None):
        raise SpecError(f"{name}: is for tables, and {key_of(place)} is taken for COCO JSON")
    if key not in (None, "image_id"):
        raise SpecError(f"key: {key_of(place)} is taken for COCO JSON; its pictures have file_name or image_id as keys")
    for name in keep if tuple(keep) != ("*",) else ():
        if name not in COLUMNS:
            raise SpecError(
                f"keep: {key_of(place)} is taken for COCO JSON, which gives no {name!r}{did_you_mean(name, COLUMNS)}",
                hint=f"There are {', '.join(COLUMNS)}; without keep, all of them.",
            )
    folder, _, name = place.rpartition("/")
    store = open_store(folder or "/")
    try:
        size, mark = store.marked(name)
    except SourceNotFoundError:
        raise SourceNotFoundError(f"there is no list {key_of(place)}") from None
    if size > _MOST_BYTES:
        raise SpecError(
            f"{key_of(place)} has {size:,} bytes, and COCO JSON of up to {_MOST_BYTES:,} is read",
            hint="Make several files of it, or a table of its pictures for --items.",
        )
    found = _read(place, mark)
    kept = tuple(keep) if keep and tuple(keep) != ("*",) else COLUMNS
    base = base.rstrip("/") if base is not None else folder
    return CocoList(place, mark, base, key, kept, found.image_ids, found.annotation_ids)


@dataclass(frozen=True)
class CocoList(ItemList):
    """Make it with :func:`open_coco`. mark: of its content. image_ids, annotation_ids: the Arrow types of these."""

    place: str
    mark: str
    base: str
    key: str | None
    keep: tuple[str, ...]
    image_ids: str
    annotation_ids: str

    @property
    def columns(self) -> Mapping[str, str]:
        kinds = dict(
            zip(
                COLUMNS,
                (self.image_ids, f"list<{self.annotation_ids}>", "list<string>", "list<list<float64>>", "list<bool>"),
                strict=True,
            )
        )
        return {name: kinds[name] for name in self.keep}

    def remark(self) -> str | None:
        """See :meth:`ItemList.remark`."""
        return _read(self.place, self.mark).remark

    def pages(self, at: Any = None) -> Iterator[Page]:
        """See :meth:`ItemList.pages`. ``at`` is the number of a picture, from 0."""
        import pyarrow as pa

        found = _read(self.place, self.mark)
        ids = {"int64": pa.int64(), "string": pa.string()}
        lists = (ids[self.annotation_ids], pa.string(), pa.list_(pa.float64()), pa.bool_())
        types = dict(zip(COLUMNS, (ids[self.image_ids], *map(pa.list_, lists)), strict=True))
        prefix = self._prefix(found.pictures)
        file = self.place.rpartition("/")[2]
        for start in range(at or 0, len(found.pictures), PAGE):
            some = found.pictures[start : start + PAGE]
            references: list[str | ItemError] = []
            keys = []
            for number, (image_id, name, url) in enumerate(some, start + 1):
                reference = _reference(name, url, prefix)
                references.append(reference)
                if self.key is not None:
                    keys.append(str(image_id))
                elif isinstance(reference, ItemError):
                    keys.append(f"{file}#{number}")
                else:
                    keys.append(mask(name or url or ""))
            kept = {name: pa.array([found.values(name, each[0]) for each in some], types[name]) for name in self.keep}
            yield Page(start, references, keys, pa.table(kept))
        store, name = open_store(self.place.rpartition("/")[0] or "/"), file
        store.check_mark(name, self.mark)

    def _prefix(self, pictures: Sequence[_Picture]) -> Callable[[str], str | None]:
        """Tells what a picture's name is preceded by, within the base; None where there is no such file.

        Of this machine, each file is looked for; in a bucket, the first one decides for all.
        """
        if not is_url(self.base):
            within = [(each, posixpath.join(self.base, each)) for each in _PREFIXES]
            return lambda name: next((each for each, folder in within if (Path(folder) / name).exists()), None)
        first = next((name for _, name, _ in pictures if name and not is_url(name)), None)
        if first is None or is_web(self.base):
            return lambda _: ""
        store = open_store(self.base)
        prefix = next((each for each in _PREFIXES if store.exists(posixpath.join(each, first))), None)
        return lambda _: prefix


_PREFIXES = ("", f"{_FOLDER}/")
_Picture = tuple[Any, str | None, str | None]
"""Its id, its file's name, and its URL."""


def _reference(name: str | None, url: str | None, prefix: Callable[[str], str | None]) -> str | ItemError:
    if not name and not url:
        return ItemError("the picture has neither file_name nor coco_url", stage="read")
    if not name or is_url(name):
        return name or url or ""
    if "\0" in name:
        return ItemError(f"{name[:80]!r} is no reference to a file", stage="read")
    found = prefix(name)
    return url if found is None and url else (found or "") + name


@dataclass(frozen=True, slots=True)
class _Content:
    """What a file says. annotated: by picture's id, the id, label, box and crowd of each annotation."""

    pictures: list[_Picture]
    annotated: dict[Any, list[tuple[Any, str | None, list[float] | None, bool]]]
    image_ids: str
    annotation_ids: str
    remark: str | None

    def values(self, column: str, image_id: Any) -> Any:
        """The value of one of :data:`COLUMNS` for a picture."""
        if column == "image_id":
            return image_id if self.image_ids == "int64" else str(image_id)
        at = COLUMNS.index(column) - 1
        found = [each[at] for each in self.annotated.get(image_id, ())]
        return [None if each is None else str(each) for each in found] if self._as_text(column) else found

    def _as_text(self, column: str) -> bool:
        return column == "annotation_ids" and self.annotation_ids == "string"


@lru_cache(maxsize=1)
def _read(place: str, mark: str) -> _Content:
    """The content of a file. Raises SpecError, StorageError."""
    folder, _, name = place.rpartition("/")
    content = open_store(folder or "/").read(name, mark=mark)
    shown = key_of(place)
    try:
        found = json.loads(content, object_hook=_without_masks)
    except (ValueError, RecursionError) as error:
        raise SpecError(
            f"{shown} is no JSON: {error}",
            hint="An object in a file .json is taken for COCO's. Other lists are .jsonl, .csv, .parquet or .txt.",
        ) from None
    return _understood(found, shown)


def _without_masks(read: dict[str, Any]) -> dict[str, Any]:
    """An object of the file without polygons and RLE, which are most of it: whether there are any is left."""
    if "segmentation" in read:
        read["segmentation"] = bool(read["segmentation"])
    return read


def _understood(found: Any, shown: str) -> _Content:
    images = found.get("images") if isinstance(found, dict) else None
    if not isinstance(images, list):
        raise SpecError(
            f"{shown} is not COCO JSON: it has no list 'images'",
            hint='COCO JSON is {"images": [...], "annotations": [...], "categories": [...]}. '
            "Other lists are .jsonl, .csv, .parquet or .txt.",
        )
    parts = {name: found.get(name) or [] for name in ("annotations", "categories")}
    for name, rows in {"images": images, **parts}.items():
        odd = next((each for each in rows if not isinstance(each, dict)), None) if isinstance(rows, list) else rows
        if odd is not None:
            raise SpecError(f"{shown} is not COCO JSON: {name} should be a list of objects, and has {str(odd)[:40]!r}")
    ids = _ids(images, "images", shown)
    names = dict(zip(_ids(parts["categories"], "categories", shown), parts["categories"], strict=True))
    notes = _Notes()
    annotated: dict[Any, list[Any]] = {}
    known = set(ids)
    seen: set[Any] = set()
    for each in parts["annotations"]:
        number, image_id, category = each.get("id"), each.get("image_id"), each.get("category_id")
        if not _is_id(image_id) or image_id not in known:
            notes.add("is of a picture that is not listed, and left out", f"image_id {image_id!r}")
            continue
        if number is not None and not _is_id(number):
            number = json.dumps(number)
        if number in seen:
            notes.add("has the id of another", repr(number))
        elif number is not None:
            seen.add(number)
        label = names[category].get("name") if _is_id(category) and category in names else None
        if label is None:
            notes.add("has no label: its category is not listed", f"category_id {category!r}")
        box = _box(each.get("bbox"))
        if box is None:
            notes.add("has no box: bbox is not x, y, width and height", f"annotation {number!r}")
        if each.get("segmentation"):
            notes.add("has a mask (polygons or RLE), which is not kept", f"annotation {number!r}")
        crowd = bool(each.get("iscrowd"))
        annotated.setdefault(image_id, []).append((number, None if label is None else str(label), box, crowd))
    pictures: list[_Picture] = [
        (image_id, _text(each.get("file_name")), _text(each.get("coco_url")))
        for image_id, each in zip(ids, images, strict=True)
    ]
    return _Content(pictures, annotated, _kind(ids), _kind(seen), notes.said(len(parts["annotations"])))


@dataclass(slots=True)
class _Notes:
    """What is to be told of annotations. counts: how many of each. first: an example of each."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, which: str) -> None:
        self.counts[what] += 1
        self.first.setdefault(what, which)

    def said(self, total: int) -> str | None:
        parts = [f"{count:,} {what} ({self.first[what]})" for what, count in sorted(self.counts.items())]
        return f"of {total:,} annotations: {'; '.join(parts)}" if parts else None


def _ids(rows: Sequence[Mapping[str, Any]], name: str, shown: str) -> list[Any]:
    """The ids of pictures or categories. Raises SpecError where one has none, or that of another."""
    ids = [each.get("id") for each in rows]
    if (odd := next((n for n, each in enumerate(ids) if not _is_id(each)), None)) is not None:
        raise SpecError(f"{shown} is not COCO JSON: the id of {name} {odd + 1} is {ids[odd]!r}, no number or text")
    twice = [each for each, count in Counter(ids).items() if count > 1]
    if twice:
        more = f" and {len(twice) - _SHOWN:,} others" if len(twice) > _SHOWN else ""
        raise SpecError(
            f"{shown}: several {name} have the same id: {', '.join(map(repr, twice[:_SHOWN]))}{more}",
            hint="What an annotation is about is not known then. Number them anew, where files were put together.",
        )
    return ids


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _kind(ids: Any) -> str:
    """The Arrow type of ids."""
    return "int64" if all(isinstance(each, int) and abs(each) < 2**63 for each in ids) else "string"


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _box(given: Any) -> list[float] | None:
    """``x, y, width, height`` as ``xmin, ymin, xmax, ymax``; None if it is none."""
    if not isinstance(given, list) or len(given) != 4:
        return None
    if not all(isinstance(each, (int, float)) and not isinstance(each, bool) and math.isfinite(each) for each in given):
        return None
    x, y, width, height = map(float, given)
    return None if width < 0 or height < 0 else [x, y, x + width, y + height]
