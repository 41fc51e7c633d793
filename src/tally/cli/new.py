"""``tally new``: working starting points for scorers and model packages."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tally.cli.console import say
from tally.errors import OutputExistsError, SpecError
from tally.storage import failure

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
# For a model file, write file: model.onnx instead ('tally new package NAME --from model.onnx').
entry: scorer.py

# Items scored at once.
batch_size: 16

# Keyword arguments of the scorer's constructor; --set threshold=0.3 overrides them.
options:
  threshold: 0.5
"""

FILE_PACKAGE = """\
# A model package: a folder with this file, and everything that the model needs.
#
#     tally score photos/ --model {folder} --out out/
#     tally models add {name} {folder}

name: {name}
file: {file}
"""

FILE_OPTIONS = """
# What the file does not say about itself, as far as it could be inferred: check it.
# Each can be overridden: --set preprocess.channels=bgr
options:
"""


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
    say(f"wrote {path}")
    artifacts = " --artifacts FOLDER" if script else ""
    say(f"  Try it: tally score photos/ --model {path}{artifacts} --out out/", err=True)


@new.command()
@click.argument("name")
@click.option("--from", "model", help="A model file, such as an .onnx file, to make a package of.")
@click.option("-t", "--task", help="With --from: classify, detect, restyle, embed, segment or values.")
@click.option("--labels", help="With --from: a text file with one class per line, or JSON.")
def package(name: str, model: str | None, task: str | None, labels: str | None) -> None:
    """Write the folder NAME: a model package that works, to change."""
    folder = Path(name)
    if folder.exists():
        raise OutputExistsError(f"{folder} is there already", hint="Choose another name, or remove it first.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", folder.name):
        raise SpecError(f"{folder.name!r} cannot be a package's name", hint="Use letters, digits, '.', '_' and '-'.")
    if model is not None:
        _from_file(folder, model, task, labels)
    elif task or labels:
        raise SpecError("--task and --labels describe a model file", hint="Name it with --from model.onnx.")
    else:
        code = SCORER.format(title=folder.name, file=folder, name=_class_name(folder.name))
        _write(folder / "tally.yaml", PACKAGE.format(name=folder.name, folder=folder))
        _write(folder / "scorer.py", code)
    for path in sorted(folder.iterdir()):
        say(f"wrote {path}")
    say(f"  Try it: tally score photos/ --model {folder} --out out/", err=True)


def _from_file(folder: Path, model: str, task: str | None, labels: str | None) -> None:
    from tally.models import kinds
    from tally.models.hashing import content_files
    from tally.models.resolve import resolve

    ref = resolve(model, task=task, labels=labels)
    kind = kinds.get(ref.kind)
    if kind.traits.entry or not kind.traits.claims_name(model):
        raise SpecError(f"--from takes a model file, not {model!r}", hint="For code, leave --from out.")
    options = kind.starting_options(ref)
    batch_size = options.pop("batch_size", None)
    declared = ref.options.get("labels")
    given = {"labels.txt", declared} if isinstance(declared, str) else {"labels.txt"}
    if names := options.pop("labels", None):
        options["labels"] = "labels.txt"
    described = FILE_PACKAGE.format(name=folder.name, folder=folder, file=Path(ref.entry).name)
    if batch_size is not None:
        described += f"\n# Items scored at once.\nbatch_size: {batch_size}\n"
    if any(value is not None for value in options.values()):
        described += FILE_OPTIONS + _yaml(options, kind.comments, "  ")
    _write(folder / "tally.yaml", described)
    if names:
        _write(folder / "labels.txt", "".join(f"{each}\n" for each in names))
    for name, path in content_files(ref.location, [each for each in ref.files if not Path(each).is_absolute()]):
        if name not in given:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    for line in ref.assumed:
        say(f"note: {line}", dim=True, err=True)


def _yaml(options: dict[str, Any], comments: Mapping[str, str], indent: str) -> str:
    """Options as YAML, each below its comment; those without a value are left out."""
    import yaml

    lines = []
    for key, value in options.items():
        if value is None:
            continue
        if key in comments:
            lines.append(f"{indent}# {comments[key]}")
        if isinstance(value, dict):
            lines.append(f"{indent}{key}:\n{_yaml(value, comments, indent + '  ')}".rstrip())
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
        raise failure("write", str(path), error) from error


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
