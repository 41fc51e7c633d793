"""The keys that clients of endpoints show."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Sequence

from tally.config import variable
from tally.errors import SpecError
from tally.serving.protocols.base import RequestError
from tally.serving.settings import KEYS

LOOK_SECONDS = 1.0
"""Seconds after which the folder of secrets is looked at again."""


def keys_now() -> tuple[str, ...]:
    """The keys that the environment, or the folder of secrets, has at this moment. Raises SpecError."""
    return tuple(key for text in (variable(KEYS) or "").split(",") if (key := text.strip()))


class Keys:
    """Those that a server was started with. Of them, the ones of the folder of secrets are followed: a key that is put
    there counts, and one that is gone counts no more. A server that asks for keys never stops asking."""

    def __init__(self, given: Sequence[str]) -> None:
        self._asks, self._now = bool(given), keys_now()
        self._fixed = tuple(each for each in given if each not in self._now)
        self._looked = time.monotonic()
        self._take()

    def check(self, given: str | None) -> None:
        """Raises RequestError unless what an Authorization header gives is a key, or none is asked for."""
        if not self._asks:
            return
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()
        if given in self._known:
            return
        given = given or ""
        kind, _, key = given.partition(" ")
        if kind.lower() != "bearer" or not key:
            raise RequestError(401, "a key is needed: Authorization: Bearer KEY", **{"WWW-Authenticate": "Bearer"})
        digest = hashlib.sha256(key.strip().encode()).digest()
        if not any(hmac.compare_digest(digest, each) for each in self._digests):
            raise RequestError(401, "this key is not valid", **{"WWW-Authenticate": "Bearer"})
        self._known.add(given)

    def _look(self) -> None:
        self._looked = time.monotonic()
        try:
            now = keys_now()
        except SpecError:  # it is being exchanged, say: those that were there count
            return
        if now != self._now:
            self._now = now
            self._take()

    def _take(self) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in (*self._fixed, *self._now)]
        self._known: set[str] = set()
