"""What the benchmarks share: the machine they ran on, runs side by side, and how figures are printed.

Contenders take turns (A B C, A B C ...), so that what disturbs the machine disturbs all of them. What counts is the
ratio of medians; absolute figures belong to one machine on one day. Nothing here passes or fails.
"""

from __future__ import annotations

import heapq
import os
import platform
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from tally.client import Client
from tally.engines.local import LocalEngine

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TALLY_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
TALLY = [sys.executable, "-m", "tally"]
"""The command, run by the Python that runs the benchmark."""

# Where it is set, each command compiles all of Tally first, which an installed one never does.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

_PACKAGES = ("numpy", "onnxruntime", "pillow", "av", "pyarrow", "sqlalchemy", "pebble", "ray", "celery", "redis")

Runs = dict[str, list[float]]
"""Contender to one figure per run."""


def cores() -> int:
    """Cores that this process may use."""
    return LocalEngine().default_slots()


def introduce(title: str, caveats: str) -> None:
    """Print what is measured, where, and what to keep in mind: paragraphs with an empty line between them."""
    memory = psutil.virtual_memory().total / 2**30
    busy = ", ".join(f"{load:.2f}" for load in os.getloadavg())
    print(title)
    print(f"  date      {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    print(f"  machine   {cores()} cores, {memory:.1f} GiB, {_processor()}, {platform.system()} {platform.release()}")
    print(f"  load      {busy} when it began (1, 5, 15 minutes)")
    _print("software", f"Python {platform.python_version()}, {', '.join(_versions())}")
    for caveat in caveats.strip().split("\n\n"):
        _print("caveat", caveat)
    print(flush=True)


def _print(name: str, text: str) -> None:
    indent = " " * 12
    print(textwrap.fill(" ".join(text.split()), 118, initial_indent=f"  {name:10}", subsequent_indent=indent))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _versions() -> Iterator[str]:
    for name in ("tally-scoring", *_PACKAGES):
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue


def take_turns(contenders: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int) -> dict[str, Runs]:
    """Run each contender once per round, in turns, each on a quiet machine; measure to contender to figures."""
    figures: dict[str, Runs] = {}
    for number in range(1, rounds + 1):
        for name, run in contenders.items():
            settle()
            for measure, figure in run().items():
                figures.setdefault(measure, {}).setdefault(name, []).append(figure)
        if sys.stderr.isatty():
            print(f"  round {number} of {rounds} is done", file=sys.stderr, flush=True)
    return figures


def settle() -> None:
    """Wait until the machine has nothing else to do, or for half a minute: also for what the last one left behind."""
    for _ in range(30):
        if psutil.cpu_percent(interval=1.0) < 15:
            return
    print("  the machine did not come to rest: this run is disturbed", flush=True)


def show(measure: str, runs: Runs, *, first: str, unit: str, digits: int = 2) -> None:
    """Print each contender's runs and median, and the ratios of the medians to that of ``first``."""
    width = max(map(len, runs))
    print(f"{measure} ({unit})")
    for name, figures in runs.items():
        each = "  ".join(f"{figure:,.{digits}f}" for figure in figures)
        print(f"  {name:{width}}  median {statistics.median(figures):,.{digits}f}   runs  {each}")
    median = statistics.median(runs[first])
    for name, figures in runs.items():
        if name != first:
            rounds = "  ".join(f"{a / b:.3f}" for a, b in zip(runs[first], figures, strict=True))
            ratio = median / statistics.median(figures)
            print(f"  ratio of medians, {first} / {name}: {ratio:.3f}   round by round  {rounds}")
    print(flush=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder."""
    with tempfile.TemporaryDirectory(prefix="tally-bench-") as folder:
        yield Path(folder)


def environment(home: Path) -> dict[str, str]:
    """The environment of a ``tally`` that keeps its state in ``home``."""
    return {**os.environ, "TALLY_HOME": str(home), "TALLY_DATABASE": "", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def served(env: dict[str, str]) -> Iterator[Client]:
    """A ``tally up``, and a client with its first key, which is ``TALLY_KEY`` of ``env`` from then on."""
    command = [*TALLY, "up", "--port", "0", "--root", "/"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"tly_\S+", line):
                    env["TALLY_KEY"] = found[0]
                if found := re.search(r"http://\S+", line):
                    with Client(found[0], key=env["TALLY_KEY"]) as client:
                        yield client
                    return
            raise SystemExit(f"the server ended with {process.wait()}")
        finally:
            process.terminate()


def finished(client: Client, every: float = 0.01, **job: Any) -> float:
    """Seconds from the request until the client sees the end of the job.

    every: seconds between two looks, each of which costs the server some milliseconds.
    """
    began = time.perf_counter()
    name = client.submit(**job).id
    while (state := client.get(name).state) != "finished":
        if state in ("failed", "cancelled"):
            sys.exit(f"a job of the server is {state}")
        time.sleep(every)
    return time.perf_counter() - began


def shapes_pictures(folder: Path, count: int) -> Path:
    """Generate pictures for the toy classifier ``tally:shapes``."""
    command = [*TALLY, "simulate", "pictures", "--out", folder, "--count", str(count)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


_PROGRESS = re.compile(r"([\d,]+)/([\d,]+) \w+(?: at ([\d.]+))?")
_FINISHED = re.compile(r"job \w+ finished: ")


def follow(command: list[str], env: dict[str, str], count: int) -> dict[str, float]:
    """Run a command that scores ``count`` items, noting when its lines of progress come.

    whole, steady: items per second. cpu: seconds. written: bytes, as Linux counts them. All processes are counted.
    """
    began = time.time()
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    seen: list[tuple[float, int]] = []
    said: list[str] = []
    saved = None
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now = time.time()
            said.append(line)
            if match := _PROGRESS.match(line):
                seen.append((float(match[3] or now), int(match[1].replace(",", ""))))
            if line == "saved\n" or _FINISHED.match(line):
                saved = now
    elapsed = (saved or time.time()) - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode or len(seen) < 2 or seen[-1][1] != count:
        sys.exit(f"{' '.join(command)} failed (exit code {process.returncode}):\n{''.join(said)}")
    (first, before), (last, done) = seen[0], seen[-1]
    return {
        "whole": count / elapsed,
        "steady": (done - before) / (last - first),
        "cpu": used.ru_utime + used.ru_stime - spent.ru_utime - spent.ru_stime,
        "written": 512.0 * (used.ru_oublock - spent.ru_oublock),
    }


# -- clips ---------------------------------------------------------------------------------------------


def drawn_clip(path: Path, size: str, seconds: float = 10) -> Path:
    """Draw a clip with sound, ``size`` as in 320x180, 25 frames per second."""
    command = [*TALLY, "simulate", "clip", "--out", path, "--seconds", str(seconds), "--size", size]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def repeat_clip(source: Path, target: Path, frames: int) -> int:
    """Write a clip that shows ``source`` again and again, with its sound, for ``frames`` frames; returns how many.

    Packets are copied, so this is quick. It is cut where no frame needs a later one: that may be a few frames earlier.
    """
    import av

    with av.open(str(source)) as given, av.open(str(target), "w", options={"movflags": "faststart"}) as out:
        stream = given.streams.video[0]
        pictures = [packet for packet in given.demux(stream) if packet.size]
        times = sorted(packet.pts for packet in pictures)
        period = times[-1] - times[0] + (times[-1] - times[0]) // (len(times) - 1)
        whole, rest = divmod(frames, len(pictures))
        while rest and max(packet.pts for packet in pictures[:rest]) != times[rest - 1]:
            rest -= 1
        count = whole * len(pictures) + rest
        tracks = [_repeat(pictures, period, count, out.add_stream_from_template(stream))]
        if given.streams.audio:
            seconds = count * period / len(pictures) * stream.time_base
            stream = given.streams.audio[0]
            given.seek(0)
            sound = [packet for packet in given.demux(stream) if packet.size]
            lasts = sum(packet.duration for packet in sound)
            end = int(seconds / stream.time_base / lasts * len(sound))
            tracks.append(_repeat(sound, lasts, end, out.add_stream_from_template(stream)))
        for _, packet in heapq.merge(*tracks, key=lambda each: each[0]):
            out.mux(packet)
    return count


def _repeat(packets: list[Any], period: int, count: int, stream: Any) -> Iterator[tuple[float, Any]]:
    """``count`` packets for the stream, with the second of each: those that there are, each time a period later."""
    times = [(packet.pts, packet.dts, packet.duration, packet.time_base) for packet in packets]
    for number in range(count):
        repetition, index = divmod(number, len(packets))
        packet, (pts, dts, duration, base) = packets[index], times[index]
        packet.stream, packet.time_base, packet.duration = stream, base, duration
        packet.pts, packet.dts = pts + repetition * period, dts + repetition * period
        yield float(packet.dts * base), packet


def colour_model(path: Path) -> Path:
    """Write a model that costs next to nothing: any picture, float32 0..255, in sepia by a 1x1 convolution."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    sepia = [[0.29, 0.57, 0.14], [0.26, 0.51, 0.13], [0.20, 0.40, 0.10]]
    weights = numpy_helper.from_array(np.array(sepia, np.float32)[:, :, None, None], "weights")
    given, found = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, "height", "width"]) for name in ("in", "out")
    )
    node = helper.make_node("Conv", ["in", "weights"], ["out"])
    graph = helper.make_graph([node], "colours", [given], [found], [weights])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), str(path))
    return path
