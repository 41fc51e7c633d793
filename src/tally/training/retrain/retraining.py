"""Retrain a classifier's last layer: from a folder of pictures and a backbone to a registered model, as a run.

All that can be checked is checked before the run begins. A run that was interrupted or killed goes on from its last
checkpoint, and ends as if it had never been.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from tally.engines.factory import make_engine
from tally.errors import ModelError, OutputExistsError, RunStateError, SourceChangedError, SpecError, StorageError
from tally.jobs.stop import Stop
from tally.models.download import folder
from tally.models.hashing import content_hash
from tally.models.reference import ModelRef
from tally.models.registry import open_registry
from tally.storage import failure, is_url
from tally.storage.publish import write_whole
from tally.text import expanded, storable
from tally.training.promotion import Promoted, Promotion
from tally.training.retrain import bottlenecks, finetuning
from tally.training.retrain.bottlenecks import Backbone, Bottlenecks, Drive, duplicates
from tally.training.retrain.dataset import Dataset, read
from tally.training.retrain.distortions import Distorted, Distortions, spec_of
from tally.training.retrain.examples import Examples, Indices, Parameters
from tally.training.retrain.finetuning_worker import Measured
from tally.training.retrain.head import (
    Evaluation,
    Head,
    State,
    Tested,
    Trained,
    evaluate,
    one_thread,
    tested_rows,
    train,
)
from tally.training.retrain.result import Sample, check_library, check_name, write
from tally.training.retrain.summaries import Summaries, test_pictures
from tally.training.runs.events import can_write
from tally.training.runs.store import EVENTS, PACKAGE, RunStore, Value
from tally.training.runs.tracking import DatabaseBook, Run, run

KIND = "retrain"
"""Of the run."""
CHECKPOINT, INPUTS, NETWORK = "checkpoint.npz", "inputs.json", "network"
"""In the run's folder."""
WORKERS = "workers"
"""The parameter of a run that fine-tunes: how many do. Others would add up its gradients in another order."""
METRICS: Mapping[str, bool] = {
    "validation_cross_entropy": True,
    "validation_accuracy": False,
    "cross_entropy": True,
    "accuracy": False,
}
"""What is measured at each evaluation, and whether the lowest is the best. The first tells more than an accuracy."""
TEST_METRICS = ("test_accuracy", "test_cross_entropy")
"""What the final test measures."""
TRIED = 16
"""Pictures that the written model is tried with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retraining:
    """What is trained, and from what. Paths are made absolute. Raises SpecError with every problem.

    image_dir: a folder, here or in a bucket, with a folder of pictures for each label. backbone: what ``--backbone``
    takes. cut: the value in it that is its features; None: its output. settings: its options, keys may be dotted.
    trust: code that it carries may run. fine_tune: train all of it, a network of PyTorch, not the last layer alone.
    bottleneck_dir: of the cache; None: in Tally's home. summaries_dir: folder of event files, in which the run gets its
    own; None: in the run's folder. out: a second place for the package; output_graph: for its ONNX file; output_labels:
    for its labels. final_test: try the test pictures at the end.
    """

    image_dir: str
    backbone: str
    cut: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    trust: bool = False
    fine_tune: bool = False
    testing_percentage: int = 10
    validation_percentage: int = 10
    keep_names: bool = False
    parameters: Parameters = field(default_factory=Parameters)
    distortions: Distortions = field(default_factory=Distortions)
    bottleneck_dir: str | None = None
    summaries_dir: str | None = None
    out: str | None = None
    output_graph: str | None = None
    output_labels: str | None = None
    final_tensor_name: str = "final_result"
    final_test: bool = True

    def __post_init__(self) -> None:
        for name in ("image_dir", "bottleneck_dir", "summaries_dir", "out", "output_graph", "output_labels"):
            if (given := getattr(self, name)) is not None and not (name == "image_dir" and is_url(given)):
                object.__setattr__(self, name, str(expanded(given).absolute()))
        if expanded(self.backbone).exists():  # otherwise it is a name of the registry, or a URL
            object.__setattr__(self, "backbone", str(expanded(self.backbone).absolute()))
        problems = []
        if not self.final_tensor_name.strip():
            problems.append("--final_tensor_name: is empty")
        if self.output_graph is not None and Path(self.output_graph).suffix != ".onnx":
            problems.append(
                f"--output_graph: TensorFlow's frozen graphs are not written: {Path(self.output_graph).name!r} should "
                "end in .onnx"
            )
        if problems:
            raise SpecError(problems)

    def to_dict(self) -> dict[str, Any]:
        """All of it as one flat mapping, JSON-able: the run's parameters."""
        found = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _NESTED}
        return found | {"settings": dict(self.settings)} | asdict(self.parameters) | asdict(self.distortions)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Retraining:
        """The inverse of :meth:`to_dict`. Raises SpecError for what is no retraining."""
        values = {**_LATER, **values}
        try:
            parts = {
                name: kind(**{each.name: values[each.name] for each in fields(kind)}) for name, kind in _NESTED.items()
            }
            own = {each.name: values[each.name] for each in fields(cls) if each.name not in _NESTED}
            return cls(**own, **parts)
        except KeyError as error:
            raise SpecError(f"the parameters of a retraining lack {error}") from None


_NESTED: Mapping[str, Any] = {"parameters": Parameters, "distortions": Distortions}
_LATER: Mapping[str, Any] = {"trust": False, "fine_tune": False}
"""What runs of earlier versions do not have."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """run: its id. package: the model package's folder. promoted: its version; None if it was not registered.

    step: of the weights, counted from 0. tested: None without test pictures, or where the test was not asked for.
    """

    run: str
    dataset: Dataset
    examples: Examples = field(repr=False)
    trained: Trained = field(repr=False)
    tested: Tested | None
    package: Path
    promoted: Promoted | None

    @property
    def model(self) -> str | None:
        """``models:/NAME/N``; None if it was not registered."""
        return None if self.promoted is None else str(self.promoted.version)

    def misclassified(self) -> list[tuple[Path, str]]:
        """The test pictures that were taken for another class, and which."""
        if self.tested is None:
            return []
        chosen = self.tested.batch.logits.argmax(axis=1)
        return [
            (self.dataset.pictures[int(self.tested.rows[at])].path, self.dataset.labels[int(chosen[at])])
            for at in self.tested.wrong(self.examples.labels).tolist()
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watcher:
    """Who is told what happens. say: a line. begun: the run's id and its folder of event files. evaluated: at each
    evaluation. drive: runs the job that computes bottlenecks, and shows it."""

    say: Callable[[str], None] = lambda line: None
    begun: Callable[[str, Path], None] = lambda run, events: None
    evaluated: Callable[[Evaluation], None] = lambda evaluation: None
    drive: Drive | None = None


def measures(*, final_test: bool = True, dataset: Dataset | None = None) -> tuple[str, ...]:
    """The metrics of a retraining; dataset: what it is trained from, where that is known."""
    tested = final_test and (dataset is None or dataset.of("testing"))
    validated = dataset is None or dataset.of("validation")
    found = [each for each in METRICS if validated or not each.startswith("validation_")]
    return (*found, *(TEST_METRICS if tested else ()))


def kept(run: Run, state: State) -> dict[str, float] | None:
    """What it measured at the step whose weights early stopping keeps; None where it keeps the last."""
    if state.best is None:
        return None
    assert isinstance(run.book, DatabaseBook)
    # A process that is killed may have written its checkpoint, and not yet what it measured before that.
    return {"validation_cross_entropy": state.lowest, **run.book.at(state.best_step)}


def resumed(run_id: str) -> tuple[str, Retraining]:
    """The whole id of a run, and what it trains. Raises RunNotFoundError, RunStateError if it is no retraining."""
    record = RunStore.open().get(run_id)
    if record.kind != KIND:
        raise RunStateError(f"run {record.id} is of kind {record.kind}, not {KIND}")
    return record.id, Retraining.from_dict(record.parameters)


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that is needed to train heads, with whatever parameters: see :func:`tally.training.retrain.head.train`.

    Where the whole network is trained, there are bottlenecks at the end only, of the pictures that are looked at then.
    inputs: the hashes of the pictures that are trained with, and of the backbone.
    """

    backbone: Backbone
    dataset: Dataset
    bottlenecks: Bottlenecks
    examples: Examples
    inputs: Mapping[str, str]


def check(given: Retraining) -> tuple[Backbone, Dataset]:
    """All that can be checked before any picture is looked at. Raises what :func:`retrain` raises."""
    check_library()
    with one_thread():  # what it needs is missing now, or never
        pass
    root = None if given.bottleneck_dir is None else Path(given.bottleneck_dir)
    backbone = Backbone.of(given.backbone, given.settings, at=given.cut, root=root, trust=given.trust)
    check_name(backbone.ref, given.final_tensor_name)
    if given.distortions:
        spec_of(backbone.ref)
    dataset = read(
        folder(given.image_dir) if is_url(given.image_dir) else Path(given.image_dir),
        testing_percentage=given.testing_percentage,
        validation_percentage=given.validation_percentage,
        keep_names=given.keep_names,
    )
    if given.parameters.early_stopping and not dataset.of("validation"):
        raise SpecError("--early-stopping: needs validation pictures, and --validation_percentage is 0")
    return backbone, dataset


def prepare(
    given: Retraining,
    checked: tuple[Backbone, Dataset],
    *,
    workers: int | None = None,
    device: str = "auto",
    engine: str = "local",
    watcher: Watcher | None = None,
) -> Prepared:
    """The bottlenecks of the pictures, computed where the cache lacks them; once for any number of trainings.

    checked: from :func:`check`. Pictures that cannot be read are left out, and said.
    """
    watcher = watcher or Watcher()
    backbone, dataset = checked
    if given.fine_tune:
        dataset, found = finetuning.look(dataset, backbone)
    else:
        dataset, found = bottlenecks.compute(
            dataset,
            backbone,
            root=None if given.bottleneck_dir is None else Path(given.bottleneck_dir),
            workers=workers,
            device=device,
            engine=engine,
            drive=watcher.drive,
            say=watcher.say,
        )
    for remark in (*dataset.remarks, *duplicates(dataset, found.hashes)):
        watcher.say(remark)
    inputs = {"pictures": data_hash(dataset, found.hashes), "backbone": backbone.hash}
    return Prepared(backbone, dataset, found, Examples.of(dataset, found.features), inputs)


def retrain(
    given: Retraining,
    *,
    register: Promotion | None = None,
    resume: str | None = None,
    run_id: str | None = None,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    command: Sequence[str] | None = None,
    workers: int | None = None,
    device: str = "auto",
    engine: str = "local",
    stop: Stop | None = None,
    watcher: Watcher | None = None,
) -> Outcome:
    """Train, as a new run or (``resume``, an id) one that goes on.

    register: the model's name in the registry, and whether an alias is to point at it; the run keeps that, see
    :meth:`~tally.training.promotion.Promotion.of_kept`. run_id, name, tags,
    command: of a new run. workers: processes that put pictures through the backbone, or that train all of it; engine:
    who runs them, but for pictures that are distorted, and for fine-tuning; a run that fine-tunes and goes on has as
    many as it began with. stop: once asked, the run is put down with
    a checkpoint, and KeyboardInterrupt is raised.

    Raises whatever its parts raise: see :func:`~tally.training.retrain.dataset.read`, ``Backbone.of``,
    :func:`~tally.training.retrain.bottlenecks.compute`, :func:`~tally.training.retrain.head.train`,
    :func:`~tally.training.retrain.result.write`; SourceChangedError if pictures of a run that goes on have changed.
    """
    stop, watcher = stop or Stop(), watcher or Watcher()
    checked = check(given)
    if register is not None:
        register.check(measures(final_test=given.final_test, dataset=checked[1]))
    parameters = given.to_dict()
    if given.fine_tune:
        workers = finetuning.check(
            checked[0], given.parameters, workers if resume is None else _workers(resume, workers), device, engine
        )
        parameters[WORKERS] = workers
    if resume is None:
        for flag in ("out", "output_graph", "output_labels"):
            _refuse_existing(flag, getattr(given, flag))
        begun = run(name, parameters, kind=KIND, run_id=run_id, tags=tags, command=command)
    else:
        begun = run(resume=resume, kind=KIND)
    with begun:
        events = begun.folder / EVENTS if given.summaries_dir is None else Path(given.summaries_dir) / begun.id
        if register is not None:
            register.keep(begun.folder)
        watcher.begun(begun.id, events)
        prepared = prepare(given, checked, workers=workers, device=device, engine=engine, watcher=watcher)
        _remember(begun, given, prepared)
        trained, prepared = _trained(begun, given, prepared, events, watcher, stop, workers, device)
        outcome = conclude(begun, given, prepared, trained, events=events, register=register, again=bool(resume))
        shutil.rmtree(begun.folder / NETWORK, ignore_errors=True)  # the package has it now
        return outcome


def conclude(
    begun: Run,
    given: Retraining,
    prepared: Prepared,
    trained: Trained,
    *,
    events: Path,
    register: Promotion | None = None,
    again: bool = False,
) -> Outcome:
    """Test what was trained, write its package into the run's folder and wherever else it should be, register it.

    again: the run may have written some of it before it was killed.
    """
    dataset, examples = prepared.dataset, prepared.examples
    tested = evaluate(examples, trained.head, given.parameters) if given.final_test else None
    if tested is not None:
        _log_test(begun, given, prepared, trained, tested, events)
    package = begun.folder / PACKAGE
    if package.exists():  # of this run, before it was killed
        shutil.rmtree(package)
    ref = write(
        package,
        prepared.backbone.ref,
        trained.head,
        dataset.labels,
        tensor=given.final_tensor_name,
        sample=_sample(dataset, examples, trained.head),
    )
    _publish(given, ref, again=again)
    promoted = None
    measured = kept(begun, trained.state)
    if measured is not None:
        begun.tags["weights"] = f"those of step {trained.step}"
    if register is not None:
        facts = _facts(given, prepared)
        promoted = register.conclude(
            begun,
            lambda name: open_registry().get(begun.register(package, name, properties=facts, metrics=measured)),
            measured=measured,
        )
    return Outcome(begun.id, dataset, examples, trained, tested, package, promoted)


def _workers(run_id: str, given: int | None) -> int | None:
    """How many workers fine-tune a run that goes on: as many as began it; ``given`` if it does not say. Raises
    SpecError if another number is given."""
    known = RunStore.open().get(run_id).parameters.get(WORKERS)
    if known is None:
        return given
    if given not in (None, known):
        raise SpecError(
            f"--workers: {given}, but run {run_id} began with {known}; with another number its model is not the one "
            "that it would have been",
            hint="Leave --workers out, or begin a new run.",
        )
    return int(known)


def _refuse_existing(flag: str, place: str | None) -> None:
    if place is not None and Path(place).exists():
        raise OutputExistsError(f"--{flag}: {place} is there already", hint="Choose another place, or remove it first.")


def _remember(begun: Run, given: Retraining, prepared: Prepared) -> None:
    """Have the run know what it is trained from. Raises SourceChangedError if that is not what it began with."""
    inputs = begun.folder / INPUTS
    text = json.dumps(prepared.inputs, indent=1)
    if inputs.exists():
        known = json.loads(inputs.read_text("utf-8"))
        for what, now in prepared.inputs.items():
            if known.get(what) != now:
                place = given.image_dir if what == "pictures" else given.backbone
                raise SourceChangedError(
                    f"run {begun.id}: the {what} at {place} have changed since it began", hint="Begin a new run."
                )
    write_whole(inputs, text.encode())
    write_whole(begun.folder / "split.csv", _split(prepared.dataset))
    for name, place in (("pictures", given.image_dir), ("backbone", given.backbone)):
        try:
            begun.log_data(name, place)
        except StorageError:  # a file of the folder that cannot be read has no hash; pictures are left out
            begun.book.change(data={name: {"place": place}})
    if given.fine_tune:
        return
    found = prepared.bottlenecks
    begun.tags["bottlenecks"] = f"{found.computed:,} computed, {found.cached:,} from the cache"


def data_hash(dataset: Dataset, hashes: Sequence[str]) -> str:
    """``sha256:...`` of the pictures' contents, names, labels and parts; not of the place where they are."""
    digest = hashlib.sha256()
    for picture, content in zip(dataset.pictures, hashes, strict=True):
        for text in (dataset.labels[picture.label], picture.path.name, picture.part, content):
            digest.update(os.fsencode(text) + b"\0")
    return f"sha256:{digest.hexdigest()}"


def _split(dataset: Dataset) -> bytes:
    """As CSV: which picture is in which part."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["key", "label", "part"])
    for each in dataset.pictures:
        rows.writerow([storable(each.key), dataset.labels[each.label], each.part])
    return text.getvalue().encode()


def _trained(
    begun: Run,
    given: Retraining,
    prepared: Prepared,
    events: Path,
    watcher: Watcher,
    stop: Stop,
    workers: int | None,
    device: str,
) -> tuple[Trained, Prepared]:
    """The head, trained from the last checkpoint on, and what it stands on, which is trained with it or stays as it is.
    Raises KeyboardInterrupt once it is asked to stop."""
    checkpoint = begun.folder / CHECKPOINT
    with ExitStack() as stack:
        summaries = None
        if can_write():
            summaries = Summaries(events, given.parameters.how_many_training_steps, given.final_tensor_name)
            stack.callback(summaries.close)
            if given.summaries_dir is not None:
                summaries.writer("train").hparams(given.to_dict(), name=begun.id)

        def observe(evaluation: Evaluation) -> None:
            if summaries is not None:
                if evaluation.step == 0:
                    summaries.graph(evaluation.head)
                summaries.evaluation(evaluation)
            watcher.evaluated(evaluation)

        def report(step: int, metrics: Mapping[str, float]) -> bool:
            # Not with Run.log: the event files have them under the original's tags already.
            at = time.time()
            begun.book.record([Value(name, step, value, at) for name, value in metrics.items()])
            return stop.asked

        def measured(found: Sequence[Measured]) -> None:
            begun.book.record(
                [Value(name, step, value, at) for step, at, metrics in found for name, value in metrics.items()]
            )

        def keep(state: State) -> None:
            # In this order: what goes on from a checkpoint does not measure again what was measured before it.
            begun.flush()
            if summaries is not None:
                summaries.flush()
            write_whole(checkpoint, state.to_bytes())

        if given.fine_tune:
            wanted = [_tried(prepared.dataset)]
            if given.final_test:
                wanted.append(tested_rows(prepared.examples, given.parameters))
            trained, examples, backbone = finetuning.fine_tune(
                prepared.dataset, prepared.examples, prepared.backbone, given.parameters, given.distortions, report,
                folder=begun.folder / NETWORK, checkpoint=checkpoint, wanted=np.unique(np.concatenate(wanted)),
                workers=workers or 1, device=device, observe=observe, measured=measured, say=watcher.say, stop=stop,
            )  # fmt: skip
            prepared = replace(prepared, examples=examples, backbone=backbone)
        else:
            begin = State.from_file(checkpoint) if checkpoint.exists() else None
            if begin is not None:
                watcher.say(f"continued from step {begin.done}")
            batches = None
            if given.distortions:
                batches = Distorted(
                    prepared.dataset, prepared.examples, given.parameters, given.distortions, prepared.backbone.ref,
                    make_engine("local"), workers=workers, device=device,
                )  # fmt: skip
                stack.callback(batches.close)
            trained = train(
                prepared.examples,
                given.parameters,
                report,
                begin=begin,
                batches=batches,
                observe=observe,
                keep=keep,
            )
            keep(trained.state)
    if trained.stopped:
        raise KeyboardInterrupt(f"stopped after {trained.state.done} steps")
    return trained, prepared


def _log_test(
    begun: Run, given: Retraining, prepared: Prepared, trained: Trained, tested: Tested, events: Path
) -> None:
    batch, step = tested.batch, trained.step
    begun.log({"test_accuracy": batch.accuracy, "test_cross_entropy": batch.cross_entropy}, step=step)
    pictures = test_pictures(prepared.dataset, tested, prepared.examples.labels)
    for name, picture in pictures.items():
        begun.log_image(name, picture, step)
    if can_write():
        summaries = Summaries(events, given.parameters.how_many_training_steps)
        # The run's own event file has the pictures already.
        summaries.test(step, tested, {} if given.summaries_dir is None else pictures)
        summaries.close()


def _sample(dataset: Dataset, examples: Examples, head: Head) -> Sample:
    """Some pictures, of all parts, and what the training found for them."""
    rows = _tried(dataset)
    with one_thread():
        logits = head.logits(examples.features[rows])
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return Sample([dataset.pictures[int(row)].path for row in rows], powers / powers.sum(axis=1, keepdims=True))


def _tried(dataset: Dataset) -> Indices:
    """The pictures that the written model is tried with."""
    return np.unique(np.linspace(0, len(dataset.pictures) - 1, TRIED).astype(np.int64))


def _facts(given: Retraining, prepared: Prepared) -> dict[str, Any]:
    """What the registry keeps of where a version comes from, beside the run's id."""
    counts = prepared.dataset.counts()
    return {
        "backbone": given.backbone,
        "backbone_hash": prepared.backbone.hash,
        **({"fine_tuned": True} if given.fine_tune else {}),
        "pictures": {label: sum(parts.values()) for label, parts in counts.items()},
        **asdict(given.parameters),
        **(asdict(given.distortions) if given.distortions else {}),
    }


def _publish(given: Retraining, ref: ModelRef, *, again: bool) -> None:
    """Copy the package, its ONNX file and its labels to where the user wants them, too."""
    try:
        if given.out is not None:
            out = Path(given.out)
            if not (again and out.is_dir() and content_hash(out) == content_hash(ref.location)):
                _refuse_existing("out", given.out)
                out.parent.mkdir(parents=True, exist_ok=True)
                partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
                try:
                    shutil.copytree(ref.location, partial, dirs_exist_ok=True)
                    partial.rename(out)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        if given.output_graph is not None:
            if (data := ref.location / f"{ref.entry}.data").exists():
                raise ModelError(
                    f"--output_graph: the model's weights, {data.stat().st_size:,} bytes, do not fit into one file",
                    hint=f"Its package has both files: {ref.location}",
                )
            _copy(ref.location / ref.entry, Path(given.output_graph), again=again)
        if given.output_labels is not None:
            labels = ref.options["labels"]
            text = "".join(f"{each}\n" for each in labels) if not isinstance(labels, str) else None
            content = (ref.location / str(labels)).read_bytes() if text is None else text.encode()
            _write(content, Path(given.output_labels), again=again)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise failure("write", str(error.filename or "what was trained"), error) from error


def _copy(path: Path, to: Path, *, again: bool) -> None:
    _write(path.read_bytes(), to, again=again)


def _write(content: bytes, to: Path, *, again: bool) -> None:
    if to.exists() and not (again and to.read_bytes() == content):
        _refuse_existing("output_graph" if to.suffix == ".onnx" else "output_labels", str(to))
    to.parent.mkdir(parents=True, exist_ok=True)
    write_whole(to, content)
