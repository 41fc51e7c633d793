"""From a spec to a job's model, source and sink."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tally.errors import SpecError
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
from tally.sources.listing import is_image, is_video
from tally.sources.queues.factory import is_queue


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
    _check_options(spec, scorer.input)
    source = source_for(
        SourceRequest(
            spec.source,
            scorer,
            _media(spec, scorer.input),
            {name: getattr(spec, name) for name in (*_DECODING, *_TABULAR, *_QUEUED) if _is_given(spec, name)},
            spec.out,
        )
    )
    sink = output_sink(spec, scorer, _columns(source, scorer), source.order, video=source.media == "video")
    sink.check(source)
    return Parts(model=model, source=source.located(sink.work), sink=sink, batch_size=scorer.batch_size)


def make_scorer(spec: JobSpec, model: ModelRef) -> Scorer:
    """The scorer, not loaded."""
    return configured(create(model), overlay=spec.overlay, batch_size=spec.batch_size)


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
        raise SpecError(f"{queued}: is for queues only, and the source is {spec.source[0]}")
    if input == "table":
        if other := _first_given(spec, *_DECODING, *_ENCODING, "frames", "overlay"):
            raise SpecError(f"{other}: is for pictures and videos, and the model is given tables")
        return
    if tabular := _first_given(spec, *_TABULAR):
        raise SpecError(f"{tabular}: is for tables only, and the model is given {_NOUNS[input]}")
    asked = _first_given(spec, *_DECODING, *_ENCODING, "frames")
    if asked and input not in ("image", "frame"):
        raise SpecError(f"{asked}: is for videos only, and the model is given {input}, not pictures or frames")


def _media(spec: JobSpec, input: Input) -> Media | None:  # noqa: A002
    """What the source holds, if the spec, the scorer or names of files tell; None if one has to look into it."""
    if input not in ("image", "frame"):
        return spec.media
    video = next(filter(is_video, spec.source), None)
    picture = next(filter(is_image, spec.source), None)
    if video and picture and spec.media is None:
        raise SpecError(
            f"{video} is a video and {picture} a picture: one job takes one or the other",
            hint="Start a job for each.",
        )
    asked = _first_given(spec, *_DECODING, *_ENCODING, "frames")
    if asked and (picture or spec.media == "image"):
        raise SpecError(f"{asked}: is for videos only, and the source gives pictures")
    if video or asked or (spec.media is None and not picture and is_video(spec.out)):
        return "video"
    return spec.media


def _columns(source: Source, scorer: Scorer) -> Mapping[str, str] | None:
    """The columns of the results besides the key: those of the source, then those of the scorer."""
    if scorer.output != "rows":
        return source.columns
    if scorer.columns is None:
        return None
    if twice := source.columns.keys() & scorer.columns.keys():
        raise SpecError(
            f"the model's results have a column {min(twice)!r} too",
            hint="Leave it out of keep, or rename it in the source with a column of another name.",
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
    if written:
        return sink_for(spec.out, output="video", format=spec.format, codec=spec.codec, crf=spec.crf, audio=spec.audio)
    return sink_for(
        spec.out,
        output=scorer.output,
        format=spec.frames or spec.format,
        columns=columns,
        order=order,
        escape_formulas=spec.escape_formulas,
    )


def output_without_source(spec: JobSpec, model: ModelRef) -> dict[str, Any]:
    """As :meth:`Parts.describe_output`, where there is nothing to score."""
    sink = output_sink(spec, make_scorer(spec, model), None, video=spec.media == "video")
    return {**sink.describe().to_json(), "unit": {"video": "frames", "table": "rows"}.get(spec.media or "", "items")}


_DECODING, _ENCODING = ("every", "size"), ("codec", "crf", "audio")
_TABULAR = ("by", "keep", "where", "time", "window", "aggregate", "csv")
_QUEUED = ("queue", "until_empty")
_NOUNS = {"image": "pictures", "frame": "pictures", "bytes": "the content of files", "path": "files"}


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
