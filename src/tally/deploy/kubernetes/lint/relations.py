"""Rules about objects and whom they name: selectors, ports, routes, autoscalers, accounts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tally.deploy.kubernetes.lint.objects import (
    NAMESPACELESS,
    SERVES,
    Found,
    Manifest,
    Pods,
    called,
    matches,
    namespace_of,
    shown,
)
from tally.deploy.spec import LABEL, SUBDOMAIN

_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")

_TIME = re.compile(r"0|(\d+y)?(\d+w)?(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?")


def names(found: Found) -> Iterator[str]:
    seen = set()
    for each in found.manifests:
        name = each["metadata"]["name"]
        key = (each["kind"], namespace_of(each), name)
        if key in seen:
            yield f"{called(each)} is there twice"
        seen.add(key)
        form = LABEL if each["kind"] in ("Service", "Namespace", "StatefulSet", "RayCluster") else SUBDOMAIN
        if not form.fullmatch(name) or (each["kind"] == "Service" and name[0].isdigit()):
            yield f"{called(each)}: {name!r} is no name of Kubernetes: small letters, digits and '-'"
    for pods in found.pods:
        names = [each["name"] for each in pods.containers]
        if len(set(names)) != len(names):
            yield f"{pods.what} has two containers of one name: {', '.join(names)}"
        yield from (f"{pods.what}: container {name!r} is no DNS label" for name in names if not LABEL.fullmatch(name))


def namespaces(found: Found) -> Iterator[str]:
    spaces = {namespace_of(each) for each in found.manifests if each["kind"] not in NAMESPACELESS}
    if len(spaces) > 1:
        yield f"objects are in several namespaces: {', '.join(sorted(map(str, spaces)))}"
    for each in found.of("PersistentVolume"):
        claim = each["spec"].get("claimRef")
        if claim and claim.get("namespace") not in spaces:
            yield f"{called(each)} is kept for the namespace {claim.get('namespace')}, which nothing else is in"
        elif claim and not any(
            one["metadata"]["name"] == claim.get("name") for one in found.of("PersistentVolumeClaim")
        ):
            yield f"{called(each)} is kept for the claim {claim.get('name')}, which is not there"


def labels(found: Found) -> Iterator[str]:
    every = [(called(each), each["metadata"].get("labels") or {}) for each in found.manifests]
    every += [(pods.what, pods.labels) for pods in found.pods]
    for what, labels in every:
        for key, value in labels.items():
            if not _VALUE.fullmatch(value):
                yield f"{what}: the label {key} may not be {value!r}"


def selectors(found: Found) -> Iterator[str]:
    for pods in found.pods:
        if pods.kind in SERVES:
            selector = pods.owner["spec"]["selector"]
            if not selector.get("matchLabels") or not matches(selector, pods.labels):
                yield f"{pods.what} selects {shown(selector)}, and its pods have {shown(pods.labels)}"
        for each in pods.spec.get("topologySpreadConstraints", ()):
            if not matches(each.get("labelSelector") or {}, pods.labels) or not each.get("labelSelector"):
                yield f"{pods.what} is spread by {shown(each.get('labelSelector') or {})}, which its pods do not have"
    for each in found.of("StatefulSet"):
        if (name := each["spec"].get("serviceName")) and found.get("Service", name, each) is None:
            yield f"{called(each)}: there is no Service {name}, by which its pods would be found"
    for each in found.of("Service"):
        selector = each["spec"].get("selector") or {}
        if each["spec"].get("type") == "ExternalName":  # another name for a host elsewhere
            continue
        if not found.selected({"matchLabels": selector}, each) or not selector:
            yield f"{called(each)} selects {shown(selector)}, which no pod has"
    for each in found.of("PodDisruptionBudget"):
        selector = each["spec"].get("selector") or {}
        chosen = found.selected(selector, each)
        if not chosen or not selector:
            yield f"{called(each)} selects {shown(selector)}, which no pod has"
        for pods in chosen:
            least, most = each["spec"].get("minAvailable"), each["spec"].get("maxUnavailable")
            replicas = pods.owner["spec"].get("replicas")
            if isinstance(least, int) and replicas is not None and least >= replicas:
                yield f"{called(each)} keeps {least} of {replicas} pods: none may ever be taken away"
            elif least == "100%" or most in (0, "0", "0%"):
                yield f"{called(each)} keeps all pods of {pods.what}: none may ever be taken away"
    for each in found.of("NetworkPolicy"):
        if each["spec"]["podSelector"] and not found.selected(each["spec"]["podSelector"], each):
            yield f"{called(each)} selects {shown(each['spec']['podSelector'])}, which no pod has"
        for direction in ("ingress", "egress"):
            for peer in _peers(each, direction):
                if "namespaceSelector" not in peer and not found.selected(peer.get("podSelector", {}), each):
                    yield f"{called(each)} lets {shown(peer.get('podSelector', {}))} in or out, which no pod has"
    for each in found.of("ServiceMonitor"):
        services = [
            service
            for service in found.of("Service")
            if matches(each["spec"]["selector"], service["metadata"].get("labels") or {})
        ]
        if not services:
            yield f"{called(each)} selects {shown(each['spec']['selector'])}, which no Service has"
        for endpoint in each["spec"]["endpoints"]:
            for service in services:
                if endpoint.get("port") not in {port.get("name") for port in service["spec"].get("ports", ())}:
                    yield f"{called(each)} reads port {endpoint.get('port')!r}, which {called(service)} does not have"


def networks(found: Found) -> Iterator[str]:
    policies = [each for each in found.of("NetworkPolicy") if "Ingress" in each["spec"].get("policyTypes", ())]
    for pods in found.pods:
        if not any(pods in found.selected(each["spec"]["podSelector"], each) for each in policies):
            yield f"{pods.what}: no NetworkPolicy says who may connect to its pods"
        elif pods.ports and not any(
            pods in found.selected(each["spec"]["podSelector"], each)
            for each in policies
            if each["spec"].get("ingress")
        ):
            yield f"{pods.what} has ports, and no NetworkPolicy lets anybody connect to them"
    for each in policies:
        chosen = found.selected(each["spec"]["podSelector"], each)
        for rule in each["spec"].get("ingress", ()):
            for port in rule.get("ports", ()):
                if (
                    chosen
                    and "port" in port
                    and "endPort" not in port
                    and not any(pods.has_port(port["port"]) for pods in chosen)
                ):
                    yield f"{called(each)} opens port {port['port']!r}, which none of its pods has"
    for each in found.of("Service"):
        if (type_ := each["spec"].get("type")) not in ("NodePort", "LoadBalancer"):
            continue
        for pods in found.selected({"matchLabels": each["spec"].get("selector") or {}}, each):
            for port in each["spec"].get("ports", ()):
                if not _lets_in(policies, found, pods, port.get("targetPort", port["port"])):
                    yield (
                        f"{called(each)} is a {type_}, and no NetworkPolicy lets anybody from outside the cluster "
                        f"connect to port {port['port']}: one with an ipBlock says who may"
                    )


def _lets_in(policies: Sequence[Manifest], found: Found, pods: Pods, port: str | int) -> bool:
    """Whether somebody outside the cluster may connect to a port of pods: from any place, or from an address."""
    for each in policies:
        if pods not in found.selected(each["spec"]["podSelector"], each):
            continue
        for rule in each["spec"].get("ingress") or ():
            sources, ports = rule.get("from") or (), [one["port"] for one in rule.get("ports") or () if "port" in one]
            numbers = {pods.ports.get(str(one), one) for one in ports}
            if (not sources or any("ipBlock" in one for one in sources)) and (
                not ports or pods.ports.get(str(port), port) in numbers
            ):
                return True
    return False


def _peers(policy: Manifest, direction: str) -> Iterator[Mapping[str, Any]]:
    for rule in policy["spec"].get(direction, ()):
        yield from rule.get("from" if direction == "ingress" else "to", ())


def ports(found: Found) -> Iterator[str]:
    for each in found.of("Service"):
        chosen = found.selected({"matchLabels": each["spec"].get("selector") or {}}, each)
        for port in each["spec"].get("ports", ()):
            target = port.get("targetPort", port["port"])
            yield from (
                f"{called(each)} leads to port {target!r}, which {pods.what} does not have"
                for pods in chosen
                if not pods.has_port(target)
            )
    for pods in found.pods:
        for one in pods.spec["containers"]:
            numbers = [port["containerPort"] for port in one.get("ports", ())]
            names = [port.get("name") for port in one.get("ports", ())]
            if len(set(numbers)) != len(numbers) or len(set(names)) != len(names):
                yield f"{pods.what}, {one['name']}: a port is there twice: {numbers}"


def routes(found: Found) -> Iterator[str]:
    for each in found.of("HTTPRoute"):
        for rule in each["spec"].get("rules", ()):
            for to in rule.get("backendRefs", ()):
                service = found.get("Service", to["name"], each)
                if service is None or to.get("port") not in {port["port"] for port in service["spec"]["ports"]}:
                    yield f"{called(each)} leads to port {to.get('port')} of {to['name']}, which is not there"
        for parent in each["spec"].get("parentRefs", ()):
            if "namespace" in parent:
                continue
            gateway = found.get("Gateway", parent["name"], each)
            listeners = {one["name"]: one for one in gateway["spec"]["listeners"]} if gateway else {}
            if gateway is None or parent.get("sectionName", next(iter(listeners), None)) not in listeners:
                yield f"{called(each)} belongs to the Gateway {parent['name']}, which has no such listener"
            elif one := listeners[parent.get("sectionName", next(iter(listeners)))]:
                hosts = each["spec"].get("hostnames", [])
                if one.get("hostname") is not None and one["hostname"] not in hosts:
                    yield f"{called(each)} is for {', '.join(hosts)}, and its listener for {one['hostname']}"
    for each in found.of("Ingress"):
        hosts = {rule.get("host") for rule in each["spec"]["rules"]}
        for path in (path for rule in each["spec"]["rules"] for path in rule["http"]["paths"]):
            to = path["backend"]["service"]
            service = found.get("Service", to["name"], each)
            names = {port.get("name") for port in service["spec"]["ports"]} if service else set()
            numbers = {port["port"] for port in service["spec"]["ports"]} if service else set()
            if to["port"].get("name") not in names and to["port"].get("number") not in numbers:
                yield f"{called(each)} leads to {to['port']} of {to['name']}, which is not there"
        for tls in each["spec"].get("tls", ()):
            if not set(tls.get("hosts", ())) <= hosts:
                yield f"{called(each)} has a certificate for {', '.join(tls['hosts'])}, and no rule for that host"
            yield from _certified(found, each, tls["secretName"], tls.get("hosts", ()))
    for each in found.of("Gateway"):
        listening = [one["name"] for one in each["spec"]["listeners"]]
        if len(set(listening)) != len(listening):
            yield f"{called(each)} has two listeners of one name: {', '.join(listening)}"
        for one in each["spec"]["listeners"]:
            refs = one.get("tls", {}).get("certificateRefs", ())
            if one["protocol"] == "HTTPS" and not refs:
                yield f"{called(each)}, listener {one['name']}: HTTPS without a certificate"
            for ref in refs:
                yield from _certified(found, each, ref["name"], [one["hostname"]] if "hostname" in one else [])


def _certified(found: Found, by: Manifest, secret: str, hosts: Sequence[str]) -> Iterator[str]:
    made = [each for each in found.of("Certificate") if each["spec"]["secretName"] == secret]
    if not made:
        yield f"{called(by)} uses the certificate of the Secret {secret}, which no Certificate makes"
    for each in made:
        if not set(hosts) <= set(each["spec"].get("dnsNames", ())):
            yield f"{called(by)} is for {', '.join(hosts)}, and {called(each)} for {each['spec'].get('dnsNames')}"


def scaling(found: Found) -> Iterator[str]:
    for each in found.of("HorizontalPodAutoscaler", "ScaledObject"):
        spec, target = each["spec"], each["spec"]["scaleTargetRef"]
        scaled = found.get(target.get("kind", "Deployment"), target["name"], each)
        if scaled is None or target.get("apiVersion", "apps/v1") != scaled["apiVersion"]:
            yield f"{called(each)} scales {target.get('kind', 'Deployment')} {target['name']}, which is not there"
            continue
        if "replicas" in scaled["spec"]:
            yield f"{called(scaled)}: two say how many replicas there are, and {called(each)} is to"
        least = spec.get("minReplicas", 1) if each["kind"].startswith("Hor") else spec.get("minReplicaCount", 0)
        most = spec["maxReplicas"] if each["kind"].startswith("Hor") else spec.get("maxReplicaCount", 100)
        if least > most:
            yield f"{called(each)}: at least {least} and at most {most}"
        for metric in spec.get("metrics", ()):
            wanted = metric.get("resource", {}).get("name")
            for one in scaled["spec"]["template"]["spec"]["containers"]:
                if wanted and wanted not in one.get("resources", {}).get("requests", {}):
                    yield f"{called(each)} counts shares of a request of {wanted}, which {one['name']} does not have"
        for trigger in spec.get("triggers", ()):
            ref = trigger.get("authenticationRef")
            if ref and "kind" not in ref and found.get("TriggerAuthentication", ref["name"], each) is None:
                yield f"{called(each)}: there is no TriggerAuthentication {ref['name']}"


def accounts(found: Found) -> Iterator[str]:
    for each in found.of("RoleBinding", "ClusterRoleBinding"):
        role = each["roleRef"]
        if role["kind"] == "Role" and found.get("Role", role["name"], each) is None:
            yield f"{called(each)} grants the Role {role['name']}, which is not there"
        for subject in each.get("subjects", ()):
            if subject["kind"] == "ServiceAccount" and found.get("ServiceAccount", subject["name"], each) is None:
                yield f"{called(each)} is for the ServiceAccount {subject['name']}, which is not there"
    for each in found.of("Role", "ClusterRole"):
        for rule in each.get("rules") or ():
            if "*" in [*rule.get("verbs", ()), *rule.get("resources", ()), *rule.get("apiGroups", ())]:
                yield f"{called(each)} allows everything: name what is needed"


def alarms(found: Found) -> Iterator[str]:
    for each in found.of("PrometheusRule"):
        for group in each["spec"].get("groups") or ():
            for number, rule in enumerate(group.get("rules") or ()):
                name = rule.get("alert") or rule.get("record")
                what = f"{called(each)}, {group['name']}, {name or f'rule {number}'}"
                if ("alert" in rule) == ("record" in rule):
                    yield f"{what}: a rule has a name either as 'alert' or as 'record'"
                if (expression := str(rule["expr"])).count("(") != expression.count(")") or not expression.strip():
                    yield f"{what}: {expression!r} is no expression: its brackets do not match"
                for time in ("for", "keep_firing_for"):
                    if time in rule and not (rule[time] and _TIME.fullmatch(rule[time])):
                        yield f"{what}: {time} may not be {rule[time]!r}: 5m, say"


def jobs(found: Found) -> Iterator[str]:
    for pods in found.pods:
        policy = pods.spec.get("restartPolicy", "Always")
        if pods.kind in ("Job", "CronJob") and policy == "Always":
            yield f"{pods.what}: a Job needs restartPolicy OnFailure or Never"
        if pods.kind in SERVES and policy != "Always":
            yield f"{pods.what}: its pods are always restarted; restartPolicy {policy} is for Jobs"


RULES = (names, namespaces, labels, selectors, networks, ports, routes, scaling, accounts, alarms, jobs)
"""Each yields a line for each place where something is wrong."""
