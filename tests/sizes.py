"""Items of which a scorer gives no row, one or two: what is to come out, however it is sent on."""

from __future__ import annotations

from pathlib import Path

SCORER = """
import tally


class Sizes(tally.Scorer):
    input = "bytes"
    columns = {"size": "int64", "part": "float64"}

    def score(self, batch):
        return [[{"size": len(each), "part": len(each) / 2 + n} for n in range(len(each) % 3)] for each in batch]
"""


def write_items(folder: Path, count: int) -> Path:
    """A folder of items in a folder, with the scorer beside it, ``sizes.py``. Of each three items, one gives no row,
    one gives one, one gives two."""
    items = folder / "items"
    items.mkdir()
    for number in range(count):
        (items / f"i{number:03}.jpg").write_bytes(b"x" * (number + 1))
    (folder / "sizes.py").write_text(SCORER)
    return items


def rows_of(number: int) -> list[tuple[int, float]]:
    """Size and part of each row of an item."""
    return [(number + 1, (number + 1) / 2 + n) for n in range((number + 1) % 3)]
