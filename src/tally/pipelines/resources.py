"""``resource`` templates: objects of a Kubernetes cluster, through a context that the user has named.

What Argo's executor has kubectl do: https://argo-workflows.readthedocs.io/en/latest/walk-through/kubernetes-resources/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml

from tally.errors import DeployError
from tally.pipelines.document import scalar_text, to_json

ACTIONS = ("apply", "create", "get", "delete")
FIELDS = {"action", "manifest", "successCondition", "failureCondition"}
LOOK_SECONDS = 1.0
"""How often an object is looked at while a condition is waited for."""
STEP_LABEL = "tally/pipeline-step"
"""The label of an object that ``create`` has made: by it, a run that goes on finds what it has made already."""

_CONDITION = re.compile(r"\s*(?P<path>[\w.\[\]-]+)\s*(?P<operator>==|!=|=|>|<)\s*(?P<value>[^,\s]*)\s*")
_STEP = re.compile(r"[\w-]+|\[\d+\]")
_PATH = re.compile(r"\{?\.?((?:[\w-]+|\[\d+\])(?:\.[\w-]+|\[\d+\])*)\}?")


class ResourceError(ValueError):
    """A manifest, a condition or a path cannot be read, or leads nowhere."""


@dataclass(frozen=True, slots=True)
class Condition:
    """``status.succeeded > 0``: where the value is, and what it has to be."""

    path: str
    operator: str
    value: str

    def holds(self, found: Any) -> bool:
        """Whether an object meets it. One that has no such value yet does not."""
        try:
            actual = value_at(found, self.path)
        except ResourceError:
            return False
        if self.operator in (">", "<"):
            try:
                difference = float(actual) - float(self.value)
            except ValueError:
                return False
            return difference > 0 if self.operator == ">" else difference < 0
        return (actual == self.value) is (self.operator != "!=")


def conditions(text: str) -> list[Condition]:
    """All of them have to hold; none where there is no text. Raises ResourceError."""
    found = []
    for part in text.split(",") if text.strip() else ():
        match = _CONDITION.fullmatch(part)
        if match is None:
            raise ResourceError(f"{part.strip()!r} is no condition, such as status.succeeded > 0")
        found.append(Condition(match["path"], match["operator"], match["value"].strip("'\"")))
    return found


def value_at(found: Any, path: str) -> str:
    """The value at ``status.items[0].name``, or at ``{.status.phase}``, as text. Raises ResourceError."""
    match = _PATH.fullmatch(path.strip())
    if match is None:
        raise ResourceError(f"the path {path!r} is not understood here: names and numbers in brackets are")
    for step in _STEP.findall(match[1]):
        key: Any = int(step[1:-1]) if step[0] == "[" else step
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):
            raise ResourceError(f"the object has no {path}") from None
    return scalar_text(found) if not isinstance(found, (dict, list)) else to_json(found)


def check_path(path: str) -> None:
    """Raises ResourceError for a path that is not understood."""
    if _PATH.fullmatch(path.strip()) is None:
        raise ResourceError(f"the path {path!r} is not understood here: names and numbers in brackets are")


def documents(manifest: str) -> list[dict[str, Any]]:
    """The objects of a manifest. Raises ResourceError."""
    try:
        found = [each for each in yaml.safe_load_all(manifest) if each is not None]
    except yaml.YAMLError as error:
        raise ResourceError(f"the manifest is not valid YAML: {error}") from None
    for each in found:
        metadata = each.get("metadata") if isinstance(each, dict) else None
        if not isinstance(metadata, dict) or not each.get("kind") or not each.get("apiVersion"):
            raise ResourceError("each object of the manifest needs apiVersion, kind and metadata")
        if not metadata.get("name") and not metadata.get("generateName"):
            raise ResourceError(f"the {each['kind']} of the manifest has no name")
    if not found:
        raise ResourceError("the manifest is empty")
    return found


class Resources:
    """Acts on a cluster, until it is closed. Methods raise DeployError, SpecError."""

    def __init__(self, context: str, namespace: str | None) -> None:
        self._context, self._namespace = context, namespace

    @cached_property
    def _cluster(self) -> Any:
        from tally.kubernetes import Cluster

        return Cluster(self._context, self._namespace)

    def close(self) -> None:
        if "_cluster" in vars(self):
            self._cluster.close()

    def act(self, action: str, manifests: list[dict[str, Any]], step: str) -> dict[str, Any] | None:
        """Do it to all objects; the last of them as it then is, or None if it was deleted.

        step: the node's id. What was created for it before is not created again.
        """
        found: dict[str, Any] | None = None
        for manifest in manifests:
            name = manifest["metadata"].get("name", "")
            match action:
                case "apply":
                    found = self._cluster.apply(manifest)
                case "create":
                    labels = {STEP_LABEL: step}
                    there = self._cluster.list_any(manifest, labels)
                    metadata = {**manifest["metadata"], "labels": {**manifest["metadata"].get("labels", {}), **labels}}
                    found = there[0] if there else self._cluster.create_any({**manifest, "metadata": metadata})
                case "delete":
                    self._cluster.delete_any(manifest)
                    found = None
                case _:
                    found = self.look({**manifest, "metadata": {**manifest["metadata"], "name": name}})
        return found

    def look(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """An object as it is now. Raises DeployError where it is gone."""
        there = self._cluster.get_any(found)
        if there is None:
            raise DeployError(f"there is no {found['kind']} {found['metadata']['name']}")
        return dict(there)
