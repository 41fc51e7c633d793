"""Kept endpoints over HTTP: models that this server keeps online."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from tally.jobs.spec import Byte
from tally.models.reference import BATCH_LIMIT, ModelRef
from tally.models.resolve import registered, resolve
from tally.server.api.jobs import AllJobs
from tally.server.api.models import INSPECT_SECONDS, open_registry
from tally.server.api.views import EndpointView, Lines
from tally.server.aside import Aside
from tally.server.auth.guard import Admin, Operator, Viewer
from tally.server.errors import answers
from tally.server.once import OnceRoute
from tally.server.places import check_code, check_places
from tally.serving.deployments import (
    MAX_BODY,
    NAME,
    PORT,
    DeploymentStore,
    EndpointSpec,
    LookUp,
    Version,
    number_of,
)
from tally.serving.settings import Limits

router = APIRouter(
    prefix="/endpoints",
    tags=["endpoints"],
    route_class=OnceRoute,
    responses=answers(400, 401, 403, 404, 409, 422, 429, 503),
)

MOST_REPLICAS = 1000
_PATTERN = f"^{NAME.pattern}$"
_OPTIONS = ("task", "labels", "artifacts", "settings", "trust")
_PLACED = ("port", "grpc_port", "max_body", "drain")
_DEFAULTS = Limits()

Replicas = Annotated[int, Field(ge=0, le=MOST_REPLICAS)]
Number = Annotated[str, Field(min_length=1, max_length=100)]
Weight = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65535, description="On the server's machine; 0: any that is free.")]
GrpcPort = Annotated[int | None, Field(ge=0, le=65535, description="The same for gRPC; null for no gRPC.")]
MaxBody = Annotated[int, Field(ge=1, le=1 << 40, description="Bytes of a request.")]
Drain = Annotated[float, Field(gt=0, le=3600, description="Seconds that requests have to end, once it is to.")]
MaxBatch = Annotated[int | None, Field(ge=1, le=BATCH_LIMIT)]
MaxQueue = Annotated[int, Field(ge=1, le=1_000_000)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Device = Annotated[str, Field(max_length=100)]
Payloads = Annotated[str | None, Field(max_length=4000)]
Pages = Literal["first", "all"]
Background = Annotated[tuple[Byte, Byte, Byte] | None, Field(description="Red, green and blue.")]
MaxPixels = Annotated[int, Field(ge=1, le=1 << 40)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Model(_Strict):
    """A model to serve, as a job may name it."""

    model: str = Field(min_length=1, max_length=4000, examples=["models:/detector@champion"])
    task: str | None = Field(None, max_length=100)
    labels: str | None = Field(None, max_length=4000)
    artifacts: str | None = Field(None, max_length=4000)
    settings: dict[str, Any] = {}
    trust: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What :func:`tally.models.resolve.resolve` is told besides."""
        return {name: getattr(self, name) for name in _OPTIONS}


class NewEndpoint(Model):
    """A new endpoint. replicas: least and most processes. The rest as for ``tally serve``, durations in seconds."""

    name: str = Field(pattern=_PATTERN)
    port: Port = PORT
    grpc_port: GrpcPort = None
    max_body: MaxBody = MAX_BODY
    drain: Drain = 30.0
    replicas: tuple[Replicas, Replicas] = _DEFAULTS.replicas
    max_batch: MaxBatch = None
    max_delay: Seconds = _DEFAULTS.max_delay
    max_queue: MaxQueue = _DEFAULTS.max_queue
    timeout: Seconds = _DEFAULTS.timeout
    idle: Seconds = _DEFAULTS.idle
    load_timeout: Seconds = _DEFAULTS.load_timeout
    threads: Threads = _DEFAULTS.threads
    device: Device = _DEFAULTS.device
    payloads: Payloads = None
    payload_share: Share = _DEFAULTS.payload_share
    pages: Pages = _DEFAULTS.pages
    background: Background = None
    max_pixels: MaxPixels = _DEFAULTS.max_pixels


class NextVersion(Model):
    """A version to serve: instead of all others, or with a share of the requests beside them. What is said of the
    endpoint besides is so from now on, for all of its versions; what is left out stays as it is."""

    share: Share | None = None
    port: Port | None = None
    grpc_port: GrpcPort = None
    max_body: MaxBody | None = None
    drain: Drain | None = None
    replicas: tuple[Replicas, Replicas] | None = None
    max_batch: MaxBatch = None
    max_delay: Seconds | None = None
    max_queue: MaxQueue | None = None
    timeout: Seconds | None = None
    idle: Seconds | None = None
    load_timeout: Seconds | None = None
    threads: Threads | None = None
    device: Device | None = None
    payloads: Payloads = None
    payload_share: Share | None = None
    pages: Pages | None = None
    background: Background = None
    max_pixels: MaxPixels | None = None

    def changed(self, spec: EndpointSpec, version: Version) -> EndpointSpec:
        """The spec with the version, and with what is said besides. Raises SpecError."""
        nullable = ("grpc_port", "max_batch", "payloads", "background")  # where null says something
        given = {
            name: value
            for name in self.model_fields_set
            if (value := getattr(self, name)) is not None or name in nullable
        }
        own = {name: given[name] for name in _PLACED if name in given}
        limits = {each.name: given[each.name] for each in fields(Limits) if each.name in given}
        return replace(spec.with_model(version, share=self.share), limits=replace(spec.limits, **limits), **own)


class Scale(_Strict):
    """replicas: least and most processes."""

    replicas: tuple[Replicas, Replicas]


class Shares(_Strict):
    """split: number of a version to its weight. shadows: to the share of requests of which it gets a copy."""

    split: dict[Number, Weight] = Field(max_length=100)
    shadows: dict[Number, Share] = Field({}, max_length=100)


def open_deployments(jobs: AllJobs) -> DeploymentStore:
    """The endpoints of the server's database."""
    return DeploymentStore(jobs.store.engine)


def look_up(request: Request, who: Viewer, jobs: AllJobs) -> LookUp:
    """Looks a model up in a process beside the server's; one that may hold code, from elsewhere, for admins only."""
    aside: Aside = request.app.state.aside

    def opened(model: str, options: Mapping[str, Any]) -> ModelRef:
        found = aside.call(_resolved, model, dict(options), seconds=INSPECT_SECONDS, what="looking at the model")
        return ModelRef.from_dict(found)

    def find(model: str, options: Mapping[str, Any]) -> ModelRef:
        check_code(who, model, artifacts=options.get("artifacts"), trust=bool(options.get("trust")))
        if not model.startswith("models:/"):
            return opened(model, options)
        return registered(open_registry(jobs), model, lambda folder: opened(str(folder), options))

    return find


Deployments = Annotated[DeploymentStore, Depends(open_deployments)]
Finder = Annotated[LookUp, Depends(look_up)]
Name = Annotated[str, Path(pattern=_PATTERN)]


@router.get("")
def list_endpoints(who: Viewer, store: Deployments) -> list[EndpointView]:
    """All endpoints, by name."""
    return [EndpointView.of(each) for each in store.list()]


@router.post("", status_code=201)
def add_endpoint(
    request: Request, who: Operator, store: Deployments, find: Finder, wanted: NewEndpoint
) -> EndpointView:
    """Keep a model online. The answer comes before it is loaded: ``state`` says later whether it is ready."""
    check_model(request, wanted, wanted.payloads)
    store.check_new(wanted.name)
    limits = Limits(**{each.name: getattr(wanted, each.name) for each in fields(Limits)})
    version = _version(find, wanted)
    number = number_of(version.ref)
    spec = EndpointSpec(
        {number: version}, {number: 100.0}, limits, port=wanted.port, grpc_port=wanted.grpc_port,
        max_body=wanted.max_body, drain=wanted.drain,
    )  # fmt: skip
    return EndpointView.of(store.create(wanted.name, spec, who=who.name))


@router.get("/{name}")
def show_endpoint(who: Viewer, store: Deployments, name: Name) -> EndpointView:
    """What an endpoint serves, its replicas, how it has done lately, and what it served before."""
    return EndpointView.of(store.get(name))


@router.get("/{name}/log")
def endpoint_log(
    who: Viewer, store: Deployments, name: Name, lines: Annotated[int, Query(ge=1, le=10_000)] = 100
) -> Lines:
    """The last lines that its process and its replicas have printed; none where another machine serves it."""
    return Lines(lines=[*store.printed(name, lines=lines)])


@router.post("/{name}/versions")
def serve_version(
    request: Request, who: Operator, store: Deployments, find: Finder, name: Name, wanted: NextVersion
) -> EndpointView:
    """Serve another version: instead of all others once it is ready, or beside them."""
    check_model(request, wanted, wanted.payloads)
    store.get(name)
    version = _version(find, wanted)
    return EndpointView.of(store.change(name, lambda spec: wanted.changed(spec, version), who=who.name))


@router.post("/{name}/scale")
def scale_endpoint(who: Operator, store: Deployments, name: Name, wanted: Scale) -> EndpointView:
    """Keep so many replicas of each version that gets requests."""
    return EndpointView.of(store.scale(name, wanted.replicas, who=who.name))


@router.post("/{name}/split")
def split_endpoint(who: Operator, store: Deployments, name: Name, wanted: Shares) -> EndpointView:
    """Share out the requests that name no version. One with the weight 0 gets none and ends."""
    return EndpointView.of(store.share_out(name, wanted.split, wanted.shadows, who=who.name))


@router.post("/{name}/reload")
def reload_endpoint(who: Operator, store: Deployments, find: Finder, name: Name) -> EndpointView:
    """Look up its model again, an alias say, and serve what it is now. Of several versions that is the one with the
    largest share; it keeps that, and the others theirs."""
    return EndpointView.of(store.reload(name, look_up=find, who=who.name))


@router.post("/{name}/rollback")
def roll_back_endpoint(who: Operator, store: Deployments, name: Name) -> EndpointView:
    """Serve what it served before its last change."""
    return EndpointView.of(store.roll_back(name, who=who.name))


@router.delete("/{name}", status_code=204)
def remove_endpoint(who: Admin, store: Deployments, name: Name) -> None:
    """Serve it no more, once it has answered what it was sent."""
    store.delete(name)


def check_model(request: Request, wanted: Model, payloads: str | None = None) -> None:
    """Raises SpecError with every place that a request may not name."""
    places = [(each, place) for each in ("model", "labels", "artifacts") if (place := getattr(wanted, each))]
    if payloads is not None:
        places.append(("out", payloads))
    check_places(places, request.app.state.settings.roots)


def _version(find: LookUp, wanted: Model) -> Version:
    return Version(wanted.model, find(wanted.model, wanted.options), wanted.options)


def _resolved(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """In a process beside the server's."""
    return resolve(model, **options).to_dict()
