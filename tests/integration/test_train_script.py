"""Training scripts: what they log in either way is kept, and whatever ends them is told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from tests.extent import FULL
from tests.waiting import wait_for

from tally.cli.main import cli
from tally.errors import RunNotFoundError, RunStateError, SourceNotFoundError, SpecError
from tally.models.registry import open_registry
from tally.models.resolve import resolve
from tally.training.runs.store import RunStore
from tally.training.runs.tracking import run
from tally.training.scripts.script import ScriptTraining

AZURE = """
import argparse, logging, os, pickle
from pathlib import Path
from azureml.core import Dataset, Run
from azureml.core.model import Model

parser = argparse.ArgumentParser()
parser.add_argument("--train_sets", nargs="+")
parser.add_argument("--test_sets", nargs="+")
parser.add_argument("--param_a", type=float)
parser.add_argument("--quick", action="store_true")
arguments = parser.parse_args()
assert arguments.quick
logging.basicConfig(filename="logs/model.log", level=logging.INFO, force=True)
logging.info("begun")
run = Run.get_context()
workspace = run.experiment.workspace
labels = Dataset.get_by_id(workspace, id=arguments.train_sets[0]).to_pandas_dataframe()
assert list(labels["image_url"]) == ["a.jpg"], labels
assert os.listdir(arguments.test_sets[3]) == ["a.jpg"]
assert Dataset.get_by_name(workspace, name="prices").to_pandas_dataframe()["p"].sum() == 3
print(Path("beside.txt").read_text(), os.listdir("outputs"))
for step in range(3):
    run.log("loss", arguments.param_a / (1 + step))
run.log_list("mAP@0.5:0.95", [0.25, 0.5])
run.log_list("names", ["cat", "dog"])
run.log_row("sizes", width=3, height=4)
run.log_table("sizes", {"depth": labels["image_url"].str.len().to_numpy()})
run.log("note", "a text")
Path("outputs/model.pkl").write_bytes(pickle.dumps({"a": 1}))
Path("outputs/net").mkdir()
Path("outputs/net/weights.bin").write_bytes(b"12345")
run.log_image("sample", path=os.environ["PICTURE"])
first = run.register_model("Dummy", model_path="outputs/model.pkl", properties={"acc": 0.5}, tags={"area": "x"})
again = Model.register(workspace, model_path="outputs/net", model_name="net", description="of weights")
assert (first.name, first.version, again.id) == ("dummy", 1, "net:1")
for missing in (
    "run.log_accuracy_table('x')", "Dataset.Tabular", "type(workspace).get('x')",
    "from azureml.core import Environment", "import azureml.train.dnn",
):
    try:
        exec(missing)
    except (AttributeError, ImportError) as error:
        assert "not provided by 'tally train script', which provides" in str(error), error
    else:
        raise AssertionError(missing)
"""

OWN = """
import subprocess, sys
import tally

with tally.training.run(parameters={"more": 1}) as run:
    run.log({"loss": 0.5}, step=3)
    sleeper = subprocess.Popen(["sleep", "600"])
    run.tags["sleeper"] = str(sleeper.pid)
    print("at work", flush=True)
    how = sys.argv[-1]
    if how == "raise":
        raise ValueError("nothing learnt")
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
"""


def tally(*words: object) -> str:
    done = CliRunner().invoke(cli, [*map(str, words)], standalone_mode=False, catch_exceptions=False)
    return done.output


def test_a_script_in_azure_mls_way_runs_unchanged(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, images = tmp_path / "code", tmp_path / "images"
    folder.mkdir(), images.mkdir()
    (folder / "train.py").write_text(AZURE)
    (folder / "beside.txt").write_text("read me")
    (folder / "outputs").mkdir()
    (folder / "outputs" / "old.pkl").write_text("of an earlier run")
    (images / "a.jpg").touch()
    labels, prices = tmp_path / "labels.csv", tmp_path / "prices.jsonl"
    labels.write_text('image_url,label\na.jpg,"[]"\n')
    prices.write_text('{"p": 1}\n{"p": 2}\n')
    monkeypatch.setenv("PICTURE", str(next((data / "images").rglob("*.jpg"))))
    printed: list[bytes] = []
    ended = ScriptTraining(
        script=folder / "train.py", parameters={"param_a": "0.5", "quick": ""}, data={"prices": str(prices)},
        train_sets=[(str(labels), str(images))], test_sets=[(str(labels), str(images))] * 2, time_limit=120,
    ).run(printed.append)  # fmt: skip
    assert (ended.state, ended.error, ended.code) == ("finished", None, 0), b"".join(printed).decode()
    assert b"read me []" in b"".join(printed)
    record = RunStore.open().get(ended.run_id)
    assert dict(record.parameters) == {"param_a": 0.5, "quick": True}
    assert {name: each.last for name, each in record.metrics.items()} == {
        "loss": 0.5 / 3, "mAP@0.5:0.95": 0.5, "sizes/width": 3, "sizes/height": 4, "sizes/depth": 5,
    }  # fmt: skip
    assert (record.tags, record.models) == (
        {"note": "a text", "names": "cat, dog"},
        ["models:/dummy/1", "models:/net/1"],
    )
    assert set(record.data) == {
        "prices", "train 1 labels", "train 1 images", *(f"test {n} {p}" for n in (1, 2) for p in ("labels", "images"))
    }  # fmt: skip
    files = {each.relative_to(record.folder).as_posix() for each in Path(record.folder).rglob("*") if each.is_file()}
    assert {"outputs/model.pkl", "outputs/net/weights.bin", "logs/model.log", "output.txt"} <= files
    assert not any(each.startswith("work/") for each in files)
    assert {each.name for each in folder.iterdir()} == {"train.py", "beside.txt", "outputs"}
    net = open_registry().get("models:/net")
    assert (net.kind, net.metadata["description"], net.metadata["run"]) == ("files", "of weights", record.id)
    (tmp_path / "score.py").write_text("def init():\n    pass\n\n\ndef run(mini_batch):\n    return mini_batch\n")
    assert (Path(resolve(tmp_path / "score.py", artifacts="models:/net").artifacts) / "net" / "weights.bin").is_file()

    assert json.loads(tally("runs", "show", record.id, "--json"))["metrics"]["loss"]["count"] == 3
    assert "mAP@0.5:0.95 = 0.5 (step 1; 0.25 to 0.5 in 2 steps)" in tally("runs", "show", record.id[:5])
    assert tally("runs", "show", record.id, "--metric", "loss").splitlines()[0] == "0\t0.5"
    assert f"{record.id}  finished  script  train" in tally("runs", "list", "--state", "finished")
    labels.write_text("changed\n")
    told = tally("runs", "reproduce", record.id)
    assert f"data train 1 labels: {labels} has other content" in told
    assert tally("runs", "delete", record.id, "--dry-run").startswith(f"would remove run {record.id}, and its files")
    tally("runs", "delete", record.id)
    assert not Path(record.folder).exists()
    with pytest.raises(RunNotFoundError):
        RunStore.open().get(record.id)


def test_whatever_ends_a_script_is_told(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(OWN)

    def run(how: str) -> tuple[str, str, int]:
        ended = ScriptTraining(script=script, arguments=[how]).run()
        record = RunStore.open().get(ended.run_id)
        assert (record.state, dict(record.parameters)) == (ended.state, {"more": 1})
        assert record.metrics["loss"].step == 3
        assert "at work" in (Path(record.folder) / "output.txt").read_text()
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int(record.tags["sleeper"])).wait(30)
        return ended.state, ended.error or "", ended.code

    assert run("raise") == (
        "failed",
        "the script ended with exit code 1; the last that it printed: ValueError: nothing learnt",
        1,
    )
    assert run("kill")[:2] == ("killed", "it was killed by SIGKILL; the last that it printed: at work")
    script.write_text("import time\ntime.sleep(600)\n")
    ended = ScriptTraining(script=script, time_limit=0.3).run()
    assert (ended.state, ended.error) == ("killed", "its time limit of 0.3 s was over")


def test_what_cannot_be_run_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match=r"there is no script 'nowhere\.py'"):
        ScriptTraining(script=Path("nowhere.py"))
    script = tmp_path / "train.py"
    script.touch()
    with pytest.raises(SpecError) as wrong:
        ScriptTraining(
            script=script,
            parameters={"-x": "1"},
            train_sets=[("no.csv", "no/")],
            data={"d": "gone"},
            folder=tmp_path / "x",
        )
    assert len(wrong.value.problems) == 5


SEEDED = """
import random, sys, time
import tally

with tally.training.run() as run:
    random.seed(int(sys.argv[sys.argv.index("--seed") + 1]))
    for _ in range(20):
        run.log("loss", random.random())
    if "--wait" in sys.argv:
        run.tags["pid"] = str(__import__("os").getpid())
        time.sleep(600)
"""


GOES_ON = """
import os, signal, subprocess
from pathlib import Path
import psutil
import tally

checkpoint = Path("outputs/checkpoint")
done = int(checkpoint.read_text()) if checkpoint.exists() else 0
with tally.training.run() as run:
    assert (run.resumed, os.environ.get("TALLY_RUN_RESUMED")) == ((True, "1") if done else (False, None))
    for step in range(done, done + 2):
        run.log("loss", 1 / (1 + step), step=step)
        checkpoint.write_text(str(step + 1))
    Path("beside").write_text("mine")
    if done == 0:
        sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
        Path("outputs/pids").write_text(f"{os.getpid()} {sleeper.pid}")
        psutil.Process().parent().parent().kill()  # the command
        signal.pause()
    if done == 2:
        raise ValueError("not yet")
"""


def test_a_script_goes_on_in_its_run_and_nothing_outlives_its_command(tmp_path: Path) -> None:
    script = tmp_path / "code" / "long.py"
    script.parent.mkdir()
    script.write_text(GOES_ON)
    words = [sys.executable, "-m", "tally", "train", "script", str(script), "-p", "rate=0.10", "--", "token=xyz"]
    assert subprocess.run(words, stderr=subprocess.DEVNULL, timeout=120).returncode == -signal.SIGKILL
    store = RunStore.open()
    [run] = store.list().runs
    assert run.state == "interrupted"
    folder = Path(run.folder)
    for each in (folder / "work" / "outputs" / "pids").read_text().split():
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int(each)).wait(30)
    with pytest.raises(SpecError, match="held a secret"):
        tally("train", "script", "--resume", run.id)
    given = json.loads((folder / "given.json").read_text())
    (folder / "given.json").write_text(json.dumps(given | {"arguments": []}))
    with pytest.raises(SpecError, match="leave out parameters, script"):
        tally("train", "script", script, "--resume", run.id, "-p", "x=1")

    assert f"run {run.id} goes on" in tally("train", "script", "--resume", run.id[:6])
    run = store.get(run.id)
    assert (run.state, run.metrics["loss"].step) == ("failed", 3), run.error
    assert (folder / "outputs" / "checkpoint").read_text() == "4"
    script.write_text(GOES_ON + "# another line\n")
    assert "not as it was: the code" in tally("train", "script", "--resume", run.id)
    run = store.get(run.id)
    assert (run.state, run.parameters) == ("finished", {"rate": 0.1})
    assert {2, 3, 4, 5} <= {*store.values(run.id)["loss"].steps}
    assert (folder / "outputs" / "checkpoint").read_text() == "6"
    assert (folder / "work" / "beside").read_text() == "mine"
    assert "not as it was" not in tally("runs", "reproduce", run.id)
    with pytest.raises(RunStateError, match="is finished"):
        tally("train", "script", "--resume", run.id)


@pytest.mark.skipif(not FULL, reason="commands are started with TALLY_TEST_FULL=1")
def test_a_run_is_done_again_and_a_script_dies_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("seeded.py").write_text(SEEDED)
    store = RunStore.open()

    def command(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "tally", *words], stderr=subprocess.DEVNULL)

    assert command("train", "script", "seeded.py", "-p", "seed=7").wait(120) == 0
    [first] = store.list().runs
    assert command("runs", "reproduce", first.id, "--run").wait(120) == 0
    again, _ = store.list().runs
    assert (again.id != first.id, again.parameters) == (True, {"seed": 7})
    assert store.values(again.id)["loss"].values == store.values(first.id)["loss"].values

    for version, content in enumerate(("old", "new"), 1):
        Path("weights.txt").write_text(content)
        with run(data={"start": "models:/start@best"} if version == 2 else None) as begun:
            begun.log("loss", float("nan"))
            begun.register("weights.txt", "start", as_files=True, alias="best")
    assert json.loads(tally("runs", "show", begun.id, "--metric", "loss", "--json")) == {"step": 0, "value": "nan"}
    assert store.get(begun.id).data["start"]["place"] == "models:/start@best"
    assert "data start: models:/start@best has other content" in tally("runs", "reproduce", begun.id)
    tally("models", "alias", "start", "best", "1")
    assert "data start" not in tally("runs", "reproduce", begun.id)

    process = command("train", "script", "seeded.py", "-p", "seed=7", "-p", "wait")
    wait_for(lambda: store.list().runs[0].tags.get("pid"), process)
    process.kill()
    process.wait()
    lost = store.list().runs[0]
    assert (lost.state, lost.alive) == ("interrupted", False)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(lost.tags["pid"])).wait(30)


GATED = """
from pathlib import Path
from azureml.core import Run

run = Run.get_context()
for wrong in (lambda: run.log("v", 10**400), lambda: run.register_model("up", model_path="../../..")):
    try:
        wrong()
    except ValueError as error:
        print(type(error).__name__, error)
run.log("accuracy", 0.4)
Path("outputs/weights.txt").write_text(run.id)
run.register_model("weights", model_path="outputs/weights.txt")
Path("outputs/net").mkdir(exist_ok=True)
Path("outputs/net/weights.bin").write_bytes(b"12")
run.register_model("net", model_path="outputs/net/../net/.")
if not Path("outputs/first").exists():
    Path("outputs/first").touch()
    raise SystemExit("the disk is full")
"""


def test_a_script_that_goes_on_is_judged_as_it_began(tmp_path: Path) -> None:
    (tmp_path / "gated.py").write_text(GATED)
    told = tally("train", "script", tmp_path / "gated.py", "--register", "weights", "--gate", "accuracy > 0.5")
    assert "the disk is full" in told
    [record] = RunStore.open().list().runs
    assert record.state == "failed"
    told = tally("train", "script", "--resume", record.id)
    assert "does not become champion: accuracy is 0.4, and not > 0.5" in told
    printed = (Path(record.folder) / "output.txt").read_text()
    assert "SpecError log: the value of 'v' is too large: a metric is 1.8e+308 at most" in printed
    assert (
        f"SpecError register: '../../..' is {Path(record.folder).parent.parent}, the folder that all of the" in printed
    )
    assert (open_registry().get("models:/net").kind, RunStore.open().get(record.id).state) == ("files", "finished")
