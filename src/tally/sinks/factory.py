"""From what the user wrote after ``--out`` to the sink that writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from tally.errors import SpecError
from tally.media.video.encode import DEFAULTS, Encoding
from tally.sinks.files import KINDS, FilesSink
from tally.sinks.layout import OutputLayout
from tally.sinks.rows import RowsSink
from tally.sinks.staging import StagedSink
from tally.sinks.video import KINDS as VIDEOS
from tally.sinks.video import VideoSink
from tally.storage import is_url, key_of, local_of

ROWS = {".csv": "csv", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
"""Suffixes of a merged file of rows, and the format that each means."""

_FORMATS = {
    "rows": ("rows", ("csv", "parquet", "jsonl")),
    "image": ("pictures", ("jpg", "png", "webp")),
    "video": ("video", tuple(dict.fromkeys(VIDEOS.values()))),
}
# What looks like one file but cannot be written; a folder of that name would surprise.
_FILES = frozenset(
    {".gz", ".zst", ".bz2", ".zip", ".tar", ".json", ".tsv", ".txt", ".xlsx", ".xls", ".db", ".sqlite", ".duckdb"}
    | {".feather", ".arrow", ".avro", ".orc", ".yaml", ".html", ".pdf"}
    | {*VIDEOS, ".avi", ".ts", ".gif", ".bmp", ".tif", ".tiff"}
)


def sink_for(
    out: str,
    *,
    output: Literal["rows", "image", "video"],
    format: str | None = None,  # noqa: A002
    columns: Mapping[str, str] | None = None,
    order: str | None = None,
    codec: str | None = None,
    crf: float | None = None,
    audio: bool = True,
) -> StagedSink:
    """The sink for an output place. Nothing is created or contacted yet.

    out: a folder or a URL of one; for rows also one file that ends in .csv, .parquet, .jsonl or .ndjson, for video
    one that ends in .mp4, .m4v, .mov, .mkv or .webm.
    output: what the scorer gives: ``video`` for pictures that are put together. columns: those that it declares, and
    those of the source. order: of rows; see :class:`RowsSink`.
    format: ``parquet``, ``csv`` or ``jsonl`` for rows, ``jpg``, ``png`` or ``webp`` for pictures, ``mp4``, ``mov``,
    ``mkv`` or ``webm`` for video; None takes Parquet, MP4, or the file's own; pictures go by their item's name.
    codec, crf: of video; see :class:`Encoding` and :meth:`VideoSink.check`. audio: whether sound is kept.
    Raises SpecError where these do not fit together.
    """
    path = local_of(out) if out.startswith("file://") else out
    if key_of(path) != path:
        raise SpecError(f"the output {key_of(path)!r} is not valid UTF-8", hint="Choose a name that is.")
    suffix = "" if path.endswith("/") else PurePosixPath(path).suffix.lower()
    local = None if is_url(path) else Path(path)
    wanted = {"jpeg": "jpg", "ndjson": "jsonl"}.get(format or "", format)
    one = {"rows": ROWS, "image": {}, "video": VIDEOS}[output]
    merged = one.get(suffix)
    _check(out, local, suffix, output, wanted)
    if merged is None:
        layout = OutputLayout(path)
    elif local is not None:
        layout = OutputLayout(str(local.absolute().parent), local.name)
    else:
        root, _, name = path.rpartition("/")
        layout = OutputLayout(root, name)
    if output == "image":
        return FilesSink(layout, wanted, columns)
    if output == "video":
        kind = merged or wanted or "mp4"
        return VideoSink(layout, kind, Encoding(codec or DEFAULTS[kind], crf), audio=audio)
    return RowsSink(layout, merged or wanted or "parquet", columns, order)


def _check(out: str, local: Path | None, suffix: str, output: str, wanted: str | None) -> None:
    what, formats = _FORMATS[output]
    if wanted is not None and wanted not in formats:
        raise SpecError(f"{what} cannot be written as {wanted!r}", hint=f"Formats are {', '.join(formats)}.")
    if output == "image":
        if suffix in ROWS or suffix in KINDS or suffix in _FILES or (local is not None and local.is_file()):
            raise SpecError(
                f"the scorer gives pictures, and {out!r} is one file", hint="Give a folder: --out pictures/"
            )
        return
    one = ROWS if output == "rows" else VIDEOS
    merged = one.get(suffix)
    if merged and wanted not in (None, merged):
        raise SpecError(f"{out!r} cannot be written as {wanted!r}", hint="Leave --format out, or give a folder.")
    if merged and local is not None and local.is_dir():
        raise SpecError(
            f"{out!r} is a folder, and its name says that it is one file",
            hint=f"End it with a slash to write into the folder: --out {out}/",
        )
    if not merged and (
        suffix in ROWS or suffix in _FILES or suffix in KINDS or (local is not None and local.is_file())
    ):
        is_file = "is a file" if local is not None and local.is_file() else "looks like one file"
        *some, last = [f".{each}" for each in formats]
        raise SpecError(
            f"{out!r} {is_file}, and is none of {', '.join([*some, last])}",
            hint=f"Give a folder, or one file that ends in {', '.join(some)} or {last}.",
        )
