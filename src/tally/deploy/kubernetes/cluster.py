"""A cluster, as far as deploying needs it. All of lightkube is in here."""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import yaml
from lightkube import ApiError, Client, ConfigError
from lightkube.config.kubeconfig import DEFAULT_KUBECONFIG, SERVICE_ACCOUNT, KubeConfig, SingleConfig
from lightkube.config.models import NameValue, User
from lightkube.generic_resource import GenericGlobalResource, GenericNamespacedResource, create_api_info
from lightkube.types import PatchType

from tally.errors import DeployError, SpecError
from tally.text import did_you_mean

MANAGER = "tally"
"""The name under which fields are ours in server-side apply."""

Object = dict[str, Any]

_BUSY = (429, 500, 502, 503, 504)
"""Answers of a server that is being restarted, or has too much to do."""


def _kind(group: str, version: str, kind: str, plural: str, base: type = GenericNamespacedResource) -> Any:
    return type(kind, (base,), {"_api_info": create_api_info(group, version, kind, plural)})


KINDS: Mapping[str, Any] = {
    "NetworkPolicy": _kind("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies"),
    "Service": _kind("", "v1", "Service", "services"),
    "Deployment": _kind("apps", "v1", "Deployment", "deployments"),
    "PodDisruptionBudget": _kind("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    "HorizontalPodAutoscaler": _kind("autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers"),
    "HTTPRoute": _kind("gateway.networking.k8s.io", "v1", "HTTPRoute", "httproutes"),
    "Ingress": _kind("networking.k8s.io", "v1", "Ingress", "ingresses"),
    "ReplicaSet": _kind("apps", "v1", "ReplicaSet", "replicasets"),
    "Pod": _kind("", "v1", "Pod", "pods"),
    "Secret": _kind("", "v1", "Secret", "secrets"),
    "ResourceQuota": _kind("", "v1", "ResourceQuota", "resourcequotas"),
    "Gateway": _kind("gateway.networking.k8s.io", "v1", "Gateway", "gateways"),
    "Namespace": _kind("", "v1", "Namespace", "namespaces", GenericGlobalResource),
    "Node": _kind("", "v1", "Node", "nodes", GenericGlobalResource),
}


class AwayError(DeployError):
    """The cluster does not answer, or cannot at present: asking again may help."""


class ForbiddenError(DeployError):
    """Whoever the kubeconfig says we are may not do that."""


class ConflictError(DeployError):
    """Fields are managed by others. fields: theirs, by path."""

    def __init__(self, message: str, *, fields: tuple[str, ...], hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.fields = fields


class Cluster:
    """One cluster and namespace. Raises SpecError where the kubeconfig does not lead to one, and from each method
    DeployError."""

    def __init__(self, context: str | None, namespace: str | None) -> None:
        config = _config(context)
        self.name = config.context_name
        self.namespace = namespace or config.namespace
        self._server = config.cluster.server
        with self._explained("the kubeconfig's context"):
            self._client = Client(config, namespace=self.namespace, field_manager=MANAGER)

    def get(self, kind: str, name: str, *, namespace: str | None = None) -> Object | None:
        """An object; None where there is none."""
        try:
            with self._explained(f"{kind} {name}"):
                if issubclass(KINDS[kind], GenericGlobalResource):
                    return dict(self._client.get(KINDS[kind], name))
                return dict(self._client.get(KINDS[kind], name, namespace=namespace))
        except _AbsentError:
            return None

    def list(self, kind: str, labels: Mapping[str, str] | None = None) -> builtins.list[Object]:
        """Objects with these labels; none where the cluster does not know the kind."""
        try:
            with self._explained(f"the list of {kind}s"):
                return [dict(each) for each in self._client.list(KINDS[kind], labels=dict(labels or {}) or None)]
        except _AbsentError:
            return []

    def apply(self, manifest: Mapping[str, Any], *, dry_run: bool = False, force: bool = False) -> Object:
        """Create an object, or set what the manifest says of it; the object afterwards. force: also fields that others
        manage. Raises ConflictError without it."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        try:
            with self._explained(f"{kind} {name}"):
                return dict(
                    self._client.patch(
                        KINDS[kind],
                        name,
                        dict(manifest),
                        patch_type=PatchType.APPLY,
                        dry_run=dry_run,
                        force=force,
                    )
                )
        except _AbsentError as error:
            if "namespaces" in error.message:
                raise self.no_namespace() from None
            raise DeployError(
                f"the cluster {self.name} does not know {kind} ({manifest['apiVersion']})",
                hint="An HTTPRoute needs the Gateway API, which the cluster's gateway controller brings."
                if kind == "HTTPRoute"
                else "Is it an old version of Kubernetes? Tally needs 1.30 or later.",
            ) from None

    def no_namespace(self) -> DeployError:
        """Says that ours is not there."""
        return DeployError(
            f"the cluster {self.name} has no namespace {self.namespace!r}",
            hint=f"kubectl --context {self.name} create namespace {self.namespace}",
        )

    def delete(self, kind: str, name: str) -> None:
        """Remove an object, if it is there."""
        try:
            with self._explained(f"{kind} {name}"):
                self._client.delete(KINDS[kind], name)
        except _AbsentError:
            pass

    def log(self, pod: str, lines: int) -> builtins.list[str]:
        """The last lines that a pod's container has written; none where there are none yet, or we may not see them."""
        try:
            with self._explained(f"the log of {pod}"):
                return builtins.list(self._client.log(pod, tail_lines=lines, newlines=False))
        except DeployError:
            return []

    def close(self) -> None:
        self._client.close()

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except ApiError as error:
            raise self._refusal(error, what) from None
        except httpx2.HTTPStatusError as error:
            status = error.response.status_code
            if status == 404:
                raise _AbsentError(f"there is no {what}") from None
            kind = AwayError if status in _BUSY else DeployError
            raise kind(f"the cluster {self.name} ({self._server}) answers {status} for {what}") from None
        except (httpx2.TransportError, KeyError, ValueError) as error:
            why = str(error) or type(error).__name__
            raise AwayError(
                f"the cluster {self.name} ({self._server}) does not answer: {why}",
                hint=f"Does it answer you? kubectl --context {self.name} get --raw /readyz",
            ) from None
        except (ConfigError, OSError) as error:
            raise SpecError(
                f"the context {self.name} of the kubeconfig cannot be used: {error}",
                hint="'tally deploy ... --dry-run | kubectl apply --server-side -f -' applies it by kubectl's means.",
            ) from None

    def _refusal(self, error: ApiError, what: str) -> DeployError:
        status = error.status
        message = f"the cluster {self.name} refuses {what}: {status.message}"
        if status.code == 404:
            return _AbsentError(status.message or what)
        if status.code == 401:
            return DeployError(
                f"the cluster {self.name} ({self._server}) does not know who asks",
                hint=f"Log in again; then this answers: kubectl --context {self.name} get pods",
            )
        if status.code == 403 and "exceeded quota" not in (status.message or ""):
            return ForbiddenError(message, hint=f"kubectl --context {self.name} auth can-i --list -n {self.namespace}")
        if status.code == 409 and status.details is not None and status.details.causes:
            causes = status.details.causes
            return ConflictError(
                f"{what}: others have changed what Tally is to set: "
                + "; ".join(f"{each.field} ({each.message})" for each in causes),
                fields=tuple(each.field or "" for each in causes),
                hint="--force sets it all the same, and makes it Tally's again.",
            )
        return AwayError(message) if status.code in _BUSY else DeployError(message)


class _AbsentError(DeployError):
    """404: no such object, namespace or kind."""


def _config(context: str | None) -> SingleConfig:
    """The context of the kubeconfig files, read as kubectl does: of what several say, the first counts."""
    given = os.environ.get("KUBECONFIG")
    paths = [Path(each).expanduser() for each in (given or DEFAULT_KUBECONFIG).split(os.pathsep) if each]
    there = [path for path in paths if path.is_file()]
    if not there:
        if context is None and Path(SERVICE_ACCOUNT, "token").is_file():
            return _single(KubeConfig.from_service_account())
        raise SpecError(
            f"there is no cluster: no kubeconfig at {', '.join(map(str, paths))}",
            hint="KUBECONFIG names another file; the cloud's own command writes one (az aks get-credentials, say). "
            "--dry-run prints what would be applied.",
        )
    configs = [_read(path) for path in there]
    name = context or next((each.current_context for each in configs if each.current_context), None)
    contexts = {name: each for config in reversed(configs) for name, each in config.contexts.items()}
    if name is None:
        raise SpecError("the kubeconfig has no current context", hint=f"Choose one: --context {' | '.join(contexts)}")
    if name not in contexts:
        raise SpecError(
            f"the kubeconfig has no context {name!r}{did_you_mean(name, contexts)}",
            hint=f"It has {', '.join(sorted(contexts))}." if contexts else f"{there[0]} has none at all.",
        )
    found = contexts[name]
    holder = next((each for each in configs if found.cluster in each.clusters), None)
    if holder is None:
        raise SpecError(f"the kubeconfig has no cluster {found.cluster!r}, which its context {name} names")
    users = {name: each for config in reversed(configs) for name, each in config.users.items()}
    if found.user is not None and found.user not in users:
        raise SpecError(f"the kubeconfig has no user {found.user!r}, which its context {name} names")
    single = SingleConfig(name, found, holder.clusters[found.cluster], users.get(found.user or ""), holder.fname)
    return _with_user(single)


def _single(config: KubeConfig) -> SingleConfig:
    found = config.get()
    assert found is not None
    return _with_user(found)


def _with_user(config: SingleConfig) -> SingleConfig:
    """lightkube asks for a user also where none is needed, and does not know the newest version of what plugins for
    logging in are asked, which differs from the one before in nothing that it uses."""
    user = config.user or User()
    if user.exec is not None:
        asked = {
            "apiVersion": user.exec.apiVersion,
            "kind": "ExecCredential",
            "spec": {"interactive": False},
        }
        told = NameValue(name="KUBERNETES_EXEC_INFO", value=json.dumps(asked))
        user.exec.env = [*(user.exec.env or ()), told]
        if user.exec.apiVersion.endswith("/v1"):
            user.exec.apiVersion += "beta1"
    return config._replace(user=user)


def _read(path: Path) -> KubeConfig:
    try:
        return KubeConfig.from_file(path)
    except (yaml.YAMLError, msgspec.MsgspecError, KeyError, TypeError, AttributeError, OSError, ValueError) as error:
        raise SpecError(f"{path} is no kubeconfig: {type(error).__name__}: {error}") from None
