"""What the stores of runs, sweeps and pipelines have in common: rows with a lease, found by the beginning of their ids.

One process owns a running row at a time. Each of its changes names its token, inside the same transaction: a process
that has lost its row changes nothing.
"""

from __future__ import annotations

import math
import shutil
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import sqlalchemy as sa

from tally.config import settings
from tally.database import lease as leases
from tally.database.clock import now
from tally.errors import OwnershipLostError, SpecError, TallyError
from tally.text import storable

LEASE_SECONDS = 30.0
"""How long a lease lasts that is not renewed."""
LONGEST_NAME = 128


class Record(Protocol):
    """A row as its readers know it."""

    @property
    def id(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def folder(self) -> str: ...


def folder_of(word: str, row_id: str) -> Path:
    """Where the files of a run, a sweep or a pipeline are by itself."""
    return settings().home / f"{word}s" / row_id


R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to change a row: sent with every change. id: of that."""

    id: str
    token: str


class LeasedStore(Generic[R]):
    """Reads and changes the rows of one table. Safe to use from several threads; holds no state but the engine.

    table: with columns ``id``, ``state``, ``created_at`` and those of a lease. word: what a row is called, and
    ``command``: that shows one of them. missing, refused: the errors of what is not there, and of what its state does
    not allow.
    """

    table: ClassVar[sa.Table]
    word: ClassVar[str]
    command: ClassVar[str]
    missing: ClassVar[type[TallyError]]
    refused: ClassVar[type[TallyError]]

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    @classmethod
    def open(cls) -> Self:
        """That of this installation, as the environment's settings say."""
        from tally.database.connect import connect

        return cls(connect(settings().database))

    # -- for who has the lease ---------------------------------------------------------------------------------

    def _insert(self, lease: Lease, values: Mapping[str, Any]) -> Lease:
        """A new row that this process owns from now on."""
        begun = {"id": lease.id, "state": "running", "created_at": now(), "started_at": now()}
        with self.engine.begin() as connection:
            granted = leases.granted(lease.token, LEASE_SECONDS)
            connection.execute(sa.insert(self.table).values(**begun, **values, **granted))
        return lease

    def resume(self, row_id: str, *, reopen: bool = False) -> Lease:
        """Go on with what was interrupted, killed or has failed; this process does from now on.

        reopen: also with what is finished, which more is to be added to.
        Raises ``missing``, and ``refused`` where it is finished or another process goes on with it.
        """
        again = {"state": "running", "error": None, "started_at": now(), "finished_at": None}
        allowed = sa.true() if reopen else self.table.c.state != "finished"
        if (lease := self._take(row_id, allowed, **again)) is None:
            found = self.get(row_id)
            raise self.refused(
                f"{self.word} {found.id} is {found.state}"
                + (", by another process" if found.state == "running" else ""),
                hint=f"Only a {self.word} that was interrupted, killed or has failed is resumed. "
                f"'{self.command} show {found.id}' tells more.",
            )
        return lease

    def _take(self, row_id: str, allowed: leases.Where, **changes: Any) -> Lease | None:
        """The lease of a row that no process has; None where one has, or the row is not ``allowed``."""
        lease = Lease(self.get_id(row_id), leases.new_token())
        it = self.table.c.id == lease.id
        with self.engine.begin() as connection:
            lost = leases.is_lost(connection, self.table, it)
            owner = connection.scalar(sa.select(self.table.c.owner).where(it, lost))
            taken = leases.acquire(
                connection, self.table, it, allowed, token=lease.token, seconds=LEASE_SECONDS, instead_of=owner,
                **changes,
            )  # fmt: skip
        return lease if taken else None

    def _renew(self, connection: sa.Connection, lease: Lease, **changes: Any) -> None:
        """Raises OwnershipLostError."""
        it = self.table.c.id == lease.id
        if not leases.renew(connection, self.table, it, token=lease.token, seconds=LEASE_SECONDS, **changes):
            raise self._lost(lease)

    def _end(
        self, connection: sa.Connection, lease: Lease, state: str, error: str | None, changes: Mapping[str, Any]
    ) -> None:
        """End it, and give the lease back. Raises OwnershipLostError."""
        # The host stays: the files are there.
        ended = {"owner_host": leases.host(), "finished_at": now(), "state": state, "error": error and storable(error)}
        it = self.table.c.id == lease.id
        if not leases.release(connection, self.table, it, token=lease.token, **{**ended, **changes}):
            raise self._lost(lease)

    def _give_back(self, lease: Lease) -> None:
        with self.engine.begin() as connection:
            leases.release(connection, self.table, self.table.c.id == lease.id, token=lease.token)

    def _lost(self, lease: Lease) -> OwnershipLostError:
        return OwnershipLostError(
            f"{self.word} {lease.id} was taken over by another process, or deleted; this one stops",
            hint=f"'{self.command} show {lease.id}' tells more.",
        )

    # -- for everybody -----------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def _record(cls, row: Mapping[Any, Any]) -> R:
        """The row, selected with ``now() AS clock``, as its readers know it."""

    @staticmethod
    def _standing(row: Mapping[Any, Any]) -> dict[str, Any]:
        """``alive``: whether a process has it; ``state``: interrupted where it ran and none has it any more."""
        alive = leases.is_held(row)
        return {"alive": alive, "state": row["state"] if alive or row["state"] != "running" else "interrupted"}

    def get(self, row_id: str) -> R:
        """By its id, or by the unambiguous beginning of it. Raises ``missing``."""
        return self._record(self._row(row_id))

    def has_made(self, record: R) -> bool:
        """Whether Tally has made its folder, and that is on this machine."""
        folder = Path(record.folder)
        return folder == folder_of(self.word, record.id) and folder.is_dir() and not folder.is_symlink()

    def _remove_folder(self, record: R) -> None:
        """If Tally has made it."""
        if self.has_made(record):
            shutil.rmtree(record.folder, ignore_errors=True)

    def get_id(self, row_id: str) -> str:
        """The whole id. Raises ``missing``."""
        return str(self._row(row_id)["id"])

    def _row(self, row_id: str) -> sa.RowMapping:
        found: Sequence[sa.RowMapping] = []
        if row_id and row_id.isprintable():
            for asked in self._meant(row_id):
                if found := self._rows(asked):
                    break
        if not found:
            raise self.missing(
                f"no {self.word} {row_id!r}", hint=f"'{self.command} list' shows the {self.word}s there are."
            )
        if len(found) > 1:
            some = ", ".join(row["id"] for row in found)
            raise self.missing(f"{row_id!r} means several {self.word}s: {some}", hint="Type more of the id.")
        return found[0]

    def _meant(self, text: str) -> Iterable[leases.Where]:
        """What a printable text may mean; the first that is there counts."""
        if text.isascii():
            yield self.table.c.id == text
            yield self.table.c.id.startswith(text, autoescape=True)

    def _rows(self, asked: leases.Where) -> Sequence[sa.RowMapping]:
        with self._read() as connection:
            return (
                connection.execute(
                    sa.select(self.table, now().label("clock"))
                    .where(asked)
                    .order_by(self.table.c.created_at.desc(), self.table.c.id.desc())
                    .limit(3)
                )
                .mappings()
                .all()
            )

    def _page(
        self, connection: sa.Connection, query: sa.Select[Any], after: str | None, limit: int
    ) -> tuple[list[sa.RowMapping], str | None]:
        """A page of the query's rows, newest first, and where the next begins; None if this is the last."""
        at = (self.table.c.created_at, self.table.c.id)
        if after is not None:
            query = query.where(sa.tuple_(*at) < sa.tuple_(*_cursor(after)))
        query = query.order_by(*(each.desc() for each in at)).limit(limit + 1)
        found = list(connection.execute(query).mappings())
        last = found[limit - 1] if len(found) > limit else None
        return found[:limit], None if last is None else f"{last['created_at']!r}:{last['id']}"

    def _in_state(self, connection: sa.Connection, state: str) -> sa.ColumnElement[bool]:
        """As reported: what runs without a process is interrupted."""
        running = self.table.c.state == "running"
        if state not in ("running", "interrupted"):
            return self.table.c.state == state
        lost = leases.is_lost(connection, self.table, running)
        if state == "running":
            return sa.and_(running, sa.not_(lost))
        return sa.or_(self.table.c.state == "interrupted", sa.and_(running, lost))

    def _read(self) -> sa.Connection:
        return self.engine.connect().execution_options(reading=True)


def _cursor(text: str) -> tuple[sa.ColumnElement[float], sa.ColumnElement[str]]:
    created_at, _, row_id = text.partition(":")
    try:
        at = float(created_at)
        if not math.isfinite(at):
            raise ValueError
    except ValueError:
        raise SpecError(f"--after takes the value printed at the end of the page before, not {text!r}") from None
    return sa.literal(at, sa.Double()), sa.literal(storable(row_id))
