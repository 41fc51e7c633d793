"""Pictures as videos, with the sound of the videos that their frames came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tally.errors import ItemError, SpecError
from tally.media.video.encode import Encoder, Encoding
from tally.media.video.encoders import check
from tally.media.video.frame import FrameInfo
from tally.media.video.metadata import Video
from tally.scorers.base import Result
from tally.sinks.base import Output, OutputDescription, Writer
from tally.sinks.files import anywhere, free, named, picture
from tally.sinks.formats import VIDEOS
from tally.sinks.layout import File, OutputLayout, staged_name
from tally.sinks.rows import write_dead
from tally.sinks.staging import StagedSink
from tally.sources.base import Chunk, Source
from tally.storage import temporary

if TYPE_CHECKING:
    from tally.media.video.join import Segment

_DOWNLOADS = 8
"""Segments that are downloaded at once."""


class VideoSink(StagedSink):
    """Takes arrays ``uint8[height, width, 3]`` (RGB) or ``uint8[height, width]``, one for each frame of a video.

    format: ``mp4``, ``mov``, ``mkv`` or ``webm``. audio: whether the source's sound goes with the pictures.
    Segments are runs of frames without a gap. So frames that are scored later fit between them.
    """

    def __init__(self, layout: OutputLayout, format: str, encoding: Encoding, *, audio: bool = True) -> None:  # noqa: A002
        super().__init__(layout, format)
        self.encoding, self.audio = encoding, audio

    def describe(self) -> OutputDescription:
        """See :meth:`Sink.describe`."""
        options = {"codec": self.encoding.codec, "crf": self.encoding.crf, "audio": self.audio}
        return OutputDescription("video", str(self.layout), bool(self.layout.merged), self.format, {}, None, options)

    @property
    def rolling(self) -> bool:
        """A video is joined when all of its frames are there."""
        return False

    def check(self, source: Source) -> None:
        """See :meth:`Sink.check`. Raises SpecError also if this machine cannot encode like that."""
        super().check(source)
        check(self.encoding, self.format)
        if self.layout.merged and source.several():
            raise SpecError(
                f"the source holds several videos, and {self.place} is one file", hint="Give a folder: --out videos/"
            )

    def open(self, attempt: str, chunk: Chunk) -> Writer:
        """See :meth:`Sink.open`."""
        return VideoWriter(self.layout, attempt, self.encoding)

    def committed(self, outputs: Iterable[Output]) -> tuple[str, list[str]]:
        """There are no rows to read. Raises SpecError."""
        raise SpecError(
            f"{self.layout} holds video, and no rows that could be read",
            hint="Its manifest lists the files; 'tally jobs dead' lists frames that failed.",
        )

    def assemble(
        self, outputs: Sequence[Output], dead: Iterable[dict[str, Any]], earlier: dict[str, Any] | None
    ) -> dict[str, Any]:
        files: dict[str, File] = {file["key"]: file for file in (earlier or {}).get("files", [])}
        notes = list((earlier or {}).get("notes", []))
        found = _by_video(outputs)
        if self.layout.merged and len(keys := [*files, *(key for key in found if key not in files)]) > 1:
            raise SpecError(
                f"the source holds {len(keys):,} videos ({keys[0]!r}, {keys[1]!r} ...), and {self.layout} is one file",
                hint="Give a folder: --out videos/",
            )
        for key, parts in found.items():
            name = files[key]["path"] if key in files else self._name(key, {file["path"] for file in files.values()})
            files[key], said = self._joined(name, parts, files.get(key))
            notes += [*parts.notes, *said]
        dead_file = write_dead(self.layout, dead, "parquet")
        return {
            "output": "video",
            "format": self.format,
            "files": list(files.values()),
            "dead_file": dead_file,
            "counts": {
                "files": len(files),
                "rows": sum(file["rows"] for file in files.values()),
                "bytes": sum(file["bytes"] for file in files.values()),
                "dead": dead_file["rows"] if dead_file else 0,
            },
            "notes": list(dict.fromkeys(notes)),
        }

    def _name(self, key: str, taken: set[str]) -> str:
        name = self.layout.merged or named(key, self.format, VIDEOS)
        return free(name, key, {anywhere(each) for each in taken}.__contains__)

    def _joined(self, name: str, parts: _Parts, before: File | None) -> tuple[File, list[str]]:
        from tally.media.video.join import join

        with self._at_hand(parts, before) as segments, self.layout.create(name) as path:
            said = join(path, self.format, parts.video, segments, audio=self.audio)
            size = path.stat().st_size
        rows = parts.frames + (before["rows"] if before else 0)
        return {"path": name, "key": parts.video.key, "rows": rows, "bytes": size}, said

    @contextmanager
    def _at_hand(self, parts: _Parts, before: File | None) -> Iterator[list[Segment]]:
        """The segments, and the finished video of earlier generations, as local files.

        Those in a bucket are downloaded to a temporary folder, which takes as much space as the finished video.
        """
        from tally.media.video.join import Segment

        layout, store = self.layout, self.layout.store
        wanted: list[tuple[str, int | None]] = [(layout.staging + name, start) for name, start in parts.segments]
        if before is not None:
            wanted.insert(0, (before["path"], None))
        if store.is_local:
            yield [Segment(store.local_path(name), start) for name, start in wanted]
            return
        with temporary.folder("video") as folder:
            paths = [folder / f"{number}.{name.rpartition('.')[2]}" for number, (name, _) in enumerate(wanted)]
            with ThreadPoolExecutor(_DOWNLOADS) as pool:
                try:
                    list(pool.map(store.download, [name for name, _ in wanted], paths))
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
            yield [Segment(path, start) for path, (_, start) in zip(paths, wanted, strict=True)]

    def _dead_names(self) -> list[str]:
        return [self.layout.dead("parquet")]


@dataclass(slots=True)
class _Parts:
    """The new parts of one video. segments: staged name and tick of the first frame of each."""

    video: Video
    segments: list[tuple[str, int]] = field(default_factory=list)
    frames: int = 0
    notes: list[str] = field(default_factory=list)


def _by_video(outputs: Iterable[Output]) -> dict[str, _Parts]:
    found: dict[str, _Parts] = {}
    for output in outputs:
        if output.files:
            video = Video.from_json(output.facts["video"])
            parts = found.setdefault(video.key, _Parts(video))
            parts.segments += zip(output.files, output.facts["starts"], strict=True)
            parts.frames += output.rows
            parts.notes += output.facts["notes"]
    return found


class VideoWriter(Writer):
    """Encodes each picture at once. A segment is kept in memory until a gap or the end of the chunk."""

    def __init__(self, layout: OutputLayout, attempt: str, encoding: Encoding) -> None:
        self._layout, self._attempt, self._encoding = layout, attempt, encoding
        self._video: Video | None = None
        self._size: tuple[int, int] | None = None
        self._encoder: Encoder | None = None
        self._last = 0
        self._files: list[str] = []
        self._starts: list[int] = []
        self._notes: list[str] = []
        self._rows = self._bytes = 0

    def add(
        self, keys: Sequence[str], results: Sequence[Result], info: Sequence[Mapping[str, Any]] | None = None
    ) -> list[tuple[int, ItemError]]:
        """See :meth:`Writer.add`. ``info`` holds the :class:`FrameInfo` of each frame."""
        failed = []
        for index, (result, frame) in enumerate(zip(results, info or (), strict=True)):
            if not isinstance(frame, FrameInfo):
                raise TypeError("a video is made of frames whose info is FrameInfo")
            try:
                self._add(picture(result), frame)
            except ItemError as error:
                failed.append((index, error))
        return failed

    def _add(self, array: np.ndarray[Any, np.dtype[np.uint8]], frame: FrameInfo) -> None:
        self._video = frame.source
        size = (array.shape[1], array.shape[0])
        if self._size is not None and self._size != size:
            raise ItemError(
                "the scorer returned a picture of {}x{} after one of {}x{}; a video has one size".format(
                    *size, *self._size
                ),
                stage="write",
                hint="Return pictures of one size, or write frames as pictures: --frames png",
            )
        if self._encoder is not None and frame.number != self._last + frame.step:
            self._flush()
        if self._encoder is None:
            self._encoder = Encoder(self._encoding, frame.source, size)
            self._starts.append(frame.tick)
            if self._encoder.note is not None and self._encoder.note not in self._notes:
                self._notes.append(self._encoder.note)
        self._size, self._last = size, frame.number
        self._encoder.add(array, frame.tick)
        self._rows += 1

    def _flush(self) -> None:
        if self._encoder is None:
            return
        data = self._encoder.close()
        self._encoder = None
        name = staged_name(self._attempt, len(self._files), "mp4")
        self._files.append(name)
        self._layout.store.write(self._layout.staging + name, data)
        self._bytes += len(data)

    def close(self) -> Output:
        """See :meth:`Writer.close`."""
        self._flush()
        if self._video is None or not self._files:
            return Output()
        facts = {"video": self._video.to_json(), "starts": self._starts, "notes": self._notes}
        return Output(self._files, self._rows, self._bytes, facts)

    def abort(self) -> None:
        """See :meth:`Writer.abort`."""
        self._encoder = None
        self._layout.store.delete([self._layout.staging + name for name in self._files])
