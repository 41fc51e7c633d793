"""Endpoints on this machine: kept in the database, and served by a process that outlives the command.

``tally up`` keeps such a process alive; without it, ``tally endpoints`` starts it again.
"""

from __future__ import annotations

import difflib
import math
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from tally import plain_yaml
from tally.config import settings
from tally.database.connect import connect
from tally.deploy.base import Change, Plan, Say, Status, Target, dump
from tally.deploy.quantities import amount
from tally.deploy.spec import UNSAID, DeploymentSpec
from tally.errors import DeployError, EndpointError, EndpointNotFoundError
from tally.jobs.spec import absolute, beside
from tally.models.resolve import resolve
from tally.serving.deployments import PORT, Deployment, DeploymentStore, EndpointSpec, Version, number_of
from tally.serving.launch import restart_if_down, settled
from tally.serving.settings import Limits

NOTES = {
    "dev-test": "one replica; if this machine ends, so does the endpoint",
    "production": "two replicas at least; if this machine ends, so does the endpoint",
}


@dataclass(frozen=True, kw_only=True)
class LocalSpec(DeploymentSpec):
    """port: where it listens, on the loopback address. share: of the requests (0 to 1), beside the versions that are
    served already; None: all of them."""

    least_port: ClassVar[int] = 0
    port: int = PORT
    share: float | None = None

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 <= self.port <= 65535:
            yield f"port: 0 to 65535, not {self.port}"
        if self.share is not None and not 0 < self.share <= 1:
            yield f"share: more than 0 and at most 1, not {self.share}"
        if self.variables or self.secrets:
            yield "variables, secrets: a local endpoint has the environment of whoever starts it"

    def _image_problems(self) -> Iterator[str]:
        if self.environment != UNSAID or self.image is not None:
            yield f"environment: a local endpoint runs in this Python, not in {self.image or self.environment}"

    @property
    def http_port(self) -> int:
        return self.port

    @property
    def limits(self) -> dict[str, Any]:
        """Those :class:`Limits` of its replicas that the command says. Whole cores become threads; memory is not
        limited."""
        return {
            "replicas": self.replicas or ((1, 1) if self.profile == "dev-test" else (2, 2)),
            "max_batch": self.max_batch,
            "max_delay": Limits().max_delay if self.max_delay is None else self.max_delay,
            "threads": max(1, math.floor(amount(self.cpu))),
            "pages": self.pages,
            "background": self.background,
            "max_pixels": self.max_pixels,
        }


class LocalTarget(Target[LocalSpec]):
    """A kept endpoint of this machine."""

    name = "local"
    spec_type = LocalSpec
    _started: subprocess.Popen[bytes] | None = None

    @cached_property
    def store(self) -> DeploymentStore:
        """The endpoints of this machine."""
        return DeploymentStore(connect(settings().database))

    @cached_property
    def version(self) -> Version:
        """The model, looked up once."""
        model, options = self.asked
        return Version(model, resolve(model, **options), options)

    @property
    def asked(self) -> tuple[str, dict[str, Any]]:
        """The model, and what resolving it is told besides: the same for a process in another folder."""
        given = (each.partition("=") for each in self.spec.settings)
        return beside(Path.cwd(), self.spec.model, "model"), {
            "task": self.spec.task,
            "labels": self.spec.labels and absolute(self.spec.labels),
            "artifacts": self.spec.artifacts and absolute(self.spec.artifacts),
            "settings": {key: plain_yaml.value(value) for key, _, value in given},
            "trust": self.spec.trust,
        }

    def there(self) -> Deployment | None:
        """The endpoint as it is, if there is one."""
        try:
            return self.store.get(self.spec.name)
        except EndpointNotFoundError:
            return None

    def _wanted(self, before: EndpointSpec | None) -> EndpointSpec:
        version = self.version
        if before is None:
            number = number_of(version.ref)
            return self._placed(EndpointSpec({number: version}, {number: 100.0}))
        return self._placed(before.with_model(version, share=self.spec.share))

    def _placed(self, wanted: EndpointSpec) -> EndpointSpec:
        """With what the command says; the rest stays as it was."""
        spec = self.spec
        limits = replace(wanted.limits, **spec.limits)
        return replace(wanted, limits=limits, port=spec.port, grpc_port=spec.grpc_port, drain=spec.drain)

    def plan(self) -> Plan:
        there = self.there()
        notes = [f"profile {self.spec.profile}: {NOTES[self.spec.profile]}", "memory is not limited on this machine"]
        return Plan([_shown(self._wanted(there.spec if there else None))], f"{self.spec.name}.yaml", notes)

    def difference(self) -> Sequence[Change]:
        there = self.there()
        wanted = dump([_shown(self._wanted(there.spec if there else None))])
        if there is None:
            return [Change("create", f"endpoint {self.spec.name}", [f"+{line}" for line in wanted.splitlines()])]
        before = dump([_shown(there.spec)])
        lines = list(difflib.unified_diff(before.splitlines(), wanted.splitlines(), "served", "wanted", lineterm=""))
        return [Change("change", f"endpoint {self.spec.name}", lines)] if lines else []

    def apply(self, say: Say) -> None:
        if self.there() is None:
            self.store.create(self.spec.name, self._wanted(None))
        else:
            self.store.change(self.spec.name, self._wanted)
        self._started = restart_if_down(self.store, self.spec.name)

    def wait(self, say: Say, timeout: float) -> None:
        try:
            revision = self.store.get(self.spec.name).revision
            settled(self.store, self.spec.name, revision, timeout, self._started)
        except EndpointError as error:
            raise DeployError(error.message, hint=error.hint) from None

    def status(self) -> Status:
        there = self.there()
        if there is None:
            return Status(self.spec.name, False)
        pools = there.observed.get("pools", ()) if there.alive else ()
        error = there.observed.get("error")
        versions = ", ".join(each.model for each in there.spec.versions.values())
        ready = sum(pool["ready"] for pool in pools)
        return Status(
            self.spec.name, True, ready, there.spec.limits.replicas[0], "", versions, problems=[error] if error else []
        )

    def address(self) -> str:
        there = self.there()
        return (there.url if there else None) or f"http://127.0.0.1:{self.spec.port}"

    def uris(self) -> Mapping[str, str]:
        base, there = self.address(), self.there()
        found = {"scoring_uri": f"{base}/score", "swagger_uri": f"{base}/swagger.json"}
        if self.spec.grpc_port is not None:
            found["grpc"] = (there.grpc if there else None) or f"127.0.0.1:{self.spec.grpc_port}"
        return found


def _shown(spec: EndpointSpec) -> dict[str, Any]:
    """A spec as people read it: models by name and hash."""
    return {
        "versions": {
            number: {"model": each.model, "hash": each.ref.hash, "share": spec.split.get(number, 0.0)}
            for number, each in spec.versions.items()
        },
        "shadows": dict(spec.shadows),
        "replicas": list(spec.limits.replicas),
        "max_batch": spec.limits.max_batch,
        "max_delay": spec.limits.max_delay,
        "threads": spec.limits.threads,
        "pages": spec.limits.pages,
        "background": spec.limits.background and list(spec.limits.background),
        "max_pixels": spec.limits.max_pixels,
        "port": spec.port,
        "grpc_port": spec.grpc_port,
        "drain": spec.drain,
    }
