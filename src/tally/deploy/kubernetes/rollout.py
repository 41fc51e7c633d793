"""How far a rollout is, and why it does not come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tally.deploy.kubernetes.manifests import selector
from tally.kubernetes import Cluster, Object

_REVISION = "deployment.kubernetes.io/revision"
_HASH = "pod-template-hash"
LINES = 10
"""Lines of a container's log that are shown."""

_IN_VAIN = {
    "ImagePullBackOff": "the image cannot be pulled",
    "InvalidImageName": "the image's name is not valid",
    "ImageInspectError": "the image is damaged",
    "ErrImageNeverPull": "the image is not on the node, and may not be pulled",
    "CreateContainerConfigError": "what the container needs is missing",
    "CreateContainerError": "the container cannot be made",
    "RunContainerError": "the container cannot be started",
    "CrashLoopBackOff": "the container ends again and again",
}
"""Why a container waits, where more waiting does not help."""


@dataclass(frozen=True, slots=True)
class Progress:
    """ready, wanted: replicas of the newest version. done: all of them answer, and none of another version is left.
    failure: why it will not come. obstacles: what it waits for, which may still come."""

    ready: int
    wanted: int
    done: bool
    failure: str | None = None
    obstacles: Sequence[str] = ()

    @property
    def text(self) -> str:
        return f"{self.ready} of {self.wanted} replicas ready" + "".join(f"; {each}" for each in self.obstacles)


def progress(cluster: Cluster, name: str, least: int) -> Progress | None:
    """How far the newest version of an endpoint is; None where there is no such Deployment. least: replicas that there
    are to be."""
    deployment = cluster.get("Deployment", name)
    if deployment is None:
        return None
    status: Object = deployment.get("status") or {}
    wanted = max(least, deployment["spec"].get("replicas", 1))
    if status.get("observedGeneration", 0) < deployment["metadata"].get("generation", 0):
        return Progress(0, wanted, done=False)
    updated, every = status.get("updatedReplicas", 0), status.get("replicas", 0)
    available = status.get("availableReplicas", 0)
    if every == updated == available >= wanted:
        return Progress(wanted, wanted, done=True)
    ready = min(available, updated)
    failures: list[str] = []
    obstacles: list[str] = []
    pods = _newest(cluster, deployment)
    for pod in pods:
        for final, text in troubles(cluster, pod):
            (failures if final else obstacles).append(f"{pod['metadata']['name']}: {text}")
    for each in status.get("conditions", ()):
        if each["type"] == "ReplicaFailure" and each["status"] == "True" and not pods:
            failures.append(f"no pod can be made: {each.get('message', each.get('reason'))}")
        if each["type"] == "Progressing" and each["status"] == "False" and not failures:
            failures.append("; ".join([each.get("message", each.get("reason", "")), *obstacles]))
    if every > updated and updated >= wanted:
        obstacles.append(f"{every - updated} of the version before are still ending")
    if not failures and not obstacles and updated < wanted and deployment["spec"].get("replicas", 1) < wanted:
        obstacles.append(f"the autoscaler has asked for {deployment['spec'].get('replicas', 1)} yet")
    return Progress(ready, wanted, done=False, failure=failures[0] if failures else None, obstacles=_once(obstacles))


def last_words(cluster: Cluster, name: str) -> list[str]:
    """The end of the log of a replica that runs and is not ready."""
    for pod in cluster.list("Pod", selector(name)):
        states = pod.get("status", {}).get("containerStatuses") or ()
        if any("running" in (each.get("state") or {}) and not each.get("ready") for each in states):
            return cluster.log(pod["metadata"]["name"], LINES)
    return []


def _newest(cluster: Cluster, deployment: Object) -> list[Object]:
    """The pods of the newest version that are not ending."""
    name = deployment["metadata"]["name"]
    revision = (deployment["metadata"].get("annotations") or {}).get(_REVISION)
    hashes = [
        each["metadata"]["labels"][_HASH]
        for each in cluster.list("ReplicaSet", selector(name))
        if (each["metadata"].get("annotations") or {}).get(_REVISION) == revision
        and _HASH in each["metadata"].get("labels", {})
    ]
    return [
        pod
        for pod in cluster.list("Pod", selector(name))
        if "deletionTimestamp" not in pod["metadata"]
        and (not hashes or pod["metadata"].get("labels", {}).get(_HASH) in hashes)
    ]


def troubles(cluster: Cluster, pod: Object) -> Iterator[tuple[bool, str]]:
    """What keeps a pod from being ready, and whether that is final."""
    status: Object = pod.get("status") or {}
    for each in status.get("conditions") or ():
        if each["type"] == "PodScheduled" and each["status"] == "False":
            yield False, f"Pending, as no node takes it: {each.get('message', each.get('reason', ''))}"
    if status.get("phase") == "Failed":
        yield True, f"{status.get('reason', 'Failed')}: {status.get('message', 'it ended')}"
    # Those of containers that run first come first: while they cannot, the others are not begun.
    for each in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
        state: Object = each.get("state") or {}
        waiting = state.get("waiting") or {}
        reason = waiting.get("reason", "")
        if reason == "CrashLoopBackOff":
            yield True, _crash(cluster, pod, each)
        elif reason in _IN_VAIN:
            yield True, f"{reason}: {_IN_VAIN[reason]}: {waiting.get('message', '')}"
        elif reason == "ErrImagePull":
            yield False, f"{reason}: {waiting.get('message', '')}"
        elif "running" in state and not each.get("ready"):
            yield False, "it runs, and is not ready yet"


def _crash(cluster: Cluster, pod: Object, container: Any) -> str:
    ended: Object = (container.get("lastState") or {}).get("terminated") or {}
    how = ended.get("reason", "Error")
    text = f"CrashLoopBackOff: it ended {container.get('restartCount', 0)} times, last with {how}"
    text += f", exit code {ended['exitCode']}" if "exitCode" in ended else ""
    if how == "OOMKilled":
        return f"{text}: it needs more than its memory; give more with --memory"
    # Kubernetes keeps the end of the log as the message of a container that failed.
    lines = (ended.get("message") or "").splitlines() or cluster.log(pod["metadata"]["name"], LINES)
    return "\n    ".join([f"{text}. Its last lines:", *lines[-LINES:]])


def _once(lines: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(lines))
