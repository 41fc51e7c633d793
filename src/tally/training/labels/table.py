"""Reading a table of labels: one row a picture, with its boxes.

Columns: ``image_url``, whose end names the picture; ``label``, a list (or its text, as Python or JSON writes it) of
boxes ``{label, topX, topY, bottomX, bottomY}``; and ``label_confidence``, if there is one, a list of numbers
from 0 to 1.

Or a detector's results, as a job writes them: a row a box, ``key, xmin, ymin, xmax, ymax, label, score``, in pixels.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import unquote, urlsplit

from PIL import Image

from tally.errors import SpecError
from tally.media.images import suffixes

Units: TypeAlias = Literal["fractions", "pixels"]
"""Of coordinates: fractions of the picture's width and height, as Azure ML's data labelling exports them, or pixels."""

SHOWN = 5
"""Problems that are told, at most."""
_NAMES = ("label", "type")
_CORNERS = ("topX", "topY", "bottomX", "bottomY")
_SIDES = ("xmin", "ymin", "xmax", "ymax")
"""The same in a detector's results."""


@dataclass(frozen=True, slots=True)
class Box:
    """A labelled rectangle, in pixels of the upright picture: ``xmin < xmax``, ``ymin < ymax``."""

    label: str
    xmin: float
    ymin: float
    xmax: float
    ymax: float


@dataclass(frozen=True, slots=True)
class Labelled:
    """A picture and its boxes. width, height: pixels, upright."""

    picture: Path
    width: int
    height: int
    boxes: Sequence[Box]


@dataclass(frozen=True, slots=True)
class LabelTable:
    """A table that was read. empty: boxes without area, in whole pixels, left out. unsure: boxes below the
    confidence, left out. missing: pictures that are not there, left out."""

    pictures: Sequence[Labelled]
    empty: int
    unsure: int
    missing: Sequence[str]


def read(
    table: Path, images: Path, *, units: Units = "fractions", confidence: float = 0.0, skip_missing: bool = False
) -> LabelTable:
    """Read a table (CSV, TSV, Parquet, JSON Lines, or the folder of a job's results) of the pictures below ``images``.

    confidence: boxes below it are left out. skip_missing: leave out pictures that are not there; else that is an error.
    Raises SpecError with the first problems, by row.
    """
    problems: list[str] = []
    found: list[Labelled] = []
    empty = unsure = 0
    missing: list[str] = []
    there = _Pictures(images)
    rows = _rows(table)
    if rows[0].keys() >= _RESULT:
        rows, units = _by_picture(rows), "pixels"
    for number, row in enumerate(rows, 1):
        try:
            picture = there.find(str(row["image_url"]))
            if picture is None:
                missing.append(str(row["image_url"]))
                continue
            width, height = _size(picture)
            boxes = []
            raw = _list(row["label"], "label")
            sure = _list(row.get("label_confidence"), "label_confidence")
            if sure and len(sure) != len(raw):
                raise ValueError(f"label has {len(raw)} boxes, but label_confidence {len(sure)} numbers")
            for each, how_sure in zip(raw, sure or [1.0] * len(raw), strict=True):
                if float(how_sure) < confidence:
                    unsure += 1
                    continue
                box = _box(each, width, height, units)
                if box is None:
                    empty += 1
                else:
                    boxes.append(box)
        except (ValueError, KeyError, TypeError, OSError, SyntaxError) as error:
            what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            problems.append(f"{table.name}, row {number}: {what}")
            continue
        found.append(Labelled(picture, width, height, boxes))
    if missing and not skip_missing:
        some = ", ".join(missing[:SHOWN]) + (" ..." if len(missing) > SHOWN else "")
        problems.append(f"{table.name}: {len(missing):,} pictures are not in {images}: {some}")
    if problems:
        hint = "Say --skip-missing to go on without pictures that are not there." if missing else None
        more = [f"... and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else []
        raise SpecError(problems[:SHOWN] + more, hint=hint)
    return LabelTable(found, empty, unsure, missing)


_RESULT = {"key", *_SIDES, "label"}
"""Columns of a detector's results."""


def _by_picture(boxes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of boxes as rows of pictures."""
    pictures: dict[str, dict[str, Any]] = {}
    for box in boxes:
        row = pictures.setdefault(box["key"], {"image_url": box["key"], "label": [], "label_confidence": []})
        if all(box[name] in (None, "") for name in ("label", *_SIDES)):
            continue  # nothing was found in it
        sides = zip(_CORNERS, _SIDES, strict=True)
        row["label"].append({"label": box["label"], **{name: box[side] for name, side in sides}})
        score = box.get("score")
        row["label_confidence"].append(1.0 if score in (None, "") else score)
    return list(pictures.values())


def _rows(table: Path) -> list[dict[str, Any]]:
    import csv

    suffix = table.suffix.lower()
    try:
        if table.is_dir():
            import pyarrow.parquet as pq

            parts = json.loads((table / "_manifest.json").read_text("utf-8"))["files"]
            rows: list[dict[str, Any]] = [
                row for part in parts for row in pq.read_table(table / part["path"]).to_pylist()
            ]
        elif suffix in (".csv", ".tsv"):
            csv.field_size_limit(1 << 30)
            with table.open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
        elif suffix in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in table.read_text("utf-8").splitlines() if line.strip()]
        elif suffix == ".parquet":
            import pyarrow.parquet as pq

            rows = pq.read_table(table).to_pylist()
        else:
            raise SpecError(
                f"{table} is no table of labels",
                hint="It ends in .csv, .tsv, .parquet or .jsonl, or is a job's folder.",
            )
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{table} cannot be read: {error}") from None
    needed = () if rows and rows[0].keys() >= _RESULT else ("image_url", "label")
    wrong = [name for name in needed if rows and name not in rows[0]]
    if wrong or not rows:
        raise SpecError(
            f"{table} has no column {' and no column '.join(wrong)}" if wrong else f"{table} has no rows",
            hint="A table of labels has the columns image_url and label, and may have label_confidence; results of a "
            "detector have key, xmin, ymin, xmax, ymax and label.",
        )
    return rows


class _Pictures:
    """The pictures below a folder, found by the end of a URL."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_name: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in suffixes() and path.is_file():  # a pipe would be waited for
                self._by_name.setdefault(path.name, []).append(path)

    def find(self, url: str) -> Path | None:
        """The picture whose path has the longest end in common with the URL's. Raises ValueError where two have."""
        parts = [part for part in unquote(urlsplit(url).path if "://" in url else url).split("/") if part]
        candidates = self._by_name.get(parts[-1], []) if parts else []
        count = 2
        while len(candidates) > 1 and count <= len(parts):
            closer = [each for each in candidates if list(each.parts[-count:]) == parts[-count:]]
            if not closer:
                break
            candidates, count = closer, count + 1
        if len(candidates) > 1:
            raise ValueError(f"image_url {url!r} may be {candidates[0]} or {candidates[1]}")
        return candidates[0] if candidates else None


def _size(picture: Path) -> tuple[int, int]:
    """Width and height of the upright picture, in pixels. Raises OSError."""
    with Image.open(picture) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _list(value: Any, name: str) -> list[Any]:
    """A list, or the text of one. Raises ValueError."""
    if isinstance(value, str):
        text = value.strip()
        if not text:
            return []
        try:
            value = json.loads(text)
        except ValueError:
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                raise ValueError(f"{name} is no list: {text[:80]!r}") from None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is no list: {str(value)[:80]!r}")
    return list(value)


def _box(given: Any, width: int, height: int, units: Units) -> Box | None:
    """The box in pixels, within the picture; None if nothing is left of it. Raises ValueError."""
    if not isinstance(given, Mapping):
        raise ValueError(f"a box is {{label, topX, topY, bottomX, bottomY}}, not {str(given)[:80]!r}")
    label = next((given[name] for name in _NAMES if given.get(name) is not None), None)
    if label is None or (lacking := [each for each in _CORNERS if given.get(each) is None]):
        lack = "label" if label is None else ", ".join(lacking)
        raise ValueError(f"a box has no {lack}: {str(dict(given))[:120]}")
    x1, y1, x2, y2 = (float(given[name]) for name in _CORNERS)
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise ValueError(f"a box's corner is no number: {str(dict(given))[:120]}")
    if units == "fractions":
        if max(x1, x2, y1, y2) > 1.5 or min(x1, x2, y1, y2) < -0.5:
            raise ValueError(
                f"a box reaches to {max(x1, x2):g}, {max(y1, y2):g}, which are no fractions of the picture; "
                "say --units pixels if that is what they are"
            )
        x1, x2, y1, y2 = x1 * width, x2 * width, y1 * height, y2 * height
    elif 0 < max(x1, x2, y1, y2) <= 1:
        raise ValueError(
            f"a box reaches to {max(x1, x2):g}, {max(y1, y2):g}, which is one pixel at most; leave out --units pixels "
            "if these are fractions of the picture"
        )
    xmin, xmax = (min(max(each, 0.0), float(width)) for each in sorted((x1, x2)))
    ymin, ymax = (min(max(each, 0.0), float(height)) for each in sorted((y1, y2)))
    # In whole pixels, as most formats have them: what is smaller would be written as a box of nothing.
    there = round(xmin) < round(xmax) and round(ymin) < round(ymax)
    return Box(str(label), xmin, ymin, xmax, ymax) if there else None
