"""Processes that serve kept endpoints, started by a command, or by whoever supervises."""

from __future__ import annotations

import logging
import subprocess
import threading
import time

from tally import processes
from tally.config import append_private, settings
from tally.errors import DatabaseAwayError, EndpointError, TallyError
from tally.jobs.children import Children
from tally.serving.deployments import Deployment, DeploymentStore

log = logging.getLogger("tally")

MODULE = "tally.serving.deployed"
LOOK_SECONDS = 1.0
_launched: list[subprocess.Popen[bytes]] = []
"""Kept, as Python warns of those that go while their process lives; these are meant to."""


def launch(name: str) -> subprocess.Popen[bytes]:
    """Start a process that serves the endpoint, and outlives this one. If another serves it, it ends at once."""
    with append_private(settings().endpoint_log_of(name)) as output:
        process = subprocess.Popen(
            processes.command(MODULE, name),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _launched.append(process)
    return process


def settled(
    store: DeploymentStore, name: str, revision: int, seconds: float, started: subprocess.Popen[bytes] | None = None
) -> Deployment:
    """The endpoint, once the revision is served by as many replicas as there should be.

    started: the process that should serve it, where there was none.
    Raises EndpointError if it cannot be served, or does not come to that in so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        over = started is not None and started.poll() not in (None, 0)
        found = store.get(name)
        if found.observed.get("revision") == revision and found.observed.get("state") == "failed":
            raise EndpointError(f"endpoint {name} cannot be served: {found.observed.get('error')}")
        if found.revision > revision or (found.settled and found.observed.get("complete")):
            return found
        if over or time.monotonic() > deadline:
            hint = f"'tally endpoints logs {name}' shows what its process says."
            raise EndpointError(f"endpoint {name} is not ready after {seconds:g} s: {_served(found)}", hint=hint)
        time.sleep(0.1)


def _served(found: Deployment) -> str:
    """What is served of what is wanted."""
    if not found.alive:
        return "no process serves it"
    pools = []
    for each in found.observed.get("pools", ()):
        why = f" ({each['failure']})" if each["failure"] else ""
        pools.append(f"version {each['version']} has {each['ready']} of {each['wanted']} replicas{why}")
    return ", ".join([f"revision {found.observed.get('revision', 0)} of {found.revision} is served", *pools])


class Endpoints:
    """Keeps a process for each endpoint that nobody serves, until it is stopped. Used by one thread, but for
    :meth:`stop`."""

    def __init__(self, store: DeploymentStore) -> None:
        self._store = store
        self._wake, self._stopping = threading.Event(), False
        self._children: Children[str] = Children(self._wake)

    def stop(self) -> None:
        """Have the endpoints of this process end, once they have answered what they were sent."""
        self._stopping = True
        self._wake.set()

    def run(self) -> None:
        """Work until :meth:`stop`."""
        while not self._stopping:
            try:
                self._settle()
                serving = self._children.work
                for name in self._store.to_start():
                    if name not in serving:
                        self._children.start(name, MODULE, name, log=settings().endpoint_log_of(name))
                        log.info("endpoint %s has a process", name)
            except DatabaseAwayError as error:
                log.warning("%s", error.message)
            except (OSError, TallyError) as error:
                log.error("%s", error)
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()
        self._children.stop(self._settle)

    def _settle(self) -> None:
        for name in self._children.ended():
            self._children.forget(name)


def restart_if_down(store: DeploymentStore, name: str) -> subprocess.Popen[bytes] | None:
    """Start a process for the endpoint if none serves it. Raises EndpointNotFoundError."""
    return None if store.get(name).alive else launch(name)
