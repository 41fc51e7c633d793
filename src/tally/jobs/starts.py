"""What a server is to start: new jobs, earlier ones that go on, and replays of dead items.

A new job is a row of its own from the beginning, in state ``waiting``, so it is listed, shown and cancelled like any
other before its model was looked at. A start is a second row with a lease: of several servers one gets it, and if that
one is killed before the job's coordinator has the job, another one does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import sqlalchemy as sa

from tally.database import lease as leases
from tally.database.clock import now
from tally.database.tables import jobs, starts
from tally.errors import OwnershipLostError
from tally.text import storable

Action: TypeAlias = Literal["submit", "resume", "retry"]

LEASE_SECONDS = 120.0
"""How long a process may take from its start until it has the job."""


@dataclass(frozen=True, slots=True)
class Start:
    """A job that is to be started. overwrite: as for submit. who: asked for it. attempts: how often it was tried.
    token: of the lease, for who has claimed it."""

    job_id: str
    action: Action
    overwrite: bool
    who: str
    asked_at: float
    attempts: int
    token: str | None = None


class StartStore:
    """The starts in one database. Safe to use from several threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def ask(self, job_id: str, action: Action, *, who: str = "", overwrite: bool = False) -> None:
        """Have a server start the job. Asked again before that, nothing changes."""
        with self._engine.begin() as connection:
            insert(connection, job_id, action, who=who, overwrite=overwrite)

    def claim(self, *, parts: bool = False) -> Start | None:
        """The oldest start that nobody works on, for this process; None if there is none. parts: of split jobs only."""
        token = leases.new_token()
        with self._engine.begin() as connection:
            free = leases.is_lost(connection, starts)
            if parts:
                free &= starts.c.job_id.in_(sa.select(jobs.c.id).where(jobs.c.parent.is_not(None)))
            query = sa.select(starts.c.job_id).where(free).order_by(starts.c.asked_at, starts.c.job_id).limit(1)
            job_id = connection.scalar(query.with_for_update(skip_locked=True))
            if job_id is None:
                return None
            values = leases.granted(token, LEASE_SECONDS) | {"attempts": starts.c.attempts + 1}
            connection.execute(sa.update(starts).where(starts.c.job_id == job_id).values(**values))
            row = connection.execute(sa.select(starts).where(starts.c.job_id == job_id)).mappings().one()
        return _start(row)

    def get(self, job_id: str, token: str) -> Start:
        """The start that was claimed with this token. Raises OwnershipLostError if somebody else has it by now."""
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(starts).where(starts.c.job_id == job_id)).mappings().first()
        if row is None or row["owner"] != token:
            raise OwnershipLostError(f"the start of job {job_id} has been taken over by another process")
        return _start(row)

    def settle(self, job_id: str, token: str) -> None:
        """The job has its coordinator, or has failed: there is nothing left to start."""
        with self._engine.begin() as connection:
            connection.execute(sa.delete(starts).where(starts.c.job_id == job_id, starts.c.owner == token))

    def put_back(self, job_id: str, token: str, *, counted: bool = True) -> Start | None:
        """Let others start it. Returns it; None if it was settled, or somebody else has it. counted: it was a try."""
        with self._engine.begin() as connection:
            mine = starts.c.job_id == job_id
            values = {} if counted else {"attempts": starts.c.attempts - 1}
            if not leases.release(connection, starts, mine, token=token, **values):
                return None
            return _start(connection.execute(sa.select(starts).where(mine)).mappings().one())

    def forget(self, job_id: str) -> None:
        """Do not start it."""
        with self._engine.begin() as connection:
            connection.execute(sa.delete(starts).where(starts.c.job_id == job_id))

    def is_waiting(self, job_id: str) -> bool:
        """Whether the job is to be started."""
        with self._engine.connect() as connection:
            return connection.scalar(sa.select(starts.c.job_id).where(starts.c.job_id == job_id)) is not None

    def waiting(self) -> set[str]:
        """The ids of all jobs that are to be started."""
        with self._engine.connect() as connection:
            return set(connection.scalars(sa.select(starts.c.job_id)))


def insert(connection: sa.Connection, job_id: str, action: Action, *, who: str, overwrite: bool) -> None:
    """As :meth:`StartStore.ask`, in the caller's transaction."""
    known = sa.select(sa.literal(1)).where(starts.c.job_id == job_id)
    values = sa.select(
        sa.literal(job_id),
        sa.literal(action),
        sa.literal(int(overwrite)),
        sa.literal(storable(who)),
        now(),
        sa.literal(0),
    ).where(~sa.exists(known))
    connection.execute(sa.insert(starts).from_select([c.name for c in starts.c][:6], values))


def _start(row: sa.RowMapping) -> Start:
    return Start(
        row["job_id"], row["action"], bool(row["overwrite"]), row["who"], row["asked_at"], row["attempts"], row["owner"]
    )
