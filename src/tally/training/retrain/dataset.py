"""The pictures that a classifier is retrained with: what they show, and what each of them is for.

The name of a picture's folder is its label. Which part (training, validation, test) it belongs to is decided by a hash
of label and file name, as TensorFlow's ``retrain.py`` decides by a hash of the whole path: here a folder may be moved,
and pictures may be added, and every picture stays in its part.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from tally.errors import SourceNotFoundError, SpecError, StorageError
from tally.media.images import suffixes
from tally.text import expanded, visible

Part = Literal["training", "validation", "testing"]
PARTS: tuple[Part, ...] = get_args(Part)

FEW = 20
"""A class with fewer pictures is reported."""
SHOWN = 5
"""The most names in one message."""

_BUCKETS = 1 << 27
_PART_FOLDERS: Mapping[str, Part] = {
    "train": "training",
    "training": "training",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "testing",
    "testing": "testing",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """One file. label: index into the data set's labels. key: ``FOLDER/FILE`` below the data set's root."""

    path: Path
    key: str
    label: int
    part: Part


@dataclass(frozen=True, slots=True)
class Dataset:
    """Pictures in a stable order: by label, then by file name.

    labels: in alphabetical order, which is that of the model's outputs. remarks: lines for the user.
    """

    root: Path
    labels: tuple[str, ...]
    pictures: tuple[Picture, ...]
    remarks: tuple[str, ...] = field(default=())

    def of(self, part: Part) -> list[Picture]:
        return [each for each in self.pictures if each.part == part]

    def counts(self) -> dict[str, dict[Part, int]]:
        """The number of pictures of each label in each part."""
        found = Counter((each.label, each.part) for each in self.pictures)
        return {label: {part: found[at, part] for part in PARTS} for at, label in enumerate(self.labels)}

    def without(self, unreadable: Mapping[Path, str]) -> Dataset:
        """The data set without pictures that cannot be read, which a remark names. Raises SpecError: see :func:`read`.

        unreadable: path to the reason.
        """
        if not unreadable:
            return self
        gone = [each for each in self.pictures if each.path in unreadable]
        named = [f"{each.key}: {unreadable[each.path]}" for each in gone]
        count = "1 picture" if len(gone) == 1 else f"{len(gone):,} pictures"
        remark = f"{count} cannot be read and {'is' if len(gone) == 1 else 'are'} left out: {_listed(named, '; ')}"
        left = tuple(each for each in self.pictures if each.path not in unreadable)
        found = replace(self, pictures=left, remarks=(*self.remarks, remark))
        check(found, {each.part for each in self.pictures})
        return found


def read(
    image_dir: Path, *, testing_percentage: int = 10, validation_percentage: int = 10, keep_names: bool = False
) -> Dataset:
    """The data set in a folder with a folder of pictures for each label.

    Where the folder holds ``train`` and ``test`` (and ``validation``) instead, each with a folder for each label, these
    are the parts. Without one for validation, it is drawn from training.
    keep_names: labels are the folders' names as they are; by default in lower case, whatever is neither a letter of
    a-z nor a digit being a space.

    Raises SourceNotFoundError if there is no such folder, StorageError if one cannot be read, SpecError for everything
    that makes training impossible: no picture, a single label, two folders of one label, a part without pictures.
    """
    problems = [
        f"--{name}: 0 to 99, not {value}"
        for name, value in (
            ("testing_percentage", testing_percentage),
            ("validation_percentage", validation_percentage),
        )
        if not 0 <= value < 100
    ]
    if not problems and testing_percentage + validation_percentage >= 100:
        problems.append(
            f"--testing_percentage and --validation_percentage: {testing_percentage} and {validation_percentage} leave "
            "nothing to train with"
        )
    if problems:
        raise SpecError(problems)
    root = expanded(image_dir).absolute()
    if not root.is_dir():
        raise SourceNotFoundError(f"--image_dir: there is no folder {str(image_dir)!r}")
    labelled, given, remarks = _label_folders(root)
    names = _labels([folder for folders in labelled.values() for folder in folders], keep_names=keep_names)
    order = tuple(sorted(set(names.values())))
    index = {label: at for at, label in enumerate(order)}
    pictures = []
    for part, folders in labelled.items():
        for folder, files in folders.items():
            label = names[folder]
            for file in files:
                drawn = part_of(label, file, 0 if given else testing_percentage, validation_percentage)
                if given:
                    whole = part != "training" or "validation" in given
                    drawn = part if whole else drawn
                path = folder / file
                pictures.append(Picture(path, path.relative_to(root).as_posix(), index[label], drawn))
    pictures.sort(key=lambda each: (each.label, os.fsencode(each.path.name), os.fsencode(each.key)))
    wanted = {"training", *given}
    wanted |= {"validation"} if validation_percentage and "validation" not in given else set()
    wanted |= {"testing"} if testing_percentage and not given else set()
    found = Dataset(root, order, tuple(pictures), tuple(remarks))
    check(found, wanted)
    few = [f"{name!r} {sum(counts.values())}" for name, counts in found.counts().items() if sum(counts.values()) < FEW]
    if few:
        remark = f"labels with fewer than {FEW} pictures, which is little to learn from: {_listed(few)}"
        found = replace(found, remarks=(*found.remarks, remark))
    for part in PARTS[1:]:
        missing = [repr(name) for name, counts in found.counts().items() if not counts[part]]
        if missing and found.of(part):
            found = replace(found, remarks=(*found.remarks, f"no picture of {_listed(missing)} is for {part}"))
    return found


def part_of(label: str, name: str, testing_percentage: int, validation_percentage: int) -> Part:
    """The part of a picture. What follows ``_nohash_`` in its name does not count: such pictures stay together.

    As in TensorFlow's ``retrain.py``: https://github.com/tensorflow/hub/blob/master/examples/image_retraining/retrain.py
    """
    counted = re.sub(r"_nohash_.*$", "", name, flags=re.DOTALL)
    digest = hashlib.sha1(os.fsencode(f"{label}/{counted}"), usedforsecurity=False).hexdigest()
    percentage = int(digest, 16) % _BUCKETS * (100.0 / (_BUCKETS - 1))
    if percentage < validation_percentage:
        return "validation"
    return "testing" if percentage < validation_percentage + testing_percentage else "training"


def normalised(folder: str) -> str:
    """The label that a folder's name stands for: lower case, every run of other than a-z and 0-9 one space."""
    return re.sub(r"[^a-z0-9]+", " ", folder.lower()).strip()


def regular(path: Path) -> Path:
    """The path. Raises OSError if reading it might never end: a pipe, a device."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, and no file", str(path))
    return path


def check(dataset: Dataset, wanted: Iterable[str]) -> None:
    """Raises SpecError with everything that makes training with these pictures impossible.

    wanted: parts that are to hold pictures.
    """
    counts = dataset.counts()
    there = [name for name, parts in counts.items() if sum(parts.values())]
    if len(there) < 2:
        raise SpecError(
            f"--image_dir: {dataset.root} has pictures of {_listed(list(map(repr, there))) or 'nothing'} alone, and a "
            "classifier tells two labels apart at least",
            hint="Make a folder for each label in it, and put that label's pictures there.",
        )
    problems = []
    if untrained := [repr(name) for name, parts in counts.items() if not parts["training"]]:
        problems.append(
            f"no picture of {_listed(untrained)} is left to train with: add some, or lower --testing_percentage and "
            "--validation_percentage"
        )
    problems += [
        f"none of the {len(dataset.pictures)} pictures is for {part}: add pictures, raise --{part}_percentage, or say "
        f"--{part}_percentage 0 to do without"
        for part in ("validation", "testing")
        if part in wanted and not any(parts[part] for parts in counts.values())
    ]
    if problems:
        raise SpecError(problems)


Folders = dict[Path, list[str]]


def _label_folders(root: Path) -> tuple[dict[Part, Folders], set[Part], list[str]]:
    """The folders of labels with their pictures, under the part that they are given for; the parts that are given, none
    where parts are to be drawn; and remarks."""
    remarks: list[str] = []
    folders, files = _scan(root)
    pictures = [name for name in files if _is_picture(name)]
    parts = {name: _PART_FOLDERS.get(name.lower()) for name in folders}
    inner = {name: _scan(root / name) for name in folders}
    holds_labels = all(subfolders and not any(map(_is_picture, there)) for subfolders, there in inner.values())
    if folders and holds_labels and all(parts.values()) and "training" in parts.values():
        labelled: dict[Part, Folders] = {}
        for name, part in parts.items():
            assert part is not None
            labelled.setdefault(part, {}).update(_read_labels(root / name, inner[name][0], remarks))
        remarks.insert(0, f"{_listed(folders)} in {root} are taken for the parts of the data")
        return labelled, set(labelled), remarks
    if pictures:
        remarks.append(f"{_many(len(pictures), 'picture')} left out, without a label, directly in {root}")
    found = _read_labels(root, folders, remarks)
    if not found:
        deeper = [name for name, (subfolders, _) in inner.items() if subfolders]
        looked = f"it has the folders {_listed(folders)}" if folders else "it has no folders"
        raise SpecError(
            f"--image_dir: no folder in {root} holds pictures directly; {looked}",
            hint=f"Give the folder whose folders are the labels: {root / deeper[0]}, perhaps."
            if deeper
            else "Make a folder for each label in it, and put that label's pictures there.",
        )
    return {"training": found}, set(), remarks


def _read_labels(root: Path, names: Sequence[str], remarks: list[str]) -> Folders:
    """The folders of labels in a folder, and the names of their pictures; what is left out becomes a remark."""
    found: Folders = {}
    empty, deep, others = [], [], 0
    for name in names:
        subfolders, files = _scan(root / name)
        pictures = [file for file in files if _is_picture(file)]
        others += len(files) - len(pictures)
        deep += [f"{name}/{each}" for each in subfolders if any(map(_is_picture, _scan(root / name / each)[1]))]
        if pictures:
            found[root / name] = pictures
        else:
            empty.append(name)
    if found and empty:
        remarks.append(f"folders in {root} without pictures are no labels: {_listed(empty)}")
    if found and deep:
        remarks.append(f"pictures in folders within a label's folder are left out: {_listed(deep)}")
    if others:
        remarks.append(f"{_many(others, 'file')} left out in {root}, not of a picture by the name")
    return found


def _labels(folders: Sequence[Path], *, keep_names: bool) -> dict[Path, str]:
    """The label of each folder. Raises SpecError where two folders of one part have one label, or one has none."""
    labels = {folder: folder.name if keep_names else normalised(folder.name) for folder in folders}
    problems = []
    clashing: dict[tuple[Path, str], list[str]] = {}
    for folder, label in labels.items():
        clashing.setdefault((folder.parent, label), []).append(folder.name)
        if keep_names and visible(label) != label:
            problems.append(f"--image_dir: the folder's name {label!r} cannot be a label")
        if keep_names and label.strip() != label:
            problems.append(f"--image_dir: the folder's name {label!r} begins or ends with a space")
    for (_, label), names in clashing.items():
        shown = _listed([repr(name) for name in sorted(names)])
        if not label:
            problems.append(f"--image_dir: nothing of a-z and 0-9 is in the name of {shown} to make a label of")
        elif len(names) > 1:
            problems.append(f"--image_dir: the folders {shown} have one label, {label!r}")
    if problems:
        raise SpecError(
            problems, hint=None if keep_names else "Rename a folder, or take the names as they are with --keep-names."
        )
    return labels


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    """The names of what is in a folder and not hidden, sorted: folders, and files. Raises StorageError."""
    try:
        with os.scandir(folder) as entries:
            there = sorted(
                (each for each in entries if not each.name.startswith(".")), key=lambda each: os.fsencode(each.name)
            )
            return [each.name for each in there if each.is_dir()], [each.name for each in there if not each.is_dir()]
    except OSError as error:
        raise StorageError(f"--image_dir: {folder} cannot be read: {error.strerror}") from error


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in suffixes()


def _many(count: int, what: str) -> str:
    return f"1 {what} is" if count == 1 else f"{count:,} {what}s are"


def _listed(names: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more
