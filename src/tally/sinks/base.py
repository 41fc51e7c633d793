"""The sink contract: where results go.

Workers write a chunk's results under names that carry the attempt's id. The coordinator commits one
attempt per chunk, and in the end assembles the committed ones into the final output. The files of lost and late
attempts are never read, and are removed. The sink object is small and picklable.

Layout of an output folder while a job runs::

    out/_tally/job.json                 which job writes here
    out/_tally/attempts/<attempt>...    what attempts wrote

and when it is finished: the files that ``_manifest.json`` lists, ``_manifest.json``, ``_SUCCESS``.
A merged output (``out.csv``) has ``out.csv.tally/`` for the first, and ``out.csv.manifest.json`` beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from tally.errors import ItemError, SpecError
from tally.scorers.base import Result, Thumbnail
from tally.sources.base import Chunk, Source

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class OutputDescription:
    """What an output is. It is kept with the job: finding, reading and removing the results takes nothing else.

    kind: what the output holds. place: in the form of :func:`tally.storage.normalised`.
    merged: whether it is one file; None if the end of ``place`` tells (as earlier versions kept it).
    format: of the files; None if each item's name tells.
    columns: of the rows, without the key: column name to Arrow type name. None if they are inferred from the rows;
        empty if the output holds no rows.
    order: a column that comes with the rows and is not written: their position in the source.
    options: the sink's other options, JSON-able.
    """

    kind: Literal["rows", "images", "video"]
    place: str
    merged: bool | None = False
    format: str | None = None
    columns: Mapping[str, str] | None = None
    order: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The description as JSON. Columns keep their order."""
        return asdict(self)

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`. What else is there is passed over."""
        known = {each.name for each in fields(cls)}
        return cls(**{"merged": None, **{name: value for name, value in description.items() if name in known}})


@dataclass(frozen=True, slots=True)
class Output:
    """What one attempt wrote: JSON-able, kept in the job store when the attempt is committed.

    files: paths relative to the staging folder. rows, bytes: totals.
    facts: what the sink itself needs to assemble these files.
    """

    files: list[str] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


THUMBNAILS = "thumbnails"
"""The one of :attr:`Output.facts` that lists what an attempt has staged of thumbnails: names, rows and bytes."""


class Writer(ABC):
    """Writes one attempt's results. Used by one thread."""

    @abstractmethod
    def add(
        self, keys: Sequence[str], results: Sequence[Result], info: Sequence[Mapping[str, Any]] | None = None
    ) -> list[tuple[int, ItemError]]:
        """Take the results of one batch (no exceptions among them).

        info: ``Batch.info`` of the same items: columns between the key and those of the scorer.
        Returns index and error of each that could not be written: those items are dead.
        """

    def add_table(self, keys: Any, rows: Any, info: Any | None = None) -> list[tuple[int, ItemError]]:
        """As :meth:`add`, for results as columns, with one row for each item.

        keys: a ``pyarrow.Array`` of strings. rows, info: ``pyarrow.Table``.
        """
        return self.add(keys.to_pylist(), rows.to_pylist(), None if info is None else info.to_pylist())

    def add_rows(self, keys: Any, results: Sequence[Result], info: Any | None = None) -> list[tuple[int, ItemError]]:
        """As :meth:`add`, for results one by one of items that are rows of a table.

        keys: a ``pyarrow.Array`` of strings. info: a ``pyarrow.Table``, whose types the rows keep.
        """
        return self.add(keys.to_pylist(), results, None if info is None else info.to_pylist())

    @abstractmethod
    def close(self) -> Output:
        """Make everything durable. Returns what was written."""

    @abstractmethod
    def abort(self) -> None:
        """Remove what was written: the attempt failed."""


class Sink(ABC):
    """Writes a chunk's results, finalizes the whole.

    log: a file of this machine that is one of the output's when it is published.
    """

    log: Path | None = None

    @abstractmethod
    def describe(self) -> OutputDescription:
        """What the output is. :func:`tally.sinks.factory.reopen` makes an equal sink from it."""

    @property
    def place(self) -> str:
        """Where the output is: :attr:`OutputDescription.place`."""
        return self.describe().place

    @property
    def work(self) -> str | None:
        """Path or URL of a folder that belongs to the job until it ends, for a source's work files, say. None if the
        output has no such folder."""
        return None

    @property
    def rolling(self) -> bool:
        """Whether results can be published before the job ends: see :meth:`publish`."""
        return False

    def check(self, source: Source) -> None:
        """Before a job begins: raises SpecError if the results of this source cannot be written here."""
        if not source.bounded and not self.rolling:
            raise SpecError(
                f"the source has no end, and {self.place} can only be written when a job ends",
                hint="Give a folder for rows or pictures: --out results/",
            )

    @abstractmethod
    def claim(self, job_id: str, *, overwrite: bool = False) -> None:
        """Reserve the output place for this job. The job may have it already.

        overwrite: remove the results of an earlier, finished job there: the files that its manifest lists.
        Raises OutputExistsError if other files or another job are there, StorageError if it cannot be written to.
        """

    @abstractmethod
    def holder(self) -> str | None:
        """Id of the job whose claim or manifest is at the output place; None if there is none."""

    def read(self, name: str) -> bytes:
        """The content of a file that the manifest names. Raises FileNotFoundError."""
        raise FileNotFoundError(name)

    @abstractmethod
    def manifest(self) -> dict[str, Any] | None:
        """The manifest at the output place, as published last; None while there is none."""

    @property
    def claimed(self) -> bool:
        """Whether a job is writing there, or has begun to and was not finished: :meth:`holder` is that job."""
        return self.holder() is not None and self.manifest() is None

    @property
    def publishing(self) -> bool:
        """Whether it has begun to publish a generation, and was stopped before the end: :meth:`finalize` goes on."""
        return False

    @abstractmethod
    def open(self, attempt: str, chunk: Chunk) -> Writer:
        """Start writing the results of one attempt at a chunk, in a worker."""

    @abstractmethod
    def finalize(
        self,
        outputs: Iterable[Output],
        dead: Iterable[dict[str, Any]],
        manifest: dict[str, Any],
        *,
        confirm: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Assemble the committed outputs, in the order given, into the final files.

        dead: rows ``key, stage, error`` of the dead items, written beside the results.
        manifest: facts about the job. Its ``generation`` counts how often results were published before; they are
        kept, and these are added.
        confirm: called before each step that others see; raises if the output is no longer ours.
        Writes ``_manifest.json``, then ``_SUCCESS``, then removes the staging folder. Repeated after a crash at any
        point, it gives the same files. Returns the manifest as written, with ``files``.
        """

    def publish(
        self,
        outputs: Iterable[Output],
        dead: Iterable[dict[str, Any]],
        manifest: dict[str, Any],
        *,
        confirm: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Publish a generation of results while the job goes on. Only if :attr:`rolling`.

        As :meth:`finalize`, but the claim stays, attempts in flight are left alone, and ``_SUCCESS`` is not written:
        readers trust ``_manifest.json``. Each generation adds to those before it; :meth:`finalize` adds the last one.
        outputs: those of this generation. They must be settled before the first call: a generation that is published
        is not published again, whatever is given.
        """
        raise SpecError(f"{self.place} can only be written when the job ends")

    @abstractmethod
    def release(self) -> None:
        """Remove staging files and the claim: the job was deleted or cancelled, or what it was to add came to nothing.

        What is published stays."""

    @abstractmethod
    def withdraw(self) -> None:
        """Another coordinator has the job by now, and this one's workers have ended.

        If the output is finished, remove what they have staged since. Otherwise, finalizing will.
        """

    def thumbnails_of(self, outputs: Iterable[Output], keys: Collection[str]) -> Mapping[str, Thumbnail]:
        """The small pictures of these items, by key: of those that have one, and whose results are published or among
        ``outputs``. Raises StorageError, SourceNotFoundError."""
        return {}

    def staged_rows(self, output: Output) -> Iterator[pa.Table]:
        """The rows of a committed output that is not published yet, ``key`` first. Raises SpecError if it has none."""
        raise SpecError(f"{self.place} holds no rows that could be pushed")

    @abstractmethod
    def committed(self, outputs: Iterable[Output]) -> tuple[str, list[str]]:
        """Where rows can be read now: format (``parquet``, ``csv``, ``jsonl``) and local paths or URLs of the final
        files, and of what was committed since."""
