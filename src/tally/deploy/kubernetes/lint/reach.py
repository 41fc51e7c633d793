"""Rules about who has to connect to whom: the parts of Tally, past all NetworkPolicies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tally.deploy.kubernetes.lint.objects import Found, Manifest, Pods, matches

_COMPONENT = "app.kubernetes.io/component"
_NAME = "kubernetes.io/metadata.name"
_CONNECTIONS: tuple[tuple[tuple[str, ...], str, str | None], ...] = (
    (("server",), "ray-head", "dashboard"),
    (("ray-worker",), "ray-head", None),
    (("ray-head", "ray-worker"), "ray-worker", None),
    (("server", "migrate", "ray-head", "consumer"), "postgres", "postgres"),
    (("server", "ray-head", "ray-worker", "consumer"), "objects", "s3"),
)
"""Components that connect to another, and to which port; None: to ports that nobody knows before."""


def connections(found: Found) -> Iterator[str]:
    policies = list(found.of("NetworkPolicy"))
    for sources, to, port in _CONNECTIONS:
        for target in (pods for pods in found.pods if pods.labels.get(_COMPONENT) == to):
            for source in (pods for pods in found.pods if pods.labels.get(_COMPONENT) in sources):
                if port is not None and not target.has_port(port):
                    continue
                ways = (("Ingress", target, source), ("Egress", source, target))
                for direction, of, peer in ways:
                    if not is_open(found, policies, direction, of, peer, port and target.ports[port]):
                        into = "into" if direction == "Ingress" else "out of"
                        yield (
                            f"{source.what} has to connect to {target.what}{f', port {port}' if port else ''}, and no "
                            f"NetworkPolicy lets it {into} {of.what}"
                        )


def is_open(
    found: Found, policies: Sequence[Manifest], direction: str, of: Pods, peer: Pods, port: int | str | None
) -> bool:
    """Whether pods may be connected to by others, or connect to them: none of the policies is about them, or one says
    so."""
    mine = [each for each in policies if direction in _types(each) and of in found.selected(_selector(each), each)]
    key = "from" if direction == "Ingress" else "to"
    server = of if direction == "Ingress" else peer
    return not mine or any(
        _is_peer(rule.get(key), peer) and _has_port(rule.get("ports"), server, port)
        for each in mine
        for rule in each["spec"].get(direction.lower()) or ()
    )


def _types(policy: Manifest) -> Sequence[str]:
    spec = policy["spec"]
    return spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]


def _selector(policy: Manifest) -> Mapping[str, Any]:
    found: Mapping[str, Any] = policy["spec"]["podSelector"]
    return found


def _is_peer(peers: Sequence[Mapping[str, Any]] | None, pods: Pods) -> bool:
    for each in peers or [{"ipBlock": {}}]:
        if "ipBlock" in each:  # which addresses pods have is not known: it may be theirs
            return True
        space = each.get("namespaceSelector") or {}
        here = space.get("matchLabels", {}).get(_NAME, pods.namespace) == pods.namespace
        if here and matches(each.get("podSelector") or {}, pods.labels):
            return True
    return False


def _has_port(ports: Sequence[Mapping[str, Any]] | None, server: Pods, port: int | str | None) -> bool:
    if not ports:
        return True
    if port is None:
        return False
    for each in ports:
        first = server.ports.get(str(each.get("port")), each.get("port", port))
        if first == port or (isinstance(first, int) and "endPort" in each and first <= int(port) <= each["endPort"]):
            return True
    return False


RULES = (connections,)
"""Each yields a line for each place where something is wrong."""
