"""What a workflow means on Argo, it means here: where it is easy to be nearly right."""

# ruff: noqa: E501 - one line of YAML is one step

from __future__ import annotations

import http.server
import io
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from tests.conftest import Ran
from tests.waiting import eventually, wait_for
from tests.workflows import kill, newest, printed, runner, start, written

from tally.pipelines.steps import room
from tally.pipelines.store import PipelineStore

Cli = Callable[..., Ran]
Run = Callable[..., Ran]

pytestmark = pytest.mark.skipif(room.refusal() is not None, reason="steps cannot have a file system of their own here")

SAY = """
  - name: say
    inputs: {parameters: [{name: text, value: nothing}]}
    container: {image: busybox, command: [echo], args: ["{{inputs.parameters.text}}"]}
"""


@pytest.fixture
def run(tmp_path: Path, cli: Cli) -> Run:
    return runner(cli, tmp_path)


def test_a_script_comes_after_the_arguments(run: Run) -> None:
    run("""
  entrypoint: main
  templates:
  - name: main
    script: {image: python, command: [python3], args: [-c, "import sys; print(sys.argv)"], source: "print('not this')"}
""")
    assert printed() == "['-c', '/argo/staging/script']\n"


def test_variables_are_put_into_commands_as_kubernetes_does(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "of this machine")
    run("""
  entrypoint: main
  templates:
  - name: main
    container:
      image: busybox
      command: [sh, -c]
      args: ["printf '%s\\\\n' '$(ONE)' '$$(ONE)' '$(MINE)' \\"$TWO\\" '$(FROM)'"]
      env: [{name: ONE, value: first}, {name: TWO, value: "$(ONE) $$(ONE) $$ $(THREE) $(FROM)"}, {name: THREE, value: third}]
      envFrom: [{configMapRef: {name: keys}}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: keys}
data: {FROM: listed}
""")
    assert printed().splitlines() == ["first", "$(ONE)", "$(MINE)", "first $(ONE) $ $(THREE) $(FROM)", "listed"]


def test_what_the_items_of_a_loop_put_out_comes_together(run: Run) -> None:
    run(f"""
  entrypoint: main
  templates:
  - name: main
    steps:
    - - {{name: each, template: each, withItems: [1, 2, 3], continueOn: {{failed: true}}, arguments: {{parameters: [{{name: num, value: "{{{{item}}}}"}}]}}}}
    - - {{name: say, template: say, arguments: {{parameters: [{{name: text, value: "{{{{steps.each.outputs.parameters.num}}}} {{{{steps.each.outputs.parameters.list}}}} {{{{steps.each.outputs.parameters}}}} {{{{steps.each.outputs.result}}}}"}}]}}}}
  - name: each
    inputs: {{parameters: [{{name: num}}]}}
    script: {{image: busybox, command: [sh], source: "n={{{{inputs.parameters.num}}}}; echo $n > /tmp/n; echo [$n] > /tmp/list; echo $n; [ $n != 2 ]"}}
    outputs: {{parameters: [{{name: num, valueFrom: {{path: /tmp/n}}}}, {{name: list, valueFrom: {{path: /tmp/list}}}}]}}
{SAY}""")
    assert printed("say") == '["1","3"] [[1],[3]] [{"list":"[1]","num":"1"},{"list":"[3]","num":"3"}] [1,3]\n'


def test_an_exit_handler_is_given_what_its_step_or_workflow_was_given(run: Run) -> None:
    run(f"""
  entrypoint: main
  onExit: bye
  arguments: {{parameters: [{{name: who, value: nobody}}]}}
  templates:
  - name: main
    steps:
    - - {{name: a, template: say, onExit: say, arguments: {{parameters: [{{name: text, value: a}}]}}}}
      - {{name: b, template: say, hooks: {{exit: {{template: say}}}}, withItems: [b1, b2], arguments: {{parameters: [{{name: text, value: "{{{{item}}}}"}}]}}}}
      - {{name: c, template: say, hooks: {{exit: {{template: say, arguments: {{parameters: [{{name: text, value: own}}]}}}}}}, arguments: {{parameters: [{{name: text, value: c}}]}}}}
      - {{name: d, template: say, onExit: say, hooks: {{exit: {{template: main}}}}}}
  - name: bye
    inputs: {{parameters: [{{name: who}}]}}
    container: {{image: busybox, command: [echo, "bye {{{{inputs.parameters.who}}}}"]}}
{SAY}""", "-p", "who=you")  # fmt: skip
    name = newest()[1].name
    said = {each: printed(f"{name}[0].{each}.onExit") for each in ("a", "b(0:b1)", "b(1:b2)", "c", "d")}
    assert said == {"a": "a\n", "b(0:b1)": "b1\n", "b(1:b2)": "b2\n", "c": "own\n", "d": "nothing\n"}
    assert printed(f"{name}.onExit") == "bye you\n"


def test_an_exit_handler_that_is_given_too_little_is_refused(tmp_path: Path, cli: Cli) -> None:
    ran = cli("pipeline", "check", written(tmp_path, """
  entrypoint: main
  onExit: bye
  templates:
  - {name: main, container: {image: busybox, command: [echo]}}
  - {name: bye, inputs: {parameters: [{name: who}]}, container: {image: busybox, command: [echo]}}
"""))  # fmt: skip
    assert ran.code == 1
    assert "hooks.exit: the template 'bye' is not given its parameter 'who'" in ran.out


def test_defaults_are_for_all_templates_and_go_deep(tmp_path: Path, run: Run) -> None:
    (tmp_path / "library.yaml").write_text("""
apiVersion: argoproj.io/v1alpha1
kind: WorkflowTemplate
metadata: {name: library}
spec:
  templates:
  - {name: print, container: {image: busybox, command: [sh, -c, "echo $A $B"]}}
""")
    run("""
  entrypoint: main
  templateDefaults:
    container: {image: busybox, env: [{name: A, value: a}, {name: B, value: b}]}
    retryStrategy: {limit: 1, backoff: {duration: 10ms, maxDuration: 1h}}
  templates:
  - name: main
    steps:
    - - {name: own, template: own, continueOn: {failed: true}}
      - {name: beside, templateRef: {name: library, template: print}}
      - {name: inline, inline: {container: {image: busybox, command: [sh, -c, "echo $A $B"]}}}
  - name: own
    retryStrategy: {backoff: {duration: 20ms}}
    container: {image: busybox, command: [sh, -c, "echo $A $B $C; exit 1"], env: [{name: B, value: own}, {name: C, value: c}]}
""")
    assert printed("own(0)") == printed("own(1)") == "a own c\n"
    assert printed("beside(0)") == printed("inline(0)") == "a b\n"


def test_numbers_of_a_sequence(run: Run) -> None:
    run(f"""
  entrypoint: main
  templates:
  - name: main
    steps:
    - - {{name: down, template: say, withSequence: {{start: 2, end: 1}}, arguments: {{parameters: [{{name: text, value: "{{{{item}}}}"}}]}}}}
      - {{name: under, template: say, withSequence: {{count: "-1"}}, arguments: {{parameters: [{{name: text, value: "{{{{item}}}}"}}]}}}}
      - {{name: none, template: say, withSequence: {{count: 0}}}}
      - {{name: go, template: say, withSequence: {{count: 2, start: 10, format: "%03v-%%x"}}, arguments: {{parameters: [{{name: text, value: "{{{{item}}}}"}}]}}}}
{SAY}""")
    assert [printed(each) for each in ("down", "under", "go")] == ["2\n1\n", "0\n-1\n-2\n", "010-%x\n011-%x\n"]
    assert newest()[2]["none"].phase == "Skipped"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("dag: {tasks: [{name: a, template: t, continueOn: {failed: true}}, {name: b, template: t, depends: a}]}",
         "has continueOn where tasks have depends: say a.Failed"),
        ("dag: {tasks: [{name: a, template: t}, {name: b, template: t, dependencies: [a]}, {name: c, template: t, depends: b}]}",
         "has dependencies where"),
        ("dag: {tasks: [{name: a, template: t}, {name: 1b, template: t, depends: a}]}", "'1b' begins with a digit"),
        ("steps: [[{name: a, template: t}]]\n    timeout: 5s", "timeout: is not for templates of the kind steps"),
        ("container: {image: x, command: [echo]}\n    timeout: '5'", "timeout: '5' needs a unit: 5s"),
        ("container: {image: x, command: [echo]}\n    retryStrategy: {backoff: {factor: 2}}", "backoff: needs a duration"),
        ("steps: [[{name: a, template: t, withSequence: {count: 2, end: 3}}]]", "withSequence: needs either count or end"),
        ("steps: [[{name: a, template: t, withSequence: {start: 2}}]]", "withSequence: needs either count or end"),
        ("container: {image: x, command: [echo]}\n    inputs: {artifacts: [{name: a, path: /a, archive: {zip: {}}, raw: {data: x}}]}",
         "archive.zip: is not done"),
    ],
)  # fmt: skip
def test_what_argo_refuses_is_refused(tmp_path: Path, cli: Cli, spec: str, reason: str) -> None:
    ran = cli("pipeline", "check", written(tmp_path, f"""
  entrypoint: main
  templates:
  - name: main
    {spec}
  - {{name: t, container: {{image: busybox, command: [echo]}}}}
"""))  # fmt: skip
    assert ran.code == 1
    assert reason in ran.out


def test_a_limit_may_be_a_parameter_and_holds_for_all_attempts(run: Run) -> None:
    run("""
  entrypoint: main
  templates:
  - name: main
    dag: {tasks: [{name: one, template: one}, {name: again, template: again}]}
  - name: one
    inputs: {parameters: [{name: most, value: "1"}]}
    activeDeadlineSeconds: "{{inputs.parameters.most}}"
    container: {image: busybox, command: [sleep, "62"]}
  - name: again
    retryStrategy: {limit: 5, backoff: {duration: 10ms, maxDuration: 2s}}
    container: {image: busybox, command: [sh, -c, "test {{retries}} = 0 && exit 1; sleep 62"]}
""", code=1)  # fmt: skip
    _, _, nodes = newest()
    late = "Pod was active on the node longer than the specified deadline"
    assert nodes["one"].message == nodes["again(1)"].message == late
    assert nodes["again"].message == f"Max duration limit exceeded: {late}"
    assert "again(2)" not in nodes


def test_artifacts_that_argo_does_not_unpack_stay_as_they_are(tmp_path: Path, run: Run, web: str) -> None:
    for name, mode in (("plain.tar", "w"), ("packed.tgz", "w:gz"), ("other.tar.xz", "w:xz")):
        with tarfile.open(tmp_path / name, mode) as tar:
            for inside in ("a", "b"):
                tar.addfile(tarfile.TarInfo(inside), io.BytesIO())
    text = f"""
  entrypoint: main
  templates:
  - name: main
    inputs:
      artifacts:
      - {{name: plain, path: /tmp/plain, http: {{url: "{web}/plain.tar"}}}}
      - {{name: packed, path: /tmp/packed, http: {{url: "{web}/packed.tgz"}}}}
      - {{name: none, path: /tmp/none, archive: {{none: {{}}}}, http: {{url: "{web}/packed.tgz"}}}}
      - {{name: other, path: /tmp/other, http: {{url: "{web}/other.tar.xz"}}}}
    container: {{image: busybox, command: [sh, -c, "cd /tmp; for each in plain packed none other; do [ -d $each ] && echo $each; done; exit 0"]}}
"""
    run(text)
    assert printed() == "packed\n"
    run(text.replace("path: /tmp/plain,", "path: /tmp/plain, archive: {tar: {}},"), code=1)
    assert "no tar file in gzip" in str(newest()[1].error)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """What serves the test's folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_is_cancelled_begins_nothing_again(tmp_path: Path, cli: Cli, killed: bool) -> None:
    """Also where no process drives it: what was interrupted is not done again, and what still runs is ended."""
    file = written(tmp_path, f"""
  entrypoint: main
  onExit: bye
  templates:
  - name: main
    steps: [[{{name: first, template: first, continueOn: {{failed: true}}}}], [{{name: second, template: second}}]]
  - name: first
    container: {{image: busybox, command: [sh, -c, "echo first >> {tmp_path}/done; sleep 63"]}}
  - {{name: second, container: {{image: busybox, command: [sh, -c, "echo second >> {tmp_path}/done"]}}}}
  - {{name: bye, container: {{image: busybox, command: [sh, -c, "echo {{{{workflow.status}}}} >> {tmp_path}/done"]}}}}
""")  # fmt: skip
    process = start("run", file, "--share", tmp_path, log=tmp_path / "log")
    wait_for(lambda: (tmp_path / "done").exists(), process, told=(tmp_path / "log").read_text)
    if killed:
        kill(process)
    else:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 130
    record = newest()[1]
    eventually(lambda: not newest()[1].alive)
    assert cli("pipeline", "cancel", record.id).code == 0
    _, record, nodes = newest()
    assert record.state == "cancelled"
    assert (tmp_path / "done").read_text() == "first\nFailed\n"
    assert [each.display for each in nodes.values() if not each.done] == []
    sleeps = [
        each for each in psutil.process_iter() if each.name() == "sleep" and each.status() != psutil.STATUS_ZOMBIE
    ]
    assert not [each for each in sleeps if each.cmdline()[1:] == ["63"]]


def test_who_waits_for_a_mutex_takes_what_was_memoized_meanwhile(tmp_path: Path, run: Run) -> None:
    run(f"""
  entrypoint: main
  templates:
  - name: main
    steps: [[{{name: each, template: one, withSequence: {{count: 3}}}}]]
  - name: one
    synchronization: {{mutexes: [{{name: m}}]}}
    memoize: {{key: same, maxAge: 1h, cache: {{configMap: {{name: c}}}}}}
    container: {{image: busybox, command: [sh, -c, "echo once >> {tmp_path}/done"]}}
""")  # fmt: skip
    assert (tmp_path / "done").read_text() == "once\n"
    assert sorted(str(each.message) for name, each in newest()[2].items() if name.startswith("each")) == [
        "None", "taken from the cache", "taken from the cache"
    ]  # fmt: skip


def test_a_mutex_that_a_killed_driver_has_not_given_back_is_given_back(
    tmp_path: Path, cli: Cli, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(PipelineStore, "unlock", lambda *given: None)  # killed between the two, time after time
        run("""
  entrypoint: main
  activeDeadlineSeconds: 30
  templates:
  - name: main
    steps: [[{name: a, template: held}], [{name: wait, template: wait}], [{name: b, template: held}]]
  - name: held
    synchronization: {mutexes: [{name: m}]}
    container: {image: busybox, command: [echo]}
  - {name: wait, suspend: {}}
""")
    assert newest()[1].state == "waiting"
    assert cli("pipeline", "resume", newest()[1].id).code == 0
    assert newest()[1].state == "succeeded"
