"""The objects of an endpoint, as server-side apply takes them: only what Tally decides is in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tally.config import SECRETS
from tally.deploy import container
from tally.deploy.kubernetes.spec import KubernetesSpec
from tally.deploy.shipping import Shipped
from tally.serving.settings import KEYS

Manifest = dict[str, Any]

PORT = 8080
"""Where the container listens."""
GRPC_PORT = 8081
"""The same for gRPC."""
SERVICE_PORT = 80
USER = 10001
"""The id of the user that containers run as: none that an image or a node has."""
WORK = "/work"
"""The working directory: the only place besides /tmp that can be written to."""
TMP = "/tmp"  # noqa: S108
KEYS_PLACE = "/run/secrets/tally"
"""Where the clients' keys are, as a file."""
SETTLE = 5
"""Seconds in which a pod that is to end still takes connections, until all that send some know it."""
GRACE = 10
"""Seconds beyond settling and draining after which a pod is killed."""
START = 120
"""Seconds within which the server has to answer; its models may take longer."""
ROLLOUT = 900
"""Seconds without progress after which Kubernetes calls a rollout failed."""
BODY = "64m"
"""As much as the server takes (``tally serve --max-body``)."""

_PROTOCOLS = {"http": "http", "grpc": "kubernetes.io/h2c"}
"""What is spoken at a port, as Kubernetes calls it; gRPC without TLS."""

LABELS = {"app.kubernetes.io/name": "tally", "app.kubernetes.io/component": "endpoint"}
_NAMESPACE = "kubernetes.io/metadata.name"
"""The label of namespaces that holds their name."""
MODEL, VERSION, PROFILE = "tally/model", "tally/version", "tally/profile"
"""Annotations of a Deployment: the model as it was deployed, its version in the registry, and the profile."""
MANAGED = {"app.kubernetes.io/managed-by": "tally"}


def is_ours(live: Manifest) -> bool:
    """Whether Tally has made an object."""
    labels = live["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in MANAGED.items())


def selector(name: str) -> dict[str, str]:
    """The labels by which the pods of an endpoint are known."""
    return {**LABELS, "app.kubernetes.io/instance": name}


def manifests(spec: KubernetesSpec, shipped: Shipped, namespace: str) -> list[Manifest]:
    """All objects of an endpoint, in the order in which they are applied."""
    found = [_network_policy(spec), _service(spec), _deployment(spec, shipped)]
    if spec.profile == "production":
        found += [_disruption_budget(spec), _autoscaler(spec)]
    if spec.gateway is not None:
        found.append(_http_route(spec, spec.gateway))
    elif spec.ingress_class is not None:
        found.append(_ingress(spec, spec.ingress_class))
    for each in found:
        each["metadata"]["namespace"] = namespace
    return found


def _object(spec: KubernetesSpec, version: str, kind: str, body: Mapping[str, Any]) -> Manifest:
    labels = {**selector(spec.name), **MANAGED}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": spec.name, "labels": labels}, "spec": dict(body)}


def _deployment(spec: KubernetesSpec, shipped: Shipped) -> Manifest:
    found = _object(
        spec,
        "apps/v1",
        "Deployment",
        {
            # With an autoscaler, the number of replicas is its own, and not set again by each deployment.
            **({"replicas": 1} if spec.profile == "dev-test" else {}),
            "selector": {"matchLabels": selector(spec.name)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "progressDeadlineSeconds": ROLLOUT,
            "revisionHistoryLimit": 5,
            "template": {
                "metadata": {"labels": {**selector(spec.name), **MANAGED}},
                "spec": _pod(spec, shipped),
            },
        },
    )
    version = {} if shipped.version is None else {VERSION: str(shipped.version)}
    found["metadata"]["annotations"] = {MODEL: spec.model, PROFILE: spec.profile, **version}
    return found


def _pod(spec: KubernetesSpec, shipped: Shipped) -> Manifest:
    pod: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": SETTLE + math.ceil(spec.drain) + GRACE,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(spec, shipped)],
        "volumes": [
            {"name": "work", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            # As a file, not a variable: keys that are changed count without a restart.
            {
                "name": "keys",
                "secret": {"secretName": spec.keys_from, "defaultMode": 0o440, "items": [{"key": KEYS, "path": KEYS}]},
            },
        ],
    }
    if spec.service_account is not None:
        pod["serviceAccountName"] = spec.service_account
    if spec.pull_secret is not None:
        pod["imagePullSecrets"] = [{"name": spec.pull_secret}]
    if spec.profile == "production":
        pod["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": key,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": selector(spec.name)},
                "matchLabelKeys": ["pod-template-hash"],  # of one version: an update spreads, too
            }
            for key in ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
        ]
    return pod


def _container(spec: KubernetesSpec, shipped: Shipped) -> Manifest:
    gpus = {"nvidia.com/gpu": str(spec.gpu)} if spec.gpu else {}
    variables = {
        "HOME": WORK,
        "USER": "tally",
        "TALLY_HOME": f"{WORK}/.tally",
        "TALLY_CACHE": f"{WORK}/.cache",
        SECRETS: KEYS_PLACE,
        **spec.variables,
    }
    found: Manifest = {
        "name": "endpoint",
        "image": spec.container_image,
        "command": container.command(spec, shipped, port=PORT, grpc_port=None if spec.grpc_port is None else GRPC_PORT),
        "workingDir": WORK,
        "env": [{"name": name, "value": value} for name, value in variables.items()],
        "ports": [
            {"name": name, "containerPort": port, "protocol": "TCP"}
            for name, port in (("http", PORT), ("grpc", GRPC_PORT))
            if name in _ports(spec)
        ],
        # No limit of CPU: it would hold up requests for parts of each tenth of a second while cores are idle.
        "resources": {
            "requests": {"cpu": spec.cpu, "memory": spec.memory, **gpus},
            "limits": {"memory": spec.memory, **gpus},
        },
        "startupProbe": _probe("/healthz", periodSeconds=2, failureThreshold=START // 2),
        "livenessProbe": _probe("/healthz", periodSeconds=10, failureThreshold=6),
        "readinessProbe": _probe("/readyz", periodSeconds=2, failureThreshold=2),
        "lifecycle": {"preStop": {"sleep": {"seconds": SETTLE}}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "work", "mountPath": WORK},
            {"name": "tmp", "mountPath": TMP},
            {"name": "keys", "mountPath": KEYS_PLACE, "readOnly": True},
        ],
    }
    if spec.secrets:
        found["envFrom"] = [{"secretRef": {"name": each}} for each in spec.secrets]
    return found


def _probe(path: str, **timing: int) -> Manifest:
    return {"httpGet": {"path": path, "port": "http"}, "timeoutSeconds": 5, **timing}


def _service(spec: KubernetesSpec) -> Manifest:
    ports = [
        {"name": name, "port": port, "targetPort": name, "protocol": "TCP", "appProtocol": _PROTOCOLS[name]}
        for name, port in _ports(spec).items()
    ]
    return _object(spec, "v1", "Service", {"type": "ClusterIP", "selector": selector(spec.name), "ports": ports})


def _ports(spec: KubernetesSpec) -> dict[str, int]:
    """Name to the port by which clients reach it."""
    return {"http": SERVICE_PORT, **({} if spec.grpc_port is None else {"grpc": spec.grpc_port})}


def _network_policy(spec: KubernetesSpec) -> Manifest:
    sources: list[Manifest] = [{"podSelector": {}}]
    sources += [{"namespaceSelector": {"matchLabels": {_NAMESPACE: each}}} for each in spec.reached_from]
    return _object(
        spec,
        "networking.k8s.io/v1",
        "NetworkPolicy",
        {
            "podSelector": {"matchLabels": selector(spec.name)},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": sources, "ports": [{"port": each, "protocol": "TCP"} for each in _ports(spec)]}],
        },
    )


def _disruption_budget(spec: KubernetesSpec) -> Manifest:
    return _object(
        spec,
        "policy/v1",
        "PodDisruptionBudget",
        {
            "maxUnavailable": 1,
            "selector": {"matchLabels": selector(spec.name)},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",  # what does not run is no reason to keep a node
        },
    )


def _autoscaler(spec: KubernetesSpec) -> Manifest:
    least, most = spec.bounds
    return _object(
        spec,
        "autoscaling/v2",
        "HorizontalPodAutoscaler",
        {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": spec.name},
            "minReplicas": least,
            "maxReplicas": most,
            "metrics": [
                {
                    "type": "Resource",
                    "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}},
                }
            ],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 300}},
        },
    )


def _paths(name: str) -> list[tuple[str, str]]:
    """What a route shows: the paths that have the endpoint's name in them, so that many share one host. The server's
    own, such as /metrics, are not among them."""
    return [
        ("PathPrefix", f"/api/v1/service/{name}"),
        ("PathPrefix", f"/v2/models/{name}"),
        ("PathPrefix", f"/v1/models/{name}"),
        # One segment of a path each, which no prefix covers.
        ("Exact", f"/v1/models/{name}:predict"),
        ("Exact", f"/v1/models/{name}:classify"),
    ]


def _http_route(spec: KubernetesSpec, gateway: str) -> Manifest:
    namespace, _, name = gateway.rpartition("/")
    parent = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": name}
    if namespace:
        parent["namespace"] = namespace
    matches = [{"path": {"type": form, "value": path}} for form, path in _paths(spec.name)]
    backend = {"group": "", "kind": "Service", "name": spec.name, "port": SERVICE_PORT, "weight": 1}
    return _object(
        spec,
        "gateway.networking.k8s.io/v1",
        "HTTPRoute",
        {
            "parentRefs": [parent],
            **({"hostnames": [spec.hostname]} if spec.hostname is not None else {}),
            "rules": [{"matches": matches, "backendRefs": [backend]}],
        },
    )


def _ingress(spec: KubernetesSpec, ingress_class: str) -> Manifest:
    backend = {"service": {"name": spec.name, "port": {"name": "http"}}}
    forms = {"PathPrefix": "Prefix", "Exact": "Exact"}
    rule: Manifest = {
        "http": {
            "paths": [{"path": path, "pathType": forms[form], "backend": backend} for form, path in _paths(spec.name)]
        }
    }
    if spec.hostname is not None:
        rule = {"host": spec.hostname, **rule}
    body: Manifest = {"ingressClassName": ingress_class, "rules": [rule]}
    if spec.tls_secret is not None:
        body["tls"] = [{"hosts": [spec.hostname], "secretName": spec.tls_secret}]
    found = _object(spec, "networking.k8s.io/v1", "Ingress", body)
    # Nginx refuses pictures of more than 1 MB by itself; others do not know the annotation.
    found["metadata"]["annotations"] = {"nginx.ingress.kubernetes.io/proxy-body-size": BODY}
    return found
