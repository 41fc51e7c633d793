"""The model registry over HTTP: versions, aliases with their history, tags; new versions from files."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from pydantic import BaseModel, Field

from tally import plain_yaml
from tally.config import settings
from tally.errors import RefusedError, SpecError
from tally.jobs.facade import Jobs
from tally.models import kinds
from tally.models.reference import ModelRef
from tally.models.registry import ModelVersion, RegisteredModel, Registry
from tally.models.resolve import resolve
from tally.server.api.jobs import AllJobs
from tally.server.aside import Aside
from tally.server.auth.guard import Admin, Operator, Viewer
from tally.server.errors import answers
from tally.server.once import OnceRoute
from tally.server.places import check_code, check_places, file_of, is_code
from tally.server.uploads import uploads_folder

router = APIRouter(
    prefix="/models", tags=["models"], route_class=OnceRoute, responses=answers(400, 401, 403, 404, 409, 422, 429, 503)
)

INSPECT_SECONDS = 120.0


class NewVersion(BaseModel):
    """A model to add. model: a place that a job may name, or an upload's; the rest as for ``tally models add``."""

    model: str = Field(min_length=1, max_length=4000, examples=["s3://bucket/model.onnx"])
    alias: str | None = Field(None, max_length=128)
    task: str | None = Field(None, max_length=100)
    labels: str | None = Field(None, max_length=4000)
    artifacts: str | None = Field(None, max_length=4000)
    settings: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    trust: bool = False


class Target(BaseModel):
    """What an alias points at."""

    version: int = Field(ge=1, le=2**31 - 1)


class Tags(BaseModel):
    """Tags to set; null takes one away."""

    tags: dict[Annotated[str, Field(min_length=1, max_length=128)], Annotated[str, Field(max_length=4000)] | None]


def open_registry(jobs: Jobs) -> Registry:
    """The registry of the server's database."""
    return Registry(jobs.store.engine, settings().registry)


def all_models(jobs: Jobs) -> list[RegisteredModel]:
    """Every model, with its versions."""
    by_name: dict[str, list[ModelVersion]] = {}
    for each in open_registry(jobs).list():
        by_name.setdefault(each.name, []).append(each)
    return [RegisteredModel(name, tuple(versions), ()) for name, versions in by_name.items()]


def _registry(jobs: AllJobs) -> Registry:
    return open_registry(jobs)


Models = Annotated[Registry, Depends(_registry)]
Name = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]
Alias = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]
Version = Annotated[int, Path(ge=1, le=2**31 - 1)]


@router.get("")
def list_models(who: Viewer, models: Models) -> list[ModelVersion]:
    """Every version of every model, by name and number."""
    return models.list()


@router.get("/{name}")
def show_model(who: Viewer, models: Models, name: Name) -> RegisteredModel:
    """A model's versions, and what its aliases pointed at, oldest first."""
    return models.show(name)


@router.post("/{name}/versions", status_code=201)
def add_version(request: Request, who: Operator, models: Models, name: Name, wanted: NewVersion) -> ModelVersion:
    """Copy a model into the registry as the next version. Content that is there already is not added again."""
    if uploaded := _is_upload(wanted.model):
        wanted = _of_upload(wanted)
    if wanted.model.startswith("models:/"):
        raise SpecError(f"model: {wanted.model} is registered already")
    places = [("upload" if uploaded else "model", wanted.model)]
    places += [(each, place) for each in ("labels", "artifacts") if (place := getattr(wanted, each))]
    check_places(places, request.app.state.settings.roots)
    check_code(who, wanted.model, artifacts=wanted.artifacts, trust=wanted.trust)
    if uploaded and not who.may("admin") and (wanted.trust or _carries_code(FilePath(file_of(wanted.model)))):
        raise RefusedError(403, "uploads that hold code become models by an admin only", hint="Ask an admin.")
    aside: Aside = request.app.state.aside
    given = {each: getattr(wanted, each) for each in ("task", "labels", "artifacts", "settings", "trust")}
    ref = aside.call(_resolved, wanted.model, given, seconds=INSPECT_SECONDS, what="looking at the model")
    return models.add(name, ModelRef.from_dict(ref), alias=wanted.alias, metadata=wanted.metadata, who=who.name)


@router.put("/{name}/aliases/{alias}")
def set_alias(who: Operator, models: Models, name: Name, alias: Alias, target: Target) -> ModelVersion:
    """Point the alias at a version from now on."""
    return models.alias(name, alias, target.version, who=who.name)


@router.delete("/{name}/aliases/{alias}")
def remove_alias(who: Operator, models: Models, name: Name, alias: Alias) -> ModelVersion:
    """Remove the alias; the answer is the version that it pointed at, which stays."""
    return models.unalias(name, alias, who=who.name)


@router.post("/{name}/aliases/{alias}/rollback")
def roll_back(who: Operator, models: Models, name: Name, alias: Alias) -> ModelVersion:
    """Point the alias back at the version before."""
    return models.rollback(name, alias, who=who.name)


@router.patch("/{name}/versions/{version}/tags")
def tag_version(who: Operator, models: Models, name: Name, version: Version, wanted: Tags) -> ModelVersion:
    """Set or take away tags of a version."""
    return models.tag(name, version, wanted.tags)


@router.delete("/{name}/versions/{version}", status_code=204)
def remove_version(who: Admin, models: Models, name: Name, version: Version) -> None:
    """Remove a version for good, unless an alias points at it."""
    models.remove(name, version)


def _is_upload(place: str) -> bool:
    if "://" in place or "\0" in place:
        return False
    try:
        return FilePath(file_of(place)).resolve().is_relative_to(uploads_folder().resolve())
    except (OSError, RuntimeError):
        return False


def _of_upload(wanted: NewVersion) -> NewVersion:
    """What an upload of a model's file and its labels stands for: a folder that is no package, with one model in it."""
    folder = FilePath(wanted.model)
    if not folder.is_dir() or any((folder / marker).exists() for marker in ("tally.yaml", *kinds.markers())):
        return wanted
    files = sorted(each for each in folder.iterdir() if each.is_file())
    models = [each for each in files if kinds.claiming(each.name) is not None]
    if len(models) != 1:
        return wanted
    (model,), labels = models, [each for each in files if each.suffix.lower() in (".txt", ".json")]
    takes_labels = "labels" in getattr(kinds.claiming(model.name), "flags", ())
    described = (folder / f"{model.name}.yaml").exists()  # which says what its labels are
    if wanted.labels is None and len(labels) == 1 and takes_labels and not described:
        wanted = wanted.model_copy(update={"labels": str(labels[0])})
    return wanted.model_copy(update={"model": str(model)})


def _carries_code(place: FilePath) -> bool:
    """Whether using the uploaded model may run code that it brings or names."""
    for each in (place.parent if place.is_file() else place).rglob("*"):
        if is_code(each.name):
            return True
        if each.name == "tally.yaml":
            try:
                fields = plain_yaml.load(each.read_text("utf-8"))
            except (OSError, ValueError):
                continue  # it is no package, as whoever opens it says
            if isinstance(fields, dict) and "entry" in fields:
                return True
    return False


def _resolved(model: str, given: dict[str, Any]) -> dict[str, Any]:
    """In a process beside the server's."""
    return resolve(model, **given).to_dict()
