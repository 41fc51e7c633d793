"""The sink contract, on every sink and format."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import pytest
from tests.videos import write_clip

from tally.sinks.base import Output, Sink
from tally.sinks.choose import choose
from tally.sinks.video import VideoSink
from tally.sources.base import Chunk
from tally.testing.sinks import SinkContract, key
from tally.video.facts import Colour, Video, pack


class _Rows(SinkContract):
    name = "out"
    format: str | None = None
    columns: ClassVar[dict[str, str] | None] = None

    @pytest.fixture
    def make(self) -> Callable[[Path], Sink]:
        return lambda folder: choose(str(folder / self.name), output="rows", format=self.format, columns=self.columns)

    @pytest.fixture
    def result(self) -> Callable[[int], Any]:
        return lambda n: {"label": f'a, "b" {n}', "score": n / 2, "box": [n, n + 1]}


class TestParquet(_Rows):
    pass


class TestDeclaredColumns(_Rows):
    columns: ClassVar = {"label": "string", "score": "float32", "box": "list<int32>"}


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
        return lambda folder: choose(str(folder / "out"), output="image")

    @pytest.fixture
    def result(self) -> Callable[[int], Any]:
        return lambda n: np.full((4, 6, 3), n, np.uint8)


class TestBucket(_Rows):
    """An object store that lives in memory."""

    @pytest.fixture
    def make(self, request: pytest.FixtureRequest) -> Callable[[Path], Sink]:
        return lambda folder: choose(f"memory://{_bucket(request)}/{folder.name}/out", output="rows")


class TestBucketPictures(TestPictures):
    @pytest.fixture
    def make(self, request: pytest.FixtureRequest) -> Callable[[Path], Sink]:
        return lambda folder: choose(f"memory://{_bucket(request)}/{folder.name}/out", output="image")


class TestBucketMergedCsv(_Rows):
    @pytest.fixture
    def make(self, request: pytest.FixtureRequest) -> Callable[[Path], Sink]:
        return lambda folder: choose(f"memory://{_bucket(request)}/{folder.name}/out.csv", output="rows")


class _Video(SinkContract):
    """Frames of one brightness each, by which they are known again."""

    sorts = True
    name = "out"

    @pytest.fixture
    def make(self) -> Callable[[Path], Sink]:
        return lambda folder: choose(str(folder / self.name), output="video")

    @pytest.fixture
    def video(self, tmp_path_factory: pytest.TempPathFactory) -> Video:
        path = write_clip(tmp_path_factory.mktemp("source") / "clip.avi", 10, codec="mpeg4", bframes=0, sound=0.5)
        return Video(
            "a/clip.avi", str(path.parent), path.name, path.stat().st_size, 0, "mpeg4", Fraction(1, 25), 0,
            Fraction(25), 16, 16, (), Fraction(1), Colour(), 10,
        )  # fmt: skip

    @pytest.fixture
    def chunk(self, video: Video) -> Callable[[int, int], Chunk]:
        def make(start: int, stop: int) -> Chunk:
            numbers = pack(range(start, stop))
            payload = {"video": video.to_json(), "numbers": numbers, "ticks": numbers, "step": 1}
            return Chunk(start, stop - start, payload)

        return make

    @pytest.fixture
    def info(self, video: Video) -> Callable[[int], dict[str, Any] | None]:
        return lambda number: {"video": video.key, "frame": number, "time": number / 25}

    @pytest.fixture
    def result(self) -> Callable[[int], Any]:
        return lambda n: np.full((16, 16, 3), 20 * n, np.uint8)

    @pytest.fixture
    def keys(self, tmp_path: Path) -> Callable[[Sink, Sequence[Output]], list[str]]:
        def read(sink: Sink, outputs: Sequence[Output]) -> list[str]:
            assert isinstance(sink, VideoSink)
            manifest, place = sink.manifest(), sink.place
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
        return lambda folder: choose(f"memory://{_bucket(request)}/{folder.name}/out", output="video")


def _bucket(request: pytest.FixtureRequest) -> str:
    return f"{type(request.instance).__name__}-{request.node.name}".lower().replace("_", "-")
