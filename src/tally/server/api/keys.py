"""API keys and the audit log over HTTP, for admins."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel, Field

from tally.server.api.views import AuditEntry, KeyView, Me, NewKey
from tally.server.auth.audit import AuditLog
from tally.server.auth.guard import Admin, Viewer
from tally.server.auth.keys import KeyStore
from tally.server.auth.roles import Role
from tally.server.errors import answers
from tally.server.once import SecretOnceRoute

router = APIRouter(
    tags=["keys"], route_class=SecretOnceRoute, responses=answers(400, 401, 403, 409, 413, 422, 429, 503)
)


class KeyRequest(BaseModel):
    """A key to make. days: until it expires; never if left out."""

    name: str = Field(min_length=1, max_length=64)
    role: Role
    days: float | None = Field(None, gt=0, lt=36_500, allow_inf_nan=False)


def keys_of(request: Request) -> KeyStore:
    """The keys of the server's database."""
    found: KeyStore = request.app.state.guard.keys
    return found


def audit_of(request: Request) -> AuditLog:
    found: AuditLog = request.app.state.audit
    return found


Keys = Annotated[KeyStore, Depends(keys_of)]


@router.get("/me")
def who_am_i(who: Viewer) -> Me:
    """Whose key this is."""
    return Me(name=who.name, role=who.role)


@router.get("/keys")
def list_keys(who: Admin, keys: Keys) -> list[KeyView]:
    """All keys, newest first."""
    return [KeyView(**asdict(each)) for each in keys.list()]


@router.post("/keys", status_code=201)
def add_key(who: Admin, keys: Keys, wanted: KeyRequest) -> NewKey:
    """A new key. Its text is shown this once."""
    key, text = keys.add(wanted.name, wanted.role, days=wanted.days)
    return NewKey(**asdict(key), text=text)


@router.post("/keys/{key}/revoke", responses=answers(404))
def revoke_key(who: Admin, keys: Keys, key: Annotated[str, Path(pattern="^[0-9a-f]{12}$")]) -> KeyView:
    """Refuse the key, and the sessions that came from it, from now on."""
    return KeyView(**asdict(keys.revoke(key)))


@router.get("/audit")
def read_audit(
    who: Admin,
    log: Annotated[AuditLog, Depends(audit_of)],
    before: Annotated[int | None, Query(ge=0, le=2**53)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[AuditEntry]:
    """Who changed what, the newest first. before: the last id of the page before."""
    return [AuditEntry(**asdict(each)) for each in log.page(before=before, limit=limit)]
