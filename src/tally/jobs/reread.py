"""A batch read again, for a scorer that raised: nobody knows what it did to the values that it was given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tally.errors import ItemError
from tally.scorers.base import Scorer
from tally.scorers.run import copied
from tally.sources.base import Batch, Chunk, Source, Timings


class Reread:
    """Parts of a batch as they were before they were scored; see :data:`tally.scorers.run.Anew`.

    The batch is read once more, and each part is a copy of what was read. What cannot be copied is read for each part;
    so are files whose paths the scorer is given: it may have changed those too.
    """

    def __init__(self, source: Source, chunk: Chunk, scorer: Scorer, batch: Batch, timings: Timings) -> None:
        self._source, self._chunk, self._scorer, self._timings = source, chunk, scorer, timings
        self.batch, self._positions = batch, batch.positions
        self._kept: Any = None
        self._copies = scorer.input != "path"

    @contextmanager
    def __call__(self, start: int, stop: int) -> Iterator[Any]:
        values = self._copy(start, stop) if self._copies else None
        if values is not None:
            yield values
            return
        with self._read(start, stop) as values:
            yield values

    def _copy(self, start: int, stop: int) -> Any | None:
        try:
            if self._kept is None:
                with self._read(0, len(self._positions)) as values:
                    self._kept = values
            return copied(self._kept, start, stop)
        except Exception:  # one of them can no longer be had, or is of a class that cannot be copied
            self._copies, self._kept = False, None
            return None

    @contextmanager
    def _read(self, start: int, stop: int) -> Iterator[Any]:
        wanted = [int(position) for position in self._positions[start:stop]]
        first = wanted[0]
        part = self._source.slice(self._chunk, first, wanted[-1] + 1)
        batches = self._source.read(part, self._scorer, self._timings)
        try:
            batch = next(batches)  # as many items as one batch holds, at most
            place = {first + int(position): place for place, position in enumerate(batch.positions)}
            errors = {first + position: error for position, error in batch.dead}
            for position in wanted:
                if position not in place:
                    raise errors.get(position) or ItemError("it is no longer there", stage="read")
            yield select(batch.values, [place[position] for position in wanted])
        finally:
            batches.close()  # type: ignore[attr-defined]


def select(values: Any, indices: Sequence[int]) -> Any:
    """Some of a sequence's, an Arrow array's or a table's values."""
    return values.take(list(indices)) if hasattr(values, "take") else [values[index] for index in indices]
