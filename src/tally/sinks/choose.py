"""From what the user wrote after ``--out`` to the sink that writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from tally.errors import SpecError
from tally.sinks.files import KINDS, FilesSink
from tally.sinks.rows import RowsSink
from tally.sinks.staging import Place, StagedSink
from tally.storage import is_url, key_of, local_of

ROWS = {".csv": "csv", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
"""Suffixes of a merged file of rows, and the format that each means."""

_PICTURES = ("jpg", "png", "webp")
# What looks like one file but cannot be written; a folder of that name would surprise.
_FILES = frozenset(
    {".gz", ".zst", ".bz2", ".zip", ".tar", ".json", ".tsv", ".txt", ".xlsx", ".xls", ".db", ".sqlite", ".duckdb"}
    | {".feather", ".arrow", ".avro", ".orc", ".yaml", ".html", ".pdf"}
    | {".mp4", ".mkv", ".mov", ".avi", ".webm", ".gif", ".bmp", ".tif", ".tiff"}
)


def choose(
    out: str,
    *,
    output: Literal["rows", "image"],
    format: str | None = None,  # noqa: A002
    columns: Mapping[str, str] | None = None,
) -> StagedSink:
    """The sink for an output place. Nothing is created or contacted yet.

    out: a folder or a URL of one; for rows also one file that ends in .csv, .parquet, .jsonl or .ndjson.
    output: what the scorer gives. columns: those that it declares.
    format: ``parquet``, ``csv`` or ``jsonl`` for rows, ``jpg``, ``png`` or ``webp`` for pictures; None takes
    Parquet, or the file's own; pictures go by their item's name.
    Raises SpecError where these do not fit together.
    """
    path = local_of(out) if out.startswith("file://") else out
    if key_of(path) != path:
        raise SpecError(f"the output {key_of(path)!r} is not valid UTF-8", hint="Choose a name that is.")
    suffix = "" if path.endswith("/") else PurePosixPath(path).suffix.lower()
    local = None if is_url(path) else Path(path)
    wanted = {"jpeg": "jpg", "ndjson": "jsonl"}.get(format or "", format)
    merged = ROWS.get(suffix)
    _check(out, local, suffix, output, wanted)
    if output == "image":
        return FilesSink(Place(path), wanted)
    if merged is None:
        return RowsSink(Place(path), wanted or "parquet", columns)
    if local is not None:
        return RowsSink(Place(str(local.absolute().parent), local.name), merged, columns)
    root, _, name = path.rpartition("/")
    return RowsSink(Place(root, name), merged, columns)


def _check(out: str, local: Path | None, suffix: str, output: str, wanted: str | None) -> None:
    merged = ROWS.get(suffix)
    allowed = _PICTURES if output == "image" else tuple(dict.fromkeys(ROWS.values()))
    if wanted is not None and wanted not in allowed:
        what = "pictures" if output == "image" else "rows"
        raise SpecError(f"{what} cannot be written as {wanted!r}", hint=f"Formats are {', '.join(allowed)}.")
    if output == "image":
        if merged or suffix in KINDS or suffix in _FILES or (local is not None and local.is_file()):
            raise SpecError(
                f"the scorer gives pictures, and {out!r} is one file", hint="Give a folder: --out pictures/"
            )
        return
    if merged and wanted not in (None, merged):
        raise SpecError(f"{out!r} cannot be written as {wanted!r}", hint="Leave --format out, or give a folder.")
    if merged and local is not None and local.is_dir():
        raise SpecError(
            f"{out!r} is a folder, and its name says that it is one file",
            hint=f"End it with a slash to write into the folder: --out {out}/",
        )
    if not merged and (suffix in _FILES or suffix in KINDS or (local is not None and local.is_file())):
        what = "is a file" if local is not None and local.is_file() else "looks like one file"
        raise SpecError(
            f"{out!r} {what}, and is none of .csv, .parquet, .jsonl",
            hint="Give a folder, or one file that ends in .csv, .parquet or .jsonl.",
        )
