"""A thread that renews a lease, and learns at once of what others change in its row."""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import sqlalchemy as sa

from tally.database.notify import Listener, listen
from tally.database.waiting import Patience, pause
from tally.errors import DatabaseAwayError, OwnershipLostError

log = logging.getLogger("tally")

T = TypeVar("T")

LISTEN_SECONDS = 10.0
"""Shortest time between two tries to listen for notifications."""
JOIN_SECONDS = 5.0
"""How long :meth:`LeaseRenewer.stop` waits for the thread to end."""


@dataclass(frozen=True, slots=True)
class Topic:
    """Notifications that make a renewer renew at once: those on ``channel`` with this ``payload``."""

    engine: sa.Engine
    channel: str
    payload: str


class LeaseRenewer(threading.Thread, Generic[T]):
    """Renews a lease every few seconds until it is lost or :meth:`stop` is called; ``with`` starts and stops it.

    renew: extends the lease; raises OwnershipLostError when somebody else has it.
    every: seconds between two renewals. what: names the lease in the log.
    renewed: gets what ``renew`` returned. lost: gets the error. Both are called in this thread.
    topic: notifications on which it renews before its time. They may be lost.
    """

    def __init__(
        self,
        renew: Callable[[], T],
        *,
        every: float,
        what: str,
        patience: Patience,
        renewed: Callable[[T], None] = lambda result: None,
        lost: Callable[[OwnershipLostError], None] = lambda error: None,
        topic: Topic | None = None,
    ) -> None:
        super().__init__(name="tally-lease", daemon=True)
        self._renew, self._every, self._what, self._patience = renew, every, what, patience
        self._renewed, self._lost, self._topic = renewed, lost, topic
        self._ended, self._end = socket.socketpair()
        self._listener: Listener | None = None
        self._next_listen = 0.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop renewing, and wait until the thread has ended, unless the database keeps it waiting."""
        self._end.close()
        self.join(JOIN_SECONDS)

    def run(self) -> None:
        tries = 0
        with self._ended, selectors.DefaultSelector() as selector:
            selector.register(self._ended, selectors.EVENT_READ)
            while not self._wait(selector, max(self._every, pause(tries)) if tries else self._every):
                try:
                    result = self._renew()
                except OwnershipLostError as error:
                    self._lost(error)
                    break
                except DatabaseAwayError as error:  # the lease may run out, and another process take it
                    self._patience.is_away(error)
                    tries += 1
                    continue
                except Exception as error:
                    log.warning("cannot renew the lease of %s: %s", self._what, error)
                    continue
                tries = 0
                self._patience.is_back()
                self._listen(selector)
                self._renewed(result)
            self._unlisten(selector)

    def _wait(self, selector: selectors.BaseSelector, seconds: float) -> bool:
        """Wait until it is time to renew; True once the thread is to end."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            ready = [key.fileobj for key, _ in selector.select(left)]
            if self._ended in ready:
                return True
            if self._listener in ready and self._is_notified(selector):
                return False
        return False

    def _is_notified(self, selector: selectors.BaseSelector) -> bool:
        assert self._listener is not None
        assert self._topic is not None
        try:
            return self._topic.payload in self._listener.received()
        except Exception as error:  # the connection was cut
            log.debug("no notifications for %s any more: %s", self._what, error)
            self._unlisten(selector)
            return False

    def _listen(self, selector: selectors.BaseSelector) -> None:
        now = time.monotonic()
        if self._topic is None or self._listener is not None or now < self._next_listen:
            return
        self._next_listen = now + LISTEN_SECONDS
        try:
            self._listener = listen(self._topic.engine, self._topic.channel)
        except Exception as error:  # without it, requests are only noticed later
            log.debug("no notifications for %s: %s", self._what, error)
        if self._listener is not None:
            selector.register(self._listener, selectors.EVENT_READ)

    def _unlisten(self, selector: selectors.BaseSelector) -> None:
        if self._listener is not None:
            with suppress(KeyError, ValueError):
                selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
