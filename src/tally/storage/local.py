"""Folders of this machine."""

# For a million names, pathlib would cost more than the system calls.
# ruff: noqa: PTH100, PTH105, PTH106, PTH108, PTH110, PTH114, PTH116, PTH120

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, ClassVar, cast

from tally.errors import SourceNotFoundError, StorageAwayError, StorageError
from tally.storage.base import PAGE, TEMPORARY, Page, Store, changed, failure, file_mark, key_of
from tally.storage.publish import make_folder, remove_empty, sync_folder, whole
from tally.storage.sorted_names import RUN, SortedNames

_DELETIONS = 20
_DELETION_PAUSE = 0.1

_STEP_NS = 20_000_000
_COARSE_STEP_NS = 2_000_000_000
"""The steps in which file systems count the time of a change: those of the kernel's clock (10 ms at most); FAT's 2 s,
which are whole seconds."""
_SETTLING_TRIES = 5
_NUMBERED_ANEW = ("vfat", "exfat", "msdos", "fuse")
"""File systems whose files get other numbers (inodes) when they are mounted again, or on another machine."""


class LocalStore(Store):
    """A folder of this machine. Names may hold any bytes of the file system, as ``os.fsdecode`` gives."""

    is_local: ClassVar = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.path.abspath(root)
        self._prefix = self._root.rstrip("/") + "/"

    @property
    def url(self) -> str:
        return self._root

    def pages(
        self,
        prefix: str = "",
        after: str | None = None,
        *,
        enter: Callable[[str], bool] | None = None,
        sizes: bool = True,
        marks: bool = False,
    ) -> Iterator[Page]:
        folder = prefix.strip("/") + "/" if prefix.strip("/") else ""
        identity = folder_identity(self._root)
        recent = time.time_ns() - _COARSE_STEP_NS
        length = 1  # who wants the first only does not wait for a thousand to be looked at
        # One level per folder on the way to the current file. A folder's name ends in "/" among its
        # siblings, which makes the walk ascend by whole name: "a-b" < "a.txt" < "a/1" < "ab".
        levels = [(folder, self._children(folder, after, enter, identity))]
        while levels:
            folder, runs = levels[-1]
            for run in runs:
                if isinstance(run, str):
                    name = folder + run
                    levels.append((name, self._children(name, after, enter, identity)))
                    break
                at = 0
                while at < len(run):
                    names = run[at : at + length]
                    if folder:
                        names = [folder + name for name in names]
                    at += length
                    length = min(2 * length, PAGE)
                    yield self._page(names, recent, sizes=sizes, marks=marks)
            else:
                levels.pop()

    def _page(self, names: list[str], recent: int, *, sizes: bool, marks: bool) -> Page:
        """recent: files that were changed later may still be written at this moment."""
        page = Page(names, [-1] * len(names), [""] * len(names))
        if sizes:
            root = self._prefix
            for number, name in enumerate(names):
                try:
                    status = os.stat(root + name)
                    if marks:
                        settled = status.st_mtime_ns <= recent
                        page.marks[number] = file_mark(status) if settled else _settled_mark(root + name, status)
                    page.sizes[number] = status.st_size
                except OSError:
                    page.sizes[number] = 0  # a broken link, or removed meanwhile: reading it will say so
        return page

    def _children(
        self, folder: str, after: str | None, enter: Callable[[str], bool] | None, identity: int | None
    ) -> Iterator[str | list[str]]:
        """What is in a folder beyond ``after``, sorted: the names of folders, which end in "/", and between them the
        names of files, as many as follow each other. identity: of the store's own folder."""
        place = self._prefix + folder
        found, names = SortedNames(), list[str]()
        folders = False
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
                                folders = True
                        elif entry.is_symlink() and not os.path.exists(place + name):
                            names.append(name)
                    except OSError:
                        names.append(name)
                    if len(names) == RUN:
                        found.add(names)
                        names = []
        except (FileNotFoundError, NotADirectoryError):
            if identity is not None and folder_identity(self._root) != identity:
                raise folder_away(self._root) from None
            return
        except OSError as error:
            raise failure("list", place, error) from None
        found.add(names)
        first = ""
        if after is not None:
            if after.startswith(folder):
                first = after[len(folder) :]
            elif folder < after:
                return
        inner, slash, _ = first.partition("/")
        for block in found.blocks():
            # The folder that "after" lies in has more.
            at = bisect_left(block, inner + slash) if slash else bisect_right(block, first)
            if folders:
                for end in [number for number in range(at, len(block)) if block[number][-1] == "/"]:
                    if at < end:
                        yield block[at:end]
                    yield block[end]
                    at = end + 1
            if at < len(block):
                yield block[at:]

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

    def _own_path(self, name: str) -> str:
        """The path of what is to be written or removed. Raises StorageError if a link leads out of the folder."""
        path = self._path(name)
        end = len(self._prefix)
        while (end := path.find("/", end + 1)) != -1:
            if os.path.islink(path[:end]):
                break
        else:
            return path
        root, folder = os.path.realpath(self._root), os.path.realpath(os.path.dirname(path))
        if folder != root and not folder.startswith(root.rstrip("/") + "/"):
            raise StorageError(
                f"cannot change {key_of(path)}: a link on its way leads out of {key_of(self._root)}",
                hint="Remove the link, or choose another place.",
            )
        return path

    def read(self, name: str, *, mark: str = "") -> bytes:
        return self._read(name, mark, lambda file: file.read())

    def read_range(self, name: str, start: int, length: int, *, mark: str = "") -> bytes:
        def part(file: BinaryIO) -> bytes:
            file.seek(start)
            return file.read(length)

        return self._read(name, mark, part)

    def _read(self, name: str, mark: str, read: Callable[[BinaryIO], bytes]) -> bytes:
        """What ``read`` makes of the file, which is the same file with the same content before and after."""
        path = self._path(name)
        try:
            with open(path, "rb", buffering=0) as file:
                before = file_mark(os.fstat(file.fileno()))
                if mark and before != mark and not _only_numbered_anew(path, mark, before):
                    raise changed(path, mark, before)
                content = read(cast(BinaryIO, file))
                after = file_mark(os.fstat(file.fileno()))
        except StorageError:
            raise
        except OSError as error:
            raise failure("read", path, error) from None
        if after != before:
            raise changed(path, before, after)
        return content

    def size(self, name: str) -> int:
        return self._status(name).st_size

    def _status(self, name: str) -> os.stat_result:
        path = self._path(name)
        try:
            status = os.stat(path)
        except OSError as error:
            raise failure("read", path, error) from None
        if stat.S_ISDIR(status.st_mode):
            raise SourceNotFoundError(f"cannot read {key_of(path)}: it is a folder")
        return status

    def marked(self, name: str) -> tuple[int, str]:
        status = self._status(name)
        if status.st_mtime_ns <= time.time_ns() - _COARSE_STEP_NS:
            return status.st_size, file_mark(status)
        try:
            return status.st_size, _settled_mark(self._path(name), status)
        except OSError as error:
            raise failure("read", self._path(name), error) from None

    def check_mark(self, name: str, mark: str) -> None:
        if not mark:
            return
        found = file_mark(self._status(name))
        if found != mark and not _only_numbered_anew(self._path(name), mark, found):
            raise changed(self._path(name), mark, found)

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
        path = self._own_path(name)
        made: list[str] = []
        try:
            made = make_folder(os.path.dirname(path))
            with whole(path, exclusive=exclusive) as temporary, open(temporary, "wb") as file:
                fill(file)
        except OSError as error:
            remove_empty(made)
            raise failure("write", path, error) from None

    def move(self, source: str, target: str) -> None:
        old, new = self._own_path(source), self._own_path(target)
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
            path = self._own_path(name)
            try:
                os.unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise failure("delete", path, error) from None

    def delete_tree(self, prefix: str = "") -> None:
        path = self._own_path(prefix.strip("/")) if prefix.strip("/") else self._root
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

    def local_path(self, name: str, *, mark: str = "") -> Path:
        self.size(name)
        self.check_mark(name, mark)
        return Path(self._path(name))

    def download(self, name: str, target: Path, *, mark: str = "") -> None:
        expected = mark or self.marked(name)[1]
        path = self.local_path(name, mark=mark)
        try:
            shutil.copyfile(path, target)
        except OSError as error:
            raise failure(f"copy {key_of(os.fspath(path))} to", os.fspath(target), error) from None
        self.check_mark(name, expected)

    def version(self, name: str) -> str:
        # Jobs of earlier versions have stored it.
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
        if folder:
            self._own_path(folder + "/x")
        with suppress(OSError), os.scandir(self._prefix + folder) as entries:
            for entry in entries:
                if entry.name.startswith(TEMPORARY):
                    with suppress(FileNotFoundError):
                        os.unlink(entry.path)

    def remove_folder(self, folder: str) -> None:
        with suppress(OSError):  # it is gone, or somebody uses it by now
            os.rmdir(self._prefix + folder)


def folder_identity(path: str) -> int | None:
    """The number that the file system knows a folder by; None if there is no such folder, or it cannot be reached."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def folder_away(path: str) -> StorageAwayError:
    """The error for a source's folder that is gone, or has been replaced by another, while it was used."""
    return StorageAwayError(
        f"{key_of(path)} is gone, or is not the folder that it was: was its disk unmounted?",
        hint="Bring it back and resume the job: nothing that was saved is lost.",
    )


def _settled_mark(path: str, status: os.stat_result) -> str:
    """The file's mark, once any later change must show in it: at the same step of the clock, it would not.

    Of a file that is being written all the time, a mark that is never found again. Raises OSError.
    """
    for _ in range(_SETTLING_TRIES):
        step = _STEP_NS if status.st_mtime_ns % 1_000_000_000 else _COARSE_STEP_NS
        age = time.time_ns() - status.st_mtime_ns
        if not 0 <= age < step:
            return file_mark(status)
        time.sleep((step - age) / 1e9)
        status = os.stat(path)
    return "being written"


def _only_numbered_anew(path: str, before: str, now: str) -> bool:
    """Whether two marks differ in the file's number only, and its file system gives other numbers at each mount."""
    if before.rpartition("-")[0] != now.rpartition("-")[0]:
        return False
    import psutil

    real = os.path.realpath(path)
    mounts = [
        each
        for each in psutil.disk_partitions(all=True)
        if os.path.commonpath([each.mountpoint, real]) == each.mountpoint
    ]
    return bool(mounts) and max(mounts, key=lambda each: len(each.mountpoint)).fstype.startswith(_NUMBERED_ANEW)
