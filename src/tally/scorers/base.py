"""The scorer contract: what a model is to Tally.

A scorer loads its artifacts once per process and then scores batches. :meth:`Scorer.load`, :meth:`Scorer.score` and
:meth:`Scorer.respond` are called by one thread at a time; :meth:`Scorer.prepare` may run in several threads at once,
ahead of scoring.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

from tally.media.images import Decoding

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

Input: TypeAlias = Literal["image", "bytes", "path", "frame", "table"]
"""What one value handed to a scorer is.

image: ``uint8[height, width, 3]`` RGB, upright (EXIF orientation applied).
bytes: the file's content. path: a local ``pathlib.Path`` (downloaded first if the source is remote).
frame: as image, decoded from a video. table: a ``pyarrow.Table`` of all rows of the batch.
"""

Row: TypeAlias = Mapping[str, Any]
Result: TypeAlias = "Row | Sequence[Row] | np.ndarray[Any, Any] | Pictured | Thumbnailed | Exception"
"""One item's result: a row, several rows (or none), an image ``uint8[h, w, 3]`` or ``uint8[h, w]``, or an exception,
which makes that item dead and no other."""


@dataclass(frozen=True, slots=True)
class Pictured:
    """An image, and the rows that it shows."""

    picture: np.ndarray[Any, Any]
    rows: Sequence[Row]


class Thumbnail(NamedTuple):
    """A small picture of an item, as JPEG, and the width and height in pixels of the original, upright one."""

    jpeg: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Thumbnailed:
    """A result, and a small picture of the item that it is of; of jobs that keep such pictures."""

    result: Result
    thumbnail: Thumbnail


@dataclass(frozen=True, slots=True)
class TableResult:
    """The results of a table's rows as columns.

    rows: one row for each row of the batch, in the same order.
    errors: position in the batch to what went wrong there; the row at such a position is dropped.
    """

    rows: pa.Table
    errors: Mapping[int, Exception] = field(default_factory=dict)


Results: TypeAlias = "Sequence[Result] | pa.Table | TableResult"
"""What :meth:`Scorer.score` returns. Tables (one row for each item) are for scorers of tables."""


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a source, read and decoded.

    ``info`` says what the value does not: for images ``width`` and ``height``, the size in pixels of the original,
    upright image (the value may have been decoded at a reduced scale).
    """

    key: str
    value: Any
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Window:
    """Readings are aggregated over ``seconds`` each before they are scored; ``time`` is their column of timestamps.

    aggregate: what is made of each column (mean, min, max, last, std, median, p95), and count, the number of readings.
    timezone: whose days they are, if they are days; None: those of UTC.
    """

    time: str
    seconds: float
    aggregate: tuple[str, ...] = ("mean",)
    timezone: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request to a model, whichever server took it.

    method: in capitals. path: without the query. query: as sent, without the question mark (``a=1&b=2``).
    headers: name to value; of a header that was sent several times, the values joined with commas.
    """

    body: bytes = b""
    method: str = "POST"
    path: str = "/score"
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Response:
    """What a model answers. headers: name and value of each; a name may come several times."""

    status: int
    body: bytes
    headers: Sequence[tuple[str, str]] = ()


DEFINED_BY: WeakKeyDictionary[type[Scorer], bytes] = WeakKeyDictionary()
"""SHA-256 of the files that define scorers, as they were then; not in the classes, which are pickled with objects."""


class Scorer:
    """Subclass it and override :meth:`score`, and :meth:`load` if there is anything to load.

    Class attributes declare what a batch holds:

    input: see :data:`Input`.
    size: ``(width, height)`` in pixels that the scorer resizes to, or None. JPEGs are then decoded at a reduced scale
        that is still at least twice as large.
    batch_size: the most items that :meth:`score` is given at once.
    output: ``rows`` (mappings) or ``image`` (arrays, written as picture files).
    columns: column name to Arrow type name (``string``, ``int64``, ``float32`` ...), in order, so that
        every part of the result has one schema; None infers them.
    features: tables only, the columns to score: their names; a number n: the n numeric columns besides ``by`` and
        time; None: all columns.
    by: tables only, the columns whose values choose a model, where there is one model per key.
    window: tables only, how readings are aggregated first, unless the job says otherwise.
    assumed: one plain sentence for each thing that was taken for granted and came out only when the model was loaded or
        scored. The user is warned, and the job keeps it.
    classes: names of all classes in the model's order, known once it is loaded, where it tells classes apart.
    decoding: how pictures are decoded, where that is said.
    all_classes: set by an endpoint whose client wants the scores of all ``classes``: results are then
        ``{"scores": [...]}``, in their order.

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
    assumed: Sequence[str] = ()
    classes: Sequence[str] | None = None
    decoding: Decoding = Decoding()
    all_classes: bool = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Remembers the SHA-256 of the file that defines it: a file that changes later is not this class any more."""
        super().__init_subclass__(**arguments)
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        if isinstance(file, str) and not cls.__module__.startswith(("tally.", "__main__")):
            from tally.models.hashing import known_hash  # only where somebody defines one

            with suppress(OSError):
                DEFINED_BY[cls] = known_hash(Path(file))

    def assume(self, sentence: str) -> None:
        """Add a sentence to ``assumed``, once."""
        if sentence not in self.assumed:
            self.assumed = (*self.assumed, sentence)

    def missing_reason(self, key: Mapping[str, Any]) -> str | None:
        """Why there is no model for a key (column of ``by`` to value), or None where there is one.

        Asked before :meth:`load`, while a job is planned.
        """
        return None

    def load(self, artifacts: Path, device: str) -> None:
        """Load the model, once per process.

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
        ModelRefutedError says that the model is not what it was taken for, and ends the job.
        """
        raise TypeError(f"{type(self).__name__} must define score(batch)")

    def respond(self, request: Request) -> Response | None:
        """The answer to a request, where the model itself understands requests; or None.

        Of the others, the endpoint takes the items from the body, scores them, and writes the results as JSON.
        """
        return None

    def describe(self) -> str:
        """One line that says what was loaded and where it runs, shown when the job starts."""
        return type(self).__name__

    def close(self) -> None:
        """Release what :meth:`load` took."""
