"""How much the tests do."""

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

FULL = bool(os.environ.get("TALLY_TEST_FULL"))
"""Storms as long as was promised, and every video: more than there is time for after each change."""


def first(count: int, variants: Sequence[T]) -> Sequence[T]:
    """All variants of a test that takes long, or so many of them: each of the others goes the same way."""
    return variants if FULL else variants[:count]
