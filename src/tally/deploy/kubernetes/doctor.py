"""Whether a cluster has what an overlay needs: looked at from here, and from a pod within it.

A check returns a line, or raises, as those of :mod:`tally.health.checks` do.
"""

from __future__ import annotations

import copy
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from tally.deploy.azure import az
from tally.deploy.kubernetes.checks import amounts, shown, takes_pods
from tally.deploy.kubernetes.installation import Installation
from tally.deploy.kubernetes.lint.needs import secrets_of
from tally.deploy.kubernetes.lint.objects import Found
from tally.deploy.kubernetes.lint.ray import is_virtual
from tally.deploy.kubernetes.rollout import troubles
from tally.errors import DeployError
from tally.health.checks import Skip, Warn
from tally.kubernetes import Object

GPU = "nvidia.com/gpu"
POD = "tally-doctor"
"""How the name of the pod begins that looks from within."""
POD_SECONDS = 300.0
"""How long the pod may take: its node may have to come, and the image to be pulled."""
PAUSE = 1.0
_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
_ATTACHED = ("ebs.csi.aws.com", "disk.csi.azure.com", "pd.csi.storage.gke.io", "rancher.io/local-path")
"""Provisioners of disks that one node at a time can have."""
_TOLERATED = ("sku",)
"""Taints of pools of GPUs on Azure (sku=gpu), which the overlays' pods that want one tolerate."""

MACHINES = (
    # Size of Azure's, the family that its quota is counted in, cores, GPUs.
    ("Standard_NC4as_T4_v3", "standardNCASv3_T4Family", 4, 1),
    ("Standard_D4s_v5", "standardDSv5Family", 4, 0),
)
"""What a pool is made of on Azure, the first that the quota allows."""


def checks(installation: Installation, *, location: str | None, nodes: int, pod: bool) -> list[tuple[str, Any]]:
    """Names and checks. location: of Azure, whose quota is asked for so many nodes. pod: also from within."""
    found: list[tuple[str, Callable[[], str]]] = [
        ("cluster", lambda: _cluster(installation)),
        ("kinds", lambda: _kinds(installation)),
        ("secrets", lambda: _secrets(installation)),
        ("storage", lambda: _storage(installation)),
        ("quota", lambda: _quota(installation)),
        ("pool", lambda: _pool(installation)),
    ]
    if location is not None:
        found.append((f"azure {location}", lambda: azure_pool(location, nodes)))
    if pod:
        found.append(("from within", lambda: _within(installation)))
    return found


def _cluster(installation: Installation) -> str:
    nodes = installation.cluster.list("Node")
    versions = sorted({each["status"]["nodeInfo"]["kubeletVersion"] for each in nodes if "nodeInfo" in each["status"]})
    ready = [each for each in nodes if takes_pods(each)]
    text = f"{installation.cluster.name}: Kubernetes {', '.join(versions) or 'of a version that it does not tell'}"
    text += f", {len(nodes)} nodes, of which {len(ready)} take pods; namespace {installation.overlay.namespace}"
    if not ready:
        raise DeployError(f"{text}: nothing can run")
    return text


def _kinds(installation: Installation) -> str:
    """Whether operators are there that understand what the overlay says."""
    taught = {(each["group"], each["kind"]): each for each in installation.cluster.taught()}
    wrong, right = [], []
    for each in installation.overlay.manifests:
        group, _, version = each["apiVersion"].rpartition("/")
        if "." not in group or (group.endswith(".k8s.io") and not group.startswith("gateway.")):
            continue
        known = taught.get((group, each["kind"]))
        if known is None or version not in known["versions"]:
            served = f", which serves {', '.join(known['versions'])}" if known else ""
            wrong.append(f"no {each['kind']} ({each['apiVersion']}){served}")
        elif (told := known["fields"][version]) and (fields := sorted(set(each.get("spec", {})) - set(told))):
            wrong.append(f"{each['kind']} without {', '.join(fields)}: its operator is too old")
        else:
            right.append(f"{each['kind']} {version}")
    if wrong:
        raise DeployError(
            f"the cluster knows {'; '.join(dict.fromkeys(wrong))}",
            hint="docs/how-to/aks.md has the commands that install the operators.",
        )
    return ", ".join(dict.fromkeys(right)) or "all are Kubernetes's own"


def _secrets(installation: Installation) -> str:
    wanted = secrets_of(installation.overlay.manifests)
    if missing := [each for each in installation.missing() if "Secret" in each]:
        raise DeployError("\n".join(missing))
    return ", ".join(name for _, name in wanted) or "none has to be there before"


def _storage(installation: Installation) -> str:
    classes = {each["metadata"]["name"]: each for each in installation.cluster.list("StorageClass")}
    default = next(
        (
            name
            for name, each in classes.items()
            if (each["metadata"].get("annotations") or {}).get(_DEFAULT_CLASS) == "true"
        ),
        None,
    )
    wrong, right = [], []
    for what, claim in _claims(installation.overlay.manifests):
        name = claim.get("storageClassName", default)
        if name == "":
            right.append(f"{what}: a volume of its own")
        elif name is None:
            wrong.append(f"{what} names no class, and the cluster has no default")
        elif name not in classes:
            wrong.append(f"{what}: there is no class {name!r}; there are {', '.join(sorted(classes)) or 'none'}")
        elif "ReadWriteMany" in claim["accessModes"] and classes[name].get("provisioner") in _ATTACHED:
            wrong.append(f"{what}: {name} has disks of {classes[name]['provisioner']}, not shares (ReadWriteMany)")
        else:
            right.append(f"{what}: {name}")
    if wrong:
        raise DeployError("; ".join(wrong), hint="Say another class in the overlay's parameters.yaml.")
    return ", ".join(right) or "no claims"


def _claims(manifests: Sequence[Object]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for each in manifests:
        if each["kind"] == "PersistentVolumeClaim":
            yield each["metadata"]["name"], each["spec"]
        for claim in each["spec"].get("volumeClaimTemplates", ()) if each["kind"] == "StatefulSet" else ():
            yield f"{each['metadata']['name']}'s {claim['metadata']['name']}", claim["spec"]


def _quota(installation: Installation) -> str:
    """Whether the namespace may have what runs always, and what may run at most."""
    least, most = _sum(installation.overlay.manifests)
    lacking, tight = [], []
    for quota in installation.cluster.list("ResourceQuota"):
        hard = amounts(quota.get("status", {}).get("hard") or quota.get("spec", {}).get("hard") or {})
        used = amounts(quota.get("status", {}).get("used") or {})
        for resource in ("cpu", "memory", GPU):
            name = f"requests.{resource}" if f"requests.{resource}" in hard else resource
            if name not in hard:
                continue
            free = hard[name] - used.get(name, Decimal(0))
            text = f"the quota {quota['metadata']['name']} has {shown(name, free)} of {name} left"
            if least.get(resource, 0) > free:
                lacking.append(f"{text}, and what always runs needs {shown(name, least[resource])}")
            elif most.get(resource, 0) > free:
                tight.append(f"{text}; all workers at once need {shown(name, most[resource])}")
    if lacking:
        raise DeployError("; ".join(lacking))
    always = ", ".join(shown(name, value) + " memory" * (name == "memory") for name, value in least.items() if value)
    text = f"{always} always"
    if tight:
        raise Warn(f"{text}; {'; '.join(tight)}")
    return text


def _sum(manifests: Sequence[Object]) -> tuple[dict[str, Decimal], dict[str, Decimal]]:
    """What all pods request: those that always run, and as many as there may be."""
    scaled = {
        (each["spec"]["scaleTargetRef"].get("kind", "Deployment"), each["spec"]["scaleTargetRef"]["name"]): (
            each["spec"].get("minReplicas", each["spec"].get("minReplicaCount", 0)),
            each["spec"].get("maxReplicas", each["spec"].get("maxReplicaCount", 100)),
        )
        for each in manifests
        if each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")
    }
    least: dict[str, Decimal] = {}
    most: dict[str, Decimal] = {}
    for pods in Found(manifests).pods:
        if pods.kind in ("Job", "CronJob", "RayJob"):
            bounds = (0, 1) if pods.group is None else (0, pods.group["maxReplicas"])
        elif pods.group is not None:
            bounds = pods.group["minReplicas"], pods.group["maxReplicas"]
        else:
            count = pods.owner["spec"].get("replicas", 1)
            bounds = scaled.get((pods.kind, pods.owner["metadata"]["name"]), (count, count))
        for each in pods.spec["containers"]:
            for name, value in amounts(each["resources"]["requests"]).items():
                least[name] = least.get(name, Decimal(0)) + value * bounds[0]
                most[name] = most.get(name, Decimal(0)) + value * bounds[1]
    return least, most


def _pool(installation: Installation) -> str:
    """Which nodes would do the work: those with GPUs where there are some."""
    nodes = [each for each in installation.cluster.list("Node") if takes_pods(each, tolerated=_TOLERATED)]
    have = [amounts(each["status"].get("allocatable", {})) for each in nodes]
    gpus = sum((each.get(GPU, Decimal(0)) for each in have), Decimal(0))
    cores = sum((each.get("cpu", Decimal(0)) for each in have), Decimal(0))
    wants = [
        pods.what
        for pods in Found(installation.overlay.manifests).pods
        if GPU in pods.spec["containers"][0]["resources"].get("limits", {}) and not is_virtual(pods)
    ]
    with_gpu = sum(bool(each.get(GPU)) for each in have)
    if gpus:
        text = f"GPU: {with_gpu} of {len(nodes)} nodes have {gpus:.0f} GPUs"
        if not wants:
            raise Warn(f"{text}, and this overlay uses none: the overlay gpu does")
        return text
    text = f"CPU: no node has a GPU ({GPU}); {len(nodes)} nodes have {cores:.1f} cores"
    if wants:
        raise Warn(
            f"{text}. What wants one waits until a pool that begins with none brings it, if there is such a pool: "
            + "; ".join(wants)
        )
    return text


def azure_pool(location: str, nodes: int) -> str:
    """The kind of machine that the quota of a subscription allows so many of: with a GPU, or else without.

    Raises DeployError where it allows neither.
    """
    try:
        usage = json.loads(az("vm", "list-usage", "--location", location))
        counted = {each["name"]["value"].lower(): each for each in usage}
    except (ValueError, KeyError, TypeError):
        raise DeployError(f"az vm list-usage --location {location} answered what is not understood") from None
    refused: list[str] = []
    for size, family, cores, gpus in MACHINES:
        needed, lacking = cores * nodes, None
        for name in (family, "cores"):
            each = counted.get(name.lower())
            free = int(each["limit"]) - int(each["currentValue"]) if each else 0
            if free < needed:
                lacking = f"{free} cores of {name} are free" if each else f"there is no {name}"
        if lacking is None:
            kind = "GPU" if gpus else "CPU"
            why = f"; not {'; '.join(refused)}" if refused else ""
            return f"{kind}: {nodes} of {size} need {needed} cores of {family}, which are free{why}"
        refused.append(f"{size}, as {lacking} and {nodes} need {needed}")
    raise DeployError(
        f"the quota allows no {nodes} nodes: {'; '.join(refused)}",
        hint="Fewer with --nodes, another --location, or ask for more: Azure's portal, Quotas.",
    )


# -- from within -------------------------------------------------------------------------------------------------------


def probe(manifests: Sequence[Object]) -> Object:
    """A pod that runs 'tally doctor' with the server's image, settings, secrets and volumes. It answers no requests.
    Raises Skip where there is no server."""
    servers = [
        each
        for each in manifests
        if each["kind"] == "Deployment"
        and (each["metadata"].get("labels") or {}).get("app.kubernetes.io/component") == "server"
    ]
    if not servers:
        raise Skip("not looked at: the overlay has no server, whose image and settings a pod would have")
    server = servers[0]
    template = copy.deepcopy(server["spec"]["template"])
    spec = template["spec"]
    (container,) = spec["containers"]
    for each in ("ports", "startupProbe", "livenessProbe", "readinessProbe", "lifecycle"):
        container.pop(each, None)
    container |= {"name": "doctor", "command": ["tally", "doctor"]}
    spec |= {"restartPolicy": "Never", "terminationGracePeriodSeconds": 5}
    spec.pop("topologySpreadConstraints", None)
    # The labels of who may connect to the database, and to whom no Service leads.
    labels = {**template["metadata"]["labels"], "app.kubernetes.io/component": "migrate"}
    # A name of its own: one of before may still be ending.
    metadata = {"name": f"{POD}-{secrets.token_hex(3)}", "namespace": server["metadata"]["namespace"], "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _within(installation: Installation) -> str:
    """Whether the image can be pulled, and from a pod names are found, database and buckets reached."""
    if list(installation.missing()):
        raise Skip("not looked at: what the pods need is missing")
    cluster = installation.cluster
    pod = probe(installation.overlay.manifests)
    for each in installation.overlay.manifests:
        if each["kind"] in ("ServiceAccount", "ConfigMap", "PersistentVolumeClaim") and cluster.get_any(each) is None:
            raise Skip(f"not looked at: {each['kind']} {each['metadata']['name']} is not there before 'apply'")
    installation.passing.append(pod)
    try:
        cluster.create_any(pod)
        return _outcome(installation, pod)
    finally:
        cluster.delete_any(pod)
        installation.passing.remove(pod)


def _outcome(installation: Installation, pod: Object) -> str:
    until, obstacle = time.monotonic() + POD_SECONDS, "it has not begun"
    while time.monotonic() < until:
        live = installation.cluster.get_any(pod) or {}
        phase = (live.get("status") or {}).get("phase")
        if phase in ("Succeeded", "Failed"):
            lines = installation.cluster.log(pod["metadata"]["name"], 100)
            if phase == "Failed":
                failed = [each for each in lines if each.startswith("FAIL")] or lines[-5:]
                raise DeployError("\n".join(["a pod of the cluster says:", *failed]))
            told = [each for each in lines if each.startswith(("ok", "warn"))]
            return "\n".join([f"the image {pod['spec']['containers'][0]['image']} runs", *told])
        for final, text in troubles(installation.cluster, live):
            if final:
                raise DeployError(f"a pod cannot run: {text}")
            obstacle = text
        time.sleep(PAUSE)
    raise DeployError(f"a pod has not answered for {POD_SECONDS:g} s: {obstacle}")
