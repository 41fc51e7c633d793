"""The layout: what stands on a line may use what stands below it, never the other way, and nothing goes in circles.

Imports inside functions count too; those under ``TYPE_CHECKING`` do not, as nothing runs by them.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tally

ROOT = Path(tally.__file__).parent

LAYERS = (
    ("__main__", "__init__", "cli", "client", "server", "api", "terminal"),
    ("deploy", "notebooks"),
    ("triggers",),
    ("serving",),
    ("training", "pipelines"),
    ("jobs",),
    ("push",),
    ("alerts", "health"),
    ("sinks", "sources", "engines"),
    ("scorers",),
    ("models",),
    ("media",),
    ("database",),
    ("storage",),
    (
        "arrays",
        "config",
        "demo",
        "errors",
        "extensions",
        "garbage",
        "kubernetes",
        "logs",
        "masking",
        "network",
        "optional",
        "plain_yaml",
        "processes",
        "sql",
        "text",
        "version",
    ),
)
"""From the top to the bottom, as ``docs/discussion/map.md`` draws them."""

RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

EXCEPTIONS = {
    # The package's own face, imported when an attribute of it is first used.
    ("tally.jobs", "tally.api"),
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in ROOT.rglob("*.py") if "migrations" not in path.parts}


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports when it runs."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for each in node.orelse:
                yield from walk(each)
            return
        yield node
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    for node in walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tally":
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


GRAPH = {name: sorted(set(imported(path)) - {name, "tally"}) for name, path in MODULES.items()}


def part(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def test_the_layers_are_those_that_there_are() -> None:
    there = {part(module) for module in MODULES} - {"testing"}
    assert there <= set(RANK)
    assert "tally.jobs.coordinator" in GRAPH["tally.jobs.run"], "imports are read"


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) != "testing"])
def test_nothing_imports_what_stands_above_it(module: str) -> None:
    above = [
        each
        for each in GRAPH[module]
        if (part(each) == "testing" or RANK[part(each)] < RANK[part(module)]) and (module, each) not in EXCEPTIONS
    ]
    assert above == []


def test_nothing_goes_in_circles() -> None:
    found: list[str] = []
    state: dict[str, int] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if state.get(module) == 1:
            found.append(" -> ".join((*trail[trail.index(module) :], module)))
            return
        if state.get(module) == 2:
            return
        state[module] = 1
        for each in GRAPH[module]:
            if (module, each) not in EXCEPTIONS:
                visit(each, (*trail, module))
        state[module] = 2

    for module in GRAPH:
        visit(module, ())
    assert found == []


def test_commands_import_what_is_heavy_only_when_it_is_used() -> None:
    """What takes long to import would be waited for by every command."""
    program = "import sys, tally.jobs.facade; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    heavy = {
        "alembic",
        "av",
        "cloudpickle",
        "duckdb",
        "numpy",
        "onnxruntime",
        "pandas",
        "PIL",
        "pyarrow",
        "ray",
        "rich",
    }
    assert loaded & heavy == set()
