"""Opening video files, and FFmpeg's errors in plain words."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Self

from tally.errors import ItemError, StorageError
from tally.storage import Store, failure, open_store
from tally.storage.ranges import RangeFile

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.container.streams import StreamContainer
    from av.packet import Packet
    from av.stream import Stream
    from av.video.stream import VideoStream


class _Object(NamedTuple):
    """An object of a store with a certain content: see :meth:`Store.marked`."""

    root: str
    name: str
    size: int
    mark: str

    @property
    def place(self) -> str:
        return f"{self.root}/{self.name}"


_MAX_SEEKS = 32
_MAX_HEADER_BYTES = 32 * 2**20
"""How often FFmpeg may seek, and how much it may read, to open a video in a bucket. Some have no index (MP4 in
fragments), and FFmpeg reads through the whole file each time: such a video is downloaded instead."""

# The blocks that were read to open the last remote video: a worker's next chunk is often of the same one, and an
# index may be as large as a chunk.
_header_blocks: dict[_Object, dict[int, bytes]] = {}
_downloads: dict[_Object, Path] = {}

_HINTS = {
    "moov atom not found": "The end of the file is missing: it was cut off while it was recorded or copied.",
    "EBML header parsing failed": "It is no Matroska or WebM file, or its beginning is damaged.",
    "Error when loading first segment": "It is a playlist, which names other files: name the video itself.",
}


class Input:
    """An opened video. For one thread; close it.

    container: for its metadata; packets are read with :meth:`packets`.
    """

    def __init__(self, container: InputContainer, remote: _Remote | None = None) -> None:
        self.container = container
        self._remote = remote

    @property
    def streams(self) -> StreamContainer:
        return self.container.streams

    def packets(self, *streams: Any) -> Iterator[Packet[Any]]:
        """The packets of these streams, or of all. Each stream ends with an empty one.

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
            except IndexError:  # how PyAV ends if a stream turned up that was not there in the beginning
                packet = None
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
    """The file object that FFmpeg reads an object of a store through.

    FFmpeg takes a failed read for the end of the file or for damage, sometimes silently. So the failure is kept
    here, and :class:`Input` checks for it after each step.
    """

    def __init__(self, store: Store, known: _Object, on_fetched: Callable[[int], None] | None) -> None:
        _, self.name, size, mark = known  # FFmpeg knows some formats by the name only
        self.error: StorageError | None = None
        self.opening = True
        self._store, self._known = store, known
        self._file: RangeFile | BinaryIO = RangeFile(
            store, self.name, (size, mark), _header_blocks.get(known), on_fetched
        )

    def read(self, size: int) -> bytes:
        if self.error is None:
            try:
                if self.opening and isinstance(self._file, RangeFile) and self._is_read_through(self._file):
                    self._download()
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
        """Raises the failure that was kept, if there is one."""
        if self.error is not None:
            raise self.error from None

    def keep_header(self) -> None:
        """Keep the blocks that were read for the next time it is opened."""
        self.opening = False
        if isinstance(self._file, RangeFile) and self._known.mark and self._known not in _header_blocks:
            _header_blocks.clear()
            _header_blocks[self._known] = self._file.blocks

    def close(self) -> None:
        self._file.close()

    def _is_read_through(self, file: RangeFile) -> bool:
        return file.jumps > _MAX_SEEKS or file.fetched > _MAX_HEADER_BYTES

    def _download(self) -> None:
        at = self._file.tell()
        self._file.close()
        self._file = _downloaded(self._store, self._known).open("rb")
        self._file.seek(at)


def _downloaded(store: Store, known: _Object) -> Path:
    """The object as a file of this machine. Raises StorageError; SourceChangedError if its content is another one."""
    path = store.local_path(known.name, mark=known.mark)
    _downloads[known] = path
    return path


def open_video(
    root: str,
    name: str,
    known: tuple[int, str] | None = None,
    on_fetched: Callable[[int], None] | None = None,
    *,
    format: str | None = None,  # noqa: A002
) -> Input:
    """Open a video for reading; one in a bucket is read by ranges.

    known: its size and mark, if they are known. on_fetched: called with the bytes fetched so far, see ``RangeFile``.
    format: FFmpeg's name of the format, if that is known: no packets are read ahead then.
    Raises ItemError if it is no video that FFmpeg knows, StorageError (such as SourceNotFoundError) if it cannot be
    read, SourceChangedError if it has changed. A local file may change while it is read: check its mark in the end.
    """
    store = open_store(root)
    if store.is_local:
        path = store.local_path(name, mark=known[1] if known else "")
        return Input(_opened(os.fspath(path), store.size(name), format))
    this = _Object(root, name, *(known or store.marked(name)))
    if this in _downloads and _downloads[this].exists():
        return Input(_opened(os.fspath(_downloads[this]), this.size, format))
    remote = _Remote(store, this, on_fetched)
    try:
        try:
            container = _opened(remote, this.size, format)
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
    remote.keep_header()
    return Input(container, remote)


def _opened(file: Any, size: int, format: str | None) -> InputContainer:  # noqa: A002
    import av

    if av.logging.get_level() is None:  # errors have FFmpeg's reason only while it logs; this level prints nothing
        av.logging.set_level(av.logging.PANIC)
    if size == 0:
        raise ItemError("the file is empty", stage="read")
    try:
        # Some cameras write titles in legacy encodings; the pictures are fine.
        options = {} if format is None else {"probesize": "32", "analyzeduration": "0"}
        if not isinstance(file, str):  # nor does FFmpeg connect to where a playlist from elsewhere leads
            options["protocol_whitelist"] = ""
        container: InputContainer = av.open(file, "r", format=format, options=options, metadata_errors="ignore")
        return container
    except (av.FFmpegError, ValueError) as error:
        raise ItemError(
            f"it cannot be opened as a video: {error_text(error)}", stage="read", hint=_hint(error)
        ) from None


def video_stream(container: InputContainer) -> VideoStream:
    """The container's main video stream. Raises ItemError if it has none; a cover picture does not count."""
    import av

    stream = container.streams.best("video")
    if stream is not None and not stream.disposition & av.stream.Disposition.attached_pic:
        if stream.codec_context is None:
            raise ItemError(
                "it does not say how its video is encoded, or in a way that FFmpeg does not know",
                stage="read",
                hint="Its beginning may be damaged: 'ffprobe FILE' shows what can be read of it.",
            )
        return stream  # type: ignore[return-value]
    others = ", ".join(dict.fromkeys(f"{each.type} {_codec(each)}".strip() for each in container.streams))
    raise ItemError(f"it has no video stream, only {others}" if others else "it has no streams", stage="read")


def error_text(error: BaseException) -> str:
    """FFmpeg's message, without its error numbers and the file's path."""
    text = getattr(error, "strerror", None) or str(error)
    log = getattr(error, "log", None)
    detail = re.sub(r"0x[0-9a-f]+", "", log[2]).strip() if log else ""
    return f"{text} ({detail})" if detail and detail not in text else str(text)


def _hint(error: BaseException) -> str | None:
    text = error_text(error)
    return next((hint for message, hint in _HINTS.items() if message in text), None)


def _codec(stream: object) -> str:
    context = getattr(stream, "codec_context", None)
    return "" if context is None else str(context.name)
