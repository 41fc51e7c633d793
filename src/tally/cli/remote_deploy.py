"""``tally deploy`` on a server: an endpoint of its machine, made and changed by its API."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tally.cli.remote import RemoteEndpoints
from tally.client import Client
from tally.deploy.base import Change, Plan, Say
from tally.deploy.local import LocalSpec, LocalTarget
from tally.models.reference import ModelRef
from tally.serving.deployments import Version

_NOT_YET = "looked up by the server"


class ServerTarget(LocalTarget):
    """A kept endpoint of a server. Its model is what the server finds: places are those of the server's machine."""

    def __init__(self, spec: LocalSpec, client: Client) -> None:
        super().__init__(spec)
        self._client = client

    @cached_property
    def store(self) -> RemoteEndpoints:
        """The endpoints of the server."""
        return RemoteEndpoints(self._client)

    @cached_property
    def version(self) -> Version:
        """As the endpoint has it already, or as far as it is known here."""
        model, options = self.asked
        there = self.there()
        for each in there.spec.versions.values() if there else ():
            if each.model == model and dict(each.options) == options:
                return each
        return Version(model, ModelRef("", model, Path(), "", _NOT_YET), options)

    def plan(self) -> Plan:
        plan = super().plan()
        return Plan(plan.documents, plan.file, [*plan.notes, "places and ports are those of the server's machine"])

    def difference(self) -> Sequence[Change]:
        if found := super().difference():
            return found
        return [Change("change", f"endpoint {self.spec.name}, if its model is another by now")]

    def apply(self, say: Say) -> None:
        spec, there = self.spec, self.there()
        model, options = self.asked
        said: dict[str, Any] = {
            **options, **spec.limits, "port": spec.port, "grpc_port": spec.grpc_port, "drain": spec.drain,
        }  # fmt: skip
        if there is None:
            self._client.add_endpoint(spec.name, model, **said)
            return
        after = self._client.serve_version(spec.name, model, share=spec.share, **said)
        say("nothing has changed" if after.revision == there.revision else f"it is revision {after.revision} now")
