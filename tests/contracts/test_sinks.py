"""The sink contract, on every sink and format."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

import av
import numpy as np
import pytest
from tests.videos import write_clip

from tally.media.video.frame import FrameInfo
from tally.media.video.metadata import Colour, Video
from tally.scorers.base import Pictured, Thumbnail, Thumbnailed
from tally.sinks import merge
from tally.sinks.base import Output, Sink
from tally.sinks.factory import sink_for
from tally.sinks.video import VideoSink
from tally.sources.base import Chunk
from tally.testing.sinks import DEAD, FACTS, SinkContract, key


class _Rows(SinkContract):
    name = "out"
    format: str | None = None
    columns: ClassVar[dict[str, str] | None] = None

    @pytest.fixture
    def make(self) -> Callable[[Path], Sink]:
        return lambda folder: sink_for(str(folder / self.name), output="rows", format=self.format, columns=self.columns)

    @pytest.fixture
    def result(self) -> Callable[[int], Any]:
        return lambda n: {"label": f'a, "b" {n}', "score": n / 2, "box": [n, n + 1]}


class TestParquet(_Rows):
    pass


class TestDeclaredColumns(_Rows):
    columns: ClassVar = {"label": "string", "score": "float32", "box": "list<int32>"}


class TestLargeParts(TestDeclaredColumns):
    """Staged files that are parts as they are, beside others that are put together."""

    @pytest.fixture(autouse=True)
    def large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(merge, "PART_ROWS", 24)  # an eighth is large enough

    def test_what_is_large_is_not_written_again(self, sink: Sink, attempt: Any, keys: Any) -> None:
        sink.claim("job-1")
        outputs = [attempt(sink, name, *range_) for name, range_ in self.attempts.items()]
        staged = {(sink.layout.address(sink.layout.staging + o.files[0])): o for o in outputs}  # type: ignore[attr-defined]
        inodes = [Path(path).stat().st_ino for path in staged]
        manifest = sink.finalize(outputs, [], FACTS)
        assert [file["rows"] for file in manifest["files"]] == [2, 3, 2, 4]
        parts = [Path(sink.layout.address(file["path"])).stat().st_ino for file in manifest["files"]]  # type: ignore[attr-defined]
        assert (parts[1], parts[3]) == (inodes[2], inodes[4])
        assert keys(sink, []) == [key(n) for n in range(11)]
        assert "moves" not in manifest

    attempts: ClassVar = {"a": (0, 1), "b": (1, 2), "c": (2, 5), "d": (5, 7), "e": (7, 11)}


class TestMergedInOrder(_Rows):
    """A merged file in the order of the source, whatever the order of the chunks."""

    name = "out.csv"
    sorts = True
    columns: ClassVar = {"at": "int64", "score": "float64"}

    @pytest.fixture
    def make(self) -> Callable[[Path], Sink]:
        return lambda folder: sink_for(str(folder / self.name), output="rows", columns=self.columns, order="at")

    @pytest.fixture
    def info(self) -> Callable[[int], dict[str, Any] | None]:
        return lambda n: {"at": n}

    @pytest.fixture
    def result(self) -> Callable[[int], Any]:
        return lambda n: {"score": n / 2}

    def test_the_order_is_not_written(self, sink: Sink, attempt: Any) -> None:
        sink.claim("job-1")
        manifest = sink.finalize([attempt(sink, "a", 0, 3)], [], FACTS)
        assert manifest["schema"] == {"key": "string", "score": "float64"}


class TestFolderInOrder(TestMergedInOrder):
    """In folders, rows stay in the order of the chunks."""

    name = "out"
    sorts = False


class TestCsv(_Rows):
    format = "csv"


class TestJsonLines(_Rows):
    format = "jsonl"


class TestMergedParquet(_Rows):
    name = "out.parquet"


class TestMergedCsv(_Rows):
    name = "out.csv"


class TestMergedJsonLines(_Rows):
    name = "out.jsonl"


class TestSeveralRows(_Rows):
    rows_per_item = 2

    @pytest.fixture
    def result(self) -> Callable[[int], Any]:
        return lambda n: [{"label": "a", "score": n / 2}, {"label": "b"}]


class TestPictures(SinkContract):
    @pytest.fixture
    def make(self) -> Callable[[Path], Sink]:
        return lambda folder: sink_for(str(folder / "out"), output="image")

    @pytest.fixture
    def result(self) -> Callable[[int], Any]:
        return lambda n: np.full((4, 6, 3), n, np.uint8)


class TestPicturesWithRows(SinkContract):
    rows_per_item = 2

    @pytest.fixture
    def make(self) -> Callable[[Path], Sink]:
        columns = {"label": "string", "score": "float32", "width": "int32"}
        return lambda folder: sink_for(str(folder / "out"), output="image", columns=columns)

    @pytest.fixture
    def result(self) -> Callable[[int], Any]:
        rows: list[dict[str, Any]] = [{"label": "a", "score": 0.5, "width": -1}, {"label": "b", "more": 1}]
        return lambda n: Pictured(np.full((4, 6, 3), n, np.uint8), rows)


def small(n: int) -> Thumbnail:
    return Thumbnail(b"JPEG %d" % n, n + 1, n + 2)


class TestThumbnails(_Rows):
    """Results that come with small pictures of their items; some staged files of both are parts as they are."""

    @pytest.fixture(autouse=True)
    def large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(merge, "PART_ROWS", 24)  # an eighth is large enough

    @pytest.fixture
    def make(self) -> Callable[[Path], Sink]:
        return lambda folder: sink_for(str(folder / "out"), output="rows", columns=self.columns, thumbnails=True)

    columns: ClassVar = {"score": "float32"}

    @pytest.fixture
    def result(self) -> Callable[[int], Any]:
        return lambda n: Thumbnailed({"score": n / 2}, small(n))


@pytest.mark.parametrize("out", ["rows", "rows.csv", "pictures", "memory://{}"])
def test_each_item_that_counts_has_its_thumbnail(out: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pictures = out == "pictures"
    place = out.format(f"{_bucket(request)}/out") if "://" in out else str(tmp_path / out)
    sink = sink_for(place, output="image" if pictures else "rows", thumbnails=True)
    keys = [key(n) for n in range(8)]

    def attempt(name: str, start: int, stop: int, bad: int = -1) -> Output:
        writer = sink.open(name, Chunk(start, stop - start, {}))
        plain = [np.full((4, 6, 3), n, np.uint8) if pictures else {"score": n} for n in range(start, stop)]
        results = [Thumbnailed(result, small(n)) for n, result in enumerate(plain, start)]
        if bad >= 0:
            results[bad - start] = Thumbnailed(object(), small(bad))  # type: ignore[arg-type]
        assert [index + start for index, _ in writer.add(keys[start:stop], results)] == [bad][: bad >= 0]
        return writer.close()

    def shown(*numbers: int) -> dict[str, Thumbnail]:
        return {key(n): small(n) for n in numbers}

    sink.claim("job-1")
    outputs = [attempt("a", 0, 3), attempt("b", 3, 5, bad=4)]
    attempt("lost", 5, 7)
    assert sink.thumbnails_of(outputs, keys) == shown(0, 1, 2, 3)
    assert sink.thumbnails_of(outputs, [key(2), "none"]) == shown(2)
    manifest = sink.finalize(outputs, DEAD, FACTS)
    assert sum(file["rows"] for file in manifest["thumbnails"]) == 4
    assert sink.thumbnails_of([], keys) == shown(0, 1, 2, 3)
    sink.claim("job-1")
    second = attempt("c", 4, 6)
    assert sink.thumbnails_of([*outputs, second], keys) == shown(0, 1, 2, 3, 4, 5)
    sink.finalize([second], [], {**FACTS, "generation": 1})
    assert sink.thumbnails_of([], keys) == shown(0, 1, 2, 3, 4, 5)
    sink.claim("job-2", overwrite=True)
    assert sink.thumbnails_of([], keys) == {}


class TestBucket(_Rows):
    """An object store that lives in memory."""

    @pytest.fixture
    def make(self, request: pytest.FixtureRequest) -> Callable[[Path], Sink]:
        return lambda folder: sink_for(f"memory://{_bucket(request)}/{folder.name}/out", output="rows")


class TestBucketPictures(TestPictures):
    @pytest.fixture
    def make(self, request: pytest.FixtureRequest) -> Callable[[Path], Sink]:
        return lambda folder: sink_for(f"memory://{_bucket(request)}/{folder.name}/out", output="image")


class TestBucketMergedCsv(_Rows):
    @pytest.fixture
    def make(self, request: pytest.FixtureRequest) -> Callable[[Path], Sink]:
        return lambda folder: sink_for(f"memory://{_bucket(request)}/{folder.name}/out.csv", output="rows")


class _Video(SinkContract):
    """Frames of one brightness each, by which they are known again."""

    sorts = True
    name = "out"

    @pytest.fixture
    def make(self) -> Callable[[Path], Sink]:
        return lambda folder: sink_for(str(folder / self.name), output="video")

    @pytest.fixture
    def video(self, tmp_path_factory: pytest.TempPathFactory) -> Video:
        path = write_clip(tmp_path_factory.mktemp("source") / "clip.avi", 10, codec="mpeg4", bframes=0, sound=0.5)
        return Video(
            "a/clip.avi", str(path.parent), path.name, path.stat().st_size, 0, "mpeg4", Fraction(1, 25), 0,
            Fraction(25), 16, 16, (), Fraction(1), Colour(), 10,
        )  # fmt: skip

    @pytest.fixture
    def info(self, video: Video) -> Callable[[int], dict[str, Any] | None]:
        return lambda number: FrameInfo(video, number, number)

    @pytest.fixture
    def result(self) -> Callable[[int], Any]:
        return lambda n: np.full((16, 16, 3), 20 * n, np.uint8)

    @pytest.fixture
    def keys(self, tmp_path: Path) -> Callable[[Sink, Sequence[Output]], list[str]]:
        def read(sink: Sink, outputs: Sequence[Output]) -> list[str]:
            assert isinstance(sink, VideoSink)
            manifest, place = sink.manifest(), sink.layout
            staged = [place.staging + name for output in outputs for name in output.files]
            names = staged if manifest is None else [file["path"] for file in manifest["files"]]
            found: list[str] = []
            for name in names:
                with av.open(io.BytesIO(place.store.read(name))) as container:
                    frames = [frame.to_ndarray(format="rgb24")[0, 0, 0] for frame in container.decode(video=0)]
                found += [key(round(int(value) / 20)) for value in frames]
            return found

        return read


class TestVideo(_Video):
    pass


class TestOneVideo(_Video):
    name = "styled.mp4"


class TestMatroska(_Video):
    name = "styled.mkv"


class TestBucketVideo(_Video):
    @pytest.fixture
    def make(self, request: pytest.FixtureRequest) -> Callable[[Path], Sink]:
        return lambda folder: sink_for(f"memory://{_bucket(request)}/{folder.name}/out", output="video")


class _S3(SinkContract):
    name = "out"
    output: Literal["rows", "image", "video"] = "rows"
    format: str | None = None

    @pytest.fixture
    def make(self, s3: str) -> Callable[[Path], Sink]:
        return lambda folder: sink_for(f"{s3}/{folder.name}/{self.name}", output=self.output, format=self.format)


class _Azure(SinkContract):
    name = "out"
    output: Literal["rows", "image", "video"] = "rows"
    format: str | None = None

    @pytest.fixture
    def make(self, azure: str) -> Callable[[Path], Sink]:
        return lambda folder: sink_for(f"{azure}/{folder.name}/{self.name}", output=self.output, format=self.format)


class TestS3Parquet(_S3, _Rows):
    pass


class TestS3MergedCsv(_S3, _Rows):
    name = "out.csv"


class TestS3Pictures(_S3, TestPictures):
    output = "image"


class TestS3Video(_S3, _Video):
    output = "video"


class TestAzureParquet(_Azure, _Rows):
    pass


class TestAzureMergedParquet(_Azure, _Rows):
    name = "out.parquet"


class TestAzurePictures(_Azure, TestPictures):
    output = "image"


def _bucket(request: pytest.FixtureRequest) -> str:
    return f"{type(request.instance).__name__}-{request.node.name}".lower().replace("_", "-")
