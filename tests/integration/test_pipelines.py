"""``tally pipeline`` as its user types it, on small workflows: one for each thing that a workflow can say."""

# ruff: noqa: E501 - one line of YAML is one step

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tests.conftest import Ran
from tests.objectstores import moto_s3
from tests.ports import free_ports
from tests.waiting import wait_for
from tests.workflows import newest, printed, runner, start, written

from tally.pipelines.steps import launcher, room

Cli = Callable[..., Ran]
Run = Callable[..., Ran]

pytestmark = pytest.mark.skipif(room.refusal() is not None, reason="steps cannot have a file system of their own here")

STEP = """
  - name: say
    inputs: {parameters: [{name: text}]}
    container: {image: busybox, command: [echo], args: ["{{inputs.parameters.text}}"]}
"""


@pytest.fixture
def run(tmp_path: Path, cli: Cli) -> Run:
    """Run a workflow that is given by its spec; steps see the test's folder."""
    return runner(cli, tmp_path)


def refused(cli: Cli, tmp_path: Path, text: str, *more: object) -> str:
    """Why a workflow is refused; nothing of it is kept."""
    ran = cli("pipeline", "run", written(tmp_path, text), *more)
    assert ran.code == 2, ran.err
    assert cli("pipeline", "list").out == ""
    return ran.err


# -- before it starts ------------------------------------------------------------------------------------------


def test_what_is_mistyped_is_told_with_its_place(tmp_path: Path, cli: Cli) -> None:
    text = """
  entrypoint: main
  arguments: {parameters: [{name: rate, value: 0.05}]}
  templates:
  - name: main
    steps:
    - - {name: a, templat: say}
  - name: say
    container: {image: busybox, command: [echo], args: ["{{workflow.parameters.rat}}", 3]}
    retryStategy: {limit: 3}
"""
    said = refused(cli, tmp_path, text)
    assert (
        "workflow.yaml:11:19: spec.templates[0].steps[0][0].templat: WorkflowStep has no such field; did you mean"
        in said
    )
    assert "spec.templates[1].retryStategy: Template has no such field; did you mean 'retryStrategy'?" in said
    mended = text.replace("templat:", "template:").replace("retryStategy", "retryStrategy")
    said = refused(cli, tmp_path, mended)
    assert (
        "template 'say', container.args[0]: {{workflow.parameters.rat}} refers to nothing; did you mean 'rate'?" in said
    )
    ran = cli("pipeline", "run", written(tmp_path, mended.replace("rat}}", "rate}}")), "-p", "raet=1")
    assert "-p raet: there is no such parameter; did you mean 'rate'?" in ran.err


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("container: {image: nginx}", "container.command: is not given: what the image 'nginx' runs by itself"),
        ("container: {image: x, command: [no-such-command]}", "there is no command 'no-such-command' on this machine"),
        ("resource: {action: get}", "resource: it needs a Kubernetes cluster"),
        ("data: {source: {artifactPaths: {name: a}}, transformation: [{expression: data}]}",
         "data: it lists objects of a store by a pod of Argo's own"),
        ("containerSet: {containers: [{name: a, image: x, command: [echo]}]}",
         "containerSet: containers of one pod with an order among them are not run here"),
        ("initContainers: [{name: a, image: x, command: [echo]}]\n    container: {image: x, command: [echo]}",
         "initContainers: containers before the main one are not run here"),
        ("inputs: {artifacts: [{name: a, path: /tmp/a, git: {repo: 'https://git.example/a'}}]}\n    container: {image: x, command: [echo]}",
         "inputs.artifacts[0].git: the artifact 'a' needs a git repository"),
        ("container: {image: x, command: [echo]}\n    script: {image: x, command: [sh], source: echo}",
         "it does several things: container and script"),
        ("inputs: {artifacts: [{name: a, path: /v/a, raw: {data: x}}]}\n    volumes: [{name: v, emptyDir: {}}]\n    container: {image: x, command: [echo], volumeMounts: [{name: v, mountPath: /v, readOnly: true}]}",
         "/v/a is in a volume that is only read"),
        ("daemon: true\n    retryStrategy: {}\n    container: {image: x, command: [echo]}", "a daemon with it is not run here"),
        ("container: {image: x, command: [echo], args: ['{{=sprig.genCA(1)}}']}", "the function sprig.genCA() is not known"),
        ("container: {image: x, command: [echo], args: ['{{=inputs.parameters.y}}']}", "inputs.parameters.y refers to nothing"),
        ("container: {image: x, command: [echo], env: [{name: A, valueFrom: {secretKeyRef: {name: s, key: k}}}]}",
         "Secret 's' is not known here; give a folder with a file for each key: --secret NAME=FOLDER"),
        ("container: {image: x, command: [echo], volumeMounts: [{name: v, mountPath: /v}]}", "there is no volume 'v'"),
        ("outputs: {artifacts: [{name: a, path: /etc}]}\n    container: {image: x, command: [echo]}",
         "/etc is there on this machine already"),
        ("dag: {tasks: [{name: a, template: main, depends: b}, {name: b, template: main, depends: a}]}",
         "tasks wait for each other: a -> b -> a"),
        ("outputs: {artifacts: [{name: ../a, path: /tmp/a}]}\n    container: {image: x, command: [echo]}",
         "'../a' is no name: letters, digits, - and _ make one"),
        ("dag: {tasks: [{name: a.b, template: main}]}", "'a.b' is no name"),
        ("dag: {tasks: [{name: a, template: main, depends: bb.Succeded}]}", "there is no result 'Succeded'; did you mean"),
        ("synchronization: {semaphores: [{database: {key: gpu}}]}\n    container: {image: x, command: [echo]}",
         "how many may hold 'gpu' is not known here: --semaphore gpu=2"),
        ("container: {image: x, command: [echo]}\n    timeout: soon", "'soon' should be a duration"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_anything_starts(
    tmp_path: Path, cli: Cli, spec: str, reason: str
) -> None:
    said = refused(cli, tmp_path, f"  entrypoint: main\n  templates:\n  - name: main\n    {spec}\n")
    assert reason in said
    assert "template 'main'" in said


def test_without_namespaces_what_names_paths_is_refused(
    tmp_path: Path, cli: Cli, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "refusal", lambda: "the system forbids it")
    said = refused(cli, tmp_path, """
  entrypoint: main
  templates:
  - name: main
    outputs: {parameters: [{name: a, valueFrom: {path: /tmp/a}}]}
    container: {image: busybox, command: [sh, -c, "echo 1 > /tmp/a"]}
""")  # fmt: skip
    assert "/tmp/a needs a file system of the step's own: the system forbids it" in said
    run("  entrypoint: say\n  arguments: {parameters: [{name: text, value: hello}]}\n  templates:" + STEP)
    assert printed() == "hello\n"


def test_check_says_of_each_template_whether_it_runs(tmp_path: Path, cli: Cli) -> None:
    file = written(tmp_path, """
  entrypoint: main
  nodeSelector: {gpu: "yes"}
  templates:
  - name: main
    steps: [[{name: a, template: here}, {name: b, template: there}]]
  - {name: here, container: {image: busybox, command: [echo]}}
  - {name: there, container: {image: whalesay, command: [cowsay]}}
  - {name: unused, container: {image: whalesay}}
""")  # fmt: skip
    ran = cli("pipeline", "check", file)
    assert ran.code == 1
    assert [line.split()[:2] for line in ran.out.splitlines()[1:4]] == [
        ["main", "steps"], ["here", "container"], ["there", "container"]
    ]  # fmt: skip
    assert ran.out.splitlines()[3].split(maxsplit=2)[2] == "does not run here"
    assert "note: nodeSelector: means nothing here" in ran.out
    assert "unused" not in ran.out
    told = json.loads(cli("pipeline", "check", file, "--json").out)
    assert not told["runs"]
    assert [bool(each["reasons"]) for each in told["templates"]] == [False, False, False, True]


# -- files of steps --------------------------------------------------------------------------------------------


def test_steps_do_not_meet_in_their_files_nor_leave_any(tmp_path: Path, run: Run) -> None:
    run("""
  entrypoint: main
  templates:
  - name: main
    steps:
    - - {name: each, template: one, arguments: {parameters: [{name: i, value: "{{item}}"}]}, withSequence: {count: 6}}
    - - {name: all, template: all, arguments: {parameters: [{name: got, value: "{{steps.each.outputs.parameters.got}}"}]}}
  - name: one
    inputs: {parameters: [{name: i}]}
    outputs: {parameters: [{name: got, valueFrom: {path: /results/deep/got}}, {name: none, valueFrom: {path: /no, default: d}}]}
    container:
      image: busybox
      command: [sh, -c]
      args:
      - |
        set -e
        for path in /tmp/tally-test-x /tally-test-x; do [ ! -e $path ]; echo {{inputs.parameters.i}} > $path; done
        sleep 0.2
        mkdir -p /results/deep; cat /tmp/tally-test-x > /results/deep/got
        [ "$(cat /tally-test-x)" = {{inputs.parameters.i}} ]
  - name: all
    inputs: {parameters: [{name: got}]}
    container: {image: busybox, command: [echo, "{{inputs.parameters.got}}"]}
""")  # fmt: skip
    assert printed("all") == '["0","1","2","3","4","5"]\n'
    assert not Path("/tmp/tally-test-x").exists()
    assert not Path("/tally-test-x").exists()
    assert not Path("/results").exists()
    _, record, nodes = newest()
    assert nodes["each(3:3)"].outputs["parameters"] == {"got": "3", "none": "d"}
    assert not list(Path(record.folder).rglob("root"))


def test_artifacts_are_passed_on_and_may_be_changed(tmp_path: Path, run: Run) -> None:
    run("""
  entrypoint: main
  arguments: {artifacts: [{name: seed, raw: {data: seed}}]}
  templates:
  - name: main
    inputs: {artifacts: [{name: seed}]}
    dag:
      tasks:
      - {name: make, template: make, arguments: {artifacts: [{name: seed, from: "{{inputs.artifacts.seed}}"}]}}
      - {name: spoil, depends: make, template: spoil, arguments: {artifacts: [{name: in, from: "{{tasks.make.outputs.artifacts.dir}}"}]}}
      - {name: read, depends: spoil, template: read, arguments: {artifacts: [{name: in, from: "{{tasks.make.outputs.artifacts.dir}}", subPath: inner/a}]}}
  - name: make
    inputs: {artifacts: [{name: seed, path: /etc/tally-test/seed, mode: 0700}]}
    outputs: {artifacts: [{name: dir, path: /tmp/dir}, {name: gone, path: /tmp/gone, optional: true}]}
    container: {image: busybox, command: [sh, -c, "set -e; [ -x /etc/tally-test/seed ]; ls /etc/passwd; mkdir -p /tmp/dir/inner; cp /etc/tally-test/seed /tmp/dir/inner/a"]}
  - name: spoil
    inputs: {artifacts: [{name: in, path: /data}, {name: other, path: /other, optional: true}]}
    container: {image: busybox, command: [sh, -c, "echo spoilt > /data/inner/a; [ ! -e /other ]"]}
  - name: read
    inputs: {artifacts: [{name: in, path: /in}]}
    container: {image: busybox, command: [cat, /in]}
""")  # fmt: skip
    assert printed("read") == "seed"
    assert not Path("/etc/tally-test").exists()


def test_an_output_that_leads_out_is_not_taken(tmp_path: Path, run: Run) -> None:
    run("""
  entrypoint: main
  templates:
  - name: main
    outputs: {parameters: [{name: a, valueFrom: {path: /tmp/a}}]}
    container: {image: busybox, command: [ln, -s, /etc/passwd, /tmp/a]}
""", code=1)  # fmt: skip
    _, record, _ = newest()
    assert "the step left no file /tmp/a" in str(record.error) or "which is not the step's" in str(record.error)


def test_volumes_secrets_and_environments(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "user").write_text("me")
    monkeypatch.setenv("theToken", "t0ken")
    run("""
  entrypoint: main
  volumes:
  - {name: scratch, emptyDir: {}}
  - {name: photos, persistentVolumeClaim: {claimName: photos-claim}}
  - {name: files, secret: {secretName: keys}}
  templates:
  - name: main
    container:
      image: busybox
      command: [sh, -c]
      args: ['set -e; echo 1 > /scratch/a; cat /files/user > /data/deep/out; echo $USER_NAME $TOKEN $BOTH $FROM_user; ls /scratch; pwd; for each in /read/sub/x /files/x; do ! touch $each; done 2>&1']
      workingDir: /new/place
      env:
      - {name: USER_NAME, valueFrom: {secretKeyRef: {name: keys, key: user}}}
      - {name: TOKEN, valueFrom: {secretKeyRef: {name: other, key: theToken}}}
      - {name: BOTH, value: "$(USER_NAME)-x"}
      - {name: NONE, valueFrom: {secretKeyRef: {name: missing, key: a, optional: true}}}
      envFrom: [{prefix: FROM_, secretRef: {name: keys}}]
      volumeMounts:
      - {name: scratch, mountPath: /scratch}
      - {name: photos, mountPath: /data/deep, subPath: sub}
      - {name: files, mountPath: /files}
      - {name: photos, mountPath: /read, readOnly: true}
""", "--volume", f"photos-claim={tmp_path}/data", "--secret", f"keys={tmp_path}/keys", "--secret", "other=env")  # fmt: skip
    text, *refusals = printed().rsplit("\n", 3)[:-1]
    assert text == "me t0ken me-x me\na\n/new/place"
    assert ["Read-only file system" in each for each in refusals] == [True, True]
    assert (tmp_path / "data" / "sub" / "out").read_text() == "me"
    _, record, nodes = newest()
    assert "t0ken" not in json.dumps([each.to_dict() for each in nodes.values()])
    assert not [each for each in Path(record.folder).rglob("*") if each.name == "user"]


def test_a_sub_path_does_not_lead_out_of_its_volume(tmp_path: Path, run: Run) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "out").symlink_to("/etc")
    run("""
  entrypoint: main
  volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
  templates:
  - name: main
    container: {image: busybox, command: [ls, /data], volumeMounts: [{name: data, mountPath: /data, subPath: out}]}
""", "--volume", f"data={tmp_path}/data", code=1)  # fmt: skip
    assert "the subPath 'out' of the volume 'data' leads out of it, to /etc" in str(newest()[1].error)


def test_a_venv_stands_for_an_image_also_below_tmp(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, run: Run, cli: Cli
) -> None:
    env = tmp_path_factory.mktemp("elsewhere")  # than what steps are shown of /tmp
    (env / "bin").mkdir()
    command = env / "bin" / "trainer"
    command.write_text("#!/bin/sh\necho trained in $VIRTUAL_ENV\n")
    command.chmod(0o755)
    text = "  entrypoint: main\n  templates:\n  - name: main\n    container: {image: trainer, command: [trainer]}\n"
    assert "there is no command 'trainer'" in refused(cli, tmp_path, text)
    run(text, "--venv", f"main={env}")
    assert printed() == f"trained in {env}\n"


def test_tally_is_this_one_and_works_on_the_same_state(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    other = tmp_path / "bin" / "tally"
    other.write_text("#!/bin/sh\necho another\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("TALLY_DATABASE", f"sqlite:///{tmp_path}/elsewhere.db")
    run("""
  entrypoint: main
  templates:
  - {name: main, container: {image: tally, command: [sh, -c], args: ["tally --version; tally pipeline list"]}}
""")
    _, record, _ = newest()
    assert printed().startswith("tally ")
    assert record.id in printed()
    assert "running" in printed()


def test_a_path_below_tmp_is_not_lost_in_silence(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "  entrypoint: say\n  arguments: {parameters: [{name: text, value: hello}]}\n  templates:" + STEP
    file = written(tmp_path, text)
    monkeypatch.chdir("/")
    ran = cli("pipeline", "run", file, "-p", "text=/tmp/photos")
    assert ran.code == 2
    assert "--share /tmp/photos" in ran.err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert cli("pipeline", "run", file, "-p", "text=./photos").code == 0
    assert printed() == f"{tmp_path}/photos\n"


# -- what steps say --------------------------------------------------------------------------------------------


def test_retries_with_backoff_and_an_expression(tmp_path: Path, run: Run) -> None:
    run(f"""
  entrypoint: main
  templates:
  - name: main
    dag:
      tasks:
      - {{name: mends, template: mends}}
      - {{name: fatal, template: fatal}}
      - {{name: after, template: say, depends: fatal.Failed && mends, arguments: {{parameters: [{{name: text, value: "{{{{tasks.mends.exitCode}}}} {{{{tasks.fatal.exitCode}}}}"}}]}}}}
  - name: mends
    retryStrategy: {{limit: 5, backoff: {{duration: 10ms, factor: 2}}, expression: "asInt(lastRetry.exitCode) < 3"}}
    container: {{image: busybox, command: [sh, -c, 'echo "{{{{retries}}}} after {{{{lastRetry.exitCode}}}}"; exit $((2 - {{{{retries}}}}))']}}
  - name: fatal
    retryStrategy: {{limit: 5, expression: "asInt(lastRetry.exitCode) < 3"}}
    container: {{image: busybox, command: [sh, -c, "exit 7"]}}
{STEP}""")  # fmt: skip
    _, _, nodes = newest()
    attempts = sorted(name for name in nodes if name.startswith(("mends(", "fatal(")))
    assert attempts == ["fatal(0)", "mends(0)", "mends(1)", "mends(2)"]
    assert printed("mends(2)") == "2 after 1\n"
    assert printed("after") == "0 7\n"
    assert "retryStrategy.expression" in str(nodes["fatal"].message)


def test_hooks_loops_and_outputs(tmp_path: Path, run: Run) -> None:
    run(f"""
  entrypoint: main
  onExit: bye
  arguments: {{parameters: [{{name: names, value: '["x", {{"k": 1.50}}, true]'}}]}}
  hooks:
    running: {{expression: workflow.status == "Running", template: say, arguments: {{parameters: [{{name: text, value: begins}}]}}}}
  templates:
  - name: main
    steps:
    - - name: each
        template: result
        withParam: "{{{{workflow.parameters.names}}}}"
        arguments: {{parameters: [{{name: text, value: "{{{{item}}}}"}}]}}
        when: "'{{{{item}}}}' != 'true'"
        hooks:
          exit: {{template: say, arguments: {{parameters: [{{name: text, value: "{{{{steps.each.status}}}}"}}]}}}}
    - - {{name: none, template: say, withParam: "[]", arguments: {{parameters: [{{name: text, value: never}}]}}}}
    outputs:
      parameters:
      - {{name: all, valueFrom: {{parameter: "{{{{steps.each.outputs.result}}}}"}}, globalName: everything}}
      - {{name: first, valueFrom: {{expression: "fromJSON(steps.each.outputs.result)[0]"}}}}
      - {{name: other, valueFrom: {{expression: "steps.none.outputs.result", default: nothing}}}}
  - name: result
    inputs: {{parameters: [{{name: text}}]}}
    script: {{image: busybox, command: [sh], source: "cat <<'X'\\n{{{{inputs.parameters.text}}}}\\nX\\n"}}
  - name: bye
    steps: [[{{name: bye, template: say, arguments: {{parameters: [{{name: text, value: "{{{{workflow.status}}}} {{{{workflow.outputs.parameters.everything}}}}"}}]}}}}]]
{STEP}""")  # fmt: skip
    _, record, nodes = newest()
    top = nodes[record.name]
    assert top.outputs["parameters"] == {"all": '["x",{"k":1.50}]', "first": "x", "other": "[]"}
    assert printed("bye") == 'Succeeded ["x",{"k":1.50}]\n'
    assert printed(f"{record.name}.hooks.running") == "begins\n"
    assert printed(f"{record.name}[0].each(1:k:1.50).onExit") == "Succeeded\n"
    assert nodes["each(2:true)"].phase == "Skipped"
    assert nodes["none"].phase == "Skipped"


def test_inline_templates_see_what_is_around_them_and_their_own_inputs(tmp_path: Path, run: Run, cli: Cli) -> None:
    text = """
  entrypoint: main
  arguments: {parameters: [{name: outer, value: from outside}]}
  templates:
  - name: main
    inputs: {parameters: [{name: outer}]}
    steps:
    - - {name: first, inline: {script: {image: busybox, command: [sh], source: "echo first"}}}
    - - name: each
        withItems: [1, 2]
        arguments: {parameters: [{name: own, value: "own {{item}}"}]}
        inline:
          inputs: {parameters: [{name: own}]}
          container: {image: busybox, command: [echo, "{{item}} {{inputs.parameters.own}} {{inputs.parameters.outer}} {{steps.first.outputs.result}}"]}
"""
    run(text)
    assert printed("each") == "1 own 1 from outside first\n2 own 2 from outside first\n"
    wrong = written(tmp_path, text.replace("steps.first.", "steps.frst."))
    assert "{{steps.frst.outputs.result}} refers to nothing" in cli("pipeline", "check", wrong).out


def test_what_a_text_or_an_artifact_cannot_hold_is_told(tmp_path: Path, run: Run) -> None:
    run("""
  entrypoint: main
  templates:
  - name: main
    steps:
    - - {name: long, template: long}
      - {name: nul, template: nul, continueOn: {error: true}}
      - {name: folder, template: folder, continueOn: {error: true}}
      - {name: fifo, template: fifo, continueOn: {error: true}}
      - {name: items, template: long, withParam: "[NaN]", continueOn: {error: true}}
    - - {name: count, template: count, arguments: {parameters: [{name: text, value: "{{steps.long.outputs.result}}"}]}}
  - {name: long, script: {image: python, command: [python], source: "print('first' + 300_000 * 'x' + 'last')"}}
  - name: nul
    outputs: {parameters: [{name: a, valueFrom: {path: /tmp/a, default: d}}]}
    container: {image: busybox, command: [sh, -c, "printf 'x\\\\000y' > /tmp/a"]}
  - name: folder
    outputs: {parameters: [{name: a, valueFrom: {path: /tmp/a, default: d}}]}
    container: {image: busybox, command: [mkdir, /tmp/a]}
  - name: fifo
    outputs: {artifacts: [{name: a, path: /tmp/a}]}
    container: {image: busybox, command: [sh, -c, "mkdir /tmp/a; mkfifo /tmp/a/pipe"]}
  - name: count
    inputs: {parameters: [{name: text}]}
    script: {image: python, command: [python], source: "text = '{{inputs.parameters.text}}'; print(len(text), text[:5], text[-4:])"}
""")  # fmt: skip
    _, _, nodes = newest()
    assert printed("count") == "262143 xxxxx last\n"  # the end of it, as on a cluster
    assert nodes["long"].message == "its result is the last 256 KiB of 292 KiB that it has printed"
    assert nodes["nul"].message == "the parameter 'a' has a character NUL, which no text of a workflow can hold"
    assert nodes["folder"].message == "the parameter 'a': /tmp/a is no file"
    assert "is neither a file nor a folder nor a link" in str(nodes["fifo"].message)
    assert "withParam is '[NaN]', which is no JSON list: NaN is no number" in str(nodes["items"].message)


def test_what_goes_wrong_in_a_hook_or_a_number_is_told(tmp_path: Path, run: Run) -> None:
    run(f"""
  entrypoint: say
  arguments: {{parameters: [{{name: text, value: hello}}]}}
  hooks: {{odd: {{expression: "'x'", template: say, arguments: {{parameters: [{{name: text, value: odd}}]}}}}}}
  templates:
{STEP}""", code=1)  # fmt: skip
    _, record, _ = newest()
    assert (record.state, record.error) == ("error", "a hook: it is 'x', neither true nor false")
    run("""
  entrypoint: main
  arguments: {parameters: [{name: limit, value: many}]}
  templates:
  - name: main
    retryStrategy: {limit: "{{workflow.parameters.limit}}"}
    container: {image: busybox, command: ["false"]}
""", code=1)  # fmt: skip
    _, record, _ = newest()
    assert record.state == "error"
    assert "many" in str(record.error)


def test_a_person_is_waited_for(tmp_path: Path, cli: Cli, run: Run) -> None:
    text = f"""
  entrypoint: main
  templates:
  - name: main
    steps:
    - - {{name: before, template: say, arguments: {{parameters: [{{name: text, value: before}}]}}}}
    - - {{name: approval, template: approve}}
    - - {{name: after, template: say, when: "{{{{steps.approval.outputs.parameters.approve}}}} == YES", arguments: {{parameters: [{{name: text, value: "{{{{steps.approval.outputs.parameters.approve}}}}"}}]}}}}
  - name: approve
    inputs: {{parameters: [{{name: approve, default: "NO", enum: ["YES", "NO"]}}]}}
    suspend: {{}}
    outputs: {{parameters: [{{name: approve, valueFrom: {{supplied: {{}}}}}}]}}
{STEP}"""
    ran = run(text)
    _, record, _ = newest()
    assert record.state == "waiting"
    assert f"tally pipeline resume {record.id}" in ran.err
    assert "ǁ approval" in cli("pipeline", "show", record.id).out
    assert "-p approve=YES|NO" in cli("pipeline", "resume", record.id).err
    assert "should be one of YES, NO" in cli("pipeline", "resume", record.id, "-p", "approve=maybe").err
    assert cli("pipeline", "resume", record.id, "approval", "-p", "approve=YES").code == 0
    assert printed("after") == "YES\n"
    assert printed("before") == "before\n"
    assert "is succeeded" in cli("pipeline", "resume", record.id).err


def test_limits_end_whole_groups_and_the_exit_handler_hears_of_it(tmp_path: Path, run: Run) -> None:
    run("""
  entrypoint: main
  onExit: bye
  activeDeadlineSeconds: 1
  templates:
  - name: main
    container: {image: busybox, command: [sh, -c, "(sleep 61) & setsid sleep 61 & sleep 61"]}
  - {name: bye, container: {image: busybox, command: [echo, "{{workflow.status}}"]}}
""", code=1)  # fmt: skip
    assert not [each for each in psutil.process_iter() if each.name() == "sleep" and each.cmdline()[1:] == ["61"]]
    _, record, nodes = newest()
    assert "activeDeadlineSeconds of the workflow were over" in str(record.error)
    assert printed(f"{record.name}.onExit") == "Failed\n"
    assert nodes[record.name].phase == "Failed"


def test_a_run_that_fails_tells_what_its_step_has_said(run: Run) -> None:
    ran = run("""
  entrypoint: main
  templates:
  - name: main
    container: {image: busybox, command: [sh, -c, "seq 9; echo because >&2; exit 3"]}
""", code=1)  # fmt: skip
    name = newest()[1].name
    assert f"  {name}: 9\n  {name}: because\n" in ran.err
    assert f"{name}: 4\n" not in ran.err


def test_passwords_in_addresses_are_shown_nowhere(run: Run, cli: Cli) -> None:
    ran = run("""
  entrypoint: main
  arguments: {parameters: [{name: place, value: "postgres://u:hunter2@h/d"}]}
  templates:
  - name: main
    steps:
    - - {name: get, template: get, continueOn: {error: true}}
      - {name: ask, template: ask, continueOn: {failed: true}}
      - {name: each, template: each, withItems: ["http://u:hunter2@h/"], arguments: {parameters: [{name: a, value: "{{item}}"}]}}
  - name: get
    inputs: {artifacts: [{name: a, path: /tmp/a, http: {url: "http://u:hunter2@127.0.0.1:1/a"}}]}
    container: {image: busybox, command: [echo]}
  - {name: ask, http: {url: "http://u:hunter2@127.0.0.1:1/a"}}
  - {name: each, inputs: {parameters: [{name: a}]}, container: {image: busybox, command: [echo, hello]}}
""")
    _, record, nodes = newest()
    assert str(nodes["get"].message).startswith("http://u:***@127.0.0.1:1/a")
    commands = (["show"], ["show", "--json"], ["logs"])
    said = [
        ran.err,
        cli("pipeline", "list", "--json").out,
        *(cli("pipeline", *each, record.id).out for each in commands),
    ]
    assert [each for each in said if "hunter2" in each] == []
    assert all("u:***@" in each for each in said)


def test_cached_steps_are_not_done_again(tmp_path: Path, run: Run, cli: Cli) -> None:
    script = tmp_path / "step.py"
    script.write_text("import sys; open(sys.argv[1] + '/effects', 'a').write(sys.argv[2]); print(sys.argv[2])")
    text = f"""
  entrypoint: main
  arguments: {{parameters: [{{name: b, value: b}}]}}
  templates:
  - name: main
    steps:
    - - {{name: a, template: step, arguments: {{parameters: [{{name: x, value: a}}]}}}}
    - - {{name: b, template: step, arguments: {{parameters: [{{name: x, value: "{{{{workflow.parameters.b}}}}{{{{steps.a.outputs.result}}}}"}}]}}}}
    - - {{name: c, template: step, arguments: {{parameters: [{{name: x, value: c}}]}}}}
  - name: step
    inputs: {{parameters: [{{name: x}}]}}
    container: {{image: python, command: [python, {script}, {tmp_path}, "{{{{inputs.parameters.x}}}}"]}}
"""
    effects = tmp_path / "effects"

    def done(*more: object) -> str:
        effects.write_text("")
        run(text, *more)
        return effects.read_text()

    assert done() == "abac"
    assert done() == "abac"
    assert done("--cached") == ""
    assert done("--cached", "-p", "b=B") == "Ba"
    assert done("--from", "b") == "bac"
    script.write_text(script.read_text() + "\n")
    assert done("--from", "c") == "abac"
    assert "--from d: there is no such step" in cli("pipeline", "run", tmp_path / "workflow.yaml", "--from", "d").err


def test_memoized_templates_are_run_once(tmp_path: Path, run: Run) -> None:
    text = """
  entrypoint: main
  arguments: {parameters: [{name: key, value: k}]}
  templates:
  - name: main
    memoize: {key: "{{workflow.parameters.key}}", maxAge: "1h", cache: {configMap: {name: c}}}
    outputs: {parameters: [{name: x, valueFrom: {path: /tmp/x}}]}
    container: {image: busybox, command: [sh, -c, "date +%N > /tmp/x"]}
"""
    found = []
    for key in ("k", "k", "other"):
        run(text, "-p", f"key={key}")
        _, record, nodes = newest()
        found.append(nodes[record.name].outputs["parameters"]["x"])
    assert found[0] == found[1] != found[2]


def test_a_mutex_is_held_by_one_at_a_time(tmp_path: Path, run: Run) -> None:
    run(f"""
  entrypoint: main
  templates:
  - name: main
    steps: [[{{name: each, template: one, withSequence: {{count: 4}}}}]]
  - name: one
    synchronization: {{mutexes: [{{name: m}}]}}
    container: {{image: busybox, command: [sh, -c, "mkdir {tmp_path}/held && sleep 0.1 && rmdir {tmp_path}/held"]}}
""")  # fmt: skip


def test_daemons_are_there_for_others_and_end_with_their_template(tmp_path: Path, run: Run, cli: Cli) -> None:
    (port,) = free_ports(1)
    text = f"""
  entrypoint: main
  templates:
  - name: main
    steps: [[{{name: inner, template: inner}}], [{{name: after, template: after}}]]
  - name: inner
    dag:
      tasks:
      - {{name: server, template: server}}
      - {{name: use, depends: server, template: use, arguments: {{parameters: [{{name: ip, value: "{{{{tasks.server.ip}}}}"}}]}}}}
  - name: server
    daemon: true
    container:
      image: python
      command: [python, -m, http.server, "{port}", --bind, 127.0.0.1, --directory, "{tmp_path}"]
      readinessProbe: {{httpGet: {{path: /, port: {port}}}}}
  - name: use
    inputs: {{parameters: [{{name: ip}}]}}
    script: {{image: python, command: [python], source: "import urllib.request; print(urllib.request.urlopen('http://{{{{inputs.parameters.ip}}}}:{port}/').status)"}}
  - name: after
    script: {{image: python, command: [python], source: "import socket; print(socket.socket().connect_ex(('127.0.0.1', {port})) != 0)"}}
"""
    run(text)
    assert printed("use") == "200\n"
    assert printed("after") == "True\n"
    _, _, nodes = newest()
    assert nodes["server"].phase == "Succeeded"
    with socket.create_server(("127.0.0.1", port)):
        run(text, code=1)
    _, _, nodes = newest()
    assert "is taken already" in str(nodes["server"].message)
    assert nodes["use"].phase == "Omitted"


def test_requests(tmp_path: Path, run: Run, web: str) -> None:
    run(f"""
  entrypoint: main
  templates:
  - name: main
    steps:
    - - {{name: good, template: ask, arguments: {{parameters: [{{name: path, value: good}}]}}}}
      - {{name: bad, template: ask, arguments: {{parameters: [{{name: path, value: bad}}]}}, continueOn: {{failed: true}}}}
      - {{name: odd, template: odd}}
    - - {{name: say, template: say, arguments: {{parameters: [{{name: text, value: "{{{{steps.good.outputs.result}}}} {{{{steps.bad.status}}}}"}}]}}}}
  - name: ask
    inputs: {{parameters: [{{name: path}}]}}
    http: {{url: "{web}/{{{{inputs.parameters.path}}}}", method: POST, body: hello, headers: [{{name: X-A, value: "1"}}]}}
  - name: odd
    http: {{url: "{web}/bad", successCondition: "response.statusCode == 418 && response.body contains 'teapot'"}}
{STEP}""")  # fmt: skip
    assert printed("say") == "POST hello 1 Failed\n"
    _, _, nodes = newest()
    assert nodes["bad"].message == "received non-2xx response code: 418"
    assert nodes["odd"].phase == "Succeeded"


@pytest.fixture
def web() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            good = self.path == "/good"
            text = f"{self.command} {body} {self.headers['X-A']}" if good else "a teapot"
            self.send_response(200 if good else 418)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_artifacts_in_a_bucket(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    with moto_s3() as service:
        monkeypatch.setenv("S3_ENDPOINT", service.url.removeprefix("http://"))
        monkeypatch.setenv("S3_USE_HTTPS", "false")
        monkeypatch.setenv("access", "testing")
        monkeypatch.setenv("secret", "testing")
        client = boto3.client("s3", endpoint_url=service.url, aws_access_key_id="testing", aws_secret_access_key="testing",
                              region_name="us-east-1")  # fmt: skip
        client.create_bucket(Bucket="bucket")
        run("""
  entrypoint: main
  templates:
  - name: main
    steps: [[{name: put, template: put}], [{name: get, template: get}]]
  - name: put
    outputs:
      artifacts:
      - name: packed
        path: /tmp/dir
        s3: &place {bucket: bucket, key: packed.tgz, accessKeySecret: {name: keys, key: access}, secretKeySecret: {name: keys, key: secret}}
      - name: plain
        path: /tmp/dir
        archive: {none: {}}
        s3: {<<: *place, key: plain}
    container: {image: busybox, command: [sh, -c, "mkdir -p /tmp/dir/in; echo 1 > /tmp/dir/in/a"]}
  - name: get
    inputs:
      artifacts:
      - {name: packed, path: /packed, s3: *place}
      - {name: plain, path: /plain, s3: {<<: *place, key: plain}}
      - {name: none, path: /none, optional: true, s3: {<<: *place, key: none}}
    container: {image: busybox, command: [sh, -c, "cat /packed/in/a /plain/in/a; [ ! -e /none ]"]}
""", "--secret", "keys=env")  # fmt: skip
        names = [each["Key"] for each in client.list_objects_v2(Bucket="bucket")["Contents"]]
    assert names == ["packed.tgz", "plain/in/a"]
    assert printed("get") == "1\n1\n"


def test_templates_of_files_beside_it(tmp_path: Path, run: Run) -> None:
    (tmp_path / "library.yaml").write_text(f"""
apiVersion: argoproj.io/v1alpha1
kind: WorkflowTemplate
metadata: {{name: library}}
spec:
  entrypoint: main
  arguments: {{parameters: [{{name: who, value: nobody}}]}}
  templates:
  - name: main
    steps: [[{{name: inner, template: say, arguments: {{parameters: [{{name: text, value: "to {{{{workflow.parameters.who}}}}"}}]}}}}]]
{STEP}""")
    run("  workflowTemplateRef: {name: library}\n  arguments: {parameters: [{name: who, value: you}]}\n")
    assert printed() == "to you\n"
    run("""
  entrypoint: main
  arguments: {parameters: [{name: who, value: all}]}
  templates:
  - name: main
    steps: [[{name: outer, templateRef: {name: library, template: main}}]]
""")
    assert printed("inner") == "to all\n"


def test_interrupted_runs_are_resumed_from_the_list(tmp_path: Path, cli: Cli) -> None:
    file = written(tmp_path, f"""
  entrypoint: main
  templates:
  - name: main
    dag: {{tasks: [{{name: first, template: first}}, {{name: second, template: second, depends: first}}]}}
  - name: first
    container: {{image: busybox, command: [sh, -c, "touch {tmp_path}/begun; until [ -e {tmp_path}/go ]; do sleep 0.05; done"]}}
  - {{name: second, container: {{image: busybox, command: ["true"]}}}}
""")  # fmt: skip
    process = start("run", file, "--share", tmp_path, log=tmp_path / "log")
    wait_for(lambda: (tmp_path / "begun").exists(), process, told=(tmp_path / "log").read_text)
    _, record, _ = newest()
    assert "running" in cli("pipeline", "list").out
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert "interrupted" in cli("pipeline", "list").out
    (tmp_path / "go").touch()
    assert cli("pipeline", "resume", record.id).code == 0
    told = json.loads(cli("pipeline", "show", record.id, "--json").out)
    assert told["state"] == "succeeded"
    assert [each["phase"] for each in told["nodes"]] == ["Succeeded"] * 3


def test_what_tries_whether_steps_can_have_files_of_their_own_leaves_none(tmp_path: Path) -> None:
    tried = subprocess.run(
        [sys.executable, "-I", "-S", launcher.__file__, "--allowed"],
        env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert tried.stderr == ""
    assert list(tmp_path.iterdir()) == []
