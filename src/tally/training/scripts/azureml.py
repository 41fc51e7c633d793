"""What training scripts in the Azure ML manner import from ``azureml.core``, for machines without Azure ML.

``tally train script`` puts the packages of :mod:`tally.training.scripts.shim` on the script's path, and these stand
there. What is logged goes to the run of that command; what is not here says so by name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tally.errors import RunError, SpecError
from tally.training.runs.tracking import Run as TallyRun
from tally.training.runs.tracking import run as begin

log = logging.getLogger("tally")

TABLES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
"""What a data set may be."""


def _not_here(of: type, name: str) -> AttributeError:
    if name.startswith("__"):
        return AttributeError(name)
    there = ", ".join(sorted(each for each in dir(of) if not each.startswith("_")))
    return AttributeError(
        f"azureml.core.{of.__name__}.{name} is not provided by 'tally train script', which provides {there}"
    )


class _OfClass(type):
    """What is asked of the class itself: ``Dataset.Tabular``, ``Workspace.get``."""

    def __getattr__(cls, name: str) -> Any:
        raise _not_here(cls, name)


class _Partial(metaclass=_OfClass):
    """A class of which only a part is here."""

    def __getattr__(self, name: str) -> Any:
        raise _not_here(type(self), name)


class Run(_Partial):
    """The run of the command that has started the script."""

    _current: Run | None = None

    def __init__(self, run: TallyRun) -> None:
        self._run = run
        self._steps: dict[str, int] = {}

    @classmethod
    def get_context(cls, allow_offline: bool = True, **ignored: Any) -> Run:
        """The run that this script belongs to; the same one each time."""
        if Run._current is None:
            Run._current = Run(begin())
        return Run._current

    @property
    def id(self) -> str:
        return self._run.id

    @property
    def name(self) -> str:
        return self._run.name

    display_name = name

    @cached_property
    def experiment(self) -> Experiment:
        return Experiment(Workspace(), self._run.name)

    @property
    def tags(self) -> dict[str, str]:
        return dict(self._run.tags)

    def log(self, name: str, value: Any, description: str = "", step: int | None = None) -> None:
        """A number, or a text: that becomes a tag of the run."""
        if isinstance(value, str):
            self._run.tags[name] = value
        else:
            self._run.log(name, value, step)

    def log_list(self, name: str, value: Sequence[Any], description: str = "") -> None:
        """Numbers; with a text among them, they become a tag."""
        values = list(value)
        if any(isinstance(each, str) for each in values):
            self._run.tags[name] = ", ".join(map(str, values))
        else:
            self._run.log_list(name, values)

    def log_row(self, name: str, description: str | None = None, **columns: Any) -> None:
        """Each number of the row becomes a value of the metric NAME/COLUMN."""
        step = self._step(f"row:{name}")
        for column, value in columns.items():
            if isinstance(value, str):
                self._run.tags[f"{name}/{column}/{step}"] = value
            else:
                self._run.log(f"{name}/{column}", value, step)

    def log_table(self, name: str, value: Mapping[str, Any], description: str = "") -> None:
        """Columns by name: lists or arrays of numbers, or one number each."""
        for column, values in value.items():
            several = hasattr(values, "__len__") and not isinstance(values, str)  # an array, too
            self.log_list(f"{name}/{column}", values if several else [values])

    def log_image(self, name: str, path: str | None = None, plot: Any = None, description: str = "") -> None:
        """A file, or a matplotlib plot (``pyplot`` itself, or a figure)."""
        if (path is None) == (plot is None):
            raise SpecError(f"log_image({name!r}): give either path or plot")
        figure = plot.gcf() if hasattr(plot, "gcf") else plot
        self._run.log_image(name, path if figure is None else figure, self._step(f"image:{name}"))

    def tag(self, key: str, value: Any = None) -> None:
        self._run.tags[key] = "" if value is None else str(value)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        for key, value in tags.items():
            self.tag(key, value)

    def upload_file(self, name: str, path_or_stream: Any, **ignored: Any) -> None:
        """Copies a file into the run."""
        self._run.log_artifact(path_or_stream, name)

    def upload_folder(self, name: str, path: str, **ignored: Any) -> None:
        self._run.log_artifact(path, name)

    def get_metrics(self, name: str | None = None, **ignored: Any) -> dict[str, float]:
        """The last value of each metric that was logged."""
        found = self._run.last_values()
        return found if name is None else {key: value for key, value in found.items() if key == name}

    def flush(self, timeout_seconds: int = 300) -> None:
        """Nothing waits: what was logged has been sent."""

    def complete(self, **ignored: Any) -> None:
        """The run is finished when the script ends, without an error."""

    def fail(self, error_details: Any = None, error_code: Any = None, **ignored: Any) -> None:
        """The run is to count as failed, even if the script ends in good order."""
        text = " ".join(str(each) for each in (error_code, error_details) if each)
        self._run.book.finish("failed", text or "the script said so")

    def register_model(
        self,
        model_name: str,
        model_path: str | None = None,
        tags: Mapping[str, Any] | None = None,
        properties: Mapping[str, Any] | None = None,
        description: str | None = None,
        **ignored: Any,
    ) -> Model:
        """The next version of a model. model_path: a file or folder, as the script sees it; MODEL_NAME by default."""
        place = Path(model_path or model_name)
        if not place.exists():
            raise SpecError(
                f"register_model: there is no file or folder {str(place)!r} in {Path.cwd()}",
                hint="What a script writes for later lies in outputs/, such as outputs/model.pkl.",
            )
        uri = self._run.register(
            place, model_name, properties=properties, tags=tags, description=description, as_files=True
        )
        log.warning("registered %s as %s", place, uri)
        return Model._registered(uri, tags, properties, description)

    def _step(self, what: str) -> int:
        step = self._steps.get(what, -1) + 1
        self._steps[what] = step
        return step


class Experiment(_Partial):
    """``run.experiment``: its name, and the workspace."""

    def __init__(self, workspace: Workspace, name: str, **ignored: Any) -> None:
        self.workspace, self.name = workspace, name


class Workspace(_Partial):
    """``run.experiment.workspace``: to be passed on, to ``Dataset`` and ``Model``."""

    name = "tally"

    @classmethod
    def from_config(cls, *arguments: Any, **ignored: Any) -> Workspace:
        return cls()


class Dataset(_Partial):
    """A table. id: as ``--train_sets`` and ``--test_sets`` have it. name: as ``--data NAME=PLACE`` has it."""

    def __init__(self, place: str, name: str | None = None) -> None:
        self.id, self.name = place, name or Path(place).stem

    @classmethod
    def get_by_id(cls, workspace: Any = None, id: str = "", **ignored: Any) -> Dataset:  # noqa: A002
        """The table whose id the script was given: its file."""
        if not Path(id).exists():
            raise SpecError(
                f"Dataset.get_by_id: there is no table {id!r}",
                hint="'tally train script ... --train-set LABELS IMAGES' passes the table LABELS by such an id.",
            )
        return cls(id)

    @classmethod
    def get_by_name(cls, workspace: Any = None, name: str = "", **ignored: Any) -> Dataset:
        """The data that the command calls by this name."""
        known = Run.get_context()._run.data
        if name not in known:
            raise SpecError(
                f"Dataset.get_by_name: the command names no data {name!r}",
                hint=f"Say where it is: tally train script ... --data {name}=FILE"
                + (f"; it names {', '.join(sorted(known))}." if known else "."),
            )
        return cls(known[name], name)

    def to_pandas_dataframe(self, **ignored: Any) -> Any:
        """The table, as pandas reads the file. Raises SpecError for what is no table, RunError without pandas."""
        try:
            import pandas
        except ImportError:
            raise RunError(
                "to_pandas_dataframe needs pandas, which is not installed", hint="pip install pandas"
            ) from None
        path = Path(self.id)
        match path.suffix.lower():
            case ".csv":
                return pandas.read_csv(path)
            case ".tsv":
                return pandas.read_csv(path, sep="\t")
            case ".parquet":
                return pandas.read_parquet(path)
            case ".jsonl" | ".ndjson":
                return pandas.read_json(path, lines=True)
        raise SpecError(f"{path} is no table that can be read here", hint=f"Tables end in {', '.join(TABLES)}.")


class Model(_Partial):
    """A registered version, and how one is registered or found."""

    def __init__(self, workspace: Any = None, name: str = "", version: int | None = None, **ignored: Any) -> None:
        self.name, self.version = name, version
        self.id = f"{name}:{version}" if version is not None else name
        self.tags: dict[str, Any] = {}
        self.properties: dict[str, Any] = {}
        self.description: str | None = None

    @classmethod
    def _registered(cls, uri: str, tags: Any, properties: Any, description: str | None) -> Model:
        name, _, number = uri.removeprefix("models:/").partition("/")
        found = cls(None, name, int(number))
        found.tags, found.properties, found.description = dict(tags or {}), dict(properties or {}), description
        return found

    @classmethod
    def register(
        cls,
        workspace: Any = None,
        model_path: str | None = None,
        model_name: str | None = None,
        tags: Mapping[str, Any] | None = None,
        properties: Mapping[str, Any] | None = None,
        description: str | None = None,
        **ignored: Any,
    ) -> Model:
        """As ``Run.register_model``, of the script's run."""
        if not model_name:
            raise SpecError("Model.register: model_name is missing")
        return Run.get_context().register_model(model_name, model_path, tags, properties, description)

    @staticmethod
    def get_model_path(model_name: str, version: int | None = None, _workspace: object = None) -> str:
        """The file or folder of a model below ``AZUREML_MODEL_DIR``."""
        from tally.scorers.scripts.azureml import Model as Scored

        return Scored.get_model_path(model_name, version)


PROVIDED: dict[str, Any] = {
    "Dataset": Dataset, "Experiment": Experiment, "Model": Model, "Run": Run, "Workspace": Workspace,
}  # fmt: skip


def missing(module: str, name: str) -> ImportError:
    """What is raised for a name that is not here."""
    return ImportError(
        f"{module}.{name} is not provided by 'tally train script', which provides "
        f"{', '.join(f'azureml.core.{each}' for each in PROVIDED)}"
    )
