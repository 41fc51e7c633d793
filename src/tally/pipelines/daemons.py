"""Daemons: steps that others use while they run, and that end with the template in which they were begun.

Here they listen on this machine. So that nobody talks to something else that does, a port at which a daemon is to be
reached has to be free before it is begun.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

ADDRESS = "127.0.0.1"
PROBES = ("tcpSocket", "httpGet")
"""How it is asked whether a daemon can be used."""
_LOOK_SECONDS = 0.1


class PortError(Exception):
    """A daemon cannot listen where it would."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """name: of its node. stop: asks it to end. ended: is done when its node is."""

    name: str
    stop: Callable[[], None]
    ended: asyncio.Task[None]


class Daemons:
    """Those of one run that have been begun and have not ended."""

    def __init__(self) -> None:
        self._daemons: list[Daemon] = []

    def add(self, daemon: Daemon) -> None:
        self._daemons.append(daemon)

    async def end(self, inside: str = "") -> None:
        """End those that were begun inside of a node, by its name; all, if none is given."""
        ending = [each for each in self._daemons if not inside or each.name.startswith((f"{inside}.", f"{inside}["))]
        self._daemons = [each for each in self._daemons if each not in ending]
        for each in ending:
            each.stop()
        for each in ending:
            await each.ended


def port_of(container: Mapping[str, Any]) -> int | None:
    """Where a daemon's probe asks."""
    probe = container.get("readinessProbe") or {}
    for kind in PROBES:
        if kind in probe:
            with suppress(ValueError):
                return int(probe[kind]["port"])
    return None


async def check_free(container: Mapping[str, Any]) -> None:
    """Raises PortError if something listens at a daemon's port already, or if it is none."""
    port = port_of(container)
    if port is None and "readinessProbe" in container:
        raise PortError("its readinessProbe needs a port by its number")
    if port is not None and await _listens(port):
        raise PortError(f"port {port} of this machine, at which it is to be reached, is taken already")


async def ready(container: Mapping[str, Any], over: asyncio.Future[Any]) -> bool:
    """Wait until a daemon can be used; False if it is over before."""
    probe = container.get("readinessProbe")
    if probe is None:
        return not over.done()
    begun = time.monotonic()
    while not over.done():
        if time.monotonic() - begun >= float(probe.get("initialDelaySeconds", 0)) and await _answers(probe):
            return True
        await asyncio.wait([over], timeout=_LOOK_SECONDS)
    return False


async def _answers(probe: Mapping[str, Any]) -> bool:
    seconds = float(probe.get("timeoutSeconds", 1))
    if "tcpSocket" in probe:
        return await _listens(int(probe["tcpSocket"]["port"]), seconds)
    import httpx2

    asked = probe["httpGet"]
    url = f"{asked.get('scheme', 'HTTP').lower()}://{ADDRESS}:{asked['port']}/{asked.get('path', '/').lstrip('/')}"
    headers = {each["name"]: each.get("value", "") for each in asked.get("httpHeaders", ())}
    try:
        async with httpx2.AsyncClient(verify=False, timeout=seconds) as client:
            return bool((await client.get(url, headers=headers)).status_code < 400)
    except (httpx2.HTTPError, OSError):
        return False


async def _listens(port: int, seconds: float = 1.0) -> bool:
    try:
        async with asyncio.timeout(seconds):
            _, writer = await asyncio.open_connection(ADDRESS, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
