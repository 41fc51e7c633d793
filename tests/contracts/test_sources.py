from __future__ import annotations

import uuid
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from tally.sources.base import Source
from tally.sources.files import FileSource
from tally.storage import open_store
from tally.testing.sources import SourceContract

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
