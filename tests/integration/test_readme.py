"""What the README and the documentation say holds: the program runs, the commands parse, the links lead somewhere."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from tally.cli.main import cli

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks in one of the languages (``""``: without one)."""
    return [body for _, language, body in FENCE.findall(page.read_text("utf-8")) if language in languages]


def test_the_program_of_the_readme_runs(tmp_path: Path) -> None:
    [program] = blocks(README, "python")
    (tmp_path / "measure.py").write_text(program)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for brightness in (20, 70, 130, 180, 240):
        Image.fromarray(np.full((40, 60, 3), brightness, np.uint8)).save(pictures / f"grey-{brightness}.png")
    (pictures / "broken.png").write_bytes(b"\x89PNG cut short")

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "measure.py"],
            cwd=tmp_path,
            env={**os.environ, "TALLY_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert "broken.png" not in done.stdout
    shown = [done.stdout.find(f"grey-{brightness}.png") for brightness in (240, 180, 130)]
    assert -1 not in shown
    assert shown == sorted(shown)
    assert "grey-70.png" not in done.stdout
    assert "240" in done.stdout
    out = tmp_path / "measured"
    assert {"_manifest.json", "_SUCCESS"} <= {path.name for path in out.iterdir()}
    assert list(out.glob("*.parquet"))

    done = run()  # never silently done again
    assert done.returncode == 1
    assert "did exactly this and finished" in done.stderr
    assert "--overwrite" in done.stderr


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    """The names that a page's headings can be linked by."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(prose(page))}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name: str) -> None:
    page = REPOSITORY / name
    lost = []
    for target in LINK.findall(prose(page)):
        place, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", place):
            continue
        file = (page.parent / place).resolve() if place else page
        if (
            not file.exists()
            or not file.is_relative_to(REPOSITORY)
            or (anchor and file.suffix == ".md" and anchor not in anchors(file))
        ):
            lost.append(target)
    assert not lost


def commands(page: Path) -> Iterator[list[str]]:
    """The ``tally`` commands of a page's blocks, as words."""
    for block in blocks(page, "", "sh", "bash", "shell", "console"):
        lines = iter(block.replace("\\\n", " ").splitlines())
        for line in lines:
            command = line.strip().removeprefix("$ ")
            if not command.startswith("tally "):
                continue
            while command.count('"') % 2:  # SQL in quotes goes on
                command += "\n" + next(lines)
            lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split = True
            words = list(lexer)
            for end in ("|", "&&", ";", ">", "<", "&"):
                if end in words:
                    words = words[: words.index(end)]
            yield words[1:]


def parse(command: click.Command, name: str, words: list[str], parent: click.Context | None = None) -> None:
    """Raises click.UsageError where the command line would be refused."""
    try:
        context = command.make_context(name, list(words), parent=parent)
    except click.exceptions.Exit:  # --help, --version
        return
    if isinstance(command, click.Group):
        # What the group has not taken is its command and that one's words.
        rest = [*getattr(context, "_protected_args", []), *context.args]
        chosen, found, rest = command.resolve_command(context, rest)
        assert found is not None
        parse(found, str(chosen), rest, context)


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name: str) -> None:
    wrong = []
    for words in commands(REPOSITORY / name):
        try:
            parse(cli, "tally", words)
        except click.UsageError as error:
            wrong.append((" ".join(words), error.format_message()))
    assert not wrong


def test_the_check_of_commands_finds_mistakes() -> None:
    assert sum(1 for _ in commands(README)) >= 3
    for words in (["scor"], ["score", "x", "--model", "m", "--out", "o", "--wrong"], ["jobs", "shwo"], ["score", "x"]):
        with pytest.raises(click.UsageError):
            parse(cli, "tally", words)


@pytest.mark.parametrize("name", NAMES)
def test_python_in_the_pages_is_python(name: str) -> None:
    for program in blocks(REPOSITORY / name, "python"):
        ast.parse(program)
