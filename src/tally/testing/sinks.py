"""What every sink must do. Inherit the class, override its fixtures, and name it ``Test...``."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tally.errors import OutputExistsError, SpecError, StorageError
from tally.scorers.base import Result
from tally.sinks.base import Output, OutputDescription, Sink, Writer
from tally.sinks.factory import reopen
from tally.sinks.query import rows
from tally.sources.base import Batch, Chunk, Source
from tally.storage import LocalStore

FACTS = {"job": "job-1", "generation": 0, "finished_at": "2024-05-06T07:08:09+00:00"}
"""A manifest as the coordinator gives it, with a fixed time so that two runs can be compared."""

DEAD = [{"key": "broken", "stage": "read", "error": "cut off"}]


class Crash(BaseException):
    """Stands for the process's end."""


class CrashingStore(LocalStore):
    """Counts the calls that change something, and crashes before or after one of them.

    at: number of the call, counted from 0; None never crashes. late: do it first, and crash then.
    raised: what the crash is; an OSError stands for a full disk.
    """

    def __init__(self, root: str, at: int | None, *, late: bool = False, raised: BaseException | None = None) -> None:
        super().__init__(root)
        self.calls = 0
        self._at, self._late, self._raised = at, late, raised or Crash()
        self._lock = threading.Lock()

    def _count(self, action: Callable[[], None]) -> None:
        with self._lock:
            crashes = self.calls == self._at
            self.calls += 1
        if not crashes:
            return action()
        if self._late:
            with suppress(StorageError):  # it counts as not known any more
                action()
        raise self._raised

    def write(self, name: str, data: bytes | bytearray | memoryview, *, exclusive: bool = False) -> None:
        self._count(lambda: LocalStore.write(self, name, data, exclusive=exclusive))

    def move(self, source: str, target: str) -> None:
        self._count(lambda: LocalStore.move(self, source, target))

    def delete(self, names: Iterable[str]) -> None:
        self._count(lambda: LocalStore.delete(self, names))

    def delete_tree(self, prefix: str = "") -> None:
        self._count(lambda: LocalStore.delete_tree(self, prefix))


class Endless(Source):
    """A source without an end, as far as a sink is told of it."""

    bounded = False

    def plan(self, after: Any, first: int, limit: Any) -> Iterator[Chunk]:
        return iter(())

    def read(self, chunk: Chunk, scorer: Any, timings: Any) -> Iterator[Batch]:
        return iter(())

    def keys(self, chunk: Chunk) -> list[str]:
        return []

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        return chunk


def layout_of(sink: Sink) -> Any:
    """Where a sink that stages files has them; skips the test for another."""
    layout = getattr(sink, "layout", None)
    if layout is None:
        pytest.skip("it keeps no files of its own")
    return layout


def local_layout_of(sink: Sink) -> Any:
    """The same; its store is replaced by one that crashes."""
    layout = layout_of(sink)
    if not layout.store.is_local:
        pytest.skip("crashes are simulated in a local store")
    return layout


def files_under(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class SinkContract:
    """Override ``make`` (a sink at an output place below a folder; equal folders give equal places) and
    ``result`` (what a scorer returns for the item of that number); ``refused``, ``chunk``, ``info`` and ``keys``
    if need be.

    rows_per_item: how many rows the result of one item makes.
    sorts: whether results stand in the order of their items, in whatever order they were given.
    """

    rows_per_item = 1
    sorts = False

    @pytest.fixture
    def make(self) -> Callable[[Path], Sink]:
        raise NotImplementedError("override the fixture make")

    @pytest.fixture
    def result(self) -> Callable[[int], Result]:
        raise NotImplementedError("override the fixture result")

    @pytest.fixture
    def refused(self) -> Any:
        """A result that cannot be written."""
        return object()

    @pytest.fixture
    def chunk(self) -> Callable[[int, int], Chunk]:
        """The chunk of the items ``start <= n < stop``."""
        return lambda start, stop: Chunk(start, stop - start, {})

    @pytest.fixture
    def info(self) -> Callable[[int], dict[str, Any] | None]:
        """What ``Batch.info`` holds for the item of that number; None where it is None."""
        return lambda number: None

    @pytest.fixture
    def keys(self) -> Callable[[Sink, Sequence[Output]], list[str]]:
        """Reads back the keys of what was written, in order."""
        return lambda sink, outputs: rows(sink, outputs)["key"].to_pylist()[:: self.rows_per_item]

    @pytest.fixture
    def sink(self, make: Callable[[Path], Sink], tmp_path: Path) -> Sink:
        return make(tmp_path / "place")

    @pytest.fixture
    def add(self, result: Callable[[int], Result], info: Callable[[int], Any]) -> Callable[..., Any]:
        """Hands a writer the results of the items of these numbers, or others in their place."""

        def write(writer: Writer, numbers: Sequence[int], instead: Mapping[int, Any] | None = None) -> Any:
            results = [(instead or {}).get(n, result(n)) for n in numbers]
            infos = [info(n) for n in numbers]
            return writer.add([key(n) for n in numbers], results, None if None in infos else infos)

        return write

    @pytest.fixture
    def attempt(self, add: Callable[..., Any], chunk: Callable[[int, int], Chunk]) -> Callable[..., Output]:
        """Writes the results of items ``start <= n < stop``, in batches of two, as one attempt."""

        def write(sink: Sink, name: str, start: int, stop: int) -> Output:
            writer = sink.open(name, chunk(start, stop))
            for first in range(start, stop, 2):
                assert add(writer, range(first, min(first + 2, stop))) == []
            return writer.close()

        return write

    # -- claiming -----------------------------------------------------------------------------------

    def test_travels_to_workers(self, sink: Sink, attempt: Any, keys: Any) -> None:
        sink.claim("job-1")
        output = attempt(pickle.loads(pickle.dumps(sink)), "a", 0, 3)  # noqa: S301
        assert keys(sink, [output]) == [key(0), key(1), key(2)]

    def test_a_place_is_held_by_one_job(self, sink: Sink) -> None:
        assert sink.holder() is None
        sink.claim("job-1")
        sink.claim("job-1")
        assert sink.holder() == "job-1"
        for overwrite in (False, True):
            with pytest.raises(OutputExistsError, match="job-1"):
                sink.claim("job-2", overwrite=overwrite)

    def test_of_two_claims_at_once_one_wins(self, make: Any, tmp_path: Path) -> None:
        barrier, outcomes = threading.Barrier(4), []

        def claim(job: str) -> None:
            sink = make(tmp_path / "place")
            barrier.wait()
            try:
                sink.claim(job)
            except OutputExistsError:
                outcomes.append("")
            else:
                outcomes.append(job)

        threads = [threading.Thread(target=claim, args=(f"job-{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [job for job in outcomes if job]
        assert len(outcomes) == 4
        assert winners == [make(tmp_path / "place").holder()]

    def test_a_released_place_is_free_and_empty(self, make: Any, tmp_path: Path, attempt: Any) -> None:
        sink = make(tmp_path / "place")
        sink.claim("job-1")
        attempt(sink, "a", 0, 2)
        sink.release()
        sink.release()
        assert files_under(tmp_path) == {}
        assert sink.holder() is None
        sink.claim("job-2")

    # -- writing ------------------------------------------------------------------------------------

    def test_only_committed_attempts_are_read(self, sink: Sink, attempt: Any, keys: Any) -> None:
        sink.claim("job-1")
        assert keys(sink, []) == []
        second, first = attempt(sink, "b", 3, 5), attempt(sink, "a", 0, 3)
        attempt(sink, "lost", 0, 3)
        assert first.rows == 3 * self.rows_per_item
        assert first.bytes > 0
        assert keys(sink, [first, second]) == [key(n) for n in range(5)]

    def test_a_bad_result_costs_its_item(self, sink: Sink, chunk: Any, add: Any, refused: Any, keys: Any) -> None:
        sink.claim("job-1")
        writer = sink.open("a", chunk(0, 3))
        ((index, error),) = add(writer, range(3), {1: refused})
        assert (index, error.stage) == (1, "write")
        assert keys(sink, [writer.close()]) == [key(0), key(2)]

    def test_columns_are_rows_too(
        self, make: Any, tmp_path: Path, chunk: Any, result: Any, info: Any, keys: Any
    ) -> None:
        results, infos = [result(n) for n in range(3)], [info(n) for n in range(3)]
        if not all(isinstance(each, Mapping) for each in results):
            pytest.skip("the results are no rows")
        import pyarrow as pa

        sink = make(tmp_path / "place")
        sink.claim("job-1")
        writer = sink.open("a", chunk(0, 3))
        table = None if None in infos else pa.Table.from_pylist(infos)
        assert writer.add_table(pa.array([key(n) for n in range(3)]), pa.Table.from_pylist(results), table) == []
        output = writer.close()
        other = make(tmp_path / "other")
        other.claim("job-1")
        writer = other.open("a", chunk(0, 3))
        assert writer.add([key(n) for n in range(3)], results, None if None in infos else infos) == []
        assert rows(sink, [output]).equals(rows(other, [writer.close()]))

    def test_an_aborted_attempt_leaves_nothing(
        self, make: Any, tmp_path: Path, chunk: Any, add: Any, refused: Any
    ) -> None:
        sink = make(tmp_path / "place")
        sink.claim("job-1")
        before = files_under(tmp_path)
        writer = sink.open("a", chunk(0, 3))
        add(writer, range(3), {1: refused})
        writer.abort()
        assert files_under(tmp_path) == before

    # -- finalizing ---------------------------------------------------------------------------------

    def test_finalize_keeps_the_order_and_tidies_up(self, make: Any, tmp_path: Path, attempt: Any, keys: Any) -> None:
        sink = make(tmp_path / "place")
        sink.claim("job-1")
        outputs = [attempt(sink, "b", 3, 5), attempt(sink, "a", 0, 3)]
        attempt(sink, "lost", 0, 3)
        manifest = sink.finalize(iter(outputs), iter(DEAD), FACTS)
        expected = [key(n) for n in ((0, 1, 2, 3, 4) if self.sorts else (3, 4, 0, 1, 2))]
        assert keys(sink, outputs) == expected
        assert manifest["job"] == sink.holder() == "job-1"
        assert sum(file["rows"] for file in manifest["files"]) == manifest["counts"]["rows"] == 5 * self.rows_per_item
        assert manifest["counts"]["dead"] == 1
        assert not [name for name in files_under(tmp_path) if "tally/" in name]
        attempt(sink, "late", 0, 3)
        assert keys(sink, outputs) == expected
        before = files_under(tmp_path)
        sink.withdraw()
        assert before.items() >= files_under(tmp_path).items()
        assert not [name for name in files_under(tmp_path) if "tally/" in name]

    def test_withdrawing_takes_nothing_from_who_has_the_place(
        self, make: Any, tmp_path: Path, attempt: Any, keys: Any
    ) -> None:
        sink = make(tmp_path / "place")
        sink.claim("job-1")
        outputs = [attempt(sink, "a", 0, 3)]
        make(tmp_path / "place").withdraw()
        assert keys(sink, outputs) == [key(0), key(1), key(2)]
        assert sink.holder() == "job-1"
        sink.finalize(outputs, [], FACTS)
        assert keys(sink, []) == [key(0), key(1), key(2)]

    def test_a_finished_place_holds_what_its_manifest_lists(self, make: Any, tmp_path: Path, attempt: Any) -> None:
        sink = make(tmp_path / "place")
        layout = layout_of(sink)
        for generation, name in enumerate("abc"):
            sink.claim("job-1")
            attempt(sink, f"lost-{name}", 0, 2)
            outputs = [attempt(sink, name, 3 * generation, 3 * generation + 3)]
            manifest = sink.finalize(outputs, DEAD if generation == 1 else [], {**FACTS, "generation": generation})
            marks = {layout.manifest, *([layout.success] if layout.success else [])}
            listed = [*sink.listed(manifest)]
            assert len(set(listed)) == len(listed)
            assert {file["path"] for file in manifest["files"]} <= set(listed)
            assert sorted(entry.name for entry in layout.store.list()) == sorted({*listed, *marks})
            assert all(layout.store.size(file["path"]) == file["bytes"] for file in manifest["files"])

    def test_finalizing_again_changes_nothing(self, make: Any, tmp_path: Path, attempt: Any) -> None:
        sink = make(tmp_path / "place")
        sink.claim("job-1")
        outputs = [attempt(sink, "a", 0, 3)]
        manifest = sink.finalize(outputs, DEAD, FACTS)
        before = files_under(tmp_path)
        sink.claim("job-1")
        assert sink.finalize(outputs, DEAD, {**FACTS, "finished_at": "2025-01-01T00:00:00+00:00"}) == manifest
        assert files_under(tmp_path) == before

    def test_nothing_at_all(self, sink: Sink, keys: Any) -> None:
        sink.claim("job-1")
        manifest = sink.finalize([], [], FACTS)
        assert manifest["counts"]["rows"] == 0
        assert keys(sink, []) == []

    def test_a_finished_place_is_replaced_only_on_request(
        self, make: Any, tmp_path: Path, attempt: Any, keys: Any
    ) -> None:
        sink = make(tmp_path / "place")
        sink.claim("job-1")
        sink.finalize([attempt(sink, "a", 0, 4)], DEAD, FACTS)
        with pytest.raises(OutputExistsError, match=r"job-1.*2024-05-06") as caught:
            sink.claim("job-2")
        assert "--overwrite" in (caught.value.hint or "")
        sink.claim("job-2", overwrite=True)
        assert sink.holder() == "job-2"
        assert [name for name in files_under(tmp_path) if "tally/" not in name] == []
        sink.finalize([attempt(sink, "b", 4, 6)], [], {**FACTS, "job": "job-2"})
        assert keys(sink, []) == [key(4), key(5)]

    def test_a_retry_adds(self, sink: Sink, attempt: Any, keys: Any) -> None:
        sink.claim("job-1")
        first = attempt(sink, "a", 0, 3)
        sink.finalize([first], DEAD, FACTS)
        sink.claim("job-1")
        assert keys(sink, [first]) == [key(0), key(1), key(2)]
        sink.finalize([attempt(sink, "b", 3, 5)], DEAD, {**FACTS, "generation": 1})
        sink.claim("job-1")
        manifest = sink.finalize([attempt(sink, "c", 5, 6)], [], {**FACTS, "generation": 2})
        assert keys(sink, []) == [key(n) for n in range(6)]
        assert manifest["counts"]["rows"] == 6 * self.rows_per_item
        assert manifest["counts"]["dead"] == 0

    @pytest.mark.parametrize("late", [False, True])
    @pytest.mark.parametrize("generation", [0, 1])
    def test_a_crash_at_any_point_costs_nothing(
        self, make: Callable[[Path], Any], tmp_path: Path, attempt: Any, keys: Any, late: bool, generation: int
    ) -> None:
        base = make(tmp_path / "base")
        local_layout_of(base)
        base.claim("job-1")
        if generation:
            base.finalize([attempt(base, "a", 0, 2)], DEAD, FACTS)
            base.claim("job-1")
        outputs = [attempt(base, "b", 2, 5), attempt(base, "c", 5, 7)]

        def prepare(name: str) -> Any:
            shutil.copytree(tmp_path / "base", tmp_path / name)
            return make(tmp_path / name)

        facts = {**FACTS, "generation": generation}
        sink = prepare("whole")
        counter = CrashingStore(sink.layout.store.url, None)
        sink.layout.store = counter
        manifest = sink.finalize(outputs, [], facts)
        expected, steps = files_under(tmp_path / "whole"), counter.calls
        assert steps > 5
        for step in range(steps):
            sink = prepare(f"step-{step}")
            whole = sink.layout.store
            sink.layout.store = CrashingStore(whole.url, step, late=late)
            with pytest.raises(Crash):
                sink.finalize(outputs, [], facts)
            sink.layout.store = whole
            shown = keys(sink, outputs)
            sink.claim("job-1")
            assert sink.finalize(outputs, [], facts) == manifest
            assert files_under(tmp_path / f"step-{step}") == expected
            if manifest["format"] == "parquet" or not generation:
                assert shown == keys(sink, [])

    # -- publishing while the job goes on -----------------------------------------------------------

    def test_what_cannot_be_published_before_the_end_says_so(self, sink: Sink) -> None:
        if sink.rolling:
            sink.check(Endless())
            return
        with pytest.raises(SpecError, match="can only be written when a job ends"):
            sink.check(Endless())
        sink.claim("job-1")
        with pytest.raises(SpecError, match="can only be written when the job ends"):
            sink.publish([], [], FACTS)

    def test_generations_are_published_while_attempts_are_in_flight(
        self, make: Any, tmp_path: Path, attempt: Any, add: Any, chunk: Any, keys: Any
    ) -> None:
        sink = make(tmp_path / "place")
        if not sink.rolling:
            pytest.skip("it is published when the job ends")
        sink.claim("job-1")
        first, second = attempt(sink, "a", 0, 2), attempt(sink, "b", 2, 3)
        writer = sink.open("c", chunk(3, 5))
        assert add(writer, [3]) == []
        manifest = sink.publish([first, second], DEAD, FACTS)
        assert (manifest["counts"]["rows"], manifest["counts"]["dead"]) == (3 * self.rows_per_item, 1)
        assert sink.manifest() == manifest
        assert sink.holder() == "job-1"
        with pytest.raises(OutputExistsError, match="job-1"):
            make(tmp_path / "place").claim("job-2")
        assert not [name for name in files_under(tmp_path) if name.endswith("_SUCCESS")]
        assert keys(sink, [first, second]) == [key(0), key(1), key(2)]
        assert add(writer, [4]) == []
        third = writer.close()
        if manifest["format"] == "parquet":
            assert keys(sink, [first, second, third]) == [key(n) for n in range(5)]
        sink.claim("job-1")  # another coordinator goes on
        sink.publish([third], [], {**FACTS, "generation": 1})
        last = attempt(sink, "d", 5, 6)
        manifest = sink.finalize([last], DEAD, {**FACTS, "generation": 2})
        assert keys(sink, [first, second, third, last]) == [key(n) for n in range(6)]
        assert (manifest["counts"]["rows"], manifest["counts"]["dead"]) == (6 * self.rows_per_item, 1)
        assert not [name for name in files_under(tmp_path) if "tally/" in name]

    def test_publishing_again_changes_nothing(self, make: Any, tmp_path: Path, attempt: Any, keys: Any) -> None:
        sink = make(tmp_path / "place")
        if not sink.rolling:
            pytest.skip("it is published when the job ends")
        sink.claim("job-1")
        outputs = [attempt(sink, "a", 0, 3)]
        manifest = sink.publish(outputs, DEAD, FACTS)
        before = files_under(tmp_path)
        assert sink.publish(outputs, DEAD, {**FACTS, "finished_at": "2025-01-01T00:00:00+00:00"}) == manifest
        assert files_under(tmp_path) == before
        assert keys(sink, outputs) == [key(0), key(1), key(2)]
        sink.finalize([], DEAD, {**FACTS, "generation": 1})
        assert keys(sink, outputs) == [key(0), key(1), key(2)]

    @pytest.mark.parametrize("late", [False, True])
    def test_a_crash_while_publishing_costs_nothing(
        self, make: Callable[[Path], Any], tmp_path: Path, attempt: Any, keys: Any, late: bool
    ) -> None:
        base = make(tmp_path / "base")
        if not base.rolling:
            pytest.skip("it is published when the job ends")
        local_layout_of(base)
        base.claim("job-1")
        outputs = [attempt(base, "a", 0, 2)]
        base.publish(outputs, DEAD, FACTS)
        outputs += [attempt(base, "b", 2, 5), attempt(base, "c", 5, 7), attempt(base, "d", 7, 9)]
        every = [key(n) for n in range(9)]

        def prepare(name: str, at: int | None) -> Any:
            shutil.copytree(tmp_path / "base", tmp_path / name)
            sink = make(tmp_path / name)
            sink.layout.store = CrashingStore(sink.layout.store.url, at, late=late)
            return sink

        def publish(sink: Any) -> None:
            sink.publish(outputs[1:3], [], {**FACTS, "generation": 1})

        def finish(sink: Any, folder: str) -> dict[str, bytes]:
            manifest = sink.finalize(outputs[3:], DEAD, {**FACTS, "generation": 2})
            assert manifest["counts"]["rows"] == 9 * self.rows_per_item
            assert keys(sink, outputs) == every
            return files_under(tmp_path / folder)

        whole = prepare("whole", None)
        publish(whole)
        steps = whole.layout.store.calls
        assert steps > 5
        expected = finish(whole, "whole")
        for step in range(steps):
            repeated = (step + late) % 2 == 0  # or the next generation follows at once
            folder = f"step-{step}"
            sink = prepare(folder, step)
            with pytest.raises(Crash):
                publish(sink)
            sink = make(tmp_path / folder)
            shown = keys(sink, outputs)
            published = (sink.manifest() or {})["generation"] == 1
            assert shown in ([every, every[:7]] if published or sink.manifest()["format"] == "parquet" else [every[:2]])
            sink.claim("job-1")
            if repeated or not published:
                publish(sink)
            assert finish(sink, folder) == expected

    # -- describing ---------------------------------------------------------------------------------

    def test_an_output_is_opened_again_by_its_description(self, sink: Sink, attempt: Any, keys: Any) -> None:
        sink.claim("job-1")
        outputs = [attempt(sink, "a", 0, 3)]
        described = OutputDescription.from_json(json.loads(json.dumps(sink.describe().to_json())))
        assert described == sink.describe()
        again = reopen(described)
        assert (again.describe(), again.place) == (described, sink.place)
        assert not described.place.endswith("/")
        assert again.holder() == "job-1"
        assert keys(again, outputs) == [key(0), key(1), key(2)]
        sink.finalize(outputs, DEAD, FACTS)
        assert keys(again, []) == [key(0), key(1), key(2)]
        assert again.manifest() == sink.manifest()

    def test_a_full_disk_is_said_and_can_be_mended(self, make: Any, tmp_path: Path, attempt: Any, keys: Any) -> None:
        sink = make(tmp_path / "place")
        local_layout_of(sink)
        sink.claim("job-1")
        whole = sink.layout.store
        full = StorageError(f"cannot write {whole.url}: the disk is full")
        sink.layout.store = CrashingStore(whole.url, 0, raised=full)
        with pytest.raises(StorageError, match="disk is full"):
            attempt(sink, "a", 0, 3)
        sink.layout.store = whole
        output = attempt(sink, "b", 0, 3)
        sink.layout.store = CrashingStore(whole.url, 0, raised=full)
        with pytest.raises(StorageError, match="disk is full"):
            sink.finalize([output], [], FACTS)
        sink.layout.store = whole
        sink.finalize([output], [], FACTS)
        assert keys(sink, []) == [key(0), key(1), key(2)]


def key(number: int) -> str:
    """The key of the item of that number."""
    return f"folder/item-{number}.png"
