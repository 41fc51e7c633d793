"""Probing a video before it is scored: its metadata, and every frame that its container promises.

Packets are read, not decoded; each frame that they promise must come out. Only one picture is decoded, for metadata
that no header has. In containers without presentation times (AVI) all are decoded, for their order.
"""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tally import processes
from tally.errors import ItemError, SourceChangedError, StorageAwayError, StorageError, TallyError
from tally.media.video.container import Input, error_text, open_video, video_stream
from tally.media.video.metadata import Colour, Video, pack, unpack
from tally.storage import open_store

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

END_SECONDS = 0.5
"""How much earlier than its header says a container may end: headers are rounded, and count hidden frames."""

PATIENCE_SECONDS = 120.0
PATIENCE_BYTES_PER_SECOND = 2e6
"""How long probing may take: PATIENCE_SECONDS, and the video's size divided by PATIENCE_BYTES_PER_SECOND."""

STORAGE_SECONDS = 600.0
"""How much longer it may take in a bucket until something has been read. A store that does not answer raises an error
before that."""
_MAX_REREADS = 4
"""A video in a bucket of which more than this many times its size was read gets no more time: FFmpeg is in a loop."""
_REPORT_BYTES = 2**20

_KINDS: tuple[type[TallyError], ...] = (StorageAwayError, SourceChangedError, StorageError, TallyError)
"""The class that a failure travels as between processes: the first that fits."""
_UNTIMED = frozenset({"avi"})
_UNKNOWN_RATE = Fraction(25)
_SLOWEST = Fraction(1, 1001)


class Key(NamedTuple):
    """A keyframe: its frame number, its packet's position in the stream, and that packet's times."""

    number: int
    packet: int
    pts: int | None
    dts: int | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """A video's frames in the order of presentation; a frame's number is its index.

    ticks: presentation times (see :class:`Video`), strictly ascending.
    packets: the position of each frame's packet in the stream, which is in the order of decoding.
    keys: keyframes, where decoding can begin, ascending.
    lost: how many frames the container's index lists after the last one that could be read.
    cut: why the video ends too early, if the number of missing frames is not known.
    """

    video: Video
    ticks: list[int]
    packets: list[int]
    keys: list[Key]
    lost: int = 0
    cut: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON; :meth:`from_json` is its inverse."""
        return {
            "video": self.video.to_json(),
            "ticks": pack(self.ticks),
            "packets": pack(self.packets),
            "keys": self.keys,
            "lost": self.lost,
            "cut": self.cut,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Timeline:
        """The timeline that :meth:`to_json` described."""
        return cls(
            Video.from_json(data["video"]),
            unpack(data["ticks"]),
            unpack(data["packets"]),
            [Key(*key) for key in data["keys"]],
            data["lost"],
            data["cut"],
        )


class _Packet(NamedTuple):
    position: int
    pts: int | None
    dts: int | None
    duration: int
    key: bool


def probe(
    key: str,
    root: str,
    name: str,
    known: tuple[int, str] | None = None,
    on_fetched: Callable[[int], None] | None = None,
) -> Timeline:
    """Probe one video. known, on_fetched: see :func:`open_video`.

    Raises ItemError if there is nothing to score, StorageError if it cannot be read.
    """
    size, mark = known = known or open_store(root).marked(name)
    with open_video(root, name, known, on_fetched) as opened:
        container, stream = opened.container, video_stream(opened.container)
        packets, picture, ends, problem = _demux(opened, stream)
        if not packets:
            raise ItemError(f"it holds no video packets{f' ({problem})' if problem else ''}", stage="read")
        if not (picture or (stream.codec_context.width and stream.codec_context.height)):
            raise ItemError("none of its pictures can be decoded, and it does not say their size", stage="read")
        untimed = _is_untimed(container, stream, packets)
        lost = _lost(container, stream, packets)
        cut = None if lost else problem or _cut(container, ends)
        video = _metadata(container, stream, picture, key=key, root=root, name=name, size=size, mark=mark)
    rank = None
    if untimed:
        with open_video(root, name, known, on_fetched) as opened:
            rank = _order_by_decoding(opened, packets)
    return _timeline(video, packets, rank, lost, cut)


# -- reading packets -----------------------------------------------------------------------------------


def _demux(opened: Input, stream: VideoStream) -> tuple[list[_Packet], VideoFrame | None, float, str | None]:
    """The packets of shown frames, the first picture, when the last stream ends in seconds, and why reading failed."""
    import av

    packets: list[_Packet] = []
    picture = None
    end = -math.inf
    position = 0
    codec = stream.codec_context.name
    stream.codec_context.thread_count = 1
    problem = None
    try:
        for packet in opened.packets():
            if packet.dts is None and packet.pts is None and packet.size == 0:
                continue  # the end
            at = packet.pts if packet.pts is not None else packet.dts
            if at is not None and packet.time_base is not None:
                end = max(end, float((at + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index != stream.index:
                continue
            if is_shown(codec, packet):
                packets.append(_Packet(position, packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe))
            position += 1
            if picture is None:
                picture = _first(packet)
    except StorageError:
        raise
    except (av.FFmpegError, OSError) as error:
        problem = f"reading it failed after {position:,} video packets: {error_text(error)}"
    if picture is None and position:
        try:
            picture = next(iter(stream.codec_context.decode(None)), None)
        except av.FFmpegError:
            picture = None
    return packets, picture, end, problem


def _first(packet: Packet[Any]) -> VideoFrame | None:
    import av

    try:
        return next(iter(packet.decode()), None)
    except (av.FFmpegError, ValueError):
        return None


def is_shown(codec: str, packet: Packet[Any]) -> bool:
    """Whether a packet's picture is shown. An edit list may cut it off; VP8 and VP9 have packets that only serve to
    decode others, as their headers say (RFC 6386, section 9.1; VP9 bitstream specification, section 6.2)."""
    if packet.is_discard or packet.size == 0:
        return False
    if codec not in ("vp8", "vp9") or packet.is_keyframe:
        return True
    data = memoryview(packet)
    first = data[0]
    if codec == "vp8":
        return bool(first >> 4 & 1)
    if data[-1] & 0xE0 == 0xC0 or first >> 6 != 2:  # a superframe shows its last one; without the marker, no VP9
        return True
    bit = 3 if first >> 4 & 3 != 3 else 2  # after the frame marker and the profile: show_existing_frame
    return bool(first >> bit & 1) or bool(first >> (bit - 2) & 1)


def _is_untimed(container: InputContainer, stream: VideoStream, packets: list[_Packet]) -> bool:
    """Whether the container has no order of presentation, and the codec may show pictures in another order than that
    of their packets. FFmpeg guesses times for AVI, wrongly where two B-frames follow each other."""
    from av.codec.codec import Properties

    codec: Any = stream.codec_context.codec
    may_differ = codec.properties & Properties.REORDER.value
    timed = not set(container.format.name.split(",")) & _UNTIMED and all(packet.pts is not None for packet in packets)
    return bool(may_differ) and not timed


def _lost(container: InputContainer, stream: VideoStream, packets: list[_Packet]) -> int:
    """How many frames an MP4's index lists beyond those that could be read."""
    if "mp4" not in container.format.name.split(","):
        return 0
    listed = sum(not entry.is_discard for entry in stream.index_entries)
    return max(0, listed - len(packets))


def _cut(container: InputContainer, end: float) -> str | None:
    """Why the container counts as cut off: it ends before the time that its header states. None if it does not."""
    import av
    from av.format import Flags

    if container.duration is None or Flags(container.format.flags) & Flags.ts_discont:
        return None
    start = max(0.0, (container.start_time or 0) / av.time_base)
    stated = start + container.duration / av.time_base
    if end >= stated - END_SECONDS:
        return None
    return f"its header says that it lasts {stated:.3f} s, and it ends at {max(end, 0):.3f} s: it is cut off"


def _order_by_decoding(opened: Input, packets: list[_Packet]) -> dict[int, int]:
    """The rank of each packet's picture in the decoder's output; packets without one stay behind the one before."""
    import av

    shown: list[int] = []
    stream = video_stream(opened.container)
    stream.codec_context.thread_count = 1
    for position, packet in enumerate(opened.packets(stream)):
        if packet.size:
            packet.pts = packet.dts = position
        try:
            shown += [frame.pts for frame in packet.decode() if frame.pts is not None]
        except av.FFmpegError:
            continue
    ranks = {position: rank for rank, position in enumerate(dict.fromkeys(shown))}
    latest = -1
    places = []
    for each in packets:
        rank = ranks.get(each.position)
        latest = max(latest, latest if rank is None else rank)
        places.append(((latest, 1) if rank is None else (rank, 0), each.position))
    return {position: rank for rank, (_, position) in enumerate(sorted(places))}


# -- putting it together -------------------------------------------------------------------------------


def _timeline(
    video: Video, packets: list[_Packet], rank: dict[int, int] | None, lost: int, cut: str | None
) -> Timeline:
    tick = 1 / (video.rate * video.time_base)  # ticks per frame

    def at(index: int, packet: _Packet) -> int:
        time = packet.pts if packet.pts is not None else packet.dts
        return round(index * tick) if time is None else time - video.start

    timed = [(at(index, packet), packet) for index, packet in enumerate(packets)]
    if rank is None:
        timed.sort(key=lambda each: (each[0], each[1].position))
        ordered = [packet for _, packet in timed]
    else:
        ordered = sorted(packets, key=lambda packet: rank[packet.position])
    ticks: list[int] = []
    for time in sorted(time for time, _ in timed):
        # Two pictures at the same moment could not both be shown.
        ticks.append(max(time, ticks[-1] + 1) if ticks else time)
    keys = [Key(number, *packet[:3]) for number, packet in enumerate(ordered) if packet.key]
    end = ticks[-1] + (ordered[-1].duration or (ticks[-1] - ticks[-2] if len(ticks) > 1 else max(1, round(tick))))
    if ticks[-1] < video.end < end:  # an edit list cuts the last picture short
        end = video.end
    if len(ticks) > 1:  # headers are often far from it
        span = (ticks[-1] - ticks[0]) * video.time_base
        video = replace(video, rate=max(_SLOWEST, ((len(ticks) - 1) / span).limit_denominator(1001)))
    return Timeline(replace(video, end=end), ticks, [packet.position for packet in ordered], keys, lost, cut)


def _metadata(container: InputContainer, stream: VideoStream, picture: VideoFrame | None, **names: Any) -> Video:
    import av
    from av.format import Flags

    context = stream.codec_context
    time_base = _fraction(stream.time_base) or Fraction(1, av.time_base)
    start = 0
    if Flags(container.format.flags) & Flags.ts_discont and container.start_time is not None:
        start = round(Fraction(container.start_time, av.time_base) / time_base)
    seen = context if picture is None else picture
    matrix = _matrix(picture)
    width, height = seen.width, seen.height
    video = Video(
        **names,
        stream=stream.index,
        codec=context.name,
        time_base=time_base,
        start=start,
        rate=_fraction(stream.average_rate) or _fraction(stream.guessed_rate) or _UNKNOWN_RATE,
        width=width,
        height=height,
        matrix=matrix,
        aspect=_fraction(stream.sample_aspect_ratio) or _fraction(context.sample_aspect_ratio) or Fraction(1),
        colour=Colour(int(seen.color_range), int(seen.colorspace), int(seen.color_primaries), int(seen.color_trc)),
        end=(stream.start_time or 0) - start + (stream.duration or 0),
    )
    return replace(video, width=height, height=width) if video.turns % 2 else video


def _fraction(value: Any) -> Fraction | None:
    return Fraction(value.numerator, value.denominator) if value else None


def _matrix(picture: VideoFrame | None) -> tuple[int, ...]:
    from av.sidedata.sidedata import Type

    if picture is None:
        return ()
    side_data: list[Any] = list(picture.side_data)
    data = next((each for each in side_data if each.type == Type.DISPLAYMATRIX), None)
    if data is None:
        return ()
    numbers = memoryview(bytes(data)).cast("i").tolist()
    # A damaged matrix has no meaning, and players ignore it.
    unit = 1 << 16
    a, b, _, c, d = numbers[:5]
    return tuple(numbers) if max(map(abs, (a, b, c, d))) <= unit and a * d != b * c else ()


# -- in a process of its own ---------------------------------------------------------------------------


class Prober:
    """Probes videos in a process of its own, so that a file that crashes FFmpeg, or keeps it busy for ever, costs
    that file and not the job. For one thread; close it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, key: str, root: str, name: str) -> Timeline:
        """See :func:`probe`. Raises ItemError also if it takes too long or crashes."""
        store = open_store(root)
        size, mark = store.marked(name)
        if root.startswith("memory:"):  # which no other process sees
            return probe(key, root, name, (size, mark))
        seconds = PATIENCE_SECONDS + size / PATIENCE_BYTES_PER_SECOND
        waiting = seconds + (0 if store.is_local else STORAGE_SECONDS)
        if self._process is None:
            inherited = processes.environment()  # and this very Tally
            paths = [str(Path(__file__).parents[2]), inherited.get("PYTHONPATH", "")]
            self._process = subprocess.Popen(
                processes.command(__spec__.name),
                env={**inherited, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="ascii",
                start_new_session=True,  # Ctrl-C is for the coordinator
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(waiting, stop)
        timer.start()
        try:
            process.stdin.write(json.dumps([key, root, name, size, mark]) + "\n")
            process.stdin.flush()
            while (answer := process.stdout.readline()).startswith("+"):
                if int(answer) <= _MAX_REREADS * size:  # time for the network does not count
                    timer.cancel()
                    timer = threading.Timer(waiting, stop)
                    timer.start()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            code = process.wait()
            self.close()
            if late.is_set():
                raise ItemError(f"probing it took longer than {seconds:.0f} s", stage="read")
            raise ItemError(f"probing it crashed FFmpeg (exit code {code}): it is damaged", stage="read")
        store.check_mark(name, mark)  # was it one and the same all the time?
        found = json.loads(answer)
        if "error" in found:
            kind = next(each for each in _KINDS if each.__name__ == found["kind"])
            if issubclass(kind, StorageError):
                raise kind(found["error"], hint=found["hint"])
            raise ItemError(found["error"], stage="read", hint=found["hint"])
        return Timeline.from_json(found)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):  # it ended before it read a request
                    if pipe is not None:
                        pipe.close()


def _serve() -> None:
    """Answer each line of JSON by one, after lines such as ``+1048576``: the bytes read from a bucket so far."""
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    reported = 0

    def listen() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)  # the parent is gone, and FFmpeg may be busy for long

    def report(fetched: int) -> None:
        nonlocal reported
        if fetched < reported or fetched >= reported + _REPORT_BYTES:
            reported = fetched
            print(f"+{fetched}", flush=True)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        try:
            key, root, name, size, mark = json.loads(requests.get())
            reported = 0
            answer = probe(key, root, name, (size, mark), report).to_json()
        except TallyError as error:
            kind = next(each for each in _KINDS if isinstance(error, each))
            answer = {"error": error.message, "hint": error.hint, "kind": kind.__name__}
        except Exception as error:
            message = f"it cannot be probed: {type(error).__name__}: {error}"
            answer = {"error": message, "hint": None, "kind": TallyError.__name__}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
