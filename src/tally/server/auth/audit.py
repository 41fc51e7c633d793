"""The audit log: who changed what, when, and how it went. Reading is not recorded."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from tally.database.clock import now
from tally.database.tables import audit
from tally.server.auth.roles import Principal
from tally.text import storable


@dataclass(frozen=True, slots=True)
class Entry:
    """One line. action: such as ``cancel_job``; empty where there is none. target: method and path of the request.
    status: of the answer. address: of the client."""

    id: int
    at: float
    who: str
    key_id: str
    role: str
    action: str
    target: str
    status: int
    address: str


class AuditLog:
    """Writes and reads the audit log of one database."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def write(self, principal: Principal | None, *, action: str, target: str, status: int, address: str) -> None:
        """Add a line. principal: None for somebody who could not prove who they are."""
        who, key_id, role = ("", "", "") if principal is None else (principal.name, principal.key_id, principal.role)
        with self._engine.begin() as connection:
            connection.execute(
                sa.insert(audit).values(
                    at=now(), who=who, key_id=key_id, role=role, action=storable(action[:200]),
                    target=storable(target[:1000]), status=status, address=storable(address[:100]),
                )
            )  # fmt: skip

    def page(self, *, before: int | None = None, limit: int = 100) -> list[Entry]:
        """The newest lines first. before: only those with a smaller id."""
        query = sa.select(audit).order_by(audit.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(audit.c.id < before)
        with self._engine.connect() as connection:
            return [Entry(**row) for row in connection.execute(query).mappings()]
