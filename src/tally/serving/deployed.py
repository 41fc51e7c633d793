"""The process that serves a kept endpoint: it follows what the endpoint's row says, until the row or its lease is gone.

Started as ``python -m tally.serving.deployed NAME``, by a command or by whoever supervises.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from dataclasses import replace
from typing import Any

from tally import garbage
from tally.config import settings
from tally.database.connect import connect
from tally.errors import EndpointNotFoundError, OwnershipLostError, TallyError, error_line
from tally.serving.deployments import LEASE_SECONDS, Deployment, DeploymentStore, EndpointSpec
from tally.serving.endpoint import Endpoint, label_of
from tally.serving.keys import keys_now
from tally.serving.pool import facts
from tally.serving.protocols.base import RequestError, Route
from tally.serving.server import ModelServer, run
from tally.serving.settings import ModelSettings, ServeSettings

log = logging.getLogger("tally")

FOLLOW_SECONDS = 0.5
"""Seconds between two looks at the row."""


class DeployedServer(ModelServer):
    """Serves one endpoint as its row says."""

    def __init__(self, deployment: Deployment, token: str, store: DeploymentStore) -> None:
        spec = deployment.spec
        listening = ServeSettings(
            (), host=spec.host, port=spec.port, grpc_port=spec.grpc_port, keys=keys_now(), max_body=spec.max_body,
            drain=spec.drain,
        )  # fmt: skip
        super().__init__(listening, log.info)
        self._deployment, self._token, self._store = deployment, token, store
        self._moves = False
        self._name = deployment.name
        self._followed = 0
        self._error: str | None = None
        model = ModelSettings(self._name, next(iter(spec.versions.values())).model, limits=spec.limits)
        self.endpoints[self._name] = Endpoint(model, self.metrics, self._changed)

    @property
    def moves(self) -> bool:
        """Whether it ends only as it is to listen somewhere else."""
        return self._moves and not self._signals

    async def load(self) -> None:
        """Serve what the row says, and follow it. Raises TallyError where that cannot be done."""
        self.spawn(self._follow())
        await self._reconcile(self._deployment)
        self._followed = self._deployment.revision

    async def reload(self) -> None:
        """Nothing: what the row says is what is served."""

    async def manage(self, route: Route) -> None:
        """Nothing is loaded or unloaded for a client: what the row says is what is served. Raises RequestError where
        that is asked to end, or is not loaded."""
        endpoint = self.endpoint(route)
        if route.operation == "unload":
            raise RequestError(400, f"{endpoint.name} is kept online: 'tally endpoints delete {endpoint.name}' ends it")
        if not endpoint.ready:
            raise RequestError(503, f"{endpoint.name} is not loaded", **{"Retry-After": "1"})

    async def _follow(self) -> None:
        """Say what is served, and serve what is wanted, until the row or the lease is gone."""
        heard = time.monotonic()
        while True:
            try:
                found = await asyncio.to_thread(self._store.observe, self._name, self._token, self._observed())
                heard = time.monotonic()
            except OwnershipLostError as error:
                log.error("%s", error.message)
                self._end()
                return
            except TallyError as error:  # the database is away, say
                if time.monotonic() - heard > LEASE_SECONDS:  # it goes on serving, and says so once it is back
                    log.warning("%s", error.message)
                    heard = time.monotonic()
                await asyncio.sleep(FOLLOW_SECONDS)
                continue
            if found is None:
                log.info("endpoint %s has been deleted", self._name)
                self._end()
                return
            if self._followed and found.revision != self._followed and not self._moves:
                if found.spec.listening == self._deployment.spec.listening:
                    await self._change(found)
                    continue
                log.info("revision %d of %s listens elsewhere: it starts again", found.revision, self._name)
                self._moves = True
                self.stop()  # and it goes on saying so, which keeps the lease, while it answers what it was sent
            await asyncio.sleep(FOLLOW_SECONDS)

    def _end(self) -> None:
        self._moves = False
        self.stop()

    async def _change(self, found: Deployment) -> None:
        try:
            await self._reconcile(found)
        except Exception as error:  # whatever it is, the endpoint goes on, and follows what is asked of it next
            foreseen = isinstance(error, TallyError)
            why = error.message if isinstance(error, TallyError) else error_line(error)
            log.error("revision %d of %s cannot be served: %s", found.revision, self._name, why, exc_info=not foreseen)
            self._error = why
        else:
            log.info("revision %d of %s is served", found.revision, self._name)
            self._error = None
        self._followed = found.revision

    async def _reconcile(self, found: Deployment) -> None:
        """Load what is wanted and not there; then share out the requests; then end what is not wanted."""
        spec, endpoint = found.spec, self.endpoints[self._name]
        self.settings = replace(self.settings, drain=spec.drain)
        for number, version in spec.versions.items():
            pool = endpoint.versions.get(number)
            limits = spec.limits
            if number not in spec.split and number not in spec.shadows:
                continue
            if (
                pool is None
                or pool.ref.hash != version.ref.hash
                or pool.ref.options != version.ref.options
                or replace(pool.limits, replicas=limits.replicas) != limits
            ):
                await endpoint.load(version.ref, limits, version=number, alone=False)
        endpoint.set_split(spec.split, spec.shadows)
        endpoint.labels = labels_of(spec)
        for number in [each for each in endpoint.versions if not _takes_part(spec, each)]:
            await endpoint.remove(number)
        for pool in endpoint.versions.values():
            pool.resize(*spec.limits.replicas)

    def _observed(self) -> dict[str, Any]:
        endpoint = self.endpoints[self._name]
        state = "starting" if not self._followed else "failed" if self._error else "ready"
        return {
            "revision": self._followed,
            "state": state,
            "error": self._error,
            "url": self.url,
            "grpc": self.grpc_address,
            "pid": os.getpid(),
            "ready": endpoint.ready,
            "complete": all(pool.ready >= pool.least for pool in endpoint.versions.values()),
            "split": endpoint.split,
            "pools": [{**facts(pool), "figures": pool.metrics.recent.figures()} for pool in endpoint.versions.values()],
            "at": time.time(),
        }


def labels_of(spec: EndpointSpec) -> dict[str, str]:
    """Label to version: the alias by which a model was named. Where several were, in turn, by the same, the last."""
    named = ((label_of(each.model), number) for number, each in spec.versions.items() if _takes_part(spec, number))
    return {label: number for label, number in named if label is not None}


def _takes_part(spec: EndpointSpec, number: str) -> bool:
    return number in spec.versions and (spec.split.get(number, 0) > 0 or spec.shadows.get(number, 0) > 0)


def _serve(deployment: Deployment, token: str, store: DeploymentStore) -> DeployedServer:
    """Serve it until its end. Raises TallyError."""
    made: list[DeployedServer] = []

    def make() -> DeployedServer:
        made.append(DeployedServer(deployment, token, store))
        return made[0]

    run(make)
    return made[0]


def main(name: str) -> int:
    """Serve the endpoint, unless another process does. Returns the exit code."""
    from tally import logs

    logs.log_to_stderr()
    store = DeploymentStore(connect(settings().database))
    try:
        token = store.claim(name)
    except EndpointNotFoundError as error:
        log.error("%s", error.message)
        return 1
    if token is None:
        log.info("endpoint %s is served by another process", name)
        return 0
    why: str | None = None
    try:
        while _serve(store.get(name), token, store).moves:
            pass
    except TallyError as error:
        log.error("endpoint %s cannot be served: %s", name, error.message)
        why = str(error)
    finally:
        try:
            store.give_back(name, token, error=why)
        except TallyError as error:
            log.warning("%s", error.message)
    return 0 if why is None else 1


if __name__ == "__main__":
    garbage.leave(main(sys.argv[1]))
