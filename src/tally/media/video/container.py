"""Opening containers, and FFmpeg's errors in plain words."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Self

from tally.errors import ItemError, StorageError
from tally.storage import Store, failure, open_store
from tally.storage.ranges import RangeFile, changed

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.container.streams import StreamContainer
    from av.packet import Packet
    from av.stream import Stream
    from av.video.stream import VideoStream


class _Known(NamedTuple):
    """An object, and its content: see :meth:`Store.marked`."""

    root: str
    name: str
    size: int
    mark: str

    @property
    def place(self) -> str:
        return f"{self.root}/{self.name}"


_JUMPS = 32
_OPENING = 32 * 2**20
"""What may be read to open a video in a bucket: places, and bytes. Some have no index, and FFmpeg walks through all of
them each time (MP4 in fragments): they are fetched to this machine instead."""

# What was read to open the remote video that was opened last, by its place and mark: a worker's next chunk is often of
# the same one, and an index may be as large as a chunk.
_begun: dict[_Known, dict[int, bytes]] = {}
_fetched: dict[_Known, Path] = {}

_HINTS = {
    "moov atom not found": "The end of the file is missing: it was cut off while it was recorded or copied.",
    "EBML header parsing failed": "It is no Matroska or WebM file, or its beginning is damaged.",
}


class Input:
    """An opened video: of one thread; close it.

    container: for what it says of itself; packets are taken with :meth:`packets`.
    """

    def __init__(self, container: InputContainer, remote: _Remote | None = None) -> None:
        self.container = container
        self._remote = remote

    @property
    def streams(self) -> StreamContainer:
        return self.container.streams

    def packets(self, *streams: Any) -> Iterator[Packet[Any]]:
        """The packets of these streams, or of all. The last of each is empty.

        Raises FFmpegError where the file is damaged, StorageError where its storage fails.
        """
        import av

        packets = self.container.demux(*streams)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:
                self._check()
                raise
            self._check()
            if packet is None:
                return
            yield packet

    def seek(self, offset: int, stream: Stream) -> None:
        """Go to the keyframe before a time in the stream's own ticks. Raises as :meth:`packets`."""
        try:
            self.container.seek(offset, stream=stream)
        finally:
            self._check()

    def _check(self) -> None:
        if self._remote is not None:
            self._remote.check()

    def close(self) -> None:
        self.container.close()
        if self._remote is not None:
            self._remote.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Remote:
    """What FFmpeg reads an object through. It takes whatever goes wrong for the end or for damage, in places without
    a word: so a failure is kept here, and :class:`Input` asks for it after each step."""

    def __init__(self, store: Store, known: _Known, told: Callable[[int], None] | None) -> None:
        _, self.name, size, mark = known  # by its name, FFmpeg tells formats that have no sign of their own
        self.error: StorageError | None = None
        self.opening = True
        self._store, self._known = store, known
        self._file: RangeFile | BinaryIO = RangeFile(store, self.name, (size, mark), _begun.get(known), told)

    def read(self, size: int) -> bytes:
        if self.error is None:
            try:
                if self.opening and isinstance(self._file, RangeFile) and self._is_walked_through(self._file):
                    self._fetch()
                return self._file.read(size)
            except StorageError as error:
                self.error = error
            except OSError as error:
                self.error = failure("read", self._known.place, error)
        return b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def check(self) -> None:
        """Raises what went wrong, if anything did."""
        if self.error is not None:
            raise self.error from None

    def opened(self) -> None:
        """Keeps what was read for whoever opens it next."""
        self.opening = False
        if isinstance(self._file, RangeFile) and self._known.mark and self._known not in _begun:
            _begun.clear()
            _begun[self._known] = self._file.blocks

    def close(self) -> None:
        self._file.close()

    def _is_walked_through(self, file: RangeFile) -> bool:
        return file.jumps > _JUMPS or file.fetched > _OPENING

    def _fetch(self) -> None:
        at = self._file.tell()
        self._file.close()
        self._file = _whole(self._store, self._known).open("rb")
        self._file.seek(at)


def _whole(store: Store, known: _Known) -> Path:
    """The object as a file of this machine. Raises StorageError, also where it is not what it was."""
    path = store.local_path(known.name)
    if store.marked(known.name) != (known.size, known.mark):
        raise changed(known.place)
    _fetched[known] = path
    return path


def open_video(
    root: str, name: str, known: tuple[int, str] | None = None, told: Callable[[int], None] | None = None
) -> Input:
    """Open a video for reading; what is in a bucket is read by ranges.

    known, told: as of :class:`RangeFile`.
    Raises ItemError when it is no video that FFmpeg knows, StorageError (such as SourceNotFoundError) when it cannot
    be read, or is in a bucket and has changed.
    """
    store = open_store(root)
    if store.is_local:
        return Input(_opened(os.fspath(store.local_path(name)), store.size(name)))
    this = _Known(root, name, *(known or store.marked(name)))
    if this in _fetched and _fetched[this].exists():
        return Input(_opened(os.fspath(_fetched[this]), this.size))
    remote = _Remote(store, this, told)
    try:
        try:
            container = _opened(remote, this.size)
        except ItemError:
            remote.check()
            raise
        try:
            remote.check()
        except StorageError:
            container.close()
            raise
    except BaseException:
        remote.close()
        raise
    remote.opened()
    return Input(container, remote)


def _opened(file: Any, size: int) -> InputContainer:
    import av

    if av.logging.get_level() is None:  # errors carry FFmpeg's reason only while it logs, silently here
        av.logging.set_level(av.logging.PANIC)
    if size == 0:
        raise ItemError("the file is empty", stage="read")
    try:
        # Real cameras write titles in legacy encodings; a title is no reason to refuse the pictures.
        container: InputContainer = av.open(file, "r", metadata_errors="ignore")
        return container
    except (av.FFmpegError, ValueError) as error:
        raise ItemError(f"it cannot be opened as a video: {plain(error)}", stage="read", hint=_hint(error)) from None


def video_stream(container: InputContainer) -> VideoStream:
    """The container's main video stream. Raises ItemError if it has none; a cover picture is none."""
    import av

    stream = container.streams.best("video")
    if stream is not None and not stream.disposition & av.stream.Disposition.attached_pic:
        return stream  # type: ignore[return-value]
    others = ", ".join(dict.fromkeys(f"{each.type} {_codec(each)}".strip() for each in container.streams))
    raise ItemError(f"it has no video stream, only {others}" if others else "it has no streams", stage="read")


def plain(error: BaseException) -> str:
    """What FFmpeg said, without its error numbers and the file's path."""
    text = getattr(error, "strerror", None) or str(error)
    log = getattr(error, "log", None)
    detail = re.sub(r"0x[0-9a-f]+", "", log[2]).strip() if log else ""
    return f"{text} ({detail})" if detail and detail not in text else str(text)


def _hint(error: BaseException) -> str | None:
    text = plain(error)
    return next((hint for said, hint in _HINTS.items() if said in text), None)


def _codec(stream: object) -> str:
    context = getattr(stream, "codec_context", None)
    return "" if context is None else str(context.name)
