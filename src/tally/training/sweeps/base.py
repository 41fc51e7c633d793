"""The contract of what a sweep trains: how one trial is handed to a worker, and what becomes of the best."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tally.engines.base import Engine
from tally.errors import StorageError
from tally.training.runs.store import RunStore
from tally.training.runs.tracking import Run
from tally.training.sweeps.space import Value


class NotSharedError(StorageError):
    """A worker on another machine does not see the files of its trial."""


def check_shared(place: str | Path) -> None:
    """On a worker: raises NotSharedError unless it sees this file or folder."""
    if not Path(place).exists():
        raise NotSharedError(
            f"a worker on {socket.gethostname()} does not see {place}, where the sweep has its files",
            hint="Workers of a cluster need the driver's files at the same path: set TALLY_HOME to a folder of a disk "
            "that all machines have, and keep data and scripts on one.",
        )


@dataclass(frozen=True, slots=True)
class Ended:
    """How a trial ended. step: that its result is of; None: the last. error: why it failed. stopped: before its end.

    cost: of its run, as :class:`tally.training.runs.cost.Meter` measures it.
    """

    step: int | None = None
    error: str | None = None
    stopped: bool = False
    cost: Mapping[str, float] | None = None


class Trials(ABC):
    """What the trials of a sweep train. Methods are called by the process that drives the sweep.

    kind: of their runs. types: of the parameters that there are; None: any.
    goes_on: a trial that was lost goes on in its run from its checkpoint; otherwise it begins anew, in another run.
    code: what a run says of its code, see :class:`tally.training.runs.store.RunRecord`; None: what it says by itself.
    """

    kind: ClassVar[str]
    types: ClassVar[Mapping[str, type] | None] = None
    goes_on: bool = False
    code: Mapping[str, Any] | None = None

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able; what made it takes it back."""

    @property
    def measures(self) -> Sequence[str] | None:
        """Names of metrics, as far as that is known; None: any."""
        return None

    @abstractmethod
    def check(self, values: Mapping[str, Value]) -> None:
        """Raises SpecError if a trial cannot have these values."""

    def check_metric(self, metric: str) -> None:  # noqa: B027 - a script may measure anything
        """Raises SpecError if no trial measures it."""

    @abstractmethod
    def prepare(self, folder: Path, engine: str) -> Mapping[str, str]:
        """Do once what all trials need. folder: of the sweep. engine: who runs workers. Returns hashes of what is
        trained from."""

    @abstractmethod
    def setup(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """How a worker is set up."""

    @abstractmethod
    def parameters(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """Of a trial's run."""

    @abstractmethod
    def command(self, values: Mapping[str, Value]) -> Sequence[str]:
        """That trains the same outside of a sweep."""

    @abstractmethod
    def describe(self, run: Run) -> None:
        """Have a new run know what it is trained from."""

    @abstractmethod
    def submit(self, engine: Engine, run: Run, values: Mapping[str, Value]) -> Future[Any]:
        """Hand a trial to a worker. What it measures is recorded in the run's book."""

    @abstractmethod
    def ended(self, run: Run, found: Any) -> Ended:
        """What a trial's task returned, told. It is called once for each task whose worker was not lost."""

    def released(self, run: Run) -> None:  # noqa: B027 - most hold nothing
        """The task of this run is over, however it ended."""

    @abstractmethod
    def conclude(self, store: RunStore, run_id: str, values: Mapping[str, Value], register: str | None) -> str | None:
        """Make a model of the best trial; returns ``models:/NAME/N`` if it was to be registered. May be repeated."""

    def measured(self, run: Run) -> Mapping[str, float] | None:
        """What the model of the best trial measured; None: the last that its run did."""
        return None
