"""Every form that items come in, small, for tests that have them read from anywhere: what comes out is the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tests.archives import PACKERS
from tests.tables import COLUMNS
from tests.tables import FORMS as TABLES
from tests.videos import picture

from tally.scorers.base import Input

SCRIPT = """import hashlib

import numpy as np

import tally


class Held(tally.Scorer):
    '''Says what each item holds, by its hash; of a row, its value.'''

    def __init__(self, input="image"):
        self.input = input
        self.columns = {"held": "string"}
        if input == "table":
            self.features = ("v",)

    def score(self, batch):
        if self.input == "table":
            return [{"held": str(value)} for value in batch["v"].to_pylist()]
        return [{"held": hashlib.sha256(np.ascontiguousarray(each)).hexdigest()} for each in batch]
"""


@dataclass(frozen=True)
class Form:
    """files: names and contents. named: what of them is the source; empty: the folder. input: what the model is given.
    options: of the job. count: of the items."""

    files: Callable[[], Mapping[str, bytes]]
    named: str
    input: Input
    count: int
    options: Mapping[str, str] = field(default_factory=dict)

    def words(self, place: str) -> list[str]:
        """Of the command: the source at a place, and its options."""
        source = f"{place}/{self.named}".rstrip("/")
        asked = [word for name, value in self.options.items() for word in (f"--{name}", value)]
        return [source, *asked, "--set", f"input={self.input}"]


def pictures(count: int) -> list[bytes]:
    return [encoded(picture(number)) for number in range(count)]


def encoded(array: Any) -> bytes:
    file = BytesIO()
    Image.fromarray(np.asarray(array)).save(file, "png")
    return file.getvalue()


def animation(kind: str, count: int = 12) -> bytes:
    """kind: ``gif``, ``png`` (APNG) or ``webp``."""
    first, *others = [Image.fromarray(picture(number)) for number in range(count)]
    more: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    file = BytesIO()
    first.save(file, kind, save_all=True, append_images=others, duration=40, **more)
    return file.getvalue()


def numbered(count: int = 12) -> dict[str, bytes]:
    return {f"frame_{number:04}.png": content for number, content in enumerate(pictures(count), 1)}


def coco(count: int = 12) -> dict[str, bytes]:
    """The annotations, and the pictures in a folder of their own."""
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(count)]
    boxes = [
        {"id": 100 + number, "image_id": number, "category_id": 1 + number % 2, "bbox": [number, 1, 2, 3]}
        for number in range(count)
    ]
    kinds = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    described = {"images": images, "annotations": boxes, "categories": kinds}
    named = {f"images/{number}.png": content for number, content in enumerate(pictures(count))}
    return {"instances.json": json.dumps(described).encode(), **named}


def members(count: int = 12) -> dict[str, bytes]:
    """Pictures, each with a class beside it."""
    found = {}
    for number, content in enumerate(pictures(count)):
        found |= {f"{number:03}.png": content, f"{number:03}.cls": b"%d" % (number % 3)}
    return found


def in_parquet(count: int = 12) -> bytes:
    rows = [{"bytes": content, "path": f"{number}.png"} for number, content in enumerate(pictures(count))]
    file = BytesIO()
    pq.write_table(pa.table({"image": rows, "label": range(count)}), file, row_group_size=4)
    return file.getvalue()


def hive(count: int = 600) -> dict[str, bytes]:
    found = {}
    for region in ("eu", "us"):
        file = BytesIO()
        pq.write_table(pa.table({"v": [number + 0.5 for number in range(count // 2)]}), file, row_group_size=100)
        found[f"region={region}/{region}_7.parquet"] = file.getvalue()
    return found


def _alone(name: str, make: Callable[[], bytes]) -> Callable[[], Mapping[str, bytes]]:
    return lambda: {name: make()}


FORMS: dict[str, Form] = {
    "gif": Form(lambda: {"a.gif": animation("gif")}, "a.gif", "image", 12, {"media": "video"}),
    "apng": Form(lambda: {"a.apng": animation("png")}, "a.apng", "image", 12, {"media": "video"}),
    "webp": Form(lambda: {"a.webp": animation("webp")}, "a.webp", "image", 12, {"media": "video"}),
    "numbered": Form(numbered, "frame_%04d.png", "image", 12, {"fps": "25"}),
    "coco": Form(coco, "instances.json", "image", 12, {"keep": "annotation_labels,annotation_boxes"}),
    "parquet": Form(lambda: {"a.parquet": in_parquet()}, "a.parquet", "image", 12, {"keep": "label"}),
    **{
        kind: Form(_alone(f"a.{kind}", lambda pack=pack: pack(members())), f"a.{kind}", "image", 12, {"keep": "cls"})  # type: ignore[misc]
        for kind, pack in PACKERS.items()
        if kind != "tgz"
    },
    "hive": Form(hive, "", "table", 600, {"keep": "region,n", "path-columns": "{area}_{n}.parquet"}),
    **{
        name.partition(".")[2]: Form(_alone(name, make), name, "table", len(COLUMNS["v"]), {"keep": "id"})
        for name, make in TABLES.items()
        if name.startswith("r.") and name not in ("r.csv.bz2", "r.csv.xz", "r.csv.zip", "r.json.gz")
    },
}
