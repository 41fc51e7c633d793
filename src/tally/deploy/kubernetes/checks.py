"""What is looked at before anything is applied: whether the cluster and the namespace have room, and what is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from tally.deploy.kubernetes.manifests import Manifest
from tally.deploy.kubernetes.spec import KubernetesSpec
from tally.deploy.quantities import amount, shown_bytes
from tally.kubernetes import Cluster, ForbiddenError, Object
from tally.serving.settings import KEYS

LEAST_CORES = 12
"""Cores of a cluster that is to carry production, as Azure ML asked of its own."""


def secret_problems(cluster: Cluster, spec: KubernetesSpec) -> Iterator[str]:
    """What is missing of the Secrets that the pods name: they would not start."""
    wanted = [(spec.keys_from, KEYS), *((each, None) for each in (*spec.secrets, spec.pull_secret) if each)]
    for name, entry in wanted:
        try:
            found = cluster.get("Secret", name)
        except ForbiddenError:  # whoever deploys need not be allowed to read secrets; the rollout tells
            continue
        if found is None:
            where = f"namespace {cluster.namespace}"
            if entry is None:
                yield f"there is no Secret {name} in {where}"
            else:
                yield (
                    f"there is no Secret {name} in {where} with the keys of the endpoint's clients; make one: kubectl "
                    f"--context {cluster.name} -n {cluster.namespace} create secret generic {name} "
                    f'--from-literal={entry}="$(openssl rand -hex 24)"'
                )
        elif entry is not None and entry not in (found.get("data") or {}):
            yield f"the Secret {name} has no entry {entry}"


def room_problems(cluster: Cluster, spec: KubernetesSpec) -> Iterator[str]:
    """Why the cluster is too small for production. Raises ForbiddenError where its nodes may not be seen."""
    nodes = [node for node in cluster.list("Node") if takes_pods(node)]
    have = [amounts(node.get("status", {}).get("allocatable", {})) for node in nodes]
    one = _one(spec)
    least, _ = spec.bounds
    cores = _sum(have, "cpu")
    if cores < LEAST_CORES:
        yield (
            f"the cluster {cluster.name} has {cores:.1f} cores in {len(nodes)} nodes; production asks for "
            f"{LEAST_CORES} and more"
        )
    for resource, needed in one.items():
        total = _sum(have, resource)
        if total < needed * least:
            all_need = shown(resource, needed * least)
            yield f"{least} replicas need {all_need}, and the cluster has {shown(resource, total)}"
        elif not any(node.get(resource, 0) >= needed for node in have):
            yield f"a replica needs {shown(resource, needed)}, and no node has so much"


def quota_problems(cluster: Cluster, spec: KubernetesSpec, live: Object | None) -> Iterator[str]:
    """Which quota of the namespace would not let all replicas run, with the one more that there is during an update.

    live: the endpoint's Deployment, which uses a part of the quota already.
    """
    one, (least, _) = _one(spec), spec.bounds
    needed = {
        "pods": Decimal(1),
        "requests.cpu": one["cpu"],
        "cpu": one["cpu"],
        "requests.memory": one["memory"],
        "memory": one["memory"],
        "limits.memory": one["memory"],
    }
    if spec.gpu:
        needed["requests.nvidia.com/gpu"] = Decimal(spec.gpu)
    used_by_it = _used_by(live)
    try:
        quotas = cluster.list("ResourceQuota")
    except ForbiddenError:
        return  # the rollout tells
    for quota in quotas:
        hard = amounts(quota.get("status", {}).get("hard") or quota.get("spec", {}).get("hard") or {})
        used = amounts(quota.get("status", {}).get("used") or {})
        name = quota["metadata"]["name"]
        if "limits.cpu" in hard:
            yield (
                f"the quota {name} limits limits.cpu, and Tally sets no limit of CPU: it would only add delay; a "
                "LimitRange of the namespace with a default for cpu gives the pods one"
            )
        for resource, each in needed.items():
            if resource not in hard:
                continue
            free = hard[resource] - used.get(resource, Decimal(0)) + used_by_it.get(resource, Decimal(0))
            if each * (least + 1) > free:
                yield (
                    f"the quota {name} has {shown(resource, max(free, Decimal(0)))} of {resource} left, and {least} "
                    f"replicas, with one more during an update, need {shown(resource, each * (least + 1))}"
                )


def _one(spec: KubernetesSpec) -> dict[str, Decimal]:
    """What one replica takes of a node."""
    found = {"cpu": amount(spec.cpu), "memory": amount(spec.memory)}
    return {**found, "nvidia.com/gpu": Decimal(spec.gpu)} if spec.gpu else found


def _used_by(live: Manifest | None) -> dict[str, Decimal]:
    """What the pods of a Deployment take of quotas."""
    if live is None:
        return {}
    count = Decimal(live.get("status", {}).get("replicas", 0))
    found = {"pods": count}
    for each in live["spec"]["template"]["spec"]["containers"]:
        resources = each.get("resources", {})
        for resource, value in amounts(resources.get("requests") or {}).items():
            for name in (resource, f"requests.{resource}"):
                found[name] = found.get(name, Decimal(0)) + value * count
        for resource, value in amounts(resources.get("limits") or {}).items():
            name = f"limits.{resource}"
            found[name] = found.get(name, Decimal(0)) + value * count
    return found


def takes_pods(node: Object, *, tolerated: Sequence[str] = ()) -> bool:
    """Whether the scheduler gives a node pods that say nothing of where they are to run, and tolerate these taints."""
    spec = node.get("spec", {})
    taints: Sequence[Mapping[str, Any]] = spec.get("taints") or ()
    ready = any(
        each.get("type") == "Ready" and each.get("status") == "True"
        for each in node.get("status", {}).get("conditions", ())
    )
    # Nodes with GPUs often have a taint of that name, which the cluster's admission lets pods with GPUs tolerate.
    mild = ("nvidia.com/gpu", *tolerated)
    kept = [each for each in taints if each.get("effect") != "PreferNoSchedule" and each.get("key") not in mild]
    return ready and not spec.get("unschedulable") and not kept


def amounts(given: Mapping[str, Any]) -> dict[str, Decimal]:
    found = {}
    for resource, text in given.items():
        try:
            found[resource] = amount(str(text))
        except ValueError:  # of a kind that we do not count
            continue
    return found


def _sum(amounts: Sequence[Mapping[str, Decimal]], resource: str) -> Decimal:
    return sum((each.get(resource, Decimal(0)) for each in amounts), Decimal(0))


def shown(resource: str, value: Decimal) -> str:
    if resource.endswith("memory"):
        return shown_bytes(value)
    if resource.endswith("cpu"):
        return f"{value:.1f} cores"
    return f"{value:.0f} GPUs" if resource.endswith("gpu") else f"{value:.0f}"
