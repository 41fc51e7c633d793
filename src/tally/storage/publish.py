"""A file that appears whole or not at all, and durably: nobody ever reads half of one, even after a power cut."""

# ruff: noqa: PTH102, PTH105, PTH106, PTH108, PTH112, PTH120  # a million files pass through here, and pathlib is slow

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tally.storage.base import TEMPORARY


@contextmanager
def whole(target: str | os.PathLike[str], *, exclusive: bool = False, private: bool = False) -> Iterator[str]:
    """A path to write the content of ``target`` to; on leaving, the file takes its name and is durable.

    If an error ends the block, nothing is left behind, and ``target`` is as it was. The folder must exist.
    exclusive: raise FileExistsError if there is such a file already. private: only this user may read it.
    Raises OSError.
    """
    final = os.fspath(target)
    folder = os.path.dirname(final)
    # A short name of its own: the target's may already be as long as the file system allows.
    temporary = f"{folder or '.'}/{TEMPORARY}{secrets.token_hex(8)}"
    try:
        if private:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield temporary
        _sync(temporary, os.O_RDWR)
        if exclusive:
            _claim(temporary, final)
        else:
            os.replace(temporary, final)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(folder)


def write_whole(target: str | os.PathLike[str], content: bytes, *, private: bool = False) -> None:
    """Write a file with this content, as :func:`whole` does."""
    with whole(target, private=private) as temporary, open(temporary, "wb") as file:
        file.write(content)


def make_folder(path: str) -> list[str]:
    """Make a folder and its parents, durably; returns those that were not there, outermost first. Raises OSError."""
    missing, made = [], []
    while path and not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        try:
            os.mkdir(folder)
            made.append(folder)
        except FileExistsError:
            if not os.path.isdir(folder):
                remove_empty(made)
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder) from None
        except OSError:
            remove_empty(made)
            raise
        sync_folder(os.path.dirname(folder))
    return made


def remove_empty(folders: list[str]) -> None:
    """Remove folders that :func:`make_folder` made, unless somebody uses them by now."""
    for folder in reversed(folders):
        with suppress(OSError):
            os.rmdir(folder)


def sync_folder(path: str) -> None:
    """Make the names in a folder durable."""
    try:
        _sync(path or ".", os.O_RDONLY)
    except OSError as error:
        # Some network file systems sync folders on their own and refuse to be asked.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise


def _sync(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _claim(temporary: str, final: str) -> None:
    """Give a finished file its name, unless that name is taken."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # No hard links here: take the name first, then give it the content.
        os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(temporary, final)
    else:
        os.unlink(temporary)
