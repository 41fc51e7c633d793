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
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tally.alerts.rules import checked as alert_rule
from tally.alerts.webhook import checked as web_address
from tally.alerts.webhook import shown as shown_webhook
from tally.config import settings
from tally.engines.factory import checked as engine_name
from tally.errors import SpecError, StorageError
from tally.masking import mask
from tally.models.route import is_route
from tally.push.target import Push, is_database
from tally.storage import is_url, refuse_secrets
from tally.text import did_you_mean, expanded, seconds

_DEVICE = re.compile(r"auto|cpu|(cuda|tensorrt)(:\d+)?")
_RANGE = re.compile(r"\s*(\d+)\s*\.\.\s*(\d+)\s*")
_SQLITE = "sqlite:///"
_SIZE = re.compile(r"(?i)^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*$")

Side = Annotated[int, Field(ge=1, le=16_384)]
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
    media: what the source holds; detected by default.
    by, keep, where, time, window, aggregate, csv: tables only. by: columns whose values make a key, which chooses the
    model where ``model`` is a template (``models/{Device}.skops``). keep: input columns that the results carry; ``*``
    stands for all. where: a condition in SQL; other rows are passed over. time: the column of timestamps.
    window: seconds that readings are gathered over before they are scored (``5m`` is understood).
    aggregate: what is made of each window's values. csv: options for reading CSV.
    settings, csv: values that JSON knows; dates and times are written as text.
    escape_formulas: in CSV, text that a spreadsheet would take for a formula begins with an apostrophe.
    queue, until_empty: queues only. queue: how messages are read: body, key, template, base, prefetch, meta,
    models.
    push: where rows go, too, as they are committed; an address alone stands for its ``url``.
    alerts: rules that are evaluated when the job has ended; webhook: who is told when one of them holds.
    every, size, frames, codec, crf, audio: videos only. size: (width, height) in pixels (``640x360`` is understood).
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
    task: Task | None = None
    labels: str | None = None
    artifacts: str | None = None
    settings: dict[str, Any] = {}
    trust: bool = False
    format: Literal["parquet", "csv", "jsonl", "jpg", "png", "webp", "mp4", "mov", "mkv", "webm"] | None = None
    media: Literal["image", "video", "table"] | None = None
    every: int = Field(default=1, ge=1)
    size: tuple[Side, Side] | None = None
    frames: Literal["jpg", "png", "webp"] | None = None
    codec: str | None = Field(default=None, min_length=1)
    crf: float | None = Field(default=None, ge=0)
    audio: bool = True
    escape_formulas: bool = False
    overlay: bool = False
    by: Names = ()
    keep: Names = ()
    where: str | None = Field(default=None, min_length=1)
    time: str | None = Field(default=None, min_length=1)
    window: float | None = Field(default=None, gt=0)
    aggregate: tuple[Literal["mean", "min", "max", "last", "count"], ...] = ("mean",)
    csv: dict[str, Any] = {}
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

    @field_validator("source", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, Path)) else value

    @field_validator("source", "out", "labels", "artifacts")
    @classmethod
    def _without_secrets(cls, value: Any) -> Any:
        for place in (value,) if isinstance(value, str) else value or ():
            if is_url(place):
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

    @field_validator("size", mode="before")
    @classmethod
    def _width_and_height(cls, value: Any) -> Any:
        if isinstance(value, str):
            sides = value.lower().split("x")
            if len(sides) != 2 or not all(side.strip().isdigit() for side in sides):
                raise ValueError("should be a width and a height such as 640x360")
            return tuple(int(side) for side in sides)
        return value

    @field_validator("size")
    @classmethod
    def _not_too_large(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] * value[1] > 2**27:
            raise ValueError("is more than 128 million pixels")
        return value

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
    def _for_clusters(self) -> Self:
        given = [name for name in ("address", "cpus", "gpus", "resources") if getattr(self, name) not in (None, {})]
        if self.engine == "local" and given:
            raise PydanticCustomError("engine", "{names}: needs engine: ray", {"names": ", ".join(given)})
        if self.gpus is not None and self.gpus > 1 and self.gpus != int(self.gpus):
            raise PydanticCustomError("gpus", "gpus: should be a part of one, such as 0.25, or a whole number")
        return self

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
            include={"source", "out", "settings", "format", "batch_size", "task", "labels"},
        )
        # Later fields count only where they say something: earlier jobs are still known by their fingerprint.
        relevant |= self.model_dump(
            mode="json",
            include={
                "media",
                "every",
                "size",
                "frames",
                "codec",
                "crf",
                "audio",
                "overlay",
                "escape_formulas",
                "by",
                "keep",
                "where",
            }
            | {"time", "window", "aggregate", "csv", "queue"},
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
    fields = _into_a_table(_placed(fields))
    try:
        spec = JobSpec(**{name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise SpecError(
            [_problem(each) for each in error.errors()], hint="See 'tally score --help', or docs/reference/job.md."
        ) from None
    return spec.model_copy(
        update={
            "source": tuple(absolute(each) for each in spec.source),
            "out": absolute(spec.out),
            "labels": absolute(spec.labels) if spec.labels else None,
            "artifacts": absolute(spec.artifacts) if spec.artifacts else None,
        }
    )


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
    out = absolute(out)
    if fields.get("push") is not None:
        raise SpecError("out: is a table, where rows are pushed, and push is given too", hint="Give a folder for out.")
    if fields.get("engine") == "ray":
        raise SpecError(
            "out: is a table, and a cluster's workers need a place that all of them can write to",
            hint="Give a bucket, and the table for push: --out s3://bucket/results --push " + out,
        )
    text = json.dumps([out, fields.get("source"), fields.get("model")], default=str)
    place = outputs_folder() / hashlib.sha256(text.encode()).hexdigest()[:16]
    return {**fields, "out": str(place), "push": {"url": out}}


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
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise StorageError(f"cannot read the job file {path!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"the job file {path!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    fields = parsed(text, f"the job file {path!r}")
    folder = Path(path).resolve().parent
    if (given := fields.pop("model_per", None)) is not None:
        fields |= _model_per(given, fields)
    for name in ("source", "out", "labels", "artifacts", "model"):
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
        raise SpecError(f"{what} is not valid YAML: {error}") from None
    if not isinstance(fields, dict):
        raise SpecError(f"{what} must hold fields such as source, model and out, not {type(fields).__name__}")
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
    """A place that means the same in every process: URLs and names of the registry stay, paths become absolute, that of
    sqlite:///FILE, too."""
    if place.startswith(_SQLITE) and place.removeprefix(_SQLITE)[:1] not in ("", "#"):
        return _SQLITE + absolute(place.removeprefix(_SQLITE), folder)
    if "://" in place or place.startswith("models:/"):
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


def _problem(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such field" + did_you_mean(where, JobSpec.model_fields)
    if error["type"] == "missing":
        return f"{where}: is needed"
    if error["type"] == "string_too_short":
        return f"{where}: is empty"
    if error["type"] == "string_unicode":
        return f"{where}: is not UTF-8 text (given: {error['input']!r})"
    message = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    message = message[0].lower() + message[1:]
    if not where:  # of several fields together; the message names them
        return message
    if where == "webhook":
        return f"{where}: {message}"
    return f"{where}: {message} (given: {error['input']!r})"
