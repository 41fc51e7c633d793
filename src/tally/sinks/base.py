"""The sink contract: where results go.

Workers write a chunk's results under names that carry the attempt's id. The coordinator commits one
attempt per chunk, and in the end assembles the committed ones into the final output. What a lost or late
attempt wrote is never read, and is swept away. The sink object is small and picklable.

Layout of an output folder while a job runs::

    out/_tally/job.json                 which job writes here
    out/_tally/attempts/<attempt>...    what attempts wrote

and when it is finished: the files that ``_manifest.json`` lists, ``_manifest.json``, ``_SUCCESS``.
A merged output (``out.csv``) has ``out.csv.tally/`` for the first, and ``out.csv.manifest.json`` beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import fields as fields_of
from typing import Any, Literal, Self

from tally.errors import ItemError, SpecError
from tally.scorers.base import Result
from tally.sources.base import Chunk, Source


@dataclass(frozen=True, slots=True)
class OutputDescription:
    """What an output is. Kept with its job, it is all that is needed to find, read or remove the results.

    kind: what the output holds. place: as :func:`tally.storage.normalised` writes it. merged: it is one file.
    format: of the files; None where each item's name says it.
    columns: of the rows besides the key, column name to Arrow type name; None where they are known only when rows are
        there; empty where the output holds no rows.
    order: a column that comes with the rows and is not written: it tells where in the source a row came from.
    options: what else the sink was told, JSON-able.
    """

    kind: Literal["rows", "images", "video"]
    place: str
    merged: bool = False
    format: str | None = None
    columns: Mapping[str, str] | None = None
    order: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-able. Columns are pairs: not every database keeps the order of an object's names."""
        return {
            **asdict(self),
            "columns": None if self.columns is None else [list(each) for each in self.columns.items()],
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_json`; other fields are passed over."""
        known = {each.name: fields[each.name] for each in fields_of(cls) if each.name in fields}
        columns = known.get("columns")
        return cls(**{**known, "columns": None if columns is None else dict(columns)})


@dataclass(frozen=True, slots=True)
class Output:
    """What one attempt wrote: JSON-able, kept in the job store when the attempt is committed.

    files: paths relative to the staging folder. rows, bytes: totals.
    facts: what the sink itself wants to know about these files when it assembles them.
    """

    files: list[str] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


class Writer(ABC):
    """Writes one attempt's results. Used by one thread."""

    @abstractmethod
    def add(
        self, keys: Sequence[str], results: Sequence[Result], info: Sequence[Mapping[str, Any]] | None = None
    ) -> list[tuple[int, ItemError]]:
        """Take the results of one batch (no exceptions among them).

        info: ``Batch.info`` of the same items: columns that stand between the key and the scorer's.
        Returns index and error of each that could not be written: those items are dead.
        """

    def add_table(self, keys: Any, rows: Any, info: Any | None = None) -> list[tuple[int, ItemError]]:
        """As :meth:`add`, of results that are columns: one row for each item.

        keys: a ``pyarrow.Array`` of strings. rows, info: ``pyarrow.Table``.
        """
        return self.add(keys.to_pylist(), rows.to_pylist(), None if info is None else info.to_pylist())

    @abstractmethod
    def close(self) -> Output:
        """Make everything durable, and say what was written."""

    @abstractmethod
    def abort(self) -> None:
        """Remove what was written; the attempt failed."""


class Sink(ABC):
    """Writes a chunk's results, finalizes the whole."""

    @abstractmethod
    def describe(self) -> OutputDescription:
        """What the output is. :func:`tally.sinks.factory.reopen` makes an equal sink of it."""

    @property
    def place(self) -> str:
        """Where the output is, for people and for looking it up: :attr:`OutputDescription.place`."""
        return self.describe().place

    @property
    def work(self) -> str | None:
        """A folder (path or URL) that is the job's own until it ends, for what a source has to prepare, say; None if
        the output has no room for that."""
        return None

    @property
    def rolling(self) -> bool:
        """Whether results can be published before the job ends: see :meth:`publish`."""
        return False

    def check(self, source: Source) -> None:
        """Before a job begins: raises SpecError where the source's results cannot be written here."""
        if not source.bounded and not self.rolling:
            raise SpecError(
                f"the source has no end, and {self.place} can only be written when a job ends",
                hint="Give a folder for rows or pictures: --out results/",
            )

    @abstractmethod
    def claim(self, job_id: str, *, overwrite: bool = False) -> None:
        """Take the output place for this job, or find that it already has it.

        overwrite: remove what an earlier, finished Tally job wrote there (only what its manifest lists).
        Raises OutputExistsError when somebody else's files or another job are there, StorageError when
        it cannot be written to.
        """

    @abstractmethod
    def holder(self) -> str | None:
        """Id of the job whose claim or finished manifest is at the output place; None if there is none."""

    @abstractmethod
    def manifest(self) -> dict[str, Any] | None:
        """The manifest at the output place as it was published last; None while there is none."""

    @abstractmethod
    def open(self, attempt: str, chunk: Chunk) -> Writer:
        """Start writing the results of one attempt at a chunk (in a worker)."""

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
        manifest: facts about the job; ``generation`` in it counts how often the job was opened again
        (``jobs retry``): results of earlier generations are kept and added to.
        confirm: called before each step that changes what others see; raises if the output is not ours any more.
        Writes ``_manifest.json``, then ``_SUCCESS``, then removes the staging folder. Repeating it after
        a crash at any point gives the same files. Returns the manifest as written, with ``files``.
        """

    def publish(
        self,
        outputs: Iterable[Output],
        dead: Iterable[dict[str, Any]],
        manifest: dict[str, Any],
        *,
        confirm: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Publish a generation while the job goes on, as :meth:`finalize` would; only if :attr:`rolling`.

        The claim stays, attempts in flight are left alone, and ``_SUCCESS`` is not written: readers trust
        ``_manifest.json``. Each generation adds to those before it; :meth:`finalize` adds the last and ends the job.
        outputs: of this generation only. Which those are has to be settled before: after a crash, the same are given
        again, and what has been published is not published twice.
        """
        raise SpecError(f"{self.place} can only be written when the job ends")

    @abstractmethod
    def release(self) -> None:
        """Remove staging files and the claim: the job is deleted or cancelled for good."""

    @abstractmethod
    def withdraw(self) -> None:
        """The job is another coordinator's by now, and this one's workers have ended.

        If the output is finished, remove what they staged since; else finalizing will.
        """

    @abstractmethod
    def committed(self, outputs: Iterable[Output]) -> tuple[str, list[str]]:
        """Where rows can be read now: format (``parquet``, ``csv``, ``jsonl``) and local paths or URLs,
        from the final files if the job is finished, else from the attempts committed so far."""
