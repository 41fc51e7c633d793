"""Scoring without a job."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.given import Given, refusing, rows

from tally.errors import ItemError, TallyError
from tally.scorers.base import Result, Scorer
from tally.scorers.run import score


def scored(scorer: Scorer, values: Any, count: int) -> list[Any]:
    """The results one by one."""
    return [result for part in score(scorer, values, count) for result in part.to_list()]


# score() ---------------------------------------------------------------------------------------------


def test_a_good_batch_is_scored_once() -> None:
    scorer = Given(rows)
    assert scored(scorer, [1, 2, 3], 3) == [{"value": 1}, {"value": 2}, {"value": 3}]
    assert scorer.batches == [[1, 2, 3]]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("bad", [(0,), (1,), (6,), (0, 5, 6), tuple(range(16))])
def test_halving_finds_the_items_that_raise_alone(count: int, bad: tuple[int, ...]) -> None:
    results = scored(Given(refusing(*bad)), list(range(count)), count)
    assert len(results) == count
    for value, result in enumerate(results):
        if value in bad:
            assert isinstance(result, ItemError)
            assert re.fullmatch(rf"ValueError: cannot score {value} \(given\.py, line \d+\)", str(result))
            assert result.__traceback__ is None  # its frames would keep the batch alive
        else:
            assert result == {"value": value}


def test_halving_takes_few_calls() -> None:
    scorer = Given(refusing(11))
    scored(scorer, list(range(16)), 16)
    assert [len(batch) for batch in scorer.batches] == [16, 8, 8, 4, 2, 2, 1, 1, 4]


def test_arrays_and_tables_are_halved_too() -> None:
    def function(table: pa.Table) -> list[Result]:
        return refusing(3)(table.column("n").to_pylist())

    array = np.arange(8)
    for scorer, values in ((Given(refusing(3)), array), (Given(function), pa.table({"n": array}))):
        results = scored(scorer, values, 8)
        assert [n for n, result in enumerate(results) if isinstance(result, ItemError)] == [3]
        assert [result["value"] for result in results if not isinstance(result, ItemError)] == [0, 1, 2, 4, 5, 6, 7]


def test_running_out_of_memory_is_halved_too() -> None:
    def function(batch: list[int]) -> list[Result]:
        if len(batch) > 2:
            raise MemoryError
        return rows(batch)

    assert scored(Given(function), [1, 2, 3, 4], 4) == rows([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        ([], "0 results for 2 items"),
        ([{}], "1 results for 2 items"),
        ([{}] * 3, "3 results for 2 items"),
        (None, "NoneType, not a sequence"),
        (7, "int, not a sequence"),
        ({"label": "cat", "score": 1.0}, "dict, not a sequence"),
        ("ab", "str, not a sequence"),
        (b"ab", "bytes, not a sequence"),
        (iter([{}, {}]), "list_iterator, not a sequence"),
    ],
)
def test_what_is_not_one_result_per_item_stops_the_chunk(returned: Any, what: str) -> None:
    scorer = Given(lambda batch: returned)
    with pytest.raises(TallyError, match=f"Given.score returned {what}"):
        scored(scorer, [1, 2], 2)
    assert len(scorer.batches) == 1


def test_a_table_as_the_result_stays_one() -> None:
    [part] = score(Given(lambda table: table), pa.table({"n": [1, 2]}), 2)
    assert (part.count, part.results.to_pydict(), part.errors) == (2, {"n": [1, 2]}, {})


def test_a_table_of_the_wrong_length_stops_the_chunk() -> None:
    with pytest.raises(TallyError, match="returned 1 results for 2 items"):
        scored(Given(lambda table: table[:1]), pa.table({"n": [1, 2]}), 2)
