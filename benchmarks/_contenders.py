"""The contenders of photos.py, as somebody would write them without Tally: one command each.

    python _contenders.py (bare|ray|celery) MODEL.json PHOTOS OUT.parquet

All read, decode, preprocess and score in the same way, with one ONNX Runtime thread in as many processes as there
are cores, in batches of the same size. They keep the results in memory and write one Parquet file at the end. Like
``tally score`` they report ``done/total items`` now and then; the last line says ``saved``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from tally.media.images import decode
from tally.scorers.base import Item
from tally.scorers.vision.outputs import probabilities
from tally.scorers.vision.preprocess import Preprocess, Preprocessor

AT_ONCE = 2
"""So many pictures of 224x224 the model is given at once, as by Tally: a processor is slower with more."""
REDIS = "redis://127.0.0.1:6379/9"

Rows = list[tuple[str, int, float]]
"""Name of the photo, index of the best class, its probability."""


class Model:
    """The model, and all that is done to one batch of photos."""

    def __init__(self, described: dict[str, Any]) -> None:
        preprocess = Preprocess(**described["preprocess"])
        self.prepare = Preprocessor(preprocess)
        self.size = None if described["size"] is None else tuple(described["size"])
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(described["file"], settings, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def __call__(self, paths: Sequence[str]) -> Rows:
        tensors = []
        for path in paths:
            pixels, info = decode(Path(path).read_bytes(), self.size)
            tensors.append(self.prepare(Item(path, pixels, info)).tensor)
        rows = []
        for at in range(0, len(paths), AT_ONCE):
            (scores,) = self.session.run(None, {self.input: np.stack(tensors[at : at + AT_ONCE])})
            for path, each in zip(paths[at:], scores, strict=False):
                values = probabilities(each, softmax=False)
                best = int(values.argmax())
                rows.append((Path(path).name, best, float(values[best])))
        return rows


class Progress:
    """Prints a line at each tenth, as ``tally score`` does, with the time at which it was reached."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.tenth = total, 0, 0

    def __call__(self, count: int, at: float | None = None) -> None:
        self.done += count
        tenth = 10 * self.done // self.total
        if tenth > self.tenth:
            self.tenth = tenth
            print(f"{self.done:,}/{self.total:,} items at {at or time.time()}", flush=True)


def cores() -> int:
    """As many processes as photos.py says."""
    return int(os.environ["BENCH_CORES"])


# -- a bare loop -----------------------------------------------------------------------------------

_model: Model | None = None


def _open(described: dict[str, Any]) -> None:
    global _model
    _model = Model(described)


def _score(paths: Sequence[str]) -> Rows:
    assert _model is not None
    return _model(paths)


def bare(described: dict[str, Any], batches: list[list[str]], progress: Progress) -> Rows:
    """A pool of processes that take the next batch whenever they are free."""
    rows: Rows = []
    with multiprocessing.Pool(cores(), _open, (described,)) as pool:
        for scored in pool.imap_unordered(_score, batches):
            rows += scored
            progress(len(scored))
    return rows


# -- Ray Data --------------------------------------------------------------------------------------


def ray_answer(rows: Rows) -> dict[str, Any]:
    """What an actor gives back of one batch."""
    names, indices, scores = zip(*rows, strict=True)
    return {
        "name": np.array(names),
        "index": np.array(indices),
        "score": np.array(scores),
        "at": np.full(len(rows), time.time()),
    }


def scored_by_ray(dataset: Any, actor: type, described: dict[str, Any], progress: Progress) -> Rows:
    """``map_batches`` with one actor per core, which is made with what is known of the model."""
    import ray as r

    scored = dataset.map_batches(
        actor,
        fn_constructor_args=(described,),
        batch_size=described["batch_size"],
        num_cpus=1,
        compute=r.data.ActorPoolStrategy(size=cores()),
    )
    rows: Rows = []
    finished: list[tuple[float, int]] = []
    for batch in scored.iter_batches(batch_size=None):
        rows += zip(batch["name"].tolist(), batch["index"].tolist(), batch["score"].tolist(), strict=True)
        at, counts = np.unique(batch["at"], return_counts=True)
        finished += zip(at.tolist(), counts.tolist(), strict=True)
    # Ray hands batches over later than they are done, several at once: what counts is when the actor was done.
    for moment, count in sorted(finished):
        progress(count, moment)
    return rows


class _RayModel(Model):
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        return ray_answer(super().__call__([str(path) for path in batch["path"]]))


def ray(described: dict[str, Any], batches: list[list[str]], progress: Progress) -> Rows:
    """One block for each batch, so that they arrive as they are done."""
    import ray as r

    r.init(num_cpus=cores(), include_dashboard=False, log_to_driver=False, logging_level="error")
    r.data.DataContext.get_current().enable_progress_bars = False
    paths = [path for batch in batches for path in batch]
    dataset = r.data.from_items([{"path": path} for path in paths], override_num_blocks=len(batches))
    return scored_by_ray(dataset, _RayModel, described, progress)


# -- Celery and Redis ------------------------------------------------------------------------------


def celery(described: dict[str, Any], batches: list[list[str]], progress: Progress) -> Rows:
    """One prefork worker with a process per core, one task for each batch, results through Redis."""
    from celery import group

    from _celery_app import app, score

    command = [sys.executable, "-m", "celery", "-A", "_celery_app", "worker", "--pool", "prefork", "-O", "fair"]
    command += ["--concurrency", str(cores()), "--prefetch-multiplier", "1", "--loglevel", "ERROR"]
    command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    app.backend.client.flushdb()
    worker = subprocess.Popen(
        command,
        cwd=Path(__file__).parent,
        env={**os.environ, "BENCH_MODEL": json.dumps(described), "C_FORCE_ROOT": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        rows: Rows = []
        waiting = group(score.s(batch) for batch in batches).apply_async()
        for _, outcome in waiting.iter_native():
            if outcome["status"] != "SUCCESS":
                raise RuntimeError(str(outcome["result"]))
            rows += map(tuple, outcome["result"])
            progress(len(outcome["result"]))
        return rows
    finally:
        worker.terminate()
        worker.wait()
        app.backend.client.flushdb()


CONTENDERS: dict[str, Callable[[dict[str, Any], list[list[str]], Progress], Rows]] = {
    "bare": bare,
    "ray": ray,
    "celery": celery,
}


def main(name: str, model: str, photos: str, out: str) -> None:
    described = json.loads(Path(model).read_text())
    paths = sorted(str(path) for path in Path(photos).iterdir())
    size = described["batch_size"]
    batches = [paths[start : start + size] for start in range(0, len(paths), size)]
    save(CONTENDERS[name](described, batches, Progress(len(paths))), out)
    print("saved", flush=True)


def save(rows: Iterable[tuple[str, int, float]], out: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, indices, scores = zip(*sorted(rows), strict=True)
    pq.write_table(pa.table({"key": names, "index": indices, "score": scores}), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
