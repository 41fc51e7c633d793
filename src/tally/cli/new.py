"""``tally new``: working starting points for scorers and model packages."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import click

from tally.errors import OutputExistsError, SpecError, StorageError

SCORER = '''\
"""{title}: try it with

    tally score photos/ --model {file} --out out/
"""

import numpy as np

from tally import Scorer


class {name}(Scorer):
    # What score() is given: "image" (uint8[height, width, 3], RGB), "bytes" (a file's content) or "path".
    input = "image"
    # How many of them at once, at most.
    batch_size = 16
    # The columns of the result, so that every part has the same ones. Leave it out to have them inferred.
    columns = {{"brightness": "float32", "label": "string"}}

    # Options become keyword arguments: --set threshold=0.3
    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    def load(self, artifacts, device):
        """Called once in each worker. Load weights here, from the folder that --artifacts names."""

    def score(self, batch):
        """One result per item, in the same order: a dict is a row, a list of dicts is several rows, an
        array is a picture, and an exception marks that item alone as failed."""
        results = []
        for image in batch:
            brightness = float(np.mean(image)) / 255
            label = "bright" if brightness > self.threshold else "dark"
            results.append({{"brightness": brightness, "label": label}})
        return results
'''

SCRIPT = '''\
"""{title}: a scoring script in the Azure ML manner. Try it with

    tally score photos/ --model {file} --artifacts weights/ --out out/
"""

import os


def init():
    """Called once in each worker. --artifacts says where AZUREML_MODEL_DIR is."""
    global weights
    weights = sorted(os.listdir(os.environ["AZUREML_MODEL_DIR"]))


def run(mini_batch):
    """Called with a list of file paths: one result per file, in the same order.

    For one request at a time, decorate it instead with azureml.contrib.services.aml_request.rawhttp and
    take the bytes from request.get_data(False).
    """
    return [{{"bytes": os.path.getsize(path), "weights": len(weights)}} for path in mini_batch]
'''

PACKAGE = """\
# A model package: a folder with this file, and everything that the model needs.
#
#     tally score photos/ --model {folder} --out out/
#     tally models add {name} {folder}

name: {name}

# Code: a .py file that defines one Scorer, or init() and run().
# For an ONNX model, write file: model.onnx instead ('tally new package NAME --from model.onnx').
entry: scorer.py

# Items scored at once.
batch_size: 16

# Keyword arguments of the scorer's constructor; --set threshold=0.3 overrides them.
options:
  threshold: 0.5
"""

ONNX_PACKAGE = """\
# A model package: a folder with this file, and everything that the model needs.
#
#     tally score photos/ --model {folder} --out out/
#     tally models add {name} {folder}

name: {name}
file: {file}

# Pictures scored at once.
batch_size: {batch_size}

# What the file does not say about itself, as far as it could be told from it: check it.
# Each can be overridden: --set preprocess.channels=bgr
options:
"""

COMMENTS = {
    "task": "classify, detect, restyle, embed or segment",
    "labels": "names of the classes, one per line, in the model's order",
    "preprocess": "how a picture becomes the model's input",
    "size": "width, height in pixels",
    "resize": "squash, crop (shorter side, then the centre) or letterbox",
    "channels": "rgb, bgr or gray",
    "scale": "a pixel x in 0..255 becomes (x * scale - mean) / std",
    "mean": "in the model's channel order",
    "top": "how many classes to report",
    "softmax": "auto, always or never",
    "decoder": "how boxes are decoded",
    "score_threshold": "boxes below it are left out",
    "iou_threshold": "boxes of one class that overlap more are one",
}

ONLY_FOR = {
    "top": "classify",
    "softmax": "classify",
    "decoder": "detect",
    "score_threshold": "detect",
    "iou_threshold": "detect",
    "output": "segment",
}
"""Options that mean something for one task only."""


@click.group()
def new() -> None:
    """Start a scorer or a model package from a working template."""


@new.command()
@click.argument("name")
@click.option("--script", is_flag=True, help="A script with init() and run(), as Azure ML knows them.")
def scorer(name: str, script: bool) -> None:
    """Write NAME.py: a scorer that works, to change."""
    path = Path(name.removesuffix(".py") + ".py")
    path = path.with_name(_identifier(path.stem) + ".py")
    template = SCRIPT if script else SCORER
    _write(path, template.format(title=path.stem, file=path, name=_class_name(path.stem)))
    click.echo(f"wrote {path}")
    artifacts = " --artifacts FOLDER" if script else ""
    click.echo(f"  Try it: tally score photos/ --model {path}{artifacts} --out out/", err=True)


@new.command()
@click.argument("name")
@click.option("--from", "model", help="An .onnx file to make a package of.")
@click.option("-t", "--task", help="With --from: classify, detect, restyle, embed or segment.")
@click.option("--labels", help="With --from: a text file with one class per line, or JSON.")
def package(name: str, model: str | None, task: str | None, labels: str | None) -> None:
    """Write the folder NAME: a model package that works, to change."""
    folder = Path(name)
    if folder.exists():
        raise OutputExistsError(f"{folder} is there already", hint="Choose another name, or remove it first.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", folder.name):
        raise SpecError(f"{folder.name!r} cannot be a package's name", hint="Use letters, digits, '.', '_' and '-'.")
    if model is not None:
        _from_onnx(folder, model, task, labels)
    elif task or labels:
        raise SpecError("--task and --labels describe a model file", hint="Name it with --from model.onnx.")
    else:
        code = SCORER.format(title=folder.name, file=folder, name=_class_name(folder.name))
        _write(folder / "tally.yaml", PACKAGE.format(name=folder.name, folder=folder))
        _write(folder / "scorer.py", code)
    for path in sorted(folder.iterdir()):
        click.echo(f"wrote {path}")
    click.echo(f"  Try it: tally score photos/ --model {folder} --out out/", err=True)


def _from_onnx(folder: Path, model: str, task: str | None, labels: str | None) -> None:
    from tally.models.hashing import content_files
    from tally.models.resolve import resolve
    from tally.scorers.vision.processing import read_labels

    ref = resolve(model, task=task, labels=labels)
    if ref.kind != "onnx" or not model.lower().endswith(".onnx"):
        raise SpecError(f"--from takes an .onnx file, not {model!r}", hint="For code, leave --from out.")
    options = dict(ref.options)
    batch_size = options.pop("batch_size")
    classes = options.pop("classes", None)
    names = options.get("labels")
    given = {"labels.txt"}
    if isinstance(names, str):
        given.add(names)
        names = read_labels(ref.location / names)
    elif names is None and classes and options["task"] in ("classify", "detect", "segment"):
        names = [f"class {number}" for number in range(classes)]  # placeholders, to be replaced
    for found in ("file", "batch", "threads", *(name for name, task in ONLY_FOR.items() if task != options["task"])):
        options.pop(found, None)
    options["labels"] = "labels.txt" if names else None
    described = ONNX_PACKAGE.format(name=folder.name, folder=folder, file=Path(ref.entry).name, batch_size=batch_size)
    _write(folder / "tally.yaml", described + _yaml(options, "  "))
    if names:
        _write(folder / "labels.txt", "".join(f"{each}\n" for each in names))
    for name, path in content_files(ref.location, [each for each in ref.files if not Path(each).is_absolute()]):
        if name not in given:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    for line in ref.assumed:
        click.secho(f"note: {line}", dim=True, err=True)


def _yaml(options: dict[str, Any], indent: str) -> str:
    """Options as YAML, each with its comment; what was left open is left out."""
    import yaml

    lines = []
    for key, value in options.items():
        if value is None:
            continue
        if key in COMMENTS:
            lines.append(f"{indent}# {COMMENTS[key]}")
        if isinstance(value, dict):
            lines.append(f"{indent}{key}:\n{_yaml(value, indent + '  ')}".rstrip())
        else:
            text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
            lines.append(f"{indent}{key}: {text}")
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputExistsError(f"{path} is there already", hint="Choose another name, or remove it first.") from None
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def _identifier(name: str) -> str:
    """A module's name: letters, digits and underscores."""
    found = re.sub(r"\W", "_", name)
    if not found.isidentifier():
        raise SpecError(f"{name!r} cannot be a scorer's name", hint="Begin with a letter; use letters, digits and '_'.")
    return found


def _class_name(name: str) -> str:
    words = re.split(r"[\W_]+", name)
    found = "".join(word[:1].upper() + word[1:] for word in words if word)
    return found if found.isidentifier() else f"Scorer{found}"
