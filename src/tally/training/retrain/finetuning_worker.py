"""Fine-tuning on a worker: one of several that train the same network, each with its share of every step's pictures.

All of them have the same weights at every step. Each works out the gradient of its share; the sum over all is that of
the whole step's mean loss, and all take the same step with it. So what is trained does not depend on how many they are,
but for the order in which floating-point numbers are added.

The network is in inference mode: batch normalisation goes by the statistics that it has, and nothing is dropped. What
it makes of a picture then depends on that picture alone, however the pictures are shared out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np

from tally.engines import task
from tally.errors import ItemError, ModelError
from tally.media.images import decode
from tally.models.reference import ModelRef
from tally.scorers.base import Item
from tally.scorers.torch.network import Network, library, open_network, quietly
from tally.scorers.vision.preprocess import Array, Preprocess, Preprocessor
from tally.storage.publish import write_whole
from tally.training.retrain.distortions import PURPOSE, Distortions
from tally.training.retrain.examples import Examples, Indices, Matrix, Parameters
from tally.training.retrain.exported import features_of, write_onnx
from tally.training.retrain.head import (
    Batch,
    Evaluation,
    Head,
    State,
    Trained,
    first_head,
    has_waited,
    packed,
    unpacked,
)
from tally.training.retrain.sampling import Sampler

AT_ONCE, AT_ONCE_ON_GPU = 8, 64
"""Pictures that go through the network together. The gradient of a step is added up over them, so that a step may have
any number of pictures in the same memory. On a CPU, a MobileNet takes two to four times as long for 32 at once: memory
for their activations is taken from the system, and given back, each time."""
AHEAD = 4
"""So many times as many pictures are decoded ahead."""
KEPT_BYTES = 512 << 20
"""Decoded pictures that a worker keeps for later steps."""
_RARELY = 20.0
"""A checkpoint is written after so many times as long as writing one takes."""
_NETWORK, _BEST = "network/", "best_network/"
"""What the names of the network's weights begin with in a checkpoint, and of those with the lowest validation loss."""
_MEASURED = "measured"
"""The name in a checkpoint of all that was measured before it, as JSON."""

Measured: TypeAlias = tuple[int, float, dict[str, float]]
"""A step, when it was measured (seconds since the epoch), and its metrics."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What all workers know.

    network: of PyTorch. spec: how pictures are prepared. paths: of the pictures, in the examples' order. checkpoint:
    begun from, if it is there, and written every ``keep_seconds``, at most. exported: what the trained network is
    written to, as ONNX.
    wanted: the pictures whose features are told at the end.
    """

    network: ModelRef
    spec: Preprocess
    size: tuple[int, int] | None
    paths: tuple[Path, ...]
    examples: Examples
    parameters: Parameters
    distortions: Distortions
    device: str
    checkpoint: Path
    keep_seconds: float
    exported: Path
    wanted: Indices


@dataclass(frozen=True, slots=True)
class Ended:
    """features: of the pictures that were wanted, ``float32[n, features]``; None if it was stopped before its end."""

    trained: Trained
    features: Matrix | None


@dataclass(frozen=True, slots=True)
class Begun:
    """The first report. done: steps that were done before. weights: numbers that are trained. device: for the user.
    measured: in the steps that were done before."""

    done: int
    weights: int
    device: str
    measured: tuple[Measured, ...] = ()


def set_up(plan: Plan) -> Plan:
    """Each worker begins with it."""
    # Workers of one machine talk to each other there, whatever networks it is in.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA adds up differently each time without it
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait take the core from those that do not
    return plan


def work(plan: Plan, rank: int, workers: int, meeting: str) -> Ended | None:
    """Train, as worker ``rank`` of ``workers``, and tell of it as the first of them does: with reports, Begun and then
    an :class:`Evaluation` at a time, and with what it returns. The others return None.

    meeting: a file that is not there yet, by which workers find each other.
    Raises ModelError if the loss is not finite, ItemError for a picture that cannot be read any more.
    """
    torch = library()
    with quietly():
        torch.use_deterministic_algorithms(True, warn_only=True)
        team = Team(torch, rank, workers, meeting, plan.device)
        try:
            with Pictures(plan) as pictures:
                return _Training(torch, plan, team, pictures).run()
        finally:
            team.close()


def place_of(torch: Any, device: str, rank: int) -> str:
    """The device of a worker, as PyTorch names it: each has a GPU of its own."""
    if device == "auto":
        return f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    return f"cuda:{rank}" if device == "cuda" else device


class Team:
    """The workers of one training. Without others, nothing is sent."""

    def __init__(self, torch: Any, rank: int, workers: int, meeting: str, device: str) -> None:
        self.rank, self.workers, self.device = rank, workers, place_of(torch, device, rank)
        self._group: Any = None
        if self.device != "cpu":
            torch.cuda.set_device(self.device)
        if workers > 1:
            self._group = torch.distributed
            self._group.init_process_group(
                "gloo" if self.device == "cpu" else "nccl",
                init_method=f"file://{meeting}",
                rank=rank,
                world_size=workers,
            )

    def share(self, count: int) -> range:
        """Which of ``count`` pictures are this worker's."""
        return range(count * self.rank // self.workers, count * (self.rank + 1) // self.workers)

    def add_up(self, tensor: Any) -> None:
        """Have the tensor hold the sum of all workers', in each of them the same."""
        if self._group is not None:
            self._group.all_reduce(tensor)

    def close(self) -> None:
        if self._group is not None:
            self._group.destroy_process_group()


@dataclass(frozen=True, slots=True)
class _Piece:
    """Pictures that go through the network together: places ``start`` to ``stop`` of ``rows``. step: they are distorted
    as for this one; None: they are as they are."""

    rows: Indices
    start: int
    stop: int
    step: int | None = None


class Pictures:
    """Prepares pictures for the network, in threads, ahead of it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._prepare = Preprocessor(plan.spec)
        # Distorted pictures have the model's size already.
        self._prepare_distorted = Preprocessor(plan.spec.model_copy(update={"resize": "squash", "shorter": None}))
        self._kept: dict[int, Array] = {}
        self._bytes = 0
        self._pool = ThreadPoolExecutor(max(2, library().get_num_threads()), "tally-pictures")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def ahead(self, pieces: Iterator[_Piece]) -> Iterator[tuple[_Piece, Array]]:
        """Each piece with its pictures, ``float32[n, channels, height, width]``."""
        waiting: deque[tuple[_Piece, list[Future[Array]]]] = deque()
        while True:
            while len(waiting) < AHEAD and (piece := next(pieces, None)) is not None:
                places = range(piece.start, piece.stop)
                found = [self._pool.submit(self._picture, int(piece.rows[each]), piece.step, each) for each in places]
                waiting.append((piece, found))
            if not waiting:
                return
            piece, found = waiting.popleft()
            yield piece, np.stack([each.result() for each in found])

    def _picture(self, row: int, step: int | None, place: int) -> Array:
        kept = self._kept.get(row) if step is None else None
        if kept is not None:
            return kept
        plan, path = self._plan, self._plan.paths[row]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ItemError(f"{path} cannot be read any more: {error.strerror}", stage="read") from None
        if step is not None:
            rng = np.random.default_rng([plan.parameters.seed, PURPOSE, step, place])
            distorted = plan.distortions.apply(content, plan.spec, rng)
            return self._prepare_distorted(Item(str(path), distorted)).tensor
        pixels, info = decode(content, plan.size)
        found = self._prepare(Item(str(path), pixels, info)).tensor
        if self._bytes < KEPT_BYTES:
            self._kept[row] = found
            self._bytes += found.nbytes
        return found


class _Training:
    def __init__(self, torch: Any, plan: Plan, team: Team, pictures: Pictures) -> None:
        self._torch, self._plan, self._team, self._pictures = torch, plan, team, pictures
        parameters, examples = plan.parameters, plan.examples
        self._network: Network = open_network(plan.network, team.device)
        names = self._network.module.named_parameters()
        self._weights: dict[str, Any] = {name: each for name, each in names if each.is_floating_point()}
        arrays = unpacked(plan.checkpoint) if plan.checkpoint.exists() else None
        if arrays is not None:
            self._state = State.from_arrays(arrays, plan.checkpoint)
            self._put(_named(arrays, _NETWORK))
        else:
            self._state = State(0, first_head(self._width(), examples.classes, parameters.seed))
        self._best = _named(arrays or {}, _BEST)
        self._measured = _measured(arrays or {})
        self._layer = [
            torch.from_numpy(each.copy()).to(team.device)
            for each in (self._state.head.weights, self._state.head.biases)
        ]
        self._trained = [*self._weights.values(), *self._layer]
        for each in self._trained:
            each.requires_grad_(True)
        self._labels = torch.from_numpy(examples.labels).to(team.device)
        self._at_once = self._network.dims[0] or (AT_ONCE if team.device == "cpu" else AT_ONCE_ON_GPU)
        self._rows = _rows_of(examples, "training", parameters.train_batch_size, parameters)
        self._validation = None
        validating = examples.parts["validation"]
        if len(validating):
            size = parameters.validation_batch_size
            self._validation = _rows_of(examples, "validation", size if size < len(validating) else -1, parameters)
        self._written, self._took = time.monotonic(), 0.0

    def run(self) -> Ended | None:
        first = self._team.rank == 0
        if first:
            weights = sum(each.numel() for each in self._trained)
            task.report(Begun(self._state.done, weights, self._team.device, tuple(self._measured)))
        trained = self._train()
        if first:
            self._write()
        if trained.stopped:
            return Ended(trained, None) if first else None
        if self._state.best is not None:
            self._put(self._best)
        features = self._features(self._plan.wanted)
        if first:
            shape = tuple(int(each) for each in self._one_picture().shape[1:])
            write_onnx(self._network, (shape[0], shape[1], shape[2]), self._plan.exported)
        return Ended(trained, features) if first else None

    # -- steps -------------------------------------------------------------------------------------------------

    def _train(self) -> Trained:
        parameters, state = self._plan.parameters, self._state
        steps, every, patience = (
            parameters.how_many_training_steps, parameters.eval_step_interval, parameters.early_stopping
        )  # fmt: skip
        evaluation: Evaluation | None = None
        stopped, early = False, 0 < patience <= state.waited  # it had ended, and was killed after that
        coming = self._pictures.ahead(self._pieces(state.done, state.done if early else steps))
        for step in range(state.done, state.done if early else steps):
            rows = self._rows(step)
            asked = self._step(rows, coming)
            state.done = step + 1
            if step % every == 0 or step == steps - 1:
                evaluation = self._evaluate(step, rows)
                if self._team.rank == 0:
                    self._measured.append((step, time.time(), evaluation.metrics))
                    task.report(evaluation)
                if patience and evaluation.validation is not None:
                    state.head = evaluation.head
                    early = has_waited(state, evaluation, patience)
                    if state.best_step == step:
                        self._best = self._arrays()
            stopped = asked and state.done < steps and not early
            if stopped or early:
                break
            seconds = max(self._plan.keep_seconds, _RARELY * self._took)
            if self._team.rank == 0 and time.monotonic() - self._written >= seconds:
                self._write()
        state.head = self._head()
        head, step = (state.head, state.done - 1) if state.best is None else (state.best, state.best_step)
        return Trained(head, step, state, evaluation, stopped, early)

    def _pieces(self, begin: int, end: int) -> Iterator[_Piece]:
        """This worker's share of each step."""
        for step in range(begin, end):
            rows = self._rows(step)
            yield from self._in_pieces(rows, self._distorting(step))

    def _in_pieces(self, rows: Indices, step: int | None) -> Iterator[_Piece]:
        share = self._team.share(len(rows))
        for start in range(share.start, share.stop, self._at_once):
            yield _Piece(rows, start, min(start + self._at_once, share.stop), step)

    def _distorting(self, step: int) -> int | None:
        return step if self._plan.distortions else None

    def _step(self, rows: Indices, coming: Iterator[tuple[_Piece, Array]]) -> bool:
        """One step of gradient descent. Returns whether any worker is asked to stop, which all learn together."""
        torch, share = self._torch, self._team.share(len(rows))
        for piece, pictures in coming if share else ():
            labels = self._labels[torch.from_numpy(piece.rows[piece.start : piece.stop]).to(self._team.device)]
            losses = torch.nn.functional.cross_entropy(self._logits(pictures), labels, reduction="sum")
            (losses / len(rows)).backward()
            if piece.stop == share.stop:
                break
        asked = torch.full((1,), float(task.stopping()), device=self._team.device)
        slopes = [(torch.zeros_like(each) if each.grad is None else each.grad).flatten() for each in self._trained]
        together = torch.cat([*slopes, asked])
        self._team.add_up(together)
        ends = np.cumsum([0, *(each.numel() for each in self._trained)]).tolist()
        with torch.no_grad():
            for each, (begin, end) in zip(self._trained, pairwise(ends), strict=True):
                each -= self._plan.parameters.learning_rate * together[begin:end].view_as(each)
                each.grad = None
        return bool(together[-1] > 0)

    def _logits(self, pictures: Array) -> Any:
        weights, biases = self._layer
        return self._passed(pictures) @ weights + biases

    def _passed(self, pictures: Array) -> Any:
        return features_of(self._network, self._torch.from_numpy(pictures).to(self._team.device))

    # -- looking -----------------------------------------------------------------------------------------------

    def _evaluate(self, step: int, rows: Indices) -> Evaluation:
        """As :func:`tally.training.retrain.head.train` does: with the step's own pictures, after it."""
        labels, head = self._plan.examples.labels, self._head()
        train = Batch.from_logits(
            self._of_all(rows, self._logits, len(head.biases), self._distorting(step)), labels[rows]
        )
        if not np.isfinite(train.cross_entropy):
            raise ModelError(f"the loss is {train.cross_entropy} at step {step}", hint="Try a smaller --learning_rate.")
        validation = None
        if self._validation is not None:
            chosen = self._validation(step)
            validation = Batch.from_logits(self._of_all(chosen, self._logits, len(head.biases)), labels[chosen])
        return Evaluation(step, head, train, validation)

    def _features(self, rows: Indices) -> Matrix:
        return self._of_all(rows, self._passed, len(self._state.head.weights))

    def _of_all(self, rows: Indices, function: Callable[[Array], Any], width: int, step: int | None = None) -> Matrix:
        """``float32[rows, width]``: what all workers together find for pictures."""
        torch = self._torch
        found = torch.zeros((len(rows), width), device=self._team.device)
        with torch.no_grad():
            for piece, pictures in self._pictures.ahead(self._in_pieces(rows, step)):
                found[piece.start : piece.stop] = function(pictures)
        self._team.add_up(found)
        array: Matrix = found.cpu().numpy()
        return array

    def _one_picture(self) -> Array:
        return next(self._pictures.ahead(iter([_Piece(self._plan.wanted, 0, 1)])))[1]

    def _width(self) -> int:
        with self._torch.no_grad():
            return int(self._passed(self._one_picture()).shape[1])

    # -- keeping -----------------------------------------------------------------------------------------------

    def _head(self) -> Head:
        weights, biases = (each.detach().cpu().numpy().copy() for each in self._layer)
        return Head(weights, biases)

    def _arrays(self) -> dict[str, Any]:
        return {name: each.detach().cpu().numpy().copy() for name, each in self._weights.items()}

    def _put(self, arrays: Mapping[str, Any]) -> None:
        """Give the network these weights. Raises ModelError if they are another network's."""
        if {name: each.shape for name, each in arrays.items()} != {
            name: tuple(each.shape) for name, each in self._weights.items()
        }:
            raise ModelError("the checkpoint is of another network", hint="Begin a new run.")
        with self._torch.no_grad():
            for name, each in self._weights.items():
                each.copy_(self._torch.from_numpy(arrays[name]))

    def _write(self) -> None:
        began = time.monotonic()
        self._state.head = self._head()
        arrays = self._state.arrays()
        arrays |= {f"{_NETWORK}{name}": each for name, each in self._arrays().items()}
        arrays |= {f"{_BEST}{name}": each for name, each in self._best.items()}
        # In the same file: what goes on from here does not measure it again, and who is told of it may be killed.
        arrays[_MEASURED] = np.frombuffer(json.dumps(self._measured).encode(), np.uint8)
        write_whole(self._plan.checkpoint, packed(arrays))
        self._written = time.monotonic()
        self._took = self._written - began


def _measured(arrays: Mapping[str, Any]) -> list[Measured]:
    """What was measured before a checkpoint; those of earlier versions do not say."""
    if _MEASURED not in arrays:
        return []
    return [(step, at, metrics) for step, at, metrics in json.loads(arrays[_MEASURED].tobytes())]


def _named(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): each for name, each in arrays.items() if name.startswith(prefix)}


def _rows_of(examples: Examples, part: Any, size: int, parameters: Parameters) -> Callable[[int], Indices]:
    """The pictures of each step or evaluation."""
    if size == -1:
        rows = examples.parts[part]
        return lambda step: rows
    sampler = Sampler(examples, part, size, parameters)
    return lambda step: sampler.rows(step).copy()
