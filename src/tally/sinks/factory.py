"""The sink for what the user wrote after ``--out``, and later the same sink from its description.

A new kind of output is one file and one line in :data:`BUILT_IN`. An installed package adds another by an entry point
in the group ``tally.sinks``, whose name is a URL scheme (``mything`` for ``mything://...``) and whose value takes an
:class:`OutputDescription` and returns a :class:`Sink`, for writing as well as for reading later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias

from tally import extensions
from tally.errors import SpecError
from tally.sinks.base import OutputDescription, Sink
from tally.sinks.formats import PICTURES, ROWS, VIDEOS
from tally.sinks.layout import OutputLayout
from tally.storage import foreign_scheme, is_url, is_web, key_of, local_of, normalised

GROUP = "tally.sinks"
"""The entry points of other packages' sinks."""

_FORMATS = {
    "rows": ("rows", ("csv", "parquet", "jsonl")),
    "image": ("pictures", ("jpg", "png", "webp")),
    "video": ("video", tuple(dict.fromkeys(VIDEOS.values()))),
}
_ONE_FILE: dict[str, Mapping[str, str]] = {"rows": ROWS, "images": {}, "video": VIDEOS}
"""Suffixes of outputs that are one file, and the format that each means, by kind of output."""

# Names like that of one file, which cannot be written. A folder of that name would surprise.
_FILES = frozenset(
    {".gz", ".zst", ".bz2", ".zip", ".tar", ".json", ".tsv", ".txt", ".xlsx", ".xls", ".db", ".sqlite", ".duckdb"}
    | {".feather", ".arrow", ".avro", ".orc", ".yaml", ".html", ".pdf"}
    | {*VIDEOS, ".avi", ".ts", ".gif", ".bmp", ".tif", ".tiff"}
)


Factory: TypeAlias = Callable[[OutputDescription], Sink]


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
    escape_formulas: bool = False,
    thumbnails: bool = False,
) -> Sink:
    """The sink for what the user wrote after ``--out``. Nothing is created or contacted yet.

    out: a folder or a URL of one; for rows also one file that ends in .csv, .parquet, .jsonl or .ndjson, for video
    one that ends in .mp4, .m4v, .mov, .mkv or .webm; or a URL with the scheme of an installed package's sink.
    output: what the scorer gives; ``video`` for pictures that become a video. columns: those of the source and those
    that the scorer declares. order: the column of the source that rows are sorted by; see :class:`RowsSink`.
    format: ``parquet``, ``csv`` or ``jsonl`` for rows, ``jpg``, ``png`` or ``webp`` for pictures, ``mp4``, ``mov``,
    ``mkv`` or ``webm`` for video. None means that of the file's suffix, else Parquet or MP4; for pictures, that of each
    item's name.
    escape_formulas: of CSV; thumbnails: of rows and pictures; see :class:`RowsSink`.
    codec, crf: of video; see :class:`Encoding` and :meth:`VideoSink.check`. audio: whether to keep sound.
    Raises SpecError if these do not fit together.
    """
    kind: Literal["rows", "images", "video"] = "images" if output == "image" else output
    wanted = {"jpeg": "jpg", "ndjson": "jsonl"}.get(format or "", format)
    options: dict[str, Any] = {"codec": codec, "crf": crf, "audio": audio} if output == "video" else {}
    if escape_formulas:
        options["escape_formulas"] = True
    if thumbnails:
        options["thumbnails"] = True
    described = OutputDescription(kind, normalised(out), False, wanted, columns, order, options)
    if (scheme := foreign_scheme(out)) is not None and (factory := _foreign(scheme)) is not None:
        if thumbnails:
            raise SpecError(
                f"thumbnails: are files beside results, and {out} is not kept as files",
                hint="Give a folder, or the URL of one in a bucket.",
            )
        return extensions.call(GROUP, scheme, factory, described)
    if is_web(out):
        raise SpecError(
            f"out: results are not written to the web: {out}",
            hint="Write to a folder, or to a bucket: s3://, gs:// or az://. --push sends rows to a web address.",
        )
    path = local_of(out) if out.startswith("file://") else out
    if key_of(path) != path:
        raise SpecError(f"the output {key_of(path)!r} is not valid UTF-8", hint="Choose a name that is.")
    suffix = _suffix(path)
    merged = _ONE_FILE[kind].get(suffix)
    if escape_formulas and "csv" not in (merged, wanted):
        raise SpecError("escape_formulas: is for results in CSV", hint="Write to a .csv file, or say --format csv.")
    _check(out, None if is_url(path) else Path(path), suffix, output, wanted)
    return BUILT_IN[kind](replace(described, merged=merged is not None, format=merged or wanted))


def reopen(description: OutputDescription) -> Sink:
    """The sink of an output from its description, for reading, releasing or removing; without model and source.

    Raises SpecError if the package that wrote the output is not installed any more.
    """
    if (scheme := foreign_scheme(description.place)) is not None:
        if (factory := _foreign(scheme)) is None:
            raise SpecError(
                f"{description.place}: no installed package brings {scheme}:// outputs",
                hint="Install the one that wrote this output.",
            )
        return extensions.call(GROUP, scheme, factory, description)
    if description.merged is None:
        merged = _suffix(description.place) in _ONE_FILE[description.kind]
        description = replace(description, merged=merged, place=normalised(description.place))
    return BUILT_IN[description.kind](description)


def _suffix(out: str) -> str:
    """The suffix of an output, in lower case; empty if a slash at the end marks a folder."""
    return "" if out.endswith("/") else PurePosixPath(out).suffix.lower()


def _foreign(scheme: str) -> Factory | None:
    """The factory of an installed package for URLs of this scheme, if there is one."""
    found: Factory | None = extensions.find(GROUP, scheme)
    return found


# What a kind of sink imports takes time: only that of the kind at hand is imported.


def _rows(description: OutputDescription) -> Sink:
    from tally.sinks.rows import RowsSink

    layout = _layout(description)
    if description.options.get("guessed"):  # of a job from before outputs were described: its plan or manifest tells
        published = layout.read_json(layout.plan) or layout.read_json(layout.manifest) or {}
        if published.get("output") == "image":
            return _pictures(replace(description, options={}))
    return RowsSink(
        layout,
        description.format or "parquet",
        description.columns,
        description.order,
        escape_formulas=description.options.get("escape_formulas", False),
        thumbnails=description.options.get("thumbnails", False),
    )


def _pictures(description: OutputDescription) -> Sink:
    from tally.sinks.files import FilesSink

    thumbnails = description.options.get("thumbnails", False)
    return FilesSink(_layout(description), description.format, description.columns, thumbnails=thumbnails)


def _video(description: OutputDescription) -> Sink:
    from tally.media.video.encode import DEFAULTS, Encoding
    from tally.sinks.video import VideoSink

    kind, options = description.format or "mp4", description.options
    encoding = Encoding(options.get("codec") or DEFAULTS[kind], options.get("crf"))
    return VideoSink(_layout(description), kind, encoding, audio=options.get("audio", True))


def _layout(description: OutputDescription) -> OutputLayout:
    if not description.merged:
        return OutputLayout(description.place)
    folder, _, name = description.place.rpartition("/")
    return OutputLayout(folder or "/", name)


BUILT_IN: dict[str, Factory] = {"rows": _rows, "images": _pictures, "video": _video}
"""By :attr:`OutputDescription.kind`, for folders, files and object stores."""


def _check(out: str, local: Path | None, suffix: str, output: str, wanted: str | None) -> None:
    what, formats = _FORMATS[output]
    if wanted is not None and wanted not in formats:
        raise SpecError(f"{what} cannot be written as {wanted!r}", hint=f"Formats are {', '.join(formats)}.")
    if output == "image":
        if suffix in ROWS or suffix in PICTURES or suffix in _FILES or (local is not None and local.is_file()):
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
        suffix in ROWS or suffix in _FILES or suffix in PICTURES or (local is not None and local.is_file())
    ):
        is_file = "is a file" if local is not None and local.is_file() else "looks like one file"
        *some, last = [f".{each}" for each in formats]
        raise SpecError(
            f"{out!r} {is_file}, and is none of {', '.join([*some, last])}",
            hint=f"Give a folder, or one file that ends in {', '.join(some)} or {last}.",
        )
