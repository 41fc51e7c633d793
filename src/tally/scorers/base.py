"""The scorer contract: what a model is to Tally.

A scorer loads its artifacts once per worker and then scores batches. It is created in the worker
process, used by one thread at a time in :meth:`Scorer.load` and :meth:`Scorer.score`, while
:meth:`Scorer.prepare` may run in several threads at once, ahead of scoring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

Input: TypeAlias = Literal["image", "bytes", "path", "frame", "table"]
"""What one value handed to a scorer is.

image: ``uint8[height, width, 3]`` RGB, upright (EXIF orientation applied).
bytes: the file's content. path: a local ``pathlib.Path`` (fetched first if the source is remote).
frame: as image, decoded from a video. table: a ``pyarrow.Table`` of all rows of the batch.
"""

Row: TypeAlias = Mapping[str, Any]
Result: TypeAlias = "Row | Sequence[Row] | np.ndarray[Any, Any] | Exception"
"""One item's result: a row, several rows (none is fine too), an image ``uint8[h, w, 3]`` or
``uint8[h, w]``, or an exception, which makes that item dead and no other."""


@dataclass(frozen=True, slots=True)
class TableResult:
    """The results of a table's rows as columns.

    rows: one row for each row of the batch, in the same order.
    errors: position in the batch to what went wrong there; what ``rows`` holds at such a position is dropped.
    """

    rows: pa.Table
    errors: Mapping[int, Exception] = field(default_factory=dict)


Results: TypeAlias = "Sequence[Result] | pa.Table | TableResult"
"""What :meth:`Scorer.score` returns. Tables (one row for each item) are for scorers of tables."""


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a source, read and decoded.

    ``info`` tells what the value itself does not: for images ``width`` and ``height``, the size in
    pixels of the original, upright image (the value may have been decoded at a reduced scale).
    """

    key: str
    value: Any
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Window:
    """Readings are gathered over ``seconds`` each before they are scored; ``time`` is their column of timestamps.

    aggregate: what is made of each column: mean, min, max, last, or count of all.
    """

    time: str
    seconds: float
    aggregate: tuple[str, ...] = ("mean",)


class Scorer:
    """Subclass it and override :meth:`score`, and :meth:`load` if there is anything to load.

    Class attributes declare what a batch holds:

    input: see :data:`Input`.
    size: ``(width, height)`` in pixels that the scorer is going to resize to, or None. JPEGs are then
        decoded at a reduced scale that is still at least twice as large.
    batch_size: how many items :meth:`score` is given at most.
    output: ``rows`` (mappings) or ``image`` (arrays, written as picture files).
    columns: column name to Arrow type name (``string``, ``int64``, ``float32`` ...), in order, so that
        every part of the result has one schema; None infers them.
    features: of tables, the columns wanted: their names; a number n: the n numeric columns that there are besides
        ``by`` and time; None: all columns.
    by: of tables, the columns whose values choose a model, where there is one model for each key.
    window: of tables, what readings are gathered over first, unless the job says otherwise.

    The table handed to :meth:`score` has the columns ``by``, then the features in order, and no others.
    """

    input: Input = "image"
    size: tuple[int, int] | None = None
    batch_size: int = 16
    output: Literal["rows", "image"] = "rows"
    columns: Mapping[str, str] | None = None
    features: Sequence[str] | int | None = None
    by: Sequence[str] = ()
    window: Window | None = None

    def missing_reason(self, key: Mapping[str, Any]) -> str | None:
        """Why there is no model for a key (column of ``by`` to value), or None where there is one.

        Asked before :meth:`load`, while a job is planned.
        """
        return None

    def load(self, artifacts: Path, device: str) -> None:
        """Load the model once per worker.

        artifacts: the model package's folder (or the folder given with ``--artifacts``).
        device: ``auto`` (the best there is), ``cpu``, ``cuda``, ``cuda:N``, ``tensorrt`` or ``tensorrt:N``.
        Raises ModelLoadError when the model cannot be used; the job then stops before any item is lost.
        """

    def prepare(self, item: Item) -> Any:
        """Turn one item into what :meth:`score` wants. Runs ahead of scoring, in several threads.

        An exception makes this item dead, and no other.
        """
        return item.value

    def score(self, batch: Any) -> Results:
        """Score a batch of prepared values (a sequence; for ``table``, a ``pyarrow.Table``): one result per item, in
        the same order.

        When this raises, the batch is halved until the items that raise alone are found: those are dead.
        """
        raise TypeError(f"{type(self).__name__} must define score(batch)")

    def describe(self) -> str:
        """One line on what was loaded and where it runs, shown to the user when the job starts."""
        return type(self).__name__

    def close(self) -> None:
        """Release what :meth:`load` took."""
