"""Scoring scripts in the Azure ML manner: a file with ``init()`` and ``run(...)``, run unchanged."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import logging
import os
import sys
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib.machinery import SOURCE_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tally.errors import ItemError, ModelLoadError, SpecError, TallyError, error_line, is_interrupt, raised_at
from tally.scorers.base import Input, Item, Request, Response, Result, Results, Scorer
from tally.scorers.run import item_error
from tally.scorers.scripts import azureml, modules, requests
from tally.scorers.scripts.answers import answers_of, result_of
from tally.scorers.scripts.isolation import Surroundings
from tally.scorers.scripts.sources import put_first

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

Form: TypeAlias = Literal["mini_batch", "dataframe", "raw", "bytes", "json"]
"""What ``run`` takes.

mini_batch: a list of local file paths (``str``); returns a list, array or DataFrame with one result per file.
dataframe: a ``pandas.DataFrame`` of rows of a table; returns one result per row in the same manner.
raw: an ``AMLRequest`` whose body is the item's content (``@rawhttp``). bytes: that content itself.
json: that content as text; where ``run`` declares its arguments with ``@input_schema``, those in the JSON object, by
name. The last three are called once per item.
"""

INPUTS: Mapping[str, Input] = {
    "mini_batch": "path",
    "dataframe": "table",
    "raw": "bytes",
    "bytes": "bytes",
    "json": "bytes",
}
TABLE_BATCH = 8192
"""Rows in one DataFrame, unless the user says otherwise."""

_FORM_OF_PARAMETER: Mapping[str, Form] = {
    **dict.fromkeys(("mini_batch", "minibatch", "files", "paths", "file_list", "file_paths"), "mini_batch"),
    **dict.fromkeys(("df", "dataframe", "data_frame", "frame"), "dataframe"),
    **dict.fromkeys(("image", "image_bytes", "content", "body", "raw_bytes"), "bytes"),
    **dict.fromkeys(("data", "raw_data", "request", "input_data", "raw_input", "json_data", "payload"), "json"),
}


@dataclass(frozen=True, slots=True)
class Outline:
    """What a Python file defines, found without running it.

    names: bound at top level. parameter: first one of ``run``, if ``run`` is defined here.
    raw: ``run`` is decorated with ``@rawhttp``. schema: with ``@input_schema`` (of the package inference-schema).
    frame: that parameter is annotated as a DataFrame.
    """

    names: frozenset[str]
    parameter: str | None = None
    raw: bool = False
    schema: bool = False
    frame: bool = False

    @property
    def is_script(self) -> bool:
        return "run" in self.names or "init" in self.names


_parsing = threading.Lock()
"""Python 3.11 counts the depth of all threads' syntax trees together: two at once fail with a SystemError."""


def outline(path: Path) -> Outline:
    """Raises ModelLoadError if the file is not valid Python."""
    try:
        with _parsing, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the script's own style
            tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        text = f": {error.text.strip()}" if error.text else ""
        raise ModelLoadError(f"{path} is not valid Python, line {error.lineno}: {error.msg}{text}") from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read as Python: {error}") from None
    names: set[str] = set()
    parameter, raw, schema, frame = None, False, False, False
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        if isinstance(node, ast.FunctionDef) and node.name == "run":
            arguments = [*node.args.posonlyargs, *node.args.args]
            parameter = arguments[0].arg if arguments else None
            decorators = {_last_name(each) for each in node.decorator_list}
            raw, schema = "rawhttp" in decorators, "input_schema" in decorators
            frame = bool(arguments) and _is_frame(arguments[0].annotation)
    return Outline(frozenset(names), parameter, raw, schema, frame)


def _is_frame(annotation: ast.expr | None) -> bool:
    if isinstance(annotation, ast.Constant):  # written as text
        return str(annotation.value).rpartition(".")[2] == "DataFrame"
    return annotation is not None and _last_name(annotation) == "DataFrame"


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def form_of(path: Path) -> Form:
    """The form of the script's ``run``: from its decorator, else from its parameter's annotation, else its name.

    Raises SpecError if ``init`` or ``run`` is missing, or the form cannot be told.
    """
    found = outline(path)
    if missing := [f"{name}()" for name in ("init", "run") if name not in found.names]:
        raise SpecError(
            f"{path} defines no {' and no '.join(missing)}",
            hint="A scoring script defines init(), called once, and run(...), called for the items: "
            "'tally new scorer NAME' writes an example.",
        )
    if found.raw:
        return "raw"
    if found.schema:
        return "json"
    if found.frame:
        return "dataframe"
    form = _FORM_OF_PARAMETER.get((found.parameter or "").lower())
    if form is None:
        raise SpecError(
            f"{path}: what run({found.parameter or ''}) takes cannot be told from its name",
            hint="Say it with --set form=mini_batch (a list of file paths), dataframe (rows of a table), raw (an "
            "AMLRequest), bytes (a file's content) or json (a file's text).",
        )
    return form


def load_module(path: Path) -> ModuleType:
    """Run a Python file as a module of its own. Its folder becomes importable for good: what it defines may import
    whenever it is called. Raises ModelLoadError when it fails.
    """
    put_first(path.parent)
    before, sys.argv = sys.argv, [str(path)]
    try:
        return _executed(path)
    finally:
        sys.argv = before


def _executed(path: Path) -> ModuleType:
    name, spec = modules.name_of(path), modules.spec_of(path)
    if spec is None or spec.loader is None or path.suffix not in SOURCE_SUFFIXES:
        raise ModelLoadError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    with explained(path, "importing it"):
        spec.loader.exec_module(module)
    return module


@contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turns what user code raises into a ModelLoadError that names the line."""
    try:
        yield
    except TallyError:
        raise
    except BaseException as error:  # a script that calls sys.exit() must not end the worker
        if is_interrupt(error):
            raise
        hint = None
        if isinstance(error, ModuleNotFoundError) and error.name:
            hint = f"Install {error.name.split('.')[0]!r} into the environment that runs Tally ({sys.prefix})."
        elif isinstance(error, FileNotFoundError) and doing == "init()":
            hint = f"AZUREML_MODEL_DIR was {os.environ.get('AZUREML_MODEL_DIR')!r}; --artifacts sets it."
        elif isinstance(error, SystemExit):
            hint = (
                f"The script ended itself, as argparse does that misses an argument: it was given {sys.argv[1:]}; "
                "--set 'arguments=[--name, value]' gives others. The job's log has what it printed: tally jobs log JOB"
            )
        place = raised_at(error, str(path)) or path.name
        raise ModelLoadError(f"{path}: {doing} failed: {error_line(error)} ({place})", hint=hint) from error


class ScriptScorer(Scorer):
    """Scores with a script's ``init()`` and ``run()``.

    form: see :data:`Form`; ``auto`` tells it from the script. arguments: what the script finds in ``sys.argv[1:]``.
    columns: as in :class:`Scorer`. features: the columns that a DataFrame has; by default all of the table's.
    Raises SpecError when the script is not one.

    The script has surroundings of its own in the process, and waits while another script runs: see
    :mod:`tally.scorers.scripts.isolation`.
    """

    features: Sequence[str] | None = None

    def __init__(
        self,
        script: str | Path,
        *,
        form: Form | Literal["auto"] = "auto",
        arguments: Sequence[str] = (),
        columns: Mapping[str, str] | None = None,
        batch_size: int | None = None,
        features: Sequence[str] | None = None,
    ) -> None:
        self.script = Path(script).absolute()
        self.form: Form = form_of(self.script) if form == "auto" else form
        self.input = INPUTS[self.form]
        self.arguments = list(arguments)
        self.columns = columns
        if features is not None and self.form != "dataframe":
            raise SpecError(
                f"features: {self.script.name} takes {_TAKES[self.form]}, not rows of a table",
                hint="If run() takes a DataFrame, say so: --set form=dataframe.",
            )
        self.features = features
        if batch_size is not None:
            self.batch_size = batch_size
        elif self.form == "dataframe":
            self.batch_size = TABLE_BATCH
        self._surroundings: Surroundings | None = None
        self._module: ModuleType | None = None
        self._by_name = self._with_headers = False

    def load(self, artifacts: Path, device: str) -> None:
        """Import the script, and call ``init()`` with ``AZUREML_MODEL_DIR`` set to ``artifacts``."""
        azureml.provide()
        variables = {"AZUREML_MODEL_DIR": str(Path(artifacts).absolute())}
        self._surroundings = Surroundings(self.script, arguments=self.arguments, variables=variables)
        with self._surroundings.entered():
            module = _executed(self.script)
            for name in ("init", "run"):
                if not callable(getattr(module, name, None)):
                    raise ModelLoadError(f"{self.script} defines no {name}()")
            with explained(self.script, "init()"):
                module.init()
        self._by_name = outline(self.script).schema
        self._with_headers = "request_headers" in _parameters(module.run)
        self._module = module

    def prepare(self, item: Item) -> Any:
        if self.form == "mini_batch":
            return str(item.value)
        if self.form == "raw":
            return azureml.AMLRequest(item.value, filename=item.key.rpartition("/")[2])
        if self.form == "bytes":
            return item.value
        try:
            return requests.text_of(item.value)
        except requests.RefusedError as error:
            raise ItemError(
                f"{self.script.name} takes text (JSON), but this is {error}",
                stage="decode",
                hint="If run() takes the file's bytes, say so: --set form=bytes, or raw for an AMLRequest.",
            ) from None

    def score(self, batch: Any) -> Results:
        with self._running():
            if self.form not in ("mini_batch", "dataframe"):
                return [self._result(value) for value in batch]
            try:
                if self.form == "dataframe":
                    return self._frame_results(batch)
                return [result_of(each) for each in answers_of(self._run(list(batch)), len(batch))]
            except SystemExit as error:
                raise _exited(error) from None

    def respond(self, request: Request) -> Response:
        """Answer a request with what ``run`` makes of it.

        A script of the forms mini_batch, dataframe and bytes is for POST alone. One that takes JSON is given the
        fields of the query where the method is GET, as by Azure ML. What it raises is answered with status 500,
        which names the line and not the message: that may hold secrets, and goes to the log.
        """
        with self._running(), ExitStack() as files:
            try:
                value = requests.value_of(request, self.form, self.features, files)
                answer = self._run(value, request.headers)
            except requests.RefusedError as error:
                return requests.refusal(error.status, str(error))
            except BaseException as error:
                if is_interrupt(error):
                    raise
                return self._failed(error)
            if isinstance(answer, Exception):
                return self._failed(answer)
            try:
                if self.form == "mini_batch":
                    [answer] = answers_of(answer, 1)
                return requests.response_of(answer)
            except (TallyError, TypeError) as error:
                return requests.failure(str(error))

    def _failed(self, error: BaseException) -> Response:
        log.error("run() of %s failed", self.script, exc_info=error)
        place = raised_at(error, str(self.script)) or raised_at(error) or self.script.name
        return requests.failure(f"{type(error).__name__} in run() ({place})")

    def describe(self) -> str:
        return f"{self.script.name}: run() takes {_TAKES[self.form]}"

    def close(self) -> None:
        """Call ``shutdown()`` of the script, if there is one, as Azure ML does."""
        module, self._module = self._module, None
        shutdown = getattr(module, "shutdown", None)
        if callable(shutdown) and self._surroundings is not None:
            with self._surroundings.entered():
                shutdown()

    def _running(self) -> AbstractContextManager[None]:
        if self._module is None or self._surroundings is None:
            raise TallyError("load() must come before score()")
        return self._surroundings.entered()

    def _run(self, value: Any, headers: Mapping[str, str] | None = None) -> Any:
        assert self._module is not None
        more = {"request_headers": dict(headers or {})} if self._with_headers else {}
        if self._by_name and self.form == "json":
            return self._module.run(**requests.fields_of(value), **more)
        return self._module.run(value, **more)

    def _result(self, value: Any) -> Result:
        """One item's result, or what ``run`` raised."""
        try:
            return result_of(self._run(value))
        except SystemExit as error:
            return _exited(error)
        except Exception as error:
            return error
        except BaseException as error:
            if is_interrupt(error):
                raise
            return item_error(error)

    def _frame_results(self, table: pa.Table) -> Results:
        """What ``run`` answers for the rows of a table."""
        from tally.scorers.tabular import tables

        returned = self._run(tables.frame(tables.features_of(table, self.features)))
        if (found := tables.answered(returned, table.num_rows)) is not None:
            return found
        return [result_of(each) for each in answers_of(returned, table.num_rows, "row")]


def _exited(error: SystemExit) -> ItemError:
    return ItemError(f"the script called sys.exit({error.code!r})")


_TAKES: Mapping[Form, str] = {
    "mini_batch": "lists of file paths",
    "dataframe": "DataFrames",
    "raw": "requests (AMLRequest)",
    "bytes": "a file's bytes",
    "json": "a file's text",
}


def _parameters(function: Any) -> Collection[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some that are written in C
        return ()
