"""The overlays of ``deploy/kubernetes``, rendered as ``kubectl apply -k`` does, and schemas to hold them against."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tally.deploy.kubernetes.overlay import Overlay

REPOSITORY = Path(__file__).resolve().parent.parent
OVERLAYS = REPOSITORY / "deploy" / "kubernetes" / "overlays"
NAMES = sorted(each.name for each in OVERLAYS.iterdir())
SCHEMAS = REPOSITORY.parent / "shared" / "schemas"
OLDEST, NEWEST = "1.30", "1.37"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # of the other, large files would take long

Manifest = dict[str, Any]


@cache
def _rendered(name: str) -> str:
    return Overlay(OVERLAYS / name).text


def rendered(name: str) -> list[Manifest]:
    """The objects of an overlay, each time new ones."""
    return [each for each in yaml.load_all(_rendered(name), LOADER) if each is not None]


def one(found: list[Manifest], kind: str, name: str = "tally") -> Manifest:
    (each,) = (each for each in found if each["kind"] == kind and each["metadata"]["name"] == name)
    return each


# -- schemas -----------------------------------------------------------------------------------------------------------

_contents = cache(kubernetes_validate.utils.schema_contents)  # each has some megabytes


def own_problems(found: Manifest, version: str) -> list[str]:
    """What Kubernetes's own schema of a version refuses. Raises SchemaNotFoundError for kinds of others."""
    before = kubernetes_validate.utils.schema_contents
    kubernetes_validate.utils.schema_contents = _contents
    try:
        kubernetes_validate.validate(found, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error.message)]
    finally:
        kubernetes_validate.utils.schema_contents = before
    return []


def strict(schema: Any) -> Any:
    """A schema, refusing fields that it does not name."""
    if isinstance(schema, dict):
        found = {key: strict(value) for key, value in schema.items()}
        fields = found.get("properties")
        if isinstance(fields, dict) and fields and "apiVersion" not in fields:
            found.setdefault("additionalProperties", False)
        return found
    return [strict(each) for each in schema] if isinstance(schema, list) else schema


@cache
def taught_schemas() -> dict[tuple[str, str], Any]:
    """(group and version, kind) to the schema, of the kinds that operators bring."""
    found = {}
    for path in SCHEMAS.glob("ray.io_*.yaml"):
        crd = yaml.load(path.read_text(), LOADER)["spec"]
        for version in crd["versions"]:
            key = f"{crd['group']}/{version['name']}", crd["names"]["kind"]
            found[key] = strict(version["schema"]["openAPIV3Schema"])
    groups = {
        "certificate_v1": ("cert-manager.io/v1", "Certificate"),
        "externalsecret_v1": ("external-secrets.io/v1", "ExternalSecret"),
        "httproute_v1": ("gateway.networking.k8s.io/v1", "HTTPRoute"),
        "scaledobject_v1alpha1": ("keda.sh/v1alpha1", "ScaledObject"),
        "servicemonitor_v1": ("monitoring.coreos.com/v1", "ServiceMonitor"),
        "triggerauthentication_v1alpha1": ("keda.sh/v1alpha1", "TriggerAuthentication"),
    }
    for path in (SCHEMAS / "crds").glob("*.json"):
        found[groups[path.stem]] = strict(json.loads(path.read_text()))
    return found


def schema_problems(found: list[Manifest], *versions: str) -> list[str]:
    """What the published schemas refuse, of all objects that there are schemas of."""
    wrong = []
    for each in found:
        key = each.get("apiVersion", ""), each.get("kind", "")
        if key in taught_schemas():
            validator = jsonschema.Draft202012Validator(taught_schemas()[key])
            wrong += [f"{each['kind']}: {error.message[:200]}" for error in validator.iter_errors(copy.deepcopy(each))]
            continue
        for version in versions:
            try:
                wrong += [f"{each.get('kind')}: {text}" for text in own_problems(each, version)]
            except kubernetes_validate.SchemaNotFoundError:
                if key not in UNPUBLISHED and SCHEMAS.is_dir():
                    wrong.append(f"there is no schema of {key}")
    return wrong


UNPUBLISHED = {("gateway.networking.k8s.io/v1", "Gateway"), ("monitoring.coreos.com/v1", "PrometheusRule")}
"""Kinds whose schemas are not in ``shared/schemas``."""
