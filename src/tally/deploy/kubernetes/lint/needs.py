"""What has to be there before pods can start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tally.config import SECRETS
from tally.deploy.kubernetes.lint.objects import Found, Manifest, Pods, namespace_of


def secrets_of(manifests: Sequence[Manifest]) -> dict[tuple[str, str], set[str]]:
    """The Secrets that have to be there for the pods to start: (namespace, name) to the entries that are named. Those
    that the manifests themselves have made (a Certificate's, an ExternalSecret's) are not among them."""
    made = {(namespace_of(each), _made_by(each)) for each in manifests}
    wanted: dict[tuple[str, str], set[str]] = {}
    for pods in Found(manifests).pods:
        for name, entries in _secrets(pods):
            if (pods.namespace, name) not in made:
                wanted.setdefault((pods.namespace or "default", name), set()).update(entries)
    return wanted


def _made_by(found: Manifest) -> str | None:
    match found["kind"]:
        case "Certificate":
            return str(found["spec"]["secretName"])
        case "ExternalSecret":
            return str(found["spec"].get("target", {}).get("name", found["metadata"]["name"]))
    return None


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
