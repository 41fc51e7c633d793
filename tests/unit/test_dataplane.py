"""The data plane without sockets: batches, order, items that fail, calls that nobody waits for."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pytest

from tally.errors import ModelRefutedError
from tally.scorers.base import Request, Response, Scorer

pytest.importorskip("msgspec")
from tally.serving.dataplane import ABANDONED, DataPlane
from tally.serving.messages import Answer, Batch, Call


class Echo(Scorer):
    """Remembers its batches. gate: scoring waits for it."""

    input = "bytes"
    batch_size = 4

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Semaphore(0)

    def score(self, batch: Any) -> Any:
        self.began.release()
        assert self.gate.wait(30)
        self.batches.append(list(batch))
        if b"bad" in batch:
            raise ValueError("a bad item")
        return [{"text": each.decode()} for each in batch]


class Sums(Scorer):
    input = "table"
    features = ("a", "b")
    batch_size = 100
    tables: list[int] = []  # noqa: RUF012

    def score(self, batch: pa.Table) -> Any:
        self.tables.append(batch.num_rows)
        return pa.table({"sum": [x + y for x, y in zip(*batch.to_pydict().values(), strict=True)]})


class Plane:
    """A data plane that runs in a thread."""

    def __init__(self, scorer: Scorer, **options: Any) -> None:
        self.answers: dict[int, Answer] = {}
        self.batches: list[Batch] = []
        self._changed = threading.Condition()
        self.plane = DataPlane(scorer, self._take, max_batch=scorer.batch_size, **options)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._next = 0

    def _run(self) -> None:
        try:
            self.plane.run()
        except BaseException as error:
            self.error = error

    def _take(self, messages: list[Answer | Batch]) -> None:
        with self._changed:
            for each in messages:
                if isinstance(each, Answer):
                    assert each.id not in self.answers, "answered twice"
                    self.answers[each.id] = each
                else:
                    self.batches.append(each)
            self._changed.notify_all()

    def start(self) -> None:
        self._thread.start()

    def call(self, body: bytes, protocol: str = "azureml", **parameters: str) -> int:
        self._next += 1
        self.plane.accept(Call(self._next, protocol, body, parameters, time.monotonic()))
        return self._next

    def answer(self, number: int) -> Answer:
        with self._changed:
            assert self._changed.wait_for(lambda: number in self.answers, 30)
            return self.answers[number]

    def value(self, number: int) -> Any:
        return json.loads(self.answer(number).body)

    def end(self) -> None:
        self.plane.stop()
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def planes() -> Iterator[Callable[..., Plane]]:
    made: list[Plane] = []

    def make(scorer: Scorer, *, start: bool = True, **options: Any) -> Plane:
        made.append(Plane(scorer, **options))
        if start:
            made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.end()


@contextmanager
def held(scorer: Echo, plane: Plane) -> Iterator[int]:
    """While one call is being scored, others come."""
    scorer.gate.clear()
    number = plane.call(b"first")
    assert scorer.began.acquire(timeout=30)
    yield number
    scorer.gate.set()


def test_what_comes_while_a_batch_is_scored_is_the_next_batch(planes: Callable[..., Plane]) -> None:
    scorer = Echo()
    plane = planes(scorer, max_delay=0)
    with held(scorer, plane) as first:
        numbers = [plane.call(str(at).encode()) for at in range(6)]
    assert [plane.value(number) for number in (first, *numbers)] == [
        {"text": text} for text in ("first", *map(str, range(6)))
    ]
    assert scorer.batches == [[b"first"], [b"0", b"1", b"2", b"3"], [b"4", b"5"]]
    # Two threads answer, so that what is told of batches comes in no order.
    assert {(each.calls, each.release) for each in plane.batches} == {(1, "idle"), (4, "full"), (2, "delay")}
    assert plane.answer(numbers[0]).batch == 4


def test_a_client_alone_waits_for_nobody(planes: Callable[..., Plane]) -> None:
    plane = planes(Echo(), max_delay=60)
    for at in range(3):
        assert plane.value(plane.call(str(at).encode())) == {"text": str(at)}
    assert [each.release for each in plane.batches] == ["idle"] * 3


def test_a_batch_waits_for_as_many_as_the_last_one_had(planes: Callable[..., Plane]) -> None:
    scorer = Echo()
    plane = planes(scorer, max_delay=60)
    with held(scorer, plane):
        numbers = [plane.call(b"a"), plane.call(b"b")]
    for number in numbers:
        plane.answer(number)
    plane.plane._last_seconds = 60  # no longer than that took, a batch waits
    first = plane.call(b"c")
    second = plane.call(b"d")
    assert plane.value(first) == {"text": "c"}
    assert plane.value(second) == {"text": "d"}
    assert scorer.batches[2] == [b"c", b"d"]


def test_an_incomplete_batch_is_scored_after_the_delay(planes: Callable[..., Plane]) -> None:
    scorer = Echo()
    plane = planes(scorer, max_delay=0.01)
    with held(scorer, plane):
        numbers = [plane.call(b"a"), plane.call(b"b")]
    for number in numbers:
        plane.answer(number)
    plane.plane._last_seconds = 60
    assert plane.value(plane.call(b"alone")) == {"text": "alone"}
    assert plane.batches[2].release == "delay"


def test_a_bad_item_costs_no_neighbour(planes: Callable[..., Plane]) -> None:
    scorer = Echo()
    plane = planes(scorer, max_delay=0)
    with held(scorer, plane):
        numbers = [plane.call(body) for body in (b"x", b"bad", b"y", b"z")]
    assert [plane.answer(number).status for number in numbers] == [200, 422, 200, 200]
    assert "a bad item" in plane.value(numbers[1])["message"]
    assert plane.value(numbers[3]) == {"text": "z"}


def test_what_nobody_waits_for_is_not_scored(planes: Callable[..., Plane]) -> None:
    scorer = Echo()
    plane = planes(scorer, max_delay=0)
    with held(scorer, plane):
        numbers = [plane.call(str(at).encode()) for at in range(4)]
        plane.plane.cancel(numbers[1])
        plane.plane.cancel(999)  # unknown: it has been answered
    assert plane.answer(numbers[1]).status == ABANDONED
    assert plane.value(numbers[3]) == {"text": "3"}
    assert scorer.batches[1] == [b"0", b"2", b"3"]


def test_rows_are_counted_and_tables_of_one_schema_go_together(planes: Callable[..., Plane]) -> None:
    Sums.tables = []
    plane = planes(Sums(), start=False, max_delay=0)
    kind = {"header:content-type": "application/json"}
    rows = [{"a": 1, "b": 2}] * 60
    numbers = [plane.call(json.dumps({"data": rows}).encode(), **kind) for _ in range(2)]
    other = plane.call(json.dumps([{"a": 0.5, "b": 2}]).encode(), **kind)
    lacking = plane.call(json.dumps([{"a": 0.5}]).encode(), **kind)
    plane.start()
    for number in numbers:
        assert plane.value(number) == [{"sum": 3}] * 60
    assert plane.value(other) == [{"sum": 2.5}]
    assert plane.answer(lacking).status == 422
    assert "'b'" in plane.value(lacking)["message"]
    assert Sums.tables == [60, 60, 1]
    assert plane.answer(numbers[0]).rows == 60


def test_columns_by_name_are_not_given_to_a_model_that_takes_them_by_place(planes: Callable[..., Plane]) -> None:
    """Clients that sort the names of an object would get others' answers."""

    class Differences(Scorer):
        input = "table"
        features = 2

        def score(self, batch: pa.Table) -> Any:
            return pa.table({"difference": [x - y for x, y in zip(*batch.to_pydict().values(), strict=True)]})

    plane = planes(Differences())
    kind = {"header:content-type": "application/json"}
    tensors = [{"name": name, "shape": [1], "datatype": "INT64", "data": [at]} for at, name in enumerate("wh")]
    for protocol, body in [
        ("azureml", {"data": [{"width": 5, "height": 3}]}),
        ("azureml", {"width": [5], "height": [3]}),
        ("tfserving", {"instances": [{"width": 5, "height": 3}]}),
        ("tfserving", {"inputs": {"width": [5], "height": [3]}}),
        ("openinference", {"inputs": tensors}),
    ]:
        answer = plane.answer(plane.call(json.dumps(body).encode(), protocol, **kind))
        assert answer.status == 400, body
        assert "have an order and no names" in answer.body.decode()
        assert "--set features=" in answer.body.decode()
    tensor = {"name": "x", "shape": [1, 2], "datatype": "INT64", "data": [5, 3]}
    for protocol, body in [
        ("azureml", {"data": [[5, 3]]}),
        ("azureml", {"columns": ["width", "height"], "data": [[5, 3]]}),
        ("tfserving", {"instances": [[5, 3]]}),
        ("openinference", {"inputs": [tensor]}),
    ]:
        answer = plane.answer(plane.call(json.dumps(body).encode(), protocol, **kind))
        assert answer.status == 200, answer.body
        assert "2" in answer.body.decode()


def test_a_call_with_more_items_than_a_batch_is_scored_in_parts(planes: Callable[..., Plane]) -> None:
    scorer = Echo()
    plane = planes(scorer)
    tensor = {"name": "body", "shape": [10], "datatype": "BYTES", "data": [str(at) for at in range(10)]}
    number = plane.call(json.dumps({"inputs": [tensor]}).encode(), "openinference")
    [output] = plane.value(number)["outputs"]
    assert output["data"] == [str(at) for at in range(10)]
    assert [len(batch) for batch in scorer.batches] == [4, 4, 2]


def test_a_model_that_is_not_what_it_was_taken_for_answers_and_ends(planes: Callable[..., Plane]) -> None:
    class Refuted(Echo):
        def score(self, batch: Any) -> Any:
            raise ModelRefutedError("it makes no boxes")

    plane = planes(Refuted())
    answer = plane.answer(plane.call(b"x"))
    assert answer.status == 500
    assert b"it makes no boxes" in answer.body
    plane._thread.join(30)
    assert isinstance(plane.error, ModelRefutedError)


def test_a_scorer_that_returns_too_few_results_is_an_error_of_the_model(planes: Callable[..., Plane]) -> None:
    class Short(Echo):
        def score(self, batch: Any) -> Any:
            return []

    plane = planes(Short())
    answer = plane.answer(plane.call(b"x"))
    assert answer.status == 500
    assert b"0 results for 1 items" in answer.body


def test_a_model_that_understands_requests_is_given_them(planes: Callable[..., Plane]) -> None:
    class Answers(Echo):
        def respond(self, request: Request) -> Response:
            text = f"{request.method} {request.query} {request.headers['x-own']}"
            return Response(201, text.encode(), [("X-Back", "yes")])

    plane = planes(Answers())
    answer = plane.answer(plane.call(b"", method="PUT", query="a=1", **{"header:x-own": "mine"}))
    assert (answer.status, answer.body, answer.headers) == (201, b"PUT a=1 mine", [("X-Back", "yes")])


def test_everything_accepted_is_answered_before_the_end() -> None:
    scorer = Echo()
    plane = Plane(scorer, max_delay=0)
    numbers = [plane.call(str(at).encode()) for at in range(50)]
    plane.start()
    plane.end()
    assert [plane.value(number)["text"] for number in numbers] == [str(at) for at in range(50)]
