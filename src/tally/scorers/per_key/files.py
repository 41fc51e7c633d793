"""One model file for each key: ``models/{Device}_{Tag}.skops`` and the columns ``Device`` and ``Tag``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tally.errors import ModelError, ModelLoadError, ModelNotFoundError, SpecError, TallyError, UntrustedModelError
from tally.models.hashing import counts
from tally.scorers.base import Scorer
from tally.scorers.per_key.batched_svms import Integers, Stack, Svm, Svms, parameters
from tally.scorers.per_key.keys import (
    DETECTOR,
    OPEN_MODELS,
    Key,
    KeyIndex,
    ModelPerKey,
    columns_differ,
    key_of,
    or_error,
)
from tally.scorers.per_key.packed import Model, Written, agreed_features, write
from tally.scorers.tabular import tables
from tally.scorers.tabular.sklearn import scorer_of

if TYPE_CHECKING:
    import pyarrow as pa

_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


def find(template: str, by: Sequence[str]) -> tuple[Path, tuple[str, ...]]:
    """The folder above all placeholders of a template, and the files in it that match, sorted, relative to it.

    ``{Device}`` stands for any part of one name. Raises SpecError if placeholders and ``by`` are not the same,
    ModelNotFoundError if no file matches.
    """
    _check_columns(template, by)
    parts = Path(template).parts
    first = next(index for index, part in enumerate(parts) if _PLACEHOLDER.search(part))
    folder = Path(*parts[:first])
    pattern = _pattern("/".join(parts[first:]))
    files = [name for name in _walk(folder, parts[first:]) if pattern.fullmatch(name)]
    if not files:
        there = f"the folder {folder} does not exist" if not folder.is_dir() else f"{folder} was searched"
        raise ModelNotFoundError(f"no model file matches {template!r}", hint=f"{there[0].upper()}{there[1:]}.")
    return folder, tuple(sorted(files))


def local_template(template: str, by: Sequence[str]) -> tuple[str, str | None]:
    """The template for :func:`find`; of a URL, whose objects are fetched, also the URL of the folder that they are in.

    Raises as :func:`find` does.
    """
    from tally.models.download import folder as fetched
    from tally.storage import is_url, open_store

    if not is_url(template):
        return template, None
    _check_columns(template, by)
    folder, within = template[: (cut := template.rindex("/", 0, template.index("{")))], template[cut + 1 :]
    pattern = _pattern(within)
    depth = within.count("/")
    entries = open_store(folder).list(enter=lambda name: name.count("/") < depth)
    names = [entry.name for entry in entries if pattern.fullmatch(entry.name) and counts(entry.name)]
    if not names:
        raise ModelNotFoundError(f"no model file matches {template!r}", hint=f"{folder} was searched.")
    return str(fetched(folder, names) / within), folder


def _check_columns(template: str, by: Sequence[str]) -> None:
    named = list(dict.fromkeys(_PLACEHOLDER.findall(template)))
    problems = [f"{template}: {{{name}}} is no column of the key ({', '.join(by)})" for name in named if name not in by]
    problems += [f"{template}: the column {name} of the key chooses no model" for name in by if name not in named]
    if problems:
        raise SpecError(problems, hint="For example: --model-per Device,Tag='models/{Device}_{Tag}.skops'")


def _walk(folder: Path, parts: Sequence[str], above: str = "") -> Iterator[str]:
    """Files below a folder whose path is made of names like ``parts``. Hidden ones are left out."""
    part, rest = parts[0], parts[1:]
    if _PLACEHOLDER.search(part):
        pattern = _pattern(part)
        try:
            names = [name for name in os.listdir(folder / above) if pattern.fullmatch(name)]
        except OSError:
            return
        names = [name for name in names if not name.startswith(".") or part.startswith(".")]
    else:
        names = [part]
    for name in names:
        path = f"{above}{name}"
        if rest:
            yield from _walk(folder, rest, f"{path}/")
        elif (folder / path).is_file():
            yield path


def _pattern(template: str, *, lazy: bool = False) -> re.Pattern[str]:
    """What paths of models look like; its groups are the placeholders in the order in which they first appear."""
    text, seen = "", list[str]()
    for index, piece in enumerate(_PLACEHOLDER.split(template)):
        if index % 2 == 0:
            text += re.escape(piece)
        elif piece in seen:
            text += f"(?P=c{seen.index(piece)})"
        else:
            text += f"(?P<c{len(seen)}>[^/]+{'?' if lazy else ''})"
            seen.append(piece)
    return re.compile(text)


def read_key(template: str, file: str) -> Key:
    """The key that a file was made for. template: as :func:`find` takes it, without the folder.

    Raises SpecError where the name can be read in more than one way. The values are in the order in which the
    template first names them.
    """
    greedy, lazy = (_pattern(template, lazy=lazy).fullmatch(file) for lazy in (False, True))
    if greedy is None or lazy is None or greedy.groups() != lazy.groups():
        found = " or ".join(", ".join(each.groups()) for each in (greedy, lazy) if each)
        raise SpecError(f"{file}: cannot tell {template} apart: {found or 'it does not match'}")
    return greedy.groups()


def columns_of(template: str) -> list[str]:
    """The placeholders of a template, in the order in which it first names them."""
    return list(dict.fromkeys(_PLACEHOLDER.findall(template)))


class KeyedOptions(tables.TableOptions):
    """Options of a keyed scorer, as :func:`inspect` completes them.

    folder, files: where the models are. template: of the files' names, within the folder.
    names, count, columns: what the first model takes and gives, and so all others have to.
    """

    folder: str
    template: str
    files: list[str]
    by: list[str]
    names: list[str] | None = None
    count: int | None = None
    columns: dict[str, str] | None = None
    trusted: bool = False
    assumed: tuple[str, ...] = ()


def inspect(
    template: str,
    by: Sequence[str],
    folder: Path,
    files: Sequence[str],
    options: Mapping[str, Any],
    *,
    trusted: bool,
) -> dict[str, Any]:
    """Look at the first of many models that can be opened, and fill in every option that was left out.

    template: within the folder. folder, files: as :func:`find` returns them. Returns options (JSON-able) for
    :class:`KeyedScorer`. Raises SpecError with every problem, UntrustedModelError, and ModelLoadError if no model
    can be opened.
    """
    if problems := tables.TableOptions.problems_in(options):
        raise SpecError([f"{template}: {each}" for each in problems])
    given = tables.TableOptions.model_validate(dict(options))
    failed: list[TallyError] = []
    for file in files:
        try:
            member = open_model(folder, file, given.features, trusted=trusted)
            break
        except UntrustedModelError:
            raise
        except ModelError as error:
            failed.append(error)
    else:
        raise ModelLoadError(
            f"none of the {len(files):,} models can be opened: {failed[0].message}", hint=failed[0].hint
        )
    features = member.features
    names = None if isinstance(features, int) or features is None else list(features)
    count = features if isinstance(features, int) else None if names is None else len(names)
    assumed = [f"{each.message}: rows of that key are going to fail" for each in failed]
    if names is None and count is not None:
        assumed.append(tables.assumed_features(count, "the models were"))
    found = KeyedOptions(
        **given.model_dump(),
        folder=str(folder.absolute()),
        template=template,
        files=list(files),
        by=list(by),
        names=names,
        count=count,
        columns=None if member.columns is None else dict(member.columns),
        trusted=trusted,
        assumed=tuple(assumed),
    )
    return found.model_dump(mode="json")


@dataclass(frozen=True, slots=True)
class Opened:
    """One model, open. stacked: its parameters, if it is to be scored together with others; else ``scorer``.
    estimator: of scikit-learn, if it is one."""

    features: Sequence[str] | int | None
    columns: Mapping[str, str] | None
    stacked: Svm | None = None
    scorer: Scorer | None = None
    estimator: Any = None


def open_model(
    folder: Path,
    file: str,
    features: Sequence[str] | int | None,
    *,
    trusted: bool,
    device: str = "cpu",
    called: str | None = None,
) -> Opened:
    """Open one model file that takes ``features``. called: what messages call the folder.

    Raises ModelNotFoundError, ModelLoadError, UntrustedModelError, SpecError.
    """
    from tally.scorers.tabular.sklearn import FORMATS, open_estimator

    path = folder / file
    name = f"{called or folder.name}/{file}"
    if path.suffix.lower() == ".onnx":
        from tally.scorers.tabular import onnx

        scorer = onnx.OnnxTableScorer(
            onnx.inspect(path, {} if features is None or isinstance(features, int) else {"features": features})
        )
        scorer.load(path.parent, device)
        return Opened(scorer.features, scorer.columns, scorer=scorer)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ModelLoadError(
            f"{name}: {path.suffix or 'files without a suffix'} cannot be scored here",
            hint=f"One model for each key is a file that ends in {', '.join(FORMATS)} or .onnx.",
        )
    estimator = open_estimator(path, format=kind, trusted=trusted, name=name)
    features = agreed_features(features, estimator, name)
    svm = parameters(estimator)
    if svm is not None:
        return Opened(features, DETECTOR, stacked=svm, estimator=estimator)
    alone = scorer_of(estimator, features)
    return Opened(features, alone.columns, scorer=alone, estimator=estimator)


class KeyedScorer(ModelPerKey):
    """Scores tables with one model file for each key; options as :func:`inspect` returns them.

    Models are opened when their key first comes, and ``OPEN_MODELS`` of them are kept open. One-class SVMs are scored
    together, others one after another.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = KeyedOptions.complete(options)
        super().__init__(
            by=self.options.by,
            features=self.options.features or self.options.names or self.options.count,
            columns=self.options.columns,
            batch_size=self.options.batch_size,
        )
        self._folder, self._device = Path(self.options.folder), "cpu"
        self._called = self._folder.name  # wherever a machine has it: the same key fails with the same words
        self._numbers = {name: number for number, name in enumerate(self.options.files)}
        self._members = lru_cache(OPEN_MODELS)(self._member)

    def load(self, artifacts: Path, device: str) -> None:
        self._folder, self._device = artifacts, device

    def lacks(self, key: Mapping[str, Any]) -> str | None:
        found = key_of(self.by, key)
        if found is not None and self._path(found) in self._numbers:
            return None
        if found is None:
            return f"{' and '.join(name for name in self.by if key[name] is None)} is null, which chooses no model"
        return f"there is no model {self._called}/{self._path(found)}"

    def _path(self, key: Sequence[str]) -> str:
        values = dict(zip(self.by, key, strict=True))
        return _PLACEHOLDER.sub(lambda found: values[found[1]], self.options.template)

    def _find(self, keys: Sequence[pa.Array]) -> Integers:
        index = KeyIndex.of_rows(keys)
        numbers = [self._numbers.get(self._path(key), -1) for key in index]
        return np.append(np.array(numbers, np.int64), -1)[index.find(keys)]

    def _stack(self, present: Integers) -> tuple[Stack | None, Integers]:
        members = {number: self._members(number) for number in present.tolist()}
        svms = {number: each.stacked for number, each in members.items() if isinstance(each, Opened) and each.stacked}
        places = np.full(len(self._numbers), -1)
        places[list(svms)] = np.arange(len(svms))
        return (Stack(Svms.of(list(svms.values()))) if svms else None), places

    def _member(self, number: int) -> Opened | TallyError:
        file = self.options.files[number]

        def open_one() -> Opened:
            opened = open_model(
                self._folder,
                file,
                self.features,
                trusted=self.options.trusted,
                device=self._device,
                called=self._called,
            )
            if problem := columns_differ(opened.columns, self.columns, f"{self._called}/{file}"):
                raise ModelLoadError(problem)
            return opened

        return or_error(open_one)

    def _open(self, number: int) -> Scorer:
        member = self._members(number)
        if isinstance(member, TallyError):
            raise member
        assert member.scorer is not None
        return member.scorer

    def describe(self) -> str:
        count = len(self._numbers)
        return f"{count:,} model file{'' if count == 1 else 's'} by {', '.join(self.by)}, batch {self.batch_size}"


# ----------------------------------------------------------------------------------------------------- packing


def pack(template: str, by: Sequence[str], folder: Path, *, name: str | None = None, trusted: bool = False) -> Written:
    """Put the models that match a template into one package; see :func:`tally.scorers.per_key.packed.write`.

    The values of keys are what stands in the files' names: whole numbers in a column where all are, else text.
    Raises ModelLoadError with every file that cannot be packed, and what :func:`find` and ``write`` raise.
    """
    template, _ = local_template(template, by)
    above, files = find(template, by)
    within = Path(template).relative_to(above).as_posix()
    keys, problems = [], []
    for file in files:
        try:
            keys.append(dict(zip(columns_of(within), read_key(within, file), strict=True)))
        except SpecError as error:
            problems.append(error.message)
    if problems:
        raise SpecError(_some(problems), hint="Choose names in which one value cannot run into the next.")
    whole = {column for column in by if all(str(_number(key[column])) == key[column] for key in keys)}

    def models() -> Iterator[Model]:
        failed = []
        for file, key in zip(files, keys, strict=True):
            try:
                opened = open_model(above, file, None, trusted=trusted)
            except UntrustedModelError:
                raise
            except TallyError as error:
                failed.append(error.message)
                continue
            if opened.estimator is None:
                failed.append(f"{above.name}/{file}: only scikit-learn models are packed; use --model-per for others")
            elif not failed:
                yield Model(
                    {column: int(key[column]) if column in whole else key[column] for column in by}, opened.estimator
                )
        if failed:
            raise ModelLoadError(
                f"{len(failed):,} of {len(files):,} models cannot be packed:\n- " + "\n- ".join(_some(failed)),
                hint="Nothing was written.",
            )

    return write(folder, models(), by=by, name=name, trusted=trusted)


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _some(lines: Sequence[str], count: int = 20) -> list[str]:
    return [*lines[:count], *([f"and {len(lines) - count:,} more"] if len(lines) > count else [])]
