"""What is committed and to be pushed: the statements that keep it until it has arrived.

It is put there by the transaction that commits the rows, and leaves once the receiver has them. So nothing that is
committed is forgotten, whoever is killed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import sqlalchemy as sa

from tally.database.lease import new_token
from tally.database.tables import pushes
from tally.sinks.base import Output
from tally.text import storable

Info: TypeAlias = Mapping[str, Any]
"""What is told of an item beside its rows."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits. name: no other has it. keys: of its items. output: where its rows are staged, or else ``rows``.
    info: by key, what is told of items beside their rows."""

    id: int
    name: str
    keys: list[str]
    output: Output | None
    rows: bytes | None
    info: Mapping[str, Info]


@dataclass(frozen=True, slots=True)
class Refused:
    """An item that the receiver does not take, why, and its rows in Arrow's stream format."""

    key: str
    reason: str
    rows: bytes
    info: Info | None = None


@dataclass(frozen=True, slots=True)
class Pushes:
    """How far a job's rows have come. to: where they go, without secrets. delivered, waiting, refused: items. reason:
    why the first one was refused."""

    to: str
    delivered: int
    waiting: int
    refused: int
    reason: str | None


def add(
    connection: sa.Connection,
    job_id: str,
    outputs: Mapping[int, Output],
    items: Mapping[int, Mapping[str, Info | None]],
) -> None:
    """Have the rows of these chunks wait. items: of each, the keys, and what is told of each item."""
    rows = [
        {
            "job_id": job_id,
            "parcel": new_token(),
            "item_keys": [storable(key) for key in items[number]],
            "info": {storable(key): dict(info) for key, info in items[number].items() if info is not None} or None,
            "output": asdict(output),
        }
        for number, output in outputs.items()
    ]
    if rows:
        connection.execute(sa.insert(pushes), rows)


def waiting(connection: sa.Connection, job_id: str, limit: int, after: int = 0) -> list[Waiting]:
    """See :meth:`JobStore.unpushed`."""
    these = (pushes.c.job_id == job_id, pushes.c.refused.is_(None), pushes.c.id > after)
    query = sa.select(pushes).where(*these).order_by(pushes.c.id).limit(limit)
    return [
        Waiting(
            row["id"],
            row["parcel"],
            row["item_keys"],
            Output(**row["output"]) if row["output"] else None,
            row["rows"],
            row["info"] or {},
        )
        for row in connection.execute(query).mappings()
    ]


def settle(connection: sa.Connection, job_id: str, number: int, refused: Sequence[Refused]) -> None:
    """See :meth:`JobStore.pushed`."""
    gone = connection.execute(sa.delete(pushes).where(pushes.c.id == number, pushes.c.job_id == job_id)).rowcount
    if gone and refused:
        connection.execute(
            sa.insert(pushes),
            [
                {
                    "job_id": job_id,
                    "parcel": new_token(),
                    "item_keys": [storable(each.key)],
                    "info": None if each.info is None else {storable(each.key): dict(each.info)},
                    "rows": each.rows,
                    "refused": storable(each.reason),
                }
                for each in refused
            ],
        )


def counts(connection: sa.Connection, job_id: str) -> tuple[int, int]:
    """How many items wait, and how many are refused."""
    those = sa.select(pushes.c.refused.is_not(None), sa.func.sum(sa.func.json_array_length(pushes.c.item_keys)))
    query = those.where(pushes.c.job_id == job_id).group_by(pushes.c.refused.is_not(None))
    found = {bool(row[0]): int(row[1]) for row in connection.execute(query)}
    return found.get(False, 0), found.get(True, 0)


def try_again(connection: sa.Connection, job_id: str) -> None:
    """See :meth:`JobStore.push_refused_again`."""
    connection.execute(sa.update(pushes).where(pushes.c.job_id == job_id).values(refused=None))


def refused(connection: sa.Connection, job_id: str, limit: int | None = None) -> list[tuple[str, str]]:
    """See :meth:`JobStore.refused`. limit: the first ones only."""
    these = (pushes.c.job_id == job_id, pushes.c.refused.is_not(None))
    query = sa.select(pushes.c.item_keys, pushes.c.refused).where(*these).order_by(pushes.c.id).limit(limit)
    return [(keys[0], reason) for keys, reason in connection.execute(query)]
