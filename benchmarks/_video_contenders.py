"""The contenders of video.py, as somebody would write them without Tally: one command each.

    python _video_contenders.py (processes|simple|files) JOB.json

All do to a frame what Tally does: the same preprocessing and restoring, the same encoder with the same settings, the
sound copied. What they write lies beside OUT, and is left there to be counted. Like ``tally score`` they report
``done/total items`` now and then; the last line says ``saved``.
"""

from __future__ import annotations

import heapq
import json
import multiprocessing
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnxruntime
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from _contenders import Progress, cores
from tally.scorers.base import Item
from tally.scorers.vision.outputs import restore_image
from tally.scorers.vision.preprocess import Preprocess, Preprocessor

MP4 = {"movflags": "faststart"}


@dataclass(frozen=True)
class Job:
    """What is to be done, as video.py describes it.

    model, preprocess: an ONNX file, and how pictures become its tensors. size: of the frames. rate: of the clip, which
    is constant. codec, options: of the encoder. ffmpeg: the command. out: the video to write.
    """

    model: str
    preprocess: dict[str, Any]
    clip: str
    frames: int
    size: tuple[int, int]
    rate: str
    codec: str
    options: dict[str, str]
    ffmpeg: str | None
    out: str

    @property
    def beside(self) -> Path:
        """The folder for everything."""
        return Path(self.out).parent


class Model:
    """A picture in, a picture out, both uint8[height, width, 3]. threads: of ONNX Runtime; None: its own choice."""

    def __init__(self, job: Job, threads: int | None) -> None:
        self.prepare = Preprocessor(Preprocess(**job.preprocess))
        settings = onnxruntime.SessionOptions()
        if threads is not None:
            settings.intra_op_num_threads = settings.inter_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(job.model, settings, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def __call__(self, pixels: Any) -> Any:
        prepared = self.prepare(Item("", pixels, {}))
        (found,) = self.session.run(None, {self.input: prepared.tensor[None]})
        height, width = prepared.tensor.shape[1:] if self.prepare.nchw else prepared.tensor.shape[:2]
        return restore_image(self.prepare.pixels(found[0]), prepared, (width, height))


# -- the bare loop -------------------------------------------------------------------------------------


def pixels_of(frame: Any, size: tuple[int, int], threads: int | None) -> Any:
    width, height = size
    scaled = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC", threads=threads)
    return scaled.to_ndarray()


class Encoder:
    """Encodes pictures for a stream of ``container``. threads: None: FFmpeg's choice."""

    def __init__(self, container: Any, job: Job, threads: int | None) -> None:
        rate = Fraction(job.rate)
        self.stream = container.add_stream(job.codec, rate=rate, options=job.options)
        self.stream.width, self.stream.height = job.size
        self.stream.pix_fmt = "yuv420p"
        self.stream.codec_context.time_base = 1 / rate
        if threads is not None:
            self.stream.codec_context.thread_count = threads
        self.threads, self.reformatter = threads, VideoReformatter()

    def __call__(self, picture: Any, number: int) -> list[Any]:
        frame = self.reformatter.reformat(
            av.VideoFrame.from_ndarray(picture, "rgb24"),
            format="yuv420p",
            interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
            threads=self.threads,
        )
        frame.pts, frame.time_base = number, self.stream.codec_context.time_base
        return self.stream.encode(frame)

    def close(self) -> list[Any]:
        return self.stream.encode(None)


def simple(job: Job, progress: Progress) -> None:
    """One process and one loop; ONNX Runtime, decoder and encoder take as many threads as they like."""
    model = Model(job, None)
    with av.open(job.clip) as source, av.open(job.out, "w", options=MP4) as out:
        encode = Encoder(out, job, None)
        sound = source.streams.audio[:1]
        copied = [out.add_stream_from_template(each) for each in sound]
        number = 0
        for packet in source.demux(source.streams.video[0], *sound):
            if packet.stream.type == "audio":
                if packet.size:
                    packet.stream = copied[0]
                    out.mux(packet)
                continue
            for frame in packet.decode():
                out.mux(encode(model(pixels_of(frame, job.size, None)), number))
                number += 1
                progress(1)
        out.mux(encode.close())


def processes(job: Job, progress: Progress) -> None:
    """A process per core, one thread in each: every one turns a contiguous share of the frames into a segment."""
    with av.open(job.clip) as source:
        times = sorted(packet.pts for packet in source.demux(video=0) if packet.size)
    count = cores()
    cuts = [len(times) * part // count for part in range(count + 1)]
    paths = [job.beside / f"segment-{part}.mp4" for part in range(count)]
    finished: Any = multiprocessing.SimpleQueue()
    workers = [
        multiprocessing.Process(target=_reporting, args=(job, times[a:b], path, finished))
        for a, b, path in zip(cuts, cuts[1:], paths, strict=False)
    ]
    for worker in workers:
        worker.start()
    for _ in times:
        if (error := finished.get()) is not None:
            for worker in workers:
                worker.kill()
            sys.exit(error)
        progress(1)
    for worker in workers:
        worker.join()
    with av.open(job.clip) as source, av.open(job.out, "w", options=MP4) as out:
        segments = [av.open(str(path)).streams.video[0] for path in paths]
        begins = [cut / Fraction(job.rate) for cut in cuts]
        tracks = [_packets(zip(segments, begins, strict=False), out.add_stream_from_template(segments[0]))]
        if source.streams.audio:
            sound = source.streams.audio[0]
            tracks.append(_packets([(sound, Fraction(0))], out.add_stream_from_template(sound)))
        for _, packet in heapq.merge(*tracks, key=lambda each: each[0]):
            out.mux(packet)


def _reporting(job: Job, times: list[int], path: Path, finished: Any) -> None:
    try:
        _share(job, times, path, finished)
    except Exception:
        finished.put(traceback.format_exc())


def _share(job: Job, times: list[int], path: Path, finished: Any) -> None:
    """The frames that are shown at ``times``; the segment's own times begin at 0."""
    model = Model(job, 1)
    with av.open(job.clip) as source, av.open(str(path), "w") as out:
        stream = source.streams.video[0]
        stream.codec_context.thread_count = 1
        source.seek(times[0], stream=stream)
        encode = Encoder(out, job, 1)
        number = 0
        for frame in source.decode(stream):
            if frame.pts < times[0]:
                continue
            out.mux(encode(model(pixels_of(frame, job.size, 1)), number))
            number += 1
            finished.put(None)
            if number == len(times):
                break
        out.mux(encode.close())


def _packets(parts: Iterable[tuple[Any, Fraction]], stream: Any) -> Iterator[tuple[float, Any]]:
    """All packets of some streams, each of which begins at a second, for ``stream``; with the second of each packet."""
    for part, begin in parts:
        ahead = round(begin / part.time_base)
        for packet in part.container.demux(part):
            if packet.size:
                packet.pts, packet.dts = packet.pts + ahead, packet.dts + ahead
                packet.stream = stream
                yield float(packet.dts * packet.time_base), packet


# -- one JPEG per frame --------------------------------------------------------------------------------

_model: Model | None = None


def _open(job: Job, opened: Any) -> None:
    global _model
    _model = Model(job, 1)
    opened.release()


def _restyle(paths: tuple[str, str]) -> None:
    assert _model is not None
    with Image.open(paths[0]) as image:
        pixels = np.asarray(image.convert("RGB"))
    Image.fromarray(_model(pixels)).save(paths[1], quality=95)


def files(job: Job, progress: Progress) -> None:
    """ffmpeg splits the clip into files, a pool of processes turns each into another, ffmpeg stitches these.

    The models are open before the clock of the steady state runs; ffmpeg takes as many threads as it likes.
    """
    assert job.ffmpeg is not None
    given, found = job.beside / "frames", job.beside / "styled"
    given.mkdir()
    found.mkdir()
    opened = multiprocessing.Semaphore(0)
    with multiprocessing.Pool(cores(), _open, (job, opened)) as pool:
        for _ in range(cores()):
            opened.acquire()
        print(f"0/{job.frames:,} items at {time.time()}", flush=True)
        scale = "scale={}:{}:flags=bicubic".format(*job.size)
        _ffmpeg(job, "-i", job.clip, "-map", "0:v:0", "-vf", scale, "-qscale:v", "2", f"{given}/%06d.jpg")
        names = sorted(path.name for path in given.iterdir())
        pairs = [(str(given / name), str(found / name)) for name in names]
        for _ in pool.imap_unordered(_restyle, pairs):
            pass
    options = [part for name, value in job.options.items() for part in (f"-{name}", value)]
    streams = ["-map", "0:v:0", "-map", "1:a:0?", "-c:a", "copy", "-c:v", job.codec, *options, "-pix_fmt", "yuv420p"]
    inputs = ["-framerate", job.rate, "-i", f"{found}/%06d.jpg", "-i", job.clip]
    _ffmpeg(job, *inputs, *streams, "-movflags", "+faststart", job.out)
    progress(len(names))


def _ffmpeg(job: Job, *arguments: str) -> None:
    assert job.ffmpeg is not None
    subprocess.run([job.ffmpeg, "-nostdin", "-loglevel", "error", "-y", *arguments], check=True)


CONTENDERS: dict[str, Callable[[Job, Progress], None]] = {"processes": processes, "simple": simple, "files": files}


def main(name: str, described: str) -> None:
    facts = json.loads(Path(described).read_text())
    job = Job(**{**facts, "size": tuple(facts["size"])})
    CONTENDERS[name](job, Progress(job.frames))
    print("saved", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
