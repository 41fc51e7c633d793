"""How a model gets into a container: what ``tally serve`` is told there.

A container sees buckets, the web and its own image, and none of this machine's folders.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from pathlib import Path

from tally.deploy.spec import DeploymentSpec
from tally.errors import SpecError
from tally.masking import has_secret
from tally.models import kinds
from tally.models.reference import ModelRef
from tally.models.resolve import check_there, resolve
from tally.storage import is_url

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
    that is known. fixed: whether all replicas, always, load the same content.
    """

    served: str
    text: str
    local: ModelRef | None = None
    requirement: str | None = None
    fixed: bool = True


def shipped(spec: DeploymentSpec) -> Shipped:
    """How containers get the model of a deployment.

    A registered model is looked up now: replicas of one deployment never differ, whatever becomes of its alias, and
    need no database. Raises SpecError for one that they could not get, ModelNotFoundError, StorageError.
    """
    model = spec.model
    if model.startswith(IN_IMAGE):
        return _in_image(model.removeprefix(IN_IMAGE))
    if model.startswith("models:/"):
        return _registered(model, spec)
    if is_url(model) and not model.lower().startswith("file:"):
        if has_secret(model):
            raise SpecError(
                f"model: {model} has a secret in it, which would stand in the clear in what is applied",
                hint="Credentials of a bucket come from a Secret: --secret NAME",
            )
        if not model.lower().startswith("https:"):
            check_there(model)
        name = model.partition("#")[0].rstrip("/").rpartition("/")[2]
        traits = kinds.claiming(name)
        requirement = traits.extra if traits is not None else None
        fixed = model.lower().startswith("https:")
        return Shipped(model, f"fetched from {model}", requirement=requirement, fixed=fixed)
    return _local(model, spec)


def _in_image(path: str) -> Shipped:
    if not path.startswith("/") or path.startswith("//") or posixpath.normpath(path) != path or not path.isprintable():
        raise SpecError(
            f"model: {IN_IMAGE}{path} is no absolute path in the image", hint=f"For example {IN_IMAGE}{PLACE}"
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
        return Shipped(place, f"{version}, fetched from {place}", requirement=requirement)
    if spec.environment.form in ("pip", "conda"):
        return Shipped(PLACE, f"{version}, in the image", local=_resolved(spec, str(version)), requirement=requirement)
    raise SpecError(
        f"model: {version} is kept in a folder of this machine ({version.location}), which no container sees",
        hint=_ELSEWHERE,
    )


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
    return resolve(model, task=spec.task, settings=settings, trust=spec.trust)
