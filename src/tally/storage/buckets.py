"""Buckets and containers: S3, Azure Blob Storage, Google Cloud Storage, through obstore.

Failures that pass are retried, at two levels. obstore retries requests that were answered with 429 or 5xx or not at
all, and resumes downloads that were cut, for some seconds. This module retries, with growing pauses and for minutes,
what lasts longer and what obstore does not retry: requests that may have been carried out, and listings and answers
that were cut. All that is retried here may safely be carried out twice; :meth:`ObjectStore._create` says how.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from tally.config import credentials
from tally.errors import OutputExistsError, SourceNotFoundError, StorageAwayError, StorageError
from tally.storage import s3_listing, temporary
from tally.storage.base import (
    CREDENTIALS,
    PAGE,
    Entry,
    Page,
    Store,
    changed,
    failure,
    key_of,
    tell_of_pause,
)
from tally.storage.kept import kept

if TYPE_CHECKING:
    import obstore
    import obstore.store

T = TypeVar("T")

# An endpoint given as http:// (a server on the same machine, say) is meant to be unencrypted.
_ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
_PREFIXES = {"s3": "AWS_", "s3a": "AWS_", "gs": "GOOGLE_"}
"""How variables with credentials begin, by scheme, where they are not Azure's."""
_FALSE = ("0", "false", "no", "off")
_ALLOWED = ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP")

_CONNECT_TIMEOUT = timedelta(seconds=10)
_SILENCE = timedelta(seconds=30)
"""A request counts as lost after this long without a byte of an answer. There is no limit on the whole of it."""
_SILENCE_LARGE = timedelta(minutes=2)
"""The same for large uploads and copies: no byte of an answer comes before all is sent or copied."""
_WHOLE = timedelta(hours=12)

_RETRY = {
    "max_retries": 6,
    "backoff": {"init_backoff": timedelta(milliseconds=200), "base": 3, "max_backoff": timedelta(seconds=10)},
    "retry_timeout": timedelta(minutes=1),
}
_GIVE_UP = 180.0
"""Seconds after the first try at which retrying ends."""
_GIVE_UP_UNKNOWN = 30.0
"""The same if no connection to the service was ever made: its address may be wrong."""
_PAUSE, _LONGEST_PAUSE = 0.5, 15.0

_SMALL = 1024**2
_PART = 16 * 1024**2
"""Larger objects are sent in parts. Smaller ones leave nothing half done if the process is killed."""
_PARTS_AT_ONCE = 4
_MOST_PARTS = 9_000

_DELETE_PAGE = 1000
_DELETIONS_AT_ONCE = 16
_WRITER = "tallywriter"

_clients: dict[tuple[int, str, bool], obstore.store.ObjectStore] = {}
_clients_lock = threading.Lock()
_reached: set[str] = set()


class _AgainError(Exception):
    """The request has to be repeated."""


def s3_security() -> tuple[bool, bool]:
    """Whether ``S3_USE_HTTPS`` wants connections encrypted, and ``S3_VERIFY_SSL`` certificates that are trusted."""
    secure, verify = (os.environ.get(name, "").lower() not in _FALSE for name in ("S3_USE_HTTPS", "S3_VERIFY_SSL"))
    return secure, verify


def s3_endpoint(endpoint: str, *, secure: bool) -> dict[str, Any]:
    """The options of a store at another service than Amazon's. endpoint: host and port, or a URL."""
    url = endpoint if "://" in endpoint else f"http{'s' if secure else ''}://{endpoint}"
    return {"endpoint": url, "virtual_hosted_style_request": False}


def s3_environment() -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a store and of its client that ``S3_ENDPOINT`` (host and port), ``S3_USE_HTTPS`` and
    ``S3_VERIFY_SSL`` say, as TensorFlow reads them. An endpoint of ``AWS_...`` comes first."""
    secure, verify = s3_security()
    client: dict[str, Any] = {} if verify else {"allow_invalid_certificates": True}
    given = os.environ.get("S3_ENDPOINT", "")
    if not given or any(os.environ.get(name) for name in _ENDPOINTS if name.startswith("AWS")):
        return {}, client
    options = s3_endpoint(given, secure=secure)
    if options["endpoint"].startswith("http://"):
        client["allow_http"] = True
    return options, client


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
        return f"{self._place}/{self._base}".rstrip("/")

    @property
    def seeks(self) -> bool:
        return self._scheme in ("s3", "s3a", "gs", "memory")

    @property
    def _place(self) -> str:
        return f"{self._scheme}://{self._bucket}"

    def _key(self, name: str) -> str:
        return self._base + self._inside(name)

    def _client(self, *, large: bool = False) -> obstore.store.ObjectStore:
        """The client. large: for requests whose answer may take long."""
        # The client's threads do not survive a fork: a child process makes its own.
        key = (os.getpid(), self._place, large and self._scheme != "memory")
        with _clients_lock:
            if key not in _clients:
                _clients[key] = self._connect(_SILENCE_LARGE if large else _SILENCE)
            return _clients[key]

    def _connect(self, silence: timedelta) -> obstore.store.ObjectStore:
        from obstore.store import MemoryStore, from_url

        if self._scheme == "memory":
            return MemoryStore()
        plain = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
        plain |= any(os.environ.get(name, "").lower() in ("1", "true") for name in _ALLOWED)
        named, client = s3_environment() if self._scheme in ("s3", "s3a") else ({}, {})
        try:
            return from_url(
                self._place,
                config=cast(Any, named | credentials(_PREFIXES.get(self._scheme, "AZURE_"))),
                retry_config=cast(Any, _RETRY),
                client_options=cast(
                    Any,
                    {
                        "connect_timeout": _CONNECT_TIMEOUT,
                        "read_timeout": silence,
                        "timeout": _WHOLE,
                        "allow_http": plain,
                        **client,
                    },
                ),
            )
        except Exception as error:
            if "Account must be specified" in str(error):
                raise StorageError(
                    f"cannot open {self._place}: no account of Azure is named",
                    hint=f"Set AZURE_STORAGE_ACCOUNT_NAME; or write abfs://{self._bucket}@ACCOUNT.dfs.core.windows.net/...",
                ) from None
            raise failure("open", self._place, error, hint=CREDENTIALS.get(self._scheme)) from None

    def _again(self, doing: str, name: str, call: Callable[[], T]) -> T:
        """The result of ``call``, which is retried after failures that pass."""
        patience = _Patience(self._place)
        while True:
            try:
                given = call()
            except Exception as error:
                if not patience.wait(error):
                    raise self._failure(doing, name, error, patience) from None
            else:
                _reached.add(self._place)
                return given

    def _failure(self, doing: str, name: str, error: Exception, patience: _Patience | None = None) -> StorageError:
        from obstore.exceptions import AlreadyExistsError, InvalidPathError

        if isinstance(error, StorageError):
            return error
        place = key_of(f"{self.url}/{name}" if name else self.url)
        if isinstance(error, AlreadyExistsError):
            return OutputExistsError(f"cannot {doing} {place}: it exists already")
        told = _Told(error)
        if told.code in _NO_BUCKET or "container does not exist" in told.text:
            noun = "container" if self._scheme in ("az", "abfs", "abfss") else "bucket"
            raised = StorageError if doing in ("write", "move", "delete") else SourceNotFoundError
            return raised(
                f"cannot {doing} {place}: there is no {noun} {self._bucket!r}",
                hint="Correct its name, or make it first.",
            )
        if isinstance(error, FileNotFoundError):
            return failure(doing, place, error)
        hint = CREDENTIALS.get(self._scheme)
        if isinstance(error, InvalidPathError) or "Could not parse path" in told.text:
            hint = "Names with empty segments ('a//b'), '.', '..' or control characters cannot be used here; rename it."
        elif _METADATA.search(told.text):
            return StorageError(f"cannot {doing} {place}: no credentials were found in the environment", hint=hint)
        elif told.status is None and _is_passing(error):
            hint = f"Is the service reachable from here? An address of its own is given by {_ADDRESS[self._scheme]}."
        elif _UNTRUSTED.search(str(error)):
            hint = "For a service of your own that speaks S3: S3_VERIFY_SSL=false does without trust."
        elif told.status is not None and told.status not in (401, 403):
            hint = None
        tried = "" if patience is None or not patience.tries else f" (tried for {patience.seconds:.0f} s)"
        kind = StorageAwayError if _is_passing(error) or told.code in _LOCKED_OUT else StorageError
        return kind(f"cannot {doing} {place}: {told.reason}{tried}", hint=hint)

    def pages(
        self,
        prefix: str = "",
        after: str | None = None,
        *,
        enter: Callable[[str], bool] | None = None,
        sizes: bool = True,  # they come with the names, and so do marks
        marks: bool = False,
    ) -> Iterator[Page]:
        folder = prefix.strip("/")
        under = f"{folder}/" if folder else ""
        entered, entering = under, True
        last = ""
        # A folder made in a web console is an empty object "a/", reported as "a" among its content.
        held: Entry | None = None
        for page in self._listed(folder, after):
            names = page.names
            above = names[0][: names[0].rfind("/") + 1]
            if (
                held is None
                and names[0] > last
                and (after is None or names[0] > after)
                and 0 not in page.sizes
                and (enter is None or (above == entered and _in_one_folder(names, above)))
                and names == sorted(names)
            ):  # nothing to look at one by one
                last = names[-1]
                if entering:
                    yield page
                continue
            found: list[Entry] = []
            for entry in page:
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
                    if not name.startswith(held.name + "/") and not self._is_marker(held.name):
                        found.append(held)
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
                    found.append(entry)
            if found:
                yield Page.of(found)
        if held is not None and not self._is_marker(held.name):
            yield Page.of([held])

    def _is_marker(self, name: str) -> bool:
        """Whether an empty object, listed as ``a`` with nothing in it, is really ``a/``: a folder made in a console."""
        if "." in name[name.rfind("/") + 1 :]:
            return False
        try:
            return not self.exists(name)
        except StorageAwayError:
            raise
        except StorageError:  # a name that cannot be used: reading it will say so
            return False

    def _listed(self, folder: str, after: str | None) -> Iterator[Page]:
        """The service's listing beyond a name. If it breaks off, it is resumed where it was."""
        import obstore
        from obstore.exceptions import InvalidPathError

        cut = len(self._base)
        where = (self._base + folder).strip("/") or None
        offset = None if after is None else self._base + after
        patience = _Patience(self._place)
        pages: Iterator[Any] | None = None
        coming: Future[Any] | None = None
        done = ""
        given = 0
        pool = ThreadPoolExecutor(1, thread_name_prefix="tally-list")
        try:
            while True:
                try:
                    if pages is None:
                        pages = iter(obstore.list(self._client(), where, offset=offset, chunk_size=PAGE))
                    page, coming = next(pages, None) if coming is None else coming.result(), None
                except InvalidPathError as error:
                    if self._scheme not in ("s3", "s3a"):
                        raise self._failure("list", folder, error) from None
                    pages, coming = self._raw_pages(folder, offset), None
                    continue
                except Exception as error:
                    if not patience.wait(error):
                        raise self._failure("list", folder, error, patience) from None
                    pages, coming, done = None, None, offset or ""
                    continue
                _reached.add(self._place)
                if page is None:
                    return
                patience = _Patience(self._place)
                if given:  # whoever comes for a second page wants the third, too: it comes while this one is used
                    coming = pool.submit(next, pages, None)
                # Not the marker of the listed folder itself.
                found = [meta for meta in page if meta["path"] > done and len(meta["path"]) > cut]
                if found:
                    offset = found[-1]["path"]
                    names = [meta["path"][cut:] for meta in found]
                    yield Page(names, [meta["size"] for meta in found], list(map(_mark, found)))
                    given += 1
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _raw_pages(self, folder: str, after: str | None) -> Iterator[Any]:
        """The listing's pages with names that cannot be used too: reading them says so. Markers of folders are left
        out."""
        prefix = self._base + (f"{folder}/" if folder else "")
        again = partial(self._again, "list", folder)
        for page in s3_listing.pages(self._client(), self._bucket, prefix, after, again):
            yield [each for each in page if each["size"] or not each["path"].endswith("/")]

    def read(self, name: str, *, mark: str = "") -> bytes:
        import obstore

        key = self._key(name)

        def fetch() -> bytes:
            found = obstore.get(self._client(), key)
            self._expect(name, found.meta, mark)
            return bytes(found.bytes())

        return self._again("read", name, fetch)

    def _expect(self, name: str, meta: Mapping[str, Any], mark: str) -> None:
        """Raises SourceChangedError if an answer is about another content than that of the mark."""
        if mark and _mark(meta) != mark.strip('"'):  # as earlier versions kept it
            raise changed(f"{self.url}/{name}")

    def read_range(self, name: str, start: int, length: int, *, mark: str = "") -> bytes:
        import obstore

        key = self._key(name)

        def fetch() -> bytes:
            try:
                found = obstore.get(self._client(), key, options={"range": (start, start + length)})
            except Exception as error:
                if _BEYOND.search(str(error)) and start >= self.size(name):
                    return b""
                raise
            self._expect(name, found.meta, mark)
            return bytes(found.bytes())

        return self._again("read", name, fetch) if length > 0 else b""

    def size(self, name: str) -> int:
        return int(self._head(name)["size"])

    def marked(self, name: str) -> tuple[int, str]:
        meta = self._head(name)
        return int(meta["size"]), _mark(meta)

    def _head(self, name: str) -> dict[str, Any]:
        import obstore

        key = self._key(name)
        return self._again("read", name, lambda: cast("dict[str, Any]", obstore.head(self._client(), key)))

    def write(self, name: str, data: bytes | bytearray | memoryview, *, exclusive: bool = False) -> None:
        content = data if isinstance(data, bytes) else bytes(data)
        if exclusive:
            self._create(name, content)
        else:
            self._put(name, content, len(content))

    def upload(self, name: str, path: Path) -> None:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise failure("read", str(path), error) from None
        self._put(name, path, size)

    def _put(self, name: str, content: bytes | Path, size: int) -> None:
        import obstore

        key, parts = self._key(name), size > _PART

        def put() -> None:
            try:
                obstore.put(
                    self._client(large=size > _SMALL),
                    key,
                    content,
                    use_multipart=parts,
                    chunk_size=max(_PART // 2, -(-size // _MOST_PARTS)),
                    max_concurrency=_PARTS_AT_ONCE,
                )
            except Exception as error:
                # The answer to the last request was lost: the upload is complete already.
                if _Told(error).code in _NOTHING_LEFT:
                    raise _AgainError(str(error)) from None
                raise

        self._again("write", name, put)

    def _create(self, name: str, content: bytes) -> None:
        """Write an object that must not exist yet.

        The object carries a mark of this call. If an answer was lost, and the object then exists, the mark tells
        whether this call has written it.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        key, writer = self._key(name), secrets.token_hex(16)

        def put() -> None:
            client = self._client(large=len(content) > _SMALL)
            try:
                # A conditional request is one request: no multipart upload can be conditional.
                obstore.put(
                    client, key, content, mode="create", use_multipart=False, attributes=cast(Any, {_WRITER: writer})
                )
            except AlreadyExistsError:
                try:
                    found = cast("dict[str, Any]", obstore.get(client, key, options={"head": True}).attributes)
                except FileNotFoundError:  # it is being written at this moment, or was removed
                    raise _AgainError("another is writing it at this moment") from None
                if found.get(_WRITER) != writer:
                    raise

        self._again("write", name, put)

    def move(self, source: str, target: str) -> None:
        import obstore

        old, new = self._key(source), self._key(target)
        try:
            self._again("move", source, lambda: obstore.copy(self._client(large=True), old, new))
        except StorageError as error:
            if _TOO_LARGE not in str(error):
                raise
            with temporary.folder("move") as folder:
                self.download(source, folder / "content")
                self.upload(target, folder / "content")
        self.delete([source])

    def delete(self, names: Iterable[str]) -> None:
        pending = iter(names)
        while page := list(islice(pending, _DELETE_PAGE)):
            keys = [self._key(name) for name in page]
            try:
                self._again("delete", page[0], partial(self._remove, keys))
            except FileNotFoundError:
                # Azure says so if one of them was missing, but not which of the others it has deleted.
                with ThreadPoolExecutor(_DELETIONS_AT_ONCE, thread_name_prefix="tally-delete") as pool:
                    deque(pool.map(self._delete_one, page), maxlen=0)

    def _remove(self, keys: Sequence[str]) -> None:
        import obstore

        obstore.delete(self._client(), keys)

    def _delete_one(self, name: str) -> None:
        try:
            self._again("delete", name, partial(self._remove, [self._key(name)]))
        except FileNotFoundError:
            return

    def delete_tree(self, prefix: str = "") -> None:
        self.delete(entry.name for entry in self.list(prefix))

    def download(self, name: str, target: Path, *, mark: str = "") -> None:
        """Write the object to a local file, a part at a time."""
        import obstore

        key = self._key(name)

        def fetch() -> None:
            found = obstore.get(self._client(), key)
            self._expect(name, found.meta, mark)
            written = 0
            try:
                with target.open("wb") as file:
                    for part in found.stream():
                        written += file.write(part)
            except OSError as error:
                if error.errno is None:
                    raise
                raise failure("write", str(target), error) from None
            if written != found.meta["size"]:
                raise _AgainError(f"{written:,} of {found.meta['size']:,} bytes arrived")

        self._again("read", name, fetch)

    def local_path(self, name: str, *, mark: str = "") -> Path:
        meta = self._head(name)
        self._expect(name, meta, mark)
        version = [str(meta.get(key)) for key in ("e_tag", "version", "last_modified", "size")]
        return kept(
            [self.url, name, *version],
            name,
            int(meta["size"]),
            lambda target: self.download(name, target, mark=_mark(meta)),
        )


class _Patience:
    """How long a request has been tried, and whether to try it again."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._began = time.monotonic()
        self.tries = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def wait(self, error: Exception) -> bool:
        """Pause before the next try. False, without a pause, if there should be none."""
        if not _is_passing(error):
            return False
        self.tries += 1
        # Processes that failed together come back one by one.
        pause = random.uniform(0.5, 1.0) * min(_LONGEST_PAUSE, _PAUSE * 2**self.tries)  # noqa: S311
        unknown = self._place not in _reached and _CONNECTING.search(str(error)) is not None
        if self.seconds + pause > (_GIVE_UP_UNKNOWN if unknown else _GIVE_UP):
            return False
        for seconds in (pause, 0.0):
            tell_of_pause()
            time.sleep(seconds)
        return True


_STATUS = re.compile(r"status code: (\d{3})([^:]*)|\(code: (\d{3})\)")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_MESSAGE = re.compile(r"<Message>((?:(?!RequestId:)[^<])*)")
_CONNECTING = re.compile(r"kind: Connect\b|tcp connect error|dns error")
_UNTRUSTED = re.compile(r"InvalidCertificate\(\s*(\w+)")
_METADATA = re.compile(r"169\.254\.169\.254|metadata\.google\.internal|fd00:ec2::254")
_BEYOND = re.compile(r"status code: 416|Wanted range starting at")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
_TOO_LARGE = "larger than the maximum allowable size for a copy source"
"""S3's answer to a request to copy more than 5 GiB at once."""
_NOTHING_LEFT = ("NoSuchUpload", "InvalidBlockList")
_PASSING_CODES = ("RequestTimeout", "ConditionalRequestConflict", "OperationAborted", "SlowDown")
_LOCKED_OUT = ("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthenticationFailed")
_ADDRESS = {
    **dict.fromkeys(("s3", "s3a"), "AWS_ENDPOINT"),
    **dict.fromkeys(("az", "abfs", "abfss"), "AZURE_STORAGE_ENDPOINT"),
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "memory": "nothing",
}


class _Told:
    """The facts about an answer in obstore's error text, which is made for its developers."""

    def __init__(self, error: BaseException) -> None:
        self.text = " ".join(str(error).split("\n\nDebug source", 1)[0].split())
        status = _STATUS.search(self.text)
        code, message = _CODE.search(self.text), _MESSAGE.search(self.text)
        self.status = int(status[1] or status[3]) if status else None
        self.code = code[1] if code else None
        if status is not None:
            reason = f"the service answered {self.status}{(status[2] or '').rstrip()}"
            if code:
                reason += (
                    f" ({code[1]}: {message[1].strip().rstrip('.')})" if message and message[1] else f" ({code[1]})"
                )
        elif untrusted := _UNTRUSTED.search(str(error)):
            reason = f"its certificate is not to be trusted ({untrusted[1]})"
        elif "HTTP error" in self.text:
            url = re.search(r"https?://[^/\s]+", self.text)
            reason = f"the connection to {url[0] if url else 'the service'} failed, or nothing was heard from it"
        else:
            reason = self.text or type(error).__name__
        self.reason = reason


def _is_passing(error: Exception) -> bool:
    """Whether a retry may help: the service was busy or not reached, or the answer was lost."""
    from obstore.exceptions import GenericError

    if isinstance(error, (_AgainError, s3_listing.AgainError)):
        return True
    if not isinstance(error, GenericError):
        return False
    told = _Told(error)
    if told.code in _PASSING_CODES:
        return True
    if told.status is not None:
        return told.status in (408, 429) or (told.status >= 500 and told.status != 501)
    return "HTTP error" in told.text and not _UNTRUSTED.search(str(error))


def _mark(meta: Mapping[str, Any]) -> str:
    """What changes with an object's content. Listings write an ETag without quotes, in some services."""
    return str(meta.get("e_tag") or meta["last_modified"]).strip('"')


def _in_one_folder(names: Sequence[str], folder: str) -> bool:
    """Whether names in ascending order all lie in a folder ("a/b/"), and none of them deeper."""
    return names[-1].startswith(folder) and "".join(names).count("/") == len(names) * folder.count("/")


def _all_entered(folder: str, start: int, enter: Callable[[str], bool]) -> bool:
    """Whether ``enter`` accepts a folder ("a/b/") and all folders above it, from character ``start``."""
    end = folder.find("/", start)
    while end >= 0:
        if not enter(folder[:end]):
            return False
        end = folder.find("/", end + 1)
    return True
