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
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from tally.database.clock import now

Where = sa.ColumnElement[bool]

RETURNED: dict[str, Any] = dict.fromkeys(("owner", "owner_host", "owner_pid", "owner_started", "lease_until"))
"""The lease's columns in a row without an owner."""

_HAS_PROC = Path("/proc/self/stat").exists()


def lease_columns() -> list[sa.Column[Any]]:
    """The columns of a leased table."""
    return [
        sa.Column("owner", sa.String(32)),
        sa.Column("owner_host", sa.String(255)),
        sa.Column("owner_pid", sa.Integer),
        sa.Column("owner_started", sa.Double),  # a busy machine gives the number to another process within seconds
        sa.Column("lease_until", sa.Double),
    ]


def new_token() -> str:
    """A token that proves a lease."""
    return secrets.token_hex(16)


def granted(token: str, seconds: float) -> dict[str, Any]:
    """The lease's columns in a row that this process works on."""
    pid = os.getpid()
    return {
        "owner": token, "owner_host": host(), "owner_pid": pid, "owner_started": _own_start(pid),
        "lease_until": now() + seconds,
    }  # fmt: skip


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
    one = (table.c.owner_pid, table.c.owner_started)
    owners = sa.select(*one).distinct().where(*rows, table.c.owner_host == here, table.c.owner_pid.is_not(None))
    gone = [
        sa.and_(table.c.owner_pid == pid, table.c.owner_started.is_not_distinct_from(since))
        for pid, since in connection.execute(owners)
        if not _lives(pid, since)
    ]
    # No NULL comes of it: what negates the condition means all other rows.
    on_this_host = sa.and_(table.c.owner_host.is_not(None), table.c.owner_host == here, table.c.owner_pid.is_not(None))
    return sa.or_(is_expired(table), sa.and_(on_this_host, sa.or_(sa.false(), *gone)))


def is_held(row: Mapping[Any, Any]) -> bool:
    """The opposite of :func:`is_lost`, for a row that was selected with ``now() AS clock``."""
    if row["owner"] is None or row["lease_until"] is None or row["lease_until"] < row["clock"]:
        return False
    return row["owner_host"] != host() or _lives(row["owner_pid"], row["owner_started"])


def started(pid: int) -> float | None:
    """When a living process of this host began: a number that no other process with the same id has.

    None if there is none. A zombie is none: it is dead, and only nobody has asked for its end yet.
    """
    if _HAS_PROC:  # psutil's time moves with the clock; this one counts from the start of the system
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return None
        return None if state in (b"Z", b"X") else float(fields[18])
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return 0.0


@cache
def _own_start(pid: int) -> float | None:
    """When this process began, whose id that is: every change of a lease says it. A fork has another id."""
    return started(pid)


def _lives(pid: int, since: float | None) -> bool:
    """since: when the owner began; None of one that an earlier version of Tally has noted."""
    found = _own_start(pid) if pid == os.getpid() else started(pid)
    return found is not None and (since is None or 0.0 in (found, since) or found == since)


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
