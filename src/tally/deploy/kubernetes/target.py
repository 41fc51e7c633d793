"""Endpoints on Kubernetes: rendered, compared with what is there, applied server-side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tally.deploy.base import Change, Plan, Say, Status, Target
from tally.deploy.kubernetes.manifests import MANAGED, Manifest, is_ours, manifests, selector
from tally.deploy.kubernetes.spec import KubernetesSpec
from tally.errors import DeployError
from tally.masking import mask
from tally.optional import needed

if TYPE_CHECKING:
    from tally.kubernetes import Cluster

PAUSE = 1.0
"""Seconds between two looks at a rollout."""
_OPTIONAL = ("PodDisruptionBudget", "HorizontalPodAutoscaler", "HTTPRoute", "Ingress")
"""What an endpoint had once, and may not have any more."""
_NEEDS = "Kubernetes needs more than scoring does: pip install 'tally-scoring[kubernetes]'"


class KubernetesTarget(Target[KubernetesSpec]):
    """An endpoint on a cluster."""

    name = "kubernetes"
    needs = _NEEDS
    spec_type = KubernetesSpec

    @cached_property
    def cluster(self) -> Cluster:
        """Connected to when it is first used."""
        with needed("deploying to Kubernetes needs", "kubernetes"):
            from tally.kubernetes import Cluster
        return Cluster(self.spec.context, self.spec.namespace)

    def close(self) -> None:
        if "cluster" in self.__dict__:
            self.cluster.close()

    def plan(self) -> Plan:
        documents = self._manifests(self.spec.namespace or "default")
        if self.spec.namespace is None:
            for each in documents:  # kubectl and the context say which
                del each["metadata"]["namespace"]
        return Plan(documents, f"{self.spec.name}.yaml", tuple(self._notes()))

    def difference(self) -> Sequence[Change]:
        """Also checks what the pods need, and for production that the cluster has room. Raises DeployError."""
        self._check()
        changes = [change for each in self._desired if (change := self._change(each)) is not None]
        return [*changes, *(Change("remove", f"{kind} {self.spec.name}") for kind in self._surplus)]

    def apply(self, say: Say) -> None:
        for kind in self._surplus:  # first: an autoscaler would undo what follows
            self.cluster.delete(kind, self.spec.name)
            say(f"removed {kind} {self.spec.name}")
        for each in self._desired:
            self._put(each)
            say(f"applied {each['kind']} {self.spec.name}")

    def wait(self, say: Say, timeout: float) -> None:
        from tally.deploy.kubernetes import rollout
        from tally.kubernetes import AwayError

        until, told = time.monotonic() + timeout, ""
        least, _ = self.spec.bounds
        while True:
            try:
                now = rollout.progress(self.cluster, self.spec.name, least)
            except AwayError as error:  # also clusters are restarted
                if time.monotonic() >= until:
                    raise
                if error.message != told:
                    say(told := error.message)
                time.sleep(PAUSE)
                continue
            if now is None:
                raise DeployError(f"the Deployment {self.spec.name} was removed while it was waited for")
            if now.text != told:
                say(told := now.text)
            if now.done:
                return
            hint = f"kubectl --context {self.cluster.name} -n {self.cluster.namespace} describe deployment,pod -l "
            hint += f"app.kubernetes.io/instance={self.spec.name}"
            if now.failure is not None:
                raise DeployError(f"{self.spec.name} does not come up: {mask(now.failure)}", hint=hint)
            if time.monotonic() >= until:
                lines = rollout.last_words(self.cluster, self.spec.name)
                words = "\n    ".join([". Its last lines:", *lines]) if lines else ""
                raise DeployError(f"after {timeout:g} s, {self.spec.name} has {now.text}{mask(words)}", hint=hint)
            time.sleep(PAUSE)

    def status(self) -> Status:
        from tally.deploy.kubernetes.fleet import status

        return status(self.cluster, self.spec.name)

    def address(self) -> str:
        spec = self.spec
        if spec.ingress_class is not None and spec.hostname is not None:
            return f"{'https' if spec.tls_secret else 'http'}://{spec.hostname}"
        if spec.gateway is not None:
            return self._gateway_address(spec.gateway)
        return f"http://{spec.name}.{self.cluster.namespace}.svc"

    def uris(self) -> Mapping[str, str]:
        """gRPC is reached from within the cluster: whatever leads to it from outside leads to HTTP."""
        found = dict(super().uris())
        if self.spec.grpc_port is not None:
            found["grpc"] = f"{self.spec.name}.{self.cluster.namespace}.svc:{self.spec.grpc_port}"
        return found

    # -- within ---------------------------------------------------------------------------------------------

    def _manifests(self, namespace: str) -> list[Manifest]:
        return manifests(self.spec, self.shipped, namespace)

    @cached_property
    def _desired(self) -> list[Manifest]:
        return self._manifests(self.cluster.namespace)

    @cached_property
    def _surplus(self) -> list[str]:
        """Kinds of which the endpoint has an object, made by Tally, that it is not to have any more."""
        wanted = {each["kind"] for each in self._desired}
        labels = {**selector(self.spec.name), **MANAGED}
        return [
            kind
            for kind in _OPTIONAL
            if kind not in wanted
            and any(each["metadata"]["name"] == self.spec.name for each in self.cluster.list(kind, labels))
        ]

    def _check(self) -> None:
        from tally.deploy.kubernetes import checks

        self._check_namespace()
        if wrong := list(checks.secret_problems(self.cluster, self.spec)):
            raise DeployError(_listed(wrong), hint="Nothing was applied.")
        if self.spec.unchecked:
            return
        wrong = list(checks.quota_problems(self.cluster, self.spec, self.cluster.get("Deployment", self.spec.name)))
        if self.spec.profile == "production":
            wrong += self._room_problems()
        if wrong:
            raise DeployError(_listed(wrong), hint="Nothing was applied. --unchecked applies it all the same.")

    def _check_namespace(self) -> None:
        from tally.kubernetes import ForbiddenError

        try:
            if self.cluster.get("Namespace", self.cluster.namespace) is None:
                raise self.cluster.no_namespace()
        except ForbiddenError:  # whoever deploys into a namespace need not be allowed to look at it; applying tells
            return

    def _room_problems(self) -> list[str]:
        from tally.deploy.kubernetes import checks
        from tally.kubernetes import ForbiddenError

        try:
            return list(checks.room_problems(self.cluster, self.spec))
        except ForbiddenError as error:
            return [f"whether the cluster has room for production cannot be seen: {error.message}"]

    def _change(self, manifest: Manifest) -> Change | None:
        """What applying a manifest would change, as the cluster itself says."""
        from tally.deploy.kubernetes import difference

        live = self.cluster.get(manifest["kind"], self.spec.name)
        what = f"{manifest['kind']} {self.spec.name}"
        if live is not None and not is_ours(live):
            raise DeployError(
                f"the namespace {self.cluster.namespace} has a {what} that Tally did not make",
                hint="Nothing was applied. Give the endpoint another name.",
            )
        return difference.change(what, live, self._put(manifest, dry_run=True))

    def _put(self, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
        from tally.deploy.kubernetes import difference

        return difference.put(self.cluster, manifest, dry_run=dry_run, force=self.spec.force)

    def _gateway_address(self, gateway: str) -> str:
        """Where a Gateway listens, as far as it is known yet."""
        namespace, _, name = gateway.rpartition("/")
        found: Any = self.cluster.get("Gateway", name, namespace=namespace or self.cluster.namespace) or {}
        listeners = found.get("spec", {}).get("listeners") or [{}]
        scheme = "https" if any(each.get("protocol") == "HTTPS" for each in listeners) else "http"
        if self.spec.hostname is not None:
            return f"{scheme}://{self.spec.hostname}"
        addresses = found.get("status", {}).get("addresses") or [{"value": f"ADDRESS-OF-{name}"}]
        return f"{scheme}://{addresses[0]['value']}"

    def _notes(self) -> list[str]:
        spec, (least, most) = self.spec, self.spec.bounds
        notes = [f"the model is {self.shipped.text}"]
        if not self.shipped.fixed:
            notes.append("a replica takes what is there when it starts; a registered model (models:/) stays the same")
        if spec.profile == "dev-test":
            notes.append(
                "profile dev-test: one replica and no autoscaler. Not promised: that it answers while its node is "
                "drained or lost, or while it is restarted; that it keeps up with more load; room on the cluster"
            )
        else:
            notes.append(
                f"profile production: {least} to {most} replicas by the load of their CPUs, spread over nodes and "
                "zones; at most one is taken away at a time"
            )
            if spec.gpu:
                notes.append("the autoscaler sees CPUs only: replicas that wait for their GPU are not added to")
        notes.append(f"clients send a key of the Secret {spec.keys_from}: Authorization: Bearer KEY")
        if spec.gateway is None and spec.ingress_class is None:
            notes.append(
                "it is reached from within the cluster only; --gateway or --ingress-class lead to it from outside, and "
                f"for a try: kubectl port-forward service/{spec.name} 8080:80"
            )
        if spec.grpc_port is not None:
            notes.append(
                f"gRPC is at port {spec.grpc_port} of the Service, for clients within the cluster; a connection stays "
                "with one replica, so clients balance by themselves, or a mesh does"
            )
            if not spec.environment.is_built:
                notes.append(f"the image {spec.container_image} has to have tally-scoring[server,grpc] installed")
        if not spec.environment.is_built and self.shipped.requirement is not None:
            notes.append(f"the image {spec.container_image} has to have {self.shipped.requirement} installed")
        return notes


def _listed(lines: Sequence[str]) -> str:
    return lines[0] if len(lines) == 1 else "\n".join(f"- {each}" for each in lines)
