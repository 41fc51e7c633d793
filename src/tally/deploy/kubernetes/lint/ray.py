"""Rules about Ray clusters: their groups, GPUs, and what virtual nodes ask of pods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from tally.deploy.kubernetes.lint.objects import Found, Manifest, Pods, amounts, called

VIRTUAL = {"type": "virtual-kubelet", "kubernetes.io/role": "agent", "kubernetes.io/os": "linux"}
"""The selectors of virtual nodes."""
VIRTUAL_TAINTS = ("virtual-kubelet.io/provider", "azure.com/aci")
OVERWRITES = "ray.io/overwrite-container-cmd"
"""The annotation of a pod whose command KubeRay leaves as it is."""


def ray(found: Found) -> Iterator[str]:
    for each in found.of("RayCluster", "RayJob"):
        spec = each["spec"]
        if each["kind"] == "RayJob":
            yield from _job(each)
            if (spec := spec.get("rayClusterSpec")) is None:
                continue
        names = [group["groupName"] for group in spec.get("workerGroupSpecs", ())]
        if len(set(names)) != len(names):
            yield f"{called(each)} has two groups of one name: {', '.join(names)}"
        scaled = spec.get("enableInTreeAutoscaling")
        for group in spec.get("workerGroupSpecs", ()):
            what = f"{called(each)}, group {group['groupName']}"
            if group["minReplicas"] > group["maxReplicas"]:
                yield f"{what}: at least {group['minReplicas']} and at most {group['maxReplicas']}"
            if scaled and "replicas" in group:
                yield f"{what}: two say how many replicas there are, and the autoscaler is to"
            yield from _resources(what, group)
    for pods in found.pods:
        if pods.kind not in ("RayCluster", "RayJob"):
            continue
        cluster = pods.owner["spec"].get("rayClusterSpec", pods.owner["spec"])
        if cluster.get("enableInTreeAutoscaling") and pods.spec.get("restartPolicy", "Never") != "Never":
            yield f"{pods.what}: the autoscaler replaces pods that end: restartPolicy Never"
        if pods.group is not None:
            yield from _gpu(pods)
            yield from _virtual(pods)


def _job(found: Manifest) -> Iterator[str]:
    """What KubeRay refuses of a job after it was applied, where nobody looks."""
    spec = found["spec"]
    if spec.get("rayClusterSpec") is None and not spec.get("clusterSelector"):
        yield f"{called(found)} has no cluster: rayClusterSpec, or clusterSelector"
    if (spec.get("rayClusterSpec") or {}).get("upgradeStrategy"):
        yield f"{called(found)}: KubeRay refuses upgradeStrategy for the cluster of a job"
    if spec.get("suspend") and spec.get("shutdownAfterJobFinishes") is not True:
        yield f"{called(found)}: KubeRay suspends no job without shutdownAfterJobFinishes: true"


def _resources(what: str, group: Mapping[str, Any]) -> Iterator[str]:
    """Ray places by what it is told, Kubernetes by what a pod requests."""
    (container, *_) = group["template"]["spec"]["containers"]
    requests = amounts(container.get("resources", {}).get("requests", {}))
    told = {**group.get("rayStartParams", {})}
    for word in container.get("command", ()):
        name, is_, value = word.removeprefix("--").partition("=")
        if is_ and name in ("num-cpus", "num-gpus") and told.get(name, value) != value:
            yield f"{what}: the command says {word}, and rayStartParams {told[name]}"
    for name, resource in (("num-cpus", "cpu"), ("num-gpus", "nvidia.com/gpu")):
        there, said = requests.get(resource), told.get(name)
        if said is not None and there != Decimal(said):
            yield f"{what}: Ray is told {name} {said}, and the pod has {there or 0}"


def _gpu(pods: Pods) -> Iterator[str]:
    tolerated = {each.get("key") for each in pods.spec.get("tolerations", ())}
    limits = pods.spec["containers"][0].get("resources", {}).get("limits", {})
    if "nvidia.com/gpu" in limits and not tolerated & {"nvidia.com/gpu", *VIRTUAL_TAINTS}:
        yield f"{pods.what} wants a GPU, and does not tolerate the taint nvidia.com/gpu of nodes that have one"


def is_virtual(pods: Pods) -> bool:
    """Whether pods are meant for virtual nodes."""
    keys = {each.get("key") for each in pods.spec.get("tolerations", ())}
    return pods.spec.get("nodeSelector", {}).get("type") == VIRTUAL["type"] or bool(keys & set(VIRTUAL_TAINTS))


def _virtual(pods: Pods) -> Iterator[str]:
    """What virtual nodes ask of a pod, and what they do not know."""
    if not is_virtual(pods):
        return
    selector = pods.spec.get("nodeSelector", {})
    keys = {each.get("key") for each in pods.spec.get("tolerations", ())}
    yield from (
        f"{pods.what}: virtual nodes are selected by {key}: {value}"
        for key, value in VIRTUAL.items()
        if selector.get(key) != value
    )
    yield from (f"{pods.what} does not tolerate {each} of virtual nodes" for each in VIRTUAL_TAINTS if each not in keys)
    for each in pods.containers:
        if not each.get("command"):
            yield f"{pods.what}, {each['name']}: on virtual nodes the command has to be said"
        if "lifecycle" in each:
            yield f"{pods.what}, {each['name']}: virtual nodes know no hooks (lifecycle)"
    if pods.annotations.get(OVERWRITES) != "true":
        yield f"{pods.what}: KubeRay would replace its command: {OVERWRITES}: 'true'"
    if pods.spec.get("initContainers"):
        yield f"{pods.what}: virtual nodes know no init containers"
    if any("persistentVolumeClaim" in each for each in pods.spec.get("volumes", ())):
        yield f"{pods.what}: virtual nodes know no claims of volumes"
    if pods.spec.get("serviceAccountName"):
        yield f"{pods.what}: virtual nodes have no identity of the cloud (serviceAccountName)"
    gpu = "nvidia.com/gpu" in pods.spec["containers"][0].get("resources", {}).get("limits", {})
    if gpu and not pods.annotations.get("virtual-kubelet.io/gpu-type"):
        yield f"{pods.what}: virtual nodes want the kind of GPU: virtual-kubelet.io/gpu-type"


RULES = (ray,)
"""Each yields a line for each place where something is wrong."""
