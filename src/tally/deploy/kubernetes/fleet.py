"""All endpoints that Tally has made in a namespace of a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tally.deploy.base import Fleet, Status
from tally.deploy.kubernetes import rollout
from tally.deploy.kubernetes.manifests import LABELS, MANAGED, MODEL, PROFILE, VERSION, is_ours, selector
from tally.errors import DeployError
from tally.kubernetes import Cluster, Object
from tally.text import did_you_mean

_MADE = (
    "HorizontalPodAutoscaler", "PodDisruptionBudget", "HTTPRoute", "Ingress", "Deployment", "Service", "NetworkPolicy",
)  # fmt: skip
"""What an endpoint may have, in the order in which it is taken away: what leads to it first, who protects it last."""


class KubernetesFleet(Fleet):
    """Raises SpecError where the kubeconfig leads to no cluster, and from each method DeployError."""

    def __init__(self, *, context: str | None = None, namespace: str | None = None) -> None:
        self._cluster = Cluster(context, namespace)
        self.place = f"the namespace {self._cluster.namespace} of {self._cluster.name}"

    def close(self) -> None:
        self._cluster.close()

    def list(self) -> Sequence[Status]:
        names = [each["metadata"]["name"] for each in self._cluster.list("Deployment", {**LABELS, **MANAGED})]
        found = (status(self._cluster, name) for name in sorted(names))
        return [each for each in found if each.exists]

    def get(self, name: str) -> Status:
        live = self._cluster.get("Deployment", name)
        if live is None or not is_ours(live):
            raise self._missing(name)
        return status(self._cluster, name)

    def parts(self, name: str) -> Sequence[str]:
        found = [f"{kind} {name}" for kind in self._kinds(name)]
        if not found:
            raise self._missing(name)
        return found

    def delete(self, name: str) -> Sequence[str]:
        found = self.parts(name)
        for each in found:
            self._cluster.delete(each.partition(" ")[0], name)
        return found

    def _kinds(self, name: str) -> Iterator[str]:
        """The kinds of which it has an object that Tally made."""
        labels = {**selector(name), **MANAGED}
        for kind in _MADE:
            if any(each["metadata"]["name"] == name for each in self._cluster.list(kind, labels)):
                yield kind

    def _missing(self, name: str) -> DeployError:
        if self._cluster.get("Deployment", name) is not None:
            return DeployError(f"the Deployment {name} in {self.place} was not made by Tally, and is left alone")
        names = [each["metadata"]["name"] for each in self._cluster.list("Deployment", {**LABELS, **MANAGED})]
        return DeployError(
            f"there is no endpoint {name!r} in {self.place}{did_you_mean(name, names)}",
            hint="'tally endpoints list --target kubernetes' shows them; --namespace and --context name other places.",
        )


def status(cluster: Cluster, name: str) -> Status:
    """How an endpoint of a cluster is now."""
    live = cluster.get("Deployment", name)
    now = rollout.progress(cluster, name, 0)
    if live is None or now is None:
        return Status(name, exists=False)
    (container, *_) = live["spec"]["template"]["spec"]["containers"]
    told: Object = live["metadata"].get("annotations") or {}
    problems = [now.failure] if now.failure else [*now.obstacles]
    return Status(
        name, True, now.ready, now.wanted, container.get("image", ""), told.get(MODEL, ""), told.get(VERSION, ""),
        told.get(PROFILE, ""), problems, _uris(cluster, name),
    )  # fmt: skip


def _uris(cluster: Cluster, name: str) -> dict[str, str]:
    """Where it is reached from within the cluster, by its Service's ports."""
    service = cluster.get("Service", name)
    ports = {each["name"]: each["port"] for each in service["spec"]["ports"]} if service else {}
    host = f"{name}.{cluster.namespace}.svc"
    found = {"scoring_uri": f"http://{host}/api/v1/service/{name}/score"} if "http" in ports else {}
    return {**found, "grpc": f"{host}:{ports['grpc']}"} if "grpc" in ports else found
