"""A job's chunks at a glance: as few numbers as a picture has room for, however many chunks there are."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa

from tally.database.clock import now
from tally.database.tables import chunks, dead_items
from tally.jobs.chunks import of as of_jobs


@dataclass(frozen=True, slots=True)
class Cell:
    """Neighbouring chunks. first: the position of their first item. dead: whether items of theirs are."""

    first: int
    chunks: int
    done: int
    running: int
    dead: bool = False

    @property
    def state(self) -> str:
        """done, running, begun (some are done) or waiting."""
        if self.done == self.chunks:
            return "done"
        return "running" if self.running else "begun" if self.done else "waiting"


@dataclass(frozen=True, slots=True)
class Pace:
    """How many items were done, in stretches of the same length. begin: seconds since the epoch; seconds: of each
    stretch. rates: items in ``per`` seconds, which is a minute, or a stretch where that is shorter: what was done in
    less than a minute is not said to have lasted one."""

    begin: float
    seconds: float
    per: float
    rates: tuple[float, ...]


def cells(connection: sa.Connection, job_ids: Sequence[str], *, limit: int) -> list[Cell]:
    """The chunks in the source's order, in at most ``limit`` cells of about as many chunks each. job_ids: of a job, and
    of its parts."""
    # The index has all that is asked for.
    of = (of_jobs(chunks, job_ids), chunks.c.state.in_(("pending", "running", "done")))
    order = (chunks.c.first, chunks.c.id)
    each = sa.select(chunks.c.first, chunks.c.state, sa.func.ntile(limit).over(order_by=order).label("cell"))
    numbered = each.where(*of).subquery()

    def count(state: str) -> sa.ColumnElement[int]:
        return sa.func.sum(sa.case((numbered.c.state == state, 1), else_=0))

    query = sa.select(sa.func.min(numbered.c.first), sa.func.count(), count("done"), count("running"))
    rows = connection.execute(query.group_by(numbered.c.cell).order_by(numbered.c.cell)).all()
    found = [Cell(first, int(number), int(done), int(running)) for first, number, done, running in rows]
    if not found:
        return found
    firsts = [cell.first for cell in found]
    dead, width = dead_items.c.first, 1 + firsts[-1] // (4 * limit)
    some = sa.select(sa.func.min(dead)).where(of_jobs(dead_items, job_ids), dead_items.c.retried.is_(None))
    for position in connection.scalars(some.group_by(sa.func.floor(dead / width))):
        place = max(0, bisect_right(firsts, position) - 1)
        found[place] = replace(found[place], dead=True)
    return found


def pace(connection: sa.Connection, job_ids: Sequence[str], *, running: bool, limit: int) -> Pace | None:
    """How fast the job was, in at most ``limit`` stretches from its first results to its last, or until now where it
    is running. None while it has none."""
    done = (of_jobs(chunks, job_ids), chunks.c.state == "done", chunks.c.done_at.is_not(None))
    ends = sa.select(sa.func.min(chunks.c.done_at), sa.func.max(chunks.c.done_at), now()).where(*done)
    begin, end, clock = connection.execute(ends).one()
    if begin is None:
        return None
    length = (max(clock, end) if running else end) - begin
    seconds = max(1.0, length / limit)
    last = min(limit - 1, int(length // seconds))
    per, rates = min(60.0, seconds), [0.0] * (last + 1)
    stretch = sa.cast(sa.func.floor((chunks.c.done_at - begin) / seconds), sa.Integer).label("stretch")
    query = sa.select(stretch, sa.func.sum(chunks.c.count)).where(*done).group_by(stretch)
    for number, count in connection.execute(query):
        rates[min(number, last)] += float(count) * per / seconds  # the very end belongs to the last stretch
    return Pace(begin, seconds, per, tuple(rates))
