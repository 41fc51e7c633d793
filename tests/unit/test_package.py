"""From what a user calls a model to a reference, and from there to a loaded scorer."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import stat
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tests.colours import model

from tally.cli.new import new
from tally.config import settings
from tally.errors import (
    ModelChangedError,
    ModelLoadError,
    ModelNotFoundError,
    OutputExistsError,
    SpecError,
    UntrustedModelError,
)
from tally.models.load import create, load
from tally.models.reference import ModelRef
from tally.models.resolve import resolve
from tally.scorers.base import Item, Scorer


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work in an empty folder; what loading code changes in this process is undone."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(os.environ, "AZUREML_MODEL_DIR", "")
    monkeypatch.chdir(tmp_path)


SCORER = """
from tally import Scorer
import helper_of_mine

class Bright(Scorer):
    def __init__(self, threshold, label="x"):
        self.threshold, self.label = threshold, label
    def load(self, artifacts, device):
        self.artifacts = artifacts
    def score(self, batch):
        return [{"threshold": self.threshold, "label": self.label}] * len(batch)
"""


# settings


def test_settings_come_from_the_environment_when_asked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings().home == home
    assert settings().database == f"sqlite:///{home}/tally.db"
    monkeypatch.setenv("TALLY_DATABASE", "postgresql+psycopg://me:s3:cr@t@db/tally")
    assert settings().database.endswith("@db/tally")
    assert "s3" not in repr(settings())
    assert "postgresql+psycopg://me:***@db/tally" in repr(settings())


def test_settings_report_all_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TALLY_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TALLY_DATABASE", "mysql://me:secret@db/x")
    with pytest.raises(SpecError) as caught:
        settings()
    assert len(caught.value.problems) == 2
    assert "secret" not in str(caught.value)


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
    with pytest.raises(SpecError, match=r"did you mean channels\?"):
        resolve(path, settings={"preprocess.chanels": "rgb"})


# folders


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
    folder = package(tmp_path / "p", "nane: x\nfile: m.onnx\nbatch_size: 0\nkind: keras\n")
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
        ("file: m.tflite", r"does not end in \.onnx"),
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


# live objects


class Doubling(Scorer):
    input = "bytes"

    def __init__(self, factor: int = 2) -> None:
        self.factor = factor

    def score(self, batch: Any) -> Any:
        return [{"value": self.factor * len(each)} for each in batch]


def test_live_objects(home: Path) -> None:
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


def test_live_objects_that_cannot_be_used() -> None:
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
        ("m.PTH", b"PK\x03\x04", UntrustedModelError, "is a pickle"),
        ("model_1_1", b"\x80\x03c", UntrustedModelError, "is a pickle"),
        ("disguised.onnx", b"\x80\x05\x95", UntrustedModelError, "is a pickle"),
        ("m.onnx", b"version https://git-lfs.github.com/spec/v1\n", ModelLoadError, "git lfs pull"),
        ("m.onnx", b"", ModelLoadError, r"is empty \(0 bytes\)"),
        ("m.tflite", b"TFL3", ModelLoadError, r"\.tflite files cannot be scored\n  Supported are"),
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
        refusal = "has neither predict" if name == "m.pkl" else r"not even trusted ones\n  Supported are \.onnx"
        with pytest.raises(ModelLoadError, match=refusal):
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

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        return io.BytesIO(there.pop(url))

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
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
        ("https://example.org/m.zip", r"must name an \.onnx or \.py file, not 'm\.zip'"),
        ("https://example.org/m.onnx#sha256=12", "64 hexadecimal digits"),
    ],
)
def test_urls_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve(url)


# templates


@pytest.fixture
def tally_new() -> Callable[..., str]:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(new, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return run


def test_new_scorer_works(tally_new: Callable[..., str]) -> None:
    assert "tally score photos/ --model my_scorer.py --out out/" in tally_new("scorer", "my-scorer")
    ref = resolve("my_scorer.py", settings={"threshold": 0.3})
    assert ref.entry == "my_scorer.py:MyScorer"
    scorer = load(ref, "cpu")
    dark, bright = scorer.score([np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)])
    assert (dark, bright) == ({"brightness": 0.0, "label": "dark"}, {"brightness": 1.0, "label": "bright"})
    assert set(scorer.columns or ()) == {"brightness", "label"}
    with pytest.raises(OutputExistsError, match=r"my_scorer\.py is there already"):
        tally_new("scorer", "my_scorer.py")
    with pytest.raises(SpecError, match="cannot be a scorer's name"):
        tally_new("scorer", "7up")


def test_new_script_works(tally_new: Callable[..., str], tmp_path: Path) -> None:
    tally_new("scorer", "score", "--script")
    ref = resolve("score.py")
    assert ref.options["form"] == "mini_batch"
    assert load(ref, "cpu").score([str(tmp_path / "score.py")])[0]["weights"] >= 1  # type: ignore[call-overload,index]


def test_new_package_works(tally_new: Callable[..., str], tmp_path: Path) -> None:
    tally_new("package", "brightness")
    ref = resolve("brightness")
    assert (ref.name, ref.kind, ref.options) == ("brightness", "python", {"threshold": 0.5, "batch_size": 16})
    assert load(ref, "cpu").batch_size == 16
    with pytest.raises(OutputExistsError, match="brightness is there already"):
        tally_new("package", "brightness")


def test_new_package_from_a_model(tally_new: Callable[..., str], tmp_path: Path) -> None:
    model(tmp_path / "colours.onnx", external="colours.weights")
    output = tally_new("package", "mine", "--from", "colours.onnx")
    assert "note: labels were not given" in output
    text = (tmp_path / "mine" / "tally.yaml").read_text()
    assert "# squash, crop" in text
    assert (tmp_path / "mine" / "labels.txt").read_text() == "class 0\nclass 1\nclass 2\n"
    ref, direct = resolve("mine"), resolve("colours.onnx")
    assert ref.assumed == ()
    assert ref.options == {**direct.options, "labels": "labels.txt"}
    assert "iou_threshold" not in text  # means nothing for classify
    load(ref, "cpu")
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    tally_new("package", "named", "--from", "colours.onnx", "--labels", "names.txt")
    assert (tmp_path / "named" / "labels.txt").read_text() == "red\ngreen\nblue\n"
