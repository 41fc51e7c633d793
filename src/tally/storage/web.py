"""Files of the web: what is at an ``http://`` or ``https://`` URL, within limits of size, time and redirects.

Where this process may not connect to private addresses (see :mod:`tally.network`), neither may a redirect lead there.
What a URL carries to be let in (a password, a signature) stays out of messages.
"""

from __future__ import annotations

import email.utils
import http.client
import io
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar
from urllib.parse import quote, urlsplit

import tally
from tally import network
from tally.errors import SourceNotFoundError, StorageAwayError, StorageError
from tally.masking import mask
from tally.storage.base import Page, Store, changed, failure, tell_of_pause
from tally.storage.kept import kept

T = TypeVar("T")

LARGEST = 256 * 2**20
"""Bytes that a file may have which is read whole."""
LARGEST_KEPT = 64 * 2**30
"""Bytes that a file may have which is fetched into the cache, as its server gives no parts of it."""
SILENCE_SECONDS = 30.0
"""How long a server may send nothing."""
PATIENCE_SECONDS = 90.0
"""How long one request may take, with all tries."""
SLOWEST = 2**20
"""A file may take PATIENCE_SECONDS, and a second more for each so many bytes that have come."""
REDIRECTS = 5
_PAUSES = (0.5, 2.0)
"""Seconds between the tries to read one item of many: its server may be gone, and the others' not."""
_PATIENT = (*_PAUSES, 5.0, 10.0, 20.0)
"""The same where a whole job waits for the file."""
_LONGEST_PAUSE = 20.0
_LATER = (408, 425, 429, 500, 502, 503, 504)
"""Answers that may be others soon."""
_BLOCK = 1 << 18
_SAFE = "%/:=&?~#+!$,;'@()*[]"
_PART = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")
"""What an answer says it is: the first and last byte of it, and how many there are. Without, it is of no use."""


class WebStore(Store):
    """Files of a web server, below a URL. They are read, and neither listed nor written.

    Of a server that does not give parts of a file, the file is fetched into the cache, once for all processes of this
    machine, when a part of it is asked for.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    @property
    def url(self) -> str:
        return self._url

    def _place(self, name: str) -> str:
        return f"{self._url}/{self._inside(name)}"

    def read(self, name: str, *, mark: str = "") -> bytes:
        content = io.BytesIO()
        fetch(self._place(name), content, mark=mark, pauses=_PATIENT)
        return content.getvalue()

    def read_range(self, name: str, start: int, length: int, *, mark: str = "") -> bytes:
        if length <= 0:
            return b""
        url = self._place(name)
        path = _fetched.get((url, mark)) if mark else None
        part = None if path is not None else _again(url, lambda until: _part(url, start, length, mark, until), _PATIENT)
        if part is not None:
            return part
        path = path or self.local_path(name, mark=mark)
        if mark:
            _fetched[url, mark] = path
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise failure("read", str(path), error) from None

    def gives_parts(self, name: str) -> bool:
        return all(url != self._place(name) for url, _ in _fetched)

    def size(self, name: str) -> int:
        return self.marked(name)[0]

    def marked(self, name: str) -> tuple[int, str]:
        """See :meth:`Store.marked`. Raises StorageError if the server does not say how large the file is."""
        url = self._place(name)
        size, mark = _again(url, lambda _: _looked_at(url), _PATIENT)
        if size is None:
            raise _unread(url, "its server does not say how large it is", hint=_DOWNLOAD)
        return size, mark

    def local_path(self, name: str, *, mark: str = "") -> Path:
        size, now = self.marked(name)
        if mark and now != mark:
            raise changed(mask(self._place(name)))

        def download(target: Path) -> None:
            self._download(name, target, now, LARGEST_KEPT)

        return kept([self._place(name), now], name.partition("?")[0], size, download)

    def download(self, name: str, target: Path, *, mark: str = "") -> None:
        self._download(name, target, mark, LARGEST)

    def _download(self, name: str, target: Path, mark: str, most: int) -> None:
        try:
            with target.open("wb") as file:
                fetch(self._place(name), file, mark=mark, most=most, pauses=_PATIENT)
        except OSError as error:
            raise error if isinstance(error, StorageError) else failure("write", str(target), error) from None

    def pages(
        self,
        prefix: str = "",
        after: str | None = None,
        *,
        enter: Callable[[str], bool] | None = None,
        sizes: bool = True,
        marks: bool = False,
    ) -> Iterator[Page]:
        raise StorageError(f"{mask(self._url)!r}: a web server does not list its files", hint=_NAME_THEM)

    def write(self, name: str, data: bytes | bytearray | memoryview, *, exclusive: bool = False) -> None:
        self._refuse()

    def upload(self, name: str, path: Path) -> None:
        self._refuse()

    def move(self, source: str, target: str) -> None:
        self._refuse()

    def delete(self, names: Iterable[str]) -> None:
        self._refuse()

    def delete_tree(self, prefix: str = "") -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise StorageError(f"{mask(self._url)!r}: files of the web are read, and not written", hint=_ELSEWHERE)


_NAME_THEM = "Name the files themselves, or a list of them: --items LIST. Buckets are written s3://, gs:// or az://."
_ELSEWHERE = "Write to a folder, or to a bucket: s3://, gs:// or az://."
_DOWNLOAD = "Download it, and name the copy: curl -LO URL"
_DOWNLOAD_UNPACKED = "Download it, and name the copy: curl -LO --compressed URL"
_OF_THE_NETWORK = "Whoever starts the server lets jobs read from a host of its own network: tally up --allow-host HOST"

_fetched: dict[tuple[str, str], Path] = {}
"""Files whose servers do not give parts of them: URL and mark, and where each is kept."""


def fetch(url: str, into: BinaryIO, *, mark: str = "", most: int = LARGEST, pauses: Sequence[float] = _PAUSES) -> None:
    """Write what is at the URL into a file that is empty.

    mark: of the content, as :meth:`WebStore.marked` gives it. most: bytes that it may have. pauses: between tries, in
    seconds.
    Raises StorageError: SourceNotFoundError, SourceChangedError; StorageAwayError if the server does not answer.
    """

    def whole(until: float) -> None:
        into.seek(0)
        into.truncate()
        received = 0
        with _opened(url) as answer:
            expected = _length(answer)
            if expected is not None and expected > most:
                raise _too_large(url, expected, most)
            # Not read(), which waits until the block is full, however slowly it fills.
            while block := _read1(answer, received):
                received += len(block)
                if received > most:
                    raise _too_large(url, None, most)
                _check_pace(url, received, until)
                into.write(block)
            if expected is not None and received < expected:
                raise _LaterError(f"it was cut off after {received:,} of {expected:,} bytes")
            _check(url, _mark(received, answer.headers), mark)

    _again(url, whole, pauses)


def _again(url: str, call: Callable[[float], T], pauses: Sequence[float]) -> T:
    """What the call gives, which is told until when it may take. Raises StorageAwayError if no try goes well."""
    until = time.monotonic() + PATIENCE_SECONDS
    for attempt in range(len(pauses) + 1):
        try:
            return call(until)
        except _LaterError as error:
            pause = error.pause or pauses[min(attempt, len(pauses) - 1)]
            if attempt == len(pauses) or time.monotonic() + pause > until:
                raise _unread(url, f"{error} (tried {_times(attempt + 1)})", StorageAwayError) from None
            tell_of_pause()
            time.sleep(pause)
            tell_of_pause()
    raise AssertionError("the last try returns or raises")


class _LaterError(Exception):
    """It may go well when it is tried again. pause: seconds that the server asks for; 0 if it does not."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


@contextmanager
def _opened(url: str, part: str | None = None) -> Iterator[http.client.HTTPResponse]:
    """The server's answer. part: the bytes that are asked for, as HTTP writes them.

    Raises _LaterError, StorageError, and HTTPError for a part that there is not.
    """
    headers = {"User-Agent": f"tally/{tally.__version__}"} | ({} if part is None else {"Range": f"bytes={part}"})
    try:
        request = urllib.request.Request(  # noqa: S310  # the opener knows http and https only
            quote(url.partition("#")[0], safe=_SAFE), headers=headers
        )
        answer = _opener().open(request, timeout=SILENCE_SECONDS)
    except StorageError:
        raise
    except urllib.error.HTTPError as error:
        with error:
            if error.code == _NO_SUCH_PART and part is not None:
                raise
            if error.code in _LATER:
                raise _LaterError(_answered(error), _asked_pause(error)) from None
            gone = error.code in (404, 410)
            raise _unread(url, _answered(error), SourceNotFoundError if gone else StorageError) from None
    except (ValueError, http.client.InvalidURL) as error:
        raise _unread(url, f"it is no URL: {mask(str(error))}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, network.PrivateAddressError):
            raise _unread(url, str(reason.strerror), hint=_OF_THE_NETWORK) from None
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise _unread(url, f"its certificate is not to be trusted: {reason.verify_message}") from None
        if isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME:
            raise _unread(url, "there is no host of this name", StorageAwayError) from None
        raise _LaterError(_said(reason)) from None
    with answer:
        packed = str(answer.headers.get("Content-Encoding", "")).strip().lower()
        if packed in _PACKED and not _IS_PACKED.search(urlsplit(url).path):
            raise _unread(
                url, f"its server sends it packed ({packed}), which was not asked for", hint=_DOWNLOAD_UNPACKED
            )
        yield answer


_NO_SUCH_PART = 416
_PACKED = ("gzip", "x-gzip", "deflate", "compress", "br", "zstd")
_IS_PACKED = re.compile(r"\.(t?gz|svgz|zst|br|bz2|xz|z)$", re.IGNORECASE)
"""Names of files that are packed themselves: servers tell that of these, too, and they are meant as they are."""


def _read1(answer: http.client.HTTPResponse, received: int) -> bytes:
    """Some of the bytes that are left; none at the end. Raises _LaterError."""
    try:
        return answer.read1(_BLOCK)
    except http.client.IncompleteRead:
        raise _LaterError(f"it was cut off after {received:,} bytes") from None
    except (OSError, http.client.HTTPException) as error:
        raise _LaterError(_said(error)) from None


def _looked_at(url: str) -> tuple[int | None, str]:
    """The file's size in bytes, if the server says it, and its mark. Not by HEAD, which some servers refuse."""
    try:
        with _opened(url, "0-0") as answer:
            found = _PART.fullmatch(answer.headers.get("Content-Range", ""))
            size = _length(answer) if answer.status != http.client.PARTIAL_CONTENT else int(found[3]) if found else None
            return size, _mark(size, answer.headers)
    except urllib.error.HTTPError as error:  # it is empty
        found = _PART.fullmatch(error.headers.get("Content-Range", ""))
        size = int(found[3]) if found else None
        return size, _mark(size, error.headers)


def _part(url: str, start: int, length: int, mark: str, until: float) -> bytes | None:
    """At most so many bytes of the file; None if its server does not give parts of it."""
    try:
        with _opened(url, f"{start}-{start + length - 1}") as answer:
            if answer.status != http.client.PARTIAL_CONTENT:
                return None
            found = _PART.fullmatch(answer.headers.get("Content-Range", ""))
            if found is None or found[1] is None or int(found[1]) != start or int(found[2]) >= start + length:
                raise _unread(url, "its server gives another part of it than was asked for", hint=_DOWNLOAD)
            _check(url, _mark(int(found[3]), answer.headers), mark)
            expected = int(found[2]) - start + 1
            data = bytearray()
            while len(data) < expected and (block := _read1(answer, len(data))):
                data += block
                _check_pace(url, len(data), until)
            if len(data) != expected:
                raise _LaterError(f"it was cut off after {len(data):,} of {expected:,} bytes")
            return bytes(data)
    except urllib.error.HTTPError as error:
        found = _PART.fullmatch(error.headers.get("Content-Range", ""))
        if found is not None:
            _check(url, _mark(int(found[3]), error.headers), mark)
        return b""


def _check_pace(url: str, received: int, until: float) -> None:
    if time.monotonic() > until + received / SLOWEST:
        raise _unread(url, f"it comes too slowly: {received:,} bytes in {PATIENCE_SECONDS + received / SLOWEST:.0f} s")


def _mark(size: int | None, headers: Message) -> str:
    """What changes with a file's content, as far as its server says."""
    told = headers.get("ETag") or headers.get("Last-Modified") or ""
    return f"{size} {told}".replace('"', "").rstrip()


def _check(url: str, now: str, mark: str) -> None:
    """Raises SourceChangedError if the content is not that of the mark."""
    if mark and now != mark:
        raise changed(mask(url))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a few redirects, to the web only, and from https to https only."""

    max_redirections = REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        target = urlsplit(newurl)
        if target.scheme not in ("http", "https") or (req.type == "https" and target.scheme != "https"):
            raise _unread(req.full_url, f"it redirects to {mask(newurl)}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Http(urllib.request.HTTPHandler):
    """Connects to allowed addresses only."""

    def http_open(self, req: Any) -> Any:
        return self.do_open(network.HTTPConnection, req)


class _Https(urllib.request.HTTPSHandler):
    """Connects to allowed addresses only."""

    def https_open(self, req: Any) -> Any:
        return self.do_open(network.HTTPSConnection, req)


_made: list[urllib.request.OpenerDirector] = []


def _opener() -> urllib.request.OpenerDirector:
    """One that knows http and https only; kept, as making it reads the certificates of this machine."""
    if not _made:
        opener = urllib.request.OpenerDirector()
        handlers: tuple[Callable[[], urllib.request.BaseHandler], ...] = (
            urllib.request.ProxyHandler,
            _Http,
            _Https,
            _Redirects,
            urllib.request.HTTPDefaultErrorHandler,
            urllib.request.HTTPErrorProcessor,
        )
        for make in handlers:
            opener.add_handler(make())
        _made.append(opener)
    return _made[0]


def _length(answer: http.client.HTTPResponse) -> int | None:
    """The bytes that the server promises."""
    given = answer.headers.get("Content-Length", "")
    return int(given) if given.isdecimal() else None


def _answered(error: urllib.error.HTTPError) -> str:
    if error.code in (301, 302, 303, 307, 308):  # urllib gives up by raising the redirect itself
        if "not allowed" in str(error.msg):
            return "it redirects to no address of the web"
        return f"it redirects more than {REDIRECTS} times, or in a circle"
    return f"the server answered {error.code} {http.client.responses.get(error.code, '')}".rstrip()


def _asked_pause(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks to wait; 0 if it does not."""
    given = error.headers.get("Retry-After", "") if error.headers else ""
    if given.isdecimal():
        return min(float(given), _LONGEST_PAUSE)
    try:
        return min(max(email.utils.parsedate_to_datetime(given).timestamp() - time.time(), 0.0), _LONGEST_PAUSE)
    except (TypeError, ValueError):
        return 0.0


def _said(reason: Any) -> str:
    if isinstance(reason, TimeoutError):
        return f"nothing was heard for {SILENCE_SECONDS:g} s"
    if isinstance(reason, http.client.HTTPException):
        return f"no answer of HTTP came ({type(reason).__name__})"
    said = str(getattr(reason, "strerror", None) or reason) or type(reason).__name__
    return mask(said[0].lower() + said[1:])


def _unread(url: str, why: str, kind: type[StorageError] = StorageError, *, hint: str | None = None) -> StorageError:
    return kind(f"cannot read {mask(url)!r}: {why}", hint=hint)


def _too_large(url: str, size: int | None, most: int) -> StorageError:
    has = "more" if size is None else f"{size:,} bytes"
    return _unread(url, f"it has {has}, and a file from the web may have {most:,} bytes", hint=_DOWNLOAD)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
