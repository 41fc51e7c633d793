"""Where the registry keeps the content of its versions: a folder, or a bucket that a whole team sees.

Content is named by its hash and never changes. A folder gets that name only when it is complete; in a bucket, the list
of files is written last (see :mod:`tally.models.mirror`) and removed first.
"""

from __future__ import annotations

import errno
import platform
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from tally.errors import ModelChangedError, ModelNotFoundError, StorageError
from tally.models import mirror
from tally.models.hashing import check_content, content_files
from tally.storage import Store, is_url, local_of, open_store

_CHANGED = "the registry's copy was changed"


class BlobStore(ABC):
    """Content under its hash (``sha256:...``). ``name``, for messages, says what it is the content of."""

    @abstractmethod
    def address(self, digest: str) -> str:
        """The path or URL of the content's folder."""

    @abstractmethod
    def mirror(self, digest: str) -> str | None:
        """The folder that other machines fetch the content from; None if they need not."""

    @abstractmethod
    def building(self) -> AbstractContextManager[Path]:
        """A temporary folder to build content in, for :meth:`put`."""

    @abstractmethod
    def put(self, package: Path, digest: str) -> None:
        """Keep the content of a folder in what :meth:`building` gave. Existing content stays, unless it is damaged."""

    @abstractmethod
    def has(self, digest: str) -> bool:
        """Whether the content is complete, without reading it."""

    @abstractmethod
    def check(self, digest: str, name: str) -> None:
        """Read what is kept, and compare it with its hash.

        Raises ModelChangedError, ModelNotFoundError, StorageError.
        """

    @abstractmethod
    def fetch(self, digest: str, name: str) -> Path:
        """A folder of this machine with the content, checked. Raises as :meth:`check` does."""

    @abstractmethod
    def remove(self, digest: str) -> None:
        """Remove the content, or what is left of it."""


def open_blobs(root: str | Path) -> BlobStore:
    """The blobs in a folder, or in a bucket given as a URL."""
    text = str(root)
    if is_url(text) and not text.lower().startswith("file:"):
        return BucketBlobs(text)
    return FolderBlobs(Path(local_of(text) if is_url(text) else text))


def _repair(name: str) -> str:
    model = name.removeprefix("models:/").rpartition("/")[0] or "NAME"
    return f"Add the original again to repair it: tally models add {model} MODEL"


class FolderBlobs(BlobStore):
    def __init__(self, root: Path) -> None:
        self.root = root

    def _folder(self, digest: str) -> Path:
        return self.root / "sha256" / digest.removeprefix("sha256:")

    def address(self, digest: str) -> str:
        return str(self._folder(digest))

    def mirror(self, digest: str) -> str | None:
        return None  # those that see the folder need not fetch it

    @contextmanager
    def building(self) -> Iterator[Path]:
        parent = self.root / "sha256"
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".adding-") as temporary:
            yield Path(temporary)

    def put(self, package: Path, digest: str) -> None:
        kept = self._folder(digest)
        try:
            package.rename(kept)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        try:
            check_content(digest, kept, (".",), digest, reread=True)
        except ModelChangedError:  # what was just made is right
            kept.rename(package.with_name("damaged"))
            package.rename(kept)

    def has(self, digest: str) -> bool:
        return self._folder(digest).is_dir()

    def check(self, digest: str, name: str) -> None:
        self._compare(digest, name, reread=True)

    def _compare(self, digest: str, name: str, *, reread: bool) -> None:
        folder = self._folder(digest)
        if not folder.is_dir():
            raise ModelNotFoundError(
                f"{name}: its content is not on this machine ({platform.node()}): there is no {folder}"
            )
        check_content(name, folder, (".",), digest, reread=reread, what=_CHANGED, hint=_repair(name))

    def fetch(self, digest: str, name: str) -> Path:
        self._compare(digest, name, reread=False)
        return self._folder(digest)

    def remove(self, digest: str) -> None:
        shutil.rmtree(self._folder(digest), ignore_errors=True)


class BucketBlobs(BlobStore):
    def __init__(self, root: str) -> None:
        self.root = open_store(root).url

    def _store(self, digest: str) -> Store:
        return open_store(self.address(digest))

    def address(self, digest: str) -> str:
        return f"{self.root}/sha256/{digest.removeprefix('sha256:')}"

    def mirror(self, digest: str) -> str | None:
        return self.address(digest)

    @contextmanager
    def building(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="tally-adding-") as temporary:
            yield Path(temporary)

    def put(self, package: Path, digest: str) -> None:
        with suppress(ModelChangedError, ModelNotFoundError):
            self.check(digest, digest)
            return
        mirror.put(digest, self._store(digest), content_files(package, (".",)), digest)

    def has(self, digest: str) -> bool:
        return mirror.is_whole(self._store(digest), digest)

    def check(self, digest: str, name: str) -> None:
        self._whole(digest, name)
        with tempfile.TemporaryDirectory(prefix="tally-checking-") as temporary:
            try:
                mirror.copy(name, self._store(digest), (".",), digest, Path(temporary))
            except ModelChangedError as error:
                raise self._changed(digest, name) from error

    def fetch(self, digest: str, name: str) -> Path:
        self._whole(digest, name)
        try:
            return mirror.fetch(name, self.address(digest), (".",), digest)
        except ModelChangedError as error:
            raise self._changed(digest, name) from error

    def _whole(self, digest: str, name: str) -> None:
        if self.has(digest):
            return
        store = self._store(digest)
        if store.exists(mirror.CONTENTS):
            raise self._changed(digest, name)
        raise ModelNotFoundError(f"{name}: its content is missing or incomplete at {store.url}", hint=_repair(name))

    def _changed(self, digest: str, name: str) -> ModelChangedError:
        return ModelChangedError(f"{name}: {_CHANGED}: {self.address(digest)}", hint=_repair(name))

    def remove(self, digest: str) -> None:
        try:
            mirror.discard(self._store(digest))
        except StorageError as error:
            error.message = f"the version is removed, its content is not: {error.message}"
            raise
