"""Keys of the items that an endless source has delivered: what is delivered again is not scored again.

A key is stored in the transaction that plans its chunk. It is kept as a hash, with the item's position in the job: the
chunk that covers the position says whether the item is done, however often chunks were cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal

import sqlalchemy as sa

from tally.database.clock import now
from tally.database.tables import chunks, received_keys
from tally.jobs.chunks import IDS_PER_STATEMENT
from tally.sources.base import Chunk


def insert(connection: sa.Connection, job_id: str, planned: Sequence[Chunk], received: Sequence[Sequence[str]]) -> None:
    """Store the keys of planned chunks. received: those of each chunk, one for each item; or none for that chunk."""
    if len(received) != len(planned):
        raise ValueError(f"{len(planned)} chunks are planned, and keys of {len(received)} are given")
    rows = []
    for chunk, keys in zip(planned, received, strict=True):
        if len(keys) not in (0, chunk.count):
            raise ValueError(f"a chunk of {chunk.count} items has {len(keys)} keys")
        rows += [(_hash(key), chunk.first + index) for index, key in enumerate(keys)]
    if rows:
        at = connection.scalar(sa.select(now()))
        connection.execute(
            sa.insert(received_keys),
            [{"job_id": job_id, "key": key, "position": position, "at": at} for key, position in rows],
        )


def known(connection: sa.Connection, job_id: str, keys: Iterable[str]) -> dict[str, Literal["pending", "done"]]:
    """Those of the keys that were planned, and whether their items are done."""
    wanted = {_hash(key): key for key in keys}
    hashes: list[str] = list(wanted)
    found: dict[str, Literal["pending", "done"]] = {}
    for begin in range(0, len(hashes), IDS_PER_STATEMENT):
        some = received_keys.c.key.in_(hashes[begin : begin + IDS_PER_STATEMENT])
        query = sa.select(received_keys.c.key, _unfinished()).where(received_keys.c.job_id == job_id, some)
        for key, unfinished in connection.execute(query):
            found[wanted[key]] = "pending" if unfinished else "done"
    return found


def forget(connection: sa.Connection, job_id: str, older_than: float) -> int:
    """Remove keys of finished items that were planned more than so many seconds ago; returns how many."""
    old = sa.and_(received_keys.c.job_id == job_id, received_keys.c.at < now() - older_than)
    return connection.execute(sa.delete(received_keys).where(old, ~_unfinished())).rowcount


def _unfinished() -> sa.Exists:
    """Whether a chunk that is not done covers the item."""
    return (
        sa.select(chunks.c.id)
        .where(
            chunks.c.job_id == received_keys.c.job_id,
            chunks.c.state.in_(("pending", "running")),
            chunks.c.first <= received_keys.c.position,
            chunks.c.first + chunks.c.count > received_keys.c.position,
        )
        .correlate(received_keys)
        .exists()
    )


def _hash(key: str) -> str:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
