from __future__ import annotations

import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import obstore
import pytest
from obstore.exceptions import GenericError
from tests.gcs import gcs
from tests.objectstores import Service

from tally.errors import StorageError
from tally.storage import LocalStore, Store, open_store
from tally.testing.storage import StoreContract


def among_others(bucket: str) -> Store:
    """A folder of a bucket that holds other objects too, some of them by names that are nearly the folder's."""
    for name in ("some/folde", "some/folder-2/x", "some/folder", "zoo"):
        open_store(bucket).write(name, b"x")
    return open_store(f"{bucket}/some/folder")


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "store")


class TestObjectStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return open_store(f"memory://{uuid.uuid4().hex}")


class TestObjectStoreFolder(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        bucket = uuid.uuid4().hex
        open_store(f"memory://{bucket}").write("somewhere/else", b"")
        return open_store(f"memory://{bucket}/some/folder")


class TestS3(StoreContract):
    @pytest.fixture
    def store(self, s3: str) -> Store:
        return open_store(s3)

    @pytest.fixture
    def put(self, s3: str, s3_server: Service) -> Callable[[str, bytes], None]:
        """Others may write names that Tally would not."""

        def put(key: str, data: bytes) -> None:
            url = f"{s3_server.url}/{s3.removeprefix('s3://')}/{key}"
            urllib.request.urlopen(urllib.request.Request(url, data=data, method="PUT"), timeout=30).close()

        return put

    def test_objects_that_stand_for_folders_are_no_items(self, store: Store, put: Any) -> None:
        for key in ("a/", "a/b/", "a/b/x", "a/c", "empty/", "z"):
            put(key, b"" if key.endswith("/") else b"x")
        assert [entry.name for entry in store.list()] == ["a/b/x", "a/c", "z"]
        assert [entry.name for entry in store.list("a")] == ["a/b/x", "a/c"]

    def test_a_name_that_cannot_be_used_costs_itself(self, store: Store, put: Any) -> None:
        store.write("a/x", b"x")
        put("b//c", b"x")
        assert [entry.name for entry in store.list()] == ["a/x", "b//c"]
        with pytest.raises(StorageError, match=r'cannot read s3://.*"b//c".*\n.*empty segments'):
            store.read("b//c")
        assert [entry.name for entry in store.list("a")] == ["a/x"]

    def test_no_credentials(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        error = GenericError("Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 1ms")
        monkeypatch.setattr(obstore, "head", Mock(side_effect=error))
        with pytest.raises(StorageError, match=r"no credentials were found.*\n.*AWS_ACCESS_KEY_ID"):
            store.size("x")


class TestS3Folder(StoreContract):
    @pytest.fixture
    def store(self, s3: str) -> Store:
        return among_others(s3)


class TestAzure(StoreContract):
    @pytest.fixture
    def store(self, azure: str) -> Store:
        return open_store(azure)


class TestAzureFolder(StoreContract):
    @pytest.fixture
    def store(self, azure: str) -> Store:
        return among_others(azure)


class TestGoogle(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
        with gcs(tmp_path) as service:
            service.enter(monkeypatch)
            yield open_store("gs://bucket/some/folder")
