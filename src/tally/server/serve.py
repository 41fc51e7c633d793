"""Runs the application with uvicorn, until a signal ends it."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn

from tally.config import variable
from tally.errors import SpecError, StorageError
from tally.jobs.facade import Jobs
from tally.network import restrict
from tally.server.app import create_app
from tally.server.auth.keys import KeyStore
from tally.server.middleware import NoCancelled
from tally.server.settings import ServerSettings

ADMIN_KEY = "TALLY_ADMIN_KEY"
"""The variable with a key for the first admin: where nobody is there to read the one that would be printed."""
DRAIN_SECONDS = 5
"""How long requests may take to end once the server is to stop."""
ARRIVING_SECONDS = 0.5
"""How long who has connected by then may take to send a request."""


class _Server(uvicorn.Server):
    """Ends when all who have connected have their answer. uvicorn by itself closes connections whose request is on its
    way, and the system resets those that nobody has accepted."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        for each in sockets or ():
            with suppress(OSError):
                while True:
                    accepted, _ = each.accept()  # of the loop's own: it raises when nobody waits
                    accepted.setblocking(False)
                    await loop.connect_accepted_socket(self._protocol, accepted)
        for server in self.servers:
            server.close()
        await asyncio.sleep(ARRIVING_SECONDS)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        protocol: Any = self.config.http_protocol_class
        made: asyncio.Protocol = protocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made


def serve(jobs: Jobs, settings: ServerSettings, *, say: Callable[[str], None]) -> int:
    """Serve until SIGINT or SIGTERM; the exit code. say: gets lines for the user: the address, and the first key.

    Raises SpecError where others could reach a server that nobody has a key for, StorageError if the port is taken.
    """
    restrict(settings.allow_hosts)
    keys = KeyStore(jobs.store.engine)
    if not keys.any_valid():
        if given := variable(ADMIN_KEY):
            keys.add_given("first admin", "admin", given)
        elif not settings.loopback:
            raise SpecError(
                f"--host {settings.host} lets others reach this server, and nobody has a key for it",
                hint=f"Make one first: tally keys add NAME --role admin; or give one in {ADMIN_KEY}.",
            )
        else:
            _, text = keys.add("first admin", "admin")
            say(f"key for the first admin, shown this once: {text}")
    with _listening(settings) as listener:
        host, port = listener.getsockname()[:2]
        say(f"Tally is at http://{f'[{host}]' if ':' in host else host}:{port}")
        config = uvicorn.Config(
            create_app(jobs, settings),
            log_config=None,  # it goes where ours goes
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
        logging.getLogger("uvicorn.error").addFilter(NoCancelled())
        _Server(config).run(sockets=[listener])
    return 0


def _listening(settings: ServerSettings) -> socket.socket:
    try:
        return socket.create_server(
            (settings.host, settings.port), family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        )
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "is in use" if taken else f"cannot be used: {error.strerror or error}"
        hint = "Give another: tally up --port 0 takes any that is free." if taken else None
        raise StorageError(f"port {settings.port} of {settings.host} {why}", hint=hint) from None
