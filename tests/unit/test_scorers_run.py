"""Scoring without a job."""

from __future__ import annotations

import asyncio
import io
import re
import signal
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from tests.given import Given, flagging, refusing, rows

from tally.errors import ItemError, SpecError, TallyError
from tally.scorers.base import Input, Item, Pictured, Result, Scorer
from tally.scorers.run import configured, copies_of, run, score


def scored(scorer: Scorer, values: Any, count: int) -> list[Any]:
    """The results one by one."""
    return [result for part in score(scorer, values, count, copies_of(values)) for result in part.to_list()]


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
    table = pa.table({"n": [1, 2]})
    [part] = score(Given(lambda table: table), table, 2, copies_of(table))
    assert (part.count, part.results.to_pydict(), part.errors) == (2, {"n": [1, 2]}, {})


def test_a_table_of_the_wrong_length_stops_the_chunk() -> None:
    with pytest.raises(TallyError, match="returned 1 results for 2 items"):
        scored(Given(lambda table: table[:1]), pa.table({"n": [1, 2]}), 2)


# run() -------------------------------------------------------------------------------------------------


class Seen(Given):
    """Gives what it was handed as its result."""

    def __init__(self, input: Input, function: Any = None, batch_size: int = 4) -> None:  # noqa: A002
        super().__init__(function or (lambda batch: [{"value": value} for value in batch]), batch_size)
        self.input = input

    def prepare(self, item: Item) -> Any:
        if item.key == "refused":
            raise ItemError("too dark", hint="use a lamp")
        if item.key == "broken":
            raise ValueError("a\n b")
        return item.value


def png(red: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 2), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def outcome(result: Any) -> Any:
    return (result.stage, str(result)) if isinstance(result, ItemError) else result["value"]


def test_a_batch_is_as_large_as_the_scorer_says_and_holds_no_item_that_failed_before() -> None:
    scorer = Seen("bytes", batch_size=3)
    items = [Item(key, key.encode()) for key in ("a", "refused", "b", "c", "broken", "d", "e")]
    results = [outcome(result) for result in run(scorer, items)]
    assert scorer.batches == [[b"a", b"b"], [b"c", b"d"], [b"e"]]
    assert results == [
        b"a",
        ("prepare", "too dark\n  use a lamp"),
        b"b",
        b"c",
        ("prepare", "ValueError: a b"),
        b"d",
        b"e",
    ]
    assert run(scorer, [Item("refused", b"")] * 2)[1].stage == "prepare"  # type: ignore[union-attr]
    assert run(scorer, []) == []


def test_pictures_come_as_files_contents_or_arrays(tmp_path: Path) -> None:
    (tmp_path / "5.png").write_bytes(png(5))
    seen: list[Item] = []

    class Small(Scorer):
        def prepare(self, item: Item) -> Any:
            seen.append(item)
            return int(item.value[0, 0, 0])

        def score(self, batch: Any) -> Any:
            return [{"value": value} for value in batch]

    array = np.full((2, 4, 3), 7, np.uint8)
    given = [png(1), bytearray(png(2)), memoryview(png(3)), tmp_path / "5.png", array, Item("k", png(8), {"frame": 3})]
    assert [outcome(result) for result in run(Small(), given)] == [1, 2, 3, 5, 7, 8]
    size = {"width": 4, "height": 2}
    assert [item.key for item in seen] == ["0", "1", "2", "3", "4", "k"]
    assert [item.info for item in seen] == [size, size, size, size, {}, {**size, "frame": 3}]


@pytest.mark.parametrize(
    ("input", "value", "error"),
    [
        ("image", "a.png", ("prepare", "Seen takes a picture: a file's content, or uint8[height, width, 3], not str")),
        ("image", np.zeros((2, 2), np.uint8), ("prepare", "or uint8[height, width, 3], not uint8[2, 2]")),
        ("frame", np.zeros((2, 2, 4), np.uint8), ("prepare", "not uint8[2, 2, 4]")),
        ("image", b"", ("decode", "the file is empty (0 bytes)")),
        ("bytes", "text", ("prepare", "Seen takes a file's content (bytes), not str")),
        ("bytes", Path("/nowhere/a"), ("read", "cannot read /nowhere/a: No such file or directory")),
        ("path", 7, ("prepare", "Seen takes the path of a file, not int")),
    ],
)
def test_a_value_that_does_not_fit_fails_alone(input: Input, value: Any, error: tuple[str, str]) -> None:  # noqa: A002
    good = {"bytes": b"x", "path": Path("/x")}.get(input, np.zeros((1, 1, 3), np.uint8))
    first, found, last = run(Seen(input), [good, value, good])
    assert isinstance(found, ItemError)
    assert (found.stage, found.message[-len(error[1]) :]) == error
    for each in (first, last):
        np.testing.assert_array_equal(outcome(each), good)


def test_contents_are_files_for_a_scorer_of_paths_while_they_are_scored(tmp_path: Path) -> None:
    def read(batch: list[Any]) -> list[Result]:
        return [{"value": (str(path), Path(path).name, Path(path).read_bytes())} for path in batch]

    (tmp_path / "there").write_bytes(b"4")
    keys = ("in/a.jpg", "other/a.jpg", "..", "", "nul\0.png")
    items = [*(Item(key, str(at).encode()) for at, key in enumerate(keys)), str(tmp_path / "there")]
    results = [outcome(result) for result in run(Seen("path", read, batch_size=6), items)]
    assert [(name, content) for _, name, content in results] == [
        ("a.jpg", b"0"),
        ("a.jpg", b"1"),
        ("item", b"2"),
        ("item", b"3"),
        ("nul.png", b"4"),
        ("there", b"4"),
    ]
    assert [Path(path).exists() for path, _, _ in results] == [False] * 5 + [True]


TABLE = pa.table({"extra": [0, 0, 0], "b": [1, 2, 3], "Device": ["p", "q", "r"], "a": [4, 5, 6]})


@pytest.mark.parametrize(
    ("by", "features", "columns"),
    [
        ((), None, ["extra", "b", "Device", "a"]),
        ((), ["a", "b"], ["a", "b"]),
        (("Device",), ["a"], ["Device", "a"]),
        (("Device",), 3, ["Device", "extra", "b", "a"]),
        (("Device",), None, ["Device", "extra", "b", "a"]),
    ],
)
def test_a_table_is_cut_to_the_columns_that_the_scorer_takes(by: Any, features: Any, columns: list[str]) -> None:
    scorer = Seen("table", lambda table: table, batch_size=2)
    scorer.by, scorer.features = by, features
    assert run(scorer, TABLE) == TABLE.select(columns).to_pylist()
    assert [batch.num_rows for batch in scorer.batches] == [2, 1]


def test_a_table_without_the_columns_is_refused() -> None:
    scorer = Seen("table")
    scorer.features = ["a", "c", "Devize"]
    with pytest.raises(SpecError, match=r"column 'c'.*\n.*'Devize'; did you mean 'Device'\?\n  There are extra, b"):
        run(scorer, TABLE)
    scorer.features = 2
    with pytest.raises(SpecError, match="the model takes 2 columns, and there are 4: extra, b, Device, a"):
        run(scorer, TABLE)
    with pytest.raises(SpecError, match=r"Seen takes a pyarrow.Table, not list"):
        run(scorer, [{"a": 1}])


def test_rows_that_fail_are_errors_at_their_places() -> None:
    scorer = Seen("table", flagging(1, 4), batch_size=4)
    results = run(scorer, pa.table({"n": range(6)}))
    assert [str(result) if isinstance(result, ItemError) else result["double"] for result in results] == [
        0,
        "ValueError: cannot score 1",
        4,
        6,
        "ValueError: cannot score 4",
        10,
    ]


# configured() ------------------------------------------------------------------------------------------


def test_a_scorer_is_made_as_it_is_asked_for() -> None:
    scorer = Given(lambda batch: [{"label": "cat"}] * len(batch))
    assert configured(scorer) is scorer
    assert scorer.batch_size == 4
    drawn = configured(scorer, overlay=True, batch_size=2)
    assert (drawn.output, drawn.batch_size, scorer.batch_size) == ("image", 2, 2)
    [drawn_one] = run(drawn, [png(9)])
    assert isinstance(drawn_one, Pictured)
    assert drawn_one.picture.shape == (2, 4, 3)
    with pytest.raises(SpecError, match="overlay"):
        configured(Seen("bytes"), overlay=True)


# whatever is raised ------------------------------------------------------------------------------------


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Crooked(list[Any]):
    def __iter__(self) -> Any:
        raise SystemExit("no way through")


RAISED = [
    SystemExit(0),
    KeyboardInterrupt(),
    GeneratorExit(),
    asyncio.CancelledError(),
    CancelledError(),
    BaseException("base"),
    BaseExceptionGroup("g", [KeyboardInterrupt()]),
    StopIteration(),
    Speechless(),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["prepare", "score", "result"])
def test_whatever_one_item_raises_costs_that_item(error: BaseException, where: str) -> None:
    class Raising(Scorer):
        input = "bytes"

        def prepare(self, item: Item) -> Any:
            if where == "prepare" and item.value == b"bad":
                raise error
            return item.value

        def score(self, batch: Any) -> Any:
            if where == "score" and b"bad" in batch:
                raise error
            return [error if where == "result" and value == b"bad" else {"value": value} for value in batch]

    # In a thread, as in a worker: there it cannot be Ctrl-C.
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(run, Raising(), [b"a", b"bad", b"c"]).result()
    assert [outcome(each) for each in (found[0], found[2])] == [b"a", b"c"]
    assert isinstance(found[1], ItemError)
    assert type(error).__name__ in str(found[1])
    assert found[1].stage == ("prepare" if where == "prepare" else "score")


def test_ctrl_c_ends_scoring_and_not_an_item() -> None:
    def interrupted(batch: Any) -> Any:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(Seen("bytes", interrupted), [b"a"])


def test_results_that_cannot_be_gone_through_are_halved() -> None:
    def function(batch: Any) -> Any:
        return Crooked({"value": each} for each in batch) if b"bad" in batch else rows(batch)

    class Strange(Sequence[Any]):
        def __init__(self, batch: Any) -> None:
            self.batch = batch

        def __len__(self) -> int:
            return len(self.batch)

        def __getitem__(self, index: Any) -> Any:
            if self.batch[index] == b"bad":
                raise KeyError(index)
            return {"value": self.batch[index]}

    for each in (function, Strange):
        found = run(Seen("bytes", each), [b"a", b"bad", b"c"])
        assert [isinstance(result, ItemError) for result in found] == [False, True, False]
