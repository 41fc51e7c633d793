"""The documentation's blocks: what their authors meant by them, and what stands between."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
BLOCK = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_NOT_EXECUTED = re.compile(r"<!-- not executed: (.+?) -->\s*\Z", re.DOTALL)
_DETAILS = re.compile(r"\bjob \w+|\S*[\d/]\S*")
_COMMAND = r"^ *(?:\$ )?((?:{}) (?:[^\n\"']|\"[^\"]*\"|'[^']*')*)$"


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    mark: str
    text: str
    before: str  # what stands between this block and the one before it

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The ``tally`` commands of a block of the shell's, each on one line, without where their output goes."""
        return [re.sub(r" > [\w.]+$", "", each) for each in self.typed("tally")]

    def typed(self, *programs: str) -> list[str]:
        """The commands of these programs in a block of the shell's, as they stand, each on one line."""
        if self.language not in ("", "console", "sh"):
            return []
        pattern = re.compile(_COMMAND.format("|".join(map(re.escape, programs))), re.MULTILINE)
        return [found[1] for found in pattern.finditer(self.text.replace("\\\n", " "))]

    @property
    def not_executed(self) -> str | None:
        """Why a reader alone executes it, by an invisible comment right before it: ``<!-- not executed: ... -->``."""
        found = _NOT_EXECUTED.search(self.before)
        return found[1] if found else None


def blocks(page: Path) -> Iterator[Block]:
    text, end = page.read_text("utf-8"), 0
    for found in BLOCK.finditer(text):
        language, _, mark = found[2].strip().partition(" ")
        line = text.count("\n", 0, found.start()) + 1
        yield Block(page, line, language, mark, found[3], text[end : found.start()])
        end = found.end()


def refused(shown: Sequence[Block]) -> Iterator[tuple[Block, str | None]]:
    """Each block, and the message ``error: ...`` that follows right after it, which then has to be its answer."""
    for block, answer in zip_longest(shown, shown[1:]):
        is_answer = answer is not None and not answer.before.strip() and answer.text.startswith("error: ")
        yield block, answer.text if is_answer else None


def without_details(message: str) -> str:
    """The first line without numbers, ids and paths."""
    return _DETAILS.sub("*", message.partition("\n")[0])
