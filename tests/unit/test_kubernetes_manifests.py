"""What is applied to a cluster is valid by Kubernetes's own schemas, and fits together, which no schema says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.overlays import NEWEST, OLDEST, Manifest, schema_problems

from tally.cli.serve import serve
from tally.deploy.base import dump
from tally.deploy.kubernetes import fields
from tally.deploy.kubernetes.lint.rules import problems
from tally.deploy.kubernetes.manifests import GRACE, SETTLE, manifests
from tally.deploy.kubernetes.spec import KubernetesSpec
from tally.deploy.kubernetes.target import KubernetesTarget
from tally.deploy.shipping import Shipped
from tally.deploy.spec import Environment

OF_OTHERS = (
    "no such listener",
    "which no Certificate makes",
    "another one each day",
    "acts as the ServiceAccount",
    "/elsewhere",
)
"""What an endpoint need not bring, or its user says: a Gateway, a certificate, an account, an image's version."""

LABELS = st.from_regex(re.compile(r"[a-z]([-a-z0-9]{0,20}[a-z0-9])?"), fullmatch=True)


@st.composite
def specs(draw: st.DrawFn) -> KubernetesSpec:
    profile = draw(st.sampled_from(["dev-test", "production"]))
    least = draw(st.integers(2, 5))
    route = draw(st.sampled_from(["none", "gateway", "ingress"]))
    values: dict[str, Any] = {}
    if profile == "production" and draw(st.booleans()):
        values["replicas"] = (least, draw(st.integers(least, 12)))
    if route == "gateway":
        values["gateway"] = draw(st.sampled_from(["web", "infra/web"]))
        values["hostname"] = draw(st.sampled_from([None, "models.example.com"]))
    if route == "ingress":
        values |= {"ingress_class": "nginx", "allow_from": ("ingress-nginx",)}
        values["hostname"] = draw(st.sampled_from([None, "models.example.com"]))
        if values["hostname"]:
            values["tls_secret"] = draw(st.sampled_from([None, "certificate"]))
    return KubernetesSpec(
        name=draw(LABELS),
        model="image:/opt/tally/model",
        environment=Environment(
            "image", draw(st.sampled_from(["tally", "reg.example.com:5000/a/b:1", "a/b@sha256:" + "0" * 64]))
        ),
        profile=profile,
        cpu=draw(st.sampled_from(["1", "500m", "0.25", "4"])),
        memory=draw(st.sampled_from(["512Mi", "2Gi", "4G", "1.5Gi"])),
        gpu=draw(st.integers(0, 2)),
        max_batch=draw(st.none() | st.integers(1, 64)),
        max_delay=draw(st.none() | st.floats(0, 1).map(lambda value: round(value, 4))),
        drain=draw(st.sampled_from([1.0, 30.0, 90.5])),
        grpc_port=draw(st.sampled_from([None, 8500])),
        task=draw(st.sampled_from([None, "detect"])),
        settings=draw(st.sampled_from([(), ("top=5", "preprocess.channels=bgr")])),
        trust=draw(st.booleans()),
        variables=draw(st.sampled_from([{}, {"AWS_REGION": "eu-west-1", "HOME": "/elsewhere"}])),
        secrets=draw(st.sampled_from([(), ("bucket", "more")])),
        pull_secret=draw(st.sampled_from([None, "registry"])),
        service_account=draw(st.sampled_from([None, "scorer"])),
        key_secret=draw(st.sampled_from([None, "keys"])),
        **values,
    )


def rendered(spec: KubernetesSpec, namespace: str = "ml") -> list[Manifest]:
    return manifests(spec, Shipped("/opt/tally/model", "the image's"), namespace)


def of_kind(found: list[Manifest], kind: str) -> list[Manifest]:
    return [each for each in found if each["kind"] == kind]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_every_manifest_is_valid_and_all_fit_together(spec: KubernetesSpec) -> None:
    found = rendered(spec)
    assert schema_problems(found, OLDEST, NEWEST) == []
    assert fields.problems(found) == []
    assert [each for each in problems(found) if not any(word in each for word in OF_OTHERS)] == []
    (container,) = of_kind(found, "Deployment")[0]["spec"]["template"]["spec"]["containers"]
    ports, command = {each["name"]: each["containerPort"] for each in container["ports"]}, container["command"]
    assert ports["http"] == int(command[command.index("--port") + 1])
    if "grpc" in ports:
        assert ports["grpc"] == int(command[command.index("--grpc-port") + 1])
    assert list(yaml.safe_load_all(dump(found))) == found


@settings(max_examples=40, deadline=None)
@given(specs())
def test_the_container_is_started_with_options_that_there_are(spec: KubernetesSpec) -> None:
    (container,) = of_kind(rendered(spec), "Deployment")[0]["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["tally", "serve"]
    with serve.make_context("serve", container["command"][2:]) as context:
        assert context.params["models"] == (f"{spec.name}=/opt/tally/model",)
        assert context.params["drain"] == spec.drain
        assert (context.params["grpc_port"] is None) == (spec.grpc_port is None)
        assert context.params["max_batch"] == spec.max_batch
        assert context.params["max_delay"] == pytest.approx(0.005 if spec.max_delay is None else spec.max_delay)
        assert context.params["trust"] == spec.trust
        assert context.params["assignments"] == spec.settings


@settings(max_examples=40, deadline=None)
@given(specs())
def test_pods_are_as_the_restricted_standard_asks(spec: KubernetesSpec) -> None:
    pod = of_kind(rendered(spec), "Deployment")[0]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    kinds = {each["name"]: list(each)[1] for each in pod["volumes"]}
    assert kinds == {"work": "emptyDir", "tmp": "emptyDir", "keys": "secret"}
    assert pod["terminationGracePeriodSeconds"] >= SETTLE + spec.drain + GRACE
    assert "TALLY_ENDPOINT_KEY" not in {each["name"] for each in container["env"]}
    (keys,) = (each["secret"] for each in pod["volumes"] if "secret" in each)
    assert keys["secretName"] == spec.keys_from


def test_a_profile_decides_what_there_is() -> None:
    base: dict[str, Any] = {"name": "plastic", "model": "image:/m", "environment": Environment("image", "a/b")}
    dev = rendered(KubernetesSpec(**base))
    production = rendered(KubernetesSpec(**base, profile="production", replicas=(3, 9)))
    assert [each["kind"] for each in dev] == ["NetworkPolicy", "Service", "Deployment"]
    assert dev[2]["spec"]["replicas"] == 1
    assert "topologySpreadConstraints" not in dev[2]["spec"]["template"]["spec"]
    (autoscaler,) = of_kind(production, "HorizontalPodAutoscaler")
    assert (autoscaler["spec"]["minReplicas"], autoscaler["spec"]["maxReplicas"]) == (3, 9)
    assert of_kind(production, "PodDisruptionBudget")
    spread = of_kind(production, "Deployment")[0]["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in spread] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]


def test_the_plan_says_what_is_not_promised() -> None:
    base: dict[str, Any] = {"name": "plastic", "model": "image:/m", "environment": Environment("image", "a/b")}
    notes = "\n".join(KubernetesTarget(KubernetesSpec(**base)).plan().notes)
    assert "one replica and no autoscaler. Not promised: that it answers while its node is drained" in notes
    assert "within the cluster only" in notes
    notes = "\n".join(KubernetesTarget(KubernetesSpec(**base, profile="production", gpu=1, gateway="web")).plan().notes)
    assert "2 to 4 replicas" in notes
    assert "sees CPUs only" in notes
    assert "within the cluster only" not in notes


def test_clients_of_azure_ml_find_their_paths_on_the_route() -> None:
    base: dict[str, Any] = {"name": "plastic", "model": "image:/m", "environment": Environment("image", "a/b")}
    (route,) = of_kind(rendered(KubernetesSpec(**base, gateway="infra/web", hostname="m.example.com")), "HTTPRoute")
    paths = [each["path"]["value"] for each in route["spec"]["rules"][0]["matches"]]
    assert paths[0] == "/api/v1/service/plastic"
    assert not any(path == "/" or "metrics" in path for path in paths)
    (policy,) = of_kind(rendered(KubernetesSpec(**base, gateway="infra/web")), "NetworkPolicy")
    assert {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "infra"}}} in policy["spec"][
        "ingress"
    ][0]["from"]
