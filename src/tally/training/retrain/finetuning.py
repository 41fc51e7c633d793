"""Fine-tune a whole network of PyTorch: every weight of it, not the last layer alone, by one worker or several at once.

The workers are those of an engine, a process each, and all of them are there from the first step to the last. One that
is lost ends the training, and the others with it; it goes on from the checkpoint that was written last.
"""

from __future__ import annotations

import queue
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tally.engines.base import Limits, Reports
from tally.engines.factory import make_engine
from tally.errors import (
    ItemError,
    ModelError,
    RunError,
    SpecError,
    TallyError,
    WorkerError,
    WorkerStoppedError,
    error_line,
)
from tally.jobs.stop import Stop
from tally.media.images import decode
from tally.models.hashing import known_hash
from tally.models.resolve import resolve
from tally.scorers.torch.network import library
from tally.scorers.vision.preprocess import Preprocess, Preprocessor
from tally.training.retrain.bottlenecks import Backbone, Bottlenecks
from tally.training.retrain.dataset import Dataset, regular
from tally.training.retrain.distortions import Distortions
from tally.training.retrain.examples import Examples, Indices, Parameters
from tally.training.retrain.finetuning_worker import Begun, Ended, Measured, Plan, set_up, work
from tally.training.retrain.head import KEEP_SECONDS, Evaluation, Trained

BACKLOG = 100
STOP_SECONDS = 60.0
"""How long a step may take to end once the training is asked to stop."""
WORD_SECONDS = 5.0
"""How long what ended one worker may take to be known, after it has ended the others, too."""
_LOOK_SECONDS = 0.1
_THREADS = 8

Report = Callable[[int, Mapping[str, float]], bool | None]


def check(backbone: Backbone, parameters: Parameters, workers: int | None, device: str, engine: str = "local") -> int:
    """The number of workers. Raises SpecError with what makes fine-tuning impossible."""
    if backbone.network is None:
        raise SpecError(
            f"--fine-tune: trains networks of PyTorch; {backbone.name} is of ONNX, and gets a new last layer alone",
            hint="Give the network as PyTorch has it: an exported program (.pt2), or its weights with "
            "--set module=file.py:Class.",
        )
    torch = library()
    gpus = torch.cuda.device_count() if device.startswith("cuda") or device == "auto" else 0
    problems = []
    if engine != "local":
        problems.append(f"--engine: the workers of --fine-tune are on this machine, not on {engine}")
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not number.isdigit()):
        problems.append(f"--device: networks of PyTorch are trained on auto, cpu or cuda[:N], not {device}")
    elif kind == "cuda" and int(number or 0) >= gpus:
        problems.append(f"--device: {device} was asked for, and PyTorch {torch.__version__} finds {gpus} GPUs here")
    found = workers or (1 if number else max(1, gpus))
    if gpus and found > (1 if number else gpus):
        there = f"{device} is one" if number else f"there are {gpus}"
        problems.append(f"--workers: each of {found} trains on a GPU of its own, and {there}; --device cpu uses none")
    if 0 < parameters.train_batch_size < found:
        problems.append(
            f"--workers: {found} share the {parameters.train_batch_size} pictures of a step: too few for all"
        )
    if problems:
        raise SpecError(problems)
    return found


def look(dataset: Dataset, backbone: Backbone) -> tuple[Dataset, Bottlenecks]:
    """Open every picture once: those that cannot be read are left out.

    Returns the data set without them, and the pictures' hashes; there are no bottlenecks yet: ``float32[pictures, 0]``.
    Raises SpecError: see :meth:`~tally.training.retrain.dataset.Dataset.without`.
    """
    size = _decoded(backbone)

    def hashed(path: Path) -> str | ItemError:
        try:
            decode(regular(path).read_bytes(), size)
            return known_hash(path).hex()
        except OSError as error:
            return ItemError(error.strerror or str(error), stage="read")
        except ItemError as error:
            return error

    paths = [each.path for each in dataset.pictures]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(paths, pool.map(hashed, paths), strict=True))
    unreadable = {path: each.message for path, each in found.items() if isinstance(each, ItemError)}
    if len(unreadable) == len(paths):
        path, reason = next(iter(unreadable.items()))
        raise SpecError(f"--image_dir: none of {len(paths):,} pictures can be read; {path.name}: {reason}")
    left = dataset.without(unreadable)
    hashes = tuple(str(found[each.path]) for each in left.pictures)
    return left, Bottlenecks(np.empty((len(hashes), 0), np.float32), hashes)


def _decoded(backbone: Backbone) -> tuple[int, int] | None:
    """The size that JPEGs are decoded for, as where the model scores."""
    spec = Preprocess.model_validate(backbone.ref.options["preprocess"])
    if spec.resize == "crop" and spec.size:
        shorter = Preprocessor(spec).shorter
        return (shorter, shorter)
    return spec.size


def fine_tune(
    dataset: Dataset,
    examples: Examples,
    backbone: Backbone,
    parameters: Parameters,
    distortions: Distortions,
    report: Report,
    *,
    folder: Path,
    checkpoint: Path,
    wanted: Indices,
    workers: int,
    device: str = "auto",
    observe: Callable[[Evaluation], None] = lambda evaluation: None,
    measured: Callable[[Sequence[Measured]], None] = lambda found: None,
    say: Callable[[str], None] = lambda line: None,
    stop: Stop | None = None,
) -> tuple[Trained, Examples, Backbone]:
    """Train, from the checkpoint on where there is one.

    examples: features do not matter. folder: where the trained network is written to, as ``NAME.onnx``.
    wanted: pictures whose features are looked up at the end, ``int64[n]``.
    workers: as :func:`check` said. report, observe: as of :func:`tally.training.retrain.head.train`.
    measured: is told all that was measured before the checkpoint: who was killed may not have heard of it.

    Returns the last layer, the examples with the trained network's features of the pictures that are wanted (zeros for
    the others), and the trained network as a backbone; where it was stopped, the examples and the backbone as given.
    Raises ModelError, ItemError, SpecError; RunError if a worker was lost.
    """
    assert backbone.network is not None
    stop = stop or Stop()
    folder.mkdir(parents=True, exist_ok=True)
    exported = folder / f"{Path(backbone.ref.entry).stem}.onnx"
    plan = Plan(
        network=backbone.network,
        spec=Preprocess.model_validate(backbone.ref.options["preprocess"]),
        size=_decoded(backbone),
        paths=tuple(each.path for each in dataset.pictures),
        examples=examples,
        parameters=parameters,
        distortions=distortions,
        device=device,
        checkpoint=checkpoint,
        keep_seconds=KEEP_SECONDS,
        exported=exported,
        wanted=wanted,
    )
    heard: queue.SimpleQueue[Begun | Evaluation] = queue.SimpleQueue()

    def tell(found: Begun | Evaluation) -> None:
        if isinstance(found, Begun):
            if found.done:
                say(f"continued from step {found.done}")
                measured(found.measured)
            where = "a GPU each" if found.device != "cpu" and workers > 1 else found.device
            by = "1 worker" if workers == 1 else f"{workers} workers"
            say(f"{found.weights:,} weights of {backbone.name} and its new last layer are trained by {by}, on {where}")
            return
        observe(found)
        if report(found.step, found.metrics):
            ask()

    def ask() -> None:
        for each in futures:
            engine.stop_task(each, seconds=STOP_SECONDS)

    engine = make_engine("local")
    with tempfile.TemporaryDirectory(prefix="tally-") as met:
        try:
            engine.start(set_up, (plan,), slots=workers, limits=Limits(memory=engine.default_memory(workers)))
            futures = [
                engine.submit(
                    work, rank, workers, str(Path(met) / "meeting"),
                    reports=Reports(heard.put, BACKLOG) if rank == 0 else None,
                )
                for rank in range(workers)
            ]  # fmt: skip
            asked = False
            while not all(each.done() for each in futures) and not any(_failed(each) for each in futures):
                try:
                    tell(heard.get(timeout=_LOOK_SECONDS))
                except queue.Empty:
                    pass
                if stop.asked and not asked:
                    asked = True
                    ask()
            while not heard.empty():
                tell(heard.get())
            ended = _outcome(futures)
            engine.stop()
        finally:
            engine.stop(kill=True)
    if ended.features is None:
        return ended.trained, examples, backbone
    features = np.zeros((len(examples.labels), ended.features.shape[1]), np.float32)
    features[wanted] = ended.features
    ref = resolve(str(exported), task="embed", settings=dict(backbone.settings))
    return ended.trained, replace(examples, features=features), replace(backbone, ref=ref, model=str(exported))


def _failed(future: Future[Any]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)


def _outcome(futures: list[Future[Ended | None]]) -> Ended:
    """What the first worker returned. Raises why the training ended: one worker's reason, which is not that of those
    that lost it."""
    if any(map(_failed, futures)):
        wait(futures, WORD_SECONDS)
    errors = [each.exception() for each in futures if _failed(each) and not each.cancelled()]
    if any(isinstance(each, WorkerStoppedError) for each in errors):
        raise KeyboardInterrupt("stopped in the middle of a step")
    lost = next((each for each in errors if isinstance(each, WorkerError)), None)
    ours = next((each for each in errors if isinstance(each, TallyError)), None)
    for each in (lost, ours, *errors):
        if isinstance(each, WorkerError):
            raise RunError(
                f"a worker of the training was lost, and the others ended with it: {each.message}",
                hint="What it had done is kept, up to the last checkpoint: go on with --resume.",
            ) from each
        if isinstance(each, TallyError):
            raise each
        if each is not None:
            raise ModelError(f"the network cannot be trained: {error_line(each)}") from each
    ended = futures[0].result(timeout=0)
    assert ended is not None
    return ended
