"""A run's nodes as a tree, drawn as ``argo get`` draws it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from tally.masking import mask
from tally.pipelines.store import Node

SIGNS = {"Pending": "◷", "Running": "●", "Succeeded": "✔", "Failed": "✖", "Error": "⚠", "Skipped": "○", "Omitted": "○"}


def rows(nodes: Sequence[Node]) -> Iterator[tuple[str, str, str, str]]:
    """STEP, TEMPLATE, DURATION and MESSAGE of each node."""
    for node, step in drawn(nodes):
        tree = step.removesuffix(node.display)
        yield tree + mask(node.display), node.template, duration(node), node.message or ""


def drawn(nodes: Sequence[Node]) -> Iterator[tuple[Node, str]]:
    """Each node, and its place in the tree: groups of steps are seen by how their steps hang together."""
    inside: dict[str, list[Node]] = {}
    for node in nodes:
        inside.setdefault(node.parent, []).append(node)

    def children(node: Node) -> list[list[Node]]:
        """What hangs below a node, in groups that run together."""
        groups: list[list[Node]] = []
        for each in inside.get(node.id, ()):
            if each.kind == "StepGroup":
                groups.append(inside.get(each.id, []))
            else:
                groups.append([each])
        return [each for each in groups if each]

    def draw(node: Node, first: str, rest: str) -> Iterator[tuple[Node, str]]:
        sign = SIGNS[node.phase] if not (node.kind == "Suspend" and node.phase == "Running") else "ǁ"
        yield node, f"{first}{sign} {node.display}"
        groups = children(node)
        for number, group in enumerate(groups):
            last_group = number == len(groups) - 1
            for place, each in enumerate(group):
                last = place == len(group) - 1
                if len(group) == 1:
                    branch = "└─" if last_group else "├─"
                    below = "  " if last_group else "│ "
                    if node.kind == "Steps":
                        branch, below = branch + "──", below + "  "
                else:
                    outer = ("└─" if last_group else "├─") if place == 0 else ("  " if last_group else "│ ")
                    branch = outer + ("┬─" if place == 0 else "└─" if last else "├─")
                    below = ("  " if last_group else "│ ") + ("  " if last else "│ ")
                yield from draw(each, rest + branch, rest + below)

    for top in inside.get("", ()):
        yield from draw(top, "", "")


def duration(node: Node) -> str:
    """How long it has taken so far; empty where it has not begun."""
    if node.started_at is None or node.kind == "Skipped":
        return ""
    seconds = (node.finished_at or time.time()) - node.started_at
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m {rest}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60}m"
