"""Logging in with an account of somebody else: a browser goes there, proves who it is, and comes back with a code.

Who logs in so gets a key that nobody is shown, which ends with the session: so roles, revocation and the audit log are
those of keys.
"""

from __future__ import annotations

import hmac
from typing import Protocol

from tally.errors import RefusedError
from tally.masking import mask
from tally.server.auth.keys import SESSION_SECONDS, KeyStore
from tally.server.auth.roles import Principal, Role

SECONDS = 600
"""Seconds that a login may take, from its beginning to the answer of the provider."""
TIMEOUT = 10.0
"""Seconds that the provider may take for an answer."""


class Provider(Protocol):
    """Whose accounts may log in. Safe to use from several threads."""

    def begin(self, back: str) -> tuple[str, str]:
        """Where the browser logs in, and what it has to keep until it comes back. back: the URL of :meth:`finish`.

        Raises RefusedError.
        """

    def finish(self, back: str, kept: str, *, state: str, code: str) -> Principal:
        """Who has come back from the provider, with a key for as long as a session. Raises RefusedError."""


def kept_parts(kept: str, state: str, count: int) -> list[str]:
    """What the browser has kept, in so many parts of which the first is the state. Raises RefusedError where that is
    not the one that it came back with."""
    parts = kept.split(".") if kept.count(".") == count - 1 else [""] * count
    if not (parts[0] and hmac.compare_digest(parts[0].encode(), state.encode("utf-8", "replace"))):
        raise RefusedError(403, "this login was not begun in this browser, or it took too long", hint="Try again.")
    return parts


def let_in(keys: KeyStore, name: str, role: Role | None) -> Principal:
    """A key for who has logged in. Raises RefusedError without a role."""
    if role is None:
        raise RefusedError(403, f"{name} may not log in here", hint="Ask an admin.")
    key, _ = keys.add(name, role, days=SESSION_SECONDS / 86_400)
    return Principal(key.name, key.role, key.id)


def failed(error: Exception) -> RefusedError:
    """What went wrong with the provider, as an answer."""
    return RefusedError(403, f"logging in failed: {mask(str(error))[:500]}", hint="Try again, or ask an admin.")
