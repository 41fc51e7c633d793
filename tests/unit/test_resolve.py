"""From what a user calls a model to a reference, and from there to a loaded scorer."""

from __future__ import annotations

import hashlib
import json
import pickle
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.bright import SCORER
from tests.colours import model

from tally.errors import (
    ModelChangedError,
    ModelLoadError,
    ModelNotFoundError,
    SpecError,
    UntrustedModelError,
)
from tally.models.load import create, load
from tally.models.reference import ModelRef
from tally.models.resolve import resolve
from tally.scorers.base import Scorer

pytestmark = pytest.mark.usefixtures("restored", "empty_folder")


# ONNX files


def test_onnx_file(tmp_path: Path) -> None:
    path = model(tmp_path / "colours.onnx")
    ref = resolve(path, settings={"preprocess.channels": "bgr", "top": 2})
    assert (ref.kind, ref.name, ref.location, ref.entry) == ("onnx", "colours", tmp_path, "colours.onnx")
    assert ref.options["preprocess"]["channels"] == "bgr"
    assert ref.options["top"] == 2
    assert any("labels were not given" in line for line in ref.assumed)
    assert "assumed" not in ref.options
    assert ModelRef.from_dict(json.loads(json.dumps(ref.to_dict()))) == ref
    scorer = load(ref, "cpu")
    assert (scorer.input, scorer.output, scorer.size) == ("image", "rows", (8, 8))
    assert create(ref).columns == scorer.columns


def test_references_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Their names for fields are in databases."""
    ref = replace(resolve(model(tmp_path / "colours.onnx")), mirror="s3://bucket/models")
    old = ref.to_dict()
    old["origin"] = old.pop("mirror")
    assert ModelRef.from_dict(json.loads(json.dumps(old))) == ref


def test_only_what_belongs_to_an_onnx_file_counts(tmp_path: Path) -> None:
    path = model(tmp_path / "m" / "colours.onnx", external="colours.weights")
    labels = tmp_path / "labels.txt"
    labels.write_text("red\ngreen\nblue\n")
    ref = resolve(path, labels=labels)
    assert ref.options["labels"] == ["red", "green", "blue"]
    assert set(ref.files) == {"colours.onnx", "colours.weights", str(labels)}
    (path.parent / "another.onnx").write_bytes(b"not ours")
    load(ref, "cpu")
    labels.write_text("rouge\ngreen\nblue\n")
    assert resolve(path, labels=labels).hash != ref.hash
    labels.write_text("red\ngreen\nblue\n")
    assert resolve(path, labels=labels).hash == ref.hash
    weights = path.parent / "colours.weights"
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(ModelChangedError, match="colours: it changed since the job began"):
        load(ref, "cpu")
    weights.unlink()
    with pytest.raises(ModelChangedError, match=r"colours\.weights cannot be read"):
        load(ref, "cpu")


def test_options_declared_beside_an_onnx_file(tmp_path: Path) -> None:
    path = model(tmp_path / "colours.onnx")
    beside = tmp_path / "colours.onnx.yaml"
    beside.write_text("top: 3\npreprocess: {channels: bgr, scale: 1.0}\nlabels: l.txt\n")
    (tmp_path / "l.txt").write_text("a\nb\nc")
    options = resolve(path, settings={"preprocess.channels": "rgb"}).options
    assert (options["top"], options["labels"]) == (3, "l.txt")
    assert (options["preprocess"]["channels"], options["preprocess"]["scale"]) == ("rgb", 1.0)
    beside.write_text("top: [")
    with pytest.raises(SpecError, match=r"colours\.onnx\.yaml is not valid YAML"):
        resolve(path)
    beside.write_text("- top")
    with pytest.raises(SpecError, match="must hold fields"):
        resolve(path)
    beside.unlink()
    with pytest.raises(SpecError, match="top is a value"):
        resolve(path, settings={"top": 3, "top.most": 1})
    with pytest.raises(SpecError, match=r"did you mean 'channels'\?"):
        resolve(path, settings={"preprocess.chanels": "rgb"})


# code


def test_file_with_a_scorer(tmp_path: Path) -> None:
    path = tmp_path / "bright.py"
    path.write_text(SCORER)
    (tmp_path / "helper_of_mine.py").write_text("VALUE = 1")
    (tmp_path / "stranger.py").write_text("VALUE = 1")
    weights = tmp_path / "weights"
    weights.mkdir()
    ref = resolve(path, artifacts=weights, settings={"threshold": 0.5, "batch_size": 3})
    assert (ref.kind, ref.name, ref.entry) == ("python", "bright", "bright.py:Bright")
    assert ref.files == ("bright.py", "helper_of_mine.py", "weights")
    scorer = load(ref, "cpu")
    assert scorer.batch_size == 3
    assert scorer.artifacts == weights  # type: ignore[attr-defined]
    assert scorer.score(["a"]) == [{"threshold": 0.5, "label": "x"}]
    (tmp_path / "stranger.py").write_text("VALUE = 2")
    load(ref, "cpu")
    (weights / "w.bin").write_bytes(b"new")
    with pytest.raises(ModelChangedError):
        load(ref, "cpu")


def test_load_that_fails_says_where(tmp_path: Path) -> None:
    (tmp_path / "it.py").write_text(
        "from tally import Scorer\nclass It(Scorer):\n    def load(self, artifacts, device):\n        1 / 0\n"
    )
    with pytest.raises(ModelLoadError, match=r"it: load\(\) failed: ZeroDivisionError: .* \(it\.py, line 4\)"):
        load(resolve("it.py"), "cpu")


def test_options_of_a_scorer_are_checked(tmp_path: Path) -> None:
    (tmp_path / "bright.py").write_text(SCORER.replace("import helper_of_mine", ""))
    with pytest.raises(SpecError) as caught:
        resolve("bright.py", settings={"treshold": 1, "batch_size": 0})
    text = str(caught.value)
    assert "Bright has no option 'treshold'; did you mean 'threshold'?" in text
    assert "Bright needs the option 'threshold'" in text
    assert "batch_size must be a whole number from 1" in text
    with pytest.raises(SpecError, match=r"--task and --labels cannot be used with the Python file bright\.py"):
        resolve("bright.py", task="classify", labels=__file__)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("x = 1", ModelLoadError, "neither init.* nor a subclass of tally.Scorer"),
        ("from tally import Scorer", ModelLoadError, "neither init"),
        (
            "from tally import Scorer\nclass A(Scorer): ...\nclass B(Scorer): ...",
            ModelLoadError,
            r"defines A, B: which one is meant\?\n  Name it: it\.py:A",
        ),
        ("x = = 1", ModelLoadError, "not valid Python, line 1"),
        ("1 / 0", ModelLoadError, r"ZeroDivisionError: division by zero \(it\.py, line 1\)"),
        ("import not_there_at_all", ModelLoadError, "Install 'not_there_at_all'"),
        ("def run(data): ...", SpecError, r"defines no init\(\)"),
    ],
)
def test_code_that_is_no_model(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "it.py").write_text(text)
    with pytest.raises(error, match=message):
        resolve("it.py")


def test_script_and_its_hash(tmp_path: Path) -> None:
    script = tmp_path / "score.py"
    script.write_text(
        "import os, preparation\ndef init(): ...\ndef run(mini_batch): return [os.environ['AZUREML_MODEL_DIR']]"
    )
    (tmp_path / "preparation.py").write_text("")
    (tmp_path / "photo.jpg").write_bytes(b"not part of the model")
    ref = resolve(script, settings={"batch_size": 10})
    assert (ref.kind, ref.files) == ("script", ("score.py", "preparation.py"))
    assert ref.options == {"form": "mini_batch", "batch_size": 10, "arguments": []}
    assert ref.assumed[0].startswith("AZUREML_MODEL_DIR: no --artifacts given")
    (tmp_path / "out.csv").write_text("written while the job runs")
    loaded = load(ref, "cpu")
    assert loaded.batch_size == 10
    assert loaded.score(["photo.jpg"]) == [{"prediction": str(tmp_path)}]
    (tmp_path / "preparation.py").write_text("changed = True")
    with pytest.raises(ModelChangedError):
        load(ref, "cpu")
    with pytest.raises(SpecError, match=r"fom: there is no such field; did you mean 'form'\?"):
        resolve(script, settings={"fom": "raw"})
    with pytest.raises(SpecError, match="there is no folder"):
        resolve(script, artifacts=tmp_path / "missing")


def test_importable_class(tmp_path: Path) -> None:
    folder = tmp_path / "my_scorers_for_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "simple.py").write_text(SCORER.replace("import helper_of_mine", ""))
    ref = resolve("my_scorers_for_test.simple:Bright", settings={"threshold": 1})
    assert (ref.kind, ref.name, ref.location) == ("python", "Bright", tmp_path)
    assert ref.files == ("my_scorers_for_test/simple.py",)
    assert load(ref, "cpu").score(["a"]) == [{"threshold": 1, "label": "x"}]
    with pytest.raises(ModelLoadError, match=r"did you mean 'Bright'\?"):
        resolve("my_scorers_for_test.simple:Brigth")
    assert resolve("my_scorers_for_test/simple.py:Bright", settings={"threshold": 1}).entry == "simple.py:Bright"
    with pytest.raises(ModelNotFoundError, match="no module 'my_scorers_for_test"):
        resolve("my_scorers_for_test.complex:Bright")


# objects of the calling program


class Doubling(Scorer):
    input = "bytes"

    def __init__(self, factor: int = 2) -> None:
        self.factor = factor

    def score(self, batch: Any) -> Any:
        return [{"value": self.factor * len(each)} for each in batch]


def test_objects(home: Path) -> None:
    ref = resolve(Doubling(3), settings={"batch_size": 5})
    assert (ref.kind, ref.name, ref.trusted) == ("object", "Doubling", True)
    assert ref.location.is_relative_to(home)
    assert stat.S_IMODE((ref.location / ref.entry).stat().st_mode) == 0o600
    scorer = load(ModelRef.from_dict(json.loads(json.dumps(ref.to_dict()))), "cpu")
    assert (scorer.batch_size, scorer.input) == (5, "bytes")
    assert scorer.score([b"ab"]) == [{"value": 6}]
    assert resolve(Doubling(3)).hash == ref.hash
    assert resolve(Doubling(4)).hash != ref.hash
    by_class = resolve(Doubling, settings={"factor": 7})
    assert load(by_class, "cpu").score([b"a"]) == [{"value": 7}]
    (ref.location / ref.entry).write_bytes(pickle.dumps(print))
    with pytest.raises(ModelChangedError):
        create(ref)


def test_objects_that_cannot_be_used() -> None:
    held = Doubling()
    held.factor = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(SpecError, match=r"cannot be sent to worker processes.*\n  Open files.*in load\(\)"):
        resolve(held)
    with pytest.raises(SpecError, match="not 3"):
        resolve(3)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="factor can no longer be set"):
        resolve(Doubling(), settings={"factor": 1})


def test_classes_of_a_program_keep_their_hash_from_run_to_run(tmp_path: Path, home: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import tally\nfrom tally.models.load import load\nfrom tally.models.resolve import resolve\n"
        "class Mine(tally.Scorer):\n"
        "    def score(self, batch): return [{'n': 1, 'text': 'd41d8cd98f00b204e9800998ecf8427e'}] * len(batch)\n"
        "ref = resolve(Mine())\nprint(ref.hash, load(ref, 'cpu').score([1]))\n"
    )
    runs = {
        subprocess.run([sys.executable, program], capture_output=True, text=True, check=True).stdout for _ in range(2)
    }
    (only,) = runs
    assert "'text': 'd41d8cd98f00b204e9800998ecf8427e'" in only


# refusals


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("m.pkl", b"\x80\x04K\x01.", UntrustedModelError, "is a pickle: opening it runs"),
        ("m.PTH", b"PK\x03\x04", ModelLoadError, "is a ZIP archive that is damaged or cut off, and neither a network"),
        ("m.th", b"\x89HDF\r\n\x1a\n", ModelLoadError, "is an HDF5 file, as Keras writes, and neither a network nor"),
        ("m.pt2", b"abc", ModelLoadError, "is damaged, or no file of PyTorch"),
        ("model_1_1", b"\x80\x03c", UntrustedModelError, "is a pickle"),
        ("disguised.onnx", b"\x80\x05\x95", ModelLoadError, "is a pickle of a kind that cannot be scored"),
        ("m.onnx", b"version https://git-lfs.github.com/spec/v1\n", ModelLoadError, "git lfs pull"),
        ("m.onnx", b"", ModelLoadError, r"is empty \(0 bytes\)"),
        (
            "m.ckpt",
            bytes(99) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb",
            ModelLoadError,
            r"index of a TensorFlow checkpoint, .*and \.ckpt files cannot be scored\n  Save the model itself",
        ),
        ("model", b"abc", ModelLoadError, "files without a suffix cannot be scored"),
    ],
)
def test_files_that_are_refused(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        resolve(name)
    if error is UntrustedModelError:
        with pytest.raises(ModelLoadError, match=r"has neither|cannot be"):
            resolve(name, trust=True)


def test_hostile_models_are_refused(data: Path) -> None:
    paths = sorted((data / "hostile/models").iterdir())
    assert len(paths) == 5
    for path in paths:
        with pytest.raises(ModelLoadError if path.suffix == ".onnx" else UntrustedModelError) as caught:
            resolve(path)
        assert caught.value.hint
        assert str(path) in caught.value.message


def test_names_that_are_not_there(tmp_path: Path) -> None:
    model(tmp_path / "squeezenet.onnx")
    with pytest.raises(ModelNotFoundError, match=r"no model at 'squezenet\.onnx'\n  Did you mean squeezenet\.onnx\?"):
        resolve("squezenet.onnx")
    (tmp_path / "scorer.py").touch()
    with pytest.raises(ModelNotFoundError, match=r"no model at 'scoer\.py'\n  Did you mean scorer\.py\?"):
        resolve("scoer.py:Bright")
    with pytest.raises(ModelNotFoundError, match="A registered model is written models:/faces"):
        resolve("faces")


# downloads


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """What is on the web; every download empties it."""
    there: dict[str, bytes] = {}

    def fetch(url: str, target: Path) -> str:
        target.write_bytes(there.pop(url))
        return hashlib.sha256(target.read_bytes()).hexdigest()

    monkeypatch.setattr("tally.models.web.fetch", fetch)
    return there


def test_downloads(tmp_path: Path, home: Path, web: dict[str, bytes]) -> None:
    content = model(tmp_path / "m.onnx").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    url = "https://example.org/models/colours.onnx"
    web[url] = content
    with pytest.raises(SpecError, match=f"write {url}#sha256={digest}"):
        resolve(url)
    assert not web
    ref = resolve(f"{url}#sha256={digest}")  # kept from the first time
    assert (ref.name, ref.kind) == ("colours", "onnx")
    assert ref.location.is_relative_to(home)
    web[url] = b"<html>not found</html>"
    with pytest.raises(ModelChangedError, match=r"has the content sha256=.* not sha256=0000"):
        resolve(f"{url}#sha256={'0' * 64}")
    (ref.location / ref.entry).write_bytes(b"damaged")
    web[url] = content
    assert resolve(f"{url}#sha256={digest}").hash == ref.hash


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org/m.onnx", "come from https:// URLs, not http://"),
        ("https://example.org/m.zip", r"must name a model file \(\.onnx, .*\.py\), not 'm\.zip'"),
        ("https://example.org/m.onnx#sha256=12", "64 hexadecimal digits"),
    ],
)
def test_urls_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve(url)
