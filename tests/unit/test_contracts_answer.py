"""Nobody outside a package asks which implementation of its contract it has: the contract answers."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import tally

ROOT = Path(tally.__file__).parent
CONTRACTS = {"Store": "storage", "Source": "sources", "Sink": "sinks", "Writer": "sinks", "Engine": "engines"}
"""Each contract, and the package in which it and its implementations are."""


@cache
def trees() -> dict[Path, ast.Module]:
    return {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def named(node: ast.AST) -> set[str]:
    """The last names of what an expression names: of a class, several of them, or ``module.Class``."""
    return {
        each.id if isinstance(each, ast.Name) else each.attr
        for each in ast.walk(node)
        if isinstance(each, (ast.Name, ast.Attribute))
    }


def implementations(modules: dict[Path, ast.Module], contract: str, package: str) -> set[str]:
    """The classes of the package that implement a contract, directly or not."""
    classes = [
        (node.name, {name for base in node.bases for name in named(base)})
        for path, tree in modules.items()
        if path.parts[0] == package
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    found: set[str] = set()
    while more := {name for name, bases in classes if bases & {contract, *found}} - found:
        found |= more
    return found


def asked(tree: ast.Module) -> list[tuple[int, set[str]]]:
    """Line, and the classes that are asked for there: by isinstance, issubclass, or a comparison of types."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, classes]):
                found.append((node.lineno, named(classes)))
            case ast.Compare(left=ast.Call(func=ast.Name(id="type")), comparators=[classes]):
                found.append((node.lineno, named(classes)))
            case ast.match_case(pattern=ast.MatchClass(cls=classes)):
                found.append((classes.lineno, named(classes)))
    return found


@pytest.mark.parametrize(("contract", "package"), CONTRACTS.items())
def test_no_module_outside_a_package_asks_for_its_implementations(contract: str, package: str) -> None:
    modules = trees()
    classes = implementations(modules, contract, package)
    assert len(classes) >= 2
    assert [
        f"{path}:{line}: {', '.join(sorted(names & classes))}"
        for path, tree in modules.items()
        if path.parts[0] != package
        for line, names in asked(tree)
        if names & classes
    ] == []


def test_the_ways_to_ask_are_seen() -> None:
    source = (
        "isinstance(x, (A, b.B)); type(x) is C\nmatch x:\n    case D(): pass\nissubclass(x, E)\nisinstance(x, F | G)"
    )
    assert set().union(*(names for _, names in asked(ast.parse(source)))) >= {"A", "B", "C", "D", "E", "F", "G"}


def test_the_table_of_sources_says_what_the_classes_accept() -> None:
    from tally.sources.archives.source import ArchiveSource
    from tally.sources.factory import BUILT_IN
    from tally.sources.files import FileSource
    from tally.sources.tables.pictures import PictureColumnSource
    from tally.sources.tables.source import TableSource
    from tally.sources.video import VideoSource

    kinds = (FileSource, VideoSource, TableSource, PictureColumnSource, ArchiveSource)
    assert [(line.media, line.accepts) for line in BUILT_IN] == [
        (kind.media or "image", kind.accepts) for kind in kinds
    ]
