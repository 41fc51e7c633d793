"""Rules about what pods have: quantities, probes, security, images, volumes; and no secret in the clear."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tally.config import SECRETS
from tally.deploy.kubernetes.lint.objects import SERVES, Found, Pods, amount_of, amounts, called
from tally.deploy.spec import IMAGE, SENSITIVE
from tally.masking import has_secret

_NAMED = re.compile(
    r"(?i)(passw(or)?d|passphrase|token|secret|credentials?|(access|account|api|admin|private)[-_]?key)$"
)
"""Names of fields and options whose value is a secret itself, and not where one is."""
_LINE = re.compile(r"(?im)^[ \t]*[\w.-]*(passw(or)?d|passphrase|token|secret|[-_]key)[ \t]*:[ \t]*[^\s{\[|>&*$#/]")
"""A line of a file in YAML, or of one like it, with a secret."""


def quantities(found: Found) -> Iterator[str]:
    for pods in found.pods:
        for each in pods.containers:
            what, given = f"{pods.what}, {each['name']}", each.get("resources", {})
            requests, limits = (amounts(given.get(part, {})) for part in ("requests", "limits"))
            for part, values in (("requests", requests), ("limits", limits)):
                for name, value in values.items():
                    if value is None or value <= 0:
                        yield f"{what}: {part} of {name}: {given[part][name]!r} is no quantity"
            yield from (f"{what} requests no {name}" for name in ("cpu", "memory") if name not in requests)
            if "memory" not in limits:
                yield f"{what} has no limit of memory: it would take that of others"
            for name, most in limits.items():
                least = requests.get(name)
                if most is not None and least is not None and (least > most or (name != "cpu" and least != most)):
                    of = f"{given['requests'][name]} of {name}"
                    yield f"{what}: it requests {of}, and may have {given['limits'][name]}"
            if any("/" in name and name not in limits for name in requests):
                yield f"{what}: what is given whole (a GPU) needs a limit, too"
    for each in found.of("PersistentVolumeClaim", "StatefulSet"):
        claims = [each] if each["kind"] == "PersistentVolumeClaim" else each["spec"].get("volumeClaimTemplates", ())
        for claim in claims:
            size = claim["spec"].get("resources", {}).get("requests", {}).get("storage", "")
            if amount_of(size) is None:
                yield f"{called(each)}: storage {size!r} is no quantity"


def probes(found: Found) -> Iterator[str]:
    for pods in found.pods:
        for each in pods.spec["containers"]:
            what = f"{pods.what}, {each['name']}"
            if pods.kind in SERVES and each.get("ports"):
                yield from (f"{what} has no {name}" for name in ("livenessProbe", "readinessProbe") if name not in each)
            for name in ("startupProbe", "livenessProbe", "readinessProbe"):
                probe = each.get(name, {})
                asked = probe.get("httpGet") or probe.get("tcpSocket")
                ports = {value for port in each.get("ports", ()) for value in (port.get("name"), port["containerPort"])}
                if asked and asked["port"] not in ports:
                    yield f"{what}: the {name} asks port {asked['port']!r}, which it does not have"
                if not str(probe.get("httpGet", {}).get("path", "/")).startswith("/"):
                    yield f"{what}: the {name} asks for {probe['httpGet']['path']!r}, which is no path"
            pause = each.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            if pause >= pods.spec.get("terminationGracePeriodSeconds", 30):
                yield f"{what}: preStop takes {pause} s, and no time is left to end: terminationGracePeriodSeconds"


def security(found: Found) -> Iterator[str]:
    bound = {subject["name"] for each in found.of("RoleBinding") for subject in each.get("subjects", ())}
    for pods in found.pods:
        spec, security = pods.spec, pods.spec.get("securityContext", {})
        if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
            yield f"{pods.what} may run as root: runAsNonRoot, and a runAsUser that is none"
        if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pods.what} has no seccompProfile RuntimeDefault"
        yield from (f"{pods.what} has {each}" for each in ("hostNetwork", "hostPID", "hostIPC") if spec.get(each))
        if spec.get("enableServiceLinks") is not False:
            yield f"{pods.what} is told all Services as variables: enableServiceLinks: false"
        acts = spec.get("automountServiceAccountToken", True) and not _is_ray_head(pods)
        if acts and spec.get("serviceAccountName") not in bound:
            yield f"{pods.what} is given a token of the cluster's that it has no use for: automountServiceAccountToken"
        if (account := spec.get("serviceAccountName")) and found.get("ServiceAccount", account, pods.owner) is None:
            yield f"{pods.what} acts as the ServiceAccount {account}, which is not there"
        if any("hostPath" in each for each in spec.get("volumes", ())):
            yield f"{pods.what} mounts a folder of its node: hostPath"
        yield from (line for each in pods.containers for line in _hardened(f"{pods.what}, {each['name']}", each))
    for each in found.of("RayCluster"):
        if each["spec"].get("enableInTreeAutoscaling"):
            options = each["spec"].get("autoscalerOptions", {})
            yield from _hardened(f"{called(each)}, autoscaler", options)


def _hardened(what: str, container: Mapping[str, Any]) -> Iterator[str]:
    own = container.get("securityContext", {})
    if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
        yield f"{what} may become more than it is: allowPrivilegeEscalation: false"
    if own.get("readOnlyRootFilesystem") is not True:
        yield f"{what} may write into its image: readOnlyRootFilesystem: true"
    if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add"):
        yield f"{what} keeps capabilities: drop ALL"
    if own.get("runAsUser") == 0:
        yield f"{what} runs as root"


def _is_ray_head(pods: Pods) -> bool:
    """Whose autoscaler scales by KubeRay's own account."""
    return pods.kind in ("RayCluster", "RayJob") and pods.group is None


def images(found: Found) -> Iterator[str]:
    for pods in found.pods:
        for each in pods.containers:
            image = each.get("image", "")
            tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
            if not IMAGE.fullmatch(image):
                yield f"{pods.what}, {each['name']}: {image!r} is no name of an image"
            elif "@" not in image and tag in ("", "latest"):
                yield f"{pods.what}, {each['name']}: the image {image} is another one each day: give its version"


def volumes(found: Found) -> Iterator[str]:
    for pods in found.pods:
        volumes = {each["name"]: each for each in pods.spec.get("volumes", ())}
        claimed = {each["metadata"]["name"] for each in pods.owner["spec"].get("volumeClaimTemplates", ())}
        mounted = {mount["name"] for each in pods.containers for mount in each.get("volumeMounts", ())}
        mounted |= {each["name"] for each in pods.owner["spec"].get("autoscalerOptions", {}).get("volumeMounts", ())}
        yield from (f"{pods.what} mounts {each}, which is no volume" for each in mounted - set(volumes) - claimed)
        yield from (f"{pods.what} has the volume {each}, which nothing mounts" for each in set(volumes) - mounted)
        for each in volumes.values():
            claim = each.get("persistentVolumeClaim", {}).get("claimName")
            if claim is not None and found.get("PersistentVolumeClaim", claim, pods.owner) is None:
                yield f"{pods.what} uses the claim {claim}, which is not there"
            name = each.get("configMap", {}).get("name")
            if name is not None and found.get("ConfigMap", name, pods.owner) is None:
                yield f"{pods.what} uses the ConfigMap {name}, which is not there"
        for each in pods.containers:
            yield from _secret_files(f"{pods.what}, {each['name']}", each)
            yield from _writable(f"{pods.what}, {each['name']}", each, volumes)
            for source in each.get("envFrom", ()):
                ref = source.get("configMapRef")
                if ref and not ref.get("optional") and found.get("ConfigMap", ref["name"], pods.owner) is None:
                    yield f"{pods.what} uses the ConfigMap {ref['name']}, which is not there"
            variables = [variable["name"] for variable in each.get("env", ())]
            yield from (
                f"{pods.what}, {each['name']}: the variable {name} is given twice"
                for name in dict.fromkeys(variables)
                if variables.count(name) > 1
            )


def _secret_files(what: str, container: Mapping[str, Any]) -> Iterator[str]:
    """Whether the folders and files that a program reads secrets from are mounted: some are not missed before it is
    too late."""
    mounts = [each["mountPath"].rstrip("/") for each in container.get("volumeMounts", ())]
    for each in container.get("env", ()):
        name, value = each["name"], each.get("value") or ""
        named = value.startswith("/") and (name == SECRETS or SENSITIVE.search(name))
        if named and not any(value == path or value.startswith(f"{path}/") for path in mounts):
            yield f"{what} reads secrets from {value} ({name}), and no volume is mounted there"


def shares(found: Found) -> Iterator[str]:
    """Whether a claim that several pods use can be used by several."""
    for claim in found.of("PersistentVolumeClaim"):
        name = claim["metadata"]["name"]
        users = [
            pods
            for pods in found.pods
            if found.get("PersistentVolumeClaim", name, pods.owner) is claim
            and any(
                (each.get("persistentVolumeClaim") or {}).get("claimName") == name
                for each in pods.spec.get("volumes", ())
            )
        ]
        several = len(users) > 1 or any(
            (pods.group or {}).get("maxReplicas", 1) > 1 or pods.owner["spec"].get("replicas", 1) > 1 for pods in users
        )
        if several and not any(mode.endswith("Many") for mode in claim["spec"]["accessModes"]):
            modes = ", ".join(claim["spec"]["accessModes"])
            yield f"{called(claim)} is for one node at a time ({modes}), and several pods use it: ReadWriteMany"


def _writable(what: str, container: Mapping[str, Any], volumes: Mapping[str, Any]) -> Iterator[str]:
    """Whether the folders that a program writes to can be, as the image itself cannot."""
    mounts = {each["mountPath"].rstrip("/"): each for each in container.get("volumeMounts", ())}
    if len(mounts) != len(container.get("volumeMounts", ())):
        yield f"{what} mounts two volumes at one path"
    open_ = [path for path, each in mounts.items() if not each.get("readOnly")]
    open_ = [path for path in open_ if "secret" not in volumes.get(mounts[path]["name"], {})]
    wanted = {"HOME", "TALLY_HOME", "TALLY_CACHE", "PGDATA"}
    folders = {each["value"] for each in container.get("env", ()) if each["name"] in wanted and "value" in each}
    folders |= {"/tmp", *filter(None, [container.get("workingDir")])}  # noqa: S108 - of the container
    for folder in sorted(folders):
        if not any(folder == path or folder.startswith(f"{path}/") for path in open_):
            yield f"{what} writes to {folder}, and cannot: no volume is mounted there"


def secret_values(found: Found) -> Iterator[str]:
    for each in found.of("Secret"):
        if each.get("data") or each.get("stringData"):
            yield f"{called(each)} has its values in the manifest: make it by other means, and only name it"
    for each in found.of("ConfigMap"):
        for key, value in [*(each.get("data") or {}).items(), *_decoded(each.get("binaryData") or {})]:
            if SENSITIVE.search(key):
                yield f"{called(each)}: {key} looks like a secret, and everybody reads a ConfigMap"
            elif _tells(value):
                yield f"{called(each)}: there is a secret in {key}"
    for pods in found.pods:
        for one in pods.containers:
            for variable in one.get("env", ()):
                name, value = variable["name"], variable.get("value", "")
                # A folder or a file is where the secret is, not what it is.
                if value and (SENSITIVE.search(name) or has_secret(f"{name}={value}")) and not value.startswith("/"):
                    yield f"{pods.what}, {one['name']}: the secret {name} is in the manifest: valueFrom, or a file"
            words = [*one.get("command", ()), *one.get("args", ())]
            if any(_tells(text) for text in [*words, *_values(one)]) or any(map(_gives, words, [*words[1:], ""])):
                yield f"{pods.what}, {one['name']}: there is a secret in what it is told"
    for each in found.manifests:
        for where, text in _texts({key: each[key] for key in ("metadata", "spec") if key in each}, ()):
            if where[-1:] != ("value",) and not set(where) & {"command", "args"} and _tells(text):
                yield f"{called(each)}: there is a secret in {'.'.join(where)}"
            elif _is_named_secret(where) and text and not text.startswith(("/", "$(")):
                yield f"{called(each)}: {'.'.join(where)} looks like a secret: name one, and do not write it here"


def _tells(text: str) -> bool:
    return has_secret(text) or ("\n" in text and _LINE.search(text) is not None)


def _gives(option: str, value: str) -> bool:
    """Whether two words of a command are an option for a secret, and the secret."""
    name, is_, inline = option.partition("=")
    given = inline if is_ else value
    return bool(name.startswith("--") and _NAMED.search(name) and given and not given.startswith(("-", "/", "$(")))


def _is_named_secret(where: tuple[str, ...]) -> bool:
    """Whether a field's own name says that its value is a secret."""
    if set(where) & {"containers", "initContainers"}:  # looked at by their variables and words
        return False
    *_, name = (each for each in where if each != "value")
    return _NAMED.search(name) is not None


def _decoded(found: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for key, value in found.items():
        with suppress(ValueError):
            yield key, base64.b64decode(value).decode()


def _values(container: Mapping[str, Any]) -> Iterator[str]:
    """Texts of a container that may be anything: of its variables, and of what its probes and hooks send and run."""
    yield from (each["value"] for each in container.get("env", ()) if isinstance(each.get("value"), str))
    for name in ("lifecycle", "startupProbe", "livenessProbe", "readinessProbe"):
        yield from (text for _, text in _texts(container.get(name) or {}, ()))
        for where, header in _headers(container.get(name) or {}):
            yield f"{where}: {header}"


def _headers(found: Any) -> Iterator[tuple[str, str]]:
    if isinstance(found, Mapping):
        for key, value in found.items():
            if key == "httpHeaders":
                yield from ((each["name"], each["value"]) for each in value)
            else:
                yield from _headers(value)


def _texts(found: Any, where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(found, str):
        yield where, found
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from _texts(value, (*where, str(key)))
    elif isinstance(found, Sequence):
        for number, value in enumerate(found):
            yield from _texts(value, (*where, str(number)))


RULES = (quantities, probes, security, images, volumes, shares, secret_values)
"""Each yields a line for each place where something is wrong."""
