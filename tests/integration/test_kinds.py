"""A framework that Tally knows nothing of: installed, scored with in real jobs, and uninstalled."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.extensions import install, uninstall

import tally
from tally.errors import ModelLoadError
from tally.models.load import create
from tally.models.reference import ModelRef
from tally.models.registry import open_registry
from tally.models.resolve import resolve

FRAMEWORK = '''
import json
from tally import Scorer
from tally.errors import ModelLoadError, SpecError
from tally.models.base import Kind, Traits


class AbacusKind(Kind):
    """Files with {"times": n}: every item's size is multiplied with it."""

    traits = Traits(claims=(".abacus",), extra="abacus[beads]")

    def inspect(self, path, options, *, trusted):
        if wrong := options.keys() - {"plus"}:
            raise SpecError(f"{path.name}: an abacus has no option {min(wrong)!r}")
        try:
            json.loads(path.read_text())["times"]
        except (ValueError, KeyError):
            raise ModelLoadError(f"{path} is no abacus") from None
        return {"plus": 0, **options, "assumed": [] if "plus" in options else ["plus was not given: assumed 0"]}

    def create(self, ref):
        return Abacus(ref.entry, ref.options["plus"])


class Abacus(Scorer):
    input = "bytes"
    columns = {"product": "int64"}

    def __init__(self, file, plus):
        self.file, self.plus = file, plus

    def load(self, artifacts, device):
        self.times = json.loads((artifacts / self.file).read_text())["times"]

    def score(self, batch):
        return [{"product": len(content) * self.times + self.plus} for content in batch]
'''


@pytest.fixture
def items(tmp_path: Path) -> Path:
    folder = tmp_path / "items"
    folder.mkdir()
    for size in (1, 2, 3):
        (folder / f"{size}.bin").write_bytes(b"x" * size)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "ten.abacus"
    path.write_text('{"times": 10}')
    return path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    install(
        folder,
        monkeypatch,
        "tally.scorers",
        {"abacus": "abacus_for_test:AbacusKind"},
        abacus_for_test=FRAMEWORK,
    )
    return folder


def products(job: tally.Job) -> list[int]:
    return list(job.results().sort_by("key")["product"].to_pylist())


def test_a_framework_of_another_package(
    site: Path, items: Path, model: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    job = tally.score(items, model, tmp_path / "out", workers=1, quiet=True)
    assert products(job) == [10, 20, 30]
    assert job.manifest["model"]["kind"] == "abacus"

    with_option = tally.score(items, model, tmp_path / "plus", settings={"plus": 1}, workers=1, quiet=True)
    assert products(with_option) == [11, 21, 31]

    command = [sys.executable, "-m", "tally", "score", items, "--model", model, "--out", tmp_path / "cli"]
    ran = subprocess.run([*map(str, command), "--workers", "1"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "plus was not given: assumed 0" in ran.stderr
    assert products(tally.Job(str(tmp_path / "cli"))) == [10, 20, 30]

    refused = cli("score", items, "--model", model, "--out", tmp_path / "no", "--set", "minus=1")
    assert "ten.abacus: an abacus has no option 'minus'" in refused.err
    refused = cli("score", items, "--model", model, "--out", tmp_path / "no", "--labels", items / "1.bin")
    assert "--labels cannot be used with the model ten.abacus" in refused.err

    added = open_registry().add("ten", resolve(model))
    assert added.kind == "abacus"
    registered = tally.score(items, "models:/ten", tmp_path / "registered", workers=1, quiet=True)
    assert products(registered) == [10, 20, 30]

    ref = ModelRef.from_dict(job.record.model)
    uninstall(site)

    with pytest.raises(ModelLoadError) as caught:
        tally.score(items, model, tmp_path / "again", workers=1, quiet=True)
    assert caught.value.message == f"{model}: .abacus files cannot be scored"
    assert caught.value.hint == (
        "Supported are .onnx, .skops, .joblib, .pkl, .pickle, .ubj, .lgb, .cbm, .pt2, .safetensors, .pt, .pth, .th, "
        ".keras, .h5, .hdf5, .tflite, .parquet and .py files, and folders with a tally.yaml or MLmodel or config.json "
        "or saved_model.pb. Packages that add other kinds must be installed here."
    )
    with pytest.raises(ModelLoadError, match=r"models of kind 'abacus' cannot be scored.*\n.*brings 'abacus'"):
        create(ref)
    with pytest.raises(ModelLoadError, match=r"models of kind 'abacus' cannot be scored.*\n.*brings 'abacus'"):
        tally.score(items, "models:/ten", tmp_path / "again", workers=1, quiet=True)


def test_the_framework_of_the_how_to_works(
    tmp_path: Path, items: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/add-a-framework.md").read_text("utf-8")
    source = page.partition("```python file=abacus.py\n")[2].partition("```")[0]
    entry = page.partition('[project.entry-points."tally.scorers"]\nabacus = "')[2].partition('"')[0]
    assert entry == "abacus:AbacusKind"
    install(tmp_path / "site", monkeypatch, "tally.scorers", {"abacus": entry}, abacus=source)
    job = tally.score(items, model, tmp_path / "out", settings={"plus": 2}, workers=1, quiet=True)
    assert products(job) == [12, 22, 32]
    with pytest.raises(tally.TallyError, match="an abacus has no option 'minus'"):
        tally.score(items, model, tmp_path / "no", settings={"minus": 2}, quiet=True)
