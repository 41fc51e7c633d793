"""Suggestions for words that were mistyped."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like ``word``, if any is close."""
    return next(iter(get_close_matches(word, list(known), n=1)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` to end a message with, or nothing."""
    found = closest(word, known)
    return f"; did you mean {found!r}?" if found is not None else ""
