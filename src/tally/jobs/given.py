"""Items that are given and not named: a list on standard input, values of a Python program.

They are kept in Tally's home, under the hash of what they are: the same items are the same job, which can be resumed.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from tally.config import make_private, settings
from tally.errors import SpecError, StorageError
from tally.masking import mask
from tally.sources.listing import is_archive, is_table, is_video
from tally.storage import is_url, is_web, temporary
from tally.text import did_you_mean, expanded

_BLOCK = 1 << 20


def given_folder() -> Path:
    """Where items are kept that were given to this user's commands and programs."""
    return settings().home / "given"


def kept_list(stream: BinaryIO, *, lines: bool) -> Path:
    """A list that is read to its end, and kept.

    lines: one reference on each; else it has columns, as JSON Lines or CSV.
    Raises SpecError if it is empty, StorageError.
    """
    folder = given_folder()
    try:
        make_private(folder)
        with temporary.folder("list", within=folder) as new:
            digest, beginning = hashlib.sha256(), b""
            with (new / "list").open("wb") as file:
                while block := stream.read(_BLOCK):
                    beginning = beginning or block.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
                    digest.update(block)
                    file.write(block)
            if not beginning:
                raise SpecError(
                    "items: standard input is empty", hint="Pipe a list: ls photos/*.jpg | tally score --items - ..."
                )
            suffix = ".txt" if lines and beginning != b"{" else ".jsonl" if beginning == b"{" else ".csv"
            (new / "list").rename(new / f"list{suffix}")
            return _settled(new, digest.hexdigest()) / f"list{suffix}"
    except OSError as error:
        raise StorageError(f"the list cannot be kept in {folder}: {error}") from error


def _settled(new: Path, digest: str) -> Path:
    """The folder under its hash, where it may be already."""
    kept = new.parent / digest
    try:
        new.rename(kept)
    except OSError:
        if not kept.is_dir():
            raise
    return kept


def is_place(value: object, media: str | None) -> bool:
    """Whether it is text or a path that names a place. A picture of the web is an item, which a list names; a video, a
    table or an archive is a place, and so is all where it is said what it is (``media``)."""
    if not isinstance(value, (str, Path)) or not is_web(str(value)):
        return isinstance(value, (str, Path))
    name = urlsplit(str(value)).path
    return media is not None or is_video(name) or is_table(name) or is_archive(name)


def kept_values(values: Any, item_column: str | None) -> dict[str, Any]:
    """A program's items, kept: the fields of a job that name them.

    values: a table (pandas, Arrow, or any other that gives itself as Arrow), whose rows are the items, or, with
    ``item_column``, the pictures or references of that column; or an iterable of paths, URLs, bytes (of a file), PIL
    pictures and arrays (uint8, of height × width × 3, or height × width).
    Raises SpecError for what is none of these, StorageError.
    """
    folder = given_folder()
    try:
        make_private(folder)
        with temporary.folder("items", within=folder) as new:
            if (table := _as_table(values)) is not None:
                return _kept_table(new, table, item_column)
            if item_column is not None:
                raise SpecError("item_column: is for tables, and the items are given one by one")
            return _kept_one_by_one(new, values)
    except OSError as error:
        raise StorageError(f"the items cannot be kept in {folder}: {error}") from error


def _as_table(values: Any) -> Any:
    """The values as a ``pyarrow.Table``, if they are a table."""
    is_pandas = all(hasattr(values, each) for each in ("columns", "index", "to_parquet"))
    is_arrow = hasattr(values, "__arrow_c_stream__") and (hasattr(values, "schema") or hasattr(values, "columns"))
    if not is_pandas and not is_arrow:
        return None
    import pyarrow as pa

    try:
        return pa.Table.from_pandas(values, preserve_index=False) if is_pandas else pa.table(values)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise SpecError(f"source: the table cannot be given to workers: {error}") from None


def _kept_table(new: Path, table: Any, item_column: str | None) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if item_column is not None and item_column not in table.column_names:
        raise SpecError(
            f"item_column: the table has no column {item_column!r}{did_you_mean(item_column, table.column_names)}"
        )
    pq.write_table(table, new / "table.parquet")
    with (new / "table.parquet").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    place = str(_settled(new, digest) / "table.parquet")
    kind = None if item_column is None else table.schema.field(item_column).type
    if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)):
        return {"source": [place]}
    return {"source": [], "items": place, "base": "."}


_SCHEMA = ("key", "item")


def _kept_one_by_one(new: Path, values: Any) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if alone := _one_item(values):
        raise SpecError(f"source: {alone} is one item, and not several", hint="Give a list that holds it: [item].")
    if isinstance(values, Mapping):
        raise SpecError(
            f"source: {type(values).__name__} names no items: its keys are not taken for their names",
            hint="Give its values, list(items.values()): they are numbered in their order. Files keep their names.",
        )
    try:
        iterator = iter(values)
    except TypeError:
        raise SpecError(
            f"source: {type(values).__name__} names no items, and holds none",
            hint="Give a path or URL, a list of these, or a list of pictures, bytes or values.",
        ) from None
    schema = pa.schema([(name, pa.string()) for name in _SCHEMA])
    digest = hashlib.sha256()
    rows: list[dict[str, str]] = []
    count = 0
    hidden: Counter[str] = Counter()
    with pq.ParquetWriter(new / "list.parquet", schema) as writer:
        for value in iterator:
            row = _kept_item(new, count, value, digest)
            is_masked = is_url(row["item"]) and row["key"] != str(value)
            if is_masked:  # what is not shown may tell it apart
                hidden[row["key"]] += 1
                if (number := hidden[row["key"]]) > 1:
                    row["key"] += f"#{number}"
            digest.update(f"{row}\n".encode("utf-8", "surrogateescape"))
            rows.append(row)
            count += 1
            if len(rows) == _ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema))
    if not count:
        raise SpecError(
            "source: there are no items",
            hint="The list is empty. A generator that was looped over before gives nothing more: make it anew.",
        )
    place = str(_settled(new, digest.hexdigest()) / "list.parquet")
    return {"source": [], "items": place, "item_column": "item", "key": "key"}


_ROWS = 8192


def _one_item(values: Any) -> str | None:
    """What it is, if it is an item that Python would take apart: bytes, or a picture, whose rows are no pictures."""
    if isinstance(values, (bytes, bytearray, memoryview)):
        return type(values).__name__
    if _is_picture(values):
        return f"{type(values).__name__} of {' × '.join(map(str, values.shape))}"
    return None


def _is_picture(value: Any) -> bool:
    """Whether it is an array that is one picture: ``uint8[height, width]``, or with three or four bands."""
    shape: tuple[Any, ...] = getattr(value, "shape", ())
    kind = str(getattr(value, "dtype", ""))
    return kind == "uint8" and (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4)))


def _kept_item(new: Path, number: int, value: Any, digest: Any) -> dict[str, str]:
    """The item's key and where it is: a place, or a file beside the list."""
    if isinstance(value, (str, Path)):
        text = str(value)
        return {"key": mask(text), "item": text if is_url(text) else str(expanded(text).absolute())}
    content = bytes(value) if isinstance(value, (bytes, bytearray, memoryview)) else _as_png(number, value)
    digest.update(hashlib.sha256(content).digest())
    name = f"{number // 1000:06}/{number:09}"
    path = new / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return {"key": f"{number:06}", "item": name}


def _as_png(number: int, value: Any) -> bytes:
    """A picture as a file that keeps each of its pixels."""
    from PIL import Image

    from tally.media import images

    picture = value
    if not isinstance(picture, Image.Image):
        if not _is_picture(value):
            shape, kind = getattr(value, "shape", None), getattr(value, "dtype", "")
            what = type(value).__name__ + ("" if shape is None else f" of {kind}, {' × '.join(map(str, shape))}")
            raise SpecError(
                f"source: item {number} is {what}",
                hint="Items are paths, URLs, bytes of a file, PIL pictures, or arrays of uint8, height × width × 3. "
                "Rows of a table are given as one: pandas.DataFrame(rows).",
            )
        picture = Image.fromarray(value)
    out = io.BytesIO()
    try:
        images.for_png(picture).save(out, "png", compress_level=1)
    except (OSError, ValueError) as error:
        raise SpecError(f"source: item {number}, a picture, cannot be read: {error}") from None
    return out.getvalue()
