"""Labels that are found together are drawn side by side, always in the same way."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from tally.server.pages.labels import HEIGHT, WIDTH, Pair, draw

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
