"""From a spec to a job's model, source and sink."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tally.errors import SourceNotFoundError, SpecError
from tally.jobs.spec import JobSpec
from tally.models.load import create
from tally.models.reference import ModelRef
from tally.models.resolve import resolve
from tally.models.route import is_route
from tally.scorers.base import Input, Scorer
from tally.scorers.run import configured
from tally.sinks.base import Sink
from tally.sinks.factory import sink_for
from tally.sources.base import Media, Source
from tally.sources.factory import SourceRequest, source_for
from tally.sources.listing import is_animation, is_archive, is_image, is_video
from tally.sources.patterns import is_pattern
from tally.sources.queues.factory import is_queue
from tally.sources.sql.factory import is_sql
from tally.sources.tables.formats import format_of


@dataclass(frozen=True, slots=True)
class Parts:
    """A job's model, source and sink, made from its spec."""

    model: ModelRef
    source: Source
    sink: Sink
    batch_size: int

    def describe_output(self) -> dict[str, Any]:
        """What the job's row keeps of its output: enough to find, read and remove it without model and source."""
        return {**self.sink.describe().to_json(), "unit": self.source.unit, "endless": not self.source.bounded}


def assemble(spec: JobSpec, model: ModelRef) -> Parts:
    """Make the parts that the spec describes; raises what makes them impossible."""
    if is_route(spec.model):
        _check_route(spec)
    scorer = make_scorer(spec, model)
    spec = _with_list(spec, scorer.input)
    _check_options(spec, scorer.input)
    source = _source(spec, scorer)
    if spec.selection and not source.bounded:
        raise SpecError(
            f"{_first_given(spec, *_PARTS)}: is for sources with an end, and {spec.source[0]} has none", hint=_WITHOUT
        )
    if spec.thumbnails is not None:
        _check_thumbnails(spec, source)
    if spec.split is not None:
        _check_split(spec, source)
    if spec.push is not None and spec.push.when == "finished" and not source.bounded:
        raise SpecError(
            f"push: when: finished is for sources with an end, and {spec.source[0]} has none",
            hint="Without when, rows are pushed as they are committed.",
        )
    written = source.media == "video" and scorer.output == "image" and spec.frames is None
    if written and (asked := _first_given(spec, "sample", "shard")):
        raise SpecError(
            f"{asked}: leaves frames out, and the output is a video",
            hint="Write pictures: --frames jpg, or use --limit.",
        )
    sink = output_sink(spec, scorer, _columns(source, scorer), source.order, video=source.media == "video")
    sink.check(source)
    return Parts(model=model, source=source.located(sink.work), sink=sink, batch_size=scorer.batch_size)


def _check_thumbnails(spec: JobSpec, source: Source) -> None:
    """Raises SpecError where items are no pictures, or hold several."""
    if source.media == "video":
        raise SpecError("thumbnails: is for pictures, and the source is a video", hint="--frames jpg keeps its frames.")
    if not source.bounded:
        raise SpecError(f"thumbnails: is for sources with an end, and {spec.source[0]} has none", hint=_WITHOUT)
    if spec.pages == "all":
        raise SpecError("thumbnails: shows one picture of each item, and pages: all scores several of a file")


def _check_split(spec: JobSpec, source: Source) -> None:
    """Raises SpecError if the job cannot be shared out among several coordinators."""
    why = source.indivisible()
    hint = "Leave --split out. More workers: --workers; several machines: --engine ray."
    if given := next((name for name in ("limit", "sample", "shard") if getattr(spec, name) is not None), None):
        why, hint = f"{given} asks for a part of the items", "Give one of the two."
    elif spec.push is not None and spec.push.when == "finished":
        why, hint = "push waits until the job is finished", "Without when, rows are pushed as they are committed."
    elif spec.log:
        why, hint = "log keeps the log of one coordinator", "Leave --log out: 'tally jobs log' shows what all printed."
    elif spec.engine == "ray" and spec.workers is None:
        why, hint = "it is not said how many of the cluster's workers are shared out", "Say it: --workers 4..64"
    if why is not None:
        raise SpecError(f"split: the job is to have {spec.split} coordinators, and {why}", hint=hint)


def _source(spec: JobSpec, scorer: Scorer) -> Source:
    names = (*_DECODING, *_TABULAR, *_QUEUED, *_LISTED)
    options = {name: getattr(spec, name) for name in names if _is_given(spec, name)}
    media = _media(spec, scorer.input)
    try:
        return source_for(SourceRequest(spec.source, scorer, media, options, spec.out, items=spec.items is not None))
    except SourceNotFoundError as error:
        asked = _first_given(spec, *_DECODING, *_ENCODING, "frames")
        if asked and media == "video" and spec.media is None:  # the option alone said that videos are meant
            own = "; a model's own size is --set preprocess.size=640x360" if asked == "size" else ""
            error.hint = f"{asked} is for videos only: leave it out to score pictures{own}"
        raise


def _with_list(spec: JobSpec, input: Input) -> JobSpec:  # noqa: A002
    """COCO's JSON as the source of pictures is a list of them, whether ``items`` says so or not."""
    found = next((each for each in spec.source if each.lower().endswith(".json")), None)
    if found is None or input != "image" or spec.items is not None:
        return spec
    from tally.sources.coco import is_coco  # which takes long to import

    if not is_coco(found):
        return spec
    if len(spec.source) > 1:
        raise SpecError(
            f"{found} is taken for COCO JSON, a list of pictures, and there are {len(spec.source)} sources",
            hint="A job takes one list: start a job for each.",
        )
    return spec.model_copy(update={"items": found})


def make_scorer(spec: JobSpec, model: ModelRef) -> Scorer:
    """The scorer, not loaded."""
    return configured(
        create(model),
        overlay=spec.overlay,
        thumbnails=spec.thumbnails,
        batch_size=spec.batch_size,
        decoding=spec.decoding,
    )


def _check_route(spec: JobSpec) -> None:
    """Raises SpecError for what cannot be asked where messages choose their models."""
    if not any(map(is_queue, spec.source)):
        raise SpecError(
            f"model: {spec.model} is chosen by messages, and the source is {spec.source[0]}",
            hint="Name one model, or score a queue.",
        )
    if spec.overlay:
        raise SpecError("overlay: needs one model, and here each message chooses its own")


def _check_options(spec: JobSpec, input: Input) -> None:  # noqa: A002  # the scorer's word
    """Raises SpecError for an option that does not apply to what the model takes."""
    if (queued := _first_given(spec, *_QUEUED)) and not any(map(is_queue, spec.source)):
        raise SpecError(f"{queued}: is for queues only, and the source is {spec.source[0]}", hint=_WITHOUT)
    sql = any(map(is_sql, spec.source))
    if spec.query is not None and not sql:
        raise SpecError(
            f"query: is for databases only, and the source is {spec.source[0]}",
            hint="For rows of files, --where takes SQL's conditions; for results, 'tally query' asks them.",
        )
    if sql and (files := _first_given(spec, "path_columns")):
        raise SpecError(f"{files}: is for files, and the source is {spec.source[0]}", hint=_WITHOUT)
    if sql and spec.csv:
        raise SpecError(f"csv: is for files, and the source is {spec.source[0]}")
    passed = ("item_column", "key") if sql else ("item_column",)
    if spec.items is None and (listed := _first_given(spec, *(name for name in _LISTED if name not in passed))):
        what = "lists of items and databases" if listed == "key" else "lists of items"
        raise SpecError(f"{listed}: is for {what} only; items names a list: --items LIST")
    if spec.items is not None and spec.media not in (None, "image"):
        raise SpecError(f"media: {spec.media} is for folders and files, and a list names pictures")
    if input not in ("image", "frame") and (pictured := _first_given(spec, *_PICTURED)):
        raise SpecError(f"{pictured}: is for pictures, and the model is given {_NOUNS.get(input, input)}")
    if input == "table":
        if other := _first_given(spec, *_DECODING, *_ENCODING, "frames", "overlay"):
            raise SpecError(f"{other}: is for pictures and videos, and the model is given tables", hint=_WITHOUT)
        if spec.items is None and spec.item_column is not None:
            raise SpecError("item_column: is for pictures in tables, and the model is given the tables themselves")
        return
    kept = {"keep"} if spec.items is None else _OF_LISTS
    if tabular := _first_given(spec, *(name for name in _TABULAR if name not in kept)):
        raise SpecError(f"{tabular}: is for tables only, and the model is given {_NOUNS[input]}", hint=_WITHOUT)
    asked = _first_given(spec, *_DECODING, *_ENCODING, "frames")
    if asked and input not in ("image", "frame"):
        raise SpecError(f"{asked}: is for videos only, and the model is given {input}, not pictures or frames")


def _media(spec: JobSpec, input: Input) -> Media | None:  # noqa: A002
    """What the source holds, if the spec, the scorer or names of files tell; None if one has to look into it."""
    if input in ("image", "bytes", "path") and spec.media is None and spec.items is None:
        table = next((each for each in spec.source if format_of(each) == "parquet"), None)
        if spec.item_column is not None or (input == "image" and table):
            if table and (other := next((each for each in spec.source if is_image(each) or is_video(each)), None)):
                raise SpecError(
                    f"{table} is a table and {other} is not: one job takes one or the other",
                    hint="Start a job for each.",
                )
            return "table"
    archive = None if input in ("table", "frame") else next(filter(is_archive, spec.source), None)
    if archive and spec.media is None:
        if other := next((each for each in spec.source if not is_archive(each)), None):
            raise SpecError(
                f"{archive} is an archive and {other} is not: one job takes one or the other",
                hint="Start a job for each.",
            )
        return "archive"
    if input not in ("image", "frame"):
        return spec.media
    listed = next((each for each in spec.source if format_of(each) or _is_text(each)), None)
    if listed and spec.items is None and spec.media is None:
        raise SpecError(
            f"{listed} is a table or a text, and the model is given pictures",
            hint=f"If it lists pictures: --items {listed}. If its rows are to be scored, choose a model of tables.",
        )
    video = next(filter(is_video, spec.source), None)
    picture = next(filter(is_image, spec.source), None)
    asked = _first_given(spec, *_DECODING, *_ENCODING, "frames")
    if spec.media == "video" or (spec.media is None and (video or asked or is_video(spec.out))):
        animated = (
            is_animation(each) or (spec.media == "video" and each.lower().endswith(".png")) for each in spec.source
        )
        picture = next(
            (each for each, may in zip(spec.source, animated, strict=True) if is_image(each) and not may), None
        )
    if video and picture and spec.media is None:
        raise SpecError(
            f"{video} is a video and {picture} a picture: one job takes one or the other",
            hint="Start a job for each.",
        )
    if spec.items is None and (spec.fps is not None or any(map(is_pattern, spec.source))):
        if video:
            raise SpecError(f"fps: is for numbered pictures, and {video} has times of its own")
        if spec.media not in (None, "video"):
            raise SpecError(f"media: {spec.media} is asked for, and numbered pictures are to be the frames of a video")
        return "video"
    other, noun = (picture, "a picture") if spec.media == "video" else (video, "a video")
    if spec.media in ("image", "video") and other and spec.items is None:
        raise SpecError(f"media: {spec.media} is asked for, and {other} is {noun}", hint="Leave --media out.")
    if asked and (picture or spec.media not in (None, "video")):
        raise SpecError(f"{asked}: is for videos only, and the source gives pictures", hint=_WITHOUT)
    if spec.media is None and (video or asked or (not picture and is_video(spec.out))):
        return "video"
    return spec.media


def _is_text(place: str) -> bool:
    return place.lower().endswith((".txt", ".lst", ".list"))


def _columns(source: Source, scorer: Scorer) -> Mapping[str, str] | None:
    """The columns of the results besides the key: those of the source, then those of the scorer's rows."""
    if scorer.columns is None:
        return source.columns if scorer.output != "rows" else None
    if twice := source.columns.keys() & scorer.columns.keys():
        raise SpecError(
            f"the model's results have a column {min(twice)!r} too",
            hint=f"Leave it out of keep, or give it another name: --keep NEW={min(twice)}",
        )
    return {**source.columns, **scorer.columns}


def output_sink(
    spec: JobSpec, scorer: Scorer, columns: Mapping[str, str] | None, order: str | None = None, *, video: bool
) -> Sink:
    """Rows, pictures, or videos, whose frames are pictures that were not asked for one by one."""
    written = video and scorer.output == "image" and spec.frames is None
    if not written and (asked := _first_given(spec, *_ENCODING)):
        raise SpecError(f"{asked}: is for videos that are written, and this job writes none")
    if scorer.output == "rows" and (spec.frames is not None or is_video(spec.out)):
        what = f"{spec.out} is a video" if spec.frames is None else "--frames asks for pictures"
        raise SpecError(
            f"the model gives rows, and {what}",
            hint="--overlay draws boxes and labels onto the frames; for rows give a folder, .csv, .parquet or .jsonl.",
        )
    if spec.escape_formulas and (scorer.output != "rows"):
        raise SpecError("escape_formulas: is for rows in CSV, and this job writes none")
    if spec.empty_rows and scorer.output != "rows":
        raise SpecError("empty_rows: is for rows, and this job writes pictures", hint="Each of them has a row anyway.")
    if written:
        return sink_for(spec.out, output="video", format=spec.format, codec=spec.codec, crf=spec.crf, audio=spec.audio)
    return sink_for(
        spec.out,
        output=scorer.output,
        format=spec.frames or spec.format,
        columns=columns,
        order=order,
        escape_formulas=spec.escape_formulas,
        thumbnails=spec.thumbnails is not None,
    )


def output_without_source(spec: JobSpec, model: ModelRef) -> dict[str, Any]:
    """As :meth:`Parts.describe_output`, where there is nothing to score."""
    sink = output_sink(spec, make_scorer(spec, model), None, video=spec.media == "video")
    return {**sink.describe().to_json(), "unit": {"video": "frames", "table": "rows"}.get(spec.media or "", "items")}


_WITHOUT = "Leave it out, or name another source or model."
_DECODING, _ENCODING = ("every", "size", "fit", "fps", "deinterlace"), ("codec", "crf", "audio")
_PICTURED = ("thumbnails", "pages", "background", "max_pixels")
_WINDOWS = ("time", "time_unit", "window", "timezone", "aggregate")
_TABULAR = ("by", "keep", "where", *_WINDOWS, "path_columns", "csv", "query")
_QUEUED = ("queue", "until_empty")
_PARTS = ("limit", "sample", "shard")
_LISTED = ("item_column", "key", "base")
_OF_LISTS = frozenset({"keep", "where", "csv", "query"})
"""Options for tables that lists of items have, too."""
_NOUNS = {"image": "pictures", "frame": "pictures", "bytes": "the content of files", "path": "files", "table": "tables"}


def _first_given(spec: JobSpec, *names: str) -> str | None:
    """The first of these options that the spec gives."""
    return next((name for name in names if _is_given(spec, name)), None)


def _is_given(spec: JobSpec, name: str) -> bool:
    return bool(getattr(spec, name) != JobSpec.model_fields[name].default)


def describe_model(spec: JobSpec, model: Any = None) -> ModelRef:
    """Find and check the model. ``model``: a live Scorer that stands for ``spec.model``."""
    return resolve(
        spec.model if model is None else model,
        task=spec.task,
        labels=spec.labels,
        artifacts=spec.artifacts,
        settings=spec.settings,
        by=spec.by,
        trust=spec.trust,
    )
