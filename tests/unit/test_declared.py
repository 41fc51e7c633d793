"""What a scorer declares is checked before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tally.errors import ModelLoadError
from tally.models.load import create
from tally.models.resolve import resolve
from tally.scorers.run import configured

SCORER = """
from tally import Scorer

class Mine(Scorer):
    {}
    def score(self, batch):
        return []
"""


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('input = "rows"', "input should be one of image, bytes, path, frame, table, not 'rows'"),
        ('output = "images"', "output should be rows or image, not 'images'"),
        ("batch_size = 0", "batch_size should be a whole number of at least 1, not 0"),
        ("batch_size = True", "batch_size should be a whole number of at least 1, not True"),
        ('size = "640"', "size should be (width, height) in pixels, or None, not '640'"),
        ("size = (640, 0)", "size should be (width, height) in pixels, or None, not (640, 0)"),
        ('columns = ["x"]', "columns should map each column's name to its type"),
        ("features = 1.5", "features should be column names, how many there are, or None, not 1.5"),
        ('by = "id"', "by should be column names, not 'id'"),
        ("window = 5", "window should be a Window, or None, not 5"),
    ],
)
def test_what_no_scorer_may_declare_is_refused(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SCORER.format(line))
    with pytest.raises(ModelLoadError) as refused:
        configured(create(resolve(file)))
    assert refused.value.message.startswith(f"Mine: {told}")
    assert "class attributes" in str(refused.value.hint)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SCORER.format('input, output, batch_size = "rows", "row", 1.5'))
    with pytest.raises(ModelLoadError, match=r"input should.*; output should.*; batch_size should"):
        configured(create(resolve(file)))


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("size", [640, 480]), ("features", ["a", "b"]), ("features", 3), ("by", ["id"]), ("columns", {"x": "float32"})],
)
def test_what_a_scorer_may_declare_stays_as_it_is(tmp_path: Path, attribute: str, value: Any) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SCORER.format(f"{attribute} = {value!r}"))
    assert getattr(configured(create(resolve(file))), attribute) == value
