"""What is applied to a cluster is valid by Kubernetes's own schemas, and fits together, which no schema says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tally.cli.serve import serve
from tally.deploy.base import dump
from tally.deploy.kubernetes.manifests import GRACE, SETTLE, manifests
from tally.deploy.kubernetes.spec import KubernetesSpec
from tally.deploy.kubernetes.target import KubernetesTarget
from tally.deploy.quantities import amount
from tally.deploy.shipping import Shipped
from tally.deploy.spec import LABEL, Environment

CRDS = Path(__file__).resolve().parents[2].parent / "shared" / "schemas" / "crds"
OLDEST, NEWEST = "1.30", "1.37"

Manifest = dict[str, Any]

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


def quantities(found: Any) -> Iterator[str]:
    """Every value below ``requests`` and ``limits``."""
    if isinstance(found, dict):
        for key, value in found.items():
            if key in ("requests", "limits"):
                yield from value.values()
            else:
                yield from quantities(value)
    elif isinstance(found, list):
        for each in found:
            yield from quantities(each)


def faults(found: list[Manifest]) -> list[str]:
    """What does not fit together."""
    wrong: list[str] = []
    (deployment,) = of_kind(found, "Deployment")
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    (container,) = template["spec"]["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}

    def selects(where: str, selector: Manifest) -> None:
        if not selector or not selector.items() <= labels.items():
            wrong.append(f"{where} selects {selector}, and pods have {labels}")

    names = {(each["kind"], each["metadata"]["name"]) for each in found}
    if len(names) != len(found):
        wrong.append(f"objects share a name: {names}")
    if len({each["metadata"].get("namespace") for each in found}) != 1:
        wrong.append("objects are in several namespaces")
    for each in found:
        name = each["metadata"]["name"]
        if not LABEL.fullmatch(name) or (each["kind"] == "Service" and name[0].isdigit()):
            wrong.append(f"{each['kind']} {name!r} is no DNS label")
        for key, value in each["metadata"]["labels"].items():
            if not re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", value):
                wrong.append(f"label {key}={value}")
    selects("the Deployment", deployment["spec"]["selector"]["matchLabels"])
    for each in template["spec"].get("topologySpreadConstraints", []):
        selects("spreading", each["labelSelector"]["matchLabels"])
    for each in of_kind(found, "Service"):
        selects("the Service", each["spec"]["selector"])
        wrong += [
            f"the Service leads to port {port['targetPort']}"
            for port in each["spec"]["ports"]
            if port["targetPort"] not in ports
        ]
    for each in of_kind(found, "PodDisruptionBudget"):
        selects("the budget", each["spec"]["selector"]["matchLabels"])
    for each in of_kind(found, "NetworkPolicy"):
        selects("the policy", each["spec"]["podSelector"]["matchLabels"])
        opened = {port["port"] for rule in each["spec"]["ingress"] for port in rule["ports"]}
        if opened != set(ports):
            wrong.append(f"the policy opens {opened} of {set(ports)}")
    for each in of_kind(found, "HorizontalPodAutoscaler"):
        target = each["spec"]["scaleTargetRef"]
        if (target["kind"], target["name"]) not in names or target["apiVersion"] != deployment["apiVersion"]:
            wrong.append(f"the autoscaler scales {target}")
        if not each["spec"]["minReplicas"] <= each["spec"]["maxReplicas"]:
            wrong.append("the autoscaler has no range")
        if "replicas" in deployment["spec"]:
            wrong.append("two say how many replicas there are")
        if "cpu" not in container["resources"]["requests"]:
            wrong.append("the autoscaler counts shares of a request that there is not")
    services = {
        each["metadata"]["name"]: {port["port"] for port in each["spec"]["ports"]} for each in of_kind(found, "Service")
    }
    service_ports = {
        each["metadata"]["name"]: {port["name"] for port in each["spec"]["ports"]} for each in of_kind(found, "Service")
    }
    for route in of_kind(found, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            wrong += [
                f"the route leads to {to}"
                for to in rule["backendRefs"]
                if to["port"] not in services.get(to["name"], ())
            ]
    for ingress in of_kind(found, "Ingress"):
        for path in (path for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]):
            to = path["backend"]["service"]
            if to["port"]["name"] not in service_ports.get(to["name"], ()):
                wrong.append(f"the ingress leads to {to}")
    for text in quantities(template):
        try:
            if amount(text) <= 0:
                wrong.append(f"quantity {text}")
        except ValueError:
            wrong.append(f"quantity {text}")
    for resource, most in container["resources"]["limits"].items():
        if container["resources"]["requests"][resource] != most:  # those of memory and GPUs are kept free
            wrong.append(f"{resource}: limit and request differ")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        if container[probe]["httpGet"]["port"] != "http":
            wrong.append(f"{probe} asks port {container[probe]['httpGet']['port']}")
    command = container["command"]
    if ports["http"] != int(command[command.index("--port") + 1]):
        wrong.append("the command listens on another port")
    if ports.get("grpc") != (int(command[command.index("--grpc-port") + 1]) if "--grpc-port" in command else None):
        wrong.append("the command listens for gRPC on another port")
    if len(set(ports.values())) != len(ports):
        wrong.append(f"one port has two names: {ports}")
    volumes = {each["name"] for each in template["spec"]["volumes"]}
    mounts = container["volumeMounts"]
    if {each["name"] for each in mounts} != volumes:
        wrong.append("mounts and volumes differ")
    if container["workingDir"] not in {each["mountPath"] for each in mounts}:
        wrong.append("the working directory cannot be written to")
    variables = [each["name"] for each in container["env"]]
    if len(set(variables)) != len(variables):
        wrong.append(f"variables are given twice: {variables}")
    return wrong


@pytest.fixture(scope="module", autouse=True)
def schemas_are_read_once() -> Iterator[None]:
    """Each has some megabytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes_validate.utils, "schema_contents", cache(kubernetes_validate.utils.schema_contents))
        yield


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_every_manifest_is_valid_and_all_fit_together(spec: KubernetesSpec) -> None:
    found = rendered(spec)
    for version in (OLDEST, NEWEST):
        for each in found:
            if each["kind"] != "HTTPRoute":
                kubernetes_validate.validate(each, version, strict=True)
    assert faults(found) == []
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
    assert {each["name"]: list(each)[1] for each in pod["volumes"]} == {"work": "emptyDir", "tmp": "emptyDir"}
    assert pod["terminationGracePeriodSeconds"] >= SETTLE + spec.drain + GRACE
    (key,) = [each for each in container["env"] if each["name"] == "TALLY_ENDPOINT_KEY"]
    assert "value" not in key
    assert key["valueFrom"]["secretKeyRef"]["name"] == spec.keys_from


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


@settings(max_examples=30, deadline=None)
@given(specs())
def test_routes_are_valid_by_the_schema_of_the_gateway_api(spec: KubernetesSpec) -> None:
    schema = CRDS / "httproute_v1.json"
    if not schema.exists():
        pytest.skip("the schema of HTTPRoute is not on this machine")
    validator = jsonschema.Draft202012Validator(_strict(json.loads(schema.read_text())))
    for route in of_kind(rendered(spec), "HTTPRoute"):
        validator.validate(route)


def _strict(schema: Any) -> Any:
    """The schema, refusing fields that it does not name."""
    if isinstance(schema, dict):
        found = {key: _strict(value) for key, value in schema.items()}
        fields = found.get("properties")
        if isinstance(fields, dict) and fields and "apiVersion" not in fields:
            found.setdefault("additionalProperties", False)
        return found
    return [_strict(each) for each in schema] if isinstance(schema, list) else schema


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda found: of_kind(found, "Service")[0]["spec"]["selector"].update(x="y"), "the Service selects"),
        (
            lambda found: of_kind(found, "Service")[0]["spec"]["ports"][0].update(targetPort="grpc"),
            "leads to port grpc",
        ),
        (
            lambda found: of_kind(found, "HorizontalPodAutoscaler")[0]["spec"]["scaleTargetRef"].update(name="x"),
            "scales",
        ),
        (
            lambda found: of_kind(found, "PodDisruptionBudget")[0]["spec"]["selector"]["matchLabels"].update(x="y"),
            "budget",
        ),
        (
            lambda found: of_kind(found, "NetworkPolicy")[0]["spec"]["podSelector"]["matchLabels"].clear(),
            "the policy selects",
        ),
        (
            lambda found: found[2]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"].update(
                memory="2GB"
            ),
            "quantity 2GB",
        ),
        (
            lambda found: found[2]["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["httpGet"].update(
                port="x"
            ),
            "livenessProbe",
        ),
        (lambda found: found[1]["metadata"].update(name="Big_Name"), "no DNS label"),
        (lambda found: found[2]["spec"].update(replicas=2), "two say how many"),
    ],
)
def test_the_checks_see_what_is_wrong(spoil: Any, said: str) -> None:
    """They would be of no use if they passed anything."""
    found = rendered(
        KubernetesSpec(
            name="plastic",
            model="image:/m",
            environment=Environment("image", "a/b"),
            profile="production",
            gateway="web",
        )
    )
    assert faults(found) == []
    spoil(found)
    assert any(said in each for each in faults(found)), faults(found)
