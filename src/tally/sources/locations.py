"""Locations of files: folders, single files and globs, on this machine or in a bucket."""

from __future__ import annotations

import difflib
import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from tally.errors import SourceNotFoundError, SpecError
from tally.storage import (
    failure,
    folder_away,
    folder_identity,
    is_url,
    is_web,
    key_of,
    local_of,
    open_store,
)

_SHOWN_SUFFIXES = 5


@dataclass(frozen=True, slots=True)
class Location:
    """A root to list, and which of its files are taken.

    root: an absolute path or URL. prefix: what keys begin with. names: exactly these, sorted; or
    pattern: a glob relative to the root; or neither: everything that is not hidden.
    identity: the machine that looked at the root first, and what its file system knows the root by; None for a bucket.
    """

    root: str
    prefix: str = ""
    names: tuple[str, ...] = ()
    pattern: str | None = None
    identity: tuple[str, int | None] | None = field(default=None, compare=False)

    def check_root(self) -> None:
        """Raises StorageAwayError if the root is not the folder that was found first: its disk is unmounted, say.

        Raises StorageError if it may not be read.
        """
        if self.identity is None:
            return
        machine, number = self.identity
        # Machines that share a file system may know the folder by different numbers.
        if not _can_be_listed(self.root) or (machine == _machine() and folder_identity(self.root) != number):
            raise folder_away(self.root)

    @property
    def within(self) -> str:
        """What the whole path of each of its files begins with."""
        return self.root.rstrip("/") + "/"


def _machine() -> str:
    return os.uname().nodename


def _can_be_listed(folder: str) -> bool:
    """Whether the folder answers: attributes alone may come from a cache. Raises StorageError if it may not be read."""
    try:
        with os.scandir(folder) as entries:
            next(entries, None)
    except PermissionError as error:
        raise failure("list", folder, error) from None
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)  # this process's fault, not the folder's
    return True


def not_the_output(location: Location, without: str | None) -> Callable[[str], bool] | None:
    """Tells whether a name is none of the output's. None if the output cannot be among the location's names.

    A merged output ``out.csv`` has its manifest, its dead items and its staging folder beside it, all of
    whose names begin with ``out.``.
    """
    if without is None or not without.startswith(location.within):
        return None
    name = without[len(location.within) :].rstrip("/")
    if without.endswith("/") or not _suffix(name):
        return lambda other: other != name and not other.startswith(name + "/")
    stem = name[: -len(_suffix(name))]
    beside = (f"{name}.", f"{stem}.dead.")
    return lambda other: other != name and not other.startswith(beside)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix


def both(first: Callable[[str], bool], second: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda name: first(name) and second(name)


def not_hidden(folder: str) -> bool:
    last = folder[folder.rfind("/") + 1 :]
    return last[:1] != "." or last in (".", "..")  # as in keys of buckets: reading them says what is wrong


_MAGIC = re.compile(r"[*?\[]")


def locate(uris: Sequence[str], *, missing: bool = False) -> tuple[Location, ...]:
    """The locations that the uris name; single files of one folder are one location.

    missing: a path that is not there is located as a file, unless it is the only one, or none is there.
    """
    found: list[Location] = []
    lost: list[SourceNotFoundError] = []
    for uri in uris:
        try:
            found += _locate_all(uri)
        except SourceNotFoundError as error:
            if not missing or (location := _as_file(uri)) is None:
                raise
            lost.append(error)
            found.append(location)
    if lost and len(lost) == len(found):
        raise lost[0]
    return tuple(
        location if is_url(location.root) else replace(location, identity=(_machine(), folder_identity(location.root)))
        for location in _with_prefixes(_merge_files(found))
    )


def _as_file(uri: str) -> Location | None:
    """Where a file would be, if the uri names one: no glob, no count, and no folder by its end."""
    if _MAGIC.search(uri) or _NUMBERS.search(uri) or uri.endswith("/"):
        return None
    if is_url(uri) and not uri.lower().startswith("file://"):
        root, _, name = uri.rpartition("/")
        return Location(root, names=(name,))
    path = Path(os.path.abspath(local_of(uri) if is_url(uri) else os.path.expanduser(uri)))  # noqa: PTH100, PTH111
    folder = next(each for each in path.parents if each.is_dir())
    return Location(str(folder), names=(str(path.relative_to(folder)),))


_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_NUMBERED = 1_000_000


def _locate_all(uri: str) -> list[Location]:
    """The locations that a path or URL names: several single files where it counts (``shard-{000..099}.tar``)."""
    if _NUMBERS.search(uri) is None or (not is_url(uri) and Path(uri).exists()):
        return [_locate(uri)]
    path = uri if is_url(uri) else os.path.abspath(os.path.expanduser(uri))  # noqa: PTH100, PTH111
    folder, _, last = path.rpartition("/")
    before, first, final, after = (_NUMBERS.split(last, maxsplit=1) + [""] * 3)[:4]
    if _NUMBERS.search(folder) or _NUMBERS.search(after) or _MAGIC.search(last):
        raise SpecError(
            f"{uri!r} counts in the name of a folder, twice, or beside a wildcard",
            hint="Numbers in braces count once, in the name of a file: shards/shard-{000000..000999}.tar",
        )
    if not 0 <= int(final) - int(first) < _MOST_NUMBERED:
        raise SpecError(f"{uri!r} counts down, or beyond {_MOST_NUMBERED:,} files")
    width = len(first) if first.startswith("0") else 0
    names = [f"{before}{number:0{width}}{after}" for number in range(int(first), int(final) + 1)]
    if is_web(folder):  # what is there is not listed
        return [Location(folder, names=(name,)) for name in names]
    place = _locate(folder or "/")
    there = {entry.name for entry in open_store(place.root).list(enter=lambda _: False, sizes=False)}
    if missing := [name for name in names if name not in there]:
        rest = f", nor {len(missing) - 1:,} more of the {len(names):,} files of {last}" if len(missing) > 1 else ""
        raise SourceNotFoundError(f"there is no {key_of(place.within + missing[0])}{rest}")
    return [Location(place.root, names=(name,)) for name in names]


def _locate(uri: str) -> Location:
    """What a path or URL names. A name that exists is taken as it is, even if it looks like a glob."""
    if is_url(uri) and not uri.lower().startswith("file://"):
        return _locate_remote(uri)
    given = local_of(uri) if is_url(uri) else os.path.expanduser(uri)  # noqa: PTH111
    if not given or "\0" in given:
        raise SpecError(f"{uri!r} names no file or folder", hint="Is a variable of your shell or script empty?")
    path = os.path.abspath(given)  # noqa: PTH100  # symbolic links stay as the user knows them
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        if Path(path).is_symlink():
            raise SourceNotFoundError(
                f"{key_of(path)} is a link to {key_of(os.fspath(Path(path).readlink()))}, which is not there"
            ) from None
        if not _MAGIC.search(given):
            raise _missing(path) from None
        root, pattern = _split(path)
        if not Path(root).is_dir():
            raise _missing(root) from None
        return Location(root, pattern=pattern)
    except OSError as error:
        raise failure("read", path, error) from None
    if stat.S_ISDIR(mode):
        return Location(path)
    if not stat.S_ISREG(mode):
        raise SourceNotFoundError(
            f"{key_of(path)} is neither a file nor a folder", hint="pipes and devices cannot be read twice"
        )
    folder, _, name = path.rpartition("/")
    return Location(folder or "/", names=(name,))


def _locate_remote(uri: str) -> Location:
    # Checks the kind of URL, and that it carries no secrets.
    open_store(uri)
    scheme, _, rest = uri.partition("://")
    if is_web(uri):
        folder, _, last = rest.rpartition("/")
        root = f"{scheme.lower()}://{folder or rest}"
        if not (folder and last) or "*" in last:
            open_store(root).list()  # says that there is no such thing
        if not open_store(root).exists(last):
            raise SourceNotFoundError(f"there is no file {uri}", hint="Names are case-sensitive on most web servers.")
        return Location(root, names=(last,))
    bucket, _, name = rest.partition("/")
    bucket = f"{scheme.lower()}://{bucket}"
    whole = name.strip("/")
    if not whole:
        return Location(bucket)
    store = open_store(bucket)
    magic = _MAGIC.search(whole)
    if not magic and (name.endswith("/") or next(store.list(whole), None) is not None):
        return Location(f"{bucket}/{whole}")
    if store.exists(whole):
        folder, _, last = whole.rpartition("/")
        return Location(f"{bucket}/{folder}".rstrip("/"), names=(last,))
    if not magic:
        raise SourceNotFoundError(f"there is no object and no folder {uri}", hint="names of objects are case-sensitive")
    root, pattern = _split(whole)
    return Location(f"{bucket}/{root}".rstrip("/"), pattern=pattern)


def _split(path: str) -> tuple[str, str]:
    """Splits a glob before its first wildcard."""
    parts = path.split("/")
    cut = next(index for index, part in enumerate(parts) if _MAGIC.search(part))
    root = "/".join(parts[:cut])
    return root or ("/" if path.startswith("/") else ""), "/".join(parts[cut:])


def _missing(path: str) -> SourceNotFoundError:
    """The error for a path: how far it exists, and which similar names there are."""
    parent, _, name = path.rpartition("/")
    while not Path(parent or "/").is_dir() and parent:
        parent, _, name = parent.rpartition("/")
    try:
        there = os.listdir(parent or "/")
    except OSError:
        there = []
    by_lower: dict[str, str] = {each.lower(): each for each in there}
    close = [by_lower[each] for each in difflib.get_close_matches(name.lower(), by_lower, n=3)]
    message = f"there is no file or folder {key_of(path)}"
    if close:
        shown = ", ".join(repr(f"{parent}/{each}") for each in map(key_of, close))
        return SourceNotFoundError(message, hint=f"did you mean {shown}?")
    if (f"{parent}/{name}") != path:
        return SourceNotFoundError(message, hint=f"{key_of(parent) or '/'} is there, but holds no {key_of(name)!r}")
    names = "1 name" if len(there) == 1 else f"{len(there):,} names"
    return SourceNotFoundError(message, hint=f"its folder {key_of(parent) or '/'} is there and holds {names}")


def count_suffixes(passed: Counter[str]) -> str:
    most = passed.most_common(_SHOWN_SUFFIXES)
    shown = [
        f"{key_of(suffix)[:20] or 'without suffix'} {count:,}"
        for suffix, count in sorted(most, key=lambda each: (not each[0], each[0]))
    ]
    rest = sum(passed.values()) - sum(count for _, count in most)
    return ", ".join([*shown, f"others {rest:,}"] if rest else shown)


def _merge_files(locations: list[Location]) -> list[Location]:
    """Neighbouring single files become one location: a shell expands ``*.jpg`` to thousands of them."""
    merged: list[Location] = []
    group: list[Location] = []
    for location in [*locations, None]:
        if group and (location is None or not location.names or _anchor(location.root) != _anchor(group[0].root)):
            root = _common([each.root for each in group])
            cut = len(root.rstrip("/")) + 1
            names = {(each.within + name)[cut:] for each in group for name in each.names}
            merged.append(Location(root, names=tuple(sorted(names))))
            group = []
        if location is not None and location.names:
            group.append(location)
        elif location is not None and location not in merged:
            merged.append(location)
    return merged


def _with_prefixes(locations: list[Location]) -> tuple[Location, ...]:
    """Keys of several locations are relative to their common folder. Without one, keys begin with the location."""
    if len(locations) == 1:
        return tuple(locations)
    common = ""
    if len({_anchor(location.root) for location in locations}) == 1:
        common = _common([location.root for location in locations]).rstrip("/") + "/"
    return tuple(
        Location(location.root, key_of(location.within[len(common) :]), location.names, location.pattern)
        for location in locations
    )


def _anchor(root: str) -> str:
    """What two locations must share to have a common folder."""
    return "/".join(root.split("/")[:3]) if is_url(root) else "/"


def _common(roots: list[str]) -> str:
    """The deepest folder that holds all of the roots, of one anchor."""
    parts = [root.rstrip("/").split("/") for root in roots]
    shortest, longest = min(parts), max(parts)
    same = 0
    while same < min(len(shortest), len(longest)) and shortest[same] == longest[same]:
        same += 1
    return "/".join(shortest[:same]) or "/"


# Globs -----------------------------------------------------------------------------------------------


def compile_glob(pattern: str) -> re.Pattern[str]:
    """A glob, relative to its root, as a regular expression over whole names.

    ``**`` is any number of folders (as the last part: everything below), ``*`` and ``?`` stay within one
    part, ``[ab-c]`` and ``[!a]`` are sets. No wildcard matches a part's leading dot.
    """
    # What a wildcard leaves for the next one is settled once, and never tried again: else a name could take hours.
    groups: list[list[str]] = [[]]  # the parts between those that are **
    for part in pattern.split("/"):
        if part == "**":
            groups.append([])
        else:
            groups[-1].append(("" if part.startswith(".") else r"(?!\.)") + _compile_part(part))
    first, *others = groups
    out = "/".join(first)
    if others:
        *between, last = others
        out += "/" if first else ""
        out += "".join(f"(?>{_FOLDERS}?{'/'.join(each)}/)" for each in between if each)
        out += _FOLDERS + ("/".join(last) if last else r"[^/.][^/]*")
    try:
        return re.compile(out, re.DOTALL)
    except re.error as error:
        raise SpecError(f"{key_of(pattern)!r} is not a glob: {error.msg}", hint="sets are written [a-z]") from None


_FOLDERS = r"(?:[^/.][^/]*/)*"


def _compile_part(part: str) -> str:
    texts, at = [""], 0  # what is between stars
    while at < len(part):
        char = part[at]
        at += 1
        if char == "*":
            texts.append("")
        elif char == "?":
            texts[-1] += "[^/]"
        elif char == "[" and (end := part.find("]", at + 1 + (part[at : at + 1] == "!"))) > 0:
            inside = part[at:end]
            negated = inside.startswith("!")
            inside = re.sub(r"([\\\[\]^&~|])", r"\\\1", inside[1:] if negated else inside)
            texts[-1] += f"(?!/)[{'^' if negated else ''}{inside}]"
            at = end + 1
        else:
            texts[-1] += re.escape(char)
    first, *others = texts
    if not others:
        return first
    *between, last = others
    return first + "".join(f"(?>[^/]*?{each})" for each in between if each) + f"[^/]*{last}"


def enters(pattern: str) -> Callable[[str], bool]:
    """Tells whether a folder can hold matches of the glob, by its depth and by whether it is hidden."""
    parts = pattern.split("/")
    depth = None if "**" in parts else len(parts)
    hidden = any(part.startswith(".") for part in parts)

    def enter(folder: str) -> bool:
        return (hidden or not_hidden(folder)) and (depth is None or folder.count("/") + 1 < depth)

    return enter
