"""What only a deployment on Kubernetes has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tally.deploy.spec import LABEL, SUBDOMAIN, DeploymentSpec

GROWTH = 2
"""Times the least number of replicas, which the autoscaler may reach unless the user says otherwise."""


@dataclass(frozen=True, kw_only=True)
class KubernetesSpec(DeploymentSpec):
    """context: of the kubeconfig; None: its current one. namespace: None: the context's.

    secrets: Secrets of the namespace whose entries are variables of the container. key_secret: the Secret with the
    clients' keys under ``TALLY_ENDPOINT_KEY``; None: ``NAME-key``. pull_secret: for a private registry of images.
    gateway: ``NAME`` or ``NAMESPACE/NAME`` of a Gateway that leads to the endpoint; ingress_class: of an Ingress that
    does, with hostname and tls_secret. allow_from: namespaces whose pods may connect, besides the endpoint's own.
    force: set fields that others manage, too. unchecked: apply also where the cluster seems too small.
    """

    context: str | None = None
    namespace: str | None = None
    gateway: str | None = None
    ingress_class: str | None = None
    hostname: str | None = None
    tls_secret: str | None = None
    allow_from: tuple[str, ...] = ()
    key_secret: str | None = None
    pull_secret: str | None = None
    service_account: str | None = None
    force: bool = False
    unchecked: bool = False

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        least, most = self.bounds
        if self.profile == "dev-test" and (least, most) != (1, 1):
            yield f"replicas: the profile dev-test has one, not {least}..{most}; --profile production has more"
        if self.profile == "production" and least < 2:
            yield f"replicas: the profile production has at least two, not {least}"
        names = (
            ("ingress_class", self.ingress_class, SUBDOMAIN),
            ("tls_secret", self.tls_secret, SUBDOMAIN),
            ("key_secret", self.key_secret, SUBDOMAIN),
            ("pull_secret", self.pull_secret, SUBDOMAIN),
            ("service_account", self.service_account, SUBDOMAIN),
            ("namespace", self.namespace, LABEL),
            *(("secrets", each, SUBDOMAIN) for each in self.secrets),
            *(("allow_from", each, LABEL) for each in self.allow_from),
        )
        for what, name, form in names:
            if name is not None and not form.fullmatch(name):
                yield f"{what}: {name!r} is no name of Kubernetes: small letters, digits and '-'"
        if self.hostname is not None and not SUBDOMAIN.fullmatch(self.hostname.removeprefix("*.")):
            yield f"hostname: {self.hostname!r} is no name of a host"
        if self.gateway is not None and not all(SUBDOMAIN.fullmatch(each) for each in self.gateway.split("/", 1)):
            yield f"gateway: {self.gateway!r} is neither NAME nor NAMESPACE/NAME"
        yield from self._route_problems()

    def _route_problems(self) -> Iterator[str]:
        if self.gateway is not None and self.ingress_class is not None:
            yield "gateway: an endpoint has a route by a Gateway or by an Ingress, not both"
        if self.ingress_class is None:
            if self.tls_secret is not None:
                yield "tls_secret: it is for an Ingress (ingress_class); a Gateway has certificates of its own"
            if self.hostname is not None and self.gateway is None:
                yield "hostname: nothing leads there without a gateway or an ingress_class"
        else:
            if not self.allow_from:
                yield "allow_from: name the namespace of the Ingress controller: its pods could not connect"
            if self.tls_secret is not None and self.hostname is None:
                yield "tls_secret: a certificate is for a hostname"

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the most replicas."""
        if self.replicas is None:
            return (1, 1) if self.profile == "dev-test" else (2, 2 * GROWTH)
        least, most = self.replicas
        return (least, GROWTH * least) if self.profile == "production" and least == most else (least, most)

    @property
    def keys_from(self) -> str:
        """The Secret with the clients' keys."""
        return self.key_secret or f"{self.name}-key"

    @property
    def reached_from(self) -> list[str]:
        """Namespaces besides its own whose pods may connect."""
        gateway = (self.gateway or "").rpartition("/")[0]
        return list(dict.fromkeys([*self.allow_from, *([gateway] if gateway else [])]))
