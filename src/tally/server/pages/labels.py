"""Which labels results hold, and which of them are found in the same pictures: counted by SQL, laid out here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tally.server.results import Results

MOST_LABELS = 12
_MOST_PAIRS = 66  # as many as so many labels can have

_LABELS = """
select label::varchar as label, count(*) as rows, count(distinct key) as items
from results where label is not null group by 1 order by items desc, rows desc, 1
"""
_PAIRS = f"""
with seen as (select distinct key, label::varchar as label from results where label is not null),
     most as (select label from seen group by label order by count(*) desc, label limit {MOST_LABELS}),
     few as (select * from seen where label in (from most))
select a.label as one, b.label as other, count(*) as items
from few as a join few as b on a.key = b.key and a.label < b.label group by 1, 2 order by 3 desc, 1, 2
"""  # noqa: S608 - a number of ours

WIDTH, HEIGHT = 640, 400
_RADII = (190.0, 140.0)
_LETTERS = 20


@dataclass(frozen=True, slots=True)
class Label:
    """rows: that have it; items: that have such rows."""

    label: str
    rows: int
    items: int


@dataclass(frozen=True, slots=True)
class Pair:
    """Two labels, and in how many items both are found."""

    one: str
    other: str
    items: int


@dataclass(frozen=True, slots=True)
class Node:
    """A label as it is drawn. anchor: of its text, as SVG names it."""

    label: str
    text: str
    items: int
    x: float
    y: float
    radius: float
    text_x: float
    text_y: float
    anchor: str


@dataclass(frozen=True, slots=True)
class Edge:
    """A pair as it is drawn. path: as SVG writes it."""

    pair: Pair
    path: str
    width: float


@dataclass(frozen=True, slots=True)
class Graph:
    """Labels, and lines between those that are found together; wider where that is more often."""

    nodes: list[Node]
    edges: list[Edge]


@dataclass(frozen=True, slots=True)
class Found:
    """The labels of a job, the most frequent first. more: there are others. graph: None if no item has two labels."""

    labels: list[Label]
    more: bool
    graph: Graph | None


def labels_of(results: Results, job: str) -> Found | None:
    """The labels of the job's results; None where they have no column of that name. Raises TallyError."""
    if "label" not in results.query(job, "from results limit 0", limit=0).columns:
        return None
    found = results.query(job, _LABELS, limit=MOST_LABELS)
    labels = [Label(**row) for row in found.rows]
    pairs = [Pair(**row) for row in results.query(job, _PAIRS, limit=_MOST_PAIRS).rows]
    graph = draw({each.label: each.items for each in labels}, pairs) if pairs else None
    return Found(labels, found.truncated, graph)


def draw(items: Mapping[str, int], pairs: Sequence[Pair]) -> Graph:
    """The labels on an ellipse, those that are found together most often side by side. The same for the same numbers.

    items: how many items each label is found in. Pairs of other labels are left out.
    """
    pairs = [pair for pair in pairs if pair.one in items and pair.other in items]
    order = list(_side_by_side(list(items), pairs))
    middle, most = (WIDTH / 2, HEIGHT / 2), max(items.values())
    nodes = []
    for number, label in enumerate(order):
        angle = 2 * math.pi * number / len(order) - math.pi / 2
        across, down = math.cos(angle), math.sin(angle)
        x, y = middle[0] + _RADII[0] * across, middle[1] + _RADII[1] * down
        radius = 5 + 13 * math.sqrt(items[label] / most)
        beside = radius + 6
        nodes.append(
            Node(
                label, label if len(label) <= _LETTERS else label[: _LETTERS - 1] + "…", items[label],
                round(x, 1), round(y, 1), round(radius, 1),
                round(x + beside * across, 1), round(y + (beside + 6) * down + 5, 1),
                "middle" if abs(across) < 0.3 else "start" if across > 0 else "end",
            )
        )  # fmt: skip
    places = {node.label: node for node in nodes}
    widest = max((pair.items for pair in pairs), default=1)
    edges = []
    for pair in sorted(pairs, key=lambda pair: (pair.items, pair.one, pair.other)):  # the widest are drawn last
        one, other = places[pair.one], places[pair.other]
        bend = [(a + b + 2 * c) / 4 for a, b, c in zip((one.x, one.y), (other.x, other.y), middle, strict=True)]
        path = f"M{one.x} {one.y} Q{bend[0]:.1f} {bend[1]:.1f} {other.x} {other.y}"
        edges.append(Edge(pair, path, round(1 + 9 * pair.items / widest, 1)))
    return Graph(nodes, edges)


def _side_by_side(labels: list[str], pairs: Sequence[Pair]) -> Iterator[str]:
    """The labels, each followed by that of the rest which is found with it most often."""
    together = {frozenset((pair.one, pair.other)): pair.items for pair in pairs}
    rest = list(labels)
    last = rest.pop(0)
    yield last
    while rest:
        last = max(rest, key=lambda label: (together.get(frozenset((last, label)), 0), -labels.index(label)))
        rest.remove(last)
        yield last
