"""Which labels results hold, and which of them are found in the same pictures: counted by SQL, laid out here."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tally.jobs.states import ENDED
from tally.jobs.store import JobRecord
from tally.server.results import Ask, Results

MOST_LABELS = 12
_MOST_PAIRS = 66  # as many as so many labels can have
_MOST_ROWS = 1_000_000
_MOST_KNOWN = 256

_SEEN = f"""
with seen as (select key, label::varchar as label from results where label is not null limit {_MOST_ROWS})
"""  # noqa: S608 - a number of ours
_LABELS = f"""
{_SEEN}
select label, count(*) as rows, count(distinct key) as items from seen group by 1 order by items desc, rows desc, 1
"""  # noqa: S608
_PAIRS = f"""
{_SEEN}, found as (select distinct key, label from seen),
     most as (select label from found group by label order by count(*) desc, label limit {MOST_LABELS}),
     few as (select * from found where label in (from most))
select a.label as one, b.label as other, count(*) as items
from few as a join few as b on a.key = b.key and a.label < b.label group by 1, 2 order by 3 desc, 1, 2
"""  # noqa: S608

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
    """The labels of a job, the most frequent first. more: there are others. graph: None if no item has two labels.

    looked: so many rows were looked at, the first ones; None: all. More would take too long for a page.
    """

    labels: list[Label]
    more: bool
    graph: Graph | None
    looked: int | None


class Labels:
    """Of jobs; those of ended ones are counted once. Safe to use from several threads."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._known: OrderedDict[tuple[str, int, float | None], Found | None] = OrderedDict()

    def of(self, record: JobRecord) -> Found | None:
        """None where the results have no column ``label``. Raises TallyError."""
        state = record.id, record.generation, record.finished_at
        if state in self._known:
            return self._known[state]
        found = self._results.run(record.id, _counted)
        if record.state in ENDED:
            self._known[state] = found
            if len(self._known) > _MOST_KNOWN:
                with suppress(KeyError):  # another thread was faster
                    self._known.popitem(last=False)
        return found


def _counted(ask: Ask) -> Found | None:
    if "label" not in ask("from results limit 0", 0).columns:
        return None
    found = ask(_LABELS, MOST_LABELS)
    labels = [Label(**row) for row in found.rows]
    pairs = [Pair(**row) for row in ask(_PAIRS, _MOST_PAIRS).rows]
    graph = draw({each.label: each.items for each in labels}, pairs) if pairs else None
    [total] = ask("select count(label) as rows from results", 1).rows
    return Found(labels, found.truncated, graph, _MOST_ROWS if total["rows"] > _MOST_ROWS else None)


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
