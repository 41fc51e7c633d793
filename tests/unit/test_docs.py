"""The documentation says what the program does: nothing is left out, and its code runs.

Blocks of Python in ``docs/``: plain ones have to compile; ``python file=NAME`` is written to that file; ``python run``
is run, in a folder with ``pictures/`` and the page's files; ``python run needs=torch``, where that can be imported.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image
from tests.pages import BLOCK, DOCS, REPOSITORY, Block, blocks
from tests.services import require

import tally
from tally import errors
from tally.api import Job
from tally.cli.main import cli
from tally.client import Client
from tally.jobs.spec import JobSpec
from tally.models.package import Package
from tally.scorers.base import Scorer
from tally.scorers.scripts.options import ScriptOptions
from tally.scorers.vision.options import VisionOptions
from tally.scorers.vision.preprocess import Preprocess

PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
EXPORTS = [
    "Client",
    "Item",
    "ItemError",
    "Job",
    "Pictured",
    "Scorer",
    "TableResult",
    "TallyError",
    "jobs",
    "score",
    "training",
]

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def reference(name: str) -> str:
    return (DOCS / "reference" / f"{name}.md").read_text("utf-8")


def code_spans(text: str) -> set[str]:
    """What stands between backticks, outside of blocks."""
    return set(re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)))


def commands(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """The command and all that are below it, but for hidden ones."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                yield from commands(inner, (*words, name))
    yield words, command


COMMANDS = dict(commands(cli))


# -- nothing is left out -------------------------------------------------------------------------------


@pytest.mark.parametrize("field", list(JobSpec.model_fields))
def test_every_field_of_a_job_is_documented(field: str) -> None:
    assert f"| `{field}` |" in reference("job")


@pytest.mark.parametrize("words", list(COMMANDS), ids=" ".join)
def test_every_command_and_option_is_documented(words: tuple[str, ...]) -> None:
    text = reference("job")
    spans = " ".join(code_spans(text)) + text
    assert " ".join(("tally", *words)) in spans
    missing = [
        name
        for parameter in COMMANDS[words].params
        if isinstance(parameter, click.Option)
        for name in parameter.opts
        if not re.search(rf"`{re.escape(name)}[` ]", text)
    ]
    assert not missing


@pytest.mark.parametrize(
    ("schema", "field"),
    [
        (schema, field)
        for schema in (Package, VisionOptions, Preprocess, ScriptOptions)
        for field in schema.model_fields
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_field_of_a_package_is_documented(schema: type, field: str) -> None:
    assert field in code_spans(reference("package"))


def test_every_environment_variable_is_documented() -> None:
    source = Path(inspect.getfile(tally)).parent
    used = {
        name
        for path in source.rglob("*.py")
        for name in re.findall(r"(?:environ\.get\(|environ\[|variable\()\"(\w+)\"", path.read_text("utf-8"))
        if "testing" not in path.parts
    }
    assert "TALLY_HOME" in used
    assert used <= code_spans(reference("job"))


def test_exports_are_exact_and_documented() -> None:
    assert tally.__all__ == EXPORTS
    objects = [getattr(tally, name) for name in EXPORTS]
    assert all((each.__name__ if inspect.ismodule(each) else each.__module__).startswith("tally.") for each in objects)
    headings = " ".join(_HEADING.findall(reference("python")))
    assert [name for name in EXPORTS if f"tally.{name}" not in headings] == []


@pytest.mark.parametrize("kind", [Client, Job, Scorer], ids=lambda kind: kind.__name__)
def test_every_public_member_is_documented(kind: type) -> None:
    spans = {re.split(r"\W", span)[0] for span in code_spans(reference("python"))}
    assert {name for name in vars(kind) if not name.startswith("_")} <= spans


def test_every_error_is_documented_in_its_place() -> None:
    found = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.TallyError)
    }
    text = reference("errors")
    for name, value in found.items():
        assert f"| `{name}` |" in text
        builtin = [base.__name__ for base in value.__bases__ if base.__module__ == "builtins" and base is not Exception]
        shown = f"{name} ({builtin[0]})" if builtin else name
        assert re.search(rf"^[│├└─ ]*{re.escape(shown)}$", text, re.MULTILINE), f"{shown} is not in the tree"
    assert set(re.findall(r"\b\w+Error\b", text.partition("```")[2].partition("```")[0])) >= set(found)


# -- what is there is right ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.commands], ids=str)
def test_commands_exist_with_their_options(block: Block) -> None:
    for _, *words in (shlex.split(command, comments=True) for command in block.commands):
        command: click.Command = cli
        while isinstance(command, click.Group):
            flags = next((place for place, word in enumerate(words) if not word.startswith("-")), len(words))
            assert set(words[:flags]) <= {name for each in command.params for name in each.opts}
            if flags == len(words):
                break
            inner = command.get_command(click.Context(command), words[flags])
            assert inner is not None, f"there is no command {words[flags]}"
            command, words = inner, words[flags + 1 :]
        else:
            command.make_context("tally", words)  # raises for options that are not there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(BLOCK.sub("", page.read_text("utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path) if path else page
        assert place.exists(), target
        if anchor:
            anchors = {
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                for heading in _HEADING.findall(BLOCK.sub("", place.read_text("utf-8")))
            }
            assert anchor in anchors, target


def test_every_page_is_in_the_list_of_pages() -> None:
    """docs/conf.py makes the site's contents of these lists; links to folders lead nowhere there."""
    listed = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in (DOCS / "index.md", DOCS / "decisions" / "README.md")
        for target in _LINK.findall(page.read_text("utf-8"))
    }
    assert {page for page in DOCS.rglob("*.md") if page != DOCS / "index.md"} - listed == set()
    folders = [each for each in _LINK.findall("".join(page.read_text("utf-8") for page in PAGES)) if each.endswith("/")]
    assert [each for each in folders if "://" not in each] == []


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles(block: Block) -> None:
    assert re.fullmatch(r"|file=\w+\.py|run( needs=[\w,]+)?", block.mark), f"what is {block.mark!r}?"
    ast.parse(block.text, str(block))


@pytest.mark.parametrize(
    "page", sorted({block.page for block in PYTHON if block.mark.startswith("run")}), ids=lambda p: p.stem
)
def test_programs_run(page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    (folder / "pictures").mkdir(parents=True)
    random = np.random.default_rng(3)
    for number in range(4):
        Image.fromarray(random.integers(0, 256, (80, 96, 3), np.uint8)).save(folder / f"pictures/{number}.jpg")
    for block in PYTHON:
        if block.page != page:
            continue
        if block.mark.startswith("file="):
            (folder / block.mark.removeprefix("file=")).write_text(block.text, "utf-8")
        elif block.mark.startswith("run"):
            needed = block.mark.partition("needs=")[2].split(",")
            missing = [name for name in needed if name and find_spec(name) is None]
            require(f"{block} needs {', '.join(missing)}: make .venv/test-torch.stamp", not missing)
            program = folder / "program.py"
            program.write_text(block.text, "utf-8")
            done = subprocess.run(
                [sys.executable, str(program)],
                cwd=folder,
                env={**os.environ, "TALLY_HOME": str(tmp_path / "home")},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, f"{block}\n{done.stderr}"
