"""Patterns of numbered pictures, as FFmpeg takes them: ``frames/frame_%04d.png``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tally.errors import SpecError

_COUNT = re.compile(r"%(?:0(\d+))?d")
_NUMBER = re.compile(r"(\d+)(\D*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Pattern:
    """Names that hold a number of ``digits`` digits or more. before, after: what stands around it."""

    before: str
    digits: int
    after: str

    def parts(self, name: str) -> tuple[str, int, str] | None:
        """What stands before a name's number, the number, and what stands behind it; None if it is none of them."""
        number = name[len(self.before) : len(name) - len(self.after)]
        fits = name.startswith(self.before) and name.endswith(self.after) and number.isascii() and number.isdecimal()
        return (self.before, int(number), self.after) if fits and len(number) >= self.digits else None


def is_pattern(place: str) -> bool:
    """Whether a place is a pattern of numbered pictures."""
    return _COUNT.search(place.rpartition("/")[2]) is not None


def parse(place: str) -> tuple[str, Pattern]:
    """A glob that takes all that a pattern may mean, and the pattern of names. Raises SpecError if it is ambiguous."""
    folder, separator, name = place.rpartition("/")
    if len(_COUNT.findall(name)) > 1 or _COUNT.search(folder) or re.search(r"[*?\[]", name):
        raise SpecError(
            f"{place!r} counts twice, in the name of a folder, or beside a wildcard",
            hint="A pattern counts once, in the name of a file: frames/frame_%04d.png",
        )
    found = _COUNT.search(name)
    assert found is not None
    pattern = Pattern(name[: found.start()], int(found[1] or 1), name[found.end() :])
    return f"{folder}{separator}{pattern.before}*{pattern.after}", pattern


def numbered(name: str) -> tuple[str, int, str] | None:
    """As :meth:`Pattern.parts`, of any name: the last number before its suffix counts."""
    stem, dot, suffix = name.rpartition(".")
    found = list(_NUMBER.finditer(stem))
    if not found:
        return None
    last = found[-1]
    return stem[: last.start(1)], int(last[1]), last[2] + dot + suffix
