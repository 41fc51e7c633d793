"""Tally in a notebook: the worked notebooks run from the first cell to the last, and jobs show themselves."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import matplotlib.pyplot as plt
import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image
from tests.extent import first
from tests.server import PATIENCE
from tests.waiting import wait_for

import tally
from tally.demo import pictures
from tally.errors import SpecError
from tally.notebooks import worked

BOOKS = sorted(worked.SHIPPED.glob("*.ipynb"))


@pytest.fixture(autouse=True)
def environment(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of Jupyter outside of the test's folder; and commands as ``tally notebook`` has them found."""
    for name in ("RUNTIME", "CONFIG", "DATA"):
        monkeypatch.setenv(f"JUPYTER_{name}_DIR", str(tmp_path / "jupyter" / name.lower()))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "160")


def run(book: nbformat.NotebookNode, folder: Path) -> list[list[dict[str, Any]]]:
    """The outputs of each cell of code. Raises what a cell raises."""
    kernel = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    client = NotebookClient(book, timeout=300, resources={"metadata": {"path": str(folder)}})
    manager = client.create_kernel_manager()
    manager.kernel_spec.argv = kernel
    client.execute()
    return [cell.outputs for cell in book.cells if cell.cell_type == "code"]


def kinds(outputs: list[dict[str, Any]]) -> list[str]:
    """What each output is: printed text, or the richest form of what is shown."""
    forms = ("image/png", "text/html", "text/plain")
    return [
        next((form for form in forms if form in each["data"]), "?") if "data" in each else each["output_type"]
        for each in outputs
    ]


@pytest.mark.parametrize("path", first(3, [*BOOKS[::2], *BOOKS[1::2]]), ids=lambda path: path.stem)
def test_worked_notebooks_run_as_they_are_shipped(path: Path, tmp_path: Path) -> None:
    book = nbformat.read(path, 4)
    assert all(not cell.get("outputs") for cell in book.cells)
    cells = run(book, tmp_path)
    printed = "".join(each.get("text", "") for outputs in cells for each in outputs)
    assert "error: " not in printed  # a command that fails does not stop a notebook
    shown = [kind for outputs in cells for kind in kinds(outputs)]
    least = {"1-score-and-explore": 3, "2-retrain-and-compare": 1, "3-sweep": 0, "4-video": 1, "5-sensors": 1}
    assert shown.count("image/png") == least[path.stem]
    if path.stem == "3-sweep":
        assert "8 finished" in printed
        assert re.search(r"registered as models:/shapes/1", printed)
    else:
        bars = [each["data"]["text/html"] for outputs in cells for each in outputs if "<progress" in str(each)]
        assert bars
        assert all("finished" in bar and "failed" not in bar for bar in bars)


SCORER = """
import tally
class Red(tally.Scorer):
    input = "image"
    columns = {"red": "float32"}
    def score(self, pictures):
        return [{"red": float(each[..., 0].mean())} for each in pictures]
"""


def test_a_class_of_a_cell_is_the_same_when_another_cell_is_edited(tmp_path: Path) -> None:
    pictures.draw(tmp_path / "pictures", 4, 7)
    score = (
        "job = tally.score('pictures', Red, 'out'); job.id, job.query('select count(*) as n from results').to_pylist()"
    )
    cells = [SCORER, score]
    (_, first) = run(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in cells]), tmp_path)
    again = score.replace("'out')", "'out', resume=True)")
    cells = ["import math\nHALF = math.pi / 2", SCORER, "class Other: pass", again]
    *_, second = run(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in cells]), tmp_path)
    said = first[-1]["data"]["text/plain"]
    assert "[{'n': 4}]" in said
    assert second[-1]["data"]["text/plain"] == said  # the same job: finished, and not done again


def test_the_notebooks_are_put_where_the_user_works_and_served(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / BOOKS[0].name
    mine.parent.mkdir()
    mine.write_text("mine")
    command = [sys.executable, "-m", "tally", "notebook", "--folder", "mine", "--no-browser"]
    environment = os.environ | {
        "JUPYTER_ALLOW_INSECURE_WRITES": "1",
        "JUPYTER_TOKEN": "",
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
    root = ["--ServerApp.allow_root=True"] if os.geteuid() == 0 else []
    (tmp_path / "jupyter" / "config").mkdir(parents=True)
    if root:
        (tmp_path / "jupyter" / "config" / "jupyter_server_config.py").write_text("c.ServerApp.allow_root = True\n")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        told = (tmp_path / "log").read_text
        wait_for(lambda: re.search(r"http://127\.0\.0\.1:\d+/lab\?token=\w+", told()), process, PATIENCE, told)
        found = re.search(r"(http://127\.0\.0\.1:\d+)/lab\?token=(\w+)", told())
        assert found is not None
        listed = httpx2.get(f"{found[1]}/api/contents", params={"token": found[2]}, timeout=PATIENCE).json()
        assert sorted(each["name"] for each in listed["content"]) == [each.name for each in BOOKS]
        assert mine.read_text() == "mine"
        assert f"mine/{BOOKS[1].name}" in told()
        assert f"mine/{BOOKS[0].name}" not in told()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    pictures.draw(folder / "pictures", 16, 7, folder / "truth.csv")
    return folder


def test_a_job_shows_its_state_rows_and_pictures(folder: Path, tmp_path: Path) -> None:
    (folder / "pictures" / "<b>.jpg").write_bytes(b"no picture")
    job = tally.score(folder / "pictures", "tally:shapes", tmp_path / "out", quiet=True)
    shown = job._repr_html_()
    assert shown is not None
    assert "<td>finished</td>" in shown
    assert "17 of 17 items" in shown
    assert "<b>.jpg" not in shown
    images = re.findall(r'src="data:image/jpeg;base64,([^"]+)" title="([^"]+)"', shown)
    assert [key for _, key in images] == ["arrow-0001.jpg", "arrow-0002.jpg", "circle-0001.jpg", "circle-0002.jpg"]
    assert max(Image.open(io.BytesIO(base64.b64decode(images[0][0]))).size) <= 160
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    gone = job._repr_html_()
    assert gone is not None
    assert "the results of job" in gone
    job.delete()
    assert job._repr_html_() is None


def test_figures_say_what_results_say(folder: Path, tmp_path: Path) -> None:
    job = tally.score(folder / "pictures", "tally:shapes", tmp_path / "out", quiet=True)
    figure = job.gallery(3, where="label = 'ring' or label = 'star'")
    assert [axis.get_title() for axis in figure.axes] == ["ring-0001.jpg", "ring-0002.jpg", "star-0001.jpg"]
    matrix = job.confusion(folder / "truth.csv")
    assert matrix.axes[0].get_title() == "16 of 16 right (100.0%)"
    assert sorted(text.get_text() for text in matrix.axes[0].texts) == ["2"] * 8
    wrong = job.confusion(lambda key: "arrow" if key.startswith("circle") else key.partition("-")[0])
    assert wrong.axes[0].get_title() == "14 of 16 right (87.5%)"
    some = job.confusion({"ring-0001.jpg": "ring"})
    assert some.axes[0].get_title() == "1 of 1 right (100.0%); 15 without truth"
    same = tally.score(
        folder / "pictures", lambda batch: [{"flag": True, "share": 1.0}] * len(batch), tmp_path / "same"
    )
    for predicted, truth in (("flag", True), ("flag", "True"), ("share", 1), ("share", "1.0")):
        equal = same.confusion(lambda key, truth=truth: truth, predicted=predicted)  # type: ignore[misc]
        assert equal.axes[0].get_title() == "16 of 16 right (100.0%)", (predicted, truth)
    close = same.confusion(lambda key: 1.0000001, predicted="share")
    assert close.axes[0].get_title() == "0 of 16 right (0.0%)"
    assert plt.get_fignums() == []  # a notebook would show open ones a second time
    for refused, said in (
        (lambda: job.confusion("folder"), "none of the 16 keys has a label"),
        (lambda: job.confusion(folder / "truth.csv", predicted="lable"), "did you mean 'label'"),
        (lambda: job.gallery(where="score > 2"), "has no pictures to show"),
        (lambda: job.gallery(0), "1 to 64 pictures"),
        (lambda: job.timeline("score"), "time: say which column"),
    ):
        with pytest.raises(SpecError, match=re.escape(said)):
            refused()


def test_a_timeline_marks_anomalies_for_each_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (
        "simulate readings --devices 1 --sensors 2 --hours 30 --anomalies 1% --out readings.parquet",
        "train anomaly readings.parquet --by Device,Tag --value Value --nu 0.01 --out detectors",
    ):
        subprocess.run([sys.executable, "-m", "tally", *command.split()], check=True, capture_output=True, timeout=120)
    job = tally.score("readings.parquet", "detectors", "out", keep=["TS", "Value"], quiet=True)
    counted = job.query("select count(*) filter (anomaly) as n from results group by Tag order by Tag").to_pylist()
    figure = job.timeline("Value")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Device 1, Tag 1", "Device 1, Tag 2"]
    marked = [len(axis.collections[0].get_offsets()) for axis in figure.axes]
    assert marked == [each["n"] for each in counted]
    assert min(marked) > 0
    with pytest.raises(SpecError, match="by: there is no column 'Tga'; did you mean 'Tag'"):
        job.timeline("Value", by="Tga")
    one = job.timeline("score", where="Tag = 2")
    assert [axis.get_ylabel() for axis in one.axes] == ["score"]
