"""The keeper of a coordinator's lease: renews it, and hears what the user wants of the job."""

from __future__ import annotations

import logging
import queue
import selectors
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from tally.database.notify import Listener, listen
from tally.database.waiting import Patience, pause
from tally.errors import DatabaseAwayError, OwnershipLostError
from tally.jobs.store import CHANNEL, JobStore, Lease

log = logging.getLogger("tally")

LEASE_SECONDS = 30.0
"""How long a lease lasts that is not renewed."""
LOOK_SECONDS = 1.0
"""How often the keeper renews it, and looks what the user wants."""
LISTEN_SECONDS = 10.0
"""How often, at most, it tries to hear of that at once."""
JOIN_SECONDS = 5.0
"""How long it may take to end."""


class Keeper(threading.Thread):
    """Renews a lease; puts ``("wanted", what)`` into the coordinator's queue, and at last ``("lost", error)``.

    It looks about once a second. PostgreSQL tells it when there is something to see: a hint, which may be lost.
    """

    def __init__(
        self, store: JobStore, lease: Lease, events: queue.SimpleQueue[tuple[Any, ...]], patience: Patience
    ) -> None:
        super().__init__(name="tally-lease", daemon=True)
        self._store, self._lease, self._events, self._patience = store, lease, events, patience
        self._ended, self._end = socket.socketpair()
        self._listener: Listener | None = None
        self._listens_again_at = 0.0

    def stop(self) -> None:
        """Returns as soon as it has ended; where the database keeps it waiting, it is left to end by itself."""
        self._end.close()
        self.join(JOIN_SECONDS)

    def run(self) -> None:
        wanted, tries = "run", 0
        with self._ended, selectors.DefaultSelector() as selector:
            selector.register(self._ended, selectors.EVENT_READ)
            while not self._rest(selector, max(LOOK_SECONDS, pause(tries)) if tries else LOOK_SECONDS):
                try:
                    now = self._store.renew(self._lease, seconds=LEASE_SECONDS)
                except OwnershipLostError as error:
                    self._events.put(("lost", error))
                    break
                except DatabaseAwayError as error:  # the lease may run out; who takes the job then, has it
                    self._patience.is_away(error)
                    tries += 1
                    continue
                except Exception as error:
                    log.warning("cannot renew the lease of job %s: %s", self._lease.job_id, error)
                    continue
                tries = 0
                self._patience.is_back()
                self._listen(selector)
                if now != wanted:
                    wanted = now
                    self._events.put(("wanted", wanted))
            self._deafen(selector)

    def _rest(self, selector: selectors.BaseSelector, seconds: float) -> bool:
        """Wait so long, or until there is something to see; True once it is to end."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            ready = [key.fileobj for key, _ in selector.select(left)]
            if self._ended in ready:
                return True
            if self._listener in ready and self._heard(selector):
                return False
        return False

    def _heard(self, selector: selectors.BaseSelector) -> bool:
        assert self._listener is not None
        try:
            return self._lease.job_id in self._listener.received()
        except Exception as error:  # it was cut off
            log.debug("not told about job %s any more: %s", self._lease.job_id, error)
            self._deafen(selector)
            return False

    def _listen(self, selector: selectors.BaseSelector) -> None:
        now = time.monotonic()
        if self._listener is None and now >= self._listens_again_at:
            self._listens_again_at = now + LISTEN_SECONDS
            try:
                self._listener = listen(self._store.engine, CHANNEL)
            except Exception as error:  # it is only quicker
                log.debug("not told about job %s: %s", self._lease.job_id, error)
            if self._listener is not None:
                selector.register(self._listener, selectors.EVENT_READ)

    def _deafen(self, selector: selectors.BaseSelector) -> None:
        if self._listener is not None:
            with suppress(KeyError, ValueError):
                selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
