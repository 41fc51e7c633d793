"""How far what was applied has come: which of its objects are not ready yet, and what they wait for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tally.deploy.kubernetes.rollout import troubles
from tally.errors import DeployError
from tally.kubernetes import Cluster, Object

_CONDITIONS: Mapping[str, tuple[str, ...]] = {
    "Job": ("Complete", "SuccessCriteriaMet"),
    "RayCluster": ("HeadPodReady",),
    "ExternalSecret": ("Ready",),
    "Certificate": ("Ready",),
}
"""Kinds that are ready when one of these conditions holds."""


def pending(cluster: Cluster, manifests: Sequence[Object]) -> list[str]:
    """One line for each object that is not ready yet. Objects of kinds that are never waited for count as ready.

    Raises DeployError for a Job that has failed for good, or an object that is not there.
    """
    return [line for each in manifests for line in _of(cluster, each)]


def _of(cluster: Cluster, manifest: Object) -> Iterator[str]:
    kind, what = manifest["kind"], f"{manifest['kind']} {manifest['metadata']['name']}"
    if kind not in ("Deployment", "StatefulSet", *_CONDITIONS) or manifest["spec"].get("suspend"):
        return
    live = cluster.get_any(manifest)
    if live is None:
        raise DeployError(f"the {what} was removed while it was waited for")
    status: Object = live.get("status") or {}
    conditions = {each["type"]: each for each in status.get("conditions") or () if each.get("status") == "True"}
    if kind == "Job" and "Failed" in conditions:
        why = conditions["Failed"].get("message") or conditions["Failed"].get("reason", "")
        raise DeployError(
            f"the {what} has failed: {why}",
            hint=f"kubectl --context {cluster.name} -n {cluster.namespace} logs job/{manifest['metadata']['name']}",
        )
    text = _replicas(live, status) if kind in ("Deployment", "StatefulSet") else _condition(kind, status, conditions)
    if text is None:
        return
    pods = _pods(cluster, manifest) if kind in ("Deployment", "StatefulSet", "Job") else ()
    told = [f"{pod['metadata']['name']}: {why}" for pod in pods for _, why in troubles(cluster, pod)]
    yield "; ".join([f"{what}: {text}", *dict.fromkeys(told)])


def _replicas(live: Object, status: Object) -> str | None:
    wanted = live["spec"].get("replicas", 1)
    if status.get("observedGeneration", 0) < live["metadata"].get("generation", 0):
        return "not begun"
    every, updated = status.get("replicas", 0), status.get("updatedReplicas", 0)
    available = status.get("availableReplicas", 0)
    if every == wanted and available >= wanted and updated >= wanted:
        return None
    return f"{min(available, updated)} of {wanted} pods ready"


def _condition(kind: str, status: Object, conditions: Mapping[str, Object]) -> str | None:
    if any(each in conditions for each in _CONDITIONS[kind]) or (
        kind == "RayCluster" and status.get("state") == "ready"
    ):
        return None
    if kind == "Job":
        return "it has not ended"
    other = [each.get("message", "") for each in status.get("conditions") or () if each.get("status") != "True"]
    return f"not ready{f': {other[0]}' if other and other[0] else ''}"


def _pods(cluster: Cluster, manifest: Object) -> list[Object]:
    """The pods of an object that are not ending."""
    labels = manifest["spec"]["template"]["metadata"].get("labels") or {}
    return [each for each in cluster.list("Pod", labels) if "deletionTimestamp" not in each["metadata"]]
