"""A clip restyled: Tally beside a bare loop, and beside the way of one JPEG file per frame.

    python benchmarks/video.py [--data DIR] [--rounds 5] [--part style|colour] [--frames N] [--size WxH]

Two parts: ``style`` runs a network that takes nearly all of the time, ``colour`` one that costs next to nothing, so
that decoding, encoding and files decide. Without the data, a drawn clip and the model ``tally:strokes`` are taken.
ffmpeg is no dependency of Tally; without it, that contender is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from _machine import (
    DATA,
    TALLY,
    colour_model,
    cores,
    drawn_clip,
    environment,
    follow,
    introduce,
    repeat_clip,
    scratch,
    show,
    take_turns,
)
from _video_contenders import Job
from tally import demo
from tally.jobs.facade import Jobs
from tally.media.video.encode import DEFAULTS, settings
from tally.models.load import create
from tally.models.resolve import resolve

HERE = Path(__file__).resolve().parent
CAVEATS = """
Every contender scores with the same preprocessing, encodes with the same encoder, quality and preset, and copies the
sound. The clip is a real one, its beginning or repeated by copying packets, and is in the page cache.

Only Tally commits its results while it runs, and could be killed and resumed at any moment.

processes: PyAV and ONNX Runtime in one process per core, one thread each; every process takes a contiguous share of the
frames and writes a segment; the segments' packets are joined at the end. Nobody waits for progress or commits.

simple: one process and one loop, as most people write it; ONNX Runtime, decoder and encoder start as many threads as
they like.

files: ffmpeg writes a JPEG per frame (-qscale:v 2), one process per core turns each into another (quality 95, the model
loaded once), ffmpeg makes the video of these. ffmpeg uses all cores.

"Whole process" is from the start of the command until the video is finished. "Steady state" is from the first line of
progress (after a tenth of the frames) to the last: no startup is in it, nor joining the segments; for files it is
everything from ffmpeg's first step to its last, with the models loaded before.

"Bytes written" are those of all processes as Linux counts them (pages made dirty), Tally's database included. "Peak" is
what lies on the disk at the end before anything is tidied up: frames or segments, and the video.
"""
CLIPS = {
    "style": "exo_sample_with_increasing_timestamps_320w_240h.mp4",
    "colour": "exo_sample_with_increasing_timestamps_360p.mp4",
}
SIZES = {"style": "320x240", "colour": "640x360"}
FRAMES = {"style": 240, "colour": 6000}
NAMES = ("tally", "processes", "simple", "files")
MEGA = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with video/plain and models/style")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=list(CLIPS), help="only this part")
    parser.add_argument("--frames", type=int, help=f"how many frames (default: {FRAMES})")
    parser.add_argument("--size", help="scale frames to WxH first (default: as they are)")
    parser.add_argument("--only", help="contenders to run beside tally, e.g. processes,files")
    given = parser.parse_args()
    for part in [given.part] if given.part else CLIPS:
        with scratch() as folder:
            measure(part, given, folder)


def measure(part: str, given: argparse.Namespace, folder: Path) -> None:
    clip, model = material(part, given.data, folder)
    frames = repeat_clip(clip, folder / "clip.mp4", given.frames or FRAMES[part])
    ref = resolve(model, task="restyle")
    scorer: Any = create(ref)
    chosen = settings(DEFAULTS["mp4"])
    assert chosen.scale is not None
    facts = look(folder / "clip.mp4")
    size = tuple(map(int, given.size.split("x"))) if given.size else facts["size"]
    described = Job(
        model=str(ref.location / ref.artifacts / scorer.options.file),
        preprocess=scorer.options.preprocess.model_dump(mode="json"),
        clip=str(folder / "clip.mp4"),
        frames=frames,
        size=size,
        rate=facts["rate"],
        codec=DEFAULTS["mp4"],
        options={**chosen.options, chosen.scale.option: f"{chosen.scale.default:g}"},
        ffmpeg=ffmpeg(),
        out="",
    )
    options = " ".join(f"{name} {value}" for name, value in described.options.items())
    introduce(
        f"video, {part}: {frames:,} frames of {clip.name} at {size[0]}x{size[1]} through {Path(described.model).name}, "
        f"{described.codec} {options}",
        CAVEATS,
    )
    # Tally's jobs and their segments are looked at below, too.
    os.environ.update(environment(folder / "home"), BENCH_CORES=str(cores()))
    subprocess.run([*TALLY, "jobs", "list"], check=True, capture_output=True)

    def contender(name: str) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            work = folder / "work"
            work.mkdir()
            job = replace(described, out=str(work / "out.mp4"))
            if name == "tally":
                command = [*TALLY, "score", job.clip, "--model", str(model), "--task", "restyle", "--out", job.out]
                command += ["--size", given.size] if given.size else []
            else:
                (folder / "job.json").write_text(json.dumps(asdict(job)))
                command = [sys.executable, str(HERE / "_video_contenders.py"), name, str(folder / "job.json")]
            figures = follow(command, dict(os.environ), frames)
            sizes = [path.stat().st_size for path in work.rglob("*") if path.is_file()]
            if name == "tally":  # its segments are removed already
                store = Jobs().store
                for output in store.outputs(store.newest(limit=1)[0].id):
                    sizes += [output.bytes / len(output.files)] * len(output.files)
            shutil.move(job.out, folder / f"{name}.mp4")
            shutil.rmtree(work)
            return figures | {"written": figures["written"] / MEGA, "peak": sum(sizes) / MEGA, "files": len(sizes)}

        return run

    wanted = ["tally", *given.only.split(",")] if given.only else NAMES
    contenders = {name: contender(name) for name in NAMES if name in wanted and (name != "files" or described.ffmpeg)}
    figures = take_turns(contenders, given.rounds)
    show("whole process", figures["whole"], first="tally", unit="frames/s")
    show("steady state", figures["steady"], first="tally", unit="frames/s")
    show("processor time of all processes, startup included", figures["cpu"], first="tally", unit="s")
    show("bytes written", figures["written"], first="tally", unit="MB")
    show("peak on the disk", figures["peak"], first="tally", unit="MB")
    show("files written", figures["files"], first="tally", unit="files", digits=0)
    compare(folder / "clip.mp4", {name: folder / f"{name}.mp4" for name in contenders})


def material(part: str, data: Path, folder: Path) -> tuple[Path, Path]:
    """A clip with sound, and the model."""
    clip, style = data / "video" / "plain" / CLIPS[part], data / "models" / "style" / "rain_princess_dyn.onnx"
    if not clip.is_file():
        print(f"no clip at {clip} (--data, or TALLY_TEST_DATA): a drawn one is taken")
        clip = drawn_clip(folder / "drawn.mp4", SIZES[part])
    if part == "colour":
        return clip, colour_model(folder / "colour.onnx")
    if not style.is_file():
        print(f"no model at {style}: tally:strokes is taken")
        style = demo.model("strokes")
    return clip, style


def ffmpeg() -> str | None:
    """The command: on the PATH, or of the package imageio-ffmpeg."""
    found = shutil.which("ffmpeg")
    if found is None and importlib.util.find_spec("imageio_ffmpeg") is not None:
        import imageio_ffmpeg

        found = imageio_ffmpeg.get_ffmpeg_exe()
    if found is None:
        print("files is left out: no ffmpeg here. To have it: apt-get install ffmpeg, or pip install imageio-ffmpeg")
        return None
    said = subprocess.run([found, "-version"], capture_output=True, text=True, check=True).stdout
    print(said.partition(" Copyright")[0])
    return found


# -- what came out -------------------------------------------------------------------------------------


def look(path: Path) -> dict[str, Any]:
    """Facts of a video: its frames, seconds and sound."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times, end, sound = [], 0, hashlib.sha256()
        for packet in container.demux(stream, *container.streams.audio[:1]):
            if packet.size and packet.stream.type == "audio":
                sound.update(bytes(packet))
            elif packet.size:
                times.append(packet.pts)
                end = max(end, packet.pts + (packet.duration or 0))
        return {
            "size": (stream.width, stream.height),
            "rate": str(stream.average_rate),
            "frames": len(times),
            "seconds": float((end - min(times)) * stream.time_base),
            "sound": sound.hexdigest(),
        }


def compare(clip: Path, videos: dict[str, Path]) -> None:
    """Print what the contenders made, of the last round, and how alike their pictures are."""
    source = look(clip)
    print(f"source: {source['frames']:,} frames, {source['seconds']:.3f} s")
    for name, path in videos.items():
        found = look(path)
        sound = "the source's packets" if found["sound"] == source["sound"] else "NOT the source's packets"
        print(
            f"  {name:10} {found['frames']:,} frames, {found['seconds']:.3f} s, sound: {sound}, "
            f"{path.stat().st_size / MEGA:.2f} MB"
        )
    print("PSNR of the pictures (RGB)")
    for one, other in combinations(videos, 2):
        values = list(psnr(videos[one], videos[other]))
        finite = [value for value in values if value < math.inf] or [math.inf]
        print(
            f"  {one} and {other}: mean {statistics.fmean(finite):.2f} dB, lowest {min(finite):.2f} dB, "
            f"{len(values) - len(finite):,} of {len(values):,} frames identical"
        )
    print(flush=True)


def psnr(one: Path, other: Path) -> Iterable[float]:
    """Peak signal-to-noise ratio of each pair of frames, in dB; infinite where they are identical, 0 without a pair."""
    for first, second in zip_longest(pictures(one), pictures(other)):
        if first is None or second is None:
            yield 0.0
            continue
        error = float(np.square(first.astype(np.int32) - second).mean())
        yield math.inf if error == 0 else 10 * math.log10(255**2 / error)


def pictures(path: Path) -> Iterable[Any]:
    import av

    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


if __name__ == "__main__":
    main()
