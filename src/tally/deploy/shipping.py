"""How a model gets into a container: what ``tally serve`` is told there.

A container sees buckets, the web and its own image, and none of this machine's folders.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, replace
from pathlib import Path

from tally.deploy.spec import DeploymentSpec
from tally.errors import SpecError
from tally.masking import has_secret
from tally.models import kinds
from tally.models.reference import ModelRef
from tally.models.resolve import BUNDLED, check_there, resolve
from tally.storage import is_url

REGISTERED = "models:/"
IN_IMAGE = "image:"
"""Before the path of a model that the image holds."""
PLACE = "/opt/tally/model"
"""Where images that Tally describes have their model."""

_ELSEWHERE = (
    "A container sees buckets (s3://, az://, gs://), a registry that is kept in one (TALLY_REGISTRY), https:// URLs, "
    "and what is in its image (image:/path). --env pip:FILE --image NAME --out FOLDER writes what an image is built "
    "from that has the model in it."
)


@dataclass(frozen=True, slots=True)
class Shipped:
    """served: the model, as ``tally serve`` in the container takes it. text: where it comes from, for people.

    local: the model itself, where it has to be copied into an image. requirement: what pip installs for its kind, if
    that is known. version: in the registry. fixed: whether all replicas, always, load the same content. labels,
    artifacts: where containers find them, unless they are in the model's package.
    """

    served: str
    text: str
    local: ModelRef | None = None
    requirement: str | None = None
    fixed: bool = True
    labels: str | None = None
    artifacts: str | None = None
    version: int | None = None


def shipped(spec: DeploymentSpec) -> Shipped:
    """How containers get the model of a deployment.

    A registered model is looked up now: replicas of one deployment never differ, whatever becomes of its alias, and
    need no database. Raises SpecError for one that they could not get, ModelNotFoundError, StorageError.
    """
    found = _shipped_model(spec)
    if found.local is not None:
        return found
    fixed = [
        each is None or each.startswith((IN_IMAGE, REGISTERED, "https:")) for each in (spec.labels, spec.artifacts)
    ]
    return replace(
        found,
        labels=_beside("labels", spec.labels),
        artifacts=_beside("artifacts", spec.artifacts),
        fixed=found.fixed and all(fixed),
    )


def _beside(what: str, place: str | None) -> str | None:
    """Where a container finds labels or artifacts. Raises SpecError where it sees none, ModelNotFoundError."""
    if place is None:
        return None
    if place.startswith(IN_IMAGE):
        return _in_image(place.removeprefix(IN_IMAGE), what).served
    if place.startswith(REGISTERED):
        from tally.models.registry import open_registry

        registry = open_registry()
        version = registry.get(place)
        if (mirror := registry.mirror(version)) is None:
            raise _here_only(f"{what}: {version}", version.location)
        return mirror
    if is_url(place) and not place.lower().startswith("file:"):
        if has_secret(place):
            raise _secret(what, place)
        return place
    raise SpecError(f"{what}: {place} is on this machine, and no container sees it", hint=_ELSEWHERE)


def _secret(what: str, place: str) -> SpecError:
    return SpecError(
        f"{what}: {place} has a secret in it, which would stand in the clear in what is applied",
        hint="Credentials of a bucket come from a Secret: --secret NAME",
    )


def _here_only(what: str, location: str | Path) -> SpecError:
    return SpecError(
        f"{what} is kept in a folder of this machine ({location}), which no container sees", hint=_ELSEWHERE
    )


def _shipped_model(spec: DeploymentSpec) -> Shipped:
    model = spec.model
    if model.startswith(IN_IMAGE):
        return _in_image(model.removeprefix(IN_IMAGE))
    if model.startswith(REGISTERED):
        return _registered(model, spec)
    if model.startswith(BUNDLED):
        check_there(model)
        return Shipped(model, f"{model}, which comes with Tally")
    if is_url(model) and not model.lower().startswith("file:"):
        if has_secret(model):
            raise _secret("model", model)
        if not model.lower().startswith("https:"):
            check_there(model)
        name = model.partition("#")[0].rstrip("/").rpartition("/")[2]
        traits = kinds.claiming(name)
        requirement = traits.extra if traits is not None else None
        fixed = model.lower().startswith("https:")
        return Shipped(model, f"fetched from {model}", requirement=requirement, fixed=fixed)
    return _local(model, spec)


def _in_image(path: str, what: str = "model") -> Shipped:
    if not path.startswith("/") or path.startswith("//") or posixpath.normpath(path) != path or not path.isprintable():
        raise SpecError(
            f"{what}: {IN_IMAGE}{path} is no absolute path in the image", hint=f"For example {IN_IMAGE}{PLACE}"
        )
    return Shipped(path, f"the image's {path}")


def _registered(model: str, spec: DeploymentSpec) -> Shipped:
    from tally.models.registry import open_registry

    registry = open_registry()
    version = registry.get(model)
    traits = dict(kinds.table()).get(version.kind)
    requirement = traits.extra if traits is not None else None
    place = registry.mirror(version)
    if place is not None:
        return Shipped(place, f"{version}, fetched from {place}", requirement=requirement, version=version.version)
    if spec.environment.form in ("pip", "conda"):
        local = _resolved(spec, str(version))
        return Shipped(PLACE, f"{version}, in the image", local, requirement, version=version.version)
    raise _here_only(f"model: {version}", version.location)


def _local(model: str, spec: DeploymentSpec) -> Shipped:
    check_there(model)
    if spec.environment.form not in ("pip", "conda"):
        raise SpecError(f"model: {model} is on this machine, and no container sees it", hint=_ELSEWHERE)
    ref = _resolved(spec, model)
    requirement = kinds.get(ref.kind).traits.extra
    return Shipped(PLACE, f"{Path(model).name}, in the image", local=ref, requirement=requirement)


def _resolved(spec: DeploymentSpec, model: str) -> ModelRef:
    """The model with the user's options, which its package in the image holds."""
    from tally import plain_yaml

    settings = {key: plain_yaml.value(value) for key, _, value in (each.partition("=") for each in spec.settings)}
    for what, place in (("labels", spec.labels), ("artifacts", spec.artifacts)):
        if place is not None and place.startswith(IN_IMAGE):
            raise SpecError(
                f"{what}: {place} is in an image, and the package that is to be in it has them from this machine",
                hint="Give a path of this machine, or the model as image:/path, too.",
            )
    return resolve(
        model, task=spec.task, labels=spec.labels, artifacts=spec.artifacts, settings=settings, trust=spec.trust
    )
