"""What Keras, LiteRT and TensorFlow share: models whose files say what tensors they take and give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from tally.errors import ModelLoadError, TallyError, error_line
from tally.models import kinds
from tally.models.inspected import inspected_before
from tally.models.reference import ModelRef
from tally.optional import needed
from tally.scorers.base import Scorer
from tally.scorers.runtime import Runtime
from tally.scorers.tabular.tensors import Port, TensorTableOptions, TensorTableScorer, complete_table
from tally.scorers.vision.detection.base import Dims, Output
from tally.scorers.vision.kind import VisionKind
from tally.scorers.vision.known import known_by
from tally.scorers.vision.options import ModelFacts, VisionOptions, complete
from tally.scorers.vision.preprocess import Array
from tally.scorers.vision.scorer import VisionScorer

_BY_YOURSELF = "A scorer of your own can run it (docs: write-a-scorer)."


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output: its axes, the batch first, None where they vary; NumPy's name of its type."""

    name: str
    dims: Dims
    dtype: str


class DescribedRuntime(Runtime, ABC):
    """An open model that says what it takes and gives.

    layers: their names, where the model tells. straight: the first of them that does something is a convolution.
    """

    layers: tuple[str, ...] = ()
    straight: bool = False
    taken: tuple[Tensor, ...]
    given: tuple[Tensor, ...]

    def describe(self, taken: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> None:
        self.taken, self.given = taken, given
        self.inputs, self.outputs = [each.name for each in taken], [each.name for each in given]

    @abstractmethod
    def settle(self, device: str, threads: int) -> None:
        """Use a device, and so many threads. Raises ModelLoadError where there is no such device."""


Opener: TypeAlias = Callable[[Path], DescribedRuntime]


class DescribedKind(VisionKind):
    """A kind whose models say what they take: pictures, or rows of numbers.

    libraries: what has to be imported. distributions: of which the versions matter.
    """

    libraries: ClassVar[tuple[str, ...]]
    distributions: ClassVar[tuple[str, ...]]

    def open(self, path: Path, *, trusted: bool) -> DescribedRuntime:
        """Open a model. Whatever the library raises says what is wrong with it."""
        raise NotImplementedError

    def opened(self, path: Path, *, trusted: bool) -> DescribedRuntime:
        """Open a model. Raises ModelLoadError, UntrustedModelError."""
        with needed(f"{path} needs", kinds.extra_of(self.name), ModelLoadError):
            for library in self.libraries:
                import_module(library)
        try:
            return self.open(path, trusted=trusted)
        except TallyError:
            raise
        except Exception as error:
            raise ModelLoadError(
                f"{path} cannot be opened: {error_line(error)[:400]}",
                hint="Was it copied or downloaded completely, and saved by a version like the one here?",
            ) from None

    def inspect(self, path: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
        return inspected_before(
            path,
            options,
            trusted=trusted,
            distributions=self.distributions,
            files=self.content(path),
            inspect=lambda: self._inspected(path, options, self.opened(path, trusted=trusted)),
        )

    def content(self, path: Path) -> tuple[str, ...]:
        """The model's files, in its folder."""
        return (path.name,)

    def _inspected(self, path: Path, options: Mapping[str, Any], model: DescribedRuntime) -> dict[str, Any]:
        if len(model.taken) != 1:
            names = ", ".join(each.name for each in model.taken) or "none"
            raise ModelLoadError(
                f"{path}: a model takes one tensor, this one has {len(model.taken)} inputs ({names})", hint=_BY_YOURSELF
            )
        [taken] = model.taken
        if len(taken.dims) == 4 and taken.dtype in ("float32", "float16", "uint8"):
            return self._of_pictures(path, options, model, taken).model_dump(mode="json")
        if len(taken.dims) == 2:
            return complete_table(
                path, options, [_port(taken)], list(map(_port, model.given)), options_type=TensorTableOptions
            ).model_dump(mode="json")
        raise ModelLoadError(
            f"{path}: models of pictures take four axes, models of tables two; this one takes {taken.name}: "
            f"{taken.dtype} {['any' if n is None else n for n in taken.dims]}",
            hint=_BY_YOURSELF,
        )

    def _of_pictures(
        self, path: Path, options: Mapping[str, Any], model: DescribedRuntime, taken: Tensor
    ) -> VisionOptions:
        outputs = tuple(
            Output(each.name, each.dims, "integer" if "int" in each.dtype else "float") for each in model.given
        )
        names = [each.name for each in outputs]

        def run(tensors: Array) -> dict[str, Array]:
            return dict(zip(names, model.run(names, {taken.name: tensors}), strict=True))

        layers = [f"{each}/" for each in model.layers]  # as they begin in a graph
        facts = ModelFacts(
            path,
            taken.dims,
            taken.dtype,
            outputs,
            recognised=lambda classes: known_by(layers, classes, straight=model.straight),
        )
        return complete(VisionOptions.parse({"file": path.name, **options}), facts, run)

    def create(self, ref: ModelRef) -> Scorer:
        def opener(path: Path) -> DescribedRuntime:
            return self.opened(path, trusted=ref.trusted)

        return _Table(ref.options, opener) if "inputs" in ref.options else _Pictures(ref.options, opener)


def _port(tensor: Tensor) -> Port:
    dims = tensor.dims
    return Port(
        name=tensor.name,
        dtype=tensor.dtype,
        rank=len(dims),
        width=1 if len(dims) < 2 else dims[1],
        batch=dims[0] if dims else None,
    )


class _Pictures(VisionScorer):
    def __init__(self, options: Mapping[str, Any], opener: Opener) -> None:
        super().__init__(options)
        self._opener = opener

    def open(self, path: Path, device: str) -> Runtime:
        found = self._opener(path)
        found.settle(device, self.options.threads)
        return found


class _Table(TensorTableScorer):
    def __init__(self, options: Mapping[str, Any], opener: Opener) -> None:
        super().__init__(options)
        self._opener = opener

    def open(self, path: Path, device: str) -> Runtime:
        found = self._opener(path)
        found.settle(device, 1)
        return found


def cpu_only(device: str, what: str) -> None:
    """Raises ModelLoadError for a device that is none for it."""
    if device.partition(":")[0] not in ("auto", "cpu"):
        raise ModelLoadError(
            f"device {device} was asked for, and {what} runs on the CPU here", hint="Use --device cpu."
        )
