"""One model file for each key: ``models/{Device}_{Tag}.skops`` and the columns ``Device`` and ``Tag``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tally.errors import ModelError, ModelLoadError, SpecError, TallyError, UntrustedModelError
from tally.models.base import Candidate, Kind, ModelRequest, merged
from tally.models.hashing import check_content, content_hash
from tally.models.mirror import errors_name, fetched, is_here, upload_to_mirror, uploaded_below
from tally.models.readable import check_readable, check_whole
from tally.models.reference import ModelRef
from tally.scorers.base import Scorer
from tally.scorers.per_key.batched_svms import BatchedSvms, Integers, Svm, Svms, parameters
from tally.scorers.per_key.keys import (
    DETECTOR,
    OPEN_MODELS,
    KeyIndex,
    ModelPerKey,
    columns_differ,
    key_of,
    or_error,
)
from tally.scorers.per_key.packed import Model, Written, agreed_features, write
from tally.scorers.per_key.templates import PLACEHOLDER, columns_of, find, local_template, read_key
from tally.scorers.tabular import tables
from tally.scorers.tabular.sklearn import FORMATS, open_estimator, scorer_of
from tally.storage import is_url
from tally.text import expanded

if TYPE_CHECKING:
    import pyarrow as pa


class PerKeyFilesOptions(tables.TableOptions):
    """Options of a scorer of one file for each key, as :func:`inspect` completes them.

    folder, files: where the models are. template: of the files' names, within the folder.
    broken: files that are no model, and why: their keys have none, until they are mended.
    names, count, columns: what the first model takes and gives, and so all others have to.
    """

    folder: str
    template: str
    files: list[str]
    broken: Mapping[str, str] = {}
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
    :class:`PerKeyFilesScorer`. Raises SpecError with every problem, UntrustedModelError, and ModelLoadError if no model
    can be opened.
    """
    if problems := tables.TableOptions.problems_in(options):
        raise SpecError([f"{template}: {each}" for each in problems])
    given = tables.TableOptions.model_validate(dict(options))
    failed = _unreadable(folder, files)
    for file in (each for each in files if each not in failed):
        try:
            member = open_model(folder, file, given.features, trusted=trusted)
            break
        except UntrustedModelError:
            raise
        except ModelError as error:
            failed[file] = error
    else:
        first = failed[files[0]]
        raise ModelLoadError(f"none of the {len(files):,} models can be opened: {first.message}", hint=first.hint)
    features = member.features
    names = None if isinstance(features, int) or features is None else list(features)
    count = features if isinstance(features, int) else None if names is None else len(names)
    assumed = [f"{each.message}: rows of that key are going to fail" for each in failed.values()]
    if names is None and count is not None:
        assumed.append(tables.assumed_features(count, "the models were"))
    found = PerKeyFilesOptions(
        **given.model_dump(),
        folder=str(folder.absolute()),
        template=template,
        files=[each for each in files if each not in failed],
        broken={name: error.message for name, error in failed.items()},
        by=list(by),
        names=names,
        count=count,
        columns=None if member.columns is None else dict(member.columns),
        trusted=trusted,
        assumed=tuple(assumed),
    )
    return found.model_dump(mode="json")


def _unreadable(folder: Path, files: Sequence[str]) -> dict[str, TallyError]:
    """Those of the files that are seen to be no model without opening them, and why."""
    found: dict[str, TallyError] = {}
    for name in files:
        try:
            check_readable(folder / name, trusted=True)
            check_whole(folder / name)
        except ModelLoadError as error:
            found[name] = error
    return found


@dataclass(frozen=True, slots=True)
class Opened:
    """One model, open. svm: its parameters, if it is scored in a batch with others; else ``scorer``.
    estimator: of scikit-learn, if it is one."""

    features: Sequence[str] | int | None
    columns: Mapping[str, str] | None
    svm: Svm | None = None
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
        return Opened(features, DETECTOR, svm=svm, estimator=estimator)
    alone = scorer_of(estimator, features)
    return Opened(features, alone.columns, scorer=alone, estimator=estimator)


class PerKeyFilesKind(Kind):
    """A model file for each key of a table, given as a template of their names."""

    reads_files = False

    def resolve(self, found: Candidate, request: ModelRequest) -> ModelRef:
        template, by = found.entry, request.by
        if not by:
            columns = ",".join(columns_of(template))
            raise SpecError(
                f"{template!r} names a model for each key, and no columns make keys",
                hint=f"Say which: --model-per {columns}='{template}'",
            )
        local, mirror = local_template(template, by)
        path = Path(os.path.abspath(expanded(local)))  # noqa: PTH100 - keeps links, drops ".."
        folder, files = find(str(path), by)
        if not request.trust:
            for name in files:
                with suppress(ModelLoadError):  # only the rows of a damaged model's key fail
                    check_readable(folder / name, trusted=False)
        within = str(path.relative_to(folder))
        with errors_name(mirror or str(folder), instead_of=folder):
            options = inspect(within, by, folder, files, merged({}, request.settings), trusted=request.trust)
        files = tuple(options["files"])
        digest = content_hash(folder, files)
        return ModelRef(
            kind=self.name,
            name=template,
            location=folder,
            entry=within,
            files=files,
            hash=digest,
            assumed=tuple(options.pop("assumed", ())),
            options=options,
            trusted=request.trust,
            mirror=mirror,
        )

    def refreshed(self, ref: ModelRef) -> ModelRef:
        """With the files of keys that had none."""
        said = {name: value for name in ("features", "batch_size") if (value := ref.options.get(name)) is not None}
        request = ModelRequest(settings=said, by=ref.options["by"], trust=ref.trusted)

        def again(template: str) -> ModelRef:
            return self.resolve(Candidate("a model for each key", template), request)

        if is_url(ref.name):
            found = again(ref.name)
            check_content(str(ref), found.location, ref.files, ref.hash)
            return found
        if not is_here(ref, any):
            fetched(ref)
            return ref  # new files are added on another machine
        check_content(str(ref), ref.location, ref.files, ref.hash)
        found = replace(again(str(ref.location / ref.entry)), name=ref.name)
        place = uploaded_below(ref)
        return found if place is None else upload_to_mirror(found, place)

    def create(self, ref: ModelRef) -> Scorer:
        return PerKeyFilesScorer(ref.options)

    def package(self, ref: ModelRef) -> dict[str, Any]:
        raise SpecError(
            f"{ref.name} is a file for each key, which a registry cannot keep one by one",
            hint=f"Put them into one: tally models pack '{ref.name}' --by COLUMNS --out FOLDER --name NAME",
        )


class PerKeyFilesScorer(ModelPerKey):
    """Scores tables with one model file for each key; options as :func:`inspect` returns them.

    Models are opened when their key first comes, and ``OPEN_MODELS`` of them are kept open. One-class SVMs are scored
    together, others one after another.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = PerKeyFilesOptions.complete(options)
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

    def missing_reason(self, key: Mapping[str, Any]) -> str | None:
        found = key_of(self.by, key)
        if found is not None and self._path(found) in self._numbers:
            return None
        if found is None:
            return f"{' and '.join(name for name in self.by if key[name] is None)} is null, which chooses no model"
        path = self._path(found)
        if (reason := self.options.broken.get(path)) is not None:
            return reason
        return f"there is no model {self._called}/{path}"

    def _path(self, key: Sequence[str]) -> str:
        values = dict(zip(self.by, key, strict=True))
        return PLACEHOLDER.sub(lambda found: values[found[1]], self.options.template)

    def _find(self, keys: Sequence[pa.Array]) -> Integers:
        index = KeyIndex.of_rows(keys)
        numbers = [self._numbers.get(self._path(key), -1) for key in index]
        return np.append(np.array(numbers, np.int64), -1)[index.find(keys)]

    def _batched(self, present: Integers) -> tuple[BatchedSvms | None, Integers]:
        members = {number: self._members(number) for number in present.tolist()}
        svms = {number: each.svm for number, each in members.items() if isinstance(each, Opened) and each.svm}
        places = np.full(len(self._numbers), -1)
        places[list(svms)] = np.arange(len(svms))
        return (BatchedSvms(Svms.of(list(svms.values()))) if svms else None), places

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
