"""Scoring scripts in the Azure ML manner: a file with ``init()`` and ``run(...)``, run unchanged."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np

from tally.errors import ItemError, ModelLoadError, SpecError, TallyError
from tally.scorers.base import Input, Item, Result, Results, Scorer
from tally.scorers.scripts import azureml

if TYPE_CHECKING:
    import pyarrow as pa

Form: TypeAlias = Literal["mini_batch", "dataframe", "raw", "bytes", "json"]
"""What ``run`` takes.

mini_batch: a list of local file paths (``str``); returns a list, array or DataFrame with one result per file.
dataframe: a ``pandas.DataFrame`` of rows of a table; returns one result per row in the same manner.
raw: an ``AMLRequest`` whose body is the item's content (``@rawhttp``). bytes: that content itself.
json: that content as text. The last three are called once per item.
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
    raw: whether ``run`` is decorated with ``@rawhttp``. frame: whether that parameter is said to be a DataFrame.
    """

    names: frozenset[str]
    parameter: str | None = None
    raw: bool = False
    frame: bool = False

    @property
    def is_script(self) -> bool:
        return "run" in self.names or "init" in self.names


def outline(path: Path) -> Outline:
    """Raises ModelLoadError if the file is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the script's own style
            tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        text = f": {error.text.strip()}" if error.text else ""
        raise ModelLoadError(f"{path} is not valid Python, line {error.lineno}: {error.msg}{text}") from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read as Python: {error}") from None
    names: set[str] = set()
    parameter, raw, frame = None, False, False
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
            raw = any(_last_name(each) == "rawhttp" for each in node.decorator_list)
            frame = bool(arguments) and _is_frame(arguments[0].annotation)
    return Outline(frozenset(names), parameter, raw, frame)


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


def load_module(path: Path, *, argv: Sequence[str] = ()) -> ModuleType:
    """Run a Python file as a module of its own, its folder importable.

    argv: what the file finds in ``sys.argv[1:]`` meanwhile. Raises ModelLoadError when it fails.
    """
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = f"tally_script_{sha256(os.fsencode(path)).hexdigest()[:12]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelLoadError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    with explained(path, "importing it", argv=argv):
        spec.loader.exec_module(module)
    return module


class explained:  # noqa: N801 - used like a function
    """``with explained(path, doing):`` turns what user code raises into a ModelLoadError that names the line."""

    def __init__(self, path: Path, doing: str, *, argv: Sequence[str] = ()) -> None:
        self.path = path
        self.doing = doing
        self.argv = [str(path), *argv]

    def __enter__(self) -> None:
        self.before, sys.argv = sys.argv, self.argv

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        sys.argv = self.before
        # A script that calls sys.exit() must not end the worker.
        if not isinstance(error, (Exception, SystemExit)) or isinstance(error, TallyError):
            return
        line = None
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == str(self.path):
                line = trace.tb_lineno
            trace = trace.tb_next
        where = f"{self.path.name}, line {line}" if line else self.path.name
        hint = None
        if isinstance(error, ModuleNotFoundError) and error.name:
            hint = f"Install {error.name.split('.')[0]!r} into the environment that runs Tally ({sys.prefix})."
        elif isinstance(error, FileNotFoundError) and self.doing == "init()":
            hint = f"AZUREML_MODEL_DIR was {os.environ.get('AZUREML_MODEL_DIR')!r}; --artifacts sets it."
        raise ModelLoadError(
            f"{self.path}: {self.doing} failed: {type(error).__name__}: {error} ({where})", hint=hint
        ) from error


class ScriptScorer(Scorer):
    """Scores with a script's ``init()`` and ``run()``.

    form: see :data:`Form`; ``auto`` tells it from the script. arguments: what the script finds in
    ``sys.argv[1:]`` during ``init()``. columns: as in :class:`Scorer`. features: the columns that a DataFrame has;
    all of the table's if left out.
    Raises SpecError when the script is not one.
    """

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
        self._module: ModuleType | None = None
        self._run: Callable[[Any], Any] | None = None

    def load(self, artifacts: Path, device: str) -> None:
        """Import the script, and call ``init()`` with ``AZUREML_MODEL_DIR`` set to ``artifacts``."""
        azureml.provide()
        os.environ["AZUREML_MODEL_DIR"] = str(Path(artifacts).absolute())
        self._module = load_module(self.script, argv=self.arguments)
        for name in ("init", "run"):
            if not callable(getattr(self._module, name, None)):
                raise ModelLoadError(f"{self.script} defines no {name}()")
        with explained(self.script, "init()", argv=self.arguments):
            self._module.init()
        self._run = self._module.run

    def prepare(self, item: Item) -> Any:
        if self.form == "mini_batch":
            return str(item.value)
        if self.form == "raw":
            return azureml.AMLRequest(item.value, filename=item.key.rpartition("/")[2])
        if self.form == "bytes":
            return item.value
        try:
            return item.value.decode()
        except UnicodeDecodeError as error:
            raise ItemError(
                f"{self.script.name} takes text (JSON), but this is not UTF-8 (byte {error.start})",
                stage="decode",
                hint="If run() takes the file's bytes, say so: --set form=bytes, or raw for an AMLRequest.",
            ) from None

    def score(self, batch: Any) -> Results:
        if self._run is None:
            raise TallyError("load() must come before score()")
        if self.form == "dataframe":
            return _frame_results(self._run, batch, self.features)
        if self.form != "mini_batch":
            return [_answer(self._run, value) for value in batch]
        return [_result(each) for each in _answers(_call(self._run, list(batch)), len(batch))]

    def describe(self) -> str:
        return f"{self.script.name}: run() takes {_TAKES[self.form]}"

    def close(self) -> None:
        # Azure ML calls shutdown() of a batch script, if there is one.
        shutdown = getattr(self._module, "shutdown", None)
        self._module = self._run = None
        if callable(shutdown):
            shutdown()


_TAKES: Mapping[Form, str] = {
    "mini_batch": "lists of file paths",
    "dataframe": "DataFrames",
    "raw": "requests (AMLRequest)",
    "bytes": "a file's bytes",
    "json": "a file's text",
}


def _call(run: Callable[[Any], Any], value: Any) -> Any:
    try:
        return run(value)
    except SystemExit as error:
        raise ItemError(f"the script called sys.exit({error.code!r})") from None


def _answer(run: Callable[[Any], Any], value: Any) -> Result:
    try:
        return result_of(_call(run, value))
    except Exception as error:
        return error


def _result(answer: Any) -> Result:
    try:
        return result_of(answer)
    except ItemError as error:
        return error


def _frame_results(run: Callable[[Any], Any], table: pa.Table, features: Sequence[str] | int | None) -> Results:
    """What ``run`` answers for the rows of a table."""
    from tally.scorers.tabular import tables

    returned = _call(run, tables.frame(tables.features_of(table, features)))
    if (found := tables.answered(returned, table.num_rows)) is not None:
        return found
    return [_result(each) for each in _answers(returned, table.num_rows, "row")]


def _answers(returned: Any, count: int, what: str = "file") -> Sequence[Any]:
    """What ``run`` returned for ``count`` files or rows, as ``count`` answers. Raises TallyError if it is not."""
    given = f"a mini-batch of {count} file" if what == "file" else f"a DataFrame of {count} row"
    given += "" if count == 1 else "s"
    several = "Several rows for one file are a list of dicts; an" if what == "file" else "An"
    hint = (
        f"Return one result per {what}, in the {what}s' order: a list, an array or a DataFrame. "
        f"{several} exception object marks a {what} that failed."
    )
    if isinstance(returned, str):
        returned = _parsed(returned)
    if hasattr(returned, "to_pylist"):  # pyarrow
        returned = returned.to_pylist()
    elif hasattr(returned, "iloc"):  # pandas
        returned = _records(returned)
    elif isinstance(returned, np.ndarray) and returned.ndim > 0:
        returned = list(returned)
    if not isinstance(returned, (list, tuple)):
        raise TallyError(f"run() returned {_noun(returned)} for {given}", hint=hint)
    if len(returned) != count:
        raise TallyError(f"run() returned {len(returned)} results for {given}", hint=hint)
    return returned


def _noun(value: Any) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"


def _records(frame: Any) -> list[Any]:
    """Rows of a pandas DataFrame as dicts, or values of a Series. Pandas itself is never imported here."""
    return cast("list[Any]", frame.to_dict("records") if hasattr(frame, "columns") else frame.tolist())


def result_of(answer: Any) -> Result:
    """A script's answer for one item as a row or rows.

    A dict is a row, a list of dicts are rows; JSON text is parsed first; anything else becomes
    ``{"prediction": answer}``. Raises ItemError for an answer with status 400 and more, or none at all.
    """
    if isinstance(answer, Exception):
        return answer
    if hasattr(answer, "status_code") and hasattr(answer, "get_data"):
        if answer.status_code >= 400:
            text = " ".join(answer.get_data(as_text=True).split())
            raise ItemError(f"the script answered {answer.status_code}: {text[:500] or 'without a body'}")
        answer = answer.get_data()
    if isinstance(answer, (bytes, bytearray)):
        try:
            answer = answer.decode()
        except UnicodeDecodeError:
            return {"prediction": bytes(answer)}
    if isinstance(answer, str):
        answer = _parsed(answer)
    elif hasattr(answer, "iloc"):
        answer = _records(answer)
    if answer is None:
        raise ItemError(
            "run() returned nothing for this item",
            hint="Return a dict, a list of dicts, a value, or JSON text.",
        )
    answer = plain(answer)
    if isinstance(answer, dict) or (isinstance(answer, list) and all(isinstance(each, dict) for each in answer)):
        return cast("Result", answer)
    return {"prediction": answer}


def _parsed(text: str) -> Any:
    # Only what is certainly JSON: a class called "7" or "null" stays the text that it is.
    if text.lstrip()[:1] in ("{", "[", '"'):
        try:
            return json.loads(text)
        except ValueError:
            pass
    return text


def plain(value: Any) -> Any:
    """The same value without NumPy's types, paths and tuples."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
