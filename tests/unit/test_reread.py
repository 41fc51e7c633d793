"""A scorer may change what it is given and raise then: its neighbours' rows are those of an undisturbed run."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tally.errors import ItemError
from tally.jobs.reread import Reread
from tally.scorers.base import Input, Item, Results, Scorer
from tally.scorers.per_key.keys import ModelPerKey
from tally.scorers.run import run, score
from tally.scorers.scripts.script import ScriptScorer
from tally.sources.base import ChunkLimit, Source, Timings
from tally.sources.files import FileSource
from tally.sources.tables.source import TableSource

COUNT, BATCH = 9, 4  # the last batch holds one item


def clear(batch: Any) -> Any:
    return [batch.pop(0) for _ in range(len(batch))]


def swap(batch: Any) -> Any:
    taken = [*batch]
    batch.reverse()
    batch[0] = batch[-1]
    return taken


def inplace(batch: Any) -> Any:
    for value in batch:
        value[0][...] = value[0] // 2 + 1
    return batch


def untouched(batch: Any) -> Any:
    return batch


class Changing(Scorer):
    """Changes its batch, then raises if the bad value is, or was, among it."""

    batch_size = BATCH

    def __init__(self, input: Input, change: Callable[[Any], Any], bad: Any = None, lock: Any = None) -> None:  # noqa: A002
        self.input, self.change, self.bad, self.lock = input, change, bad, lock

    def prepare(self, item: Item) -> Any:
        # Not only an array: whatever prepare() makes may be changed. A lock cannot be copied.
        return [item.value, int(item.value.max()), self.lock] if self.input == "image" else item.value

    def score(self, batch: Any) -> Results:
        values = self.change(batch)
        rows = [{"value": int(each[0].max()) if self.input == "image" else str(each)} for each in values]
        if any((each[1] if self.input == "image" else each) == self.bad for each in values):
            raise SystemExit("the bad one is among them")
        return rows


class OfTable(Scorer):
    """Changes the memory of its table, of which Arrow says that nobody does."""

    input: Input = "table"
    batch_size = BATCH

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad

    def score(self, table: pa.Table) -> Results:
        found = table["n"].to_pylist()
        for chunk in table["n"].chunks:
            memory = np.frombuffer(chunk.buffers()[1], np.int64)
            memory[chunk.offset : chunk.offset + len(chunk)] += 100
        if self.bad in found:
            raise ValueError("the bad one is among them")
        return [{"value": n} for n in found]


def results(source: Source, scorer: Scorer) -> Iterator[Any]:
    """One result or ItemError for each item, as in a job."""
    for chunk in source.plan(None, 0, lambda: ChunkLimit(1000, 1 << 30)):
        for batch in source.read(chunk, scorer, Timings()):
            anew = Reread(source, chunk, scorer, batch, Timings())
            for part in score(scorer, batch.values, len(batch.keys), anew):
                yield from part.to_list()


def check(found: list[Any], undisturbed: list[Any], bad: int) -> None:
    assert [isinstance(each, ItemError) for each in found] == [at == bad for at in range(COUNT)]
    assert [each for at, each in enumerate(found) if at != bad] == undisturbed[:bad] + undisturbed[bad + 1 :]


def content(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (10 * number, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number}.png").write_bytes(content(number))
    return folder


@pytest.mark.parametrize("bad", range(COUNT))
@pytest.mark.parametrize("change", [inplace, clear, swap])
@pytest.mark.parametrize("lock", [None, threading.Lock()], ids=["", "uncopied"])
def test_pictures(files: Path, bad: int, change: Any, lock: Any) -> None:
    source = FileSource.describe([str(files)], "image")
    undisturbed = list(results(source, Changing("image", change)))
    check(list(results(source, Changing("image", change, 10 * bad, lock))), undisturbed, bad)
    arrays = [np.array(Image.open(io.BytesIO(content(number)))) for number in range(COUNT)]
    for items in (arrays, [content(number) for number in range(COUNT)], [*map(Path, sorted(files.iterdir()))]):
        check(run(Changing("image", change, 10 * bad, lock), items), undisturbed, bad)
    assert [int(each.max()) for each in arrays] == [10 * number for number in range(COUNT)]  # the caller's own


@pytest.mark.parametrize("bad", [0, 2, 3, 8])
@pytest.mark.parametrize("change", [clear, swap])
def test_contents(files: Path, bad: int, change: Any) -> None:
    source = FileSource.describe([str(files)], "bytes")
    undisturbed = list(results(source, Changing("bytes", untouched)))
    check(list(results(source, Changing("bytes", change, content(bad)))), undisturbed, bad)


@pytest.mark.parametrize("bad", [0, 2, 3, 8])
def test_lists_of_files_for_scripts(files: Path, bad: int) -> None:
    (files.parent / "score.py").write_text(
        "import os\ndef init(): pass\ndef run(mini_batch):\n"
        "    names = [os.path.basename(mini_batch.pop()) for _ in range(len(mini_batch))][::-1]\n"
        f"    if '{bad}.png' in names: raise ValueError(names)\n"
        "    return names\n"
    )
    scorer = ScriptScorer(files.parent / "score.py", batch_size=BATCH)
    scorer.load(files.parent, "cpu")
    undisturbed = [{"prediction": f"{number}.png"} for number in range(COUNT)]
    check(list(results(FileSource.describe([str(files)], "path"), scorer)), undisturbed, bad)


@pytest.mark.parametrize("bad", range(COUNT))
def test_tables(tmp_path: Path, bad: int) -> None:
    (tmp_path / "n.csv").write_text("n\n" + "".join(f"{number}\n" for number in range(COUNT)))
    source = TableSource.describe([str(tmp_path / "n.csv")], features=["n"]).located(str(tmp_path / "work"))
    source.prepare()
    undisturbed = [{"value": number} for number in range(COUNT)]
    check(list(results(source, OfTable(bad))), undisturbed, bad)
    table = pa.table({"n": range(COUNT)})
    check(run(OfTable(bad), table), undisturbed, bad)
    assert table["n"].to_pylist() == list(range(COUNT))


@pytest.mark.parametrize("bad", [0, 2, 3, 8])
@pytest.mark.parametrize("per_key", [False, True])
def test_data_frames(tmp_path: Path, bad: int, per_key: bool) -> None:
    pytest.importorskip("pandas")
    (tmp_path / "score.py").write_text(
        "def init(): pass\ndef run(df):\n    del df['other']\n    df['n'] += 1\n"
        f"    if {bad} + 1 in df['n'].to_list(): raise ValueError\n    return df\n"
    )
    inner = ScriptScorer(tmp_path / "score.py", form="dataframe", batch_size=BATCH, features=["n", "other"])
    inner.load(tmp_path, "cpu")

    class OneModel(ModelPerKey):
        def _find(self, keys: Any) -> Any:
            return np.zeros(len(keys[0]), np.int64)

        def _batched(self, present: Any) -> Any:
            return None, np.full(1, -1)

        def _open(self, number: int) -> Scorer:
            return inner

    table = pa.table({"key": ["a"] * COUNT, "n": range(COUNT), "other": [0.5] * COUNT})
    scorer: Scorer = inner
    if per_key:
        scorer = OneModel(by=["key"], features=["n", "other"], columns=None, batch_size=BATCH)
    check(run(scorer, table), [{"n": number + 1} for number in range(COUNT)], bad)


def test_what_can_no_longer_be_read_is_dead_and_costs_no_other(files: Path) -> None:
    class Removing(Changing):
        def score(self, batch: Any) -> Results:
            (files / "1.png").unlink(missing_ok=True)
            return super().score(batch)

    source = FileSource.describe([str(files)], "image")
    found = list(results(source, Removing("image", clear, 0)))
    assert [isinstance(each, ItemError) for each in found] == [True, True] + [False] * (COUNT - 2)
    assert found[1].stage == "read"
    assert found[2:] == [{"value": 10 * number} for number in range(2, COUNT)]
