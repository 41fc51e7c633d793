"""A sweep whose driver, workers and database are killed at random ends as if they had not been."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.extent import FULL
from tests.faults.storms import start, tally, workers_of
from tests.postgres import PrivatePostgres
from tests.retraining import backbone, photos
from tests.services import private_postgres

KILLS = 20
SECONDS = 400.0


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivatePostgres | None]:
    with nullcontext() if request.param == "sqlite" else private_postgres() as server:
        if server is not None:
            monkeypatch.setenv("TALLY_DATABASE", server.url)
        yield server


def said(*words: object) -> Any:
    """What a command prints as JSON, the first line of it."""
    done = subprocess.run([*tally(*words), "--json"], stdout=subprocess.PIPE, timeout=120, check=True)
    return json.loads(done.stdout.splitlines()[0]) if done.stdout.strip() else None


def table(sweep: str) -> list[tuple[Any, ...]]:
    trials = said("sweep", "show", sweep)["trials"]
    return [tuple(each[name] for name in ("number", "state", "parameters", "value", "step")) for each in trials]


@pytest.mark.skipif(not FULL, reason="a storm of kills, with TALLY_TEST_FULL=1")
@pytest.mark.parametrize("kind", ["retrain", "script"])
def test_a_sweep_in_a_storm_ends_as_an_undisturbed_one(
    tmp_path: Path, database: PrivatePostgres | None, kind: str
) -> None:
    if kind == "retrain":
        words: list[object] = [
            *(
                "retrain",
                "--image_dir",
                photos(tmp_path / "photos"),
                "--backbone",
                backbone(tmp_path / "backbone.onnx"),
            ),
            *("-p", "learning_rate=log:1e-3..1", "-p", "train_batch_size=5,20", "--how_many_training_steps", 6000),
        ]
    else:
        (tmp_path / "code").mkdir()
        (tmp_path / "code" / "train.py").write_text(SCRIPT)
        words = ["script", tmp_path / "code" / "train.py", "-p", "lr=log:1e-3..1", "--metric", "loss", "--lowest"]
        words += ["--checkpoints"]
    words = [*words, "--sampler", "random", "--trials", 30, "--prune"]
    words += ["--register-best", "colours"]
    subprocess.run(tally("sweep", *words, "--parallel", 1), check=True, timeout=SECONDS, stderr=subprocess.DEVNULL)
    calm = said("sweep", "list")["id"]
    undisturbed = table(calm)
    assert {"finished", "pruned"} == {state for _, state, *_ in undisturbed}

    dice, log, done = random.Random(7), tmp_path / "log", Counter[str]()
    process = start(tally("sweep", *words, "--parallel", 2), log)
    until = time.monotonic() + SECONDS
    while True:
        assert time.monotonic() < until, log.read_text()
        while process.poll() is None and not workers_of(process):  # before, there is little to be lost
            time.sleep(0.1)
        try:
            process.wait(dice.uniform(0.1, 2.0) if done.total() < KILLS else SECONDS)
        except subprocess.TimeoutExpired:
            pass
        if process.poll() is not None:
            newest = said("sweep", "list")
            if newest["id"] != calm and newest["state"] == "finished":
                break
            process = start(tally("sweep", *(("resume", newest["id"]) if newest["id"] != calm else words)), log)
            continue
        kinds = ["worker", "driver", "everything", *(["database"] if database is not None else [])]
        what, workers = dice.choice(kinds), workers_of(process)
        if what == "database" and database is not None:
            database.kill()
            time.sleep(dice.uniform(0, 1))
            database.start()
        victims = {"worker": workers[:1], "driver": [process], "everything": [*workers, process]}.get(what, [])
        for each in victims:
            try:
                each.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass
        done[what] += bool(victims) or what == "database"
    print(f"kills: {dict(done)}")
    assert done.total() > KILLS / 3, "the sweep was over before it was disturbed enough"
    assert table(newest["id"]) == undisturbed
    assert max(each["attempts"] for each in said("sweep", "show", newest["id"])["trials"]) > 1
    assert len(said("models", "show", "colours")["versions"]) == 1, "the content of both is the same"
    assert not workers_of(process)


SCRIPT = """
import sys, time
from pathlib import Path
import tally

lr = float(sys.argv[sys.argv.index("--lr") + 1])
kept = Path("outputs/state")
step, weight = (int(kept.read_text().split()[0]), float(kept.read_text().split()[1])) if kept.exists() else (0, 5.0)
with tally.training.run() as run:
    while step < 40:
        weight -= lr * 0.2 * weight
        run.log("loss", weight**2, step=step)
        step += 1
        if step % 10 == 0:
            time.sleep(2.2)  # what was logged before is kept, then
            new = Path("outputs/new")
            new.write_text(f"{step} {weight!r}")
            new.replace(kept)
    Path("outputs/weights.bin").write_text(str(weight))
    run.register("outputs/weights.bin", "mine", as_files=True)
"""
