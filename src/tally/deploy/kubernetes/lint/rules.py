"""All rules: each looks at one thing, and yields a line for each place where it is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from tally.deploy.kubernetes.lint import containers, needs, ray, reach, relations
from tally.deploy.kubernetes.lint.objects import Found, Manifest


def problems(manifests: Sequence[Manifest]) -> list[str]:
    """All that is wrong, one line each. The manifests have the fields, of the types, that their schemas say."""
    found = Found(manifests)
    rules = (*relations.RULES, *containers.RULES, *ray.RULES, *needs.RULES, *reach.RULES)
    return list(dict.fromkeys(line for rule in rules for line in rule(found)))
