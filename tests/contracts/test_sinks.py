"""The sink contract, on every sink and format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from tally.sinks.base import Sink
from tally.sinks.choose import choose
from tally.testing.sinks import SinkContract


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


def _bucket(request: pytest.FixtureRequest) -> str:
    return f"{type(request.instance).__name__}-{request.node.name}".lower().replace("_", "-")
