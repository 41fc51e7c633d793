"""The command line as its users meet it: help, mistakes, and what each command prints."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tally.cli.main import COMMANDS

SCORER = """
import tally


class Length(tally.Scorer):
    input = "bytes"
    batch_size = 4

    def score(self, batch):
        return [{"bytes": len(data), "even": len(data) % 2 == 0} for data in batch]
"""

HEAVY = [
    "sqlalchemy",
    "pyarrow",
    "onnxruntime",
    "numpy",
    "pydantic",
    "PIL",
    "duckdb",
    "rich",
    "yaml",
    "tally.jobs.store",
]

Cli = Callable[..., Any]


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def put(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:02}.bin").write_bytes(b"x" * number)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a scorer, items, a state folder, and a finished job with one dead item in ``out/``."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "length.py").write_text(SCORER)
    put(folder / "items", 10)
    (folder / "items" / "gone.bin").symlink_to("nowhere")
    done = python(
        *("-m", "tally", "score", folder / "items", "--model", folder / "length.py", "--out", folder / "out"),
        *("--workers", 1, "--price-per-hour", 3.6),
        TALLY_HOME=str(folder / "home"),
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def out(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TALLY_HOME", str(world / "home"))
    return world / "out"


# ------------------------------------------------------------------------------------------------ help


def test_help_lists_every_command(cli: Cli) -> None:
    ran = cli("--help")
    assert ran.code == 0
    for name, (_, text) in COMMANDS.items():
        if name != "coordinate":
            assert f"\n  {name} " in ran.out
            assert text in ran.out
    assert cli("-h").out == ran.out


@pytest.mark.parametrize(
    "command",
    [
        *COMMANDS,
        *(f"jobs {name}" for name in ["list", "show", "watch", "pause", "resume", "cancel", "retry", "dead", "delete"]),
        *(f"models {name}" for name in ["add", "list", "show", "alias", "rollback", "verify", "remove"]),
        *("new scorer", "new package"),
    ],
)
def test_every_command_has_help(cli: Cli, command: str) -> None:
    ran = cli(*command.split(), "--help")
    assert ran.code == 0
    assert ran.out.startswith("Usage: ")
    assert f" {command} " in ran.out
    assert "Options:" in ran.out
    if "Commands:" in ran.out:  # no line that is cut off
        assert "..." not in ran.out.partition("Commands:")[2]


def test_groups_name_their_commands(cli: Cli) -> None:
    ran = cli("jobs", "--help")
    for name in ["list", "show", "watch", "pause", "resume", "cancel", "retry", "dead", "delete"]:
        assert f"\n  {name} " in ran.out


def test_version(cli: Cli) -> None:
    assert cli("--version").out.startswith("tally 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scor"], "no command 'scor'; did you mean 'score'?"),
        (["nonsense"], "no command 'nonsense'"),
        (["jobs", "shwo"], "Did you mean 'show'?"),
        (["score", "x", "--modle", "y"], "'--model'"),
        (["score", "x", "--model", "y"], "Missing option '-o' / '--out'"),
        (["score", "x", "--model", "y", "--out", "z", "--batch-size", "two"], "'two' is not a valid integer"),
        (["jobs", "retry", "x"], "Missing option '--dead'"),
        (["queue", "depth", "http://[::1"], "is no queue"),
        (["queue", "depth", "amqp://h:abc/q"], "is no URL of a queue: Port could not be cast"),
        (["jobs", "list", "-n", "0"], "0 is not in the range 1<=x<=1000000000"),
    ],
)
def test_mistyped_words(cli: Cli, words: list[str], message: str) -> None:
    ran = cli(*words)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


# -------------------------------------------------------------------------------------------- start-up


@pytest.mark.parametrize("statement", ["import tally", "from tally.cli.main import main; main()"])
def test_nothing_heavy_is_imported_before_it_is_needed(statement: str) -> None:
    code = f"""
import sys
sys.argv = ["tally", "--help"]
try:
    {statement}
except SystemExit as ended:
    assert not ended.code
print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "[]\n")


@pytest.mark.parametrize("tool", [["cProfile", "-o", "{}"], ["trace", "--trackcalls", "--file={}", "--coverdir=."]])
def test_what_runs_the_command_has_its_say_when_that_has_ended(tmp_path: Path, tool: list[str]) -> None:
    found = tmp_path / "found"
    words = [word.format(found) for word in tool]
    module = "-m" if tool[0] == "cProfile" else "--module"
    ran = subprocess.run(
        [sys.executable, "-m", *words, module, "tally", "--version"],
        cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.stdout.startswith("tally "), ran.stderr
    assert found.stat().st_size > 0


def test_module_and_completion() -> None:
    done = python("-m", "tally", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    script = Path(sys.executable).with_name("tally")
    if not script.exists():
        pytest.skip("the command is not installed beside this Python")
    done = subprocess.run(
        [script], env={**os.environ, "_TALLY_COMPLETE": "bash_source"}, capture_output=True, text=True, check=True
    )
    assert "_TALLY_COMPLETE=bash_complete" in done.stdout


# ---------------------------------------------------------------------------------------- a job's facts


def test_show_tells_stages_and_cost(cli: Cli, out: Path) -> None:
    ran = cli("jobs", "show", out)
    assert ran.code == 0
    facts = {line[:13].strip(): line[13:] for line in ran.out.splitlines()}
    assert facts["state"] == "finished"
    assert facts["done"].startswith("11/11 (100%); 1 failed, 10 rows")
    stages = facts["stages"].replace(",", "").split()
    assert stages[:11:3] == ["read", "decode", "score", "write"]
    assert all(float(seconds) >= 0 for seconds in stages[1:11:3])
    seconds = json.loads(cli("jobs", "show", out, "--json").out)["usage"]["seconds"]
    cost, each = facts["cost"].split(" at 3.6 per hour, ")
    assert float(cost) == pytest.approx(seconds * 3.6 / 3600, abs=1e-4)
    assert each.endswith("per thousand items")
    assert facts["model"].startswith("length (python), sha256:")


def test_a_job_is_found_by_id_beginning_and_place(cli: Cli, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads(cli("jobs", "show", out, "--json").out)
    monkeypatch.chdir(out.parent)
    for name in (record["id"], record["id"][:5], "out", "out/", "./out"):
        assert json.loads(cli("jobs", "show", name, "--json").out)["id"] == record["id"]
    ran = cli("jobs", "show", "zzz")
    assert (ran.code, ran.out, ran.err) == (
        1,
        "",
        "error: no job 'zzz'\n  'tally jobs list' shows the jobs there are.\n",
    )


def test_json_outputs_parse(cli: Cli, out: Path) -> None:
    [job] = [json.loads(line) for line in cli("jobs", "list", "--json").out.splitlines()]
    assert (job["state"], job["items"], job["done"], job["dead"]) == ("finished", 11, 11, 1)
    [dead] = [json.loads(line) for line in cli("jobs", "dead", out, "--json").out.splitlines()]
    assert (dead["key"], dead["stage"]) == ("gone.bin", "read")
    rows = [json.loads(line) for line in cli("query", out, "select * from results", "--json").out.splitlines()]
    assert {row["key"]: row["bytes"] for row in rows} == {f"{number:02}.bin": number for number in range(10)}
    manifest = json.loads((out / "_manifest.json").read_text())
    assert (manifest["job"], manifest["items"], manifest["dead"]) == (job["id"], 11, 1)


def test_list_and_dead_for_people(cli: Cli, out: Path) -> None:
    head, line = cli("jobs", "list").out.splitlines()
    assert head.split() == ["JOB", "STATE", "DONE", "DEAD", "MODEL", "OUT", "CREATED"]
    assert line.split()[1:6] == ["finished", "11/11", "(100%)", "1", "length"]
    key, stage, error = cli("jobs", "dead", out).out.rstrip("\n").split("\t")
    assert (key, stage) == ("gone.bin", "read")
    assert "no such file" in error
    ran = cli("jobs", "watch", out)
    assert (ran.code, ran.out) == (0, "finished: 11/11 (100%), 1 failed\n")


def test_no_jobs_yet(cli: Cli) -> None:
    ran = cli("jobs", "list")
    assert (ran.code, ran.out) == (0, "")
    assert "tally score SOURCE --model MODEL --out OUT" in ran.err


def test_query_answers_in_csv_and_explains_errors(cli: Cli, out: Path) -> None:
    ran = cli("query", out, "select even, count(*) as n, sum(bytes) as s from results group by 1 order by 1")
    assert ran.code == 0
    assert list(csv.reader(io.StringIO(ran.out))) == [["even", "n", "s"], ["false", "5", "25"], ["true", "5", "20"]]
    assert "gone.bin" in cli("query", out, "select key from dead").out
    for sql, words in [
        ("selec 1", "selec"),
        ("select colour from results", "colour"),
        ("select * from photos", "photos"),
    ]:
        ran = cli("query", out, sql)
        assert ran.code == 2
        assert ran.err.startswith("error: the query cannot be answered: ")
        assert words in ran.err
        assert "There are results(key, bytes, even) and dead(key, stage, error)." in ran.err
    for sql, words in [
        ("", "no statement"),
        ("drop view results", "can only be read"),
        ("select 1; select 2", "2 stat"),
    ]:
        ran = cli("query", out, sql)
        assert ran.code == 2
        assert words in ran.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["jobs", "pause", "out"], "is not running: it is finished\n"),
        (["jobs", "cancel", "out"], "is finished: there is nothing to cancel\n"),
        (["jobs", "resume", "out"], "is finished\n  See it with: tally jobs show"),
    ],
)
def test_a_finished_job_refuses(
    cli: Cli, out: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(out.parent)
    ran = cli(*words)
    assert ran.code == 1
    assert message in ran.err


# -------------------------------------------------------------------------------------------- job files


def test_a_job_file_runs_with_paths_relative_to_it(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "nightly"
    place.mkdir()
    put(place / "items", 3)
    (place / "length.py").write_text(SCORER)
    (place / "job.yaml").write_text("source: items\nmodel: length.py\nout: results/lengths.csv\nworkers: 1\n")
    monkeypatch.chdir(tmp_path)
    ran = cli("run", "nightly/job.yaml")
    assert ran.code == 0, ran.err
    assert "3 of 3 items scored" in ran.err
    rows = list(csv.DictReader(io.StringIO((place / "results" / "lengths.csv").read_text())))
    assert [row["bytes"] for row in rows] == ["0", "1", "2"]
    ran = cli("run", "nightly/job.yaml")
    assert ran.code == 1
    assert "--overwrite" in ran.err


def test_all_problems_of_a_job_file_are_told_together(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("sorce: items\nmodel: m.onnx\ntask: clasify\nworkers: 0\nmemory: lots\ndevice: gpu\n")
    ran = cli("run", file)
    assert (ran.code, ran.out) == (2, "")
    for words in (
        "sorce",
        "did you mean 'source'?",
        "no output (out) is given",
        "task: ",
        "'clasify'",
        "workers: ",
        "memory: ",
    ):
        assert words in ran.err
    assert "device: should be auto, cpu, cuda, cuda:N, tensorrt or tensorrt:N (given: 'gpu')" in ran.err
    assert "docs/reference/job.md" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the job file"),
        (b"source: [a, b", "is not valid YAML"),
        (b"- just\n- a list\n", "must hold fields such as source, model and out, not list"),
        (b"source: \xff\xfe", "is not UTF-8 text"),
    ],
)
def test_job_files_that_are_none(cli: Cli, tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "job.yaml"
    if content is not None:
        file.write_bytes(content)
    ran = cli("run", file)
    assert ran.code in (1, 2)
    assert message in ran.err
    assert str(file) in ran.err


def test_all_problems_of_flags_are_told_together(cli: Cli, tmp_path: Path) -> None:
    ran = cli("score", tmp_path, "--model", "m.onnx", "--out", "o", "-t", "sort", "-w", 0, "--max-dead", "200%")
    assert ran.code == 2
    assert ran.err.count("\n- ") == 2
    for words in ("task: ", "'sort'", "workers: ", "(given: '0')", "max_dead: ", "(given: 2.0)"):
        assert words in ran.err
