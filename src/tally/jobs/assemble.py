"""From a spec to a job's model, source and sink."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from tally.errors import (
    SourceNotFoundError,
    SpecError,
)
from tally.jobs.spec import JobSpec
from tally.models.load import create
from tally.models.reference import ModelRef
from tally.models.resolve import resolve
from tally.scorers.base import Scorer
from tally.sinks.base import Sink
from tally.sinks.factory import sink_for
from tally.sinks.staging import StagedSink
from tally.sinks.video import VideoSink
from tally.sources.base import Source
from tally.sources.files import FileSource
from tally.sources.listing import is_image, is_video
from tally.sources.tables.source import TableSource
from tally.sources.video import VideoSource


@dataclass(frozen=True, slots=True)
class Parts:
    """A job's model, source and sink, made from its spec."""

    model: ModelRef
    source: Source
    sink: Sink
    batch_size: int


def assemble(spec: JobSpec, model: ModelRef) -> Parts:
    """Make the parts that the spec describes; raises what makes them impossible."""
    scorer = make_scorer(spec, model)
    if spec.batch_size is not None:
        scorer.batch_size = spec.batch_size
    source = _source(spec, scorer)
    columns: Mapping[str, str] | None = source.columns
    if scorer.output == "rows":
        columns = None if scorer.columns is None else {**source.columns, **scorer.columns}
        if twice := source.columns.keys() & (scorer.columns or {}).keys():
            raise SpecError(
                f"the model's results have a column {min(twice)!r} too",
                hint="Leave it out of keep, or rename it in the source with a column of another name.",
            )
    sink = output_sink(spec, scorer, columns, source.order, video=isinstance(source, VideoSource))
    if isinstance(source, TableSource):
        source = source.located(sink.layout.address(sink.layout.work))
    if isinstance(sink, VideoSink) and isinstance(source, VideoSource):
        sink.check()
        if sink.layout.merged and source.listing.several():
            raise SpecError(
                f"the source holds several videos, and {spec.out} is one file", hint="Give a folder: --out videos/"
            )
    return Parts(model=model, source=source, sink=sink, batch_size=scorer.batch_size)


def make_scorer(spec: JobSpec, model: ModelRef) -> Scorer:
    """The scorer, not loaded."""
    scorer = create(model)
    if spec.overlay:
        from tally.scorers.vision.overlay import Overlay

        return Overlay(scorer)
    return scorer


def _source(spec: JobSpec, scorer: Scorer) -> Source:
    """Files, the frames of videos, or the rows of tables: as the spec says or the scorer wants; or else as the names
    of files tell, or, in folders, what is there."""
    input = scorer.input  # noqa: A001  # the scorer's word
    tabular = next((name for name in _TABULAR if _is_given(spec, name)), None)
    if input == "table":
        pictorial = (*_DECODING, *_ENCODING, "frames", "overlay")
        if other := next((name for name in pictorial if _is_given(spec, name)), None):
            raise SpecError(f"{other}: is for pictures and videos, and the model is given tables")
        own = scorer.window if spec.window is None else None
        return TableSource.describe(
            spec.source,
            features=scorer.features,
            by=spec.by or tuple(scorer.by),
            keep=spec.keep,
            where=spec.where,
            time=spec.time or (own.time if own else None),
            window=own.seconds if own else spec.window,
            aggregate=own.aggregate if own else spec.aggregate,
            csv=spec.csv,
            missing_reason=scorer.missing_reason if scorer.by else None,
            without=spec.out,
        )
    if tabular is not None:
        raise SpecError(f"{tabular}: is for tables only, and the model is given {_NOUNS[input]}")
    asked = next((name for name in (*_DECODING, *_ENCODING, "frames") if _is_given(spec, name)), None)
    if input not in ("image", "frame"):
        if asked is not None:
            raise SpecError(f"{asked}: is for videos only, and the model is given {input}, not pictures or frames")
        return FileSource.describe(spec.source, input, without=spec.out)
    videos = [uri for uri in spec.source if is_video(uri)]
    pictures = [uri for uri in spec.source if is_image(uri)]
    if videos and pictures and spec.media is None:
        raise SpecError(
            f"{videos[0]} is a video and {pictures[0]} a picture: one job takes one or the other",
            hint="Start a job for each.",
        )
    if asked is not None and (pictures or spec.media == "image"):
        raise SpecError(f"{asked}: is for videos only, and the source gives pictures")

    def frames() -> VideoSource:
        return VideoSource.describe(spec.source, every=spec.every, size=spec.size, without=spec.out)

    if spec.media == "video" or input == "frame" or videos or asked is not None:
        return frames()
    if spec.media is None and not pictures and is_video(spec.out):
        return frames()
    try:
        return FileSource.describe(spec.source, input, without=spec.out)
    except SourceNotFoundError:
        if spec.media is None:
            with suppress(SourceNotFoundError):
                return frames()
        raise


def output_sink(
    spec: JobSpec, scorer: Scorer, columns: Mapping[str, str] | None, order: str | None = None, *, video: bool
) -> StagedSink:
    """Rows, pictures, or videos, whose frames are pictures that were not asked for one by one."""
    written = video and scorer.output == "image" and spec.frames is None
    if not written and (asked := next((name for name in _ENCODING if _is_given(spec, name)), None)):
        raise SpecError(f"{asked}: is for videos that are written, and this job writes none")
    if scorer.output == "rows" and (spec.frames is not None or is_video(spec.out)):
        what = f"{spec.out} is a video" if spec.frames is None else "--frames asks for pictures"
        raise SpecError(
            f"the model gives rows, and {what}",
            hint="--overlay draws boxes and labels onto the frames; for rows give a folder, .csv, .parquet or .jsonl.",
        )
    if written:
        return sink_for(spec.out, output="video", format=spec.format, codec=spec.codec, crf=spec.crf, audio=spec.audio)
    return sink_for(spec.out, output=scorer.output, format=spec.frames or spec.format, columns=columns, order=order)


MEDIA: dict[type[Source], Literal["video", "table"]] = {VideoSource: "video", TableSource: "table"}
_DECODING, _ENCODING = ("every", "size"), ("codec", "crf", "audio")
_TABULAR = ("by", "keep", "where", "time", "window", "aggregate", "csv")
_NOUNS = {"image": "pictures", "frame": "pictures", "bytes": "the content of files", "path": "files"}


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
