"""What ``kubectl apply -k deploy/kubernetes/overlays/...`` applies: valid by the published schemas, and in order by our
own checks, which see each of many mistakes that somebody might make.
"""

from __future__ import annotations

import base64
import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from tests.overlays import NAMES, NEWEST, OLDEST, OVERLAYS, SCHEMAS, Manifest, one, rendered, schema_problems

from tally.cli.main import cli
from tally.deploy.base import dump
from tally.deploy.kubernetes import fields
from tally.deploy.kubernetes.lint.needs import secrets_of
from tally.deploy.kubernetes.lint.objects import Found
from tally.deploy.kubernetes.lint.ray import is_virtual
from tally.deploy.kubernetes.lint.rules import problems
from tally.deploy.kubernetes.manifests import manifests
from tally.deploy.kubernetes.overlay import Overlay
from tally.deploy.kubernetes.spec import KubernetesSpec
from tally.deploy.shipping import shipped
from tally.deploy.spec import Environment
from tally.errors import DeployError, SpecError
from tally.masking import has_secret

COMPONENTS = OVERLAYS.parent / "components"


@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_is_valid_and_in_order(name: str) -> None:
    found = rendered(name)
    assert fields.problems(found) == []
    assert problems(found) == []
    assert schema_problems(found, OLDEST, NEWEST) == []
    assert all(each["metadata"]["labels"]["app.kubernetes.io/part-of"] == "tally" for each in found)
    assert Overlay(OVERLAYS / name).manifests[0]["kind"] == "Namespace"


def test_every_component_is_in_an_overlay() -> None:
    used = {
        Path(each).name
        for path in OVERLAYS.parent.rglob("kustomization.yaml")
        for each in yaml.safe_load(path.read_text()).get("components", ())
    }
    assert {each.name for each in COMPONENTS.iterdir()} == used


def test_no_secret_is_anywhere_in_the_files() -> None:
    for path in [each for each in OVERLAYS.parent.rglob("*") if each.is_file()]:
        text = path.read_text()
        assert "kind: Secret\n" not in text, path  # a Gateway names one in one line
        assert not re.search(r"stringData|BEGIN [A-Z ]*PRIVATE|AKIA[0-9A-Z]{16}", text), path
        assert not [line for line in text.splitlines() if "://" in line and has_secret(line.partition("#")[0])], path


def test_all_that_is_run_are_commands_with_options_that_there_are() -> None:
    seen = set()
    for name in NAMES:
        for pods in Found(rendered(name)).pods:
            for each in pods.containers:
                given = each.get("args", []) if _is_tally(each["image"]) else []
                words = each.get("command") or ["tally", *given]
                if words[0] == "tally" and words[1:]:
                    _check_command(words[1:])
                    seen.add(" ".join(words[:2]))
        for job in (each for each in rendered(name) if each["kind"] == "RayJob"):
            _check_command(shlex.split(job["spec"]["entrypoint"])[1:])
    assert {"tally up", "tally migrate", "tally score", "tally serve", "tally simulate"} <= seen


def _is_tally(image: str) -> bool:
    """Whether the image's first process runs ``tally`` with what it is given."""
    return re.search(r"(^|/)tally:", image) is not None


def _check_command(words: list[str]) -> None:
    command: click.Command = cli
    while isinstance(command, click.Group):
        inner = command.get_command(click.Context(command), words[0])
        assert inner is not None, words
        command, words = inner, words[1:]
    command.make_context("tally", [*words])


def test_the_endpoint_is_what_tally_deploy_renders() -> None:
    spec = KubernetesSpec(
        name="shapes", model="tally:shapes", environment=Environment("image", "tally"), profile="production"
    )
    found = manifests(spec, shipped(spec), "default")
    for each in found:
        del each["metadata"]["namespace"]
    text = (COMPONENTS / "endpoint" / "endpoint.yaml").read_text()
    assert text.partition("\n")[2] == dump(found)


def test_a_rays_groups_are_what_its_autoscaler_understands() -> None:
    """Read by the very code that KubeRay's autoscaler reads them with."""
    ray = pytest.importorskip("ray.autoscaler._private.kuberay.autoscaling_config")
    for name, groups in {
        "production": {"cpu": {"CPU": 4}},
        "gpu": {"cpu": {"CPU": 4}, "gpu": {"CPU": 3, "GPU": 1}},
        "virtual-nodes": {"virtual-nodes": {"CPU": 2}, "virtual-nodes-gpu": {"CPU": 4, "GPU": 1}},
    }.items():
        config = ray._derive_autoscaling_config_from_ray_cr(one(rendered(name), "RayCluster", "tally-ray"))
        types = config["available_node_types"]
        assert types["headgroup"]["resources"]["CPU"] == 0
        assert all(each["min_workers"] == 0 for each in types.values())
        for group, amounts in groups.items():
            assert amounts.items() <= types[group]["resources"].items()
        assert config["idle_timeout_minutes"] == 1


# -- mistakes ----------------------------------------------------------------------------------------------------------

POD = "spec.template.spec"
FIRST = f"{POD}.containers.0"
HEAD = "spec.headGroupSpec.template.spec"
JOBS = "spec.rayClusterSpec.workerGroupSpecs.0"
SOURCES = "spec.ingress.0.from.0.podSelector.matchExpressions.0"
A_HEAD = {"matchLabels": {"app.kubernetes.io/component": "ray-head"}}
SECRETS_ELSEWHERE = {"name": "TALLY_SECRETS", "value": "/run/secrets/taly"}
CPU, LAST = "spec.workerGroupSpecs.0", "spec.workerGroupSpecs.1"
GONE = "<gone>"  # each process that runs tests has to name them alike

MISTAKES: list[tuple[str, str, str, str, Any, str]] = [
    # overlay, kind, name, where, what is put there instead, what is said
    ("production", "Deployment", "tally", f"{FIRST}.imagePullPolcy", "Always", "did you mean 'imagePullPolicy'"),
    ("production", "Deployment", "tally", f"{FIRST}.ports.0.containerPort", "8700", "is to be a whole number"),
    ("production", "Deployment", "tally", "spec.selector", GONE, "spec.selector is missing"),
    ("production", "Deployment", "tally", "apiVersion", "apps/v1beta1", "Kubernetes has no Deployment"),
    ("production", "RayCluster", "tally-ray", f"{CPU}.template.spec.tolerationz", [], "did you mean 'tolerations'"),
    ("production", "RayCluster", "tally-ray", f"{CPU}.minReplica", 0, "schema: 'minReplica' was unexpected"),
    ("production", "RayCluster", "tally-ray", "spec.autoscalerOptions.version", "v3", "schema: 'v3' is not one of"),
    ("production", "ScaledObject", "tally-consumer", "spec.minReplica", 0, "schema: 'minReplica' was unexpected"),
    ("production", "ServiceMonitor", "tally", "spec.endpoints.0.intervall", "15s", "schema: 'intervall' was unexpecte"),
    ("production", "Deployment", "tally", "metadata.name", "Tally_Server", "is no name of Kubernetes"),
    ("production", "Service", "tally", "metadata.namespace", "tally2", "in several namespaces"),
    ("production", "Deployment", "tally", "spec.selector.matchLabels.x", "y", "Deployment tally selects"),
    ("production", "Service", "tally", "spec.selector.x", "y", "Service tally selects"),
    ("production", "Service", "tally", "spec.ports.0.targetPort", "web", "leads to port 'web'"),
    ("production", "PodDisruptionBudget", "tally", "spec.selector.matchLabels.x", "y", "PodDisruptionBudget tally"),
    ("production", "PodDisruptionBudget", "tally", "spec.minAvailable", 2, "none may ever be taken away"),
    ("production", "NetworkPolicy", "tally-server", "spec.podSelector.matchLabels.x", "y", "NetworkPolicy tally-serve"),
    ("production", "NetworkPolicy", "tally-server", "spec.ingress.0.ports.0.port", 8701, "opens port 8701"),
    ("production", "NetworkPolicy", "tally-default", "spec.policyTypes", ["Egress"], "no NetworkPolicy says who may c"),
    ("production", "NetworkPolicy", "tally-ray", "spec.podSelector.matchLabels", {"ray.io/cluster": "a"}, "RayJob"),
    ("production", "ServiceMonitor", "tally", "spec.endpoints.0.port", "metrics", "reads port 'metrics'"),
    ("production", "HTTPRoute", "tally", "spec.rules.0.backendRefs.0.port", 8700, "leads to port 8700 of tally"),
    ("production", "HTTPRoute", "tally", "spec.hostnames.0", "other.example.com", "its listener for tally.example.com"),
    ("production", "Certificate", "tally", "spec.secretName", "tls", "which no Certificate makes"),
    ("gpu", "Ingress", "tally", "spec.tls.0.hosts.0", "other.example.com", "no rule for that host"),
    ("production", "Deployment", "tally", f"{FIRST}.resources.requests.memory", "2GB", "'2GB' is no quantity"),
    ("production", "Deployment", "tally", f"{FIRST}.resources.limits", GONE, "no limit of memory"),
    ("production", "Deployment", "tally", f"{FIRST}.livenessProbe", GONE, "has no livenessProbe"),
    ("production", "Deployment", "tally", f"{FIRST}.readinessProbe.httpGet.port", "web", "readinessProbe asks port 'w"),
    ("production", "Deployment", "tally", f"{POD}.securityContext.runAsNonRoot", GONE, "may run as root"),
    ("production", "Deployment", "tally", f"{FIRST}.securityContext.readOnlyRootFilesystem", False, "write into its i"),
    ("production", "Deployment", "tally", f"{FIRST}.securityContext.capabilities.add", ["NET_RAW"], "keeps capabilit"),
    ("production", "Deployment", "tally", f"{POD}.automountServiceAccountToken", True, "given a token of the cluster'"),
    ("production", "Deployment", "tally", f"{POD}.hostNetwork", True, "has hostNetwork"),
    ("production", "Deployment", "tally", f"{POD}.serviceAccountName", "taly", "ServiceAccount taly, which is not the"),
    ("production", "Deployment", "tally", f"{FIRST}.image", "registry.example.com/tally", "give its version"),
    ("production", "Deployment", "tally", f"{FIRST}.image", "registry.example.com/tally:latest", "give its version"),
    ("production", "Deployment", "tally", f"{FIRST}.volumeMounts.0.name", "hom", "mounts hom, which is no volume"),
    ("production", "Deployment", "tally", f"{FIRST}.env.0", {"name": "TALLY_QUEUE_PASSWORD", "value": "x"}, "the secr"),
    ("production", "Deployment", "tally", f"{FIRST}.env.0", {"name": "HOME", "value": "/home/tally"}, "writes to /hom"),
    ("production", "Deployment", "tally", f"{FIRST}.args.5", "postgresql://a:b@c/d", "there is a secret in what it"),
    ("production", "StatefulSet", "tally-consumer", "spec.replicas", 1, "two say how many replicas there are"),
    ("production", "ScaledObject", "tally-consumer", "spec.scaleTargetRef.name", "x", "StatefulSet x, which is not th"),
    ("production", "ScaledObject", "tally-consumer", "spec.minReplicaCount", 11, "at least 11 and at most 10"),
    ("production", "ScaledObject", "tally-consumer", "spec.triggers.0.authenticationRef.name", "x", "TriggerAuthentic"),
    ("production", "HorizontalPodAutoscaler", "shapes", "spec.scaleTargetRef.apiVersion", "v1", "is not there"),
    ("production", "RoleBinding", "tally-pipeline", "roleRef.name", "x", "the Role x, which is not there"),
    ("production", "Role", "tally-pipeline", "rules.0.verbs", ["*"], "allows everything"),
    ("production", "Job", "tally-migrate", f"{POD}.restartPolicy", GONE, "needs restartPolicy OnFailure or Never"),
    ("production", "PersistentVolumeClaim", "tally-files", "metadata.name", "files", "claim tally-files, which is not"),
    ("production", "PersistentVolume", "tally-bucket", "spec.claimRef.namespace", "x", "kept for the namespace x"),
    ("production", "RayCluster", "tally-ray", f"{CPU}.minReplicas", 9, "at least 9 and at most 8"),
    ("production", "RayCluster", "tally-ray", f"{CPU}.replicas", 2, "and the autoscaler is to"),
    ("production", "RayCluster", "tally-ray", f"{CPU}.rayStartParams.num-cpus", "8", "Ray is told num-cpus 8"),
    ("production", "RayCluster", "tally-ray", f"{HEAD}.containers.0.envFrom.0.configMapRef.name", "x", "ConfigMap x"),
    ("gpu", "RayCluster", "tally-ray", f"{LAST}.template.spec.tolerations", GONE, "does not tolerate the taint nvidia"),
    ("gpu", "Job", "tally-gpu-smoke", f"{FIRST}.resources.limits.nvidia.com/gpu", GONE, "a GPU) needs a limit, too"),
    ("virtual-nodes", "RayCluster", "tally-ray", f"{LAST}.template.spec.tolerations.1", GONE, "not tolerate azure.com"),
    ("virtual-nodes", "RayCluster", "tally-ray", f"{LAST}.template.spec.nodeSelector.type", "vk", "selected by type"),
    ("virtual-nodes", "RayCluster", "tally-ray", f"{LAST}.template.spec.containers.0.command", GONE, "has to be said"),
    ("virtual-nodes", "RayCluster", "tally-ray", f"{LAST}.template.metadata.annotations", {}, "would replace its comm"),
    ("virtual-nodes", "RayCluster", "tally-ray", f"{LAST}.template.spec.serviceAccountName", "tally", "no identity"),
    ("production", "Gateway", "tally", "spec.listener", [], "did you mean 'listeners'"),
    ("production", "Gateway", "tally", "spec.gatewayClassName", GONE, "spec.gatewayClassName is missing"),
    ("production", "Gateway", "tally", "spec.listeners.0.port", "443", "is to be a whole number, not '443'"),
    ("production", "Gateway", "tally", "spec.listeners.0.tls.certificateRef", [], "did you mean 'certificateRefs'"),
    ("production", "PrometheusRule", "tally", "spec.groups.0.rules.0.exprs", "1", "did you mean 'expr'"),
    ("production", "PrometheusRule", "tally", "spec.groups.0.rules.0.for", 5, "is to be a text, not 5; quotes"),
    ("production", "PrometheusRule", "tally", "spec.groups.0.rules.0.for", "5 minutes", "for may not be '5 minutes'"),
    ("production", "PrometheusRule", "tally", "spec.groups.0.rules.0.expr", "max((up)", "its brackets do not match"),
    ("production", "PrometheusRule", "tally", "spec.groups.0.rules.0.alert", GONE, "as 'alert' or as 'record'"),
    ("production", "PrometheusRule", "tally", "metadata.labels.team", 8, "metadata.labels.team is to be a text, not 8"),
    ("production", "Deployment", "tally", "spec.selector.matchLabels.x", True, "is to be a text, not True; quotes"),
    ("production", "Deployment", "tally", f"{POD}.nodeSelector", {"zone": 1}, "nodeSelector.zone is to be a text"),
    ("production", "Deployment", "tally", "spec.template.spec", GONE, "spec.template.spec is missing"),
    ("production", "Deployment", "tally", f"{POD}.containers", [], "spec.template.spec.containers is missing"),
    ("production", "Service", "tally", "spec", GONE, "Service tally: spec is missing"),
    ("production", "NetworkPolicy", "tally-server", "spec", {}, "spec.podSelector is missing"),
    ("production", "HTTPRoute", "tally", "spec.rules.0.backendRefs.0.name", GONE, "backendRefs[0].name is missing"),
    ("production", "RayCluster", "tally-ray", f"{CPU}.maxReplicas", GONE, "[0].maxReplicas is missing"),
    ("production", "RayCluster", "tally-ray", HEAD, {}, "headGroupSpec.template.spec.containers is missing"),
    ("production", "ScaledObject", "tally-consumer", "spec.scaleTargetRef", GONE, "spec.scaleTargetRef is missing"),
    ("production", "ScaledObject", "tally-consumer", "spec", GONE, "ScaledObject tally-consumer: spec is missing"),
    ("production", "Certificate", "tally", "spec.secretName", GONE, "spec.secretName is missing"),
    ("production", "ServiceMonitor", "tally", "spec.selector", GONE, "spec.selector is missing"),
    ("gpu", "Ingress", "tally", "spec.rules", GONE, "spec.rules is missing"),
    ("gpu", "Service", "tally", "spec.type", "LoadBalancer", "lets anybody from outside the cluster connect to"),
    ("production", "Service", "tally", "spec.type", "NodePort", "lets anybody from outside the cluster connect to"),
    ("production", "RayJob", "tally-night", "spec.rayClusterSpec.upgradeStrategy", {"type": "Recreate"}, "refuses upg"),
    ("production", "RayJob", "tally-night", "spec.shutdownAfterJobFinishes", False, "suspends no job without shutdown"),
    ("production", "RayJob", "tally-night", "spec.rayClusterSpec", GONE, "has no cluster: rayClusterSpec, or"),
    ("production", "RayJob", "tally-night", f"{JOBS}.rayStartParams.num-cpus", "8", "RayJob tally-night, group cpu: R"),
    ("production", "RayCluster", "tally-ray", f"{CPU}.template.spec.restartPolicy", "Always", "restartPolicy Never"),
    ("production", "PodDisruptionBudget", "tally", "spec.maxUnavailable", 0, "none may ever be taken away"),
    ("production", "PodDisruptionBudget", "shapes", "spec.maxUnavailable", "0%", "none may ever be taken away"),
    ("production", "PodDisruptionBudget", "tally", "spec.minAvailable", "100%", "none may ever be taken away"),
    ("production", "Deployment", "tally", f"{POD}.terminationGracePeriodSeconds", 5, "preStop takes 5 s, and no time"),
    ("production", "Deployment", "tally", f"{FIRST}.env.0", SECRETS_ELSEWHERE, "reads secrets from /run/secrets/taly"),
    ("production", "ExternalSecret", "tally", "spec.data.0.secretKey", "TALLY_DATABSE", "has no TALLY_DATABASE"),
    ("production", "ExternalSecret", "tally-ray", "spec.data", [], "has no auth_token, which pods need of the Secret "),
    ("production", "PersistentVolumeClaim", "tally-files", "spec.accessModes", ["ReadWriteOnce"], "for one node at a "),
    ("production", "PersistentVolume", "tally-bucket", "spec.claimRef.name", "x", "kept for the claim x, which is not"),
    ("dev-test", "StatefulSet", "tally-postgres", "spec.serviceName", "x", "there is no Service x, by which its pods"),
    ("dev-test", "NetworkPolicy", "tally-postgres", f"{SOURCES}.values", ["migrate"], "lets it into StatefulSet tally"),
    ("dev-test", "NetworkPolicy", "tally-postgres", "spec.ingress.0.ports", [{"port": 5433}], "lets it into StatefulS"),
    ("dev-test", "NetworkPolicy", "tally-ray-worker-objects", "spec.egress", [], "port s3, and no NetworkPolicy lets "),
    ("production", "NetworkPolicy", "tally-ray-worker", "spec.egress", [], "lets it out of RayCluster tally-ray, grou"),
    ("production", "NetworkPolicy", "tally-ray", "spec.ingress.0.from.0.podSelector", A_HEAD, "lets it into RayCluste"),
    ("production", "NetworkPolicy", "tally-ray", "spec.ingress.0.ports", [{"port": 6379}], "lets it into RayCluster t"),
    ("production", "NetworkPolicy", "tally-ray", "spec.ingress.1.from.0.podSelector", A_HEAD, "port dashboard, and no"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "of", "where", "instead", "said"), MISTAKES, ids=lambda value: str(value)[:60]
)
def test_a_mistake_is_seen(name: str, kind: str, of: str, where: str, instead: Any, said: str) -> None:
    found = rendered(name)
    plant(one(found, kind, of), where, instead)
    if said.startswith("schema: "):
        if not SCHEMAS.is_dir():
            pytest.skip("the schemas of operators are not on this machine")
        told = schema_problems(found)
        said = said.removeprefix("schema: ")
    else:
        told = fields.problems(found) or problems(found)
    assert any(said in each for each in told), told


def plant(found: Manifest, where: str, instead: Any) -> None:
    path = where.replace("nvidia.com/gpu", "nvidia").split(".")
    inner: Any = found
    for each in path[:-1]:
        inner = inner[int(each)] if isinstance(inner, list) else inner[each]
    last: Any = int(path[-1]) if isinstance(inner, list) else path[-1].replace("nvidia", "nvidia.com/gpu")
    if instead is GONE:
        del inner[last]
    else:
        inner[last] = instead


@pytest.mark.parametrize("port", ["http", 8700])
def test_a_service_for_those_outside_is_open_to_whom_a_policy_names(port: str | int) -> None:
    found = rendered("gpu")
    one(found, "Service")["spec"]["type"] = "LoadBalancer"
    policy = one(found, "NetworkPolicy", "tally-server")
    policy["spec"]["ingress"].append({"from": [{"ipBlock": {"cidr": "203.0.113.0/24"}}], "ports": [{"port": port}]})
    assert problems(found) == []


def test_pods_that_reach_buckets_act_as_the_account_that_may() -> None:
    """An identity of the cloud is an account's. Virtual nodes have none."""
    seen = set()
    for name in NAMES:
        for pods in Found(rendered(name)).pods:
            if any("secretRef" in source for each in pods.containers for source in each.get("envFrom", ())):
                account = pods.spec.get("serviceAccountName")
                assert account == (None if is_virtual(pods) else "tally"), (name, pods.what)
                seen.add(pods.labels["app.kubernetes.io/component"])
                given = pods.kind in ("RayCluster", "RayJob") and pods.group is None  # its autoscaler asks the cluster
                assert pods.spec["automountServiceAccountToken"] is given
    assert seen == {"server", "consumer", "ray-head", "ray-worker"}


def test_ray_is_said_to_be_of_the_version_that_the_image_has() -> None:
    """KubeRay asks pods for their health as that version answers."""
    (pinned,) = re.findall(r"(?m)^ray==(.+)$", (OVERLAYS.parents[1] / "constraints.txt").read_text())
    told = {each["spec"]["rayVersion"] for name in NAMES for each in rendered(name) if each["kind"] == "RayCluster"}
    assert told == {pinned}


def test_rays_pods_are_replaced_when_their_template_changes() -> None:
    for name in NAMES:
        found = rendered(name)
        for each in found:
            if each["kind"] == "RayCluster":
                assert each["spec"]["upgradeStrategy"] == {"type": "Recreate"}
    found = rendered("production")
    cluster = one(found, "RayCluster", "tally-ray")["spec"]
    job = one(found, "RayJob", "tally-night")["spec"]["rayClusterSpec"]
    assert {**job, "upgradeStrategy": {"type": "Recreate"}} == cluster  # KubeRay refuses it of a job's


def test_a_secret_with_its_values_is_seen() -> None:
    found = rendered("dev-test")
    found.append(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a", "namespace": "tally"}, "data": {"a": "b"}}
    )
    assert any("has its values in the manifest" in each for each in problems(found))
    one(found, "ConfigMap", next(each["metadata"]["name"] for each in found if each["kind"] == "ConfigMap"))["data"][
        "AWS_SECRET_ACCESS_KEY"
    ] = "x"
    assert any("looks like a secret" in each for each in problems(found))


URL = "postgresql://tally:hunter2@db/tally"
HEADER = [{"name": "Authorization", "value": "Bearer hunter2hunter2"}]
HIDDEN_SECRETS: list[tuple[str, str, str, Any]] = [
    ("Deployment", "tally", "metadata.annotations", {"note": URL}),
    ("Deployment", "tally", "metadata.annotations", {"api-token": "hunter2"}),
    ("Deployment", "tally", "spec.template.metadata.annotations", {"note": URL}),
    ("Deployment", "tally", f"{FIRST}.livenessProbe.httpGet.httpHeaders", HEADER),
    ("Deployment", "tally", f"{FIRST}.lifecycle.preStop", {"exec": {"command": ["curl", URL]}}),
    ("Deployment", "tally", f"{FIRST}.args", ["--password", "hunter2"]),
    ("Deployment", "tally", f"{FIRST}.args", ["--admin-key=hunter2"]),
    ("Deployment", "tally", f"{FIRST}.env.0", {"name": "MY_PWD", "value": "hunter2"}),
    ("ScaledObject", "tally-consumer", "spec.triggers.0.metadata.password", "hunter2"),
    ("RayCluster", "tally-ray", "spec.headGroupSpec.rayStartParams.redis-password", "hunter2"),
    ("RayCluster", "tally-ray", "spec.gcsFaultToleranceOptions", {"redisPassword": {"value": "hunter2"}}),
    ("RayJob", "tally-night", "spec.runtimeEnvYAML", "env_vars:\n  AWS_SECRET_ACCESS_KEY: hunter2\n"),
    ("PersistentVolume", "tally-bucket", "spec.csi.volumeAttributes.accountKey", "hunter2"),
    ("ConfigMap", "tally-dashboard", "data", {"a.yaml": "user: tally\npassword: hunter2\n"}),
    ("ConfigMap", "tally-dashboard", "binaryData", {"a": base64.b64encode(URL.encode()).decode()}),
]


@pytest.mark.parametrize(("kind", "of", "where", "instead"), HIDDEN_SECRETS, ids=lambda value: str(value)[:60])
def test_a_secret_in_an_unusual_place_is_seen(kind: str, of: str, where: str, instead: Any) -> None:
    found = rendered("production")
    plant(one(found, kind, of), where, instead)
    assert fields.problems(found) == []
    (told,) = problems(found)
    assert "secret" in told
    assert "hunter2" not in told


@pytest.mark.parametrize("kind", ["CronJob", "Pod", "ReplicaSet"])
def test_pods_of_all_kinds_are_looked_at(kind: str) -> None:
    template = copy.deepcopy(one(rendered("production"), "Job", "tally-migrate")["spec"]["template"])
    template["spec"]["containers"][0] |= {"image": "postgres", "env": [{"name": "PGPASSWORD", "value": "hunter2"}]}
    template["spec"]["containers"][0]["volumeMounts"][1]["mountPath"] = "/run/secrets/tally"
    metadata = {"name": "backup", "namespace": "tally", "labels": {"app.kubernetes.io/part-of": "tally"}}
    made: Manifest = {"kind": kind, "metadata": metadata}
    if kind == "CronJob":
        spec = {"schedule": "0 3 * * *", "jobTemplate": {"spec": {"template": template}}}
        made |= {"apiVersion": "batch/v1", "spec": spec}
    elif kind == "Pod":
        made |= {"apiVersion": "v1", "spec": template["spec"]}
    else:
        selector = {"matchLabels": template["metadata"]["labels"]}
        made |= {"apiVersion": "apps/v1", "spec": {"selector": selector, "template": template}}
    found = [*rendered("production"), made]
    assert fields.problems(found) == []
    told = "\n".join(problems(found))
    assert f"{kind} backup, migrate: the secret PGPASSWORD is in the manifest" in told
    assert f"{kind} backup, migrate: the image postgres is another one each day" in told
    del template["spec"]["containers"]
    assert any("containers" in each and "missing" in each for each in fields.problems(found))


def test_what_names_a_secret_is_none() -> None:
    found = rendered("production")
    server = one(found, "Deployment")
    plant(server, f"{FIRST}.args", ["--password", "$(PASSWORD)", "--token", "/run/secrets/token"])
    plant(server, "metadata.annotations", {"token": "/run/secrets/token", "note": "the password is in the Secret"})
    assert problems(found) == []


def test_what_the_pods_need_is_told() -> None:
    assert secrets_of(rendered("dev-test")) == {
        ("tally", "tally"): {"POSTGRES_PASSWORD", "TALLY_DATABASE"},
        ("tally", "tally-ray"): {"auth_token"},
        ("tally", "tally-objects"): {"s3.json"},
    }
    assert secrets_of(rendered("staging")) == {}  # the store of the cloud has them
    assert secrets_of(rendered("production")) == {
        ("tally", "shapes-key"): {"TALLY_ENDPOINT_KEY"},
        ("tally", "tally-queue"): {"TALLY_QUEUE_PASSWORD", "host"},  # KEDA's
    }


def test_a_secret_that_is_made_otherwise_is_not_judged() -> None:
    """A store's whole entry may have anything, and two may make one Secret."""
    found = rendered("production")
    one(found, "ExternalSecret")["spec"] |= {"data": [], "dataFrom": [{"extract": {"key": "tally"}}]}
    other = copy.deepcopy(one(found, "ExternalSecret", "tally-ray"))
    other["metadata"]["name"] = "tally-ray-too"
    found.append(other)
    one(found, "ExternalSecret", "tally-ray")["spec"]["data"] = []
    assert problems(found) == []


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 8265}]},
        {"from": [{"namespaceSelector": {}}], "ports": [{"port": 8000, "endPort": 9000}]},
        {"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "tally"}}}]},
    ],
)
def test_whoever_has_to_connect_may_be_let_in_in_many_ways(rule: Manifest) -> None:
    found = rendered("gpu")
    policy = one(found, "NetworkPolicy", "tally-ray")
    policy["spec"]["ingress"] = [policy["spec"]["ingress"][0], rule]
    assert problems(found) == []
    rule |= {"ports": [{"port": 8266}]}
    assert any("Deployment tally has to connect to RayCluster tally-ray, head" in each for each in problems(found))


# -- rendering ---------------------------------------------------------------------------------------------------------


def test_an_overlay_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(OVERLAYS.parents[2])
    assert Overlay.find("production").folder == Path("deploy/kubernetes/overlays/production")
    with pytest.raises(SpecError, match="did you mean 'staging'"):
        Overlay.find("stagin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match="no folder with a kustomization"):
        Overlay.find("production")


def test_values_are_read_as_kustomize_has_written_them(tmp_path: Path) -> None:
    (tmp_path / "values.env").write_text("A=no\nB=1e3\nC=08\nD=12:30\nE=2026-11-29\nF==\nG=~\n")
    made = [{"name": "a", "envs": ["values.env"]}]
    (tmp_path / "kustomization.yaml").write_text(json.dumps({"namespace": "x", "configMapGenerator": made}))
    (found,) = Overlay(tmp_path).manifests
    wanted = {"A": "no", "B": "1e3", "C": "08", "D": "12:30", "E": "2026-11-29", "F": "=", "G": "~"}
    assert found["data"] == wanted


@pytest.mark.parametrize("value", ["1e3", "08", "0x1F", "1_000", "true", "[a]"])
def test_a_value_that_yaml_takes_for_something_else_is_said(tmp_path: Path, value: str) -> None:
    text = f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: a}}\ndata: {{A: {value}}}\n"
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "kustomization.yaml").write_text("resources: [a.yaml]\n")
    with pytest.raises(DeployError, match=r"ConfigMap a: data\.A is to be a text, not "):
        assert Overlay(tmp_path).manifests


@pytest.mark.parametrize(
    ("kind", "of", "where", "instead"),
    [
        ("RayCluster", "tally-ray", f"{CPU}.maxReplicas", {"a": "b"}),
        ("RayCluster", "tally-ray", f"{CPU}.rayStartParams", 0),
        ("RayCluster", "tally-ray", "spec.authOptions", 1.5),
        ("RayJob", "tally-night", "spec.rayClusterSpec", -1),
        ("ServiceMonitor", "tally", "spec.selector.matchExpressions", [{}]),
        ("ExternalSecret", "tally", "spec.data.0", 1.5),
        ("Deployment", "tally", f"{POD}.volumes.0.secret", {"optional": False}),
    ],
)
def test_an_object_that_is_not_understood_is_named(kind: str, of: str, where: str, instead: Any) -> None:
    """Of kinds that operators bring, nothing says here of which types their fields are."""
    found = rendered("production")
    plant(one(found, kind, of), where, instead)
    (told,) = fields.problems(found) or problems(found)
    assert told.startswith(f"{kind} {of} cannot be read: a field is missing, or of another type than it is to be"), told


def test_a_field_without_a_value_is_none(tmp_path: Path) -> None:
    spec = {"type": "ExternalName", "externalName": "b", "ports": None}
    made = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a", "labels": None}, "spec": spec}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(made))
    (tmp_path / "kustomization.yaml").write_text("resources: [a.yaml]\n")
    (found,) = Overlay(tmp_path).manifests
    assert found["metadata"] == {"name": "a"}
    assert found["spec"] == {"type": "ExternalName", "externalName": "b"}


def test_an_overlay_of_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("namespace: tally\n")
    with pytest.raises(DeployError, match="renders to nothing"):
        assert Overlay(tmp_path).manifests


def test_what_kustomize_refuses_is_said(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [nothing.yaml]\n")
    with pytest.raises(DeployError, match=r"cannot be rendered: .*nothing\.yaml"):
        assert Overlay(tmp_path).text
    (tmp_path / "nothing.yaml").write_text("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {tpe: x}\n")
    with pytest.raises(DeployError, match=r"there is no spec\.tpe; did you mean 'type'"):
        assert Overlay(tmp_path).manifests


# -- figures -----------------------------------------------------------------------------------------------------------


def test_every_figure_that_is_asked_for_is_exported() -> None:
    pytest.importorskip("fastapi")
    from tally.server import metrics as of_server
    from tally.serving.metrics import Metrics

    exported = {metric.name for metric in Metrics().registry.collect()}
    exported |= {metric.name for metric in of_server._of_jobs([])} | {"tally_jobs", "tally_coordinators"}
    texts = []
    (rules,) = yaml.safe_load_all((COMPONENTS / "monitoring" / "rules.yaml").read_text())
    alerts = [each for group in rules["spec"]["groups"] for each in group["rules"]]
    texts += [each["expr"] for each in alerts]
    board = json.loads((COMPONENTS / "monitoring" / "dashboard.json").read_text())
    texts += [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    texts += [each["definition"] for each in board["templating"]["list"] if each["type"] == "query"]
    asked = {name for text in texts for name in re.findall(r"\btally_\w+", text)}
    known = {f"{name}{suffix}" for name in exported for suffix in ("", "_total", "_bucket", "_sum", "_count")}
    assert asked - known == set()
    shown = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked}
    assert exported - shown == set(), "figures that nobody looks at"
    assert len({each["alert"] for each in alerts}) == len(alerts)
    assert all(each["annotations"]["summary"] and each["labels"]["severity"] for each in alerts)
    for each in alerts:  # a job that has just begun has done nothing for as long as it exists
        if said := re.search(r"for (\d+) minutes", each["annotations"]["summary"]):
            assert each["for"] == f"{said[1]}m", each["alert"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
