"""Folders with a ``tally.yaml``: what they say is checked, and becomes the model's reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.bright import SCORER
from tests.colours import model

from tally.errors import (
    ModelChangedError,
    ModelLoadError,
    SpecError,
    UntrustedModelError,
)
from tally.models.load import load
from tally.models.resolve import resolve
from tally.scorers.base import Item

pytestmark = pytest.mark.usefixtures("restored", "empty_folder")


def package(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tally.yaml").write_text(text)
    return folder


def test_package_of_an_onnx_file(tmp_path: Path) -> None:
    folder = package(tmp_path / "p", "name: colours\nfile: deep/m.onnx\nbatch_size: 4\noptions: {labels: names.txt}\n")
    model(folder / "deep" / "m.onnx")
    (folder / "names.txt").write_text("red\ngreen\nblue\n")
    ref = resolve(folder)
    assert (ref.name, ref.kind, ref.files, ref.artifacts) == ("colours", "onnx", (".",), "deep")
    assert (ref.options["batch_size"], ref.options["labels"]) == (4, ["red", "green", "blue"])
    assert resolve(folder / "tally.yaml") == ref
    assert resolve(folder, settings={"batch_size": 2}).options["batch_size"] == 2
    scorer = load(ref, "cpu")
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    (row,) = scorer.score([scorer.prepare(Item("red", red, {"width": 8, "height": 8}))])
    assert isinstance(row, dict)
    assert row["label"] == "red"
    (folder / "new.txt").write_text("something else in the folder")
    with pytest.raises(ModelChangedError):
        load(ref, "cpu")


def test_package_problems_are_reported_together(tmp_path: Path) -> None:
    folder = package(tmp_path / "p", "nane: x\nfile: m.onnx\nbatch_size: 0\nkind: abacus\n")
    model(folder / "n.onnx")
    with pytest.raises(SpecError) as caught:
        resolve(folder)
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "nane: there is no such field; did you mean 'name'?" in text
    assert "file: there is no 'm.onnx' in the package; did you mean 'n.onnx'?" in text
    assert "batch_size: " in text
    assert "kind: " in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x", "either file .* or entry"),
        ("file: ../outside.onnx", "lies outside the package"),
        ("file: m.onnx\nkind: script", "kind: is script, but what it names is of kind onnx"),
        ("[]", "must hold fields"),
        ("file: m.abacus", r"does not end in \.onnx"),
        ("entry: score", r"'score' does not end in \.py"),
        ("entry: nothing.py:Class", r"there is no 'nothing\.py' in the package"),
    ],
)
def test_package_problems(tmp_path: Path, text: str, message: str) -> None:
    model(tmp_path / "outside.onnx")
    folder = package(tmp_path / "p", text)
    model(folder / "m.onnx")
    with pytest.raises(SpecError, match=message):
        resolve(folder)


def test_package_of_code(tmp_path: Path) -> None:
    folder = package(tmp_path / "p", "entry: bright.py:Bright\nartifacts: weights\noptions: {threshold: 1}\n")
    (folder / "weights").mkdir()
    (folder / "bright.py").write_text(SCORER.replace("import helper_of_mine", "class Other(Scorer): ..."))
    ref = resolve(folder)
    assert (ref.kind, ref.entry, ref.artifacts, ref.files) == ("python", "bright.py:Bright", "weights", (".",))
    assert load(ref, "cpu").artifacts == folder / "weights"  # type: ignore[attr-defined]
    package(folder, "entry: package_code_for_test:Bright\nartifacts: weights\noptions: {threshold: 1}\n")
    (folder / "bright.py").rename(folder / "package_code_for_test.py")
    ref = resolve(folder)
    assert (ref.kind, ref.name, ref.location, ref.artifacts) == ("python", "p", folder, "weights")
    assert load(ref, "cpu").score(["a"]) == [{"threshold": 1, "label": "x"}]


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    folder = package(tmp_path / "p", "file: m.onnx")
    (folder / "m.onnx").symlink_to(model(tmp_path / "blob"))
    (folder / "loop").symlink_to(folder)
    ref = resolve(folder)
    load(ref, "cpu")
    (tmp_path / "blob").write_bytes(b"another")
    with pytest.raises(ModelChangedError):
        load(ref, "cpu")


def test_package_that_needs_trust(tmp_path: Path) -> None:
    folder = package(tmp_path / "p", "file: m.onnx\nrequires_trust: true")
    model(folder / "m.onnx")
    with pytest.raises(UntrustedModelError, match="needs trust"):
        resolve(folder)
    assert resolve(folder, trust=True).trusted


def test_folder_without_a_description(tmp_path: Path) -> None:
    model(tmp_path / "m" / "colours.onnx")
    with pytest.raises(ModelLoadError, match=r"without a tally\.yaml\n  Give a file in it \(colours\.onnx\)"):
        resolve(tmp_path / "m")
