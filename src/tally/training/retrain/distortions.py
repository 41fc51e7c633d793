"""Training pictures that are never the same twice: cropped, scaled, flipped, brighter or darker.

As in TensorFlow's ``retrain.py``: https://github.com/tensorflow/hub/blob/master/examples/image_retraining/retrain.py
Each picture of each step goes through the backbone anew, on the workers of an engine, ahead of the step that needs it.
What is done to it depends on the seed, the step and its place in the batch alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tally.engines.base import Engine, Limits
from tally.errors import ItemError, ModelError, SpecError, WorkerError
from tally.media.images import decode
from tally.models.load import load
from tally.models.reference import ModelRef
from tally.scorers.base import Item, Scorer
from tally.scorers.vision.preprocess import Array, Preprocess, Preprocessor, Size
from tally.training.retrain.bottlenecks import features
from tally.training.retrain.dataset import Dataset
from tally.training.retrain.examples import Examples, Indices, Matrix, Parameters
from tally.training.retrain.sampling import Sampler

TASK = 10
"""Pictures in one task. It must not depend on the number of workers."""
ATTEMPTS = 3
"""How often a task is tried whose worker is lost."""
PURPOSE = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Distortions:
    """What is done to training pictures. Percentages; 0 and False do nothing. Raises SpecError with every problem.

    random_crop: how much larger than what is cut out of it the picture is. random_scale: how much larger it is at most
    besides. random_brightness: how much brighter or darker at most.
    """

    flip_left_right: bool = False
    random_crop: int = 0
    random_scale: int = 0
    random_brightness: int = 0

    def __post_init__(self) -> None:
        problems = []
        for name, most in (("random_crop", 1000), ("random_scale", 1000), ("random_brightness", 100)):
            if not 0 <= getattr(self, name) <= most:
                problems.append(f"--{name}: 0 to {most} percent, not {getattr(self, name)}")
        if problems:
            raise SpecError(problems)

    def __bool__(self) -> bool:
        return bool(self.flip_left_right or self.random_crop or self.random_scale or self.random_brightness)

    def apply(self, content: bytes, spec: Preprocess, rng: np.random.Generator) -> Array:
        """A picture's content as ``uint8[height, width, 3]`` RGB of the size that ``spec`` says, distorted.

        Raises ItemError if it cannot be decoded.
        """
        assert spec.size is not None
        width, height = spec.size
        factor = (1 + self.random_crop / 100) * rng.uniform(1, 1 + self.random_scale / 100)
        larger = (max(width, round(width * factor)), max(height, round(height * factor)))
        pixels, info = decode(content, larger)
        picture = _fitted(pixels, info, spec, larger)
        left, top = (int(rng.integers(more - side + 1)) for more, side in zip(larger, spec.size, strict=True))
        picture = picture[top : top + height, left : left + width]
        flipped = rng.random() < 0.5
        if self.flip_left_right and flipped:
            picture = picture[:, ::-1]
        brightness = rng.uniform(1 - self.random_brightness / 100, 1 + self.random_brightness / 100)
        if self.random_brightness:
            picture = np.clip(np.rint(picture * np.float32(brightness)), 0, 255).astype(np.uint8)
        return np.ascontiguousarray(picture)


def _fitted(pixels: Array, info: Any, spec: Preprocess, size: Size) -> Array:
    """A picture at another size, fitted to it as the model's pictures are."""
    assert spec.size is not None
    shorter = None
    if spec.resize == "crop":
        shorter = max(*size, round((spec.shorter or max(spec.size) * 256 / 224) * max(size) / max(spec.size)))
    plain = Preprocess(
        size=size,
        resize=spec.resize,
        shorter=shorter,
        fill=spec.fill,
        anchor=spec.anchor,
        interpolation=spec.interpolation,
        layout="nhwc",
        channels="rgb",
        dtype="uint8",
    )
    return Preprocessor(plain)(Item("", pixels, info)).tensor


def spec_of(ref: ModelRef) -> Preprocess:
    """How a backbone prepares pictures. Raises SpecError if it takes any size: then there is none to crop to."""
    spec = Preprocess.model_validate(ref.options["preprocess"])
    if spec.size is None:
        raise SpecError(
            f"--random_crop and the like: {ref.name} takes pictures of any size, so there is none to distort them to",
            hint="Say one: --set preprocess.size=224x224",
        )
    return spec


class Distorted:
    """The training pictures of each step, distorted. Workers run until :meth:`close`."""

    def __init__(
        self,
        dataset: Dataset,
        examples: Examples,
        parameters: Parameters,
        distortions: Distortions,
        ref: ModelRef,
        engine: Engine,
        *,
        workers: int | None = None,
        device: str = "auto",
    ) -> None:
        spec_of(ref)
        self._paths = [each.path for each in dataset.pictures]
        self._labels, self._parameters = examples.labels, parameters
        self._sampler = None
        if parameters.train_batch_size == -1:
            self._all = examples.parts["training"]
        else:
            self._sampler = Sampler(examples, "training", parameters.train_batch_size, parameters)
        self._engine = engine
        slots = workers or engine.default_slots()
        self._ahead = 2 * slots
        self._waiting: deque[tuple[int, Indices, list[_Pending]]] = deque()
        engine.start(
            _setup,
            (ref, distortions, parameters.seed, device),
            slots=slots,
            limits=Limits(memory=engine.default_memory(slots)),
        )

    def __call__(self, step: int) -> tuple[Matrix, Indices]:
        """Steps are to be asked for in their order. Raises ModelError, ItemError."""
        while not self._waiting or sum(len(each[2]) for each in self._waiting) < self._ahead:
            following = self._waiting[-1][0] + 1 if self._waiting else step
            if following > max(step, self._parameters.how_many_training_steps - 1):
                break
            self._submit(following)
        number, rows, pending = self._waiting.popleft()
        assert number == step
        return np.concatenate([each.result() for each in pending]), self._labels[rows]

    def _submit(self, step: int) -> None:
        rows = self._all if self._sampler is None else self._sampler.rows(step).copy()
        tasks = [
            (step, start, [self._paths[row] for row in rows[start : start + TASK]])
            for start in range(0, len(rows), TASK)
        ]
        self._waiting.append((step, rows, [_Pending(self._engine, task) for task in tasks]))

    def close(self) -> None:
        self._engine.stop(kill=True)


class _Pending:
    """A task that was submitted; again where its worker is lost."""

    def __init__(self, engine: Engine, task: tuple[int, int, Sequence[Path]]) -> None:
        self._engine, self._task = engine, task
        self._future: Future[Matrix] = engine.submit(_bottlenecks, *task)

    def result(self) -> Matrix:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._future.result()
            except WorkerError as error:
                if attempt == ATTEMPTS:
                    names = ", ".join(path.name for path in self._task[2])
                    raise ModelError(f"distorting {names}: {error.message}, {ATTEMPTS} times") from error
                self._future = self._engine.submit(_bottlenecks, *self._task)
        raise AssertionError("unreachable")


# -- in the workers ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Worker:
    scorer: Scorer
    spec: Preprocess
    prepare: Preprocessor
    distortions: Distortions
    seed: int


def _setup(ref: ModelRef, distortions: Distortions, seed: int, device: str) -> _Worker:
    spec = spec_of(ref)
    # Distorted pictures have the model's size already.
    prepare = Preprocessor(spec.model_copy(update={"resize": "squash", "shorter": None}))
    return _Worker(load(ref, device), spec, prepare, distortions, seed)


def _bottlenecks(worker: _Worker, step: int, start: int, paths: Sequence[Path]) -> Matrix:
    """``float32[pictures, features]``; ``start``: place of the first of them in the step's batch."""
    found = []
    for place, path in enumerate(paths, start):
        rng = np.random.default_rng([worker.seed, PURPOSE, step, place])
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ItemError(f"{path} cannot be read any more: {error.strerror}", stage="read") from None
        picture = worker.distortions.apply(content, worker.spec, rng)
        # Alone, as what a model makes of a picture may depend on those beside it, in the last digit.
        found.append(features(worker.scorer, worker.prepare(Item(str(path), picture))))
    return np.stack(found)
