"""Scores pictures and tables with networks of PyTorch.

:func:`inspect` opens a network once, when a job is described, and fills in every option that was left out. The scorers
take those options to the workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tally.scorers.base import Scorer
from tally.scorers.tabular.tensors import TensorTableOptions, TensorTableScorer, complete_table
from tally.scorers.torch.network import open_file, quietly
from tally.scorers.torch.options import OWN, TorchSettings
from tally.scorers.torch.runtime import TorchRuntime, device_of, picture_facts, table_ports, takes_table
from tally.scorers.vision.options import VisionOptions, complete
from tally.scorers.vision.scorer import VisionScorer


class TorchPictureOptions(VisionOptions, TorchSettings):
    """Options of a network of PyTorch that takes pictures."""


class TorchTableOptions(TensorTableOptions, TorchSettings):
    """Options of a network of PyTorch that takes rows of numbers."""


def inspect(path: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
    """Open a network, run it on made-up values, and fill in every option that was left out.

    ``assumed`` in the result has one sentence for each thing that was neither said nor found. Raises SpecError with
    every problem, ModelLoadError.
    """
    given = {"file": path.name, **options, "trusted": trusted}
    settings = TorchSettings.among(given)
    with quietly():
        network = open_file(path, settings)
        runtime = TorchRuntime(network, settings.model_copy(update={"compile": False}), "cpu")
        if "features" in options or takes_table(network):
            port, outputs = table_ports(path, network, runtime)
            of_table = {name: value for name, value in options.items() if name not in OWN}
            found: Any = complete_table(
                path, of_table, [port], outputs, options_type=TorchTableOptions, settings=settings.model_dump()
            )
        else:
            declared = TorchPictureOptions.parse(given)
            facts = picture_facts(path, network, runtime, declared.preprocess)
            found = complete(declared, facts, runtime.all)
    return {**found.model_dump(mode="json"), "assumed": [*network.assumed, *found.assumed]}


def create(options: Mapping[str, Any]) -> Scorer:
    """The scorer of options as :func:`inspect` returns them."""
    return TorchTableScorer(options) if "inputs" in options else TorchPictureScorer(options)


class TorchPictureScorer(VisionScorer):
    """Scores pictures with a network of PyTorch."""

    options_type = TorchPictureOptions

    def open(self, path: Path, device: str) -> TorchRuntime:
        return _open(path, self.options, device, self.options.threads)


class TorchTableScorer(TensorTableScorer):
    """Scores tables with a network of PyTorch."""

    options_type = TorchTableOptions

    def open(self, path: Path, device: str) -> TorchRuntime:
        return _open(path, self.options, device, 1)


def _open(path: Path, settings: Any, device: str, threads: int) -> TorchRuntime:
    where = device_of(device)
    return TorchRuntime(open_file(path, settings, where), settings, where, threads)
