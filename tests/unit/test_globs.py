"""Globs: what they match, and that no name takes them long."""

from __future__ import annotations

import pytest

from tally.sources.locations import compile_glob


@pytest.mark.parametrize(
    ("pattern", "names", "others"),
    [
        ("*.jpg", ["a.jpg", "a.b.jpg"], ["d/a.jpg", ".jpg", "a.jpgx"]),
        ("a*b*c", ["abc", "axbxbc", "abcbc"], ["acb", "abcd", "a/bc"]),
        ("a**c", ["ac", "abc"], ["a/c"]),
        ("?[!a]*[0-9]", ["xb1", "xbaa9"], ["xa1", "xb", "/b1"]),
        ("**/*.jpg", ["a.jpg", "d/a.jpg", "d/e/a.jpg"], [".d/a.jpg", "d/.a.jpg"]),
        ("**/b/**/*.jpg", ["b/a.jpg", "c/b/a.jpg", "b/b/c/a.jpg"], ["c/a.jpg", "b", "b/.c/a.jpg"]),
        ("d/**", ["d/a", "d/e/a"], ["d", "d/.a", "a"]),
        ("**/**/a", ["a", "b/a", "b/c/a"], ["b/ba"]),
        ("**/.git/*", [".git/a", "b/.git/a"], ["git/a", ".git/.a"]),
    ],
)
def test_what_a_glob_matches(pattern: str, names: list[str], others: list[str]) -> None:
    match = compile_glob(pattern).fullmatch
    assert [each for each in names if not match(each)] == []
    assert [each for each in others if match(each)] == []


@pytest.mark.parametrize(
    ("pattern", "name"),
    [("*a" * 12 + "b", "a" * 1000), ("**/a/" * 8 + "b", "a/" * 500 + "c"), ("*" * 50 + "b", "a" * 1000)],
)
def test_no_name_takes_long(pattern: str, name: str) -> None:
    """A thread of the server looks at names that others choose: it would stop all of it."""
    assert compile_glob(pattern).fullmatch(name) is None  # trying each way would take longer than the universe has
