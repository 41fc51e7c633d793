"""Workflow files for tests, and what came of their runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import Ran

from tally.pipelines.facade import Pipelines, open_pipelines
from tally.pipelines.store import Node, RunRecord

NEWEST = "newest"


def written(folder: Path, text: str, name: str = "workflow.yaml") -> Path:
    """A file with a workflow whose spec is given; or with whole documents."""
    head = "apiVersion: argoproj.io/v1alpha1\nkind: Workflow\nmetadata: {generateName: test-}\nspec:\n"
    path = folder / name
    path.write_text(text if text.lstrip().startswith("apiVersion") else head + text)
    return path


def runner(cli: Callable[..., Ran], folder: Path) -> Callable[..., Ran]:
    """A function that runs a workflow that is given by its spec, whose steps see the folder."""

    def running(text: str, *more: object, code: int = 0) -> Ran:
        ran = cli("pipeline", "run", written(folder, text), "--share", folder, *more)
        assert ran.code == code, ran.err
        return ran

    return running


def newest() -> tuple[Pipelines, RunRecord, dict[str, Node]]:
    """The newest run, and its nodes by their display name."""
    pipelines = open_pipelines()
    record = pipelines.store.list(limit=1).runs[0]
    return pipelines, record, {each.display: each for each in pipelines.store.nodes(record.id)}


def printed(step: str | None = None) -> str:
    """What the steps of the newest run have printed."""
    pipelines, record, _ = newest()
    return "".join(path.read_text() for _, files in pipelines.logs(record.id, step) for path in files)


def start(*arguments: object, log: Path) -> subprocess.Popen[Any]:
    """``tally pipeline`` in a process of its own."""
    command = [sys.executable, "-m", "tally", "pipeline", *map(str, arguments)]
    with log.open("a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=dict(os.environ), start_new_session=True)


def kill(process: subprocess.Popen[Any]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


ASKING = """
  entrypoint: main
  onExit: bye
  arguments: {parameters: [{name: who, value: "<b>world</b>"}, {name: place, value: "postgres://u:secret@h/d"}]}
  templates:
  - name: main
    steps:
    - - {name: greet, template: say, arguments: {parameters: [{name: text, value: "hello {{workflow.parameters.who}}"}]}}
    - - {name: approve, template: approve}
    - - {name: after, template: say, arguments: {parameters: [{name: text, value: "answer {{steps.approve.outputs.parameters.verdict}}"}]}}
  - name: say
    inputs: {parameters: [{name: text}]}
    container: {image: busybox, command: [echo], args: ["{{inputs.parameters.text}}"]}
  - name: approve
    inputs: {parameters: [{name: verdict, value: "no", enum: ["yes", "no"]}]}
    suspend: {}
    outputs: {parameters: [{name: verdict, valueFrom: {supplied: {}}}, {name: note, valueFrom: {supplied: {}, default: ""}}]}
  - name: bye
    container: {image: busybox, command: [echo], args: ["bye {{workflow.status}}"]}
"""  # noqa: E501 - one line of YAML is one step
"""A workflow that waits for a person."""


def waiting(folder: Path) -> str:
    """The id of a new run of :data:`ASKING`, which waits."""
    process = start("run", written(folder, ASKING), "-q", log=folder / "run.log")
    assert process.wait(timeout=60) == 0, (folder / "run.log").read_text()
    return newest()[1].id
