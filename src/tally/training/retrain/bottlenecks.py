"""Bottlenecks: what the backbone, a model without its last layer, makes of each picture.

They are computed by a scoring job over the pictures that the cache does not have, and kept there under the hash of a
picture's content, of the backbone and of how it prepares pictures. Whatever has the same content is computed once, for
all runs and all trials of a sweep, wherever the pictures are moved.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import tally
from tally.config import settings
from tally.errors import ItemError, JobError, ModelError, SourceChangedError, SpecError, StorageError
from tally.jobs.facade import Jobs
from tally.jobs.spec import make
from tally.jobs.store import JobRecord
from tally.media.images import NO_MEMORY, NOT_INSTALLED
from tally.models.hashing import known_hash
from tally.models.reference import ModelRef
from tally.models.resolve import resolve
from tally.scorers.base import Scorer
from tally.storage.publish import write_whole
from tally.text import expanded
from tally.training.retrain.cut import cut, last_layer_input
from tally.training.retrain.dataset import Dataset, regular
from tally.training.retrain.exported import exported, prepared_as

Matrix = np.ndarray[Any, np.dtype[np.float32]]

AT_ONCE = 20_000
"""Pictures of one job: what it has made is in the cache before the next begins."""
_MAGIC, _UNREADABLE = b"tally-bottleneck-2\n", b"tally-unreadable-2\n"
"""What an entry of the cache begins with. A SHA-256 comes next, of backbone, picture and what follows."""
_BEFORE = (b"tally-bottleneck-1\n", b"tally-unreadable-1\n")
"""The same of earlier versions, whose entries did not say of what they are."""
_THREADS = 8
"""That read pictures to hash them."""
_RELEVANT = ("task", "preprocess", "outputs")
"""The options of a backbone that decide about its bottlenecks."""

Drive = Callable[[Jobs, str], JobRecord]
"""Runs a job to its end, and shows it meanwhile."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """A model whose output for a picture is a vector of features.

    name: as the user calls it. model: what is scored, as ``--model`` takes it. settings: options of the model. task of
    the reference: ``embed``. network: that of PyTorch which it was exported from.
    """

    name: str
    model: str
    ref: ModelRef
    settings: Mapping[str, Any] = field(default_factory=dict)
    network: ModelRef | None = None

    @classmethod
    def of(
        cls,
        model: str,
        options: Mapping[str, Any] | None = None,
        *,
        at: str | None = None,
        root: Path | None = None,
        trust: bool = False,
    ) -> Backbone:
        """The backbone that a file, a package, ``models:/NAME`` or a URL names.

        Pictures are squashed to its size, as TensorFlow's ``retrain.py`` does, unless its package or ``options`` say
        otherwise.
        at: the value in a classifier that is its features: what comes after it is cut off. root: of the cache, where
        the file without it is kept, and that of a network of PyTorch. options: of the model, keys may be dotted.
        trust: code that the model carries may run.

        Raises what :func:`tally.models.resolve.resolve` raises; ModelError for a model that is none: it tells classes
        apart already, or is no ONNX model.
        """
        name, given = model, dict(options or {})
        ref, network = resolve(model, task="embed", settings=given, trust=trust), None
        if ref.kind == "torch":
            if at is not None:
                raise SpecError(f"--cut: {name} is a network of PyTorch: save it without its last layer")
            network, given = ref, prepared_as(ref)
            model = str(exported(ref, _root(root) / "backbones"))
            ref = resolve(model, task="embed", settings=given)
        if at is not None and ref.kind == "onnx":
            given = {"preprocess": ref.options["preprocess"] | {"resize": _declared(ref)}}
            model = str(cut(ref, at, _root(root) / "backbones"))
            ref = resolve(model, task="embed", settings=given)
        if ref.kind != "onnx" or ref.options.get("task") != "embed":
            raise ModelError(
                f"--backbone: {model} is a model of kind {ref.kind}, and a backbone is a model of pictures, of ONNX or "
                "PyTorch",
                hint="Export the network without its last layer to ONNX.",
            )
        if _declared(ref) is None:
            given["preprocess.resize"] = "squash"
            ref = resolve(model, task="embed", settings=given)
        _refuse_classes(name, ref, cuttable=network is None)
        return cls(name, model, ref, given, network)

    @property
    def hash(self) -> str:
        """Of what the user gave."""
        return (self.network or self.ref).hash

    @property
    def key(self) -> str:
        """What its bottlenecks are known by: the hash of its content, and of how it prepares pictures."""
        relevant = {name: self.ref.options.get(name) for name in _RELEVANT}
        text = json.dumps({"model": self.ref.hash, **relevant}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _declared(ref: ModelRef) -> str | None:
    """How pictures are brought to the model's size, if its package or the user says so."""
    declared = ref.declared.get("preprocess")
    resize = declared.get("resize") if isinstance(declared, Mapping) else None
    return resize if isinstance(resize, str) else None


def _root(root: Path | None) -> Path:
    return expanded(root or settings().home / "bottlenecks").absolute()


def _refuse_classes(model: str, ref: ModelRef, *, cuttable: bool) -> None:
    """Raises ModelError where the vector looks like the scores of classes: a softmax is what remains of a picture.

    cuttable: its last layer may be cut off.
    """
    from tally.models.load import load
    from tally.scorers.base import Item
    from tally.scorers.vision.preprocess import made_up_pictures

    scorer = load(ref, "cpu")
    try:
        pictures = made_up_pictures(scorer.size or (224, 224))
        vectors = [features(scorer, scorer.prepare(Item("made up", each))) for each in pictures]
    except ItemError:
        return  # the first picture shows what is wrong with it
    finally:
        scorer.close()
    if vectors[0].size < 2:
        raise ModelError(
            f"--backbone: {model} gives one number for a picture, which is no vector of features",
            hint="Give a network without its last layer.",
        )
    positive = all(each.min() >= 0 for each in vectors)
    fractions = all(abs(each.sum() - 1) < 1e-3 for each in vectors)
    # In units of 1/256 those that are small are 0.
    rounded = all((each == np.rint(each)).all() and each.sum() <= 280 for each in vectors)
    if positive and (fractions or rounded):
        last = last_layer_input(ref) if cuttable else None
        raise ModelError(
            f"--backbone: {model} gives {vectors[0].size} probabilities of classes, and a backbone gives the features "
            "before its last layer",
            hint=f"Cut it there: --cut '{last}'" if last else "Export it without the last layer and the softmax.",
        )


def features(backbone: Scorer, prepared: Any) -> Matrix:
    """What a loaded backbone makes of one prepared picture, ``float32[features]``. Raises ItemError."""
    results = backbone.score([prepared])
    assert isinstance(results, Sequence)
    if isinstance(results[0], Exception):
        raise results[0]
    assert isinstance(results[0], Mapping)
    return np.array(results[0]["embedding"], np.float32)


@dataclass(frozen=True, slots=True)
class Bottlenecks:
    """features: ``float32[pictures, features]``, in the order of the data set's pictures.

    hashes: SHA-256 of each picture's content. computed: by the backbone in this call; the others, ``cached``, came from
    the cache. damaged: entries of the cache that were damaged, or another picture's, and computed again.
    """

    features: Matrix
    hashes: tuple[str, ...]
    computed: int = 0
    damaged: int = 0

    @property
    def cached(self) -> int:
        return len(set(self.hashes)) - self.computed


class Cache:
    """Bottlenecks of one backbone in a folder that several processes may use at once. root: of all backbones."""

    def __init__(self, root: Path | None, key: str) -> None:
        self.folder = _root(root) / key

    def read(self, picture: str) -> Matrix | str | None:
        """The bottleneck ``float32[features]`` of a picture by its hash, or why it cannot be read; None if there is
        neither, or this was found by another version.

        Raises ValueError if its entry is damaged, or another picture's.
        """
        try:
            content = self._path(picture).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"the cache of bottlenecks cannot be read: {error}") from error
        magic, digest, data = content[: len(_MAGIC)], content[len(_MAGIC) :][:32], content[len(_MAGIC) + 32 :]
        if magic in _BEFORE:
            return None
        if magic not in (_MAGIC, _UNREADABLE) or not data or self._digest(picture, data) != digest:
            raise ValueError(picture)
        if magic == _UNREADABLE:
            version, _, reason = data.decode().partition("\n")
            return reason if version == tally.__version__ else None
        return np.frombuffer(data, "<f4")

    def write(self, picture: str, found: Matrix | str) -> None:
        """found: the bottleneck, or why the picture cannot be read."""
        if isinstance(found, str):
            magic, data = _UNREADABLE, f"{tally.__version__}\n{found}".encode()
        else:
            magic, data = _MAGIC, np.ascontiguousarray(found, "<f4").tobytes()
        path = self._path(picture)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, magic + self._digest(picture, data) + data)
        except OSError as error:
            raise StorageError(f"the cache of bottlenecks cannot be written: {error}") from error

    def _digest(self, picture: str, data: bytes) -> bytes:
        return hashlib.sha256(f"{self.folder.name}\n{picture}\n".encode() + data).digest()

    def _path(self, picture: str) -> Path:
        return self.folder / picture[:2] / f"{picture}.bottleneck"

    @contextmanager
    def computing(self, say: Callable[[str], None]) -> Iterator[None]:
        """One process at a time computes: what another was faster with is then there. A killed one does not hold it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(f"the cache of bottlenecks cannot be written: {error}") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another process computes bottlenecks of this model: waiting for what it makes")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def compute(
    dataset: Dataset,
    backbone: Backbone,
    *,
    root: Path | None = None,
    workers: int | None = None,
    device: str = "auto",
    engine: str = "local",
    drive: Drive | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Dataset, Bottlenecks]:
    """The bottlenecks of a data set's pictures: from the cache, and the others by a scoring job.

    root: of the cache; None: ``bottlenecks`` in Tally's home. workers: of the job; None: one for each core. engine:
    who runs them, see :mod:`tally.engines.factory`.
    drive: who runs the job, and shows it; None: nobody sees it.

    Returns the data set without the pictures that cannot be read, which its remarks name, and its bottlenecks. They are
    the same whatever the number of workers: on a CPU each picture is scored alone.
    Raises SpecError (see :meth:`~tally.training.retrain.dataset.Dataset.without`), JobError, StorageError, ModelError.
    """
    cache = Cache(root, backbone.key)
    paths = [each.path for each in dataset.pictures]
    with ThreadPoolExecutor(_THREADS) as pool:
        hashed = dict(zip(paths, pool.map(_hash, paths), strict=True))
    unreadable = {path: found.message for path, found in hashed.items() if isinstance(found, ItemError)}
    where: dict[str, Path] = {}
    for path, found in hashed.items():
        if isinstance(found, str):
            where.setdefault(found, path)
    known, missing, damaged = _cached(cache, where)
    computed = 0
    if missing:
        with cache.computing(say):
            again, missing, _ = _cached(cache, missing)
            known |= again
            if missing:
                kept = f"{len(known):,} of {len(where):,} bottlenecks are in the cache; "
                what = "1 picture goes" if len(missing) == 1 else f"{len(missing):,} pictures go"
                say(f"{kept if known else ''}{what} through {backbone.name}")
            names = list(missing)
            for start in range(0, len(names), AT_ONCE):
                some = {name: missing[name] for name in names[start : start + AT_ONCE]}
                made = _scored(cache, backbone, some, workers=workers, device=device, engine=engine, drive=drive)
                known |= made
                computed += sum(not isinstance(each, str) for each in made.values())
    elif where:
        say(f"all {len(where):,} bottlenecks are in the cache")
    rows = {name: each for name, each in known.items() if not isinstance(each, str)}
    unreadable |= {path: reason for path, name in hashed.items() if isinstance(reason := known.get(str(name)), str)}
    if not rows:
        path, reason = next(iter(unreadable.items()))
        raise SpecError(f"--image_dir: none of {len(paths):,} pictures can be read; {path.name}: {reason}")
    if damaged:
        say(f"{damaged:,} damaged entries of the cache of bottlenecks were computed again")
    widths = sorted({len(each) for each in rows.values()})
    if len(widths) > 1:
        raise ModelError(
            f"--backbone: {backbone.name} gives vectors of {widths[0]} and of {widths[-1]} features",
            hint="A backbone gives as many for every picture; --set preprocess.size=224x224 gives all one size.",
        )
    left = dataset.without(unreadable)
    hashes = tuple(str(hashed[each.path]) for each in left.pictures)
    features = np.stack([rows[each] for each in hashes])
    return left, Bottlenecks(features, hashes, computed, damaged)


def _hash(path: Path) -> str | ItemError:
    try:
        return known_hash(regular(path)).hex()
    except OSError as error:
        return ItemError(error.strerror or str(error), stage="read")


def _cached(cache: Cache, where: Mapping[str, Path]) -> tuple[dict[str, Matrix | str], dict[str, Path], int]:
    """What the cache has, what it lacks, and how many entries of these were damaged."""
    found: dict[str, Matrix | str] = {}
    missing, damaged = {}, 0
    for name, path in where.items():
        try:
            entry = cache.read(name)
        except ValueError:
            entry, damaged = None, damaged + 1
        if entry is None:
            missing[name] = path
        else:
            found[name] = entry
    return found, missing, damaged


def _scored(
    cache: Cache,
    backbone: Backbone,
    pictures: Mapping[str, Path],
    *,
    workers: int | None,
    device: str,
    engine: str,
    drive: Drive | None,
) -> dict[str, Matrix | str]:
    """Score pictures, given by the hash of their content, with a job, and put its rows into the cache.

    The job and its folder are known by what it scores: a process that is killed leaves both, and the next goes on.
    Returns the bottlenecks, or the reason for each picture that cannot be read.
    """
    text = "\n".join([settings().database, *sorted(pictures)])
    work = cache.folder / f"job-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    source, out = work / "pictures", work / "rows"
    try:
        source.mkdir(parents=True, exist_ok=True)
        for name, path in pictures.items():
            link = source / f"{name}{path.suffix.lower()}"
            if not link.is_symlink() or link.readlink() != path:
                link.unlink(missing_ok=True)
                link.symlink_to(path)
    except OSError as error:
        raise StorageError(f"the cache of bottlenecks cannot be written: {error}") from error
    jobs = Jobs()
    spec = make(
        source=[str(source)],
        model=backbone.model,
        out=str(out),
        task="embed",
        settings=dict(backbone.settings),
        workers=workers,
        device=device,
        engine=engine,
        # Alone, as what some models make of a picture depends on how many are scored with it, in the last digit.
        batch_size=1 if _on_cpu(device) else None,
        max_dead=1.0,
    )
    record = jobs.at(str(out))
    if record is None:
        shutil.rmtree(out, ignore_errors=True)  # of a job that the database has lost
    if record is None or not (record.alive or record.state == "finished"):
        record = jobs.submit(spec, resume=True)
    hint = None
    if record.state != "finished":
        try:
            record = (drive or _quietly)(jobs, record.id)
        except JobError as error:
            record, hint = jobs.get(record.id), error.hint
            if record.state != "failed":
                raise
    if record.state in ("interrupted", "paused"):
        raise KeyboardInterrupt
    all_dead = list(jobs.dead(record.id))
    # A job of which nothing comes has failed. These pictures may be a few of many, the others of which are there.
    unreadable = len(all_dead) == len(pictures) and all(each.stage in ("read", "decode") for each in all_dead)
    if record.state != "finished" and not unreadable:
        reason = record.error or "no reason"
        for dead in all_dead[:1]:
            reason = reason.replace(dead.key, str(pictures[dead.key.partition(".")[0]]))
        raise JobError(f"the job {record.id} that computes bottlenecks is {record.state}: {reason}", hint=hint)
    # The job has read each file again: what it found belongs to the hash only if that is the file's still.
    changed = {name for name, path in pictures.items() if _hash(path) != name}
    made: dict[str, Matrix | str] = {}
    if not unreadable:
        rows = jobs.results(record.id)
        vectors = rows["embedding"].combine_chunks()
        flat = np.asarray(vectors.flatten(), np.float32)
        ends = np.asarray(vectors.offsets)
        ends = ends - ends[0]
        for at, key in enumerate(rows["key"].to_pylist()):
            name = key.partition(".")[0]
            made[name] = row = flat[ends[at] : ends[at + 1]]
            if name not in changed:
                cache.write(name, row)
    for dead in all_dead:
        name = dead.key.partition(".")[0]
        made[name] = reason = dead.error.removeprefix(f"{dead.key}: ")
        # Which follows from the content, but for what is installed here, and how much memory there is.
        if dead.stage == "decode" and name not in changed and not _may_pass(reason):
            cache.write(name, reason)
    jobs.delete(record.id)
    shutil.rmtree(work, ignore_errors=True)
    if gone := [str(pictures[name]) for name in sorted(changed) if not isinstance(made.get(name), str)]:
        more = f", and {len(gone) - 1:,} more" if len(gone) > 1 else ""
        raise SourceChangedError(
            f"--image_dir: {gone[0]}{more} changed while bottlenecks were computed",
            hint="Train once nothing writes there any more; those of all other pictures are in the cache.",
        )
    return made


def _may_pass(reason: str) -> bool:
    """Whether a picture that cannot be read may be read another day, by the same version."""
    return NOT_INSTALLED in reason or NO_MEMORY in reason


def _quietly(jobs: Jobs, job: str) -> JobRecord:
    return jobs.see_through(job)


def _on_cpu(device: str) -> bool:
    import onnxruntime

    from tally.scorers.onnx.session import choose_providers

    return len(choose_providers(device, onnxruntime.get_available_providers())) == 1


def duplicates(dataset: Dataset, hashes: Sequence[str]) -> list[str]:
    """Remarks about pictures of one content that are in several parts, or under several labels."""
    parts: dict[str, set[str]] = {}
    labels: dict[str, set[int]] = {}
    for picture, content in zip(dataset.pictures, hashes, strict=True):
        parts.setdefault(content, set()).add(picture.part)
        labels.setdefault(content, set()).add(picture.label)
    remarks = []
    if leaked := sum("training" in each and len(each) > 1 for each in parts.values()):
        what = "1 picture is" if leaked == 1 else f"{leaked:,} pictures are"
        remarks.append(f"{what} both in training and in validation or testing: these look better than they are")
    if torn := sum(len(each) > 1 for each in labels.values()):
        remarks.append(f"{torn:,} {'picture has' if torn == 1 else 'pictures have'} several labels")
    return remarks
