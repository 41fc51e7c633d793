"""Where bytes are kept: folders of this machine and object stores, behind one interface.

``open_store("photos/")`` gives a :class:`LocalStore`, ``open_store("s3://bucket/photos")`` an
:class:`ObjectStore`. A store holds objects under names: segments joined with ``/``, relative to the
store's place. Stores are safe to share between threads. Every failure is a
:class:`~tally.errors.StorageError` that says in plain words what was wrong and keeps ``errno``.
"""

# A million names pass through here, and pathlib costs more than the system calls do.
# ruff: noqa: PTH100, PTH102, PTH105, PTH108, PTH110, PTH112, PTH116, PTH120

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast
from urllib.parse import unquote, urlsplit

from tally.errors import OutputExistsError, SourceNotFoundError, StorageError

if TYPE_CHECKING:
    import obstore.store

KINDS = ("s3", "s3a", "gs", "az", "abfs", "abfss", "memory")
"""URL schemes of object stores. ``memory`` lives in this process, for tests."""

TEMPORARY = ".tally-tmp-"
"""Files that are being written begin with it; no listing shows them."""

_NEXT = {
    errno.ENOSPC: "Make room there, or choose another place.",
    errno.EDQUOT: "Make room there, or choose another place.",
    errno.EROFS: "Choose a place that can be written to.",
}
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "there is no such file or folder",
    errno.ENAMETOOLONG: "the file name is too long",
    errno.EISDIR: "it is a folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "it exists already",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.EIO: "the disk reported an input/output error",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
    errno.ENOTEMPTY: "the folder is not empty",
    errno.ESTALE: "the network file system lost it",
}

_HINTS = {
    "s3": "credentials come from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION; "
    "AWS_ENDPOINT names another service, AWS_SKIP_SIGNATURE=true reads a public bucket",
    "az": "credentials come from AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY "
    "(or AZURE_STORAGE_SAS_KEY, or AZURE_CLIENT_ID and its companions)",
    "gs": "credentials come from GOOGLE_APPLICATION_CREDENTIALS",
}
_HINTS |= {"s3a": _HINTS["s3"], "abfs": _HINTS["az"], "abfss": _HINTS["az"]}

# Who names an endpoint without encryption (a server on the same machine, say) means it.
_ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")

# A request is given up, and repeated, after these; a lost server is reported within three minutes.
_CONNECT_TIMEOUT = timedelta(seconds=10)
_REQUEST_TIMEOUT = timedelta(minutes=2)
_RETRIES = 8
_RETRY_TIMEOUT = timedelta(minutes=3)

_LIST_PAGE = 1000
_DELETE_PAGE = 1000
_DELETIONS = 20
_DELETION_PAUSE = 0.1


class Entry(NamedTuple):
    """One object of a listing. ``size`` in bytes; -1 where sizes were not asked for."""

    name: str
    size: int


class Store(ABC):
    """Objects under names. Implementations supply the primitives; all calls block."""

    @property
    @abstractmethod
    def url(self) -> str:
        """The place itself, without secrets: an absolute path, or a URL. :func:`open_store` takes it."""

    @abstractmethod
    def list(
        self,
        prefix: str = "",
        after: str | None = None,
        *,
        enter: Callable[[str], bool] | None = None,
        sizes: bool = True,
    ) -> Iterator[Entry]:
        """Every object under the folder ``prefix``, in ascending order of the whole name, lazily.

        after: only names greater than this one (whether or not it exists).
        enter: told the name of each folder below ``prefix``; False leaves the folder out.
        sizes: False saves a local store one system call per file.
        A folder that does not exist holds nothing. Local: symbolic links are followed except where they
        lead in a circle, broken ones are listed (with size 0), and what is no regular file is not.
        Raises StorageError naming the folder that cannot be read.
        """

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole content. Raises SourceNotFoundError where there is none."""

    @abstractmethod
    def read_range(self, name: str, start: int, length: int) -> bytes:
        """At most ``length`` bytes from byte ``start``: fewer where the object ends before."""

    @abstractmethod
    def size(self, name: str) -> int:
        """In bytes. Raises SourceNotFoundError where there is no such object."""

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name (a folder is none)."""
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    @abstractmethod
    def write(self, name: str, data: bytes | bytearray | memoryview, *, exclusive: bool = False) -> None:
        """Write all of it, durably, or nothing; folders are made as needed.

        exclusive: raise OutputExistsError where the object exists already. Of several writers at the
        same moment, one succeeds.
        """

    @abstractmethod
    def upload(self, name: str, path: Path) -> None:
        """Write a local file's content under a name, as :meth:`write` does, a part at a time."""

    @abstractmethod
    def move(self, source: str, target: str) -> None:
        """Rename, replacing ``target``. Atomic in a local store; a copy and a removal in an object store."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Remove these objects; those that are not there are no error."""

    @abstractmethod
    def delete_tree(self, prefix: str = "") -> None:
        """Remove everything under a folder, and the folder itself."""

    @abstractmethod
    def local_path(self, name: str) -> Path:
        """A file of this machine with the object's content: itself, or a cached download. Read only."""

    def _inside(self, name: str) -> str:
        """The name itself. Raises StorageError for one that would lead out of the store."""
        if not name or name[0] == "/" or "\0" in name or (".." in name and ".." in name.split("/")):
            raise StorageError(f"{name!r} is no name inside {key_of(self.url)}")
        return name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({key_of(self.url)!r})"


def open_store(place: str | os.PathLike[str]) -> Store:
    """The store at a path or URL. Nothing is contacted or created yet.

    Raises StorageError for a URL of unknown kind, or one that carries a password.
    """
    text = os.fspath(place)
    if not is_url(text):
        return LocalStore(text)
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    if scheme == "file":
        return LocalStore(local_of(text))
    _refuse_secrets(text)
    if scheme not in KINDS:
        known = ", ".join(f"{kind}://" for kind in KINDS if kind != "memory")
        raise StorageError(f"{mask(text)!r}: {scheme}:// is no kind of storage known here", hint=f"known are {known}")
    bucket, _, folder = rest.partition("/")
    return ObjectStore(scheme, bucket, folder.strip("/"))


def is_url(place: str) -> bool:
    """Whether a place is given as a URL and not as a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def local_of(url: str) -> str:
    """The path that a ``file://`` URL names."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise StorageError(f"{url!r} names a file of another machine ({parts.netloc})")
    return unquote(parts.path, errors="surrogateescape")


def key_of(name: str) -> str:
    r"""The name as valid UTF-8: a byte that is none is written ``\xff``."""
    if name.isascii():
        return name
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    return name


def name_to_json(name: str) -> str | dict[str, str]:
    """The name as JSON that every database takes: one that is not valid UTF-8 as its bytes, in hexadecimal."""
    return name if key_of(name) is name else {"bytes": os.fsencode(name).hex()}


def name_from_json(name: str | dict[str, str]) -> str:
    """The inverse of :func:`name_to_json`."""
    return name if isinstance(name, str) else os.fsdecode(bytes.fromhex(name["bytes"]))


def mask(url: str) -> str:
    """The URL with passwords, and the values of a query, replaced by ``***``; fit for messages."""
    url = re.sub(r"(?<=://)[^/@]*:[^/@]*(?=@)", "***", url)
    return re.sub(r"([?&][\w-]+=)[^&]*", r"\1***", url)


def _shown(place: str) -> str:
    """A place for a message: both ends of it where it is very long."""
    text = key_of(place)
    return text if len(text) <= 300 else f"{text[:100]}…{text[-150:]}"


def _refuse_secrets(url: str) -> None:
    if mask(url) == url:
        return
    raise StorageError(
        f"{mask(url)!r} carries credentials, which would end up in logs and manifests",
        hint=_HINTS.get(url.partition("://")[0].lower(), "set them in the environment instead"),
    )


def failure(doing: str, place: str, error: BaseException, *, hint: str | None = None) -> StorageError:
    """The StorageError for what the operating system or a client library raised.

    doing: ``read``, ``write``, ``list`` ...: the message begins with "cannot read <place>: ".
    """
    number = error.errno if isinstance(error, OSError) else None
    if number in _REASONS:
        reason = _REASONS[number]
    elif isinstance(error, FileNotFoundError):
        reason = "there is no such object"
    elif number is not None:
        reason = os.strerror(number).lower()
    else:
        # Client libraries append a dump of their internals to the first paragraph.
        reason = " ".join(str(error).split("\n\nDebug source", 1)[0].split()) or type(error).__name__
    kind = StorageError
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        kind = SourceNotFoundError
    elif isinstance(error, FileExistsError):
        kind = OutputExistsError
    raised = kind(f"cannot {doing} {_shown(place)}: {mask(reason)}", hint=hint or _NEXT.get(number or 0))
    raised.errno = number
    return raised


class LocalStore(Store):
    """A folder of this machine. Names may hold any bytes of the file system, as ``os.fsdecode`` gives."""

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
                        size = 0  # a broken link, or gone since: reading it will say so
                yield Entry(name, size)
            else:
                levels.pop()

    def _children(self, folder: str, after: str | None, enter: Callable[[str], bool] | None) -> Iterator[str]:
        """Names of a folder's files, and of its folders with a "/", sorted; those beyond ``after``."""
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

    def read_range(self, name: str, start: int, length: int) -> bytes:
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
        folder = os.path.dirname(path)
        # A short name of its own: the target's may already be as long as the file system allows.
        temporary = f"{folder}/{TEMPORARY}{secrets.token_hex(8)}"
        made: list[str] = []
        try:
            _make_folder(folder, made)
            try:
                with open(temporary, "xb") as file:
                    fill(file)
                    file.flush()
                    os.fsync(file.fileno())
                if exclusive:
                    _claim(temporary, path)
                else:
                    os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            _sync_folder(folder)
        except OSError as error:
            for each in reversed(made):
                with suppress(OSError):  # somebody else uses it by now
                    Path(each).rmdir()
            raise failure("write", path, error) from None

    def move(self, source: str, target: str) -> None:
        old, new = self._path(source), self._path(target)
        try:
            _make_folder(os.path.dirname(new))
            os.replace(old, new)
            _sync_folder(os.path.dirname(new))
            if os.path.dirname(old) != os.path.dirname(new):
                _sync_folder(os.path.dirname(old))
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
                # A worker whose coordinator was killed may write, or tidy up, until it notices.
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT) or not left:
                    raise failure("delete", path, error) from None
                time.sleep(_DELETION_PAUSE)
            else:
                return

    def local_path(self, name: str) -> Path:
        self.size(name)
        return Path(self._path(name))


def _claim(temporary: str, path: str) -> None:
    """Give a finished file its name, unless that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # No hard links here: the name is taken first, and then given the content.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def _make_folder(path: str, made: list[str] | None = None) -> None:
    """Make a folder and its parents, durably. made: gets those that were not there."""
    missing = []
    while path and not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        try:
            os.mkdir(folder)
            if made is not None:
                made.append(folder)
        except FileExistsError:
            if not os.path.isdir(folder):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder) from None
        _sync_folder(os.path.dirname(folder))


def _sync_folder(path: str) -> None:
    descriptor = os.open(path or "/", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync folders on their own and refuse to be asked.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


_clients: dict[tuple[int, str], obstore.store.ObjectStore] = {}
_clients_lock = threading.Lock()


class ObjectStore(Store):
    """A bucket, or a folder of one. Credentials come from the environment alone.

    scheme: one of :data:`KINDS`. bucket: as in the URL. folder: what every name is put under.
    Requests are repeated after server errors and lost connections. Pickles to its place only.
    """

    def __init__(self, scheme: str, bucket: str, folder: str = "") -> None:
        if not bucket:
            raise StorageError(f"'{scheme}://' names no bucket", hint=f"write {scheme}://bucket/folder")
        self._scheme = scheme
        self._bucket = bucket
        self._base = f"{folder}/" if folder else ""

    @property
    def url(self) -> str:
        return f"{self._scheme}://{self._bucket}/{self._base}".rstrip("/")

    def _key(self, name: str) -> str:
        return self._base + self._inside(name)

    @property
    def _client(self) -> obstore.store.ObjectStore:
        place = f"{self._scheme}://{self._bucket}"
        # The client's threads do not survive a fork: a child process makes its own.
        key = (os.getpid(), place)
        with _clients_lock:
            if key not in _clients:
                _clients[key] = self._connect(place)
            return _clients[key]

    def _connect(self, place: str) -> obstore.store.ObjectStore:
        from obstore.store import MemoryStore, from_url

        if self._scheme == "memory":
            return MemoryStore()
        try:
            return from_url(
                place,
                retry_config={"max_retries": _RETRIES, "retry_timeout": _RETRY_TIMEOUT},
                client_options={
                    "connect_timeout": _CONNECT_TIMEOUT,
                    "timeout": _REQUEST_TIMEOUT,
                    "allow_http": any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS),
                },
            )
        except Exception as error:
            raise failure("open", place, error, hint=_HINTS.get(self._scheme)) from None

    def _failure(self, doing: str, name: str, error: Exception) -> StorageError:
        from obstore.exceptions import AlreadyExistsError

        if isinstance(error, StorageError):
            return error
        place = f"{self.url}/{name}" if name else self.url
        if isinstance(error, AlreadyExistsError):
            return OutputExistsError(f"cannot {doing} {key_of(place)}: it exists already")
        hint = None if isinstance(error, FileNotFoundError) else _HINTS.get(self._scheme)
        return failure(doing, place, error, hint=hint)

    def list(
        self,
        prefix: str = "",
        after: str | None = None,
        *,
        enter: Callable[[str], bool] | None = None,
        sizes: bool = True,  # they come with the names
    ) -> Iterator[Entry]:
        import obstore

        folder = prefix.strip("/")
        under = f"{folder}/" if folder else ""
        cut = len(self._base)
        where = (self._base + folder).strip("/") or None
        offset = None if after is None else self._base + after
        entered, entering = under, True
        last = ""
        # A folder made in a web console is an empty object "a/", reported as "a" among its content.
        held: Entry | None = None
        try:
            for page in obstore.list(self._client, where, offset=offset, chunk_size=_LIST_PAGE):
                for meta in page:
                    entry = Entry(meta["path"][cut:], meta["size"])
                    name = entry.name
                    if after is not None and name <= after:
                        continue
                    if name < last:
                        if entry.size == 0:
                            continue
                        raise StorageError(
                            f"{self.url} lists its objects out of order ({name!r} after {last!r})",
                            hint="hierarchical namespaces and S3 directory buckets do that",
                        )
                    last = name
                    if held is not None:
                        if not name.startswith(held.name + "/"):
                            yield held
                        held = None
                    if enter is not None:
                        above = name[: name.rfind("/") + 1]
                        if above != entered:
                            entered, entering = above, _all_entered(above, len(under), enter)
                        if not entering:
                            continue
                    if entry.size == 0:
                        held = entry
                    else:
                        yield entry
        except Exception as error:
            raise self._failure("list", folder, error) from None
        if held is not None:
            yield held

    def read(self, name: str) -> bytes:
        import obstore

        try:
            return bytes(obstore.get(self._client, self._key(name)).bytes())
        except Exception as error:
            raise self._failure("read", name, error) from None

    def read_range(self, name: str, start: int, length: int) -> bytes:
        import obstore

        stop = min(start + length, self.size(name))
        if stop <= start:
            return b""
        try:
            return bytes(obstore.get_range(self._client, self._key(name), start=start, end=stop))
        except Exception as error:
            raise self._failure("read", name, error) from None

    def size(self, name: str) -> int:
        return int(self._head(name)["size"])

    def _head(self, name: str) -> dict[str, Any]:
        import obstore

        try:
            return cast("dict[str, Any]", obstore.head(self._client, self._key(name)))
        except Exception as error:
            raise self._failure("read", name, error) from None

    def write(self, name: str, data: bytes | bytearray | memoryview, *, exclusive: bool = False) -> None:
        import obstore

        try:
            if exclusive:
                # A conditional request is one request: no multipart upload can be conditional.
                obstore.put(self._client, self._key(name), bytes(data), mode="create", use_multipart=False)
            else:
                obstore.put(self._client, self._key(name), bytes(data))
        except Exception as error:
            raise self._failure("write", name, error) from None

    def upload(self, name: str, path: Path) -> None:
        import obstore

        try:
            obstore.put(self._client, self._key(name), path)
        except Exception as error:
            raise self._failure("write", name, error) from None

    def move(self, source: str, target: str) -> None:
        import obstore

        try:
            obstore.rename(self._client, self._key(source), self._key(target))
        except Exception as error:
            raise self._failure("move", source, error) from None

    def delete(self, names: Iterable[str]) -> None:
        import obstore

        pending = iter(names)
        while page := [self._key(name) for name in islice(pending, _DELETE_PAGE)]:
            try:
                obstore.delete(self._client, page)
            except FileNotFoundError:
                for path in page:
                    self._delete_one(path)
            except Exception as error:
                raise self._failure("delete", page[0][len(self._base) :], error) from None

    def _delete_one(self, path: str) -> None:
        import obstore

        try:
            obstore.delete(self._client, path)
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._failure("delete", path[len(self._base) :], error) from None

    def delete_tree(self, prefix: str = "") -> None:
        self.delete(entry.name for entry in list(self.list(prefix)))

    def download(self, name: str, target: Path) -> None:
        """Write the object to a local file, a part at a time."""
        import obstore

        try:
            parts = obstore.get(self._client, self._key(name)).stream()
            with target.open("wb") as file:
                for part in parts:
                    file.write(part)
        except OSError as error:
            if error.errno is None:
                raise self._failure("read", name, error) from None
            raise failure("write", str(target), error) from None
        except Exception as error:
            raise self._failure("read", name, error) from None

    def local_path(self, name: str) -> Path:
        meta = self._head(name)
        version = [str(meta.get(key)) for key in ("e_tag", "version", "last_modified", "size")]
        digest = hashlib.sha256("\0".join([self.url, name, *version]).encode()).hexdigest()[:32]
        target = cache_folder() / "objects" / digest / file_name(name)
        if not target.exists():
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise failure("write", str(target.parent), error) from None
            part = target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
            try:
                self.download(name, part)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
        return target


def _all_entered(folder: str, start: int, enter: Callable[[str], bool]) -> bool:
    """Whether ``enter`` agrees to a folder ("a/b/") and to all above it, from character ``start``."""
    end = folder.find("/", start)
    while end >= 0:
        if not enter(folder[:end]):
            return False
        end = folder.find("/", end + 1)
    return True


def file_name(name: str) -> str:
    """The last segment of an object's name, cut in its middle to what file systems allow."""
    last = name.rsplit("/", 1)[-1]
    raw = os.fsencode(last)
    if len(raw) <= 255:
        return last
    stem, dot, suffix = raw.rpartition(b".")
    if not dot or len(suffix) > 32:
        return raw[:200].decode("utf-8", "ignore")
    return (stem[:200] + b"." + suffix).decode("utf-8", "ignore")


def cache_folder() -> Path:
    """Where downloads are kept: ``$TALLY_CACHE``, ``$TALLY_HOME/cache``, or the system's place for caches."""
    if folder := os.environ.get("TALLY_CACHE"):
        return Path(folder)
    if home := os.environ.get("TALLY_HOME"):
        return Path(home, "cache")
    from platformdirs import user_cache_path

    return user_cache_path("tally")
