"""API keys, and the sessions of browsers that have shown one.

A key is ``tly_ID_SECRET``. The secret has 256 random bits, so a plain hash of it is enough: it cannot be guessed from
the hash. Only the hash is stored. A session is the same with a cookie, and ends with its key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from tally.database.clock import now
from tally.database.tables import api_keys, sessions
from tally.errors import KeyNotFoundError, SpecError
from tally.server.auth.roles import ROLES, Principal, Role
from tally.text import did_you_mean

_KEY = re.compile(r"tly_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NAME = re.compile(r"[\w.@+ -]{1,64}")

SESSION_SECONDS = 12 * 3600.0
_USED_SECONDS = 60.0
"""How old the time of a key's last use may become before it is written again."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is stored. Times are seconds since the epoch. state: valid, expired or revoked."""

    id: str
    name: str
    role: Role
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    used_at: float | None
    state: str


class KeyStore:
    """Keys and sessions in one database. Safe to use from several threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def add(self, name: str, role: Role, *, days: float | None = None) -> tuple[Key, str]:
        """A new key, and its text, which cannot be read again. days: until it expires; None: never.

        Raises SpecError with every problem.
        """
        problems = []
        if not _NAME.fullmatch(name):
            problems.append(f"a key's name has 1 to 64 letters, digits, spaces or .@+-_, not {name!r}")
        if role not in ROLES:
            problems.append(f"there is no role {role!r}; there are {', '.join(ROLES)}{did_you_mean(role, ROLES)}")
        if days is not None and not 0 < days < 36_500:
            problems.append(f"a key expires after more than 0 days and within a hundred years, not after {days}")
        if problems:
            raise SpecError(problems)
        key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        expires = sa.null() if days is None else now() + days * 86_400
        with self._engine.begin() as connection:
            connection.execute(
                sa.insert(api_keys).values(
                    id=key_id, name=name, role=role, hash=_hash(secret), created_at=now(), expires_at=expires
                )
            )
        return self.get(key_id), f"tly_{key_id}_{secret}"

    def add_given(self, name: str, role: Role, text: str) -> Key:
        """A key whose text somebody has made. Others may add the same at the same time. Raises SpecError for one that
        is no text of a key."""
        match = _KEY.fullmatch(text)
        if match is None:
            raise SpecError(
                "a key is tly_, 12 digits of 0-9 and a-f, another _, and 43 letters, digits, '-' or '_' by chance",
                hint="echo tly_$(openssl rand -hex 6)_$(openssl rand -base64 32 | tr '+/' '-_' | tr -d '=\\n')",
            )
        with suppress(sa.exc.IntegrityError), self._engine.begin() as connection:  # it is there already
            connection.execute(
                sa.insert(api_keys).values(
                    id=match[1], name=name, role=role, hash=_hash(match[2]), created_at=now(), expires_at=sa.null()
                )
            )
        return self.get(match[1])

    def get(self, key_id: str) -> Key:
        """The key by its id. Raises KeyNotFoundError."""
        with self._engine.connect() as connection:
            row = connection.execute(_select().where(api_keys.c.id == key_id)).mappings().first()
        if row is None:
            raise KeyNotFoundError(f"no key {key_id!r}", hint="'tally keys list' shows the keys there are.")
        return _key(row)

    def list(self) -> list[Key]:
        """All keys, newest first; also those that are not valid any more."""
        with self._engine.connect() as connection:
            rows = connection.execute(_select().order_by(api_keys.c.created_at.desc(), api_keys.c.id)).mappings()
            return [_key(row) for row in rows]

    def revoke(self, key_id: str) -> Key:
        """Refuse the key, and every session that came from it, from now on. Raises KeyNotFoundError."""
        with self._engine.begin() as connection:
            unrevoked = (api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
            connection.execute(sa.update(api_keys).where(*unrevoked).values(revoked_at=now()))
            connection.execute(sa.delete(sessions).where(sessions.c.key_id == key_id))
        return self.get(key_id)

    def any_valid(self) -> bool:
        """Whether anybody can log in."""
        return any(key.state == "valid" for key in self.list())

    def principal(self, text: str) -> Principal | None:
        """Whose key this is; None unless it is valid."""
        match = _KEY.fullmatch(text)
        if match is None:
            return None
        key_id, secret = match.groups()
        with self._engine.connect() as connection:
            row = connection.execute(_select(api_keys.c.hash).where(api_keys.c.id == key_id)).mappings().first()
        if row is None or not hmac.compare_digest(row["hash"], _hash(secret)):
            return None
        key = _key(row)
        if key.state != "valid":
            return None
        if key.used_at is None or row["clock"] - key.used_at > _USED_SECONDS:
            with self._engine.begin() as connection:
                connection.execute(sa.update(api_keys).where(api_keys.c.id == key_id).values(used_at=now()))
        return Principal(key.name, key.role, key.id)

    # -- sessions ----------------------------------------------------------------------------------

    def log_in(self, principal: Principal) -> str:
        """A session's cookie. Sessions that have expired are forgotten on the way."""
        cookie = secrets.token_urlsafe(32)
        with self._engine.begin() as connection:
            connection.execute(sa.delete(sessions).where(sessions.c.expires_at < now()))
            connection.execute(
                sa.insert(sessions).values(
                    hash=_hash(cookie), key_id=principal.key_id, created_at=now(), expires_at=now() + SESSION_SECONDS
                )
            )
        return cookie

    def log_out(self, cookie: str) -> None:
        """End the session."""
        with self._engine.begin() as connection:
            connection.execute(sa.delete(sessions).where(sessions.c.hash == _hash(cookie)))

    def of_session(self, cookie: str) -> Principal | None:
        """Whose session this is; None if it has ended, or its key is not valid any more."""
        joined = sa.select(*_columns()).join(sessions, sessions.c.key_id == api_keys.c.id)
        with self._engine.connect() as connection:
            found = joined.where(sessions.c.hash == _hash(cookie), sessions.c.expires_at >= now())
            row = connection.execute(found).mappings().first()
        if row is None:
            return None
        key = _key(row)
        return Principal(key.name, key.role, key.id) if key.state == "valid" else None


def csrf_token(cookie: str) -> str:
    """What a page sends back to prove that it was made for this session."""
    return hmac.new(cookie.encode(), b"csrf", hashlib.sha256).hexdigest()


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _columns(*more: sa.Column[Any]) -> tuple[Any, ...]:
    shown = [api_keys.c[name] for name in Key.__slots__ if name != "state"]
    return (*shown, *more, now().label("clock"))


def _select(*more: sa.Column[Any]) -> sa.Select[Any]:
    return sa.select(*_columns(*more))


def _key(row: sa.RowMapping) -> Key:
    values = {name: row[name] for name in Key.__slots__ if name != "state"}
    expired = row["expires_at"] is not None and row["expires_at"] < row["clock"]
    state = "revoked" if row["revoked_at"] is not None else "expired" if expired else "valid"
    return Key(**values, state=state)
