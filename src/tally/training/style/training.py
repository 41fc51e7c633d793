"""Train a network that restyles pictures after one picture, and package it.

All that can be checked is checked before training begins. The package appears at once when training has ended; until
then there are only TensorBoard's event files beside it.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tally.errors import (
    ItemError,
    ModelError,
    OutputExistsError,
    SourceNotFoundError,
    SpecError,
)
from tally.media.images import decode, suffixes
from tally.models.registry import open_registry
from tally.models.resolve import resolve
from tally.optional import needed
from tally.storage import failure
from tally.training.promotion import Promoted, Promotion
from tally.training.runs.store import EVENTS, PACKAGE
from tally.training.runs.tracking import Run, emptied
from tally.training.style.network import SMALLEST_STYLE, initial, restyle, to_onnx
from tally.training.style.synthetic_images import Pixels, draw

METRICS = ("loss/style", "loss/content", "loss/smoothness")
"""What a training measures."""
BATCH_SIZE = 3
"""Content pictures per step."""
CROP_SIZE = 144
"""Pixels per side of content pictures."""
LEARNING_RATE = 3e-3
WEIGHTS = {"style": 4.0, "content": 1.5, "smoothness": 0.1}
PREVIEW_STEPS = 100
"""Steps between pictures of before and after in the event files."""
TOLERANCE = 0.5
"""How far the pictures of the written file may differ from PyTorch's, of 255."""


@dataclass(frozen=True, slots=True)
class Step:
    """``done`` of ``of`` steps, and the losses of the last one."""

    done: int
    of: int
    losses: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A training. Raises SpecError with every problem, SourceNotFoundError, OutputExistsError.

    style: a picture. out: folder of the package, which must not exist; None: that of the run (:func:`train`). content:
    folder of photos; None: synthetic pictures. size: the style picture's shorter side in pixels while training.
    strength: weight of the style. vgg: weights of torchvision's vgg16 or vgg19; None: random filters. summaries: folder
    of TensorBoard's event files; None: beside the package.
    """

    style: Path
    out: Path | None = None
    content: Path | None = None
    steps: int = 1000
    size: int = 384
    strength: float = 1.0
    vgg: Path | None = None
    seed: int = 1
    summaries: Path | None = None

    file = "style.onnx"

    def __post_init__(self) -> None:
        problems = []
        if self.steps < 1:
            problems.append(f"--steps: at least 1, not {self.steps}")
        if not SMALLEST_STYLE <= self.size <= 4096:
            problems.append(f"--size: {SMALLEST_STYLE} to 4096 pixels, not {self.size}")
        if not 0 < self.strength < float("inf"):
            problems.append(f"--strength: more than 0, not {self.strength:g}")
        if self.seed < 0:
            problems.append(f"--seed: 0 or more, not {self.seed}")
        if problems:
            raise SpecError(problems)
        for flag, path in (("--style", self.style), ("--vgg", self.vgg)):
            if path is not None and not path.is_file():
                raise SourceNotFoundError(f"{flag}: there is no file {str(path)!r}")
        if self.content is not None and not self.content.is_dir():
            raise SourceNotFoundError(f"--content: there is no folder {str(self.content)!r}")
        if self.out is not None and self.out.exists():
            raise OutputExistsError(f"{self.out} is there already", hint="Choose another folder, or remove it first.")

    @property
    def events(self) -> Path:
        """TensorBoard's event files, a folder for each run, beside the package, which holds the model only."""
        if self.summaries is not None:
            return self.summaries
        assert self.out is not None
        return self.out.with_name(self.out.name + "-events")

    def run(self, listen: Callable[[Step], None] = lambda step: None) -> dict[str, Any]:
        """Train, write the package, and return its metrics and its origin.

        Raises ModelError, ModelLoadError, SpecError, StorageError.
        """
        torch, writer_of = _libraries()
        from tally.training.style.losses import RandomFilters, Vgg

        device = "cuda" if torch.cuda.is_available() else "cpu"
        style = self._style()
        batches = self._batches()
        tensor = _tensor(style[None]).to(device)
        perceptual_loss = Vgg(tensor, self.vgg) if self.vgg else RandomFilters(tensor, self.seed)
        parameters = {name: value.to(device) for name, value in initial(tensor, self.seed).items()}
        trained = [value.requires_grad_() for value in parameters.values() if value.is_floating_point()]
        optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=LEARNING_RATE, total_steps=self.steps + 1, pct_start=0.1
        )
        weights = WEIGHTS | {"style": WEIGHTS["style"] * self.strength}
        values: dict[str, float] = {}
        with writer_of(str(self._new_events())) as events:
            events.add_image("style", style, 0, dataformats="HWC")
            for step in range(1, self.steps + 1):
                pictures = _tensor(next(batches)).to(device)
                restyled = restyle(parameters | {"canvas": _rolled(parameters["canvas"], step)}, pictures)
                losses = perceptual_loss.losses(restyled, pictures)
                total = sum(weights[name] * loss for name, loss in losses.items())
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                schedule.step()
                values = {name: loss.item() for name, loss in losses.items()}
                if not np.isfinite(total.item()):
                    raise ModelError(f"the loss is {total.item()} at step {step}", hint="Try a smaller --strength.")
                for name, value in (values | {"total": total.item()}).items():
                    events.add_scalar(f"loss/{name}", value, step)
                events.add_scalar("learning rate", schedule.get_last_lr()[0], step)
                if step % PREVIEW_STEPS == 0 or step == self.steps:
                    strip = torch.cat([*torch.cat([pictures, restyled.detach()], dim=2)], dim=2)
                    events.add_image("before and after", strip.round().byte(), step)
                listen(Step(step, self.steps, values))
        self._write({name: value.detach().cpu() for name, value in parameters.items()})
        return {
            "metrics": {f"loss/{name}": round(value, 4) for name, value in values.items()},
            "trained": {
                "style": self.style.name,
                "style_sha256": hashlib.sha256(self.style.read_bytes()).hexdigest(),
                "content": self.content.name if self.content else "drawn pictures",
                "losses": perceptual_loss.name,
                "steps": self.steps,
                "size": self.size,
                "strength": self.strength,
                "seed": self.seed,
                "torch": torch.__version__,
            },
        }

    def _new_events(self) -> Path:
        """A new folder for this run's event files; those of earlier runs are kept. Raises StorageError."""
        folder = self.events / time.strftime("%Y-%m-%d-%H%M%S")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise failure("write", str(folder), error) from error
        return folder

    def _style(self) -> Pixels:
        """The style picture ``uint8[height, width, 3]``, its shorter side ``size``."""
        try:
            pixels, _ = decode(self.style.read_bytes())
        except ItemError as error:
            raise SpecError(f"--style: {self.style}: {error.message}") from None
        return _resized(pixels, self.size)

    def _batches(self) -> Iterator[Pixels]:
        """Pictures ``uint8[BATCH_SIZE, CROP_SIZE, CROP_SIZE, 3]`` without end, determined by the seed."""
        paths: list[Path] = []
        if self.content:
            paths = sorted(path for path in self.content.rglob("*") if path.suffix.lower() in suffixes())
            if not paths:
                raise SourceNotFoundError(f"--content: there are no pictures in {str(self.content)!r}")
        return self._generate(paths)

    def _generate(self, paths: list[Path]) -> Iterator[Pixels]:
        number = 0
        while True:
            batch: list[Pixels] = []
            while len(batch) < BATCH_SIZE:
                rng = np.random.default_rng([self.seed, number])
                number += 1
                if not paths:
                    batch.append(draw(rng, CROP_SIZE))
                    continue
                path = paths[rng.integers(len(paths))]
                try:
                    batch.append(_random_crop(path, rng))
                except ItemError as error:
                    paths.remove(path)
                    if not paths:
                        raise SpecError(f"--content: no picture can be read; {path}: {error.message}") from None
            yield np.stack(batch)

    def _write(self, parameters: Mapping[str, Any]) -> None:
        """Write the package, atomically. Raises ModelError if the file does not do what PyTorch does."""
        out = self.out
        assert out is not None
        model = to_onnx({name: value.numpy() for name, value in parameters.items()}).SerializeToString()
        _compare(model, parameters, self._batches())
        described = {
            "name": out.name,
            "description": f"Restyles pictures after {self.style.name}.",
            "kind": "onnx",
            "file": self.file,
            "options": {
                "task": "restyle",
                "preprocess": {
                    "resize": "squash",
                    "interpolation": "bilinear",
                    "layout": "nchw",
                    "channels": "rgb",
                    "dtype": "float32",
                    "scale": 1.0,
                },
            },
        }
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
            try:
                (partial / self.file).write_bytes(model)
                (partial / "tally.yaml").write_text(yaml.safe_dump(described, sort_keys=False), "utf-8")
                partial.chmod(0o755)
                partial.rename(out)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise failure("write", str(out), error) from error


def train(
    training: Training, run: Run, promotion: Promotion, *, listen: Callable[[Step], None] = lambda step: None
) -> tuple[Promoted, Path]:
    """Train as a run, and register the package, whose folder is returned, too.

    May be repeated in a run whose process was killed.
    """
    if training.out is None:
        training = replace(training, out=emptied(run.folder / PACKAGE), summaries=run.folder / EVENTS)

    def told(step: Step) -> None:
        listen(step)
        run.log({f"loss/{name}": loss for name, loss in step.losses.items()}, step=step.done)

    facts, out = training.run(told), training.out
    assert out is not None
    facts |= {"run": run.id}
    return promotion.conclude(run, lambda name: open_registry().add(name, resolve(out), metadata=facts)), out


def _libraries() -> tuple[Any, Any]:
    """torch, and TensorBoard's writer. Raises ModelError with what to install."""
    with needed("training needs", "train", ModelError):
        import onnx  # noqa: F401 - needed only at the end of a long training
        import torch
        from torch.utils.tensorboard import SummaryWriter
    return torch, SummaryWriter


def _tensor(pictures: Pixels) -> Any:
    """``uint8[batch, height, width, 3]`` to a tensor ``float32[batch, 3, height, width]``, 0..255."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float()


def _rolled(canvas: Any, step: int) -> Any:
    """The canvas, rolled differently at each step, because a step sees only a part of it."""
    return canvas.roll((step * 89, step * 55), (2, 3))


def _resized(pixels: Pixels, shorter: int) -> Pixels:
    """The picture, resized so that its shorter side has ``shorter`` pixels."""
    height, width = pixels.shape[:2]
    factor = shorter / min(height, width)
    size = (max(shorter, round(width * factor)), max(shorter, round(height * factor)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _random_crop(path: Path, rng: np.random.Generator) -> Pixels:
    """A random part of a photo, at a random scale, ``uint8[CROP_SIZE, CROP_SIZE, 3]``. Raises ItemError."""
    shorter = round(CROP_SIZE * rng.uniform(1, 2.5))
    try:
        pixels, _ = decode(path.read_bytes(), (shorter, shorter))
    except OSError as error:
        raise ItemError(error.strerror or str(error), stage="read") from None
    pixels = _resized(pixels, shorter)
    top, left = (int(rng.integers(side - CROP_SIZE + 1)) for side in pixels.shape[:2])
    cut = pixels[top : top + CROP_SIZE, left : left + CROP_SIZE]
    return cut[:, ::-1] if rng.random() < 0.5 else cut


def _compare(model: bytes, parameters: Mapping[str, Any], batches: Iterator[Pixels]) -> None:
    """Run the file in ONNX Runtime, at odd sizes. Raises ModelError if it differs from PyTorch."""
    import onnxruntime
    import torch

    pictures = _tensor(next(batches)[:, :101, :-3])
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": pictures.numpy()})
    with torch.no_grad():
        expected = restyle(parameters, pictures).numpy()
    difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else float("inf")
    if not difference <= TOLERANCE:
        raise ModelError(f"the ONNX file's pictures differ from PyTorch's by up to {difference:g} of 255")
