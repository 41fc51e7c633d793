"""All rules: each looks at one thing, and yields a line for each place where it is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from tally.deploy.kubernetes.lint import containers, needs, ray, reach, relations
from tally.deploy.kubernetes.lint.objects import Found, Manifest, called

_UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def problems(manifests: Sequence[Manifest]) -> list[str]:
    """All that is wrong, one line each. The manifests have the fields, of the types, that their schemas say, as far as
    those are known here; of others, those are named that cannot be read."""
    try:
        return _problems(manifests)
    except _UNREADABLE as error:
        odd = [each for each in manifests if not _fits([each])]
        odd = odd or [each for each in manifests if _fits([one for one in manifests if one is not each])]
        if not odd:
            raise
        why = "a field is missing, or of another type than it is to be"
        return [f"{called(each)} cannot be read: {why} ({type(error).__name__}: {error})" for each in odd]


def _fits(manifests: Sequence[Manifest]) -> bool:
    """Whether all rules can read these."""
    try:
        _problems(manifests)
    except _UNREADABLE:
        return False
    return True


def _problems(manifests: Sequence[Manifest]) -> list[str]:
    found = Found(manifests)
    rules = (*relations.RULES, *containers.RULES, *ray.RULES, *needs.RULES, *reach.RULES)
    return list(dict.fromkeys(line for rule in rules for line in rule(found)))
