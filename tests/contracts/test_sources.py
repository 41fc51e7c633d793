from __future__ import annotations

import gzip
import json
import os
import threading
import uuid
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date, datetime
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.archives import PACKERS
from tests.videos import write_clip

from tally.errors import ItemError, SourceNotFoundError, SpecError
from tally.scorers.base import Input, Item, Scorer
from tally.sources.archives.source import ArchiveSource
from tally.sources.base import Chunk, ChunkLimit, Source, Timings
from tally.sources.files import FileSource
from tally.sources.lists import open_list
from tally.sources.reading import AHEAD, LOCAL_THREADS
from tally.sources.references import ReferenceSource
from tally.sources.sequences import SequenceSource
from tally.sources.tables.pictures import PictureColumnSource
from tally.sources.tables.source import TableSource
from tally.sources.video import VideoSource
from tally.storage import open_store
from tally.testing.endless import Broker, MemoryQueueSource
from tally.testing.sources import EndlessSourceContract, Recorder, SourceContract, TableSourceContract, chunks_of

NAMES = ["a-b.png", "a.png", "a/1.png", "a/b/2.png", "a/b/3.png", "a0.png", "é.png"]


@pytest.fixture
def png() -> bytes:
    file = BytesIO()
    Image.new("RGB", (3, 2), (10, 20, 30)).save(file, "png")
    return file.getvalue()


def _fill(place: str, png: bytes) -> str:
    store = open_store(place)
    for name in NAMES:
        store.write(name, png)
    return place


class TestLocalImages(SourceContract):
    @pytest.fixture
    def keys(self) -> list[str]:
        return NAMES

    @pytest.fixture
    def source(self, tmp_path: Path, png: bytes) -> Source:
        return FileSource.describe([_fill(str(tmp_path / "in"), png)], "image")


class TestRemoteImages(SourceContract):
    @pytest.fixture
    def keys(self) -> list[str]:
        return NAMES

    @pytest.fixture
    def source(self, png: bytes) -> Source:
        return FileSource.describe([_fill(f"memory://{uuid.uuid4().hex}/in", png)], "image")


class TestS3Images(TestRemoteImages):
    @pytest.fixture
    def source(self, s3: str, png: bytes) -> Source:
        return FileSource.describe([_fill(f"{s3}/in", png)], "image")


class TestAzureImages(TestRemoteImages):
    @pytest.fixture
    def source(self, azure: str, png: bytes) -> Source:
        return FileSource.describe([_fill(f"{azure}/in", png)], "image")


class TestSeveralPlaces(SourceContract):
    """A glob, a folder inside it, and single files: each item once."""

    @pytest.fixture
    def keys(self) -> list[str]:
        return ["b/a/b/2.png", "b/a/b/3.png", *(f"a/{name}" for name in NAMES), "b/a/1.png", "b/a0.png", "b/é.png"]

    @pytest.fixture
    def source(self, tmp_path: Path, png: bytes) -> Source:
        a, b = (_fill(str(tmp_path / name), png) for name in "ab")
        uris = [f"{b}/a/b", a, f"{a}/a", f"{b}/a/**", f"{b}/é.png", f"{b}/a0.png", f"{b}/a/1.png"]
        return FileSource.describe(uris, "image")


class TestTars(SourceContract):
    """Two archives in a folder; beside pictures, one has members that are none."""

    suffix = "tar"

    @pytest.fixture
    def keys(self) -> list[str]:
        return [*(f"a.{self.suffix}/{name}" for name in NAMES), f"b/c.{self.suffix}/only.png"]

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return str(tmp_path / "in")

    @pytest.fixture
    def source(self, place: str, png: bytes) -> Source:
        pack = PACKERS[self.suffix]
        store = open_store(place)
        more = {"a/notes.md": b"none", ".hidden.png": png, "__MACOSX/._a.png": b"", "a.json": b"{}"}
        store.write(f"a.{self.suffix}", pack(dict.fromkeys(NAMES, png) | more))
        store.write(f"b/c.{self.suffix}", pack({"./only.png": png}))
        return ArchiveSource.describe([place], "image")


class TestGzippedTars(TestTars):
    suffix = "tar.gz"


class TestZstandardTars(TestTars):
    suffix = "tar.zst"


class TestZips(TestTars):
    suffix = "zip"


class TestS3Tars(TestTars):
    @pytest.fixture
    def place(self, s3: str) -> str:
        return f"{s3}/in"


class TestS3GzippedTars(TestS3Tars):
    suffix = "tgz"


class TestS3Zips(TestS3Tars):
    suffix = "zip"


class TestMembersAsPaths(TestTars):
    @pytest.fixture
    def input(self) -> str:
        return "path"

    @pytest.fixture
    def source(self, place: str, png: bytes) -> Source:
        store = open_store(place)
        store.write("a.tar", PACKERS["tar"](dict.fromkeys(NAMES, png)))
        store.write("b/c.tar", PACKERS["tar"]({"./only.png": png}))
        return ArchiveSource.describe([f"{place}/a.tar", f"{place}/b/*.tar"], "path")


class TestShards(TestTars):
    """As WebDataset writes them, with what is kept."""

    @pytest.fixture
    def keys(self) -> list[str]:
        return [f"{shard:02}.tar/{number:04}.png" for shard in range(2) for number in range(4)]

    @pytest.fixture
    def source(self, place: str, png: bytes) -> Source:
        store = open_store(place)
        for shard in range(2):
            files = {}
            for number in range(4):
                files |= {f"{number:04}.cls": b"%d" % number, f"{number:04}.png": png}
            store.write(f"{shard:02}.tar", PACKERS["tar"](files))
        return ArchiveSource.describe([f"{place}/{{00..01}}.tar"], "image", keep=["cls"])

    def test_rows_carry_what_is_kept(self, source: Source, scorer: Recorder) -> None:
        assert source.columns == {"cls": "string"}
        batches = [batch for chunk in chunks_of(source, 3) for batch in source.read(chunk, scorer, Timings())]
        assert [info["cls"] for batch in batches for info in batch.info] == list("0123") * 2


class TestVideos(SourceContract):
    """Two clips: with B-frames, and of one frame."""

    @pytest.fixture
    def keys(self) -> list[str]:
        return [*(f"a/long.mp4/{number:06}" for number in range(30)), "b.mkv/000000"]

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return str(tmp_path / "in")

    @pytest.fixture
    def source(self, place: str, tmp_path: Path) -> Source:
        store = open_store(place)
        store.write("a/long.mp4", write_clip(tmp_path / "long.mp4", 30, gop=12).read_bytes())
        store.write("b.mkv", write_clip(tmp_path / "b.mkv", 1).read_bytes())
        return VideoSource.describe([place])

    @pytest.fixture
    def input(self) -> str:
        return "frame"


class TestRemoteVideos(TestVideos):
    @pytest.fixture
    def place(self) -> str:
        return f"memory://{uuid.uuid4().hex}/in"


class TestEveryThirdFrame(TestVideos):
    @pytest.fixture
    def keys(self) -> list[str]:
        return [*(f"a/long.mp4/{number:06}" for number in range(0, 30, 3)), "b.mkv/000000"]

    @pytest.fixture
    def source(self, place: str, tmp_path: Path) -> Source:
        source = super().source.__wrapped__(self, place, tmp_path)  # type: ignore[attr-defined]
        return replace(source, every=3)


class TestNumberedPictures(SourceContract):
    """Two folders of them, of which one has every second number."""

    @pytest.fixture
    def keys(self) -> list[str]:
        return [*(f"a/{number:06}" for number in range(6)), *(f"b/left/{number:06}" for number in (0, 1))]

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return str(tmp_path / "in")

    @pytest.fixture
    def source(self, place: str, png: bytes) -> Source:
        store = open_store(place)
        for name in ("a/8.png", "a/9.png", "a/10.png", "a/11.png", "a/12.png", "a/13.png", "b/left/f_7.jpg"):
            store.write(name, png)
        store.write("b/left/f_9.jpg", png)
        return SequenceSource.describe([place], rate=Fraction(30000, 1001))

    @pytest.fixture
    def input(self) -> str:
        return "frame"


class TestRemoteNumberedPictures(TestNumberedPictures):
    @pytest.fixture
    def place(self) -> str:
        return f"memory://{uuid.uuid4().hex}/in"


class TestReferences(SourceContract):
    """A text that names a file beside it, one by its whole path, objects of a bucket, and a URL of a file."""

    @pytest.fixture
    def bucket(self) -> str:
        return f"memory://{uuid.uuid4().hex}/in"

    @pytest.fixture
    def keys(self, tmp_path: Path, bucket: str) -> list[str]:
        files = [f"in/{NAMES[0]}", f"{tmp_path}/in/{NAMES[1]}", f"file://{tmp_path}/in/{NAMES[2]}"]
        return [*files, *(f"{bucket}/{name}" for name in NAMES)]

    @pytest.fixture
    def source(self, tmp_path: Path, bucket: str, keys: list[str], png: bytes) -> Source:
        _fill(str(tmp_path / "in"), png)
        _fill(bucket, png)
        (tmp_path / "list.txt").write_text("\n\n".join(keys))
        return ReferenceSource.describe(open_list(str(tmp_path / "list.txt")), "image")


class TestReferencesOfATable(SourceContract):
    """A CSV file with keys of its own, columns that are kept, and a base."""

    @pytest.fixture
    def keys(self) -> list[str]:
        return [f"00{n}" for n in range(len(NAMES))]

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return str(tmp_path / "in")

    @pytest.fixture
    def source(self, tmp_path: Path, place: str, keys: list[str], png: bytes) -> Source:
        _fill(place, png)
        lines = [f"{key},{name},{n},2026-01-0{n + 1}" for n, (key, name) in enumerate(zip(keys, NAMES, strict=True))]
        (tmp_path / "list.csv").write_text("\n".join(["id,image,n,day", *lines]))
        items = open_list(str(tmp_path / "list.csv"), key="id", keep=["n", "day"])
        return ReferenceSource.describe(items, "image", base=place).located(str(tmp_path / "work"))

    def test_kept_columns_come_with_the_items(self, source: Source, scorer: Recorder, keys: list[str]) -> None:
        assert source.columns == {"n": "int64", "day": "date32[day]"}
        chunks = source.combine(chunks_of(source, 3))
        info = [row for chunk in chunks for row in source.info(chunk) or ()]
        assert info == [{"n": n, "day": date(2026, 1, n + 1)} for n in range(len(keys))]
        scorer.fail = frozenset([keys[1]])
        [batch, *_] = source.read(chunks[0], scorer, Timings())
        assert (batch.keys, batch.info) == (keys[:1], info[:1])


class TestReferencesInS3(TestReferencesOfATable):
    @pytest.fixture
    def place(self, s3: str) -> str:
        return f"{s3}/in"


class TestReferencesInAzure(TestReferencesOfATable):
    @pytest.fixture
    def place(self, azure: str) -> str:
        return f"{azure}/in"


class TestBytes(TestLocalImages):
    @pytest.fixture
    def input(self) -> str:
        return "bytes"

    @pytest.fixture
    def source(self, tmp_path: Path, png: bytes) -> Source:
        return FileSource.describe([_fill(str(tmp_path / "in"), png)], "bytes")


class TestLocalPaths(TestLocalImages):
    @pytest.fixture
    def input(self) -> str:
        return "path"

    @pytest.fixture
    def source(self, tmp_path: Path, png: bytes) -> Source:
        return FileSource.describe([_fill(str(tmp_path / "in"), png)], "path")


class TestRemotePaths(TestRemoteImages):
    @pytest.fixture
    def input(self) -> str:
        return "path"

    @pytest.fixture
    def source(self, png: bytes) -> Source:
        return FileSource.describe([_fill(f"memory://{uuid.uuid4().hex}/in", png)], "path")


class TestS3Paths(TestRemotePaths):
    @pytest.fixture
    def source(self, s3: str, png: bytes) -> Source:
        return FileSource.describe([_fill(f"{s3}/in", png)], "path")


def write_parquet(place: str, name: str, rows: list[dict[str, object]], group: int = 3) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=group)
    open_store(place).write(name, sink.getvalue().to_pybytes())


class TestPicturesInParquet(SourceContract):
    """As Hugging Face writes them, in row groups; a path that is missing, there twice, or leads out is not taken."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return str(tmp_path / "in")

    @pytest.fixture
    def keys(self) -> list[str]:
        return ["a.parquet/x.png", "a.parquet#2", "a.parquet#3", "a.parquet/y/z.png", "a.parquet#5", "b.parquet/x.png"]

    @pytest.fixture
    def source(self, place: str, png: bytes) -> Source:
        paths = ["x.png", None, "x.png", "y/z.png", "../up.png", "x.png"]
        rows = [{"image": {"bytes": png, "path": path}, "label": at} for at, path in enumerate(paths)]
        write_parquet(place, "a.parquet", rows[:5])
        write_parquet(place, "b.parquet", rows[5:])
        return PictureColumnSource.describe([place], "image", keep=["truth=label"])

    def test_rows_carry_what_is_kept(self, source: Source, scorer: Recorder) -> None:
        assert source.columns == {"truth": "int64"}
        batches = [batch for chunk in chunks_of(source, 4) for batch in source.read(chunk, scorer, Timings())]
        assert [info["truth"] for batch in batches for info in batch.info] == list(range(6))


class TestRemotePicturesInParquet(TestPicturesInParquet):
    @pytest.fixture
    def place(self) -> str:
        return f"memory://{uuid.uuid4().hex}/in"


class TestS3PicturesInParquet(TestPicturesInParquet):
    @pytest.fixture
    def place(self, s3: str) -> str:
        return f"{s3}/in"


class TestBase64AsPaths(TestPicturesInParquet):
    @pytest.fixture
    def input(self) -> str:
        return "path"

    @pytest.fixture
    def keys(self) -> list[str]:
        return [f"a.parquet#{row}" for row in range(1, 7)]

    @pytest.fixture
    def source(self, place: str, png: bytes) -> Source:
        rows = [{"picture": b64encode(png).decode(), "label": at} for at in range(6)]
        write_parquet(place, "a.parquet", rows)
        return PictureColumnSource.describe([place], "path", item_column="picture", keep=["truth=label"])


READINGS = [{"device": n % 3, "value": n / 2, "note": f"n{n}"} for n in range(12)]


class TestParquet(TableSourceContract):
    """Two files, one of several row groups."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return str(tmp_path / "in")

    @pytest.fixture
    def keys(self) -> list[str]:
        return [*(f"a.parquet#{row}" for row in range(1, 11)), "b/it's [1].parquet#1", "b/it's [1].parquet#2"]

    @pytest.fixture
    def rows(self) -> list[dict[str, object]]:
        return [{"value": row["value"]} for row in READINGS]

    @pytest.fixture
    def source(self, place: str) -> Source:
        write_parquet(place, "a.parquet", READINGS[:10])
        write_parquet(place, "b/it's [1].parquet", READINGS[10:])
        write_parquet(place, "b/nothing.parquet", [])
        return TableSource.describe([place], features=["value"], keep=["note"])


class TestRemoteParquet(TestParquet):
    @pytest.fixture
    def place(self) -> str:
        return f"memory://{uuid.uuid4().hex}/in"


class TestS3Parquet(TestParquet):
    @pytest.fixture
    def place(self, s3: str) -> str:
        return f"{s3}/in"


class TestAzureParquet(TestParquet):
    @pytest.fixture
    def place(self, azure: str) -> str:
        return f"{azure}/in"


class TestCsv(TableSourceContract):
    """Two files whose columns stand in another order, one packed."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return str(tmp_path / "in")

    @pytest.fixture
    def scratch(self, tmp_path: Path) -> str:
        return str(tmp_path / "work")

    @pytest.fixture
    def keys(self) -> list[str]:
        return [*(f"a*.csv#{row}" for row in range(1, 6)), "b.csv.gz#1", "b.csv.gz#2"]

    @pytest.fixture
    def rows(self) -> list[dict[str, object]]:
        return [{"value": row["value"], "device": row["device"]} for row in READINGS[:7]]

    @pytest.fixture
    def source(self, place: str, scratch: str) -> Source:
        store = open_store(place)
        lines = [f"{row['device']},{row['value']},{row['note']}\n" for row in READINGS]
        store.write("a*.csv", ("device,value,note\n" + "".join(lines[:5])).encode())
        store.write("b.csv.gz", gzip.compress(b"value,note,device\n2.5,n5,2\n3,n6,0\n"))
        store.write("c.csv", b"")
        return TableSource.describe([place], features=["value", "device"], keep=["note"]).located(scratch)


class TestRemoteCsv(TestCsv):
    @pytest.fixture
    def place(self) -> str:
        return f"memory://{uuid.uuid4().hex}/in"

    @pytest.fixture
    def scratch(self) -> str:
        return f"memory://{uuid.uuid4().hex}/work"


class TestS3Csv(TestCsv):
    @pytest.fixture
    def place(self, s3: str) -> str:
        return f"{s3}/in"

    @pytest.fixture
    def scratch(self, s3: str) -> str:
        return f"{s3}/work"


class TestJsonLines(TableSourceContract):
    @pytest.fixture
    def keys(self) -> list[str]:
        return [f"a.jsonl#{row}" for row in range(1, 13)]

    @pytest.fixture
    def rows(self) -> list[dict[str, object]]:
        return READINGS

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        lines = "".join(json.dumps(row) + "\n" for row in READINGS)
        (tmp_path / "a.jsonl").write_text(lines)
        source = TableSource.describe([str(tmp_path / "a.jsonl")], features=None)
        return source.located(str(tmp_path / "work"))


class TestArrow(TestJsonLines):
    """A file, and a stream."""

    @pytest.fixture
    def keys(self) -> list[str]:
        return [*(f"a.arrow#{row}" for row in range(1, 8)), *(f"b.arrow#{row}" for row in range(1, 6))]

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        table = pa.Table.from_pylist(READINGS)
        with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table[:7], max_chunksize=2)
        with pa.ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
            writer.write_table(table[7:], max_chunksize=2)
        return TableSource.describe([str(tmp_path / "?.arrow")], features=None).located(str(tmp_path / "work"))


class TestGroupedByKey(TableSourceContract):
    @pytest.fixture
    def keys(self) -> list[str]:
        order = [number for device in range(3) for number in range(12) if number % 3 == device]
        return [f"a.parquet#{n + 1}" if n < 10 else f"b.parquet#{n - 9}" for n in order]

    @pytest.fixture
    def rows(self) -> list[dict[str, object]]:
        return [
            {"device": row["device"], "value": row["value"]} for row in sorted(READINGS, key=lambda row: row["device"])
        ]

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        write_parquet(str(tmp_path / "in"), "a.parquet", READINGS[:10])
        write_parquet(str(tmp_path / "in"), "b.parquet", READINGS[10:])
        source = TableSource.describe([str(tmp_path / "in")], features=["value"], by=["device"], keep=["note"])
        return source.located(str(tmp_path / "work"))


class TestChosenRows(TestGroupedByKey):
    @pytest.fixture
    def keys(self) -> list[str]:
        return ["a.parquet#9", "a.parquet#10", "b.parquet#1", "b.parquet#2"]

    @pytest.fixture
    def rows(self) -> list[dict[str, object]]:
        return [{"value": row["value"]} for row in READINGS[8:]]

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        grouped = super().source.__wrapped__(self, tmp_path)  # type: ignore[attr-defined]
        where = "note IN ('n8', 'n9', 'n10', 'n11') -- the last"
        return TableSource.describe(grouped.listing.uris, features=["value"], where=where).located(grouped.scratch)


class TestWindows(TableSourceContract):
    @pytest.fixture
    def keys(self) -> list[str]:
        return [f"{device}/2026-01-01T00:0{minute}:00" for device in ("p", "q%2F1") for minute in (0, 5)]

    @pytest.fixture
    def rows(self) -> list[dict[str, object]]:
        return [
            {"device": device, "value_mean": low + 2.0, "value_last": low + 4, "count": 5}
            for device, low in (("p", 0), ("p", 5), ("q/1", 10), ("q/1", 15))
        ]

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        rows = [
            {"at": datetime.fromisoformat(f"2026-01-01T00:0{n % 10}"), "device": "p" if n < 10 else "q/1", "value": n}
            for n in range(20)
        ]
        write_parquet(str(tmp_path / "in"), "a.parquet", rows[::-1])
        source = TableSource.describe(
            [str(tmp_path / "in")],
            features=["value_mean", "value_last", "count"],
            by=["device"],
            time="at",
            window=300,
            aggregate=["mean", "last", "count"],
        )
        return source.located(str(tmp_path / "work"))


class TestQueue(EndlessSourceContract):
    @pytest.fixture
    def broker(self, tmp_path: Path) -> Broker:
        return Broker(tmp_path / "queue.db")

    @pytest.fixture
    def make(self, broker: Broker) -> Callable[[], Source]:
        return lambda: MemoryQueueSource(broker.path)

    @pytest.fixture
    def send(self, broker: Broker) -> Callable[[Sequence[str]], None]:
        return lambda keys: broker.publish([(key, key.encode()) for key in keys])

    @pytest.fixture
    def acknowledged(self, broker: Broker) -> Callable[[], list[str]]:
        return lambda: [event.key for event in broker.events("acknowledged")]


# What only files have -------------------------------------------------------------------------------


def planned(source: FileSource, items: int = 1000, after: str | None = None) -> list[str]:
    return [key for chunk in chunks_of(source, items, after=after) for key in source.keys(chunk)]


def touch(root: Path, *names: str, data: bytes = b"x") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def read(source: FileSource, scorer: Scorer) -> tuple[dict[str, object], dict[int, ItemError]]:
    values: dict[str, object] = {}
    dead: dict[int, ItemError] = {}
    for chunk in chunks_of(source, 1000):
        for batch in source.read(chunk, scorer, Timings()):
            values |= dict(zip(batch.keys, batch.values, strict=True))
            dead |= dict(batch.dead)
    return values, dead


TREE = [".hid/x.jpg", ".x.jpg", "a/1.jpg", "a/2.JPG", "a/b/3.jpg", "a/b/c/4.png", "a1.jpg", "b.csv", "é.jpg"]


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("*", ["a1.jpg", "b.csv", "é.jpg"]),
        ("*.jpg", ["a1.jpg", "é.jpg"]),
        ("?.jpg", ["é.jpg"]),
        ("**/*.jpg", ["a/1.jpg", "a/b/3.jpg", "a1.jpg", "é.jpg"]),
        ("**/*", ["a/1.jpg", "a/2.JPG", "a/b/3.jpg", "a/b/c/4.png", "a1.jpg", "b.csv", "é.jpg"]),
        ("**", ["a/1.jpg", "a/2.JPG", "a/b/3.jpg", "a/b/c/4.png", "a1.jpg", "b.csv", "é.jpg"]),
        ("*/*.jpg", ["a/1.jpg"]),
        ("a*", ["a1.jpg"]),
        ("*/**/[!1-3].*", ["a/b/c/4.png"]),
        ("*/[12].[jJ]*", ["a/1.jpg", "a/2.JPG"]),
        (".*", [".x.jpg"]),
        (".*/*", [".hid/x.jpg"]),
        ("**/b/**/*.png", ["a/b/c/4.png"]),
        ("[]!]*.jpg", None),
        ("*.JPG", None),
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_globs(tmp_path: Path, glob: str, names: list[str] | None, remote: bool) -> None:
    root = f"memory://{uuid.uuid4().hex}/in" if remote else str(tmp_path / "in")
    for name in TREE:
        open_store(root).write(name, b"x")
    if names is None:
        with pytest.raises(SourceNotFoundError, match="no file matches"):
            FileSource.describe([f"{root}/{glob}"], "image")
    else:
        assert planned(FileSource.describe([f"{root}/{glob}"], "image")) == names


def test_keys_begin_where_the_glob_does(tmp_path: Path) -> None:
    touch(tmp_path, *TREE)
    assert planned(FileSource.describe([f"{tmp_path}/a/b/**/*"], "image")) == ["3.jpg", "c/4.png"]


def test_a_folder_gives_its_images_and_says_what_it_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, *TREE, "notes.txt", "more/x.csv", "README")
    source = FileSource.describe([str(tmp_path)], "image")
    assert source.remark() is None
    images = ["a/1.jpg", "a/2.JPG", "a/b/3.jpg", "a/b/c/4.png", "a1.jpg", "é.jpg"]
    assert planned(source) == images
    assert planned(source) == images
    assert source.remark() == (
        "4 files passed over, not images by their name: .csv 2, .txt 1, without suffix 1; "
        f"a glob such as '{tmp_path}/**/*' takes them all"
    )
    assert planned(FileSource.describe([str(tmp_path)], "bytes"))[-1] == "é.jpg"


def test_a_name_that_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    touch(tmp_path, "odd[1]/x.jpg", "odd1/y.jpg", "what?.jpg")
    assert planned(FileSource.describe([f"{tmp_path}/odd[1]"], "image")) == ["x.jpg"]
    assert planned(FileSource.describe([f"{tmp_path}/what?.jpg"], "image")) == ["what?.jpg"]


def test_many_single_files_share_chunks(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n % 3}/{n}.jpg" for n in range(100)))
    uris = [str(path) for path in tmp_path.rglob("*.jpg")]
    source = FileSource.describe([*uris, *uris[:5]], "image")
    chunks = chunks_of(source, 64)
    assert [chunk.count for chunk in chunks] == [64, 36]
    assert planned(source) == sorted(str(Path(uri).relative_to(tmp_path)) for uri in uris)


def test_places_without_a_common_folder_are_named_in_the_key(tmp_path: Path) -> None:
    bucket = f"memory://{uuid.uuid4().hex}"
    open_store(bucket).write("in/x.jpg", b"")
    touch(tmp_path, "y.jpg")
    source = FileSource.describe([f"{bucket}/in/", str(tmp_path)], "image")
    assert planned(source) == [f"{bucket}/in/x.jpg", f"{tmp_path}/y.jpg"]


def test_chunks_are_bounded_by_bytes(tmp_path: Path) -> None:
    for name, size in (("1", 60), ("2", 60), ("3", 200), ("4", 10), ("5", 10)):
        touch(tmp_path, name, data=bytes(size))
    source = FileSource.describe([str(tmp_path)], "bytes")
    chunks = list(source.plan(None, 0, lambda: ChunkLimit(100, 120)))
    assert [source.keys(chunk) for chunk in chunks] == [["1", "2"], ["3"], ["4", "5"]]


def test_what_is_not_there(tmp_path: Path) -> None:
    touch(tmp_path, "photos/x.jpg", "tables/x.csv", "texts/x.txt", "texts/y.md", ".hidden")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").symlink_to("nowhere")
    for uri, message in (
        ("Photo", r"no file or folder .*/Photo\n.*did you mean '.*/photos'\?"),
        ("photos/deep/x.jpg", r"photos is there, but holds no 'deep'"),
        ("nothing-alike", "is there and holds 6 names"),
        ("empty", "holds no files to score"),
        ("tables", r"the only file in .*tables does not have the name of an image \(\.csv 1\)\n.*choose a model for"),
        ("texts", r"none of the 2 files in .*texts has the name of an image \(\.md 1, \.txt 1\)\n.*texts/\*\*/\*'"),
        ("*.tif", r"no file matches .*\*\.tif\n.*crosses folders"),
        ("fotos/*.jpg", "did you mean '.*/photos'"),
        ("broken", "is a link to nowhere, which is not there"),
    ):
        with pytest.raises(SourceNotFoundError, match=message):
            FileSource.describe([str(tmp_path / uri)], "image")
    for uri in ("memory://none/x.jpg", "memory://none", "memory://none/*.jpg"):
        with pytest.raises(SourceNotFoundError):
            FileSource.describe([uri], "image")


def test_what_vanished_before_planning(tmp_path: Path) -> None:
    touch(tmp_path, "x.jpg")
    source = FileSource.describe([str(tmp_path)], "image")
    (tmp_path / "x.jpg").unlink()
    with pytest.raises(SourceNotFoundError):
        chunks_of(source, 10)
    assert chunks_of(source, 10, after='[0, "x.jpg"]') == []


def test_what_cannot_be_a_source(tmp_path: Path) -> None:
    touch(tmp_path, "x.jpg")
    with pytest.raises(SpecError, match="not as table"):
        FileSource.describe([str(tmp_path)], "table")
    with pytest.raises(SpecError, match="no source"):
        FileSource.describe([], "image")
    with pytest.raises(SpecError, match="is not a glob"):
        FileSource.describe([f"{tmp_path}/[z-a]*"], "image")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceNotFoundError, match="neither a file nor a folder"):
        FileSource.describe([str(tmp_path / "pipe")], "bytes")


AWKWARD = [os.fsdecode(b"caf\xe9.jpg"), "line\nbreak.jpg", "100%.jpg", "a#b?.jpg", "-rf.jpg", "n" * 251 + ".jpg"]


@pytest.mark.parametrize("wanted", ["bytes", "path"])
def test_any_name_survives_the_way_to_the_worker(tmp_path: Path, wanted: Input) -> None:
    for name in AWKWARD:
        touch(tmp_path, name, data=os.fsencode(name))
    source = FileSource.describe([str(tmp_path)], wanted)
    scorer = Recorder()
    scorer.input = wanted
    chunks = [
        Chunk(chunk.first, chunk.count, json.loads(json.dumps(chunk.payload).encode()), chunk.cursor)
        for chunk in chunks_of(source, 2)
    ]
    contents = []
    for chunk in chunks:
        chunk.cursor.encode()
        for batch in source.read(chunk, scorer, Timings()):
            contents += [each if wanted == "bytes" else each.read_bytes() for each in batch.values]
    assert contents == [os.fsencode(name) for name in sorted(AWKWARD)]
    assert r"caf\xe9.jpg" in planned(source)
    for chunk in chunks:
        rest = planned(source, after=chunk.cursor)
        assert rest == planned(source)[chunk.first + chunk.count :]


def test_bad_items_are_dead_with_their_stage_and_reason(tmp_path: Path, png: bytes) -> None:
    touch(tmp_path, "0.png", "3.png", "5.png", data=png)
    touch(tmp_path, "1.png", data=b"<html>")
    (tmp_path / "2.png").symlink_to("nowhere")
    touch(tmp_path, "4.png", data=b"")
    values, dead = read(FileSource.describe([str(tmp_path)], "image"), Recorder(fail=["5.png"]))
    assert list(values) == ["0.png", "3.png"]
    assert {position: (error.stage, error.message) for position, error in dead.items()} == {
        1: ("decode", "not an image, but a web page (starts with b'<html>')"),
        2: ("read", f"cannot read {tmp_path}/2.png: there is no such file or folder"),
        4: ("decode", "the file is empty (0 bytes)"),
        5: ("prepare", "ValueError: cannot prepare 5.png"),
    }


def test_info_tells_the_original_size(tmp_path: Path) -> None:
    Image.new("RGB", (640, 480)).save(tmp_path / "x.jpg")
    seen: list[Item] = []

    class Small(Scorer):
        size = (64, 64)

        def prepare(self, item: Item) -> object:
            seen.append(item)
            return item.value

    values, _ = read(FileSource.describe([str(tmp_path / "x.jpg")], "image"), Small())
    assert [(item.key, item.info) for item in seen] == [("x.jpg", {"width": 640, "height": 480})]
    assert values["x.jpg"].shape == (240, 320, 3)  # type: ignore[attr-defined]


def test_remote_paths_are_files_until_the_next_batch(tmp_path: Path) -> None:
    place = f"memory://{uuid.uuid4().hex}/in"
    for name in ("a/x.bin", "b/x.bin", "c/x.bin"):
        open_store(place).write(name, name.encode())
    source = FileSource.describe([place], "path")
    scorer = Recorder()
    scorer.input, scorer.batch_size = "path", 2
    [chunk] = chunks_of(source, 10)
    batches = source.read(chunk, scorer, Timings())
    first = next(batches)
    assert [(path.name, path.read_bytes()) for path in first.values] == [("x.bin", b"a/x.bin"), ("x.bin", b"b/x.bin")]
    second = next(batches)
    assert not any(path.exists() for path in first.values)
    assert second.values[0].read_bytes() == b"c/x.bin"
    batches.close()
    assert not second.values[0].exists()


def test_local_paths_are_a_sequence_of_paths(tmp_path: Path) -> None:
    touch(tmp_path, "1", "2", "3")
    scorer = Scorer()
    scorer.input = "path"
    source = FileSource.describe([str(tmp_path)], "path")
    [batch] = source.read(chunks_of(source, 10)[0], scorer, Timings())
    values = batch.values
    assert list(values) == [tmp_path / "1", tmp_path / "2", tmp_path / "3"]
    assert (values[0], values[-1], len(values[1:]), values[1:][0]) == (
        tmp_path / "1",
        tmp_path / "3",
        2,
        tmp_path / "2",
    )


def test_reading_ahead_is_bounded_in_items(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n:03}" for n in range(100)))
    scorer = Recorder()
    scorer.input, scorer.batch_size = "bytes", 4
    source = FileSource.describe([str(tmp_path)], "bytes")
    batches = source.read(chunks_of(source, 1000)[0], scorer, Timings())
    taken = 0
    for batch in batches:
        taken += len(batch.keys)
        assert len(scorer.prepared) <= taken + AHEAD * scorer.batch_size
    assert taken == 100


def test_reading_ahead_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tally.sources.reading.AHEAD_BYTES", 10)  # less than one item
    touch(tmp_path, *(f"{n:03}" for n in range(40)), data=bytes(100))
    scorer = Recorder()
    scorer.input, scorer.batch_size = "bytes", 4
    source = FileSource.describe([str(tmp_path)], "bytes")
    taken = 0
    for batch in source.read(chunks_of(source, 1000)[0], scorer, Timings()):
        taken += len(batch.keys)
        assert len(scorer.prepared) == taken
    assert taken == 40


def test_closing_waits_for_the_items_at_work_and_begins_no_other(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n:03}" for n in range(64)))
    inside, release = threading.Event(), threading.Event()

    class Slow(Recorder):
        def prepare(self, item: Item) -> object:
            value = super().prepare(item)
            if item.key >= "004":
                inside.set()
                assert release.wait(30)
            return value

    scorer = Slow()
    scorer.input, scorer.batch_size = "bytes", 4
    source = FileSource.describe([str(tmp_path)], "bytes")
    batches = source.read(chunks_of(source, 1000)[0], scorer, Timings())
    next(batches)
    assert inside.wait(30)
    closer = threading.Thread(target=batches.close)
    closer.start()
    release.set()
    closer.join(30)
    assert not closer.is_alive()
    assert len(scorer.prepared) <= 4 + AHEAD * 4
    assert next(batches, None) is None


def test_threads_are_kept_between_chunks(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n:03}" for n in range(20)))
    seen: set[int] = set()

    class Who(Scorer):
        input = "bytes"

        def prepare(self, item: Item) -> object:
            seen.add(threading.get_ident())
            return item.value

    source = FileSource.describe([str(tmp_path)], "bytes")
    for chunk in chunks_of(source, 1):
        for _ in source.read(chunk, Who(), Timings()):
            pass
    assert len(seen) <= LOCAL_THREADS
    assert threading.get_ident() not in seen


def test_combining_joins_what_was_apart(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n:05}" for n in range(5000)))
    source = FileSource.describe([str(tmp_path)], "path")
    combined = source.combine(chunks_of(source, 2))
    assert [chunk.count for chunk in combined] == [4096, 904]
