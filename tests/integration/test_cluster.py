"""``tally cluster``: an overlay is planned, applied, changed, scaled and taken away, against an API server.

It is a stand-in, and for what needs nothing but Kubernetes itself also a real one, where ``TALLY_TEST_KUBECONFIG``
names it: in a namespace of the test's own, which is removed afterwards.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.apiserver import ApiServer, running
from tests.conftest import Ran
from tests.overlays import NAMES, OVERLAYS, one, rendered
from tests.waiting import eventually

from tally import kubernetes
from tally.deploy.kubernetes import doctor, installation
from tally.deploy.kubernetes.lint.objects import Found
from tally.deploy.kubernetes.lint.reach import is_open
from tally.errors import DeployError
from tally.kubernetes import Cluster

Cli = Callable[..., Ran]
REAL = os.environ.get("TALLY_TEST_KUBECONFIG")


@pytest.fixture
def namespace() -> str:
    return f"tally-test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """A cluster without anything of Tally, with two nodes."""
    with running("default") as (server, url):
        for number in range(2):
            add_node(server, f"node-{number}", cpu="7910m", memory="31Gi")
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig", url)))
        monkeypatch.setattr(doctor, "PAUSE", 0.01)
        yield server


def add_node(server: ApiServer, name: str, **allocatable: str) -> None:
    status = {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": "True"}]}
    server.put(
        "nodes",
        {"metadata": {"name": name}, "spec": {}, "status": status | {"nodeInfo": {"kubeletVersion": "v1.32.1"}}},
    )


@pytest.fixture(params=["stand-in", "real"])
def cluster(request: pytest.FixtureRequest, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    if request.param == "stand-in":
        request.getfixturevalue("api")
    elif REAL is None:
        pytest.skip("TALLY_TEST_KUBECONFIG names no cluster")
    else:
        monkeypatch.setenv("KUBECONFIG", REAL)
    found = Cluster(None, namespace)
    try:
        yield found
    finally:
        found.delete_any({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        found.close()


@pytest.fixture
def overlay(tmp_path: Path, namespace: str) -> Path:
    """The overlay dev-test, in a namespace of this test."""
    return own(tmp_path / "overlay", "dev-test", namespace)


def own(folder: Path, base: str, namespace: str, **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    place = os.path.relpath((OVERLAYS / base).resolve(), folder.resolve())
    found = {"namespace": namespace, "resources": [place], **more}
    (folder / "kustomization.yaml").write_text(json.dumps(found))
    return folder


def give_secrets(cluster: Cluster, namespace: str, *names: str) -> None:
    entries = ("TALLY_DATABASE", "POSTGRES_PASSWORD", "auth_token", "s3.json")
    for name in names:
        metadata = {"name": name, "namespace": namespace}
        cluster.apply(
            {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": dict.fromkeys(entries, "eA==")}
        )


# -- on any cluster ----------------------------------------------------------------------------------------------------


def test_an_overlay_lives_and_goes(cluster: Cluster, overlay: Path, namespace: str, tmp_path: Path, cli: Cli) -> None:
    ran = cli("cluster", "plan", "--overlay", overlay)
    assert ran.code == 1
    assert "create Namespace" in ran.out
    assert f"there is no Secret tally in the namespace {namespace}" in ran.out
    assert "create secret generic tally --from-file=POSTGRES_PASSWORD --from-file=TALLY_DATABASE" in ran.out
    ran = cli("cluster", "apply", "--overlay", overlay)
    assert ran.code == 1
    assert "Nothing was applied" in ran.err
    assert get(cluster, "apps/v1", "Deployment", "tally") is None

    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    give_secrets(cluster, namespace, "tally", "tally-ray", "tally-objects")
    ran = cli("cluster", "apply", "--overlay", overlay)
    assert ran.code == 0, ran.err
    assert "applied Deployment tally\n" in ran.out
    live = get(cluster, "apps/v1", "Deployment", "tally")
    assert live is not None
    assert live["spec"]["template"]["spec"]["containers"][0]["image"] == "tally:0.1.0"
    make_claim(cluster, "tally-postgres")
    ran = cli("cluster", "apply", "--overlay", overlay)
    assert ran.out.endswith("nothing to change\n")
    assert "PersistentVolumeClaim" not in ran.out  # which is the database

    # Changed by its user: another image, and a new environment, whose old ConfigMap goes.
    images = [{"name": "tally", "newName": "registry.example.com/tally", "newTag": "9"}]
    changed = [
        {
            "target": {"kind": "Service", "name": "tally"},
            "patch": '[{"op": "add", "path": "/spec/sessionAffinity", "value": "ClientIP"}]',
        }
    ]
    own(overlay, "dev-test", namespace, images=images, patches=changed)
    ran = cli("cluster", "plan", "--overlay", overlay)
    assert ran.code == 0
    assert "change Service tally" in ran.out
    assert "+    image: registry.example.com/tally:9" in " ".join(ran.out.split()).replace("+ ", "+    ")
    assert "replace Job tally-migrate" in ran.out
    assert cli("cluster", "apply", "--overlay", overlay).code == 0
    assert get(cluster, "v1", "Service", "tally")["spec"]["sessionAffinity"] == "ClientIP"  # type: ignore[index]

    # Changed by somebody else.
    theirs = {"template": {"spec": {"containers": [{"name": "server", "image": "elsewhere/tally:1"}]}}}
    cluster.apply(named("apps/v1", "Deployment", "tally", namespace) | {"spec": theirs}, manager="somebody", force=True)
    ran = cli("cluster", "apply", "--overlay", overlay)
    assert ran.code == 1
    assert "others have changed what Tally is to set" in ran.err
    assert "somebody" in ran.err
    assert "--force" in ran.err
    assert cli("cluster", "apply", "--overlay", overlay, "--force").code == 0
    live = get(cluster, "apps/v1", "Deployment", "tally")
    assert live["spec"]["template"]["spec"]["containers"][0]["image"] == "registry.example.com/tally:9"  # type: ignore[index]

    # Objects of others are left alone, and told.
    ran = cli("cluster", "down", "--overlay", overlay, "--dry-run")
    assert "would go: Deployment tally\n" in ran.out
    assert "Namespace" not in ran.out
    assert get(cluster, "apps/v1", "Deployment", "tally") is not None
    ran = cli("cluster", "down", "--overlay", overlay, "--yes")
    assert ran.code == 0, ran.err
    assert "removed Deployment tally\n" in ran.out
    assert get(cluster, "v1", "Service", "tally") is None
    assert get(cluster, "v1", "Secret", "tally") is not None
    assert cluster.get("Namespace", namespace) is not None

    # What is on claims goes where that is asked for only.
    assert cli("cluster", "down", "--overlay", overlay, "--yes").out == "nothing is there\n"
    ran = cli("cluster", "down", "--overlay", overlay, "--data", "--yes")
    assert ran.out == "removed PersistentVolumeClaim data-tally-postgres-0\n"


def make_claim(cluster: Cluster, name: str) -> None:
    """The claim of a StatefulSet's first pod, as the cluster makes it: with the labels of the template and the set."""
    found = get(cluster, "apps/v1", "StatefulSet", name)
    assert found is not None
    (template,) = found["spec"]["volumeClaimTemplates"]
    labels = {**template["metadata"]["labels"], **found["spec"]["selector"]["matchLabels"]}
    claim = named("v1", "PersistentVolumeClaim", f"{template['metadata']['name']}-{name}-0", cluster.namespace)
    claim["metadata"] |= {"labels": labels}
    cluster.apply(claim | {"spec": template["spec"]}, manager="kube-controller-manager")


def named(version: str, kind: str, name: str, namespace: str) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": namespace}}


def get(cluster: Cluster, version: str, kind: str, name: str) -> dict[str, Any] | None:
    return cluster.get_any(named(version, kind, name, cluster.namespace))


# -- with operators ----------------------------------------------------------------------------------------------------

TAUGHT = {
    ("ray.io", "v1", "RayCluster", "rayclusters"): (
        "rayVersion", "enableInTreeAutoscaling", "authOptions", "autoscalerOptions", "headGroupSpec",
        "workerGroupSpecs", "upgradeStrategy",
    ),
    ("ray.io", "v1", "RayJob", "rayjobs"): (),
    ("keda.sh", "v1alpha1", "ScaledObject", "scaledobjects"): (),
    ("keda.sh", "v1alpha1", "TriggerAuthentication", "triggerauthentications"): (),
    ("monitoring.coreos.com", "v1", "ServiceMonitor", "servicemonitors"): (),
    ("monitoring.coreos.com", "v1", "PrometheusRule", "prometheusrules"): (),
    ("external-secrets.io", "v1", "ExternalSecret", "externalsecrets"): (),
    ("cert-manager.io", "v1", "Certificate", "certificates"): (),
    ("gateway.networking.k8s.io", "v1", "Gateway", "gateways"): (),
    ("gateway.networking.k8s.io", "v1", "HTTPRoute", "httproutes"): (),
}  # fmt: skip


@pytest.fixture
def ready(api: ApiServer) -> ApiServer:
    """A cluster with operators, classes, the namespace and its Secrets."""
    for (group, version, kind, plural), fields in TAUGHT.items():
        api.teach(group, version, kind, plural, {each: {} for each in fields})
    api.put("namespaces", {"kind": "Namespace", "metadata": {"name": "tally"}})
    api.put("storageclasses", {"metadata": {"name": "azurefile-csi-premium"}, "provisioner": "file.csi.azure.com"})
    api.namespace = "tally"
    entries = dict.fromkeys(
        ("TALLY_DATABASE", "auth_token", "TALLY_ENDPOINT_KEY", "TALLY_QUEUE_PASSWORD", "host"), "eA=="
    )
    for name in ("tally", "tally-ray", "tally-queue", "shapes-key"):
        api.put("secrets", {"metadata": {"name": name}, "data": entries})
    return api


@pytest.fixture
def production(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(OVERLAYS.parents[2])
    return "production"


def test_operators_that_are_missing_are_named(api: ApiServer, production: str, cli: Cli) -> None:
    ran = cli("cluster", "plan", "--overlay", production)
    assert ran.code == 1
    for kind, brought in (
        ("HTTPRoute", "The cluster's gateway controller"),
        ("RayCluster", "KubeRay's operator"),
        ("ScaledObject", "KEDA"),
        ("Certificate", "cert-manager"),
    ):
        assert f"does not know {kind}" in ran.out
        assert f"{brought} brings it" in ran.out
    assert cli("cluster", "apply", "--overlay", production).code == 1
    assert api.names("deployments") == []


def test_production_is_applied_whole(ready: ApiServer, production: str, cli: Cli) -> None:
    ran = cli("cluster", "apply", "--overlay", production)
    assert ran.code == 0, ran.err
    assert ran.out.count("applied ") == len(rendered("production"))
    assert cli("cluster", "apply", "--overlay", production).out.endswith("nothing to change\n")


def up(api: ApiServer, *left_out: str) -> None:
    """Have all that was applied be up, but what is left out, as their controllers would say."""
    for plural in ("deployments", "statefulsets"):
        for name in set(api.names(plural)) - set(left_out):
            found = api.get(plural, name) or {}
            count = found["spec"].get("replicas", 1)
            numbers = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), count)
            api.set_status(name, plural=plural, **numbers)
    for plural, holds in (("jobs", "Complete"), ("externalsecrets", "Ready"), ("certificates", "Ready")):
        for name in set(api.names(plural)) - set(left_out):
            api.set_status(name, plural=plural, conditions=[{"type": holds, "status": "True"}])
    for name in set(api.names("rayclusters")) - set(left_out):
        api.set_status(name, plural="rayclusters", state="ready")


def test_what_was_applied_is_waited_for(
    ready: ApiServer, production: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "PAUSE", 0.01)
    assert "and --wait waits for that" in cli("cluster", "apply", "--overlay", production).out
    broken = {"name": "server", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    ready.add_pod("tally", "tally-1", {"phase": "Pending", "containerStatuses": [broken]})
    up(ready, "tally", "tally-ray")
    ran = cli("cluster", "apply", "--overlay", production, "--wait", "--timeout", "1s")
    assert ran.code == 1
    assert "after 1 s, not all of it is up:\n" in ran.err
    told = "Deployment tally: not begun; tally-1: ImagePullBackOff: the image cannot be pulled: no such image"
    assert ran.out.count(told) == 1  # not each time that it is looked at
    for what in (told, "RayCluster tally-ray: not ready", "Certificate tally: not ready"):
        assert f"- {what}\n" in ran.err
    assert "Job" not in ran.err
    assert "StatefulSet" not in ran.err

    looks = iter([lambda: None] * 30 + [lambda: up(ready)])
    ready.on_look["deployments"] = lambda: next(looks, lambda: None)()
    ran = cli("cluster", "apply", "--overlay", production, "--wait")
    assert ran.code == 0, ran.err
    assert ran.out.endswith(
        "all of it is up; kubectl --context test -n tally port-forward service/tally 8700:80  leads to its pages\n"
    )

    failed = {"type": "Failed", "status": "True", "message": "Job has reached the specified backoff limit"}
    looks = iter([lambda: None])  # for the difference; all others are those of who waits
    fail = functools.partial(ready.set_status, "tally-migrate", plural="jobs", conditions=[failed])
    ready.on_look["jobs"] = lambda: next(looks, fail)()
    ran = cli("cluster", "apply", "--overlay", production, "--wait")
    assert ran.code == 1
    assert "the Job tally-migrate has failed: Job has reached the specified backoff limit" in ran.err
    assert "logs job/tally-migrate" in ran.err


def test_what_a_container_that_runs_first_waits_for_is_said(
    ready: ApiServer, production: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "PAUSE", 0.01)
    assert cli("cluster", "apply", "--overlay", "gpu").code == 0
    labels = ready.get("jobs", "tally-gpu-smoke")["spec"]["template"]["metadata"]["labels"]  # type: ignore[index]
    first = {"name": "pictures", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    then = {"name": "score", "state": {"waiting": {"reason": "PodInitializing"}}}
    status = {"phase": "Pending", "initContainerStatuses": [first], "containerStatuses": [then]}
    ready.put("pods", {"metadata": {"name": "smoke-1", "labels": labels}, "status": status})
    ran = cli("cluster", "apply", "--overlay", "gpu", "--wait", "--timeout", "1s")
    assert ran.code == 1
    said = "Job tally-gpu-smoke: it has not ended; smoke-1: ImagePullBackOff: the image cannot be pulled: no such image"
    assert said in ran.err


def test_a_cluster_with_too_much_to_do_is_asked_again(
    ready: ApiServer, production: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "LONGEST_PAUSE", 0.0)
    ready.refuse.update({("PATCH", "services"): [429, 429], ("GET", "configmaps"): [429]})
    ran = cli("cluster", "apply", "--overlay", production)
    assert ran.code == 0, ran.err
    assert not any(ready.refuse.values())
    assert cli("cluster", "apply", "--overlay", production).out.endswith("nothing to change\n")


@pytest.mark.parametrize("code", [429, 500])
def test_what_is_applied_before_a_cluster_gives_up_is_said(
    ready: ApiServer, production: str, cli: Cli, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(kubernetes, "LONGEST_PAUSE", 0.0)

    def refuse() -> None:  # once the dry runs are over
        if ready.names("services"):
            ready.refuse["PATCH", "deployments"] = [code] * 6

    ready.on_look["deployments"] = refuse
    ran = cli("cluster", "apply", "--overlay", production)
    assert ran.code == 1
    assert f"answers {code} for Deployment" in ran.err
    assert "objects are applied; the same command again goes on with the others" in " ".join(ran.err.split())
    applied = ran.out.count("applied ")
    assert 5 < applied < len(rendered("production"))
    ready.on_look.clear()
    ready.refuse.clear()
    ran = cli("cluster", "apply", "--overlay", production)
    assert ran.code == 0, ran.err
    assert ran.out.count("applied ") == len(rendered("production")) - applied


def test_what_an_autoscaler_has_decided_is_kept(ready: ApiServer, production: str, cli: Cli) -> None:
    assert cli("cluster", "apply", "--overlay", production).code == 0
    groups = ready.get("rayclusters", "tally-ray")["spec"]["workerGroupSpecs"]  # type: ignore[index]
    groups[0] |= {"replicas": 3, "scaleStrategy": {"workersToDelete": []}}
    ready.edit("rayclusters", "tally-ray", "autoscaler", {"spec": {"workerGroupSpecs": groups}})
    assert "RayCluster" not in cli("cluster", "plan", "--overlay", production).out
    assert cli("cluster", "scale", "cpu=1..16", "server=3", "consumer=0..20", "--overlay", production).out == (
        "cpu: 1 to 16\nserver: 3\nconsumer: 0 to 20\n"
    )
    (group,) = ready.get("rayclusters", "tally-ray")["spec"]["workerGroupSpecs"]  # type: ignore[index]
    assert (group["minReplicas"], group["maxReplicas"], group["replicas"]) == (1, 16, 3)
    assert ready.get("deployments", "tally")["spec"]["replicas"] == 3  # type: ignore[index]
    assert ready.get("scaledobjects", "tally-consumer")["spec"]["maxReplicaCount"] == 20  # type: ignore[index]
    assert ready.get("scaledobjects", "tally-consumer")["spec"]["triggers"]  # type: ignore[index]
    ran = cli("cluster", "apply", "--overlay", production)  # which holds until the overlay is applied again
    assert ran.code == 0, ran.err
    (group,) = ready.get("rayclusters", "tally-ray")["spec"]["workerGroupSpecs"]  # type: ignore[index]
    assert (group["minReplicas"], group["maxReplicas"], group["replicas"]) == (0, 8, 3)
    assert ready.get("deployments", "tally")["spec"]["replicas"] == 2  # type: ignore[index]


def test_groups_are_scaled_together(ready: ApiServer, production: str, cli: Cli) -> None:
    assert cli("cluster", "apply", "--overlay", "gpu").code == 0
    ran = cli("cluster", "scale", "cpu=1..16", "gpu=2..3", "server=2", "--overlay", "gpu")
    assert ran.code == 0, ran.err
    live = ready.get("rayclusters", "tally-ray")
    assert live is not None
    groups = live["spec"]["workerGroupSpecs"]
    assert [(each["minReplicas"], each["maxReplicas"]) for each in groups] == [(1, 16), (2, 3)]
    # One that the cluster does not have yet, as the overlay was not applied since.
    live["spec"]["workerGroupSpecs"] = groups[:1]
    ready.put("rayclusters", live)
    ran = cli("cluster", "scale", "server=3", "gpu=0..1", "--overlay", "gpu")
    assert ran.code == 1
    assert "the RayCluster tally-ray has no group gpu yet" in ran.err
    assert ran.out == ""
    assert ready.get("deployments", "tally")["spec"]["replicas"] == 2  # type: ignore[index]


def test_who_may_not_see_what_the_cluster_knows_may_apply(ready: ApiServer, production: str, cli: Cli) -> None:
    ready.deny.add(("GET", "customresourcedefinitions"))
    ran = cli("cluster", "apply", "--overlay", production)
    assert ran.code == 0, ran.err
    assert ready.names("rayclusters") == ["tally-ray"]


def test_who_may_not_see_what_the_cluster_knows_needs_no_operators(
    api: ApiServer, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.chdir(OVERLAYS.parents[2])
    api.put("namespaces", {"kind": "Namespace", "metadata": {"name": "tally"}})
    api.namespace = "tally"
    entries = dict.fromkeys(("TALLY_DATABASE", "POSTGRES_PASSWORD", "auth_token", "s3.json"), "eA==")
    for name in ("tally", "tally-ray", "tally-objects"):
        api.put("secrets", {"metadata": {"name": name}, "data": entries})
    api.deny.add(("GET", "customresourcedefinitions"))
    ran = cli("cluster", "apply", "--overlay", "dev-test")
    assert ran.code == 0, ran.err
    assert cli("cluster", "plan", "--overlay", "dev-test").out == "nothing to change\n"
    ran = cli("cluster", "down", "--overlay", "dev-test", "--yes")
    assert ran.code == 0, ran.err
    assert api.names("deployments") == []


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("gpu=1", "there is no 'gpu' to scale"),
        ("endpoint=2", "is scaled by an autoscaler"),
        ("server=1..2", "has no autoscaler: say one number"),
        ("cpu=2..1", "at least 2 and at most 1"),
        ("cpu", "is not of the form"),
    ],
)
def test_what_cannot_be_scaled_is_said(ready: ApiServer, production: str, cli: Cli, size: str, said: str) -> None:
    assert cli("cluster", "apply", "--overlay", production).code == 0
    ran = cli("cluster", "scale", size, "--overlay", production)
    assert ran.code == 2
    assert said in ran.err


def test_what_an_overlay_has_no_more_goes(ready: ApiServer, production: str, cli: Cli) -> None:
    assert cli("cluster", "apply", "--overlay", production).code == 0
    ready.put("deployments", {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "other"}, "spec": {}})
    ran = cli("cluster", "apply", "--overlay", "gpu")
    assert ran.code == 0, ran.err
    assert "removed ScaledObject tally-consumer" in ran.out
    assert ready.names("deployments") == ["other", "tally"]
    assert ready.names("rayjobs") == ready.names("statefulsets") == []
    assert ready.names("persistentvolumeclaims") == ["tally-bucket", "tally-files"]  # nobody could make them again
    assert "stays, though the overlay has it no more: PersistentVolumeClaim tally-files" in ran.out
    assert "-n tally delete persistentvolumeclaim tally-files" in ran.out
    ran = cli("cluster", "down", "--overlay", "gpu", "--yes")
    assert ran.code == 0, ran.err
    assert ready.names("persistentvolumeclaims") == ["tally-bucket", "tally-files"]
    ran = cli("cluster", "down", "--overlay", "gpu", "--data", "--yes")
    assert ran.code == 0, ran.err
    assert ready.names("deployments") == ["other"]
    assert ready.names("persistentvolumeclaims") == ready.names("rayclusters") == []
    assert cli("cluster", "down", "--overlay", "gpu", "--yes").out == "nothing is there\n"
    deleted = [target for method, target in ready.requests if method == "DELETE"]
    assert all("propagationPolicy=Background" in each for each in deleted), "pods of Jobs would stay"


def test_a_config_map_goes_when_no_pod_has_it_any_more(ready: ApiServer, production: str, cli: Cli) -> None:
    """Its name has a hash of its content, so that a change makes another one."""
    assert cli("cluster", "apply", "--overlay", production).code == 0
    labels = {"app.kubernetes.io/part-of": "tally"}
    for name in ("tally-environment-before", "tally-unused"):
        ready.put("configmaps", {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": labels}})
    container = {
        "name": "server",
        "image": "tally",
        "envFrom": [{"configMapRef": {"name": "tally-environment-before"}}],
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "tally-1"}, "spec": {"containers": [container]}}
    ready.put("pods", pod)
    ran = cli("cluster", "apply", "--overlay", production)
    assert ran.code == 0, ran.err
    assert "removed ConfigMap tally-unused\n" in ran.out
    assert "tally-environment-before" in ready.names("configmaps")
    assert "tally-unused" not in ready.names("configmaps")
    ready.remove("pods", "tally-1")
    ran = cli("cluster", "apply", "--overlay", production)
    assert "removed ConfigMap tally-environment-before\n" in ran.out


def test_objects_of_others_are_not_taken_over(ready: ApiServer, production: str, cli: Cli) -> None:
    ready.put("services", {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "tally"}, "spec": {}})
    ran = cli("cluster", "apply", "--overlay", production)
    assert ran.code == 1
    assert "there is a Service tally already, which is no part of Tally" in ran.err
    assert ready.names("deployments") == []


def test_objects_of_others_are_neither_scaled_nor_removed(ready: ApiServer, production: str, cli: Cli) -> None:
    ready.put(
        "deployments",
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "tally"}, "spec": {"replicas": 2}},
    )
    labels = {"app.kubernetes.io/part-of": "tally"}
    ready.put("services", {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "tally", "labels": labels}})
    ran = cli("cluster", "scale", "server=0", "--overlay", production)
    assert ran.code == 1
    assert "the Deployment tally is no part of Tally: it is left alone" in ran.err
    assert ready.get("deployments", "tally")["spec"] == {"replicas": 2}  # type: ignore[index]
    ran = cli("cluster", "scale", "consumer=0..3", "--overlay", production)
    assert ran.code == 1
    assert "there is no ScaledObject tally-consumer yet" in ran.err
    assert ready.names("scaledobjects") == []
    ran = cli("cluster", "down", "--overlay", production, "--data", "--yes")
    assert ran.code == 0, ran.err
    assert ran.out == "removed Service tally\n"
    assert ready.names("deployments") == ["tally"]


def test_a_volume_of_another_namespace_is_left_alone(ready: ApiServer, production: str, cli: Cli) -> None:
    """A volume is in no namespace: two installations would have one of the same name."""
    labels = {"app.kubernetes.io/part-of": "tally"}
    spec = {"claimRef": {"namespace": "tally-of-others", "name": "tally-bucket"}}
    ready.put(
        "persistentvolumes",
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": "tally-bucket", "labels": labels},
            "spec": spec,
        },
    )
    ran = cli("cluster", "apply", "--overlay", production)
    assert ran.code == 1
    said = "there is a PersistentVolume tally-bucket already, which is kept for the namespace tally-of-others"
    assert said in " ".join(ran.err.split())
    assert ready.names("deployments") == []
    assert cli("cluster", "down", "--overlay", production, "--data", "--yes").out == "nothing is there\n"
    assert ready.names("persistentvolumes") == ["tally-bucket"]


def test_a_job_that_somebody_has_begun_is_not_suspended_anew(ready: ApiServer, production: str, cli: Cli) -> None:
    assert cli("cluster", "apply", "--overlay", production).code == 0
    assert ready.get("rayjobs", "tally-night")["spec"]["suspend"] is True  # type: ignore[index]
    ready.edit("rayjobs", "tally-night", "kubectl-patch", {"spec": {"suspend": False}})
    for options in ((), ("--force",)):
        ran = cli("cluster", "apply", "--overlay", production, *options)
        assert ran.code == 0, ran.err
        assert ran.out.endswith("nothing to change\n")
        assert ready.get("rayjobs", "tally-night")["spec"]["suspend"] is False  # type: ignore[index]


def test_a_job_that_has_failed_is_run_again(ready: ApiServer, production: str, cli: Cli) -> None:
    assert cli("cluster", "apply", "--overlay", production).code == 0
    before = ready.get("jobs", "tally-migrate")
    assert before is not None
    failed = {"type": "Failed", "status": "True", "message": "Job has reached the specified backoff limit"}
    ready.set_status("tally-migrate", plural="jobs", conditions=[failed])
    ran = cli("cluster", "plan", "--overlay", production)
    assert "replace Job tally-migrate" in ran.out
    ran = cli("cluster", "apply", "--overlay", production)
    assert ran.code == 0, ran.err
    after = ready.get("jobs", "tally-migrate")
    assert after is not None
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    assert "status" not in after
    ready.set_status("tally-migrate", plural="jobs", conditions=[{"type": "Complete", "status": "True"}])
    assert cli("cluster", "apply", "--overlay", production).out.endswith("nothing to change\n")


# -- the doctor --------------------------------------------------------------------------------------------------------


def examined(cli: Cli, overlay: str, *options: str) -> tuple[int, dict[str, str]]:
    ran = cli("cluster", "doctor", "--overlay", overlay, *options)
    assert "a fault in Tally" not in ran.out + ran.err
    found: dict[str, str] = {}
    for line in ran.out.splitlines():
        if line[:1] != " ":
            name = line[6:23].strip()
            found[name] = line[:6].strip() + " " + line[23:]
        else:
            found[name] += " " + line.strip()
    return ran.code, found


def test_a_cluster_that_has_everything(ready: ApiServer, production: str, cli: Cli) -> None:
    assert cli("cluster", "apply", "--overlay", production).code == 0
    steps = iter(["Pending", "Running", "Succeeded"])
    said = "ok    database         postgresql://tally:***@db/tally\n-     ray              none\n"

    def kubelet() -> None:
        for name in ready.names("pods"):
            pod = ready.get("pods", name)
            assert pod is not None
            ready.logs[name] = said
            ready.put("pods", pod | {"status": {"phase": next(steps)}})

    ready.on_look["pods"] = kubelet
    code, found = examined(cli, production)
    assert code == 0, found
    assert found["cluster"].startswith("ok test: Kubernetes v1.32.1, 2 nodes, of which 2 take pods; namespace tally")
    assert "RayCluster v1" in found["kinds"]
    assert found["secrets"] == "ok tally-queue, shapes-key"
    assert found["storage"] == "ok tally-bucket: a volume of its own, tally-files: azurefile-csi-premium"
    assert found["pool"].startswith("ok CPU: no node has a GPU (nvidia.com/gpu); 2 nodes have 15.8 cores")
    assert "the image registry.example.com/tally:0.1.0 runs" in found["from within"]
    assert "ok    database" in found["from within"]
    assert ready.names("pods") == []


def test_what_a_cluster_lacks_is_named(ready: ApiServer, production: str, cli: Cli) -> None:
    ready.remove("secrets", "tally-queue")
    ready.remove("storageclasses", "azurefile-csi-premium")
    ready.remove("customresourcedefinitions", "rayclusters.ray.io")
    ready.teach("ray.io", "v1", "RayCluster", "rayclusters", {"rayVersion": {}, "headGroupSpec": {}})
    hard = {"requests.cpu": "2", "requests.memory": "64Gi"}
    ready.put(
        "resourcequotas", {"metadata": {"name": "team"}, "spec": {"hard": hard}, "status": {"hard": hard, "used": {}}}
    )
    code, found = examined(cli, production)
    assert code == 1
    assert "RayCluster without authOptions, autoscalerOptions" in found["kinds"]
    assert "its operator is too old" in found["kinds"]
    assert "there is no Secret tally-queue" in found["secrets"]
    assert "there is no class 'azurefile-csi-premium'" in found["storage"]
    assert "the quota team has 2.0 cores of requests.cpu left, and what always runs needs" in found["quota"]
    assert found["from within"].startswith("- not looked at")


def test_the_fields_that_count_are_those_of_the_version(ready: ApiServer, production: str, cli: Cli) -> None:
    """KubeRay still serves a version of before, which it names last and which has fewer fields."""
    crd = ready.get("customresourcedefinitions", "rayclusters.ray.io")
    assert crd is not None
    (now,) = crd["spec"]["versions"]
    spec = {"type": "object", "properties": {"rayVersion": {}}}
    schema = {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec}}}
    crd["spec"]["versions"] = [now, {"name": "v1alpha1", "served": True, "storage": False, "schema": schema}]
    ready.put("customresourcedefinitions", crd)
    _, found = examined(cli, production, "--no-pod")
    assert found["kinds"].startswith("ok ")
    assert "RayCluster v1, " in found["kinds"]


def test_an_overlay_without_a_server_is_looked_at(ready: ApiServer, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "kustomization.yaml").write_text("namespace: tally\nconfigMapGenerator: [{name: a, literals: [x=y]}]\n")
    code, found = examined(cli, str(tmp_path))
    assert code == 0
    assert found["from within"].startswith("- not looked at: the overlay has no server")


def test_disks_are_no_shares(ready: ApiServer, production: str, cli: Cli) -> None:
    ready.put("storageclasses", {"metadata": {"name": "azurefile-csi-premium"}, "provisioner": "disk.csi.azure.com"})
    _, found = examined(cli, production, "--no-pod")
    assert "has disks of disk.csi.azure.com, not shares (ReadWriteMany)" in found["storage"]
    assert "from within" not in found


def test_a_pool_with_gpus_is_chosen_where_there_is_one(ready: ApiServer, production: str, cli: Cli) -> None:
    _, found = examined(cli, "gpu", "--no-pod")
    assert found["pool"].startswith("warn CPU: no node has a GPU")
    assert "RayCluster tally-ray, group gpu" in found["pool"]
    add_node(ready, "gpu-0", cpu="4", memory="28Gi", **{"nvidia.com/gpu": "1"})
    taint = {"key": "sku", "value": "gpu", "effect": "NoSchedule"}  # as docs/how-to/aks.md makes the pool
    ready.put("nodes", (ready.get("nodes", "gpu-0") or {}) | {"spec": {"taints": [taint]}})
    _, found = examined(cli, "gpu", "--no-pod")
    assert found["pool"] == "ok GPU: 1 of 3 nodes have 1 GPUs"
    _, found = examined(cli, production, "--no-pod")
    assert found["pool"].startswith("warn GPU: 1 of 3 nodes have 1 GPUs, and this overlay uses none")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"phase": "Failed"}, "FAIL  database         no answer"),
        (
            {
                "phase": "Pending",
                "containerStatuses": [
                    {"name": "doctor", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}
                ],
            },
            "a pod cannot run: ImagePullBackOff: the image cannot be pulled: not found",
        ),
    ],
    ids=["unreached", "no image"],
)
def test_what_a_pod_cannot_do_is_said(
    ready: ApiServer, production: str, cli: Cli, status: dict[str, Any], said: str
) -> None:
    assert cli("cluster", "apply", "--overlay", production).code == 0

    def kubelet() -> None:
        for name in ready.names("pods"):
            ready.logs[name] = "ok    python           3.12\nFAIL  database         no answer\n"
            pod = ready.get("pods", name)
            assert pod is not None
            ready.put("pods", pod | {"status": status})

    ready.on_look["pods"] = kubelet
    code, found = examined(cli, production)
    assert code == 1
    assert said in found["from within"].replace("FAIL database", "FAIL  database        ")
    assert ready.names("pods") == []


def test_the_pod_has_what_the_server_has_and_gets_no_requests() -> None:
    found = rendered("production")
    pod = doctor.probe(found)
    service = one(found, "Service")["spec"]["selector"]
    assert not service.items() <= pod["metadata"]["labels"].items()
    server = one(found, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    (container,) = pod["spec"]["containers"]
    assert container["env"] == server["env"]
    assert container["volumeMounts"] == server["volumeMounts"]
    assert "lifecycle" not in container


def test_a_doctor_that_is_interrupted_leaves_no_pod(ready: ApiServer, production: str, cli: Cli) -> None:
    """One that waits for a node would have one brought, and paid."""
    assert cli("cluster", "apply", "--overlay", production).code == 0
    command = [sys.executable, "-m", "tally", "cluster", "doctor", "--overlay", production]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        eventually(lambda: ready.names("pods") or None)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, None), said
    assert "Traceback" not in said
    assert ready.names("pods") == []


@pytest.mark.parametrize("name", NAMES)
def test_the_pod_may_connect_to_whom_the_server_does(name: str) -> None:
    """Else it would tell of a failure that nobody has."""
    before = rendered(name)
    found = Found([*before, doctor.probe(before)])
    policies = list(found.of("NetworkPolicy"))
    (pod,) = (pods for pods in found.pods if pods.kind == "Pod")
    (server,) = found.selected({"matchLabels": one(before, "Service")["spec"]["selector"]}, one(before, "Service"))
    reached = 0
    for target in found.pods:
        for port in target.ports.values():
            if is_open(found, policies, "Ingress", target, server, port):
                assert is_open(found, policies, "Ingress", target, pod, port), (target.what, port)
                reached += target is not server
    assert reached


def test_azures_quota_decides_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"standardNCASv3_T4Family": 0, "standardDSv5Family": 12, "cores": 40}

    def az(*words: str) -> str:
        assert words == ("vm", "list-usage", "--location", "westeurope")
        return json.dumps(
            [{"name": {"value": name}, "currentValue": 2, "limit": most + 2} for name, most in free.items()]
        )

    monkeypatch.setattr(doctor, "az", az)
    said = doctor.azure_pool("westeurope", 3)
    assert said.startswith(
        "CPU: 3 of Standard_D4s_v5 need 12 cores of standardDSv5Family, which are free; not Standard_NC4"
    )
    assert "0 cores of standardNCASv3_T4Family are free and 3 need 12" in said
    free["standardNCASv3_T4Family"] = 12
    assert doctor.azure_pool("westeurope", 3).startswith("GPU: 3 of Standard_NC4as_T4_v3")
    with pytest.raises(DeployError, match="the quota allows no 4 nodes"):
        doctor.azure_pool("westeurope", 4)
    free["cores"] = 4
    with pytest.raises(DeployError, match="4 cores of cores are free"):
        doctor.azure_pool("westeurope", 3)
