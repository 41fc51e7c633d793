"""Kinds that operators bring, of which no library has models: the fields of some, and of others what they need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from lightkube.models.meta_v1 import LabelSelector, ObjectMeta


class _Fields(msgspec.Struct, rename="camel", kw_only=True):
    """Names and types of fields; what has no default has to be given."""


class _Reference(_Fields):
    name: str
    group: str | None = None
    kind: str | None = None
    namespace: str | None = None
    section_name: str | None = None


class _ListenerTls(_Fields):
    mode: str | None = None
    certificate_refs: list[_Reference] | None = None
    frontend_validation: Any = None
    options: dict[str, str] | None = None


class _From(_Fields):
    from_: str | None = msgspec.field(default=None, name="from")
    selector: LabelSelector | None = None


class _RouteKind(_Fields):
    kind: str
    group: str | None = None


class _AllowedRoutes(_Fields):
    namespaces: _From | None = None
    kinds: list[_RouteKind] | None = None


class _Listener(_Fields):
    name: str
    port: int
    protocol: str
    hostname: str | None = None
    tls: _ListenerTls | None = None
    allowed_routes: _AllowedRoutes | None = None


class _Address(_Fields):
    type: str | None = None
    value: str | None = None


class _Infrastructure(_Fields):
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    parameters_ref: _Reference | None = None


class _GatewaySpec(_Fields):
    gateway_class_name: str
    listeners: list[_Listener]
    addresses: list[_Address] | None = None
    infrastructure: _Infrastructure | None = None
    allowed_listeners: Any = None
    default_scope: str | None = None
    tls: Any = None


class _Object(_Fields, kw_only=True):
    api_version: str
    kind: str
    metadata: ObjectMeta
    status: Any = None


class _Gateway(_Object, kw_only=True):
    spec: _GatewaySpec


class _Rule(_Fields):
    expr: str | int
    alert: str | None = None
    record: str | None = None
    for_: str | None = msgspec.field(default=None, name="for")
    keep_firing_for: str | None = msgspec.field(default=None, name="keep_firing_for")
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class _RuleGroup(_Fields):
    name: str
    rules: list[_Rule] | None = None
    interval: str | None = None
    limit: int | None = None
    labels: dict[str, str] | None = None
    query_offset: str | None = msgspec.field(default=None, name="query_offset")
    partial_response_strategy: str | None = msgspec.field(default=None, name="partial_response_strategy")


class _PrometheusRuleSpec(_Fields):
    groups: list[_RuleGroup] | None = None


class _PrometheusRule(_Object, kw_only=True):
    spec: _PrometheusRuleSpec


FIELDS: Mapping[tuple[str, str], type[msgspec.Struct]] = {
    ("gateway.networking.k8s.io/v1", "Gateway"): _Gateway,
    ("monitoring.coreos.com/v1", "PrometheusRule"): _PrometheusRule,
}
"""Kinds by their version, of which all fields are known here."""

_POD = "template.spec.containers"
_RAY = (f"headGroupSpec.{_POD}", *(f"workerGroupSpecs[].{each}" for each in ("groupName", _POD)))
_BOUNDS = ("workerGroupSpecs[].minReplicas", "workerGroupSpecs[].maxReplicas")
_SCALED = ("scaleTargetRef.name", "triggers", "triggers[].type", "triggers[].metadata")
_NEEDED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"), (_POD,)),
    "CronJob": (f"jobTemplate.spec.{_POD}",),
    "Pod": ("containers",),
    "Service": (),
    "NetworkPolicy": ("podSelector",),
    "PodDisruptionBudget": (),
    "HorizontalPodAutoscaler": (),
    "PersistentVolume": (),
    "PersistentVolumeClaim": ("accessModes",),
    "Ingress": ("rules", "rules[].http.paths", "rules[].http.paths[].backend.service.port", "tls[].secretName"),
    "HTTPRoute": ("parentRefs[].name", "rules[].backendRefs[].name"),
    "RayCluster": (*_RAY, *_BOUNDS),
    "RayJob": ("entrypoint",),
    "ScaledObject": _SCALED,
    "TriggerAuthentication": (),
    "ServiceMonitor": ("selector", "endpoints"),
    "ExternalSecret": (),
    "Certificate": ("secretName", "issuerRef.name"),
}
"""Of each kind what has to be in ``spec``. ``[]``: in each of a list, which need not be there."""


def missing(found: Mapping[str, Any]) -> Iterator[str]:
    """What an object lacks, one line each, by its path. An empty list counts as none."""
    kind = str(found["kind"])
    if kind not in _NEEDED:
        return
    if not isinstance(found.get("spec"), Mapping):
        yield "spec is missing"
        return
    nested = found["spec"].get("rayClusterSpec") if kind == "RayJob" else None
    inside = [("spec.rayClusterSpec", nested, [*_RAY, *_BOUNDS])] if isinstance(nested, Mapping) else []
    for where, inner, paths in [("spec", found["spec"], _NEEDED[kind]), *inside]:
        for path in paths:
            yield from _lacks(inner, path.split("."), where)


def _lacks(inner: Any, path: list[str], where: str) -> Iterator[str]:
    if not path:
        return
    name, _, each = path[0].partition("[")
    place = f"{where}.{name}"
    if not isinstance(inner, Mapping):
        yield f"{where} is to have fields, and is {str(inner)[:60]!r}"
    elif each:
        for number, one in enumerate(inner[name] if isinstance(inner.get(name), list) else ()):
            yield from _lacks(one, path[1:], f"{place}[{number}]")
    elif inner.get(name) is None or inner[name] == []:
        yield f"{place} is missing"
    else:
        yield from _lacks(inner[name], path[1:], place)
