"""Opening containers, and FFmpeg's errors in plain words."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tally.errors import ItemError
from tally.storage import open_store

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

_HINTS = {
    "moov atom not found": "The end of the file is missing: it was cut off while it was recorded or copied.",
    "EBML header parsing failed": "It is no Matroska or WebM file, or its beginning is damaged.",
}


def open_container(root: str, name: str) -> InputContainer:
    """Open a video for reading; fetched to this machine first if it is in a bucket.

    Raises SourceNotFoundError or StorageError when it cannot be read, and as :func:`open_file`.
    """
    return open_file(open_store(root).local_path(name))


def open_file(path: Path) -> InputContainer:
    """Open a video of this machine. Raises ItemError when it is no video that FFmpeg knows."""
    import av

    if av.logging.get_level() is None:  # errors carry FFmpeg's reason only while it logs, silently here
        av.logging.set_level(av.logging.PANIC)
    if path.stat().st_size == 0:
        raise ItemError("the file is empty", stage="read")
    try:
        # Real cameras write titles in legacy encodings; a title is no reason to refuse the pictures.
        return av.open(os.fspath(path), metadata_errors="ignore")
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
