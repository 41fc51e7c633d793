"""Endpoints in Azure Container Instances: a container group, as ``az container create --file`` takes it."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tally.deploy import container
from tally.deploy.azure import az
from tally.deploy.base import Change, Plan, Say, Status, Target, dump
from tally.deploy.quantities import amount
from tally.deploy.spec import DeploymentSpec
from tally.errors import DeployError, SpecError
from tally.masking import mask
from tally.serving.settings import KEYS
from tally.storage import temporary

API_VERSION = "2021-10-01"
PORT = 80
"""Where it listens: a container group shows the ports of its containers as they are."""
GIGABYTE = 10**9
_LOCATION = re.compile(r"[a-z][a-z0-9]+")
_GROUP = re.compile(r"[\w().-]{0,89}[\w()-]")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PROMISES = (
    "profile dev-test: one replica and no autoscaler. Not promised: that it answers while it is restarted or moved; "
    "that it keeps up with more load. It speaks HTTP without TLS: keys and items can be read on the way"
)
PAUSE = 5.0
"""Seconds between two looks at a container group."""
_STARTING = ("Pending", "Creating", "Waiting", "")


@dataclass(frozen=True, kw_only=True)
class AciSpec(DeploymentSpec):
    """resource_group: where ``az`` is to put it. location: of Azure, such as ``westeurope``.

    secrets: variables of this process's environment whose values the container gets, unreadable for others.
    """

    location: str = ""
    resource_group: str | None = None

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if len(self.name) < 5:
            yield f"name: {self.name!r} is part of a host's name in Azure, which has at least 5 characters"
        if self.profile != "dev-test":
            yield "profile: a container group is one replica, without an autoscaler; production is for kubernetes"
        if self.replicas not in (None, (1, 1)):
            yield "replicas: a container group is one replica"
        if self.gpu:
            yield "gpu: container groups have none; the target kubernetes has"
        if not _LOCATION.fullmatch(self.location):
            yield f"location: {self.location!r} is none of Azure's, such as westeurope"
        if self.resource_group is not None and not _GROUP.fullmatch(self.resource_group):
            yield f"resource_group: {self.resource_group!r} cannot be the name of a resource group"
        for each in self.secrets:
            if not _VARIABLE.fullmatch(each) or each == KEYS:
                yield f"secrets: {each!r} is not the name of a variable of the environment (or is there already)"


class AciTarget(Target[AciSpec]):
    """A container group. ``az``, of the Azure CLI, does the work."""

    name = "aci"
    spec_type = AciSpec

    def plan(self) -> Plan:
        placeholders = {name: f"${{{name}}}" for name in (KEYS, *self.spec.secrets)}
        file = f"{self.spec.name}.aci.yaml"
        group = self.spec.resource_group or "RESOURCE_GROUP"
        by_hand = f"envsubst < {file} > filled.yaml && az container create --resource-group {group} --file filled.yaml"
        notes = [
            f"the model is {self.shipped.text}",
            _PROMISES,
            f"the file has placeholders for {', '.join(placeholders)}; by hand: {by_hand}",
        ]
        if not self.shipped.fixed:
            notes.append("it takes what is there when it starts; a registered model (models:/) stays the same")
        if not self.spec.environment.is_built and self.shipped.requirement is not None:
            notes.append(f"the image {self.spec.container_image} has to have {self.shipped.requirement} installed")
        if not self.spec.environment.is_built and self.spec.grpc_port is not None:
            notes.append(f"the image {self.spec.container_image} has to have tally-scoring[server,grpc] installed")
        return Plan([self._group(placeholders)], file, notes)

    def difference(self) -> Sequence[Change]:
        self._secrets()
        what = f"container group {self.spec.name}"
        there = self._show()
        if there is None:
            return [Change("create", what)]
        now, then = _facts(there), _facts(self._group({}))
        lines = [
            line
            for key in then
            if now.get(key) != then[key]
            for line in (f"-{key}: {now.get(key)}", f"+{key}: {then[key]}")
        ]
        return [Change("change", what, [mask(each) for each in lines])] if lines else []

    def apply(self, say: Say) -> None:
        with temporary.folder("aci") as folder:  # for this user only: the file holds the secrets
            file = folder / "group.yaml"
            file.touch(mode=0o600)
            file.write_text(dump([self._group(self._secrets())]), "utf-8")
            az("container", "create", *self._in_group, "--file", str(file))
        say(f"applied container group {self.spec.name}")

    def wait(self, say: Say, timeout: float) -> None:
        until, told = time.monotonic() + timeout, ""
        while True:
            there = self._show()
            if there is None:
                raise DeployError(f"the container group {self.spec.name} was removed while it was waited for")
            state, detail = _state(there)
            if (text := f"{state or 'starting'}{detail}") != told:
                say(told := text)
            if state == "Running" and not detail:
                return
            ended = state not in ("Running", *_STARTING) or "CrashLoopBackOff" in detail
            if ended or time.monotonic() >= until:
                raise DeployError(f"{self.spec.name} does not come up: {text}{self._log()}")
            time.sleep(PAUSE)

    def status(self) -> Status:
        there = self._show()
        if there is None:
            return Status(self.spec.name, exists=False)
        state, detail = _state(there)
        running = state == "Running" and not detail
        tags = there.get("tags") or {}
        problems = () if running else (f"{state or 'starting'}{detail}",)
        model = tags.get("tally-model", "")
        return Status(self.spec.name, True, int(running), 1, _facts(there)["image"], model, problems=problems)

    def address(self) -> str:
        return f"http://{self.spec.name}.{self.spec.location}.azurecontainer.io"

    def uris(self) -> Mapping[str, str]:
        """At the root: the host is the endpoint's own."""
        found = {"scoring_uri": f"{self.address()}/score", "swagger_uri": f"{self.address()}/swagger.json"}
        if self.spec.grpc_port is not None:
            found["grpc"] = f"{self.address().removeprefix('http://')}:{self.spec.grpc_port}"
        return found

    # -- within ---------------------------------------------------------------------------------------------

    def _group(self, secrets: Mapping[str, str]) -> dict[str, Any]:
        spec = self.spec
        variables = {"TALLY_HOME": "/tmp/tally", "TALLY_CACHE": "/tmp/tally/cache", **spec.variables}  # noqa: S108
        size = {"cpu": float(amount(spec.cpu)), "memoryInGB": math.ceil(amount(spec.memory) * 10 / GIGABYTE) / 10}
        ports = [{"protocol": "TCP", "port": each} for each in (PORT, spec.grpc_port) if each is not None]
        return {
            "apiVersion": API_VERSION,
            "name": spec.name,
            "location": spec.location,
            "type": "Microsoft.ContainerInstance/containerGroups",
            "tags": {"tally-endpoint": spec.name, "tally-model": spec.model[:256]},
            "properties": {
                "osType": "Linux",
                "restartPolicy": "Always",
                "containers": [
                    {
                        "name": "endpoint",
                        "properties": {
                            "image": spec.container_image,
                            "command": container.command(spec, self.shipped, port=PORT, grpc_port=spec.grpc_port),
                            "ports": ports,
                            "environmentVariables": [
                                *({"name": name, "value": value} for name, value in variables.items()),
                                *({"name": name, "secureValue": value} for name, value in secrets.items()),
                            ],
                            "resources": {"requests": size, "limits": size},
                            "livenessProbe": _probe("/healthz", initialDelaySeconds=30, failureThreshold=6),
                            "readinessProbe": _probe("/readyz", initialDelaySeconds=1, failureThreshold=3),
                        },
                    }
                ],
                "ipAddress": {"type": "Public", "dnsNameLabel": spec.name, "ports": ports},
            },
        }

    def _secrets(self) -> dict[str, str]:
        """The values of the secrets, from this process's environment. Raises SpecError for those that are not there."""
        missing = [name for name in (KEYS, *self.spec.secrets) if not os.environ.get(name)]
        if missing:
            raise SpecError(
                [f"{name} is not set in the environment, and the container needs it" for name in missing],
                hint=f"{KEYS} has the keys of the endpoint's clients, with commas between them." * (KEYS in missing)
                or None,
            )
        return {name: os.environ[name] for name in (KEYS, *self.spec.secrets)}

    @property
    def _in_group(self) -> tuple[str, ...]:
        if self.spec.resource_group is None:
            raise SpecError("the target aci needs --resource-group", hint="--dry-run prints the file without it.")
        return "--resource-group", self.spec.resource_group

    def _show(self) -> dict[str, Any] | None:
        """The container group as it is, if there is one."""
        try:
            told = az("container", "show", *self._in_group, "--name", self.spec.name)
        except DeployError as error:
            if "ResourceNotFound" in error.message:
                return None
            raise
        try:
            found = json.loads(told)
        except ValueError:
            raise DeployError(f"az container show answered no JSON: {told[:200]!r}") from None
        return found if isinstance(found, dict) else None

    def _log(self) -> str:
        try:
            told = az("container", "logs", *self._in_group, "--name", self.spec.name)
        except DeployError:
            return ""
        lines = told.splitlines()[-10:]
        return mask("\n    ".join([". Its last lines:", *lines])) if lines else ""


def _probe(path: str, **timing: int) -> dict[str, Any]:
    probe = {"httpGet": {"path": path, "port": PORT, "scheme": "http"}, "periodSeconds": 10, "timeoutSeconds": 5}
    return {**probe, **timing}


def _facts(group: Mapping[str, Any]) -> dict[str, str]:
    """What of a container group a deployment decides, from a file of ours, or from what ``az`` shows, which has no
    ``properties`` between."""
    inner = group.get("properties", group)
    (found,) = inner["containers"][:1] or [{}]
    each = found.get("properties", found)
    requests = (each.get("resources") or {}).get("requests") or {}
    memory = requests.get("memoryInGB", requests.get("memoryInGb"))
    variables = {
        variable["name"]: variable.get("value")
        for variable in each.get("environmentVariables") or ()
        if variable.get("value") is not None
    }
    return {
        "location": str(group.get("location")),
        "image": str(each.get("image")),
        "command": json.dumps(each.get("command")),
        "cpu": f"{float(requests.get('cpu') or 0):g}",
        "memoryInGB": f"{float(memory or 0):g}",
        "variables": json.dumps(variables, sort_keys=True),
    }


def _state(group: Mapping[str, Any]) -> tuple[str, str]:
    """The state of the container, and what is said of it where it waits or has ended."""
    inner = group.get("properties", group)
    (found,) = inner["containers"][:1] or [{}]
    each = found.get("properties", found)
    current = (each.get("instanceView") or {}).get("currentState") or {}
    state, detail = str(current.get("state") or ""), str(current.get("detailStatus") or "")
    if (code := current.get("exitCode")) is not None and state == "Terminated":
        detail = f"{detail}, exit code {code}".lstrip(", ")
    return state, f" ({detail})" if detail else ""
