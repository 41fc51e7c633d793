"""Scorers that are functions, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from tally.scorers.base import Result, Results, Scorer, TableResult


class Given(Scorer):
    """Scores with a function, and keeps the batches that it was given."""

    def __init__(self, function: Callable[[Any], Any], batch_size: int = 4) -> None:
        self.function, self.batch_size = function, batch_size
        self.batches: list[Any] = []

    def score(self, batch: Any) -> Results:
        self.batches.append(batch)
        result: Results = self.function(batch)
        return result


def rows(batch: Sequence[Any]) -> list[Result]:
    return [{"value": value} for value in batch]


def refusing(*bad: Any) -> Callable[[Any], list[Result]]:
    """Raises as soon as one of the bad values is in the batch."""

    def function(batch: Any) -> list[Result]:
        for value in batch:
            if value in bad:
                raise ValueError(f"cannot score {value}")
        return rows(batch)

    return function


def flagging(*bad: int) -> Callable[[pa.Table], TableResult]:
    """Rows as columns; those of the given numbers fail."""

    def function(table: pa.Table) -> TableResult:
        numbers = table.column("n").to_pylist()
        errors = {at: ValueError(f"cannot score {n}") for at, n in enumerate(numbers) if n in bad}
        return TableResult(table.append_column("double", pa.array([2 * n for n in numbers])), errors)

    return function
