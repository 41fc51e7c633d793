"""What people mistype and mix up, and the exact answer: what happened, the value at fault, and the next step.

Everything runs in this process. ``{here}`` in an answer is the folder of the test.
"""

# ruff: noqa: E501  # answers are as long as they are

from __future__ import annotations

import ctypes
import errno
import gzip
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper
from PIL import Image

import tally
from tally.errors import StorageError, TallyError

Cli = Callable[..., Any]

SEE = "\n  See 'tally score --help', or docs/reference/job.md.\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures, tables, and models of both, the current one."""
    monkeypatch.setenv("TALLY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TALLY_DATABASE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("cat", "dog"):
        Image.new("RGB", (16, 16), (9, 99, 199)).save(tmp_path / "photos" / f"{name}.jpg")
    _model("model.onnx", [1, 3, 8, 8], helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0), 3)
    _model("rows.onnx", ["n", 2], helper.make_node("Identity", ["x"], ["y"]), 2)
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\n")
    (tmp_path / "list.csv").write_text("image\nphotos/cat.jpg\n")
    (tmp_path / "words.csv").write_text("word\nhello\n")
    return tmp_path


def _model(name: str, given: list[Any], node: onnx.NodeProto, outputs: int) -> None:
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, given)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [given[0], outputs])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), name)


USAGE = "Usage: tally score [OPTIONS] [SOURCE]...\nTry 'tally score --help' for help.\n\n"

MISTAKES: dict[str, tuple[str, int, str]] = {
    "a command": (
        "scor photos",
        2,
        (
            "Usage: tally [OPTIONS] COMMAND [ARGS]...\nTry 'tally --help' for help.\n\n"
            "Error: no command 'scor'; did you mean 'score'?\n"
        ),
    ),
    "a state": (
        "jobs list --state runing",
        2,
        (
            "Usage: tally jobs list [OPTIONS]\nTry 'tally jobs list --help' for help.\n\n"
            "Error: Invalid value for '--state': 'runing' is not one of 'waiting', 'created', 'running', 'paused', "
            "'interrupted', 'failed', 'finished', 'cancelled'; did you mean 'running'?\n"
        ),
    ),
    "no model": (
        "score photos --out out",
        2,
        "error: no model is given\n  For example: --model model.onnx. See 'tally score --help', or docs/reference/job.md.\n",
    ),
    "a task": (
        "score photos --model model.onnx --task clasify --out out",
        2,
        "error: task: should be classify, detect, restyle, embed, segment or values; did you mean 'classify'? "
        "(given: 'clasify')" + SEE,
    ),
    "a format": (
        "score photos --model model.onnx --format parqet --out out",
        2,
        "error: format: should be parquet, csv, jsonl, jpg, png, webp, mp4, mov, mkv or webm; did you mean 'parquet'? "
        "(given: 'parqet')" + SEE,
    ),
    "a number": (
        "score photos --model model.onnx --limit 0 --out out",
        2,
        "error: limit: should be at least 1 (given: 0)" + SEE,
    ),
    "an alert": (
        "score photos --model model.onnx --alert anomaly>0 --out out",
        2,
        "error: alerts: there is no measure 'anomaly'; did you mean 'anomalies'? (given: 'anomaly>0')" + SEE,
    ),
    "an option of the model": (
        "score photos --model model.onnx --set preproces.size=8 --out out",
        2,
        "error: preproces: no such option; did you mean 'preprocess'?\n",
    ),
    "an option of preprocessing": (
        "score photos --model model.onnx --set size=64 --out out",
        2,
        "error: size: no such option; did you mean 'preprocess.size'?\n",
    ),
    "the beginning of an option": (
        "score words.csv --model rows.onnx --csv decimal=, --out out",
        2,
        "error: csv: there is no option 'decimal'; did you mean 'decimal_separator'?\n",
    ),
    "a column in other capitals": (
        "score --items list.csv --item-column IMAGE --model model.onnx --out out",
        2,
        "error: item_column: {here}/list.csv has no column 'IMAGE'; did you mean 'image'?\n  There are image\n",
    ),
    "text in double quotes": (
        'score --items list.csv --where image="cat" --model model.onnx --out out',
        2,
        """error: where: 'image="cat"': Binder Error: Referenced column "cat" not found in FROM clause! Text stands in single quotes: 'cat'.\n""",
    ),
    "mean and deviation without a scale": (
        "score photos --model model.onnx --set preprocess.mean=[0.485,0.456,0.406] --out out",
        2,
        "error: preprocess.scale: mean and std below 1 are for pixels in 0..1, so write scale: 1/255 too\n",
    ),
    "a folder": (
        "score foto --model model.onnx --out out",
        1,
        "error: there is no file or folder {here}/foto\n  did you mean '{here}/photos'?\n",
    ),
    "a model's name": (
        "score photos --model modle.onnx --out out",
        1,
        "error: there is no model at 'modle.onnx'\n  Did you mean model.onnx?\n",
    ),
    "a registered model": (
        "score photos --model models:/cats --out out",
        1,
        "error: there is no model 'cats' in the registry\n  It is empty: 'tally models add NAME PATH' adds one.\n",
    ),
    "labels that are not there": (
        "score photos --model model.onnx --labels names.txt --out out",
        2,
        "error: there is no file '{here}/names.txt'\n  --labels names a text file, one label per line.\n",
    ),
    "labels of another model": (
        "score photos --model model.onnx --labels list.csv --out out",
        2,
        "error: labels: 2 names, but the model has 3 classes\n",
    ),
    "a model of tables for pictures": (
        "score photos --model rows.onnx --out out",
        1,
        (
            "error: none of the 2 files in {here}/photos has the name of a table (.jpg 2)\n"
            "  the model takes tables: name a place with tables, or choose a model for the files that are there\n"
        ),
    ),
    "a table for a model of pictures": (
        "score words.csv --model model.onnx --out out",
        2,
        (
            "error: {here}/words.csv is a table or a text, and the model is given pictures\n"
            "  If it lists pictures: --items {here}/words.csv. If its rows are to be scored, choose a model of tables.\n"
        ),
    ),
    "a list as a picture": (
        "score list.csv --model model.onnx --out out",
        2,
        (
            "error: {here}/list.csv is a table or a text, and the model is given pictures\n"
            "  If it lists pictures: --items {here}/list.csv. If its rows are to be scored, choose a model of tables.\n"
        ),
    ),
    "a video's size for pictures": (
        "score photos --model model.onnx --size 8x8 --out out",
        1,
        (
            "error: none of the 2 files in {here}/photos has the name of a video (.jpg 2)\n"
            "  size is for videos only: leave it out to score pictures; a model's own size is --set preprocess.size=640x360\n"
        ),
    ),
    "a column of words": (
        "score words.csv --model rows.onnx --out out.csv",
        2,
        (
            "error: the model takes 2 numeric columns, and there are none (word is text); is this a table such as it was "
            "made for?\n"
        ),
    ),
    "Parquet that is called .csv": (
        "score columns.csv --model rows.onnx --out out.csv",
        1,
        (
            "error: columns.csv is Parquet by its content, not text\n"
            "  give it the suffix of what it is (.csv.gz of packed CSV, .parquet, .arrow), or write it out as CSV first\n"
        ),
    ),
    "a bucket of Azure by another name": (
        "score wasbs://photos@account.blob.core.windows.net/2026 --model model.onnx --out out",
        1,
        (
            "error: 'wasbs://photos@account.blob.core.windows.net/2026': wasbs:// is not a known kind of storage\n"
            "  Azure's stores are written az://container/folder, with the account in AZURE_STORAGE_ACCOUNT_NAME\n"
        ),
    ),
    "a bucket of Google by another name": (
        "score gcs://bucket/photos --model model.onnx --out out",
        1,
        (
            "error: 'gcs://bucket/photos': gcs:// is not a known kind of storage\n"
            "  Google's buckets are written gs://bucket/folder\n"
        ),
    ),
    "abfs without an account": (
        "score abfs://photos/2026 --model model.onnx --out out",
        1,
        (
            "error: cannot open abfs://photos: no account of Azure is named\n"
            "  Set AZURE_STORAGE_ACCOUNT_NAME; or write abfs://photos@ACCOUNT.dfs.core.windows.net/...\n"
        ),
    ),
    "a job": ("jobs show nosuch", 1, "error: no job 'nosuch'\n  'tally jobs list' shows the jobs there are.\n"),
    "a job file": (
        "run job.yml",
        1,
        "error: cannot read the job file 'job.yml': No such file or directory\n  It is looked for in {here}.\n",
    ),
    "a share": (
        "score photos --model model.onnx --out out --fail-on-dead 150%",
        2,
        USAGE + "Error: Invalid value for '--fail-on-dead': '150%' is not between 0 and 100%\n",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_its_cause_and_the_next_step(
    here: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    pq.write_table(pa.table({"a": [1.0], "b": [2.0]}), here / "columns.csv")
    line, code, answer = MISTAKES[mistake]
    ran = cli(*line.split())
    assert ran.err == answer.replace("{here}", str(here))
    assert (ran.code, ran.out) == (code, "")


@contextmanager
def rights_count() -> Iterator[None]:
    """Root, too, may only do what permissions allow, in this thread."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    before = data[0]
    data[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        data[0] = before
        assert libc.capset(header, data) == 0


RIGHT = "\n  The user that runs Tally has to have a right to it: 'ls -ld' shows whose it is."


@pytest.mark.parametrize(
    ("source", "model", "out", "answer"),
    [
        ("closed", "model.onnx", "out", "cannot list {here}/closed: permission denied"),
        ("closed/cat.jpg", "model.onnx", "out", "cannot read {here}/closed/cat.jpg: permission denied"),
        ("photos", "closed/model.onnx", "out", "cannot read or write {here}/closed/model.onnx: permission denied"),
        ("photos", "model.onnx", "closed/out", "cannot read or write {here}/closed/out: permission denied"),
    ],
)
def test_a_folder_without_rights(here: Path, cli: Cli, source: str, model: str, out: str, answer: str) -> None:
    shutil.copytree(here / "photos", here / "closed")
    (here / "closed").chmod(0)
    try:
        with rights_count():
            with pytest.raises(StorageError) as caught:
                tally.score(source, model, out, task="classify", labels="labels.txt", quiet=True)
            ran = cli("score", source, "--model", model, "--task", "classify", "--out", out)
    finally:
        (here / "closed").chmod(0o700)
    expected = answer.replace("{here}", str(here)) + RIGHT
    assert str(caught.value) == expected
    assert (ran.code, ran.err) == (1, f"error: {expected}\n")


def test_a_full_disk_is_told_with_the_place(here: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as a picture's encoder says it: without a name

    monkeypatch.setattr("tally.demo.pictures.draw", full)
    ran = cli("simulate", "pictures", "--out", "drawn", "--count", 1)
    answer = "error: cannot write drawn: the disk is full\n  Make room there, or choose another place.\n"
    assert (ran.code, ran.err) == (1, answer)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04" + bytes(60), "not an image, but a ZIP archive (starts with b'PK"),
        (gzip.compress(b"x"), "not an image, but packed with gzip (starts with b'"),
        (b"<!DOCTYPE html><p>404", "not an image, but a web page (starts with b'<!DOCTYPE ht')"),
        (b"image,label\n", "not an image: cannot identify the format (starts with b'image,label\\n')"),
    ],
    ids=["zip", "gzip", "html", "csv"],
)
def test_something_else_by_the_name_of_a_picture(here: Path, content: bytes, what: str) -> None:
    from tally.errors import ItemError
    from tally.media.images import decode

    with pytest.raises(ItemError, match=re.escape(what)):
        decode(content)


def test_an_archive_for_a_model_of_tables(here: Path, cli: Cli) -> None:
    with zipfile.ZipFile("photos.zip", "w") as archive:
        archive.write("photos/cat.jpg")
    ran = cli("score", "photos.zip", "--model", "rows.onnx", "--out", "out.csv")
    assert (ran.code, ran.err) == (
        2,
        (
            "error: photos.zip is packed, and its name does not tell what it holds; call it so (readings.csv.zip), "
            "or unpack it\n"
        ),
    )


def test_a_graphics_card_that_is_not_there(here: Path, cli: Cli) -> None:
    ran = cli("score", "photos", "--model", "model.onnx", "--task", "classify", "--labels", "labels.txt",
              "--device", "cuda", "--workers", 1, "--out", "out", "-q")  # fmt: skip
    assert ran.code == 1
    [first, *others] = [line for line in ran.err.splitlines() if not line.startswith("warning: preprocessing")]
    assert re.fullmatch(r"error: device cuda was asked for, but this ONNX Runtime has only \w+(, \w+)*", first)
    assert others == [
        "  Install onnxruntime-gpu in place of onnxruntime, or use --device cpu.",
        "  Nothing is scored yet. After mending the cause, give the same command again",
    ]


@pytest.mark.parametrize("scheme", ["postgres", "postgresql"])
def test_a_database_that_does_not_answer(here: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setenv("TALLY_DATABASE", f"{scheme}://127.0.0.1:{taken.getsockname()[1]}/tally")
        ran = cli("jobs", "list")
    assert ran.code == 1
    assert ran.err.startswith(f"error: cannot open the database postgresql://127.0.0.1:{taken_port(ran.err)}/tally: ")
    assert ran.err.endswith("\n  Check that it runs and can be reached from here, or set TALLY_DATABASE to another.\n")


def taken_port(text: str) -> str:
    found = re.search(r"127\.0\.0\.1:(\d+)/", text)
    assert found is not None
    return found[1]


def test_a_home_of_somebody_else(here: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from tally.health.checks import Warn, home

    (here / "home").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: (here / "home").stat().st_uid + 54_321)
    with pytest.raises(
        Warn, match=r"can be written to, .* free; but it belongs to \S+, and this is user 54321: each may"
    ):
        home()


def test_warnings_of_preprocessing_are_not_quiet(here: Path, cli: Cli) -> None:
    ran = cli("score", "photos", "--model", "model.onnx", "--task", "classify", "--labels", "labels.txt",
              "--workers", 1, "--out", "out", "-q")  # fmt: skip
    assert (ran.code, ran.err) == (
        0,
        (
            "warning: preprocessing was not declared: assumed RGB, 0..1 with ImageNet mean and deviation, squash to 8x8 "
            "(set preprocess.* with --set or in tally.yaml)\n"
            "warning: softmax is applied: scores are not in 0..1 (--set softmax=never keeps them as they are)\n"
        ),
    )
    again = cli("score", "photos", "--model", "model.onnx", "--task", "classify", "--labels", "labels.txt",
                "--workers", 1, "--out", "out", "-q")  # fmt: skip
    assert again.code == 1
    assert "Do it again with --overwrite, or write to another place with --out." in again.err


def test_too_many_dead_items_have_an_exit_code_of_their_own(here: Path, cli: Cli) -> None:
    (here / "photos" / "broken.jpg").write_bytes(b"no")
    command = ("score", "photos", "--model", "model.onnx", "--task", "classify", "--workers", 1, "-q", "--overwrite")
    assert cli(*command, "--out", "out", "--fail-on-dead", "40%").code == 0
    ran = cli(*command, "--out", "out", "--fail-on-dead", "10%")
    assert (ran.code, ran.err.splitlines()[-1]) == (3, "1 of 3 items failed, over --fail-on-dead 10%")
    assert cli("jobs", "show", "out").code == 0, "the job itself is finished"


def test_looking_at_jobs(here: Path, cli: Cli) -> None:
    def bright(batch: list[np.ndarray[Any, Any]]) -> list[dict[str, float]]:
        return [{"bright": float(each.mean())} for each in batch]

    for number in range(40):
        (here / "photos" / f"{number}.jpg").write_bytes((here / "photos" / "cat.jpg").read_bytes())
    sources = sorted(map(str, (here / "photos").iterdir()))
    job = tally.score(sources, bright, "out", settings={"input": "image"}, workers=1, quiet=True)
    assert cli("jobs", "dead", job.id).err == f"job {job.id} has no dead items\n"
    shown = cli("jobs", "show", job.id).out
    assert f"source       {', '.join(sources[:5])} and 37 more (--json has all)\n" in shown
    assert cli("query", job.id, "select count(*) from results").out == "count\n42\n"


@pytest.mark.parametrize("quiet", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_are_off_where_nobody_wants_them(
    here: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, quiet: dict[str, str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("click._compat.isatty", lambda stream: True)
    assert "\x1b[" in cli("jobs", "show", "nosuch").err, "a terminal"
    for name, value in quiet.items():
        monkeypatch.setenv(name, value)
    assert "\x1b[" not in cli("jobs", "show", "nosuch").err


def test_python_is_spoken_to_in_python(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given: Any = {"task": "classify", "labels": "labels.txt", "workers": 1, "quiet": True}
    job = tally.score("photos", "model.onnx", "out", **given)
    with pytest.raises(TallyError) as caught:
        tally.score("photos", "model.onnx", "out", **given)
    assert "overwrite=True" in str(caught.value)
    assert "--" not in str(caught.value)
    assert tally.score("photos", "model.onnx", "out", **given, resume=True).id == job.id
    capsys.readouterr()
    assert tally.score("photos", "model.onnx", "out", **given | {"quiet": False}, resume=True).id == job.id
    assert re.fullmatch(
        rf"job {job.id} finished on \S+ \S+, and is returned as it is: overwrite=True scores what is there now\n",
        capsys.readouterr().err,
    )
    with pytest.raises(TallyError) as caught:
        tally.score("photos", 3, "out", quiet=True)  # type: ignore[arg-type]
    assert caught.value.args == ("a model is a path, a name, a tally.Scorer or a function of a batch, not 3",)
    session = onnxruntime.InferenceSession("model.onnx")
    with pytest.raises(
        TallyError, match=r"not an object of onnxruntime, InferenceSession\n  Give the path of its file"
    ):
        tally.score("photos", session, "out", quiet=True)  # type: ignore[arg-type]
    with pytest.raises(TallyError) as caught:
        tally.Job("nosuch")
    assert str(caught.value) == "no job 'nosuch'\n  'tally.jobs()' shows the jobs there are."
