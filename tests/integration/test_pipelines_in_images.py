"""``tally pipeline run --podman``: steps really run in their images, and no container is left behind."""

# ruff: noqa: E501 - one line of YAML is one step

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tests.conftest import Ran
from tests.waiting import wait_for
from tests.workflows import kill, newest, printed, start, written

from tally.pipelines.facade import open_pipelines
from tally.pipelines.steps.launcher import MARK

Cli = Callable[..., Ran]

IMAGE = "localhost/tally-test-tiny:1"
COMMANDS = "sh echo cat ls sleep true env touch mkdir ln readlink sort kill trap"
CONTAINERFILE = """
FROM scratch
COPY root /
ENV FROM_THERE=yes
WORKDIR /work
ENTRYPOINT ["/bin/echo", "from the"]
CMD ["image"]
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny image with a shell, and a command of its own."""
    busybox = shutil.which("busybox")
    if shutil.which("podman") is None or busybox is None:
        pytest.skip("it takes podman and busybox (statically linked)")
    if subprocess.run(["podman", "image", "exists", IMAGE], check=False).returncode:
        _build(busybox, tmp_path_factory.mktemp("image"))
    done = subprocess.run(
        ["podman", "run", "--rm", "--network=host", "--init", IMAGE], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"podman cannot run a container here: {done.stderr[-300:]}")
    return IMAGE


def _build(busybox: str, folder: Path) -> None:
    (folder / "root" / "bin").mkdir(parents=True)
    (folder / "root" / "etc").mkdir()
    (folder / "root" / "etc" / "os-release").write_text("NAME=tiny\n")
    shutil.copy2(busybox, folder / "root" / "bin" / "busybox")
    for each in COMMANDS.split():
        (folder / "root" / "bin" / each).symlink_to("busybox")
    (folder / "Containerfile").write_text(CONTAINERFILE)
    built = subprocess.run(
        ["podman", "build", "--quiet", "--tag", IMAGE, str(folder)], capture_output=True, text=True, check=False
    )
    if built.returncode:
        pytest.skip(f"podman cannot build an image here: {built.stderr[-300:]}")


@pytest.fixture
def run(image: str, tmp_path: Path, cli: Cli) -> Iterator[Callable[..., Ran]]:
    """Run a workflow that is given by its spec, in the image."""

    def running(text: str, *more: object, code: int = 0) -> Ran:
        ran = cli("pipeline", "run", written(tmp_path, text.replace("IMAGE", image)), "--podman", *more)
        assert ran.code == code, ran.err
        return ran

    yield running
    assert containers() == []


def containers() -> list[str]:
    """The names of those that steps of this test's runs have left: others run at the same time."""
    listed = subprocess.run(
        ["podman", "ps", "--all", "--format", f'{{{{index .Labels "{MARK}"}}}} {{{{.Names}}}}'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    ours = {each.id for each in open_pipelines().store.list(limit=100).runs}
    found = [line.partition(" ") for line in listed.stdout.splitlines()]
    return [name for mark, _, name in found if mark.partition("/")[0] in ours]


def test_a_template_has_the_files_the_command_and_the_environment_of_its_image(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THIS_MACHINE", "seen")
    ran = run("""
  entrypoint: main
  templates:
  - name: main
    steps:
    - - {name: plain, template: plain}
      - {name: args, template: args}
      - {name: shell, template: shell}
      - {name: script, template: script}
    - - {name: fails, template: fails, continueOn: {failed: true}}
      - {name: says, template: says, arguments: {parameters: [{name: text, value: "{{steps.script.outputs.result}}"}]}}
  - {name: plain, container: {image: IMAGE}}
  - {name: args, container: {image: IMAGE, args: [arguments]}}
  - {name: shell, container: {image: IMAGE, command: [sh, -c], args: ["cat /etc/os-release; echo $FROM_THERE ${OF_THIS_MACHINE:-not}; echo $PWD"]}}
  - {name: script, script: {image: IMAGE, command: [sh], workingDir: /made/for/it, source: "pwd; [ -e /usr ] || echo 'no /usr'"}}
  - {name: fails, container: {image: IMAGE, command: [sh, -c, "exit 7"]}}
  - {name: says, inputs: {parameters: [{name: text}]}, container: {image: IMAGE, command: [echo, "{{inputs.parameters.text}}"]}}
""")  # fmt: skip
    assert "images" not in ran.err
    assert printed("plain") == "from the image\n"
    assert printed("args") == "from the arguments\n"
    assert printed("shell") == "NAME=tiny\nyes not\n/work\n"
    assert printed("says") == "/made/for/it\nno /usr\n"
    _, _, nodes = newest()
    assert (nodes["fails"].phase, nodes["fails"].exit_code) == ("Failed", 7)


def test_artifacts_parameters_and_volumes_are_where_the_template_says(run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a").write_text("photo")
    run("""
  entrypoint: main
  volumes: [{name: photos, persistentVolumeClaim: {claimName: photos}}, {name: scratch, emptyDir: {}}]
  templates:
  - name: main
    steps:
    - - {name: make, template: make}
    - - name: use
        template: use
        arguments:
          parameters: [{name: word, value: "{{steps.make.outputs.parameters.word}}"}]
          artifacts: [{name: tree, from: "{{steps.make.outputs.artifacts.tree}}"}, {name: file, from: "{{steps.make.outputs.artifacts.file}}"}]
  - name: make
    outputs:
      parameters: [{name: word, valueFrom: {path: /word}}, {name: none, valueFrom: {path: /none, default: d}}]
      artifacts: [{name: tree, path: /tmp/tree}, {name: file, path: /etc/os-release}, {name: gone, path: /gone, optional: true}]
    container:
      image: IMAGE
      command: [sh, -c, "set -e; echo word > /word; mkdir -p /tmp/tree/in; echo leaf > /tmp/tree/in/leaf; ln -s in/leaf /tmp/tree/link; cat /photos/a; ! touch /photos/b 2>&1"]
      volumeMounts: [{name: photos, mountPath: /photos, readOnly: true}]
  - name: use
    inputs:
      parameters: [{name: word}]
      artifacts: [{name: tree, path: /in/tree}, {name: file, path: /in/file}, {name: text, path: /scratch/text, raw: {data: raw}}]
    outputs: {artifacts: [{name: tree, path: /in/tree}]}
    container:
      image: IMAGE
      command: [sh, -c, "set -e; cat /in/tree/link /in/file /scratch/text; readlink /in/tree/link; echo more > /in/tree/more; touch /scratch/x"]
      volumeMounts: [{name: scratch, mountPath: /scratch}]
""", "--volume", f"photos={tmp_path}/photos")  # fmt: skip
    assert printed("use") == "leaf\nNAME=tiny\nrawin/leaf\n"
    assert "Read-only file system" in printed("make")
    assert sorted(each.name for each in (tmp_path / "photos").iterdir()) == ["a"]
    _, record, nodes = newest()
    assert nodes["make"].outputs["parameters"] == {"word": "word", "none": "d"}
    kept = Path(nodes["use"].outputs["artifacts"]["tree"]["at"])
    assert sorted(each.name for each in kept.rglob("*")) == ["in", "leaf", "link", "more"]
    assert not [each for each in Path(record.folder).rglob("*") if each.name in ("root", "env", "lost")]


def test_secrets_are_in_no_command_line_and_no_log(run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "token").write_text("c0ntained#1 'x'")
    (tmp_path / "keys" / "many").write_text("first\nsec0nd")
    seen: list[str] = []
    process = start(
        "run", written(tmp_path, f"""
  entrypoint: main
  templates:
  - name: main
    outputs: {{parameters: [{{name: both, valueFrom: {{path: /both}}}}]}}
    container:
      image: {IMAGE}
      command: [sh, -c, 'echo "$TOKEN|$MANY|$PLAIN" > /both; touch {tmp_path}/begun; until [ -e {tmp_path}/go ]; do sleep 0.05; done']
      env:
      - {{name: TOKEN, valueFrom: {{secretKeyRef: {{name: keys, key: token}}}}}}
      - {{name: MANY, valueFrom: {{secretKeyRef: {{name: keys, key: many}}}}}}
      - {{name: PLAIN, value: "$(TOKEN)!"}}
"""), "--podman", "--secret", f"keys={tmp_path}/keys", "--share", tmp_path, log=tmp_path / "log",
    )  # fmt: skip
    wait_for(lambda: (tmp_path / "begun").exists(), process, told=(tmp_path / "log").read_text)
    for each in psutil.process_iter():
        try:
            seen += each.cmdline()
        except psutil.Error:
            continue
    (tmp_path / "go").touch()
    assert process.wait(timeout=60) == 0, (tmp_path / "log").read_text()
    assert any("--env-file" in each for each in seen)
    assert not [each for each in seen if "c0ntained" in each or "sec0nd" in each]
    _, record, nodes = newest()
    both = nodes[record.name].outputs["parameters"]["both"]
    assert both == "c0ntained#1 'x'|first\nsec0nd|c0ntained#1 'x'!"
    assert "c0ntained" not in (tmp_path / "log").read_text()
    files = [each for each in Path(record.folder).rglob("*") if each.is_file() and "artifacts" not in each.parts]
    assert not [each for each in files if b"c0ntained" in each.read_bytes()]


def test_what_its_image_does_not_have_is_refused_before_anything_starts(image: str, tmp_path: Path, cli: Cli) -> None:
    ran = cli("pipeline", "check", written(tmp_path, f"""
  entrypoint: main
  templates:
  - name: main
    dag: {{tasks: [{{name: a, template: a}}, {{name: b, template: b}}, {{name: c, template: c}}, {{name: d, template: d}}]}}
  - {{name: a, container: {{image: "no-such-image:9", command: [sh]}}}}
  - {{name: b, container: {{image: "quay.io/no/such", command: [sh]}}}}
  - {{name: c, script: {{image: "{image}", source: "echo"}}}}
  - name: d
    inputs: {{artifacts: [{{name: in, path: /tmp/out/in, raw: {{data: x}}}}]}}
    outputs: {{artifacts: [{{name: out, path: /tmp/out}}]}}
    container: {{image: "{image}"}}
"""), "--podman")  # fmt: skip
    assert ran.code == 1
    assert (
        "'no-such-image:9' is not on this machine; fetch it: podman pull docker.io/library/no-such-image:9" in ran.out
    )
    assert "fetch it: podman pull quay.io/no/such" in ran.out
    assert "template 'c', script.command: is missing: what is to run the script?" in ran.out
    assert "/tmp/out holds /tmp/out/in, which the step is given" in ran.out


def test_a_command_that_is_not_in_the_image_fails_the_step(run: Callable[..., Ran]) -> None:
    run("""
  entrypoint: main
  templates:
  - name: main
    outputs: {parameters: [{name: a, valueFrom: {path: /a, default: d}}]}
    container: {image: IMAGE, command: [/bin/no-such]}
""", code=1)  # fmt: skip
    _, record, nodes = newest()
    assert (nodes[record.name].phase, nodes[record.name].outputs["parameters"]) == ("Failed", {"a": "d"})
    assert "No such file" in printed()


WAITING = """
  entrypoint: main
  onExit: bye
  arguments: {parameters: [{name: out}]}
  templates:
  - name: main
    steps: [[{name: a, template: step}]]
  - name: step
    container:
      image: IMAGE
      command: [sh, -c, "echo begins >> OUT/effects; (trap '' TERM; while true; do sleep 0.1; done) & until [ -e OUT/go ]; do sleep 0.05; done; echo ends >> OUT/effects"]
  - {name: bye, container: {image: IMAGE, command: [sh, -c, "echo bye {{workflow.status}} >> OUT/effects"]}}
"""


def begun(tmp_path: Path, image: str) -> subprocess.Popen[bytes]:
    text = WAITING.replace("IMAGE", image).replace("OUT", str(tmp_path))
    (tmp_path / "effects").touch()
    file = written(tmp_path, text)
    process = start("run", file, "-p", f"out={tmp_path}", "--podman", "--share", tmp_path, log=tmp_path / "log")
    wait_for(lambda: "begins" in (tmp_path / "effects").read_text(), process, told=(tmp_path / "log").read_text)
    return process


def test_a_time_limit_ends_a_container(run: Callable[..., Ran]) -> None:
    run("""
  entrypoint: main
  templates:
  - {name: main, activeDeadlineSeconds: 2, container: {image: IMAGE, command: [sh, -c, "trap '' TERM; sleep 1000"]}}
""", code=1)  # fmt: skip
    assert "longer than the specified deadline" in str(newest()[1].error or newest()[2].popitem()[1].message)


def test_cancel_ends_a_container_and_runs_the_exit_handler(image: str, tmp_path: Path, cli: Cli) -> None:
    process = begun(tmp_path, image)
    assert cli("pipeline", "cancel", newest()[1].id).code == 0
    assert process.wait(timeout=90) == 1
    assert newest()[1].state == "cancelled"
    assert (tmp_path / "effects").read_text() == "begins\nbye Failed\n"
    assert containers() == []


def test_a_killed_driver_leaves_no_container_behind(image: str, tmp_path: Path, cli: Cli) -> None:
    process = begun(tmp_path, image)
    kill(process)
    _, record, _ = newest()
    assert record.state == "interrupted"
    process = start("resume", "-q", record.id, log=tmp_path / "log")
    (tmp_path / "go").touch()
    assert process.wait(timeout=90) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "effects").read_text() == "begins\nends\nbye Succeeded\n"
    assert containers() == []
    # The launcher is lost, too: the container is found, and its step begun again.
    (tmp_path / "go").unlink()
    (tmp_path / "effects").write_text("")
    process = begun(tmp_path, image)
    (launcher,) = psutil.Process(process.pid).children()
    os.kill(process.pid, 19)  # so that it cannot see the launcher's end
    launcher.kill()
    kill(process)
    _, record, _ = newest()
    assert len(containers()) == 1
    (tmp_path / "go").touch()
    assert cli("pipeline", "resume", "-q", record.id).code == 0
    assert (tmp_path / "effects").read_text().count("begins") == 2
    assert (tmp_path / "effects").read_text().count("bye") == 1
    assert containers() == []


def test_a_deleted_run_takes_its_containers_along(image: str, tmp_path: Path, cli: Cli) -> None:
    process = begun(tmp_path, image)
    (launcher,) = psutil.Process(process.pid).children()
    os.kill(process.pid, 19)
    launcher.kill()
    kill(process)
    assert len(containers()) == 1
    assert cli("pipeline", "delete", newest()[1].id).code == 0
    assert containers() == []


def test_on_a_schedule_steps_run_in_their_images(image: str, tmp_path: Path, cli: Cli) -> None:
    written(tmp_path, f"""
  entrypoint: main
  arguments: {{parameters: [{{name: rate, value: 1}}]}}
  templates:
  - {{name: main, container: {{image: "{image}", args: ["{{{{workflow.parameters.rate}}}}"]}}}}
""")  # fmt: skip
    (tmp_path / "nightly.yaml").write_text("pipeline: workflow.yaml\npodman: true\nparameter: {rate: 1e-7}\n")
    assert cli("schedule", "add", "nightly", tmp_path / "nightly.yaml", "--cron", "0 0 * * *").code == 0
    ran = cli("schedule", "backfill", "nightly", "--from", "2026-01-01", "--to", "2026-01-02")
    assert ran.code == 0, ran.err
    assert printed() == "from the 0.0000001\n"


def test_steps_done_before_are_those_of_the_same_image(run: Callable[..., Ran], image: str) -> None:
    text = """
  entrypoint: main
  arguments: {parameters: [{name: image, value: no-such}]}
  templates:
  - {name: main, container: {image: "{{workflow.parameters.image}}"}}
"""
    run(text, "-p", f"image={image}")
    run(text, "-p", f"image={image}", "--cached")
    _, record, nodes = newest()
    assert nodes[record.name].message == "taken from the cache"
    told = json.dumps(record.spec["options"])
    assert '"podman": true' in told
