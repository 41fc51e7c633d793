"""Workflows on a schedule: one run for each interval, whatever is killed, and shown while it waits for a person."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Ran
from tests.faults.storms import start, tally
from tests.faults.test_kill_backfill import drivers, kill
from tests.server import running
from tests.waiting import wait_for
from tests.workflows import ASKING, written

from tally.jobs.facade import Jobs
from tally.pipelines.facade import open_pipelines
from tally.pipelines.steps import room
from tally.triggers.store import ScheduleStore

pytestmark = pytest.mark.skipif(room.refusal() is not None, reason="steps cannot have a file system of their own here")

Cli = Callable[..., Ran]

CRON = """apiVersion: argoproj.io/v1alpha1
kind: CronWorkflow
metadata: {{name: nightly}}
spec:
  schedules: ["{cron}"]
  timezone: Etc/UTC
  concurrencyPolicy: Forbid
  workflowMetadata: {{labels: {{team: night}}}}
  workflowSpec:
    entrypoint: main
    templates:
    - name: main
      steps:
      - - {{name: work, template: work}}
      - - {{name: approve, template: approve}}
    - name: work
      script:
        image: busybox
        command: [sh]
        source: |
          touch {folder}/begun
          while [ ! -e {folder}/go ]; do sleep 0.05; done
          echo "${{interval_x}}{{{{workflow.scheduledTime}}}} {{{{workflow.labels.team}}}}" >> {folder}/effects
    - name: approve
      suspend: {{}}
"""


@pytest.fixture
def added(tmp_path: Path, cli: Cli) -> ScheduleStore:
    """A schedule with one interval that is over."""
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    (tmp_path / "cron.yaml").write_text(CRON.format(cron=f"0 {hour.hour} * * *", folder=tmp_path))
    (tmp_path / "night.yaml").write_text("pipeline: cron.yaml\nshare: .\n")
    begin = (hour - timedelta(days=1)).isoformat()
    ran = cli("schedule", "add", "night", tmp_path / "night.yaml", "--from", begin, "--catch-up", "all")
    assert ran.code == 0, ran.err
    (tmp_path / "cron.yaml").unlink()  # it was read
    return ScheduleStore(Jobs().store.engine)


def test_an_interval_has_one_run_whatever_is_killed_and_says_when_it_waits(
    added: ScheduleStore, cli: Cli, tmp_path: Path
) -> None:
    found = added.get("night")
    assert (found.timezone, found.overlap, found.catch_up, found.paused) == ("Etc/UTC", "skip", "all", False)
    home, log, pipelines = Path(os.environ["TALLY_HOME"]), tmp_path / "log", open_pipelines()
    command = tally("schedule", "run", "night")
    scheduler = start(command, log)
    wait_for(lambda: (tmp_path / "begun").exists(), scheduler, told=log.read_text)
    scheduler.kill()
    scheduler.wait()
    for each in drivers(home):
        kill(each)
    scheduler = start(command, log)
    wait_for(lambda: pipelines.store.list().runs[0].alive, scheduler, told=log.read_text)
    (tmp_path / "go").touch()
    wait_for(lambda: added.runs("night")[0].outcome is not None, scheduler, told=log.read_text)
    (run,) = added.runs("night")
    assert (run.state, run.outcome, run.attempts) == ("running", "waits for a person: approve", 2)
    assert f"pipeline {run.pipeline_id}  waits for a person: approve" in cli("schedule", "show", "night").out
    (record,) = pipelines.store.list().runs
    assert (record.id, record.name, record.state) == (run.pipeline_id, f"night-{run.interval_end}", "waiting")
    pipelines.answer(record.id, {})
    assert scheduler.wait(timeout=60) == 0, log.read_text()
    (run,) = added.runs("night")
    assert (run.state, run.outcome) == ("finished", f"pipeline {record.name} is succeeded")
    due = datetime.fromtimestamp(run.interval_end, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert (tmp_path / "effects").read_text() == f"{due} night\n"  # once
    assert len(pipelines.store.list().runs) == 1


def test_what_a_cron_workflow_says_is_taken_or_refused(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "cron.yaml"
    text = CRON.format(cron="0 3 * * *", folder=tmp_path)

    def add(*changes: tuple[str, str], more: tuple[str, ...] = ()) -> Ran:
        changed = text
        for before, after in changes:
            assert before in changed
            changed = changed.replace(before, after)
        file.write_text(changed)
        return cli("schedule", "add", "night", file, "--replace", *more)

    policy, zone = "concurrencyPolicy: Forbid", "timezone: Etc/UTC"
    assert add((policy, "suspend: true"), (zone, "timezone: Europe/Berlin")).code == 0
    found = ScheduleStore(Jobs().store.engine).get("night")
    assert (found.cron, found.timezone, found.overlap, found.catch_up, found.paused) == (
        "0 3 * * *", "Europe/Berlin", "parallel", "none", True,
    )  # fmt: skip
    for change, told in {
        "concurrencyPolicy: Replace": "spec.concurrencyPolicy: Replace: no run is stopped here",
        "startingDeadlineSeconds: 600": "spec.startingDeadlineSeconds: 600: a run that is later than 60 s",
        "when: '{{= true }}'": "spec.when: a schedule of Tally goes on",
        "conurrencyPolicy: Allow": "did you mean 'concurrencyPolicy'",
    }.items():
        refused = add((policy, change))
        assert (refused.code, told in refused.err) == (2, True), refused.err
    assert add((policy, "concurrencyPolicy: Replace"), more=("--overlap", "queue")).code == 0
    refused = add(('schedules: ["0 3 * * *"]', 'schedules: ["0 3 * * *", "0 4 * * *"]'))
    assert "spec.schedules: there are 2, and a schedule of Tally has one" in refused.err
    assert "there is no command 'no-such'" in add(("command: [sh]", "command: [no-such]")).err
    plain = written(tmp_path, ASKING, "plain.yaml")
    assert "cron: is needed" in cli("schedule", "add", "plain", plain).err
    assert cli("schedule", "add", "plain", plain, "--cron", "@hourly").code == 2
    assert cli("schedule", "add", "plain", plain, "--cron", "0 * * * *").code == 0
    (tmp_path / "own.yaml").write_text("pipeline: plain.yaml\nparameter: {who: '{interval_start:%Y}', whom: x}\n")
    assert "-p whom" in cli("schedule", "add", "own", tmp_path / "own.yaml", "--cron", "0 * * * *").err
    assert "plain  pipeline plain.yaml  0 * * * *" in cli("schedule", "list").out


def test_only_admins_schedule_them_on_a_server_and_nobody_is_shown_secrets(tmp_path: Path, cli: Cli) -> None:
    secret = "\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: s}\nstringData: {key: hidden}\n"
    head = "apiVersion: argoproj.io/v1alpha1\nkind: Workflow\nmetadata: {generateName: test-}\nspec:"
    file = written(tmp_path, head + ASKING + secret)
    with running("--no-schedules") as server, server.client() as admin:
        operator = admin.post("/keys", json={"name": "ben", "role": "operator"}).json()["text"]
        words = ("--server", server.url, "--key")
        add = ("schedule", "add", "asking", file, "--cron", "0 3 * * *")
        refused = cli(*words, operator, *add)
        assert "a pipeline runs programs on the server's machine, which only an admin may have done" in refused.err
        assert cli(*words, server.key, *add).code == 0
        text = admin.get("/schedules/asking").text
        assert json.loads(text)["schedule"]["template"] == {"pipeline": str(file)}
        assert "hidden" not in text
        workflow: dict[str, Any] = {
            "apiVersion": "argoproj.io/v1alpha1",
            "kind": "Workflow",
            "metadata": {},
            "spec": {},
        }
        posted = {"name": "posted", "cron": "0 3 * * *", "job": {**workflow, "spec": {}}}
        assert "entrypoint" in admin.post("/schedules", json=posted).text
