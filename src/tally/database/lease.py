"""Leases: which process works on a row, and until when.

A leased table has the columns of :func:`lease_columns`. Every change names the token of the lease, so a process that
has lost the lease can change nothing. A lease ends when its time is over by the database's clock; on the owner's host
it also ends with the owner's process. All functions run inside the caller's transaction; ``rows`` are conditions that
select rows.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping
from typing import Any

import psutil
import sqlalchemy as sa

from tally.database.clock import now

Where = sa.ColumnElement[bool]

RETURNED: dict[str, Any] = {"owner": None, "owner_host": None, "owner_pid": None, "lease_until": None}
"""The lease's columns in a row without an owner."""


def lease_columns() -> list[sa.Column[Any]]:
    """The columns of a leased table."""
    return [
        sa.Column("owner", sa.String(32)),
        sa.Column("owner_host", sa.String(255)),
        sa.Column("owner_pid", sa.Integer),
        sa.Column("lease_until", sa.Double),
    ]


def new_token() -> str:
    """A token that proves a lease."""
    return secrets.token_hex(16)


def granted(token: str, seconds: float) -> dict[str, Any]:
    """The lease's columns in a row that this process works on."""
    return {"owner": token, "owner_host": host(), "owner_pid": os.getpid(), "lease_until": now() + seconds}


def host() -> str:
    """The scope of process ids: the host and, on Linux, the process namespace (each container has its own)."""
    try:
        return f"{socket.gethostname()} ({os.stat('/proc/self/ns/pid').st_ino})"  # noqa: PTH116
    except OSError:
        return socket.gethostname()


def is_this_process(owner_host: str | None, owner_pid: int | None) -> bool:
    """Whether a lease's owner is this process."""
    return (owner_host, owner_pid) == (host(), os.getpid())


# -- conditions ----------------------------------------------------------------------------------------


def is_expired(table: sa.Table) -> Where:
    """There is no lease, or it has expired."""
    return sa.or_(table.c.owner.is_(None), sa.func.coalesce(table.c.lease_until, 0.0) < now())


def is_lost(connection: sa.Connection, table: sa.Table, *rows: Where) -> Where:
    """As :func:`is_expired`, or the owner was a process on this host that has ended."""
    here = host()
    owners = sa.select(table.c.owner_pid).distinct().where(*rows, table.c.owner_host == here)
    gone = [pid for pid in connection.scalars(owners.where(table.c.owner_pid.is_not(None))) if not _exists(pid)]
    on_this_host = sa.func.coalesce(table.c.owner_host, "") == here
    return sa.or_(is_expired(table), sa.and_(on_this_host, sa.func.coalesce(table.c.owner_pid, -1).in_(gone)))


def is_held(row: Mapping[Any, Any]) -> bool:
    """The opposite of :func:`is_lost`, for a row that was selected with ``now() AS clock``."""
    if row["owner"] is None or row["lease_until"] is None or row["lease_until"] < row["clock"]:
        return False
    return row["owner_host"] != host() or _exists(row["owner_pid"])


def _exists(pid: int) -> bool:
    if pid == os.getpid():
        return True
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)  # dead, if nobody has asked for its end yet
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


# -- changes -------------------------------------------------------------------------------------------


def acquire(
    connection: sa.Connection,
    table: sa.Table,
    *rows: Where,
    token: str,
    seconds: float,
    instead_of: str | None = None,
    **values: Any,
) -> bool:
    """Take the row's lease if it is free, and set ``values`` with it. Repeated with the same token, it succeeds again.

    instead_of: also take it from the owner with this token, who is known to be gone.
    """
    free = [is_expired(table), table.c.owner == token]
    if instead_of is not None:
        free.append(table.c.owner == instead_of)
    return _update(connection, table, *rows, sa.or_(*free), **granted(token, seconds), **values)


def renew(connection: sa.Connection, table: sa.Table, *rows: Where, token: str, seconds: float, **values: Any) -> bool:
    """Extend the lease, even one that has run out, and have this process hold it. False if somebody else has it."""
    return change(connection, table, *rows, token=token, **granted(token, seconds), **values)


def confirm(connection: sa.Connection, table: sa.Table, *rows: Where, token: str) -> bool:
    """Whether the lease is still the token's."""
    return connection.scalar(sa.select(sa.literal(1)).select_from(table).where(*rows, table.c.owner == token)) == 1


def change(connection: sa.Connection, table: sa.Table, *rows: Where, token: str, **values: Any) -> bool:
    """Set ``values`` in the leased row. False, with nothing changed, if somebody else has the lease."""
    return _update(connection, table, *rows, table.c.owner == token, **values)


def release(connection: sa.Connection, table: sa.Table, *rows: Where, token: str, **values: Any) -> bool:
    """Give the lease back, and set ``values`` with it. False, with nothing changed, if somebody else has it."""
    return change(connection, table, *rows, token=token, **{**RETURNED, **values})


def _update(connection: sa.Connection, table: sa.Table, *rows: Where, **values: Any) -> bool:
    return connection.execute(sa.update(table).where(*rows).values(**values)).rowcount > 0
