"""Labels that are found together are drawn side by side, always in the same way."""

from __future__ import annotations

import duckdb
import pytest

pytest.importorskip("fastapi")

from tally.server.api.views import Rows
from tally.server.pages.labels import HEIGHT, WIDTH, Label, Pair, _counted, draw

ITEMS = {"person": 50, "car": 30, "dog": 9, "leash": 8, "a label that is much longer than others": 1}
PAIRS = [Pair("dog", "leash", 8), Pair("car", "person", 20), Pair("car", "dog", 1), Pair("car", "left out", 90)]


def test_labels_that_are_found_together_are_neighbours() -> None:
    graph = draw(ITEMS, PAIRS)
    assert [node.label for node in graph.nodes][:4] == ["person", "car", "dog", "leash"]
    assert [(edge.pair.one, edge.pair.other) for edge in graph.edges] == [
        ("car", "dog"), ("dog", "leash"), ("car", "person"),
    ]  # fmt: skip
    widths = [edge.width for edge in graph.edges]
    assert widths == sorted(widths)


def test_the_drawing_stays_within_its_bounds_and_is_always_the_same() -> None:
    graph = draw(ITEMS, PAIRS)
    assert graph == draw(dict(ITEMS), list(PAIRS))
    for node in graph.nodes:
        assert node.radius <= node.x <= WIDTH - node.radius
        assert node.radius <= node.y <= HEIGHT - node.radius
        assert 0 <= node.text_x <= WIDTH
        assert 15 <= node.text_y <= HEIGHT
        assert len(node.text) <= 20


@pytest.mark.parametrize("count", [1, 2, 12])
def test_any_number_of_labels(count: int) -> None:
    graph = draw({str(number): 1 for number in range(count)}, [])
    assert len({(node.x, node.y) for node in graph.nodes}) == count


def test_of_very_many_rows_the_first_are_looked_at_and_that_is_said() -> None:
    rows = 1_000_010  # ten more than are looked at
    with duckdb.connect() as connection:
        connection.execute(
            "create view results as select (i // 2)::varchar as key, case when i >= 1000000 then 'late' "
            f"when i % 2 = 0 then 'even' else 'odd' end as label from range({rows}) t(i)"
        )

        def ask(sql: str, limit: int) -> Rows:
            found = connection.sql(sql).limit(limit).to_arrow_table()
            return Rows(columns=dict.fromkeys(found.column_names, ""), rows=found.to_pylist(), truncated=False)

        found = _counted(ask)
    assert found is not None
    assert found.labels == [Label("even", 500_000, 500_000), Label("odd", 500_000, 500_000)]
    assert found.looked == 1_000_000
    assert found.graph is not None
    assert [edge.pair for edge in found.graph.edges] == [Pair("even", "odd", 500_000)]
