"""An overlay on a cluster: what is missing for it, what applying it would change, applying it, and taking it away."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from tally.deploy.base import Change, Say
from tally.deploy.kubernetes import difference
from tally.deploy.kubernetes.lint.needs import secrets_of
from tally.deploy.kubernetes.overlay import Overlay
from tally.deploy.kubernetes.readiness import pending
from tally.errors import DeployError, SpecError
from tally.kubernetes import AwayError, Cluster, ForbiddenError, Object, UnknownKindError
from tally.masking import mask
from tally.text import did_you_mean

PART_OF = {"app.kubernetes.io/part-of": "tally"}
"""The label of all objects of an overlay."""
KEPT = ("Namespace", "PersistentVolume", "PersistentVolumeClaim")
"""Kinds that hold what nobody could make again: they stay unless that is asked for."""
_SWEPT = (
    ("v1", "Service"), ("v1", "ConfigMap"), ("v1", "ServiceAccount"), ("v1", "PersistentVolumeClaim"),
    ("apps/v1", "Deployment"), ("apps/v1", "StatefulSet"), ("batch/v1", "Job"),
    ("batch/v1", "CronJob"),
    ("networking.k8s.io/v1", "NetworkPolicy"), ("networking.k8s.io/v1", "Ingress"),
    ("policy/v1", "PodDisruptionBudget"), ("autoscaling/v2", "HorizontalPodAutoscaler"),
    ("rbac.authorization.k8s.io/v1", "Role"), ("rbac.authorization.k8s.io/v1", "RoleBinding"),
    ("ray.io/v1", "RayCluster"), ("ray.io/v1", "RayJob"),
    ("keda.sh/v1alpha1", "ScaledObject"), ("keda.sh/v1alpha1", "TriggerAuthentication"),
    ("gateway.networking.k8s.io/v1", "Gateway"), ("gateway.networking.k8s.io/v1", "HTTPRoute"),
    ("monitoring.coreos.com/v1", "ServiceMonitor"), ("monitoring.coreos.com/v1", "PrometheusRule"),
    ("external-secrets.io/v1", "ExternalSecret"), ("cert-manager.io/v1", "Certificate"),
)  # fmt: skip
"""What overlays may have had before, and not have any more."""
PAUSE = 1.0
"""Seconds between two looks at what comes up."""
SCALER = "tally-scale"
"""The name under which numbers are set by hand."""
_SCALED = (".spec.replicas", ".spec.workerGroupSpecs", ".spec.minReplicaCount", ".spec.maxReplicaCount")
"""Fields that 'tally cluster scale' sets, too; a RayCluster's groups also have what its autoscaler has decided, which
is kept."""


class Installation:
    """An overlay and its cluster. force: set fields that others have changed, too. Methods raise DeployError."""

    def __init__(self, overlay: Overlay, cluster: Cluster, *, force: bool = False) -> None:
        self.overlay, self.cluster, self._force = overlay, cluster, force
        self.passing: list[Object] = []
        """Objects that are there for the moment only: who ends before it is over removes them."""

    # -- what there is to do -----------------------------------------------------------------------------------

    def missing(self) -> Iterator[str]:
        """What the overlay needs and does not bring: kinds that the cluster does not know, Secrets."""
        yield from dict.fromkeys(
            f"{error.message}{f': {error.hint}' if error.hint else ''}" for error in self._unknown.values()
        )
        first = "" if self._has_namespace else f"kubectl --context {self.cluster.name} create namespace "
        for (namespace, name), entries in secrets_of(self.overlay.manifests).items():
            try:
                found = self.cluster.get("Secret", name, namespace=namespace)
            except ForbiddenError:  # whoever applies need not be allowed to read secrets; the pods tell
                continue
            absent = sorted(entries - set((found or {}).get("data") or ()))
            if found is not None and not absent:
                continue
            where = f"Secret {name} in the namespace {namespace}"
            what = f"there is no {where}" if found is None else f"the {where} has no {', '.join(absent)}"
            make = _command(self.cluster.name, namespace, name, entries)
            yield f"{what}; make it: {f'{first}{namespace}; ' if first else ''}{make}"
            first = ""

    def difference(self) -> Sequence[Change]:
        """What applying would change, as the cluster itself says. Nothing is changed by asking."""
        found = []
        for each in self.overlay.manifests:
            if _key(each) in self._unknown:
                continue
            live, what = self._live(each), _called(each)
            if live is not None and (why := self._not_ours(live)) is not None:
                raise DeployError(
                    f"there is a {what} already, which {why}",
                    hint="Nothing was applied. Another namespace, or another name: in the overlay.",
                )
            if live is None and not self._has_namespace:
                found.append(Change("create", what))
                continue
            if live is not None and _has_failed(live):
                found.append(Change("replace", what))
                continue
            try:
                after = self._put(each, live, dry_run=True)
            except DeployError as error:
                if each["kind"] != "Job" or "immutable" not in error.message:
                    raise
                found.append(Change("replace", what))
            else:
                if (change := difference.change(what, live, after)) is not None:
                    found.append(change)
        return [*found, *(Change("remove", _called(each)) for each in self._gone)]

    def left(self) -> Sequence[str]:
        """What the overlay has no more, and stays all the same, as what is on it would be lost; how it would go."""
        kubectl = f"kubectl --context {self.cluster.name} -n {self.overlay.namespace} delete"
        found = [each for each in self._surplus if each["kind"] in KEPT and not self._is_of_a_set(each)]
        return [f"{_called(each)}; to lose what is on it: {kubectl} {_short(each)}" for each in found]

    def apply(self, changes: Sequence[Change], say: Say) -> None:
        """Make it so. Raises DeployError, before anything is applied, where something is missing."""
        if missing := list(self.missing()):
            raise DeployError("\n".join(f"- {each}" for each in missing), hint="Nothing was applied.")
        actions = {each.what: each.action for each in changes}
        wanted = [each for each in self.overlay.manifests if _called(each) in actions]
        for number, each in enumerate(wanted):
            what = _called(each)
            try:
                live = self._live(each)
                if actions[what] == "replace":
                    self.cluster.delete_any(each)
                    live = None
                self._put(each, live)
            except DeployError as error:
                if number == 0:
                    raise
                hint = f"{number} of {len(wanted)} objects are applied; the same command again goes on with the others."
                raise DeployError(error.message, hint=f"{error.hint} {hint}" if error.hint else hint) from error
            say(f"applied {what}")
        for each in self._gone:
            self.cluster.delete_any(each)
            say(f"removed {_called(each)}")

    def wait(self, say: Say, timeout: float) -> None:
        """Return when all of it is up. Raises DeployError, saying what is not, after ``timeout`` seconds, and at once
        for a Job that has failed."""
        until, told = time.monotonic() + timeout, set[str]()
        while True:
            try:
                lines = pending(self.cluster, self.overlay.manifests)
            except AwayError as error:  # also clusters are restarted
                lines = [error.message]
            if not lines:
                return
            for each in lines:
                if each not in told:
                    say(mask(each))
            told = set(lines)
            if time.monotonic() >= until:
                listed = "\n".join(f"- {mask(each)}" for each in lines)
                where = f"--context {self.cluster.name} -n {self.overlay.namespace}"
                raise DeployError(
                    f"after {timeout:g} s, not all of it is up:\n{listed}",
                    hint=f"It is applied, and may still come up. kubectl {where} describe pods  says more.",
                )
            time.sleep(PAUSE)

    # -- how much ----------------------------------------------------------------------------------------------

    def scale(self, sizes: Mapping[str, tuple[int, int]], say: Say) -> None:
        """Have so many of each: ``server``, ``consumer``, or a group of Ray's workers, at least and at most.

        It holds until the overlay is applied again. Raises SpecError for a name that is none of them.
        """
        for name, size in sizes.items():
            self._sized(name, *size)  # what is wrong is said before anything is changed
        for name, (least, most) in sizes.items():
            # Anew: groups of one cluster are one field, with what was just said of another.
            self.cluster.apply(self._sized(name, least, most), force=True, manager=SCALER)
            say(f"{name}: {least}" if least == most else f"{name}: {least} to {most}")

    def _sized(self, name: str, least: int, most: int) -> Object:
        """What is to be said of one of them: nothing but its number. Raises DeployError where it is not there."""
        ray = next((each for each in self.overlay.manifests if each["kind"] == "RayCluster"), None)
        groups = [each["groupName"] for each in ray["spec"]["workerGroupSpecs"]] if ray else []
        scaled = {
            each["metadata"]["labels"].get("app.kubernetes.io/component"): each
            for kind in ("Deployment", "ScaledObject")
            for each in self.overlay.manifests
            if each["kind"] == kind and "labels" in each["metadata"]
        }
        if ray is not None and name in groups:
            found = copy.deepcopy(self._ours(ray)["spec"]["workerGroupSpecs"])
            if name not in {group["groupName"] for group in found}:
                hint = f"tally cluster apply --overlay {self.overlay.folder}"
                raise DeployError(f"the {_called(ray)} has no group {name} yet", hint=hint)
            for group in found:
                if group["groupName"] == name:
                    group |= {"minReplicas": least, "maxReplicas": most}
            return _partial(ray, {"workerGroupSpecs": found})
        if name not in scaled:
            known = [*groups, *filter(None, scaled)]
            raise SpecError(
                f"there is no {name!r} to scale{did_you_mean(name, known)}", hint=f"There are {', '.join(known)}."
            )
        target = scaled[name]
        if target["kind"] == "ScaledObject":
            sizes = {"minReplicaCount": least, "maxReplicaCount": most}
        elif "replicas" not in target["spec"]:
            raise SpecError(f"{_called(target)} is scaled by an autoscaler: its bounds are in the overlay")
        elif least != most:
            raise SpecError(f"{name} has no autoscaler: say one number, not {least}..{most}")
        else:
            sizes = {"replicas": least}
        self._ours(target)
        return _partial(target, sizes)

    # -- the end -----------------------------------------------------------------------------------------------

    def parts(self, *, data: bool) -> Sequence[Object]:
        """What there is of it, in the order in which it would be taken away. data: also claims and volumes. What has
        a name of the overlay's, and is not Tally's, is not among it."""
        rendered = [each for each in self.overlay.manifests if _key(each) not in self._unknown]
        every = ((each, self._live(each)) for each in [*self._surplus, *reversed(rendered)])
        there = [each for each, live in every if live is not None and self._not_ours(live) is None]
        parts = [each for each in there if each["kind"] not in KEPT or (data and each["kind"] != "Namespace")]
        known = {_key(each) for each in parts}
        return [*parts, *(each for each in (self._claims_of_sets() if data else ()) if _key(each) not in known)]

    def _claims_of_sets(self) -> Iterator[Object]:
        """Claims that were made of StatefulSets' templates: they stay when the set goes."""
        for each in self.overlay.manifests:
            if each["kind"] == "StatefulSet" and each["spec"].get("volumeClaimTemplates"):
                space = {"namespace": self.overlay.namespace}
                claim: Object = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": space}
                for found in self.cluster.list_any(claim, each["spec"]["selector"]["matchLabels"]):
                    yield {**claim, "metadata": {**space, "name": found["metadata"]["name"]}}

    def down(self, parts: Sequence[Object], say: Say) -> None:
        """Take these away."""
        for each in parts:
            self.cluster.delete_any(each)
            say(f"removed {_called(each)}")

    # -- within ------------------------------------------------------------------------------------------------

    @cached_property
    def _unknown(self) -> Mapping[tuple[str, str], UnknownKindError]:
        """Objects of kinds that the cluster does not know."""
        found = {}
        for each in self.overlay.manifests:
            try:
                self.cluster.known(each)
            except UnknownKindError as error:
                found[_key(each)] = error
        return found

    @cached_property
    def _has_namespace(self) -> bool:
        try:
            return self.cluster.get("Namespace", self.overlay.namespace) is not None
        except ForbiddenError:  # whoever applies into a namespace need not be allowed to look at it; applying tells
            return True

    def _live(self, manifest: Object) -> Object | None:
        return self.cluster.get_any(manifest)

    def _ours(self, manifest: Object) -> Object:
        """The object that a manifest names. Raises DeployError where there is none, or another's."""
        live, what = self._live(manifest), _called(manifest)
        if live is None:
            raise DeployError(f"there is no {what} yet", hint=f"tally cluster apply --overlay {self.overlay.folder}")
        if (why := self._not_ours(live)) is not None:
            raise DeployError(f"the {what} {why}: it is left alone")
        return live

    def _not_ours(self, live: Object) -> str | None:
        """Why an object is not a part of this installation; None where it is one. A namespace may be anybody's."""
        labels = live["metadata"].get("labels") or {}
        if live["kind"] != "Namespace" and not PART_OF.items() <= labels.items():
            return "is no part of Tally"
        if live["kind"] == "PersistentVolume":  # which is in no namespace
            kept_for = (live["spec"].get("claimRef") or {}).get("namespace", self.overlay.namespace)
            if kept_for != self.overlay.namespace:
                return f"is kept for the namespace {kept_for}"
        return None

    def _put(self, manifest: Object, live: Object | None, *, dry_run: bool = False) -> Object:
        if live is not None:
            manifest = _with_decisions(manifest, live)
        return difference.put(self.cluster, manifest, dry_run=dry_run, force=self._force, ours=_SCALED)

    @property
    def _gone(self) -> Sequence[Object]:
        """What goes when the overlay is applied: the surplus, without what holds data, and what pods still use."""
        found = [each for each in self._surplus if each["kind"] not in KEPT]
        if not any(each["kind"] == "ConfigMap" for each in found):
            return found
        try:
            used = self._used_config_maps()
        except ForbiddenError:  # whoever applies need not be allowed to see pods
            return [each for each in found if each["kind"] != "ConfigMap"]
        return [each for each in found if each["kind"] != "ConfigMap" or each["metadata"]["name"] not in used]

    def _used_config_maps(self) -> set[str]:
        """Those that a pod has: one of before this was applied could not start again without them."""
        pods = {"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": self.overlay.namespace}}
        return {name for each in self.cluster.list_any(pods, {}) for name in _config_maps(each["spec"])}

    def _is_of_a_set(self, claim: Object) -> bool:
        """Whether a claim is one of a StatefulSet of the overlay: the cluster has made it, of a template."""
        return any(
            re.fullmatch(re.escape(f"{template['metadata']['name']}-{each['metadata']['name']}-") + r"\d+", name)
            for name in [claim["metadata"]["name"]]
            for each in self.overlay.manifests
            if each["kind"] == "StatefulSet"
            for template in each["spec"].get("volumeClaimTemplates", ())
        )

    @cached_property
    def _surplus(self) -> Sequence[Object]:
        """Objects of an overlay as it was before, which it does not have any more; claims of its StatefulSets, too."""
        wanted = {_key(each) for each in self.overlay.manifests}
        found = []
        for version, kind in _SWEPT:
            sought = {"apiVersion": version, "kind": kind, "metadata": {"namespace": self.overlay.namespace}}
            try:
                there = self.cluster.list_any(sought, PART_OF)
            except (UnknownKindError, ForbiddenError):
                continue
            for each in there:
                metadata = {key: each["metadata"][key] for key in ("name", "namespace") if key in each["metadata"]}
                one: Object = {**sought, "metadata": {"namespace": self.overlay.namespace, **metadata}}
                if _key(one) not in wanted and not each["metadata"].get("ownerReferences"):
                    found.append(one)
        return found


def _config_maps(value: Any) -> Iterator[str]:
    """The names of the ConfigMaps in a pod's specification."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            if key in ("configMap", "configMapRef", "configMapKeyRef") and isinstance(each, Mapping):
                yield str(each.get("name"))
            else:
                yield from _config_maps(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _config_maps(each)


def _with_decisions(manifest: Object, live: Object) -> Object:
    """A RayCluster with what its autoscaler has decided: its groups are one field, so they would be set anew, and
    workers that are busy would go. A RayJob that somebody has begun, begun: suspended anew, its pods would go."""
    found = copy.deepcopy(manifest)
    if manifest["kind"] == "RayJob" and manifest["spec"].get("suspend") and live["spec"].get("suspend") is False:
        found["spec"]["suspend"] = False
    if manifest["kind"] != "RayCluster":
        return found
    decided = {each["groupName"]: each for each in live["spec"].get("workerGroupSpecs", ())}
    for group in found["spec"].get("workerGroupSpecs", ()):
        for name in ("replicas", "scaleStrategy"):
            if name in decided.get(group["groupName"], {}):
                group.setdefault(name, decided[group["groupName"]][name])
    return found


def _partial(whole: Object, spec: Mapping[str, Any]) -> Object:
    metadata = {key: whole["metadata"][key] for key in ("name", "namespace") if key in whole["metadata"]}
    return {"apiVersion": whole["apiVersion"], "kind": whole["kind"], "metadata": metadata, "spec": dict(spec)}


def _command(context: str, namespace: str, name: str, entries: set[str]) -> str:
    files = " ".join(f"--from-file={each}" for each in sorted(entries)) or "--from-file=..."
    return f"kubectl --context {context} -n {namespace} create secret generic {name} {files}"


def _has_failed(live: Object) -> bool:
    """Whether it is a Job that has ended, and not well: it does nothing any more, whatever is mended."""
    conditions = (live.get("status") or {}).get("conditions") or ()
    failed = any(each.get("type") == "Failed" and each.get("status") == "True" for each in conditions)
    return live["kind"] == "Job" and failed


def _short(found: Mapping[str, Any]) -> str:
    return f"{found['kind'].lower()} {found['metadata']['name']}"


def _called(found: Mapping[str, Any]) -> str:
    return f"{found['kind']} {found['metadata']['name']}"


def _key(found: Mapping[str, Any]) -> tuple[str, str]:
    return str(found["kind"]), str(found["metadata"]["name"])
