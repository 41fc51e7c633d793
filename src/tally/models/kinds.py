"""The kinds of model: one table.

A new framework is one file with its :class:`~tally.models.base.Kind` and its scorer, and one line in :data:`BUILT_IN`.
An installed package adds a kind by an entry point in the group ``tally.scorers``, whose name is the kind's and whose
value is a subclass of ``Kind``. What the table claims comes before what packages claim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from tally import extensions
from tally.errors import ModelLoadError, SpecError
from tally.models.base import Flag, Form, Kind, Traits, is_suffix
from tally.models.contents import content_of
from tally.models.reference import ModelRef

GROUP = "tally.scorers"
"""The entry points of other packages' kinds."""


class _Line(NamedTuple):
    """adapter: the Kind's class, imported when the kind is first used. libraries: what loading its models imports."""

    adapter: str
    traits: Traits
    libraries: tuple[str, ...] = ()


_SKLEARN, _MLFLOW, _TORCH = "tally-scoring[sklearn]", "tally-scoring[mlflow]", "tally-scoring[torch]"

BUILT_IN: Mapping[str, _Line] = {
    # Of kinds that claim the same names, the first that recognises the file is taken.
    "onnx": _Line(
        "tally.scorers.onnx.scorer:OnnxKind",
        Traits(claims=(".onnx",), flags=("task", "labels")),
        ("onnxruntime",),
    ),
    "onnx_table": _Line(
        "tally.scorers.tabular.onnx:OnnxTableKind",
        Traits(claims=(".onnx",), flags=("task", "labels")),
    ),
    "sklearn": _Line(
        "tally.scorers.tabular.sklearn:SklearnKind",
        Traits(
            claims=(".skops", ".joblib", ".pkl", ".pickle"),
            extra=_SKLEARN,
            runs_code=True,
            pickles=(".joblib", ".pkl", ".pickle"),
            forms=("pickle",),
        ),
        ("sklearn", "skops.io"),
    ),
    "xgboost": _Line(
        "tally.scorers.tabular.boosters.xgboost:XgboostKind",
        Traits(claims=(".ubj",), flags=("labels",), extra="tally-scoring[xgboost]", forms=("xgboost",)),
        ("xgboost",),
    ),
    "lightgbm": _Line(
        "tally.scorers.tabular.boosters.lightgbm:LightgbmKind",
        Traits(claims=(".lgb",), flags=("labels",), extra="tally-scoring[lightgbm]", forms=("lightgbm",)),
        ("lightgbm",),
    ),
    "catboost": _Line(
        "tally.scorers.tabular.boosters.catboost:CatboostKind",
        Traits(claims=(".cbm",), flags=("labels",), extra="tally-scoring[catboost]", forms=("catboost",)),
        ("catboost",),
    ),
    "pyfunc": _Line(
        "tally.scorers.tabular.pyfunc:PyfuncKind",
        Traits(claims=("MLmodel",), extra=_MLFLOW, runs_code=True),
        ("mlflow.pyfunc",),
    ),
    "torch": _Line(
        "tally.scorers.torch.kind:TorchKind",
        Traits(
            claims=(".pt2", ".safetensors", ".pt", ".pth", ".th"),
            flags=("task", "labels"),
            extra=_TORCH,
            runs_code=True,
            weights=(".safetensors", ".pt", ".pth", ".th"),
        ),
        ("torch",),
    ),
    "transformers": _Line(
        "tally.scorers.transformers.kind:TransformersKind",
        Traits(claims=("config.json",), flags=("task", "labels"), extra="tally-scoring[transformers]"),
        ("torch", "transformers"),
    ),
    "keras": _Line(
        "tally.scorers.keras.models:KerasKind",
        Traits(
            claims=(".keras", ".h5", ".hdf5"),
            flags=("task", "labels"),
            extra="tally-scoring[keras]",
            runs_code=True,
            forms=("keras",),
        ),
    ),
    "litert": _Line(
        "tally.scorers.keras.litert:LitertKind",
        Traits(claims=(".tflite",), flags=("task", "labels"), extra="tally-scoring[litert]", forms=("tflite",)),
    ),
    "savedmodel": _Line(
        "tally.scorers.keras.savedmodel:SavedModelKind",
        Traits(claims=("saved_model.pb",), flags=("task", "labels"), extra="tally-scoring[tensorflow]", runs_code=True),
    ),
    "packed": _Line(
        "tally.scorers.per_key.packed:PackedKind",
        Traits(claims=(".parquet",), extra=_SKLEARN, runs_code=True),
    ),
    "keyed": _Line(
        "tally.scorers.per_key.files:PerKeyFilesKind",
        Traits(form="template", extra=_SKLEARN, runs_code=True),
    ),
    "script": _Line(
        "tally.scorers.scripts.kinds:ScriptKind",
        Traits(claims=(".py",), flags=("artifacts",), entry=True),
    ),
    "python": _Line(
        "tally.scorers.scripts.kinds:PythonKind",
        Traits(claims=(".py",), flags=("artifacts",), entry=True, form="class"),
    ),
    "object": _Line(
        "tally.scorers.scripts.pickled:ObjectKind",
        Traits(flags=("artifacts",), form="object"),
    ),
    "files": _Line("tally.scorers.scripts.files:FilesKind", Traits(claims=("tally-files.json",), scores=False)),
    "routed": _Line("tally.scorers.routed:RoutedKind", Traits(form="route")),
}


def get(name: str) -> Kind:
    """The kind of this name. Raises ModelLoadError if there is none, SpecError if its package cannot be used."""
    if name in BUILT_IN:
        return _built_in(name)
    found = extensions.find(GROUP, name)
    if found is None:
        raise ModelLoadError(
            f"models of kind {name!r} cannot be scored: no such kind is installed here",
            hint=f"Kinds are {', '.join(names())}. Install the package that brings {name!r}, on every machine.",
        )
    if not (isinstance(found, type) and issubclass(found, Kind)):
        raise SpecError(f"the entry point {name!r} in {GROUP} is {found!r}, not a subclass of tally.models.base.Kind")
    return found(name)


@cache
def _built_in(name: str) -> Kind:
    line = BUILT_IN[name]
    module, _, adapter = line.adapter.partition(":")
    kind: Kind = getattr(import_module(module), adapter)(name, line.traits)
    return kind


def extra_of(name: str) -> str:
    """The extra that brings what a kind of ours needs: ``sklearn``."""
    return (BUILT_IN[name].traits.extra or "").removeprefix("tally-scoring[").rstrip("]")


def names() -> list[str]:
    """The names of all kinds."""
    return [*BUILT_IN, *(each for each in extensions.names(GROUP) if each not in BUILT_IN)]


def has_files(name: str) -> bool:
    """Whether there is a kind of this name whose models are files, as a package holds them."""
    line = BUILT_IN.get(name)
    return bool(line.traits.claims) if line is not None else name in extensions.names(GROUP)


def table() -> Iterator[tuple[str, Traits]]:
    """Every kind's name and traits. Raises SpecError for an installed package that cannot be used, after the others."""
    for name, line in BUILT_IN.items():
        yield name, line.traits
    broken = None
    for name in extensions.names(GROUP):
        if name in BUILT_IN:
            continue
        try:
            yield name, get(name).traits
        except SpecError as error:
            broken = error
    if broken is not None:
        raise broken


def of_file(path: Path, wanted: str | None = None) -> Kind | None:
    """The kind of a file: the first that claims its name and recognises it, or, where none claims the name, that whose
    models have such a content. None if there is none.

    wanted: the kind that is taken if it does so too. Raises ModelLoadError for a file that is damaged.
    """
    if wanted is not None and (kind := get(wanted)).traits.claims_name(path.name) and kind.recognises(path):
        return kind
    for name, traits in table():
        if traits.claims_name(path.name) and (kind := get(name)).recognises(path):
            return kind
    if claiming(path.name) is not None or (found := _of_content(path)) is None:
        return None
    return get(found)


def _of_content(path: Path) -> str | None:
    content = content_of(path) if path.is_file() else None
    return None if content is None else next((name for name, traits in table() if content.form in traits.forms), None)


def modules_for(name: str) -> tuple[str, ...]:
    """The modules that a worker is going to import for a model with this name, as far as the name tells."""
    line = next((each for each in BUILT_IN.values() if each.traits.claims_name(name)), None)
    return () if line is None else (line.adapter.partition(":")[0], *line.libraries)


def of_form(form: Form) -> Kind:
    """The kind whose models are given in this form."""
    return next(get(name) for name, line in BUILT_IN.items() if line.traits.form == form)


def is_data(ref: ModelRef) -> bool:
    """Whether nothing of the model runs but what comes with Tally and the model's framework: neither code that it
    carries, nor a script, nor a kind of another package."""
    line = BUILT_IN.get(ref.kind)
    return line is not None and not ref.trusted and not line.traits.entry and line.traits.form in (None, "template")


def claiming(name: str) -> Traits | None:
    """The traits of the first kind that claims a file's name."""
    return next((traits for _, traits in table() if traits.claims_name(name)), None)


def claiming_file(path: Path) -> Traits | None:
    """The traits of the first kind that claims a file by its name; where none does, of the kind of such a content."""
    claimed = claiming(path.name)
    if claimed is None and (found := _of_content(path)) is not None:
        return get(found).traits
    return claimed


def of_name(name: str) -> Kind | None:
    """The first kind that claims a file's name; the file itself may say another."""
    return next((get(each) for each, traits in table() if traits.claims_name(name)), None)


def markers() -> Iterator[str]:
    """The files that make a folder a model."""
    return (marker for _, traits in table() for marker in traits.markers)


def marker_in(folder: Path) -> str | None:
    """The file that makes a folder a model, as its kind has it."""
    return next((each for each in markers() if (folder / each).is_file() and of_file(folder / each) is not None), None)


def taking(flag: Flag) -> list[str]:
    """The names of the kinds that take an option of the user."""
    return [name for name, traits in _usable() if flag in traits.flags]


def claims(*, entry: bool | None = None) -> list[str]:
    """What the names of models end in. entry: of code alone, or of all but code."""
    found = (each for _, traits in _usable() if entry in (None, traits.entry) for each in traits.claims)
    return list(dict.fromkeys(found))


def supported() -> str:
    """What a model may be, for messages."""
    claimed = list(dict.fromkeys(each for _, traits in _usable() if traits.scores for each in traits.claims))
    *suffixes, last = filter(is_suffix, claimed)
    folders = " or ".join(("tally.yaml", *(each for each in claimed if not is_suffix(each))))
    return f"{', '.join(suffixes)} and {last} files, and folders with a {folders}"


def _usable() -> Iterator[tuple[str, Traits]]:
    """As :func:`table`; what cannot be used is left out."""
    with suppress(SpecError):
        yield from table()
