"""A pipeline's driver is killed in every step, between them, and in the exit handler: each effect is there once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import psutil
from tests.conftest import Ran
from tests.contracts.conftest import lose
from tests.waiting import wait_for
from tests.workflows import kill, newest, start, written

from tally.database.tables import pipeline_runs
from tally.pipelines.steps.launcher import MARK

Cli = Callable[..., Ran]

WORKFLOW = """
  entrypoint: main
  onExit: bye
  arguments: {parameters: [{name: out}, {name: fail, value: "no"}]}
  templates:
  - name: main
    steps:
    - - {name: a, template: step, arguments: {parameters: [{name: what, value: a}]}}
    - - {name: b, template: step, arguments: {parameters: [{name: what, value: "b{{item}}"}]}, withItems: [1, 2]}
      - {name: again, template: again}
    - - {name: c, template: step, arguments: {parameters: [{name: what, value: "c {{steps.a.outputs.result}}"}]}}
  - name: step
    inputs: {parameters: [{name: what}]}
    container:
      image: busybox
      command: [sh, -c]
      args:
      - |
        echo "{{inputs.parameters.what}} begins" >> {{workflow.parameters.out}}/effects
        until [ -e {{workflow.parameters.out}}/go ]; do sleep 0.05; done
        sleep 0.2
        echo "{{inputs.parameters.what}} ends" >> {{workflow.parameters.out}}/effects
        [ "{{inputs.parameters.what}} {{workflow.parameters.fail}}" = "b2 yes" ] && exit 3
        echo done
  - name: again
    retryStrategy: {limit: 1}
    container:
      image: busybox
      command: [sh, -c]
      args: ["echo again {{retries}} >> {{workflow.parameters.out}}/effects; exit $((1 - {{retries}}))"]
  - name: bye
    steps:
    - - {name: bye, template: step, arguments: {parameters: [{name: what, value: "bye {{workflow.status}}"}]}}
"""


def marked(run_id: str) -> list[psutil.Process]:
    """Processes of a run's steps."""
    found = []
    for each in psutil.process_iter():
        try:
            if each.environ().get(MARK, "").startswith(run_id):
                found.append(each)
        except psutil.Error:
            continue
    return found


def told(folder: Path) -> str:
    """What there is to say where something did not come: the log, the effects, and how each step stands."""
    steps = [f"{each.display}: {each.phase} {each.message or ''}" for each in newest()[2].values()]
    return "\n".join([(folder / "log").read_text(), (folder / "effects").read_text(), *steps])


def test_each_effect_is_there_once(tmp_path: Path, cli: Cli) -> None:
    file, log, effects = written(tmp_path, WORKFLOW), tmp_path / "log", tmp_path / "effects"
    effects.touch()
    process = start("run", "-q", file, "-p", f"out={tmp_path}", "--share", tmp_path, log=log)

    def wait(whats: tuple[str, ...], what: str) -> None:
        lines = {f"{each} {what}" for each in whats}
        wait_for(lambda: lines <= {*effects.read_text().splitlines()}, process, told=lambda: told(tmp_path))

    for whats in (("a",), ("b1", "b2"), ("c done",), ("bye Succeeded",)):
        wait(whats, "begins")
        kill(process)  # in the middle of it
        _, record, _ = newest()
        assert record.state == "interrupted"
        process = start("resume", "-q", record.id, log=log)
        (tmp_path / "go").touch()
        wait(whats, "ends")  # also what began late: nobody opens the gate for it again
        (tmp_path / "go").unlink()
        if whats == ("a",):
            kill(process)  # as soon as it has ended
            process = start("resume", "-q", record.id, log=log)
    assert process.wait(timeout=60) == 0, log.read_text()
    whats = ("a", "b1", "b2", "c done", "bye Succeeded")
    assert sorted(effects.read_text().splitlines()) == sorted(
        [f"{what} {end}" for what in whats for end in ("begins", "ends")] + ["again 0", "again 1"]
    )
    _, record, nodes = newest()
    assert record.state == "succeeded"
    assert {each.phase for name, each in nodes.items() if name != "again(0)"} == {"Succeeded"}
    assert list((Path(record.folder) / "launchers").iterdir()) == []
    assert marked(record.id) == []


def test_a_failure_in_the_middle_reaches_the_exit_handler(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "go").touch()
    file = written(tmp_path, WORKFLOW)
    ran = cli("pipeline", "run", "-q", file, "-p", f"out={tmp_path}", "-p", "fail=yes", "--share", tmp_path)
    assert ran.code == 1
    assert "child 'b(1:2)' failed" in ran.err
    effects = (tmp_path / "effects").read_text()
    assert "bye Failed ends" in effects
    assert "c done" not in effects
    assert effects.count("b1 ends") == 1


def test_ctrl_c_puts_a_run_down_and_what_was_cut_off_is_run_again(tmp_path: Path, cli: Cli) -> None:
    file, log, effects = written(tmp_path, WORKFLOW), tmp_path / "log", tmp_path / "effects"
    effects.touch()
    process = start("run", file, "-p", f"out={tmp_path}", "--share", tmp_path, log=log)
    wait_for(lambda: "a begins\n" in effects.read_text(), process, told=lambda: told(tmp_path))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, log.read_text()
    _, record, _ = newest()
    assert record.state == "interrupted"
    assert f"tally pipeline resume {record.id}" in log.read_text()
    assert marked(record.id) == []
    (tmp_path / "go").touch()
    assert cli("pipeline", "resume", "-q", record.id).code == 0
    assert effects.read_text().count("a begins") == 2
    assert effects.read_text().count("a ends") == 1


def test_cancel_ends_steps_and_runs_the_exit_handler(tmp_path: Path, cli: Cli) -> None:
    file, log, effects = written(tmp_path, WORKFLOW), tmp_path / "log", tmp_path / "effects"
    effects.touch()
    process = start("run", file, "-p", f"out={tmp_path}", "--share", tmp_path, log=log)
    wait_for(lambda: "a begins\n" in effects.read_text(), process, told=lambda: told(tmp_path))
    _, record, _ = newest()
    assert cli("pipeline", "delete", record.id).code == 1
    assert cli("pipeline", "cancel", record.id).code == 0
    wait_for(lambda: "bye Failed begins" in effects.read_text(), process, told=lambda: told(tmp_path))
    (tmp_path / "go").touch()
    assert process.wait(timeout=60) == 1
    _, record, nodes = newest()
    assert record.state == "cancelled"
    assert nodes["a"].phase == "Failed"
    assert "a ends" not in effects.read_text()
    assert cli("pipeline", "delete", record.id).code == 0
    assert not Path(record.folder).exists()


def test_what_a_killed_driver_has_begun_is_cancelled_too(tmp_path: Path, cli: Cli) -> None:
    file, log, effects = written(tmp_path, WORKFLOW), tmp_path / "log", tmp_path / "effects"
    effects.touch()
    process = start("run", "-q", file, "-p", f"out={tmp_path}", "--share", tmp_path, log=log)
    wait_for(lambda: "a begins\n" in effects.read_text(), process, told=lambda: told(tmp_path))
    kill(process)
    _, record, _ = newest()
    process = start("resume", "-q", record.id, log=log)
    wait_for(lambda: newest()[1].alive, process, told=lambda: told(tmp_path))
    assert "goes on in another process" in cli("pipeline", "resume", record.id).err
    assert cli("pipeline", "cancel", record.id).code == 0
    wait_for(lambda: "bye Failed begins" in effects.read_text(), process, told=lambda: told(tmp_path))
    (tmp_path / "go").touch()
    assert process.wait(timeout=60) == 1, log.read_text()
    assert newest()[1].state == "cancelled"
    assert "a ends" not in effects.read_text()
    assert marked(record.id) == []


def test_a_lost_launcher_costs_no_more_than_a_step(tmp_path: Path) -> None:
    file, log, effects = written(tmp_path, WORKFLOW), tmp_path / "log", tmp_path / "effects"
    effects.touch()
    process = start("run", "-q", file, "-p", f"out={tmp_path}", "--share", tmp_path, log=log)
    wait_for(lambda: "a begins\n" in effects.read_text(), process, told=lambda: told(tmp_path))
    _, record, _ = newest()
    (launcher,) = psutil.Process(process.pid).children()
    (step,) = [each for each in launcher.children() if each.environ().get(MARK, "").startswith(record.id)]
    launcher.kill()
    assert process.wait(timeout=60) == 1
    assert "the process that starts steps was killed" in log.read_text()
    assert f"tally pipeline resume {record.id}" in log.read_text()
    process = start("resume", "-q", record.id, log=log)
    wait_for(lambda: effects.read_text().count("a begins\n") == 2, process, told=lambda: told(tmp_path))
    # What outlived the launcher was ended before it was begun again.
    assert not step.is_running() or step.status() == psutil.STATUS_ZOMBIE
    (tmp_path / "go").touch()
    assert process.wait(timeout=60) == 0, log.read_text()
    assert effects.read_text().count("a ends") == 1


def test_who_loses_a_run_leaves_its_steps_to_who_has_it(tmp_path: Path) -> None:
    """As one that was put to sleep, and wakes when another has gone on."""
    file, log, effects = written(tmp_path, WORKFLOW), tmp_path / "log", tmp_path / "effects"
    effects.touch()
    first = start("run", "-q", file, "-p", f"out={tmp_path}", "--share", tmp_path, log=log)
    wait_for(lambda: "a begins\n" in effects.read_text(), first, told=lambda: told(tmp_path))
    first.send_signal(signal.SIGSTOP)
    pipelines, record, _ = newest()
    lose(pipelines.store.engine, pipeline_runs, record.id)
    second = start("resume", "-q", record.id, log=log)
    wait_for(lambda: newest()[1].alive, second, told=log.read_text)
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=60) == 1
    assert "was taken over by another process" in log.read_text()
    assert marked(record.id)
    (tmp_path / "go").touch()
    assert second.wait(timeout=60) == 0, told(tmp_path)
    assert effects.read_text().count("a begins") == effects.read_text().count("a ends") == 1
    assert newest()[1].state == "succeeded"
    assert marked(record.id) == []
