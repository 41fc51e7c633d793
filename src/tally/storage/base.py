"""The store contract, and how names, URLs and failures are written in all stores."""

from __future__ import annotations

import errno
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, compress
from pathlib import Path
from typing import ClassVar, NamedTuple
from urllib.parse import unquote, urlsplit

from tally.errors import OutputExistsError, SourceChangedError, SourceNotFoundError, StorageError
from tally.masking import has_secret, mask
from tally.text import visible

KINDS = ("s3", "s3a", "gs", "az", "abfs", "abfss", "memory")
"""URL schemes of object stores. ``memory`` lives in this process, for tests."""

WEB = ("http", "https")
"""URL schemes of files of the web, which are read and not written."""

TEMPORARY = ".tally-tmp-"
"""How the names of files begin while they are written; no listing shows them."""

_NEXT = {
    errno.ENOSPC: "Make room there, or choose another place.",
    errno.EDQUOT: "Make room there, or choose another place.",
    errno.EROFS: "Choose a place that can be written to.",
    errno.EACCES: "The user that runs Tally has to have a right to it: 'ls -ld' shows whose it is.",
    errno.EPERM: "The user that runs Tally has to have a right to it: 'ls -ld' shows whose it is.",
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

CREDENTIALS = {
    "s3": "credentials come from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION; "
    "AWS_ENDPOINT names another service, AWS_SKIP_SIGNATURE=true reads a public bucket",
    "az": "credentials come from AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY "
    "(or AZURE_STORAGE_SAS_KEY, or AZURE_CLIENT_ID and its companions)",
    "gs": "credentials come from GOOGLE_APPLICATION_CREDENTIALS",
}
CREDENTIALS |= dict.fromkeys(
    WEB, "download it, and name the copy; a list may name pictures and files with what lets one in: --items LIST"
)
CREDENTIALS |= {"s3a": CREDENTIALS["s3"], "abfs": CREDENTIALS["az"], "abfss": CREDENTIALS["az"]}


class Entry(NamedTuple):
    """One object of a listing. ``size`` in bytes; -1 if sizes were not asked for. ``mark``: of its content, see
    :meth:`Store.marked`; empty if marks were not asked for."""

    name: str
    size: int
    mark: str = ""


PAGE = 1000
"""Objects on a page of a listing, at most."""


@dataclass(frozen=True, slots=True)
class Page:
    """Objects that follow each other in a listing, column by column: of a million names, an object for each costs more
    than finding them. Iterates over :class:`Entry`."""

    names: list[str]
    sizes: list[int]
    marks: list[str]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Page:
        found = [*entries]
        return cls([each.name for each in found], [each.size for each in found], [each.mark for each in found])

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Entry]:
        return map(Entry, self.names, self.sizes, self.marks)

    def where(self, taken: Iterable[object]) -> Page:
        """Those for which ``taken``, of the same length, is true."""
        chosen = [*map(bool, taken)]
        if all(chosen):
            return self
        return Page(
            list(compress(self.names, chosen)), list(compress(self.sizes, chosen)), list(compress(self.marks, chosen))
        )


class Store(ABC):
    """Objects under names. Implementations supply the primitives; all calls block.

    is_local: the objects are files of this machine. Then :attr:`url` is the path of their folder,
    :meth:`local_path` the file itself, and asking for a size and moving cost next to nothing.
    """

    is_local: ClassVar[bool] = False

    @property
    @abstractmethod
    def url(self) -> str:
        """The place itself, without secrets: an absolute path, or a URL. :func:`open_store` takes it."""

    @abstractmethod
    def pages(
        self,
        prefix: str = "",
        after: str | None = None,
        *,
        enter: Callable[[str], bool] | None = None,
        sizes: bool = True,
        marks: bool = False,
    ) -> Iterator[Page]:
        """Every object under the folder ``prefix``, in ascending order of the whole name, lazily; no page is empty.

        after: only names greater than this one (whether or not it exists).
        enter: told the name of each folder below ``prefix``; False leaves the folder out.
        sizes: False saves a local store one system call per file. marks: entries carry their mark; needs sizes.
        A folder that does not exist holds nothing. In a local store, symbolic links are followed unless they
        lead in a circle; broken links are listed with size 0; pipes, devices and sockets are not listed.
        Raises StorageError naming the folder that cannot be read, StorageAwayError if the store's own folder is another
        one before all is listed.
        """

    def list(
        self,
        prefix: str = "",
        after: str | None = None,
        *,
        enter: Callable[[str], bool] | None = None,
        sizes: bool = True,
        marks: bool = False,
    ) -> Iterator[Entry]:
        """The same as :meth:`pages`, one by one."""
        return chain.from_iterable(self.pages(prefix, after, enter=enter, sizes=sizes, marks=marks))

    @abstractmethod
    def read(self, name: str, *, mark: str = "") -> bytes:
        """The whole content, of one moment.

        mark: of the expected content, from :meth:`marked` or a listing; empty: any content.
        Raises SourceNotFoundError if there is no such object, SourceChangedError if its content is another one.
        """

    @abstractmethod
    def read_range(self, name: str, start: int, length: int, *, mark: str = "") -> bytes:
        """At most ``length`` bytes from byte ``start``; fewer if the object ends before.

        mark: as for :meth:`read`. Raises as that does.
        """

    @abstractmethod
    def size(self, name: str) -> int:
        """In bytes. Raises SourceNotFoundError if there is no such object."""

    def marked(self, name: str) -> tuple[int, str]:
        """The size in bytes, and a mark that changes whenever the object is written again, even with the same size.

        Of an object in a bucket, it is the ETag; of a file, its size, its time of change and its number in the file
        system (its inode). Empty where the store keeps none.
        """
        return self.size(name), ""

    def gives_parts(self, name: str) -> bool:
        """Whether :meth:`read_range` fetches no more than is asked for; False once it has fetched the whole object."""
        return True

    def check_mark(self, name: str, mark: str) -> None:
        """Raises SourceChangedError if the object's mark is not ``mark``, SourceNotFoundError if it is gone.

        An empty mark is not checked.
        """
        if mark and (found := self.marked(name)[1]) != mark:
            raise changed(f"{self.url}/{name}", mark, found)

    def version(self, name: str) -> str:
        """A text that changes whenever the object is written again."""
        return "{} {}".format(*self.marked(name))

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name. A folder is not an object."""
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    @abstractmethod
    def write(self, name: str, data: bytes | bytearray | memoryview, *, exclusive: bool = False) -> None:
        """Write all of it, durably, or nothing; folders are made as needed.

        exclusive: raise OutputExistsError if the object exists already. Of several writers at the same moment,
        one succeeds.
        """

    @abstractmethod
    def upload(self, name: str, path: Path) -> None:
        """Write the content of a local file under a name. As :meth:`write`, but a part at a time."""

    @abstractmethod
    def move(self, source: str, target: str) -> None:
        """Rename, replacing ``target``. Atomic in a local store; a copy and a removal in an object store."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Remove these objects. Missing ones are no error."""

    @abstractmethod
    def delete_tree(self, prefix: str = "") -> None:
        """Remove everything under a folder, and the folder itself."""

    @abstractmethod
    def local_path(self, name: str, *, mark: str = "") -> Path:
        """A file of this machine with the object's content: itself, or a cached download. Read only.

        mark: as for :meth:`read`. A local file itself may still change later.
        """

    @abstractmethod
    def download(self, name: str, target: Path, *, mark: str = "") -> None:
        """Write the object's content to a local file, a part at a time. mark: as for :meth:`read`."""

    @property
    def seeks(self) -> bool:
        """Whether listing the names beyond one costs nothing for those before it."""
        return False

    def folders(self) -> set[str]:
        """The names of the folders at the top; of an object store, those that hold something."""
        return {entry.name.split("/", 1)[0] for entry in self.list(sizes=False) if "/" in entry.name}

    def remove_partial(self, folder: str = "") -> None:  # noqa: B027  # object stores keep no such files
        """Remove the files in a folder that killed writers left half written; folders below it are not entered."""

    def remove_folder(self, folder: str) -> None:  # noqa: B027  # object stores keep no such folders
        """Remove a folder if it is empty."""

    def _inside(self, name: str) -> str:
        """The name itself. Raises StorageError if it would lead out of the store."""
        if not name or name[0] == "/" or "\0" in name or (".." in name and ".." in name.split("/")):
            raise StorageError(f"{name!r} is no name inside {key_of(self.url)}")
        return name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({key_of(self.url)!r})"


def is_url(place: str) -> bool:
    """Whether a place is given as a URL and not as a path."""
    return _URL.match(place) is not None


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_web(place: str) -> bool:
    """Whether a place is a URL of the web."""
    return place.partition("://")[0].lower() in WEB and is_url(place)


def local_of(url: str) -> str:
    """The path that a ``file://`` URL names."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise StorageError(f"{url!r} is no URL: {error}") from None
    if parts.netloc not in ("", "localhost"):
        raise StorageError(f"{url!r} names a file of another machine ({parts.netloc})")
    return unquote(parts.path, errors="surrogateescape")


def key_of(name: str) -> str:
    r"""The name as valid UTF-8; an invalid byte is written ``\xff``."""
    if name.isascii():
        return name
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    return name


def name_to_json(name: str) -> str | dict[str, str]:
    """The name as JSON that every database takes. A name that is not valid UTF-8 becomes its bytes in hexadecimal."""
    return name if key_of(name) is name else {"bytes": os.fsencode(name).hex()}


def name_from_json(name: str | dict[str, str]) -> str:
    """The inverse of :func:`name_to_json`."""
    return name if isinstance(name, str) else os.fsdecode(bytes.fromhex(name["bytes"]))


def _shown(place: str) -> str:
    """A place for messages; a very long one is cut in its middle."""
    text = visible(key_of(place))
    return text if len(text) <= 300 else f"{text[:100]}…{text[-150:]}"


def refuse_secrets(url: str) -> None:
    """Raises StorageError for a URL that carries credentials."""
    if not has_secret(url):
        return
    raise StorageError(
        f"{mask(url)!r} carries credentials, which would end up in logs and manifests",
        hint=CREDENTIALS.get(url.partition("://")[0].lower(), "set them in the environment instead"),
    )


def failure(doing: str, place: str, error: BaseException, *, hint: str | None = None) -> StorageError:
    """The StorageError for an error of the operating system or a client library.

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
    raised = kind(f"cannot {doing} {_shown(place)}: {reason}", hint=hint or _NEXT.get(number or 0))
    raised.errno = number
    return raised


def unexpected(error: OSError) -> StorageError:
    """The StorageError for an error of the operating system where nobody expected one."""
    place = error.filename if error.filename is not None else "a file"
    return failure("read or write", os.fsdecode(place) if isinstance(place, (str, bytes)) else str(place), error)


CHANGED_HINT = (
    "Put back what was there and resume the job, or score what is there now: pictures with "
    "'tally jobs retry OUT --dead', tables and videos with --overwrite."
)


def changed(place: str, before: str = "", now: str = "") -> SourceChangedError:
    """The error for an object or file whose content has changed. before, now: its marks, if they are known."""
    return SourceChangedError(
        f"{_shown(place)} has changed since the job was planned{_difference(before, now)}", hint=CHANGED_HINT
    )


def file_mark(status: os.stat_result) -> str:
    """The mark of a local file: its size, its time of change, and its number in the file system."""
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


_FILE_MARK = re.compile(r"(\d+)-(-?\d+)-(\d+)")


def _difference(before: str, now: str) -> str:
    """How two marks of files differ, in words; empty if they are not those of files."""
    old, new = _FILE_MARK.fullmatch(before), _FILE_MARK.fullmatch(now)
    if old is None or new is None:
        return ""
    if old[1] != new[1]:
        return f": it had {int(old[1]):,} bytes, and has {int(new[1]):,} now"
    if old[2] != new[2]:
        written = datetime.fromtimestamp(int(new[2]) / 1e9, tz=UTC)
        return f": it was written (or touched) at {written:%Y-%m-%d %H:%M:%S} UTC"
    return ": another file has taken its name"


def file_name(name: str) -> str:
    """The last segment of an object's name, cut in its middle to the length that file systems allow."""
    last = name.rsplit("/", 1)[-1]
    raw = os.fsencode(last)
    if len(raw) <= 255:
        return last
    stem, dot, suffix = raw.rpartition(b".")
    if not dot or len(suffix) > 32:
        return raw[:200].decode("utf-8", "ignore")
    return (stem[:200] + b"." + suffix).decode("utf-8", "ignore")


_tell_of_pauses: Callable[[], None] | None = None


def while_waiting(tell: Callable[[], None]) -> None:
    """Call ``tell``, in this process, before and after each pause between two tries of a request."""
    global _tell_of_pauses
    _tell_of_pauses = tell


def tell_of_pause() -> None:
    """A pause between two tries begins or goes on."""
    if _tell_of_pauses is not None:
        _tell_of_pauses()


def cache_folder() -> Path:
    """Where downloads are kept: ``$TALLY_CACHE``, ``$TALLY_HOME/cache``, or the system's cache folder."""
    if folder := os.environ.get("TALLY_CACHE"):
        return Path(folder)
    if home := os.environ.get("TALLY_HOME"):
        return Path(home, "cache")
    from platformdirs import user_cache_path

    return user_cache_path("tally")
