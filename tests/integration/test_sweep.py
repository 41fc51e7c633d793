"""``tally sweep`` as its user types it: many trainings, killed in between, and the best registered."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.conftest import Ran
from tests.extent import first
from tests.retraining import backbone, photos
from tests.services import postgres_database

from tally.cli import sweep as command
from tally.engines import task
from tally.models.registry import open_registry
from tally.training.retrain import head
from tally.training.retrain.examples import Parameters
from tally.training.runs.store import RunStore
from tally.training.sweeps import retrain as trials
from tally.training.sweeps.store import SweepStore

Cli = Callable[..., Ran]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures, a backbone, and a cache of bottlenecks."""
    folder = tmp_path_factory.mktemp("sweep")
    return {
        "photos": photos(folder / "photos"),
        "backbone": backbone(folder / "backbone.onnx"),
        "cache": folder / "cache",
    }


@pytest.fixture
def given(shared: dict[str, Path]) -> list[str]:
    """The arguments of a sweep that prunes."""
    return [
        *("sweep", "retrain", "--image_dir", str(shared["photos"]), "--backbone", str(shared["backbone"])),
        *("--bottleneck_dir", str(shared["cache"]), "--how_many_training_steps", "400", "--sampler", "random"),
        *("-p", "learning_rate=log:1e-3..1", "-p", "train_batch_size=5,20", "--trials", "13", "--prune"),
        *("--register-best", "colours", "--name", "night"),
    ]


@pytest.fixture(params=first(1, ["postgresql", "sqlite"]))
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where the sweep's state is."""
    if request.param == "sqlite":
        yield
        return
    with postgres_database() as url:
        monkeypatch.setenv("TALLY_DATABASE", url)
        yield
        for each in gc.get_objects():  # the end of a command closes its connections: this process goes on
            if type(each) is sa.Engine and each.url.database == sa.make_url(url).database:
                each.dispose()


def table() -> list[tuple[Any, ...]]:
    """The newest sweep's trials: what has to be the same however it was run."""
    return [
        (each.number, each.state, each.parameters, each.value, each.step)
        for each in SweepStore.open().trials(SweepStore.open().list().sweeps[0].id)
    ]


KILLED = """
import os, signal, sys
import psutil
from tally.cli.main import main
from tally.training.sweeps.sweep import _Drive
measured, seen = _Drive._measured, []
def watch(self, engine, number, values):
    measured(self, engine, number, values)
    if number == 3 and not seen:  # its worker is lost, and all others
        seen.append(number)
        for each in psutil.Process().children():
            each.kill()
    if number == 9:
        os.kill(os.getpid(), signal.SIGKILL)
_Drive._measured = watch
main()
"""


@pytest.mark.usefixtures("database")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_a_sweep_that_is_killed_ends_as_if_it_had_not_been(
    cli: Cli, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given += ["--bottleneck_dir", str(tmp_path / "cache")]
    scored: list[int] = []

    def counting(stop: object) -> Any:
        def drive(jobs: Any, job: str) -> Any:
            record = jobs.see_through(job)
            scored.append(record.done)
            return record

        return drive

    monkeypatch.setattr(command, "driven", counting)
    ran = cli(*given, "--parallel", 1)
    assert ran.code == 0, ran.err
    assert scored == [72], "the backbone sees each picture once, whatever the number of trials"
    undisturbed = table()
    states = [state for _, state, *_ in undisturbed]
    assert {*states} == {"finished", "pruned"}
    assert states[:5] == ["finished"] * 5
    best = min((value, number) for number, state, _, value, _ in undisturbed if state == "finished")
    assert f"best: trial {best[1]}, validation_cross_entropy {best[0]:.6g}" in ran.out
    assert "registered as models:/colours/1" in ran.out

    done = subprocess.run([sys.executable, "-c", KILLED, *given, "--parallel", "2"], capture_output=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    [killed, first] = SweepStore.open().list().sweeps
    assert (killed.state, first.state) == ("interrupted", "finished")
    assert len(table()) < 13 or "running" in {state for _, state, *_ in table()}
    assert f"tally sweep resume {killed.id}" in cli("sweep", "show", killed.id).out
    ran = cli("sweep", "resume", killed.id, "--parallel", 2)
    assert ran.code == 0, ran.err
    assert "that were running go on" in ran.err
    assert table() == undisturbed
    assert max(each.attempts for each in SweepStore.open().trials(killed.id)) > 1
    assert scored == [72]
    assert "is finished" in cli("sweep", "resume", killed.id).err

    # The best is one version, which says where it comes from; every trial is a run, and TensorBoard finds them all.
    [version] = open_registry().show("colours").versions
    record = SweepStore.open().get(first.id)
    runs = {each.id: each for each in RunStore.open().list(sweep=first.id, limit=100).runs}
    assert len(runs) == 13
    run = runs[SweepStore.open().trials(first.id)[record.best or 0].run_id]
    assert version.metadata["run"] == run.id
    assert run.models == ["models:/colours/1"]
    assert {each.state for each in runs.values()} == {"finished"}
    assert "test_accuracy" in run.metrics
    assert sum("test_accuracy" in each.metrics for each in runs.values()) == 1
    assert run.command[:4] == ["tally", "train", "retrain", "--image_dir"]
    again = cli(*run.command[1:], "--validation_batch_size", -1, "--bottleneck_dir", tmp_path / "cache")
    assert again.code == 0, again.err
    made = RunStore.open().list(limit=1).runs[0]
    assert made.metrics["validation_cross_entropy"].last == best[0]
    board = Path(record.folder) / "tensorboard"
    assert sorted(each.name[:4] for each in board.iterdir()) == [f"{number:04d}" for number in range(13)]
    assert all([*each.glob("events.out.tfevents.*")] and [*each.glob("train/*")] for each in board.iterdir())
    shown = json.loads(cli("sweep", "show", first.id, "--best", "--json").out)
    assert shown["trials"][0]["number"] == shown["best"] == best[1]
    assert first.id in cli("sweep", "list").out


def test_the_best_is_judged_by_what_early_stopping_keeps(cli: Cli, shared: dict[str, Path]) -> None:
    words = [
        *("sweep", "retrain", "--image_dir", str(shared["photos"]), "--backbone", str(shared["backbone"])),
        *("--bottleneck_dir", str(shared["cache"]), "--how_many_training_steps", "300", "--sampler", "grid"),
        *("-p", "learning_rate=0.9,1", "--train_batch_size", "5", "--validation_batch_size", "2"),
        *("--early-stopping", "4", "--register-best", "colours"),
    ]
    told = cli(*words, "--gate", "validation_cross_entropy <= champoin").err
    assert "has no alias 'champoin'; did you mean 'champion'" in told
    assert SweepStore.open().list().sweeps == []
    ran = cli(*words, "--gate", "validation_cross_entropy <= champion")
    assert ran.code == 0, ran.err
    [version] = open_registry().show("colours").versions
    record = RunStore.open().get(version.metadata["run"])
    figures = record.metrics["validation_cross_entropy"]
    assert version.metadata["metrics"]["validation_cross_entropy"] == figures.least < figures.last
    assert f"validation_cross_entropy is {figures.least:g}, and there is no champion yet" in record.tags["gate"]


def test_a_trial_that_fails_costs_no_other(cli: Cli, given: list[str]) -> None:
    grid = [*given[:8], "-p", "learning_rate=0.1,1e39", "--sampler", "grid", "--how_many_training_steps", "50"]
    ran = cli(*grid, "--parallel", 1)
    assert ran.code == 0, ran.err
    assert [state for _, state, *_ in table()] == ["finished", "failed"]
    assert "the loss is nan" in cli("sweep", "show", SweepStore.open().list().sweeps[0].id).out
    ran = cli(*[each.replace("0.1,", "") for each in grid], "--parallel", 1)
    assert ran.code == 1
    assert "none of 1 trials has a result; the first: " in ran.err
    assert SweepStore.open().list().sweeps[0].state == "failed"


def test_a_worker_that_does_not_see_the_files_ends_the_sweep(
    cli: Cli, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one on another machine of a cluster: no other trial would do better."""
    monkeypatch.setattr(trials.RetrainTrials, "setup", lambda self: (trials.load_examples, ("/nowhere/examples.npz",)))
    ran = cli(*given, "--parallel", 1)
    assert ran.code == 1
    assert "does not see /nowhere/examples.npz" in ran.err
    assert "set TALLY_HOME to a folder of a disk that all machines have" in ran.err
    assert SweepStore.open().list().sweeps[0].state == "failed"


def test_a_trial_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from tally.training.retrain.examples import Examples

    rng = np.random.default_rng(1)
    examples = Examples(
        rng.normal(size=(60, 4)).astype(np.float32),
        np.arange(60) % 3,
        {"training": np.arange(40), "validation": np.arange(40, 60), "testing": np.arange(0)},
        3,
    )
    parameters = Parameters(how_many_training_steps=200, validation_batch_size=-1)
    reports: list[list[Any]] = []
    monkeypatch.setattr(task, "report", reports.append)

    def curve() -> dict[int, float]:
        found = {step: metrics["validation_cross_entropy"] for each in reports for step, _, metrics in each}
        reports.clear()
        return found

    def trained(name: str) -> dict[str, Any]:
        (tmp_path / name).mkdir(exist_ok=True)
        return trials.train_one(examples, parameters, str(tmp_path / name), {}, name, "result")

    assert trained("whole")["step"] == 199
    whole = curve()
    monkeypatch.setattr(head, "KEEP_SECONDS", 0)
    told = iter([False] * 9 + [True])
    monkeypatch.setattr(task, "stopping", lambda: next(told))
    assert trained("torn")["stopped"]
    assert max(curve()) == 90
    monkeypatch.setattr(task, "stopping", lambda: False)
    assert trained("torn")["step"] == 199
    assert curve() == whole, "what was measured before is told again"
    assert trained("torn")["step"] == 199, "and so it is where nothing is left to be trained"
    assert curve() == whole
    whole_state, torn_state = (head.State.from_file(tmp_path / name / "checkpoint.npz") for name in ("whole", "torn"))
    assert whole_state.head.weights.tolist() == torn_state.head.weights.tolist()


def test_what_cannot_be_swept_is_refused_at_once(cli: Cli, given: list[str]) -> None:
    assert {name: name.endswith("entropy") for name in command.RETRAIN_METRICS} == trials.METRICS
    space = given[:8]
    for arguments, said in (
        ([], "-p NAME=VALUES: at least one parameter is needed"),
        (["-p", "learning_rate=0.1,1", "--learning_rate", "1"], "--learning_rate: is swept with -p learning_rate=..."),
        (["-p", "learning_rate=-1,1", "--trials", "0"], "--trials: at least 1, not 0"),
        (["-p", "learning_rate=-1,1"], "--learning_rate: more than 0, not -1"),
        (["-p", "learnin_rate=1"], "did you mean 'learning_rate'?"),
        (["-p", "learning_rate=0.1..1", "--sampler", "grid"], "a grid needs values or steps"),
        (["-p", "learning_rate=1", "--flip_left_right"], "--flip_left_right: trials share bottlenecks"),
        (["-p", "learning_rate=1", "--validation_percentage", "0"], "needs validation pictures"),
        (
            ["-p", "early_stopping=0,5", "--validation_percentage", "0", "--metric", "accuracy"],
            "--early-stopping: needs validation pictures",
        ),
        (["-p", "learning_rate=1", "--parallel", "0"], "--parallel: at least 1, not 0"),
    ):
        ran = cli(*space, *arguments)
        assert ran.code == 2, ran.err
        assert said in ran.err
    assert SweepStore.open().list().sweeps == []
    assert "no sweep 'x'" in cli("sweep", "show", "x").err


SCRIPT = """
import sys
from pathlib import Path
import tally
values = dict(zip(sys.argv[1::2], sys.argv[2::2]))
x = float(values["--x"])
with tally.training.run() as run:
    kept = Path("outputs/step")
    for step in range(int(kept.read_text()) if kept.exists() else 0, 3):
        run.log("loss", abs(x - 0.3) + 0.1 / (1 + step), step=step)
        kept.write_text(str(step + 1))
    if x == 0.5:
        raise ValueError("no luck")
    if x == 0.9 and not Path(sys.argv[-1]).exists():
        Path(sys.argv[-1]).touch()
        import psutil, signal
        psutil.Process().parent().parent().kill()  # the worker, and this process with it
        signal.pause()
    Path("outputs/weights.bin").write_text(values["--x"])
    run.register("outputs/weights.bin", "mine", as_files=True)
"""


def test_a_script_is_swept(cli: Cli, tmp_path: Path) -> None:
    script = tmp_path / "code" / "train.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    arguments = ["sweep", "script", script, "-p", "x=0.1,0.35,0.5,0.9", "--sampler", "grid", "--metric", "loss"]
    ran = cli(*arguments, "--lowest", "--parallel", 2, "--register-best", "best", "--", tmp_path / "once")
    assert ran.code == 0, ran.err
    assert "is begun again" in ran.err, "a worker was lost"
    trials = SweepStore.open().trials(SweepStore.open().list().sweeps[0].id)
    assert [(each.state, each.step) for each in trials] == [
        ("finished", 2), ("finished", 2), ("failed", None), ("finished", 2)
    ]  # fmt: skip
    assert [each.attempts for each in trials] == [1, 1, 1, 2]
    assert "no luck" in (trials[2].error or "")
    run = RunStore.open().get(trials[1].run_id)
    assert run.parameters == {"x": 0.35}
    assert run.command == ["tally", "train", "script", str(script), "-p", "x=0.35", "--", str(tmp_path / "once")]
    [best] = open_registry().show("best").versions
    assert (best.metadata["run"], run.models[-1]) == (run.id, "models:/best/1")
    assert "registered as models:/best/1" in ran.out

    # A script that goes on from its own checkpoints does so in the run of its trial.
    (tmp_path / "once").unlink()
    ran = cli(*arguments, "--lowest", "--parallel", 2, "--checkpoints", "--", tmp_path / "once")
    assert ran.code == 0, ran.err
    again = SweepStore.open().trials(SweepStore.open().list().sweeps[0].id)
    assert [(each.state, each.value, each.step) for each in again] == [
        (each.state, each.value, each.step) for each in trials
    ]
    assert again[3].attempts == 2
    assert len(RunStore.open().list(sweep=SweepStore.open().list().sweeps[0].id).runs) == 4
    ran = cli("sweep", "script", script, "-p", "x=1..2", "--metric", "los", "--trials", 1, "--", tmp_path / "once")
    assert ran.code == 1
    assert "it has not measured 'los'" in ran.err
