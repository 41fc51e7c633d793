"""What has to be there before pods can start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tally.config import SECRETS
from tally.deploy.kubernetes.lint.objects import Found, Manifest, Pods, called, namespace_of


def secrets_of(manifests: Sequence[Manifest]) -> dict[tuple[str, str], set[str]]:
    """The Secrets that have to be there for the pods to start: (namespace, name) to the entries that are named. Those
    that the manifests themselves have made (a Certificate's, an ExternalSecret's) are not among them."""
    made = {(namespace_of(each) or "default", _made_by(each)) for each in manifests}
    return {secret: entries for secret, entries in _wanted(manifests).items() if secret not in made}


def secrets(found: Found) -> Iterator[str]:
    """A rule: a Secret that an ExternalSecret makes has what its pods need. Without it they may run all the same, and
    keep jobs where nobody looks for them."""
    wanted = _wanted(found.manifests)
    made: dict[tuple[str, str], set[str]] = {}  # several may make one Secret
    sources = list(found.of("ExternalSecret"))
    for each in sources:
        made.setdefault(_place(each), set()).update(one["secretKey"] for one in each["spec"].get("data") or ())
    whole = {_place(each) for each in sources if each["spec"].get("dataFrom") or "template" in _target(each)}
    for each in sources:
        absent = sorted(wanted.get(_place(each), set()) - made[_place(each)])
        if absent and _place(each) not in whole:
            yield f"{called(each)} has no {', '.join(absent)}, which pods need of the Secret {_made_by(each)}"


def _place(found: Manifest) -> tuple[str, str]:
    return namespace_of(found) or "default", str(_made_by(found))


def _wanted(manifests: Sequence[Manifest]) -> dict[tuple[str, str], set[str]]:
    wanted: dict[tuple[str, str], set[str]] = {}
    for pods in Found(manifests).pods:
        for name, entries in _secrets(pods):
            wanted.setdefault((pods.namespace or "default", name), set()).update(entries)
    for each in manifests:
        if each["kind"] == "TriggerAuthentication":
            for ref in each["spec"].get("secretTargetRef") or ():
                wanted.setdefault((namespace_of(each) or "default", ref["name"]), set()).add(ref["key"])
    return wanted


def _made_by(found: Manifest) -> str | None:
    match found["kind"]:
        case "Certificate":
            return str(found["spec"]["secretName"])
        case "ExternalSecret":
            return str(_target(found).get("name", found["metadata"]["name"]))
    return None


def _target(found: Manifest) -> Mapping[str, Any]:
    return found["spec"].get("target") or {}


def _secrets(pods: Pods) -> Iterator[tuple[str, set[str]]]:
    """Secrets that the pods cannot start without."""
    for each in pods.containers:
        for variable in each.get("env", ()):
            if (ref := variable.get("valueFrom", {}).get("secretKeyRef")) and not ref.get("optional"):
                yield ref["name"], {ref["key"]}
        for source in each.get("envFrom", ()):
            if (ref := source.get("secretRef")) and not ref.get("optional"):
                yield ref["name"], set()
        mounted = {
            mount["mountPath"]: volume["secret"]
            for mount in each.get("volumeMounts", ())
            for volume in pods.spec["volumes"]
            if volume["name"] == mount["name"] and "secret" in volume
        }
        for variable in each.get("env", ()):
            folder, _, file = str(variable.get("value")).rpartition("/")
            if folder in mounted:
                yield mounted[folder]["secretName"], {file}
            # Of a whole folder of secrets, what it has to have at least is where jobs are kept.
            whole = mounted.get(str(variable.get("value")), {})
            if variable["name"] == SECRETS and whole and "items" not in whole and not whole.get("optional"):
                yield whole["secretName"], {"TALLY_DATABASE"}
    for volume in pods.spec.get("volumes", ()):
        if (ref := volume.get("secret")) and not ref.get("optional"):
            yield ref["secretName"], {item["key"] for item in ref.get("items", ())}
        for source in (volume.get("projected") or {}).get("sources", ()):
            if (ref := source.get("secret")) and not ref.get("optional"):
                yield ref["name"], {item["key"] for item in ref.get("items", ())}
    for ref in pods.spec.get("imagePullSecrets", ()):
        yield ref["name"], set()
    if pods.owner["kind"] == "RayCluster" and (name := pods.owner["spec"].get("authOptions", {}).get("secretName")):
        yield name, {"auth_token"}


RULES = (secrets,)
"""Each yields a line for each place where something is wrong."""
