"""A set of manifests, and what rules ask of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from tally.deploy.quantities import amount

Manifest = Mapping[str, Any]

RAY_CLUSTER, RAY_TYPE = "ray.io/cluster", "ray.io/node-type"
"""Labels that KubeRay gives the pods of a RayCluster."""
NAMESPACELESS = ("Namespace", "PersistentVolume", "ClusterRole", "ClusterRoleBinding")
SERVES = ("Deployment", "StatefulSet", "DaemonSet")
"""Kinds whose pods always run."""


@dataclass(frozen=True, slots=True)
class Pods:
    """The pods of one template. what: for messages. group: of a Ray cluster's workers; None for all others."""

    owner: Manifest
    what: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    spec: Mapping[str, Any]
    group: Mapping[str, Any] | None = None

    @property
    def namespace(self) -> str | None:
        return namespace_of(self.owner)

    @property
    def kind(self) -> str:
        return str(self.owner["kind"])

    @property
    def containers(self) -> Sequence[Mapping[str, Any]]:
        """All, those that run first among them."""
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def ports(self) -> Mapping[str, int]:
        """Name to number."""
        every = [port for each in self.spec["containers"] for port in each.get("ports", ())]
        return {port.get("name", str(port["containerPort"])): port["containerPort"] for port in every}

    def has_port(self, port: str | int) -> bool:
        return port in self.ports or port in self.ports.values()


class Found:
    """A set of manifests, and what rules ask of it."""

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        self.manifests = manifests
        self.pods = [pods for each in manifests for pods in pods_of(each)]

    def of(self, *kinds: str) -> Iterator[Manifest]:
        return (each for each in self.manifests if each["kind"] in kinds)

    def get(self, kind: str, name: str, beside: Manifest) -> Manifest | None:
        """The object of that name in the namespace of another."""
        return next(
            (
                each
                for each in self.of(kind)
                if each["metadata"].get("name") == name
                and (kind in NAMESPACELESS or namespace_of(each) == namespace_of(beside))
            ),
            None,
        )

    def selected(self, selector: Mapping[str, Any], beside: Manifest) -> list[Pods]:
        """The pods that a selector of labels is about, in the namespace of an object."""
        return [pods for pods in self.pods if pods.namespace == namespace_of(beside) and matches(selector, pods.labels)]


def pods_of(found: Manifest) -> Iterator[Pods]:
    if found["kind"] in (*SERVES, "ReplicaSet", "Job"):
        yield _of_template(found, called(found), found["spec"]["template"], {})
    if found["kind"] == "CronJob":
        yield _of_template(found, called(found), found["spec"]["jobTemplate"]["spec"]["template"], {})
    if found["kind"] == "Pod":
        yield _of_template(found, called(found), found, {})
    if found["kind"] in ("RayCluster", "RayJob"):
        spec = found["spec"] if found["kind"] == "RayCluster" else found["spec"].get("rayClusterSpec")
        if spec is None:
            return
        # The cluster of a RayJob has a name that nobody knows before.
        shared = {RAY_CLUSTER: found["metadata"]["name"]} if found["kind"] == "RayCluster" else {}
        head = spec["headGroupSpec"]["template"]
        yield _of_template(found, f"{called(found)}, head", head, {**shared, RAY_TYPE: "head"})
        for group in spec.get("workerGroupSpecs", ()):
            what = f"{called(found)}, group {group['groupName']}"
            yield _of_template(found, what, group["template"], {**shared, RAY_TYPE: "worker"}, group)


def _of_template(
    owner: Manifest,
    what: str,
    template: Mapping[str, Any],
    more: Mapping[str, str],
    group: Mapping[str, Any] | None = None,
) -> Pods:
    metadata = template.get("metadata") or {}
    labels = {**(metadata.get("labels") or {}), **more}
    return Pods(owner, what, labels, metadata.get("annotations") or {}, template["spec"], group)


def called(found: Manifest) -> str:
    return f"{found['kind']} {found['metadata']['name']}"


def namespace_of(found: Manifest) -> str | None:
    namespace: str | None = found["metadata"].get("namespace")
    return namespace


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether labels are what a selector asks for; an empty selector asks for nothing."""
    if not (selector.get("matchLabels") or {}).items() <= labels.items():
        return False
    for each in selector.get("matchExpressions", ()):
        value, values = labels.get(each["key"]), each.get("values", ())
        fits = {"In": value in values, "NotIn": value not in values, "Exists": value is not None}
        if not fits.get(each["operator"], value is None):
            return False
    return True


def amount_of(text: Any) -> Decimal | None:
    try:
        return amount(str(text))
    except ValueError:
        return None


def amounts(given: Mapping[str, Any]) -> dict[str, Decimal | None]:
    return {name: amount_of(value) for name, value in given.items()}


def shown(labels: Mapping[str, Any]) -> str:
    flat = labels.get("matchLabels", labels)
    return ", ".join(f"{key}={value}" for key, value in flat.items()) or "nothing"
