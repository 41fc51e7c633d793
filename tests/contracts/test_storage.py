from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from tally.storage import LocalStore, Store, open_store
from tally.testing.storage import StoreContract


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
