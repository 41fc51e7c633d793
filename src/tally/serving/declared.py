"""Several models to serve, as a YAML file declares them: each with options and limits of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from tally.errors import SpecError
from tally.jobs.spec import Byte, Task, absolute, beside, colour, millions
from tally.models.package import problems_of, read_yaml
from tally.models.resolve import resolve
from tally.serving.settings import Limits, ModelSettings, replicas_from
from tally.storage import normalised
from tally.text import did_you_mean, seconds

_SUFFIXES = (".yaml", ".yml")
_SERVER = ("host", "port", "grpc_port", "max_body", "drain", "keys", "certificate", "private_key")
"""What is the server's and not a model's: options of the command."""

Whole = Annotated[int, Field(strict=True)]
Text = Annotated[str, Field(min_length=1)]
Background = Annotated[tuple[Byte, Byte, Byte] | None, BeforeValidator(colour)]


class Declared(BaseModel):
    """One model of the file. What it leaves out is as the command says.

    model: as ``tally score --model`` takes it. name: what clients call it; by default, as the model itself is called.
    task, labels, artifacts, settings, trust: as in a job file. The rest are :class:`Limits`, with durations such as
    ``5ms``, replicas such as ``2`` or ``0..4``, and a share such as ``1%``; background and max_pixels as in a job file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: Text
    name: Text | None = None
    task: Task | None = None
    labels: Text | None = None
    artifacts: Text | None = None
    settings: dict[str, Any] | None = None
    trust: bool | None = None
    replicas: tuple[Whole, Whole] | None = None
    max_batch: Whole | None = None
    max_delay: float | None = None
    max_queue: Whole | None = None
    timeout: float | None = None
    idle: float | None = None
    load_timeout: float | None = None
    threads: Whole | None = None
    device: Text | None = None
    payloads: Text | None = None
    payload_share: float | None = None
    pages: Literal["first", "all"] | None = None
    background: Background = None
    max_pixels: Annotated[int | None, BeforeValidator(millions), Field(ge=1)] = None

    @field_validator("replicas", mode="before")
    @classmethod
    def _least_and_most(cls, value: Any) -> Any:
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            try:
                return replicas_from(str(value))
            except ValueError:
                raise ValueError("should be a number such as 2, or a range such as 0..4") from None
        return value

    @field_validator("max_delay", "timeout", "idle", "load_timeout", mode="before")
    @classmethod
    def _duration(cls, value: Any) -> Any:
        return seconds(value) if isinstance(value, str) else value

    @field_validator("payload_share", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                return float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
            except ValueError:
                raise ValueError("should be a share such as 0.01 or 1%") from None
        return value


OPTIONS = ("task", "labels", "artifacts", "settings", "trust")
_LIMITS = tuple(each.name for each in fields(Limits))


def is_file(text: str) -> bool:
    """Whether this names a file that declares models, and no model: a ``tally.yaml`` is a package."""
    path = Path(text)
    return path.suffix.lower() in _SUFFIXES and path.name != "tally.yaml" and "://" not in text


def read(file: str, options: Mapping[str, Any], limits: Limits) -> list[ModelSettings]:
    """The models of a file; relative places in it are relative to its folder.

    options, limits: of models that do not say their own. Raises SpecError with every problem of the file, and what
    :func:`tally.models.resolve.resolve` raises for a model whose name has to be looked up.
    """
    path = Path(file)
    values = read_yaml(path)
    wrong = [f"{name}: {_unknown(str(name))}" for name in values if name != "models"]
    entries = values.get("models")
    if not isinstance(entries, list) or not entries:
        wrong.append("models: should be a list of models, each with model and what is its own")
        entries = []
    found: list[tuple[Declared, Limits]] = []
    for at, entry in enumerate(entries):
        try:
            declared = Declared.model_validate(entry)
        except ValidationError as error:
            wrong += [f"{_called(at, entry)}: {each}" for each in _problems(error)]
            continue
        own = replace(limits, **_said(declared, _LIMITS))
        if own.payloads is not None and declared.payloads is not None:
            own = replace(own, payloads=normalised(absolute(own.payloads, path.parent.absolute())))
        wrong += [f"{_called(at, entry)}: {each}" for each in own.problems()]
        found.append((declared, own))
    if wrong:
        raise SpecError(
            [f"{file}: {each}" for each in wrong],
            hint="docs/how-to/serve.md shows such a file; its fields are in docs/reference/job.md.",
        )
    return [_settings(declared, own, options, path.parent.absolute()) for declared, own in found]


def known_as(model: str, options: Mapping[str, Any]) -> str:
    """What the model itself is called, as a name for clients. Raises what resolving it raises."""
    return re.sub(r"[^\w.-]+", "-", resolve(model, **options).name).strip("-.") or "model"


def _settings(declared: Declared, limits: Limits, options: Mapping[str, Any], folder: Path) -> ModelSettings:
    own = {**options, **_said(declared, OPTIONS)}
    for name in ("labels", "artifacts"):
        if (place := getattr(declared, name)) is not None:
            own[name] = absolute(place, folder)
    model = beside(folder, declared.model, "model")
    return ModelSettings(declared.name or known_as(model, own), model, own, limits)


def _said(declared: Declared, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(declared, name)) is not None}


def _called(at: int, entry: Any) -> str:
    """How people find a model in the file."""
    name = entry.get("name") or entry.get("model") if isinstance(entry, dict) else None
    return str(name) if name else f"models.{at}"


def _problems(error: ValidationError) -> list[str]:
    types = {each["type"] for each in error.errors()}
    if "model_type" in types:
        return ["should have fields such as model and replicas"]
    found = problems_of(error, [*Declared.model_fields])
    return [each for each in found if not each.startswith("model: field required")] + ["no model is given"] * (
        "missing" in types
    )


def _unknown(name: str) -> str:
    if name in _SERVER:
        return f"is the server's, and an option of the command: --{name.replace('_', '-')}"
    if name in Declared.model_fields:
        return "is a model's: put it into the model's entry under models"
    return f"there is no such field{did_you_mean(name, ['models', *_SERVER])}"
