"""The size of batches follows what a row costs in each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from tally.serving.pace import Pace


def sizes(pace: Pace, seconds: Callable[[int], float], batches: int, *, waiting: int = 1000) -> Counter[int]:
    """The sizes of so many batches, each taking ``seconds(rows)``; ``waiting`` rows are there each time."""
    found: Counter[int] = Counter()
    for _ in range(batches):
        rows = min(pace.rows, waiting)
        found[rows] += 1
        pace.took(rows, seconds(rows))
    return found


@pytest.mark.parametrize("best", [1, 2, 4, 8, 16, 32, 50])
def test_the_size_at_which_a_row_costs_least_is_found_and_kept(best: int) -> None:
    pace = Pace(50)
    sizes(pace, lambda rows: rows * (1 + 0.1 * abs(rows - best) / best), 300)
    later = sizes(pace, lambda rows: rows * (1 + 0.1 * abs(rows - best) / best), 2000)
    assert later[best] > 1980


def test_what_has_a_fixed_part_is_scored_in_full_batches() -> None:
    assert sizes(Pace(16), lambda rows: 0.005 + 0.001 * rows, 2000)[16] > 1970


def test_a_change_is_followed() -> None:
    pace = Pace(16)
    sizes(pace, lambda rows: rows**1.2, 300)
    assert pace.rows == 1
    sizes(pace, lambda rows: 1 + 0.01 * rows, 3000)
    assert pace.rows == 16


def test_a_size_that_is_never_filled_is_not_waited_for() -> None:
    pace = Pace(64)
    sizes(pace, lambda rows: 1.0, 300)  # 64
    found = sizes(pace, lambda rows: rows, 5000, waiting=3)
    assert found == {3: 5000}
    assert sizes(pace, lambda rows: 1.0, 100)[64] > 80
