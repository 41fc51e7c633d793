"""What a job is: one frozen, validated object, made from flags, YAML or Python."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from datetime import date
from datetime import time as dt_time
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tally.alerts.rules import checked as alert_rule
from tally.alerts.webhook import checked as web_address
from tally.alerts.webhook import shown as shown_webhook
from tally.config import settings
from tally.database import foreign
from tally.database.foreign import is_database
from tally.engines.factory import checked as engine_name
from tally.errors import SpecError, StorageError
from tally.masking import mask
from tally.media.images import MAX_PIXELS, Decoding
from tally.models.route import is_route
from tally.push.target import Push
from tally.sources.sql.factory import is_sql, parted
from tally.storage import is_url, refuse_secrets
from tally.text import did_you_mean, expanded, finding, seconds

if TYPE_CHECKING:
    from tally.sources.selection import Selection

_DEVICE = re.compile(r"auto|cpu|(cuda|tensorrt)(:\d+)?")
_RANGE = re.compile(r"\s*(\d+)\s*\.\.\s*(\d+)\s*")
_SIZE = re.compile(r"(?i)^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*$")

Side = Annotated[int, Field(ge=-1, le=16_384)]
Byte = Annotated[int, Field(ge=0, le=255)]


def colour(value: Any) -> Any:
    """``white``, ``#ffffff`` and the like as red, green and blue."""
    if not isinstance(value, str):
        return value
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(value)[:3]
    except ValueError:
        raise ValueError("should be a colour, such as white or #ffffff") from None


def millions(value: Any) -> Any:
    """``200M`` as a number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[mM]\w*\s*", value) if isinstance(value, str) else None
    return round(float(found[1]) * 1_000_000) if found else value


def aggregate_name(value: str) -> str:
    """What may be made of a window's values."""
    from tally.sources.tables.select import AGGREGATES, quantile

    if value not in AGGREGATES and quantile(value) is None:
        raise ValueError(f"should be {', '.join(AGGREGATES)}, or a quantile such as p95")
    return value


CSV_VALUES = ("header", "skip", "types")
"""The options for CSV whose values are not text: true or false, a number, and a mapping."""

QUEUE_VALUES = ("prefetch",)
"""The options for queues whose values are not text: a number."""

Names = tuple[Annotated[str, Field(min_length=1)], ...]
Task: TypeAlias = Literal["classify", "detect", "restyle", "embed", "segment", "values"]


class JobSpec(BaseModel):
    """Model × source × sink, and how to run them.

    source: folders, files, globs or bucket URLs. out: a folder, a bucket URL, or one file: ``.csv``, ``.parquet``
    or ``.jsonl`` for rows, ``.mp4``, ``.mov``, ``.mkv`` or ``.webm`` for a video. Relative paths are made absolute
    when the spec is made.
    items: a list that names the items; it stands for the source. item_column: its column of references; of Parquet
    files that are the source, the column that holds the pictures. key: that of the items' keys; base: the folder that
    relative references begin in, by default the list's. keep, where and csv are for lists, too.
    query: databases only: what is scored, in their SQL. key is for databases, too: the columns that name its rows.
    split: so many coordinators share the items; see :mod:`tally.jobs.split`.
    limit, sample, shard: a part of the items: the first so many; a share (``1%``) or number of all, chosen by their
    keys; ``i/n``, the i-th of n shares.
    media: what the source holds; detected by default.
    keep: tables and archives only: input columns that the results carry, or what archives hold beside their pictures
    (``json`` for ``000001.json``); ``*`` stands for all, and ``NEW=COLUMN`` gives one another name.
    by, where, time, time_unit, window, timezone, aggregate, path_columns, csv: tables only. by: columns whose values
    make a key, which chooses the model where ``model`` is a template (``models/{Device}.skops``).
    where: a condition in SQL; other rows are passed over. time: the column of timestamps, time_unit: of those that are
    numbers since 1970. window: seconds that readings are gathered over before they are scored (``5m`` is understood).
    timezone: whose days the windows are, if they are days. aggregate: what is made of each window's values: mean, min,
    max, last, count, std, median, and quantiles such as p95. path_columns: columns that stand in the files' paths, as
    in ``{Device}_{Tag}.csv``. csv: options for reading CSV.
    settings, csv: values that JSON knows; dates and times are written as text.
    escape_formulas: in CSV, text that a spreadsheet would take for a formula begins with an apostrophe.
    empty_rows: an item for which the model gives no row has one, without the model's values.
    queue, until_empty: queues only. queue: how messages are read: body, key, template, base, prefetch, meta,
    models.
    push: where rows go, too, as they are committed; an address alone stands for its ``url``. Where ``out`` is a table,
    push may say how rows go there.
    alerts: rules that are evaluated when the job has ended; webhook: who is told when one of them holds.
    thumbnails, pages, background, max_pixels: pictures only. thumbnails: a small JPEG of each is kept beside the
    results, whose longer side has so many pixels. pages: of files with several pictures, the first or all. background:
    the colour that transparent pictures are laid on (``white`` and ``#ffffff`` are understood). max_pixels: larger ones
    are refused by their header (``200M`` is understood).
    every, size, fit, frames, codec, crf, audio: videos only. size: (width, height) in pixels (``640x360`` is
    understood); -1 for one of them keeps the shape, at an even number. fit: how a frame of another shape gets that
    size: stretch it, with pixels that are not square; contain it, between black bars; or cover all, and cut off what is
    outside. fps: the source is numbered pictures, which are the frames of a video, so many for a second (``25``,
    ``30000/1001``). deinterlace: interlaced frames show one moment, and not the lines of two.
    engine: who runs the workers: ``local`` on this machine, ``ray`` on a Ray cluster, or one of an installed package.
    workers: the least and the most of them (``4..64`` is understood, and one number for both); None: one for each core.
    address, cpus, gpus, resources: the engine ``ray`` only. address: the cluster's, ``http://HEAD:8265``; found by
    Ray's own rules by default. cpus, gpus, resources: what each worker reserves; gpus may be a part of one, and
    resources are the cluster's own (``{"tpu": 1}``).
    worker_items: after so many items a worker is replaced by a fresh one.
    timeout: seconds that one batch may take. memory: bytes that one worker may hold (``2GiB`` is understood), and on
    a cluster reserves; None: four fifths of the machine's memory, shared by its workers.
    max_dead: share of dead items above which the job stops, once ``min_dead`` items are finished.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    source: tuple[Annotated[str, Field(min_length=1)], ...]
    model: str = Field(min_length=1)
    out: str = Field(min_length=1)
    items: str | None = Field(default=None, min_length=1)
    item_column: str | None = Field(default=None, min_length=1)
    key: str | None = Field(default=None, min_length=1)
    base: str | None = Field(default=None, min_length=1)
    limit: int | None = Field(default=None, ge=1)
    sample: str | None = None
    shard: str | None = None
    split: int | None = Field(default=None, ge=2, le=1024)
    task: Task | None = None
    labels: str | None = None
    artifacts: str | None = None
    settings: dict[str, Any] = {}
    trust: bool = False
    format: Literal["parquet", "csv", "jsonl", "jpg", "png", "webp", "mp4", "mov", "mkv", "webm"] | None = None
    media: Literal["image", "video", "table", "archive"] | None = None
    every: int = Field(default=1, ge=1)
    size: tuple[Side, Side] | None = None
    fit: Literal["contain", "cover", "stretch"] = "stretch"
    fps: str | None = None
    deinterlace: bool = False
    frames: Literal["jpg", "png", "webp"] | None = None
    codec: str | None = Field(default=None, min_length=1)
    crf: float | None = Field(default=None, ge=0)
    audio: bool = True
    escape_formulas: bool = False
    empty_rows: bool = False
    overlay: bool = False
    thumbnails: int | None = Field(default=None, ge=16, le=1024)
    pages: Literal["first", "all"] = "first"
    background: Annotated[tuple[Byte, Byte, Byte] | None, BeforeValidator(colour)] = None
    max_pixels: Annotated[int, BeforeValidator(millions), Field(ge=1)] = MAX_PIXELS
    by: Names = ()
    keep: Names = ()
    where: str | None = Field(default=None, min_length=1)
    time: str | None = Field(default=None, min_length=1)
    window: float | None = Field(default=None, gt=0)
    time_unit: Literal["s", "ms", "us", "ns"] | None = None
    timezone: str | None = Field(default=None, min_length=1)
    aggregate: tuple[Annotated[str, AfterValidator(aggregate_name)], ...] = ("mean",)
    path_columns: str | None = Field(default=None, min_length=1)
    csv: dict[str, Any] = {}
    query: str | None = Field(default=None, min_length=1)
    queue: dict[str, Any] = {}
    until_empty: bool = False
    batch_size: int | None = Field(default=None, ge=1, le=65_536)
    device: str = "auto"
    engine: Annotated[str, AfterValidator(engine_name)] = "local"
    address: str | None = None
    workers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1, le=65_536)]] | None = None
    cpus: float | None = Field(default=None, ge=0)
    gpus: float | None = Field(default=None, ge=0)
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}
    timeout: float = Field(default=120.0, gt=0, le=1e6)
    worker_items: int | None = Field(default=None, ge=1)
    memory: int | None = Field(default=None, gt=0)
    attempts: int = Field(default=3, ge=1, le=100)
    max_dead: float = Field(default=0.5, ge=0, le=1)
    min_dead: int = Field(default=1000, ge=1)
    strict: bool = False
    log: bool = False
    price_per_hour: float | None = Field(default=None, ge=0)
    alerts: tuple[Annotated[str, AfterValidator(alert_rule)], ...] = ()
    webhook: Annotated[str, AfterValidator(web_address)] | None = Field(default=None, repr=False)
    push: Push | None = None

    @model_validator(mode="before")
    @classmethod
    def _items_for_source(cls, fields: Any) -> Any:
        """A list of items is the job's source."""
        if not isinstance(fields, Mapping) or fields.get("items") is None or fields.get("source") not in (None, (), []):
            return fields
        return {**fields, "source": (fields["items"],)}

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, Path)) else value

    @field_validator("source", "out", "labels", "artifacts", "items", "base")
    @classmethod
    def _without_secrets(cls, value: Any) -> Any:
        for place in (value,) if isinstance(value, str) else value or ():
            if is_database(place):
                foreign.check(place.partition("#")[0])
            elif is_url(place):
                try:
                    refuse_secrets(place)
                except StorageError as error:
                    raise ValueError(str(error)) from None
        return value

    @field_validator("push", mode="before")
    @classmethod
    def _address_alone(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @field_validator("by", "keep", "aggregate", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("settings", "csv", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return _as_json(value) if isinstance(value, Mapping) else value

    @field_validator("window", mode="before")
    @classmethod
    def _duration(cls, value: Any) -> Any:
        return seconds(value) if isinstance(value, str) else value

    @field_validator("queue", mode="before")
    @classmethod
    def _nested(cls, value: Any) -> Any:
        """``meta.device``, as flags write it, within ``meta``."""
        if not isinstance(value, Mapping) or not isinstance(meta := value.get("meta", {}), Mapping):
            return value
        flags = {name: each for name, each in value.items() if str(name).startswith("meta.")}
        more = {name.removeprefix("meta."): each for name, each in flags.items()}
        return {name: each for name, each in value.items() if name not in flags} | (
            {"meta": {**meta, **more}} if meta or more else {}
        )

    @field_validator("source")
    @classmethod
    def _not_none(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("names nothing to score")
        return value

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if isinstance(value, str):
            match = _SIZE.match(value)
            if match is None:
                raise ValueError("should be a size such as 512MiB or 2GiB")
            base = 1024 if match[3] or match[2] else 1
            return int(float(match[1]) * base ** (" kmgt".index(match[2].lower() or " ")))
        return value

    @field_validator("workers", mode="before")
    @classmethod
    def _least_and_most(cls, value: Any) -> Any:
        if isinstance(value, str) and (match := _RANGE.fullmatch(value)):
            return int(match[1]), int(match[2])
        if isinstance(value, str) and value.strip().isdigit():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise ValueError("should be at least 1")
            return value, value
        if value is None or isinstance(value, (list, tuple)):
            return value
        raise ValueError("should be a number such as 8, or a range such as 4..64")

    @field_validator("workers")
    @classmethod
    def _ascending(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("should be a range such as 4..64, the smaller number first")
        return value

    @field_validator("address")
    @classmethod
    def _web_address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^/\s@]+(/\S*)?", value):
            raise ValueError("should be the address of the cluster's dashboard, such as http://HEAD:8265")
        return value

    @field_validator("sample", mode="before")
    @classmethod
    def _share_or_number(cls, value: Any) -> Any:
        if isinstance(value, float) and 0 < value < 1:
            value = f"{value * 100:.10f}".rstrip("0").rstrip(".") + "%"
        text = str(value).strip() if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
        if value is None or (text.isdecimal() and int(text)):
            return value if value is None else str(int(text))
        if re.fullmatch(r"\d+(\.\d+)?%", text) and 0 < float(text[:-1]) < 100:
            return text
        raise ValueError("should be a number of items such as 1000, or a share such as 1%")

    @field_validator("shard", mode="before")
    @classmethod
    def _one_of(cls, value: Any) -> Any:
        if isinstance(value, (tuple, list)) and len(value) == 2:
            value = "{}/{}".format(*value)
        if value is None:
            return None
        match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", value) if isinstance(value, str) else None
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError("should be i/n, such as 1/4: the first of four shares")
        return f"{int(match[1])}/{int(match[2])}"

    @property
    def selection(self) -> Selection:
        """The part of the items that the job scores."""
        from tally.sources.selection import Selection

        sample: float | int | None = None
        if self.sample is not None:
            sample = float(self.sample[:-1]) / 100 if self.sample.endswith("%") else int(self.sample)
        share = None if self.shard is None else self.shard.split("/")
        return Selection(self.limit, sample, None if share is None else (int(share[0]), int(share[1])))

    @field_validator("size", mode="before")
    @classmethod
    def _width_and_height(cls, value: Any) -> Any:
        if isinstance(value, str):
            sides = value.lower().split("x")
            if len(sides) != 2 or not all(re.fullmatch(r"\s*(\d+|-1)\s*", side) for side in sides):
                raise ValueError("should be a width and a height such as 640x360, or 640x-1 to keep the shape")
            return tuple(int(side) for side in sides)
        return value

    @field_validator("size")
    @classmethod
    def _not_too_large(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and (0 in value or value == (-1, -1)):
            raise ValueError("should be a width and a height such as 640x360, or 640x-1 to keep the shape")
        if value is not None and value[0] * value[1] > 2**27:
            raise ValueError("is more than 128 million pixels")
        return value

    @field_validator("fps", mode="before")
    @classmethod
    def _rate(cls, value: Any) -> Any:
        if value is None:
            return None
        try:
            rate = Fraction(str(value).strip())
        except (ValueError, ZeroDivisionError):
            rate = Fraction(0)
        if not Fraction(1, 86_400) <= rate <= 1000:
            raise ValueError("should be pictures per second, such as 25 or 30000/1001")
        return str(rate)

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError("should be auto, cpu, cuda, cuda:N, tensorrt or tensorrt:N")
        return value

    @field_validator("max_dead", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                return float(value.strip()[:-1]) / 100
            except ValueError:
                raise ValueError("should be a share such as 0.05 or 5%") from None
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.items is not None and self.source != (self.items,):
            raise PydanticCustomError("items", "items: names the items, and source is given too; give one of them")
        return self

    @model_validator(mode="after")
    def _fit_into_a_size(self) -> Self:
        if self.fit != "stretch" and (self.size is None or -1 in self.size):
            raise PydanticCustomError("fit", "fit: {fit} needs a whole size, such as size: 640x360", {"fit": self.fit})
        return self

    @model_validator(mode="after")
    def _for_clusters(self) -> Self:
        given = [name for name in ("address", "cpus", "gpus", "resources") if getattr(self, name) not in (None, {})]
        if self.engine == "local" and given:
            raise PydanticCustomError("engine", "{names}: needs engine: ray", {"names": ", ".join(given)})
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise PydanticCustomError("gpus", "gpus: should be a part of one, such as 0.25, or a whole number")
        return self

    @property
    def decoding(self) -> Decoding:
        """How pictures are decoded."""
        return Decoding(self.max_pixels, self.background, self.pages)

    def fingerprint(self, model_hash: str) -> str:
        """The same for jobs that would produce the same result at the same place."""
        text = json.dumps({"model": model_hash, **self._relevant()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differing(self, other: JobSpec) -> list[str]:
        """The fields that make another result of it than of the other spec, at the same place."""
        ours, theirs = self._relevant(), other._relevant()
        return [name for name in JobSpec.model_fields if ours.get(name) != theirs.get(name)]

    def _relevant(self) -> dict[str, Any]:
        """The fields that decide about the result, JSON-able."""
        relevant = self.model_dump(
            mode="json",
            include={"source", "out", *_FIRST},
        )
        # Later fields count only where they say something: earlier jobs are still known by their fingerprint.
        relevant |= self.model_dump(
            mode="json",
            include=set(_LATER),
            exclude_defaults=True,
        )
        relevant["source"] = [each.rstrip("/") for each in relevant["source"]]  # shells append slashes
        relevant["out"] = relevant["out"].rstrip("/")
        if is_route(self.model):  # which has no content to be known by
            relevant["model"] = self.model
        return relevant


def _as_json(value: Any) -> Any:
    """The value as JSON knows it; dates and times, places and NumPy's numbers by their text or number."""
    if isinstance(value, Mapping):
        return {str(name): _as_json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_as_json(each) for each in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, (date, dt_time)):  # datetime is a date
        return value.isoformat()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, (str, int, float, bool, type(None))) and hasattr(value, "item"):
        return _as_json(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"holds {value}, which JSON does not know: give a finite number")
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    raise ValueError(f"holds {value!r}, which JSON does not know")


def make(**fields: Any) -> JobSpec:
    """A valid spec with absolute places. Raises SpecError with every problem that there is.

    model_per: ``COLUMN,COLUMN=TEMPLATE`` stands for ``by`` and ``model``.
    """
    if (given := fields.pop("model_per", None)) is not None:
        fields |= _model_per(given, fields)
    fields = _into_a_table(_placed(_with_query(fields)))
    try:
        spec = JobSpec(**{name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise SpecError(
            [problem_of(each, JobSpec) for each in error.errors()],
            hint=_how(error),
        ) from None
    return spec.model_copy(
        update={
            "source": tuple(absolute(each) for each in spec.source),
            "items": absolute(spec.items) if spec.items else None,
            "base": absolute(spec.base) if spec.base else None,
            "out": absolute(spec.out),
            "labels": absolute(spec.labels) if spec.labels else None,
            "artifacts": absolute(spec.artifacts) if spec.artifacts else None,
        }
    )


_EXAMPLES = {"source": "SOURCE names what is scored", "model": "--model model.onnx", "out": "--out predictions/"}


def _how(error: ValidationError) -> str:
    missing = [str(each["loc"][0]) for each in error.errors() if each["type"] == "missing"]
    example = ", ".join(_EXAMPLES[name] for name in missing if name in _EXAMPLES)
    return (f"For example: {example}. " if example else "") + "See 'tally score --help', or docs/reference/job.md."


_FIRST = ("settings", "format", "batch_size", "task", "labels")
_LATER = (
    *("media", "every", "size", "fit", "fps", "deinterlace", "frames", "codec"),
    *("crf", "audio", "overlay", "escape_formulas", "empty_rows", "by", "keep", "where"),
    *("items", "item_column", "key", "base", "limit", "sample", "shard", "thumbnails"),
    *("pages", "background", "max_pixels", "time", "time_unit", "window", "timezone", "aggregate"),
    *("path_columns", "csv", "query", "queue"),
)
"""Fields that decide about the result, and count only where they say something."""
_UNSAID: tuple[Any, ...] = (None, (), [], {}, False, "")


def outputs_folder() -> Path:
    """Where results are kept for which the user named no place: of jobs from a page, and what goes into a table."""
    return settings().home / "outputs"


def is_in_home(out: str) -> bool:
    """Whether this is no place that a user has named."""
    return Path(out).parent == outputs_folder()


def _into_a_table(fields: dict[str, Any]) -> dict[str, Any]:
    """``out: postgresql://HOST/DATABASE#TABLE``: rows are pushed there, and kept in Tally's home, to be looked at."""
    out = fields.get("out")
    if not isinstance(out, str) or not is_database(out):
        return fields
    out, how = absolute(out), fields.get("push")
    if how is not None and not (isinstance(how, Mapping) and "url" not in how):
        raise SpecError(
            "out: is a table, where rows are pushed, and push is given too",
            hint="Give a folder for out; or say in push only how: {when: finished}.",
        )
    if not out.partition("#")[2]:
        raise SpecError(
            "out: is a database, and names no table or collection of it",
            hint="Name it after the database, as in postgresql://HOST/DATABASE#TABLE.",
        )
    if fields.get("engine") == "ray":
        raise SpecError(
            "out: is a table, and a cluster's workers need a place that all of them can write to",
            hint="Give a bucket, and the table for push: --out s3://bucket/results --push " + out,
        )
    # Another part of the rows is another job: its rows go into the same table, and are kept elsewhere.
    more = {
        name: value
        for name, value in sorted(fields.items())
        if name in (*_FIRST, *_LATER) and value not in (*_UNSAID, JobSpec.model_fields[name].default)
    }
    text = json.dumps([out, fields.get("source"), fields.get("model"), *filter(None, [more])], default=str)
    place = outputs_folder() / hashlib.sha256(text.encode()).hexdigest()[:16]
    return {**fields, "out": str(place), "push": {**(how or {}), "url": out}}


def _with_query(fields: dict[str, Any]) -> dict[str, Any]:
    """``source: postgresql://HOST/DATABASE?query=SELECT ...``, or ``items``, as the fields that it stands for."""
    for name in ("source", "items"):
        given = fields.get(name)
        places = given if isinstance(given, (list, tuple)) else [given]
        if len(places) != 1 or not isinstance(places[0], str) or not is_sql(places[0]):
            continue
        place, query = parted(places[0])
        if query is not None and fields.get("query") is not None:
            raise SpecError("query: is given, and so is one in the URL")
        if query is not None:
            return {**fields, name: place, "query": query}
    return fields


def _model_per(given: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """``Device,Tag=models/{Device}_{Tag}.skops`` as the fields that it stands for."""
    columns, equals, template = str(given).partition("=")
    if not equals or not columns.strip() or not template.strip():
        raise SpecError(
            f"model_per: should be columns and a template (given: {given!r})",
            hint="For example: --model-per Device,Tag='models/{Device}_{Tag}.skops'",
        )
    if twice := [name for name in ("model", "by") if fields.get(name)]:
        raise SpecError(f"model_per: says the model and its columns, and {twice[0]} is given too")
    return {"by": columns, "model": template.strip()}


def read(path: str) -> JobSpec:
    """The spec in a YAML file; relative paths in it are relative to the file's folder."""
    return made(load(path), Path(path).resolve().parent)


def load(path: str, what: str = "job file") -> dict[str, Any]:
    """The fields in a YAML file, as they stand there. Raises StorageError, SpecError."""
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise StorageError(
            f"cannot read the {what} {path!r}: {error.strerror}", hint=f"It is looked for in {Path.cwd()}."
        ) from error
    except UnicodeDecodeError as error:
        raise SpecError(
            f"the {what} {path!r} is not UTF-8 text ({error.reason} at byte {error.start})",
            hint="Save it as UTF-8 in your editor.",
        ) from error
    return parsed(text, f"the {what} {path!r}")


def made(fields: dict[str, Any], folder: Path) -> JobSpec:
    """The spec of a file's fields; relative paths are relative to the folder."""
    if (given := fields.pop("model_per", None)) is not None:
        fields |= _model_per(given, fields)
    for name in ("source", "items", "base", "out", "labels", "artifacts", "model"):
        value = fields.get(name)
        if isinstance(value, str):
            fields[name] = beside(folder, value, name)
        elif isinstance(value, list) and name == "source":
            fields[name] = [beside(folder, str(each), name) for each in value]
    fields = _placed(fields, folder)
    return make(**fields)


def parsed(text: str, what: str = "the job file") -> dict[str, Any]:
    """The fields in a job file's text, as they stand there. what: it is called so in errors. Raises SpecError."""
    from tally import plain_yaml

    try:
        fields = plain_yaml.load(text)
    except ValueError as error:
        raise SpecError(f"{what} is not valid YAML: {error}", hint=plain_yaml.HINT) from None
    if not isinstance(fields, dict):
        raise SpecError(
            f"{what} must hold fields such as source, model and out, not {type(fields).__name__}",
            hint="Write one field on each line, with a space after the colon: 'source: photos/'.",
        )
    return {str(name): value for name, value in fields.items()}


def settled(spec: JobSpec) -> dict[str, Any]:
    """The fields that were given, for a process that starts elsewhere: a model beside this one has its whole path."""
    fields = spec.model_dump(mode="json", exclude_unset=True)
    return {**fields, "model": beside(Path.cwd(), spec.model, "model")}


def _placed(fields: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """The fields, with absolute places also where they stand inside of others."""
    found: dict[str, Any] = {}
    match fields.get("queue"):
        case {"base": str() | os.PathLike() as base, **others} if str(base):
            found["queue"] = {**others, "base": absolute(os.fspath(base), folder)}
    match fields.get("push"):
        case str() as url if "://" in url:
            found["push"] = absolute(url, folder)
        case {"url": str() as url, **others} if "://" in url:
            found["push"] = {**others, "url": absolute(url, folder)}
    return {**fields, **found}


def beside(folder: Path, value: str, name: str) -> str:
    """The value of a file's field ``name``, made absolute where it is a place that is meant from the file's folder."""
    # It may be missing, or a registry name, a URL, or module:Class; a template of names is never there itself.
    if not value or (name == "model" and not _is_file(folder, value)):
        return value
    return absolute(value, folder)


def _is_file(folder: Path, model: str) -> bool:
    """Whether a model is a file or a folder there, or a template of files' names."""
    file = f"{model.rpartition('.py:')[0]}.py" if ".py:" in model else model
    return not is_route(model) and ("{" in model or os.path.exists(folder / file))  # noqa: PTH110


def absolute(place: str, folder: Path | None = None) -> str:
    """A place that means the same in every process: URLs, variables and names of the registry stay, paths become
    absolute, those of sqlite:///FILE and duckdb:///FILE, too."""
    scheme, separator, rest = place.partition(":///")
    if separator and scheme in foreign.FILES:
        path = re.split(r"[?#]", rest, maxsplit=1)[0]
        return f"{scheme}:///{absolute(path, folder) if path else path}{rest[len(path) :]}"
    if "://" in place or place.startswith("models:/") or foreign.variable(place.partition("#")[0]) is not None:
        return place
    text = str((folder or Path.cwd()) / expanded(place))
    # Path drops a trailing slash; keep it, as "out.csv/" would say that a folder is meant.
    return text + "/" if place.endswith("/") and not text.endswith("/") else text


def shown(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a spec for people, logs and JSON: without secrets, the webhook's address among them."""
    hook = {"webhook": shown_webhook(fields["webhook"])} if fields.get("webhook") else {}
    return {name: _masked(value) for name, value in fields.items()} | hook


def _masked(value: Any) -> Any:
    match value:
        case str():
            return mask(value)
        case list() | tuple():
            return [_masked(each) for each in value]
        case Mapping():
            return {name: _masked(each) for name, each in value.items()}
    return value


def problem_of(error: Any, model: type[BaseModel]) -> str:
    """One of a ValidationError's errors, in a line. model: whose fields there are."""
    # Which of several it is, the value tells.
    where = ".".join(str(part) for part in error["loc"] if not isinstance(part, int))
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such field" + did_you_mean(
            where, (each.alias or name for name, each in model.model_fields.items())
        )
    if error["type"] == "missing":
        return f"no {'output (out)' if where == 'out' else where} is given"
    message = finding(error)
    if not where or where == "webhook":  # of several fields together, which the message names; or a secret
        message = message.removesuffix(f" (given: {error['input']!r})")
    return f"{where}: {message}" if where else message
