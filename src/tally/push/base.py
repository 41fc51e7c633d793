"""The receiver contract: who gets a job's rows as they are committed.

Rows travel in *parcels*: what one attempt at a chunk gave. A parcel is delivered at least once. It carries a name, and
each item its key, by which a receiver recognises what it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

KEY = "key"
"""The column of a parcel's rows that says whose they are."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Rows to deliver.

    name: no other parcel has it, and it is the same however often it is tried.
    keys: of all items that were scored, also of those that gave no row. rows: ``key``, then the results' columns.
    info: by key, columns of the results that are known of an item without a row, too.
    """

    name: str
    keys: Sequence[str]
    rows: pa.Table
    info: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An item that the receiver does not take, and never will as it is."""

    key: str
    reason: str


class Receiver(ABC):
    """Used by one thread."""

    def check(self, schema: pa.Schema | None, *, begun: bool) -> None:  # noqa: B027 - most have nothing to look at
        """Look whether rows can be delivered, before any are scored. Called once, before :meth:`deliver`.

        schema: of the rows, with ``key``; None where that is not known before. begun: whether items of the
        job have arrived before. Raises as :meth:`deliver`.
        """

    @abstractmethod
    def deliver(self, parcel: Parcel, *, confirm: Callable[[], None] = lambda: None) -> list[Refusal]:
        """Deliver a parcel; may be repeated. Returns the items that were refused: all others have arrived.

        confirm: called before others can see the rows, where that can be told; raises if the job is no longer ours.
        Raises StorageAwayError where the receiver does not answer, or not now; StorageError where it takes nothing at
        all: there is no such table, say, or the key is not accepted.
        """

    def deliver_all(
        self, parcels: Callable[[], Iterable[Parcel]], *, confirm: Callable[[], None] = lambda: None
    ) -> None:
        """Deliver all parcels of a job so that others see all of their rows at once, or none; may be repeated.

        parcels: gives them, from the first on, each time it is called. Raises as :meth:`deliver`, and StorageError if
        one item is refused. Only where :class:`Push` says that it is possible.
        """
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Give back connections. Idempotent."""
