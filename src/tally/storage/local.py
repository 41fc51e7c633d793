"""Folders of this machine."""

# For a million names, pathlib would cost more than the system calls.
# ruff: noqa: PTH100, PTH105, PTH106, PTH108, PTH110, PTH116, PTH120

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO, ClassVar

from tally.errors import SourceNotFoundError, StorageError
from tally.storage.base import TEMPORARY, Entry, Store, failure, key_of
from tally.storage.publish import make_folder, remove_empty, sync_folder, whole

_DELETIONS = 20
_DELETION_PAUSE = 0.1


class LocalStore(Store):
    """A folder of this machine. Names may hold any bytes of the file system, as ``os.fsdecode`` gives."""

    is_local: ClassVar = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.path.abspath(root)
        self._prefix = self._root.rstrip("/") + "/"

    @property
    def url(self) -> str:
        return self._root

    def list(
        self,
        prefix: str = "",
        after: str | None = None,
        *,
        enter: Callable[[str], bool] | None = None,
        sizes: bool = True,
    ) -> Iterator[Entry]:
        folder = prefix.strip("/") + "/" if prefix.strip("/") else ""
        root = self._prefix
        # One level per folder on the way to the current file. A folder's name ends in "/" among its
        # siblings, which makes the walk ascend by whole name: "a-b" < "a.txt" < "a/1" < "ab".
        levels = [(folder, self._children(folder, after, enter))]
        while levels:
            folder, children = levels[-1]
            for child in children:
                name = folder + child
                if child[-1] == "/":
                    levels.append((name, self._children(name, after, enter)))
                    break
                size = -1
                if sizes:
                    try:
                        size = os.stat(root + name).st_size
                    except OSError:
                        size = 0  # a broken link, or removed meanwhile: reading it will say so
                yield Entry(name, size)
            else:
                levels.pop()

    def _children(self, folder: str, after: str | None, enter: Callable[[str], bool] | None) -> Iterator[str]:
        """The names in a folder beyond ``after``, sorted; those of folders end in "/"."""
        place = self._prefix + folder
        names = []
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    name = entry.name
                    try:
                        if entry.is_file():
                            if not name.startswith(TEMPORARY):
                                names.append(name)
                        elif entry.is_dir():
                            if (enter is None or enter(folder + name)) and not (
                                entry.is_symlink() and self._circular(folder, name)
                            ):
                                names.append(name + "/")
                        elif entry.is_symlink() and not os.path.exists(place + name):
                            names.append(name)
                    except OSError:
                        names.append(name)
        except (FileNotFoundError, NotADirectoryError):
            return iter(())
        except OSError as error:
            raise failure("list", place, error) from None
        names.sort()
        if after is None or not after.startswith(folder):
            return iter(() if after is not None and folder < after else names)
        rest = after[len(folder) :]
        start = bisect_right(names, rest)
        if start and names[start - 1][-1] == "/" and rest.startswith(names[start - 1]):
            start -= 1  # the folder in which ``after`` is
        return islice(names, start, None)

    def _circular(self, folder: str, name: str) -> bool:
        """Whether a linked folder contains one of the folders that led to it."""
        target = os.path.realpath(self._prefix + folder + name)
        ancestor = self._prefix + folder
        while True:
            real = os.path.realpath(ancestor)
            if real == target or real.startswith(target.rstrip("/") + "/"):
                return True
            if len(ancestor) <= len(self._prefix):
                return False
            ancestor = ancestor[:-1].rpartition("/")[0] + "/"

    def _path(self, name: str) -> str:
        return self._prefix + self._inside(name)

    def read(self, name: str) -> bytes:
        path = self._path(name)
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise failure("read", path, error) from None

    def read_range(self, name: str, start: int, length: int, *, mark: str = "") -> bytes:
        path = self._path(name)
        try:
            with open(path, "rb") as file:
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise failure("read", path, error) from None

    def size(self, name: str) -> int:
        path = self._path(name)
        try:
            status = os.stat(path)
        except OSError as error:
            raise failure("read", path, error) from None
        if stat.S_ISDIR(status.st_mode):
            raise SourceNotFoundError(f"cannot read {key_of(path)}: it is a folder")
        return status.st_size

    def write(self, name: str, data: bytes | bytearray | memoryview, *, exclusive: bool = False) -> None:
        self._write(name, lambda file: file.write(data), exclusive)

    def upload(self, name: str, path: Path) -> None:
        try:
            with path.open("rb") as source:
                self._write(name, lambda file: shutil.copyfileobj(source, file))
        except StorageError:
            raise
        except OSError as error:
            raise failure("read", str(path), error) from None

    def _write(self, name: str, fill: Callable[[BinaryIO], object], exclusive: bool = False) -> None:
        path = self._path(name)
        made: list[str] = []
        try:
            made = make_folder(os.path.dirname(path))
            with whole(path, exclusive=exclusive) as temporary, open(temporary, "wb") as file:
                fill(file)
        except OSError as error:
            remove_empty(made)
            raise failure("write", path, error) from None

    def move(self, source: str, target: str) -> None:
        old, new = self._path(source), self._path(target)
        try:
            make_folder(os.path.dirname(new))
            os.replace(old, new)
            sync_folder(os.path.dirname(new))
            if os.path.dirname(old) != os.path.dirname(new):
                sync_folder(os.path.dirname(old))
        except OSError as error:
            raise failure(f"move {key_of(old)} to", new, error) from None

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            path = self._path(name)
            try:
                os.unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise failure("delete", path, error) from None

    def delete_tree(self, prefix: str = "") -> None:
        path = self._path(prefix.strip("/")) if prefix.strip("/") else self._root
        for left in reversed(range(_DELETIONS)):
            try:
                shutil.rmtree(path)
            except OSError as error:
                if not os.path.lexists(path):
                    return
                # A worker whose coordinator was killed may write or tidy up until it notices.
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT) or not left:
                    raise failure("delete", path, error) from None
                time.sleep(_DELETION_PAUSE)
            else:
                return

    def local_path(self, name: str) -> Path:
        self.size(name)
        return Path(self._path(name))

    def download(self, name: str, target: Path) -> None:
        path = self.local_path(name)
        try:
            shutil.copyfile(path, target)
        except OSError as error:
            raise failure(f"copy {key_of(os.fspath(path))} to", os.fspath(target), error) from None

    def version(self, name: str) -> str:
        return f"{self.size(name)} {os.stat(self._path(name)).st_mtime_ns}"

    def folders(self) -> set[str]:
        try:
            with os.scandir(self._root) as entries:
                return {entry.name for entry in entries if entry.is_dir()}
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise failure("list", self._root, error) from None

    def remove_partial(self, folder: str = "") -> None:
        with suppress(OSError), os.scandir(self._prefix + folder) as entries:
            for entry in entries:
                if entry.name.startswith(TEMPORARY):
                    with suppress(FileNotFoundError):
                        os.unlink(entry.path)

    def remove_folder(self, folder: str) -> None:
        with suppress(OSError):  # it is gone, or somebody uses it by now
            os.rmdir(self._prefix + folder)
