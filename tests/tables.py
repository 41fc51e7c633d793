"""A small table in every form that tables come in, made anew each time."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pyarrow as pa
from pyarrow import feather, orc
from tests.services import require

ROWS = 3000
COLUMNS = {"id": list(range(ROWS)), "v": [number + 0.5 for number in range(ROWS)]}


def zstd(content: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as out:
        out.write(content)
    return bytes(packed.getvalue().to_pybytes())


def zipped(content: bytes, *names: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names or ("readings.csv",):
            archive.writestr(name, content)
    return packed.getvalue()


def delimited() -> bytes:
    return b"id,v\n" + b"".join(b"%d,%.1f\n" % row for row in zip(*COLUMNS.values(), strict=True))


def objects(**style: Any) -> bytes:
    rows = [{"id": one, "v": other} for one, other in zip(*COLUMNS.values(), strict=True)]
    return json.dumps(rows, **style).encode()


def excel(rows: list[list[Any]] | None = None, *, more: str = "") -> bytes:
    require("openpyxl", find_spec("openpyxl") is not None)
    import openpyxl

    book = openpyxl.Workbook()
    for row in rows or [list(COLUMNS), *map(list, zip(*COLUMNS.values(), strict=True))]:
        book.active.append(row)
    if more:
        book.create_sheet(more).append(["x"])
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def avro() -> bytes:
    require("fastavro", find_spec("fastavro") is not None)
    import fastavro

    fields = [{"name": "id", "type": "long"}, {"name": "v", "type": ["null", "double"]}]
    out = io.BytesIO()
    rows = [{"id": one, "v": other} for one, other in zip(*COLUMNS.values(), strict=True)]
    fastavro.writer(out, {"type": "record", "name": "reading", "fields": fields}, rows, sync_interval=4000)
    return out.getvalue()


def written(write: Callable[[pa.Table, Any], None]) -> bytes:
    out = pa.BufferOutputStream()
    write(pa.table(COLUMNS), out)
    return bytes(out.getvalue().to_pybytes())


FORMS: dict[str, Callable[[], bytes]] = {
    "r.csv.gz": lambda: gzip.compress(delimited()),
    "r.csv.bz2": lambda: bz2.compress(delimited()),
    "r.csv.xz": lambda: lzma.compress(delimited()),
    "r.csv.zst": lambda: zstd(delimited()),
    "r.csv.zip": lambda: zipped(delimited()),
    "gzip.csv": lambda: gzip.compress(delimited()),
    "zstd.csv": lambda: zstd(delimited()),
    "r.json": objects,
    "indented.json": lambda: objects(indent=2),
    "r.json.gz": lambda: gzip.compress(objects()),
    "r.orc": lambda: written(orc.write_table),
    "r.feather": lambda: written(feather.write_feather),
    "r.avro": avro,
    "r.xlsx": excel,
}
