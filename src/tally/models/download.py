"""Models on the web and in buckets, fetched once.

Models from the web are kept under their checksum. A bucket's objects have a mark that changes with their content: a
fetched copy is used again while the marks in the bucket and the checksums here stay the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tally.config import make_private, settings
from tally.errors import ModelChangedError, ModelLoadError, ModelNotFoundError, SpecError, StorageError
from tally.masking import mask
from tally.models import kinds, web
from tally.models.base import is_suffix
from tally.models.hashing import counts, known_hash
from tally.models.mirror import build
from tally.models.mirror import download as copy
from tally.models.package import sidecar
from tally.models.readable import check_readable
from tally.storage import Store, cache_folder, open_store, temporary
from tally.text import did_you_mean

_MARKS = ".tally-marks.json"
"""What a fetched folder was made of: ``{name: [mark, sha256]}``."""


def download(url: str) -> Path:
    """The local copy of ``https://host/path/model.onnx#sha256=...``.

    Raises SpecError, saying which checksum to append, where the URL has none; ModelChangedError where
    the content is another one; ModelNotFoundError, StorageError.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise SpecError(f"{url!r} is no URL: {error}") from None
    if parts.scheme != "https":
        raise SpecError(
            f"models come from https:// URLs, not {parts.scheme}://: {url}",
            hint="Download it by other means, and name the file.",
        )
    name = unquote(parts.path).rpartition("/")[2]
    if (claimed := kinds.claiming(name)) is None or name in claimed.markers:
        suffixes = ", ".join(filter(is_suffix, kinds.claims()))
        raise SpecError(f"the URL must name a model file ({suffixes}), not {name!r}: {url}")
    wanted = parts.fragment.removeprefix("sha256=").lower()
    if parts.fragment and not re.fullmatch(r"sha256=[0-9A-Fa-f]{64}", parts.fragment):
        raise SpecError(f"the URL must end in #sha256= and 64 hexadecimal digits, not #{parts.fragment}")
    folder = settings().home / "downloads"
    plain = url.partition("#")[0]
    if not wanted:
        found = _fetch(plain, folder, name)
        raise SpecError(
            f"the URL does not say which content is expected: {plain}",
            hint=f"If what is there now is right, write {mask(plain)}#sha256={found}",
        )
    kept = folder / wanted / name
    if not kept.is_file() or known_hash(kept).hex() != wanted:
        found = _fetch(plain, folder, name)
        if found != wanted:
            raise ModelChangedError(
                f"{plain} has the content sha256={found}, not sha256={wanted}",
                hint="Its publisher changed it, or what came is not the model (an error page, say).",
            )
    return kept


def _fetch(url: str, folder: Path, name: str) -> str:
    """Download to ``folder/<sha256>/name``; returns the checksum."""
    try:
        make_private(folder)
        with temporary.folder("download", within=folder) as part:
            found = web.fetch(url, part / name)
            kept = folder / found / name
            kept.parent.mkdir(exist_ok=True)
            (part / name).replace(kept)
    except (StorageError, ModelNotFoundError):
        raise
    except OSError as error:
        raise StorageError(f"cannot download {url} to {folder}: {error}") from error
    return found


def model(url: str) -> tuple[Path, str]:
    """The local copy of a model file or package in a bucket, and the URL of the folder that it is in.

    What belongs to a file comes along: the options beside it, labels that they name, weights that ONNX keeps apart,
    and Python files beside a Python file.
    Raises ModelNotFoundError, ModelLoadError for a folder that is no package, StorageError.
    """
    above, name = _parted(url)
    if name and open_store(above).exists(name):
        if name == "tally.yaml" or ((claimed := kinds.claiming(name)) is not None and name in claimed.markers):
            return folder(above) / name, above
        return _beside(above, name) / name, above
    place = url.rstrip("/")
    store = open_store(place)
    if not any(store.exists(each) for each in chain(["tally.yaml"], kinds.markers())):
        there = [entry.name for entry in islice(store.list(), 1000)]
        if not there:
            raise _not_there(url, above, name)
        shown = [each for each in there if "/" not in each and kinds.claiming(each)][:3]
        raise ModelLoadError(
            f"{url} is a folder without a tally.yaml",
            hint=f"Give a file in it ({', '.join(shown)}), or make it a package: 'tally new package' writes one."
            if shown
            else "A model package is a folder with a tally.yaml: 'tally new package NAME' writes one.",
        )
    return folder(place), place


def check_there(url: str) -> None:
    """Raises ModelNotFoundError if nothing in a bucket has this URL. StorageError."""
    above, name = _parted(url)
    if not (name and open_store(above).exists(name)) and next(iter(open_store(url.rstrip("/")).list()), None) is None:
        raise _not_there(url, above, name)


def file(url: str) -> Path:
    """The local copy of one file in a bucket. Raises SpecError if there is none, StorageError."""
    above, name = _parted(url)
    if not name or not open_store(above).exists(name):
        raise SpecError(f"there is no file {url!r}", hint=_not_there(url, above, name).hint)
    return _fetched(above, [name]) / name


def folder(url: str, names: Sequence[str] | None = None) -> Path:
    """The local copy of a folder in a bucket, or of what it holds under ``names``. Hidden files are left out.

    Raises SpecError if nothing is there, StorageError.
    """
    place = url.rstrip("/")
    if names is None:
        names = [entry.name for entry in open_store(place).list() if counts(entry.name)]
        if not names:
            raise SpecError(
                f"there is no folder {url!r}, or nothing in it", hint="tally doctor URL says what a store answers."
            )
    return _fetched(place, names)


def _parted(url: str) -> tuple[str, str]:
    """The URL of the folder above, and the last name; that is empty for a folder (``.../``) and a bucket."""
    scheme, _, rest = url.partition("://")
    above, slash, name = rest.rpartition("/")
    return (f"{scheme}://{above}", name) if slash else (url, "")


def _not_there(url: str, above: str, name: str) -> ModelNotFoundError:
    with suppress(StorageError):
        entries = open_store(above).list(enter=lambda name: False)
        names = [entry.name for entry in islice(entries, 1000)]
        if suggestion := did_you_mean(name, names):
            return ModelNotFoundError(f"there is no model at {url!r}{suggestion}")
    return ModelNotFoundError(f"there is no model at {url!r}", hint="Does 'tally doctor' reach the bucket?")


def _beside(above: str, name: str) -> Path:
    store = open_store(above)
    names = [name]
    claimed = kinds.claiming(name)
    if claimed is not None and claimed.entry:
        found = store.list(enter=lambda name: False)
        names += [entry.name for entry in found if entry.name.endswith(".py") and entry.name != name]
    elif store.exists(f"{name}.yaml"):
        names.append(f"{name}.yaml")
    return _fetched(above, names, of=name)


def _belonging(path: Path) -> list[str]:
    """Names of files that a model file, with the options beside it, says are part of it."""
    names: list[str] = []
    with suppress(SpecError):  # opening the model says what is wrong
        if isinstance(labels := sidecar(path).get("labels"), str):
            names.append(labels)
    with suppress(ModelLoadError):
        check_readable(path, trusted=True)
        if (kind := kinds.of_name(path.name)) is not None:
            names += kind.companions(path)
    return [each for each in names if each.isprintable() and each and each[0] != "/" and ".." not in each.split("/")]


def _fetched(place: str, names: Iterable[str], *, of: str | None = None) -> Path:
    """A folder of the cache with these objects, and what belongs to the model file ``of``."""
    store = open_store(place)
    known = _marks(store, names)
    digest = hashlib.sha256(json.dumps([store.url, sorted(known.items())]).encode()).hexdigest()
    # Packages are called by their folder's name.
    last = re.sub(r"[^\w.-]", "_", place.rpartition("/")[2]) or "model"

    def fill(new: Path) -> None:
        inner = new / last
        copy(store, known, inner)
        marks = dict(known)
        if of is not None:
            more = [each for each in _belonging(inner / of) if each not in marks and store.exists(each)]
            copy(store, more, inner)
            marks |= _marks(store, more)
        kept = {name: [mark, known_hash(inner / name).hex()] for name, mark in marks.items()}
        (new / _MARKS).write_text(json.dumps(kept))

    def right(there: Path) -> bool:
        try:
            kept = json.loads((there / _MARKS).read_text())
            more = [name for name in kept if name not in known]
            same = all(known_hash(there / last / name).hex() == found for name, (_, found) in kept.items())
            return same and _marks(store, more) == {name: kept[name][0] for name in more}
        except (OSError, ValueError):
            return False

    return build(cache_folder() / "buckets" / digest, right, fill) / last


def _marks(store: Store, names: Iterable[str]) -> dict[str, str]:
    """What changes with the content of each of these objects."""
    named = list(names)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(store.marked, named))
    return {name: f"{mark} {size}" for name, (size, mark) in zip(named, found, strict=True)}
