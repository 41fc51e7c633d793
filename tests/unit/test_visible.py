"""No name controls a terminal: whatever a command prints, it shows what is in a name."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from tally.cli.main import cli as tally_command
from tally.text import visible

HOSTILE = "p\x1b]0;owned\x07\x1b[31m\u202egpj\u2066\r\x9b2J\n0\tx"
Cli = Callable[..., Any]


def commands(group: click.Group, *above: str) -> Iterator[tuple[str, ...]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, *above, name)
        else:
            yield (*above, name)


def controls(text: str) -> set[str]:
    """What is in the text that a terminal would obey, but for ends of lines and what the program itself may print."""
    return {each for each in text if unicodedata.category(each) in ("Cc", "Cf", "Zl", "Zp") and each not in "\n\t"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("caf\u00e9 \u2603 \u65e5\u672c\u3000\u8a9e \U0001f468\u200d\U0001f469 a\u00a0b", None),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb", "a\\nb"),
        ("a\u202eb", "a\\u202eb"),
        ("a\u2028b", "a\\u2028b"),
        ("\udcff", "\\udcff"),
        ("\x9b", "\\x9b"),
    ],
)
def test_what_controls_is_written_as_an_escape(text: str, shown: str | None) -> None:
    assert visible(text) == (text if shown is None else shown)
    assert visible("a\nb\x1b", lines=True) == "a\nb\\x1b"


ALL = [each for each in commands(tally_command) if each[0] not in ("up", "coordinate")]


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_a_hostile_argument_is_shown(command: tuple[str, ...], cli: Cli, empty_folder: None) -> None:
    for arguments in ([HOSTILE], [HOSTILE] * 2, [HOSTILE] * 3, [HOSTILE, "--model", HOSTILE, "--out", HOSTILE + "/o"]):
        ran = cli(*command, *arguments)
        assert controls(ran.out + ran.err) == set(), (command, arguments)


def test_names_of_a_job_are_shown(cli: Cli, tmp_path: Path) -> None:
    """Files, folders, models and errors, in each command that tells of the job."""
    source, out = tmp_path / HOSTILE, tmp_path / f"out{HOSTILE}"
    source.mkdir()
    for number in range(3):
        (source / f"{number}{HOSTILE}.txt").write_bytes(b"x" * (number + 1))
    model = tmp_path / f"m{HOSTILE}.py"
    model.write_text(
        "import tally\n\n\nclass Length(tally.Scorer):\n    input = 'bytes'\n\n    def score(self, batch):\n"
        f"        return [{{'n': len(each)}} if len(each) > 1 else ValueError({HOSTILE!r}) for each in batch]\n"
    )
    job = tmp_path / "job.yaml"
    job.write_text(
        json.dumps(
            {"source": f"{source}/*", "model": str(model), "out": str(out) + "/{interval_start:%H}", "workers": 1}
        )
    )
    ran = [
        cli("score", f"{source}/*", "--model", model, "--out", out, "--workers", 1),
        cli("schedule", "add", "hourly", job, "--cron", "0 * * * *"),
        cli("schedule", "show", "hourly"),
        cli("schedule", "list"),
        cli("jobs", "list"),
        cli("jobs", "show", out),
        cli("jobs", "dead", out),
        cli("jobs", "watch", out),
        cli("jobs", "retry", out, "--dead"),
        cli("jobs", "resume", out),
        cli("models", "add", "m", model),
        cli("models", "show", "m"),
        cli("query", out, "SELECT nothing"),
        cli("score", f"{source}/*", "--model", model, "--out", out),
        cli("doctor", out),
        cli("jobs", "delete", out, "--yes"),
    ]
    for number, each in enumerate(ran):
        assert controls(each.out + each.err) == set(), (number, each)
    assert ran[0].code == 0, ran[0].err
    for number in (5, 6, 13):
        assert "\\x1b[31m\\u202egpj" in ran[number].out + ran[number].err, ran[number]
    assert "\\n0" in ran[6].out


@pytest.mark.parametrize("command", [("jobs", "list"), ("schedule", "list"), ("models", "list")], ids=" ".join)
def test_json_stays_json(command: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / HOSTILE
    source.mkdir()
    (source / "a.txt").write_bytes(b"x")
    (tmp_path / "m.py").write_text(
        "import tally\n\n\nclass M(tally.Scorer):\n    input = 'bytes'\n\n    def score(self, batch):\n"
        "        return [{'n': 1}] * len(batch)\n"
    )
    if command[0] == "jobs":
        assert cli("score", f"{source}/*", "-m", tmp_path / "m.py", "-o", tmp_path / "out").code == 0
        (shown,) = (json.loads(line) for line in cli(*command, "--json").out.splitlines())
        assert shown["spec"]["source"] == [f"{source}/*"]
    for line in cli(*command, "--json").out.splitlines():
        json.loads(line)
