"""A source and a sink of another package: the contracts, and a job from one to the other."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tests.extensions import EXAMPLE, install_example

from tally import extensions
from tally.errors import SpecError, StorageError
from tally.scorers.base import Scorer
from tally.sinks.base import Sink
from tally.sinks.factory import sink_for
from tally.sources.base import Source
from tally.sources.factory import SourceRequest, source_for
from tally.testing.sinks import SinkContract
from tally.testing.sources import SourceContract

SCORER = """
from tally.scorers.base import Scorer

class Words(Scorer):
    input = "bytes"
    columns = {"words": "int64", "length": "float64"}

    def score(self, batch):
        return [{"words": len(line.split()), "length": len(line) / 3} for line in batch]
"""


@pytest.fixture
def installed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = install_example(tmp_path_factory.mktemp("site"))
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    yield folder
    sys.modules.pop("tally_lines", None)


def of_bytes() -> Scorer:
    scorer = Scorer()
    scorer.input = "bytes"
    return scorer


@pytest.mark.usefixtures("installed")
class TestLines(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path, installed: Path) -> Source:
        path = tmp_path / "notes.txt"
        path.write_bytes(b"one\ntwo\nthree\nfour\nfive\nsix\nseven\n")
        return source_for(SourceRequest((f"lines://{path}",), of_bytes()))

    @pytest.fixture
    def keys(self) -> list[str]:
        return [f"line-{number}" for number in range(1, 8)]

    @pytest.fixture
    def input(self) -> str:
        return "bytes"


@pytest.mark.usefixtures("installed")
class TestRounded(SinkContract):
    @pytest.fixture
    def make(self) -> Callable[[Path], Sink]:
        return lambda folder: sink_for(f"rounded://{folder}/out/", output="rows")

    @pytest.fixture
    def result(self) -> Callable[[int], Any]:
        return lambda n: {"label": f"item {n}", "score": n / 8}


def test_a_job_from_one_to_the_other(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "words.py").write_text(SCORER)
    (tmp_path / "notes.txt").write_bytes(b"a\nb c\n\nd e f g\n")
    inherited = dict(os.environ)
    path = os.pathsep.join(filter(None, [str(installed), inherited.get("PYTHONPATH", "")]))
    environment = {**inherited, "PYTHONPATH": path, "TALLY_HOME": str(tmp_path / "home")}

    def tally(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tally", *arguments],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    source, out = f"lines://{tmp_path}/notes.txt", f"rounded://{tmp_path}/out"
    tally("score", source, "--model", "words.py:Words", "--out", out, "--workers", "1")
    manifest = json.loads((tmp_path / "out/_manifest.json").read_text())
    assert (manifest["source"], manifest["counts"]["rows"]) == ([source], 4)
    [part] = [pq.read_table(tmp_path / "out" / file["path"]).to_pylist() for file in manifest["files"]]
    assert part == [
        {"key": "line-1", "words": 1, "length": 0.333},
        {"key": "line-2", "words": 2, "length": 1.0},
        {"key": "line-3", "words": 0, "length": 0.0},
        {"key": "line-4", "words": 4, "length": 2.333},
    ]
    assert "line-4" in tally("query", manifest["job"], "select key from results where words > 2")
    assert (tmp_path / "out/_SUCCESS").exists()


@pytest.mark.usefixtures("installed")
def test_what_a_foreign_source_does_not_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"provides bytes, but the model needs images\n.*a model that takes bytes"):
        source_for(SourceRequest((f"lines://{tmp_path}/notes.txt",), Scorer()))
    with pytest.raises(SpecError, match="are sources of different kinds"):
        source_for(SourceRequest((str(tmp_path), f"lines://{tmp_path}/notes.txt"), of_bytes()))


def test_an_unknown_scheme_is_no_kind_of_storage(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="lines:// is not a known kind of storage"):
        source_for(SourceRequest((f"lines://{tmp_path}/notes.txt",), of_bytes()))
    with pytest.raises(StorageError, match="rounded:// is not a known kind of storage"):
        sink_for("rounded:///out", output="rows")


def test_a_package_that_cannot_be_used_is_named(installed: Path) -> None:
    (installed / "tally_lines.py").write_text("import no_such_module")
    with pytest.raises(SpecError, match=r"'lines' is offered by the package tally-lines, .*: No module named"):
        extensions.find("tally.sources", "lines")


def test_two_packages_that_offer_the_same_are_named(installed: Path) -> None:
    other = installed / "tally_more-2.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: tally-more\nVersion: 2.0\n")
    (other / "entry_points.txt").write_text("[tally.sources]\nlines = tally_more:Lines\n")
    assert len(entry_points(group="tally.sources", name="lines")) == 2
    with pytest.raises(SpecError, match="several packages: tally-lines, tally-more"):
        extensions.find("tally.sources", "lines")
    assert extensions.find("tally.sources", "nothing") is None


def test_the_how_to_shows_the_example_as_it_is() -> None:
    page = (EXAMPLE.parents[1] / "docs" / "how-to" / "extend.md").read_text()
    shown = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = (EXAMPLE / "tally_lines.py").read_text()
    assert [block.strip() in code for block in shown] == [True, True, True, False, False]
    assert "".join("".join(shown[:3]).split()) == "".join(code.partition("from dataclasses")[2].split()).join(
        ["fromdataclasses", ""]
    )


@pytest.mark.parametrize(("version", "refused"), [(1, False), (2, True), (0, True)])
def test_an_extension_for_another_version_of_the_contracts_is_refused(
    installed: Path, version: int, refused: bool
) -> None:
    module = installed / "tally_lines.py"
    text = module.read_text().replace("    accepts =", f"    contract_version = {version}\n    accepts =")
    module.write_text(text)
    if not refused:
        assert extensions.find("tally.sources", "lines").contract_version == 1
        return
    with pytest.raises(
        SpecError, match=rf"tally-lines, .*written for version {version} of Tally's contracts, .* version 1\n"
    ):
        extensions.find("tally.sources", "lines")
