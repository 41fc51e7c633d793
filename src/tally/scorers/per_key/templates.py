"""Templates of model files, ``models/{Device}_{Tag}.skops``: the files that match, and the key that each is for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tally.errors import ModelNotFoundError, SpecError
from tally.models.hashing import counts
from tally.scorers.per_key.keys import Key

PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


def find(template: str, by: Sequence[str]) -> tuple[Path, tuple[str, ...]]:
    """The folder above all placeholders of a template, and the files in it that match, sorted, relative to it.

    ``{Device}`` stands for any part of one name. Raises SpecError if placeholders and ``by`` are not the same,
    ModelNotFoundError if no file matches.
    """
    _check_columns(template, by)
    parts = Path(template).parts
    first = next(index for index, part in enumerate(parts) if PLACEHOLDER.search(part))
    folder = Path(*parts[:first])
    pattern = _pattern("/".join(parts[first:]))
    files = [name for name in _walk(folder, parts[first:]) if pattern.fullmatch(name)]
    if not files:
        there = f"the folder {folder} does not exist" if not folder.is_dir() else f"{folder} was searched"
        raise ModelNotFoundError(f"no model file matches {template!r}", hint=f"{there[0].upper()}{there[1:]}.")
    return folder, tuple(sorted(files))


def local_template(template: str, by: Sequence[str]) -> tuple[str, str | None]:
    """The template for :func:`find`; of a URL, whose objects are fetched, also the URL of the folder that they are in.

    Raises as :func:`find` does.
    """
    from tally.models.download import folder as fetched
    from tally.storage import is_url, open_store

    if not is_url(template):
        return template, None
    _check_columns(template, by)
    folder, within = template[: (cut := template.rindex("/", 0, template.index("{")))], template[cut + 1 :]
    pattern = _pattern(within)
    depth = within.count("/")
    entries = open_store(folder).list(enter=lambda name: name.count("/") < depth)
    names = [entry.name for entry in entries if pattern.fullmatch(entry.name) and counts(entry.name)]
    if not names:
        raise ModelNotFoundError(f"no model file matches {template!r}", hint=f"{folder} was searched.")
    return str(fetched(folder, names) / within), folder


def _check_columns(template: str, by: Sequence[str]) -> None:
    named = list(dict.fromkeys(PLACEHOLDER.findall(template)))
    problems = [f"{template}: {{{name}}} is no column of the key ({', '.join(by)})" for name in named if name not in by]
    problems += [f"{template}: the column {name} of the key chooses no model" for name in by if name not in named]
    if not named and not problems:
        problems = [f"{template}: names no column of a key"]
    if problems:
        raise SpecError(problems, hint="For example: --model-per Device,Tag='models/{Device}_{Tag}.skops'")


def _walk(folder: Path, parts: Sequence[str], above: str = "") -> Iterator[str]:
    """Files below a folder whose path is made of names like ``parts``. Hidden ones are left out."""
    part, rest = parts[0], parts[1:]
    if PLACEHOLDER.search(part):
        pattern = _pattern(part)
        try:
            names = [name for name in os.listdir(folder / above) if pattern.fullmatch(name)]
        except OSError:
            return
        names = [name for name in names if not name.startswith(".") or part.startswith(".")]
    else:
        names = [part]
    for name in names:
        path = f"{above}{name}"
        if rest:
            yield from _walk(folder, rest, f"{path}/")
        elif (folder / path).is_file():
            yield path


def _pattern(template: str, *, lazy: bool = False) -> re.Pattern[str]:
    """What paths of models look like; its groups are the placeholders in the order in which they first appear."""
    text, seen = "", list[str]()
    for index, piece in enumerate(PLACEHOLDER.split(template)):
        if index % 2 == 0:
            text += re.escape(piece)
        elif piece in seen:
            text += f"(?P=c{seen.index(piece)})"
        else:
            text += f"(?P<c{len(seen)}>[^/]+{'?' if lazy else ''})"
            seen.append(piece)
    return re.compile(text)


def read_key(template: str, file: str) -> Key:
    """The key that a file was made for. template: as :func:`find` takes it, without the folder.

    Raises SpecError where the name can be read in more than one way. The values are in the order in which the
    template first names them.
    """
    greedy, lazy = (_pattern(template, lazy=lazy).fullmatch(file) for lazy in (False, True))
    if greedy is None or lazy is None or greedy.groups() != lazy.groups():
        found = " or ".join(", ".join(each.groups()) for each in (greedy, lazy) if each)
        raise SpecError(f"{file}: cannot tell {template} apart: {found or 'it does not match'}")
    return greedy.groups()


def columns_of(template: str) -> list[str]:
    """The placeholders of a template, in the order in which it first names them."""
    return list(dict.fromkeys(PLACEHOLDER.findall(template)))
