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
from dataclasses import dataclass, field
from typing import Any

from tally.errors import ItemError
from tally.scorers.base import Result
from tally.sources.base import Chunk


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
