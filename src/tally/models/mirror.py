"""A model's mirror: a folder, mostly in a bucket, from where every machine that needs the model's content fetches it.

A mirror is either the user's own folder, or one that :func:`upload_to_mirror` or the registry wrote. The latter has a
list of its files with their checksums, ``CONTENTS``, which is written last: content without its list is incomplete
and does not count.

Fetched content is kept in the cache under its hash. It gets that name only after all of it matched the hash. One
process of a machine fetches, the others wait for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tally.config import make_private
from tally.errors import ModelChangedError, ModelNotFoundError, SourceNotFoundError, StorageError, TallyError
from tally.models.hashing import check_content, combined, content_files, content_hash, counts, known_hash
from tally.models.reference import ModelRef

if TYPE_CHECKING:
    from tally.storage import Store

CONTENTS = ".tally-contents.json"
"""The list of a mirror's files: ``{"hash": ..., "files": {name: [bytes, sha256]}}``."""

_AT_ONCE = 16
"""Files that are copied at the same time."""

_EVERYWHERE = (
    "Workers on other machines need the model where all of them see it: in a bucket (--model s3://...), in a "
    "registry that is shared (TALLY_REGISTRY), or at this very path."
)


# ------------------------------------------------------------------------------------------- references


def fetched(ref: ModelRef) -> ModelRef:
    """The reference with its content on this machine, checked: where it was resolved, or else fetched.

    Raises ModelNotFoundError where it is neither here nor at its mirror, ModelChangedError where the content does not
    have the reference's hash, StorageError.
    """
    try:
        check_content(str(ref), ref.location, ref.files, ref.hash)
    except ModelChangedError:
        if ref.mirror is None:
            if is_here(ref, any):
                raise
            raise ModelNotFoundError(
                f"model {ref}: {ref.location / ref.entry} is not on this machine ({platform.node()})", hint=_EVERYWHERE
            ) from None
    else:
        return ref
    return _moved(ref, fetch(str(ref), ref.mirror, _inside(ref.files), ref.hash))


def is_here(ref: ModelRef, test: Callable[[Iterable[bool]], bool] = all) -> bool:
    """Whether its files are where it was resolved; ``any`` of them, or all."""
    return test((ref.location / each).exists() for each in ref.files)


def upload_to_mirror(ref: ModelRef, place: Store | str) -> ModelRef:
    """The reference with a mirror: its content is copied below ``place``, under its hash, unless it is there already.

    place: where all machines see it. A model that has a mirror of its own stays as it is.
    Raises ModelChangedError, ModelNotFoundError where it is not on this machine, StorageError.
    """
    from tally.storage import open_store

    root = open_store(place) if isinstance(place, str) else place
    mirror = f"{root.url}/{ref.hash.removeprefix('sha256:')}"
    if ref.mirror not in (None, mirror):
        return ref
    store = open_store(mirror)
    if not is_whole(store, ref.hash):
        if not is_here(ref, any):
            fetched(replace(ref, mirror=None))  # says so
        put(str(ref), store, content_files(ref.location, ref.files), ref.hash)
    return replace(ref, mirror=mirror)


def uploaded_below(ref: ModelRef) -> str | None:
    """The place that :func:`upload_to_mirror` was given, if it gave the reference its mirror."""
    folder, _, last = (ref.mirror or "").rpartition("/")
    return folder if last and last == ref.hash.removeprefix("sha256:") else None


def at_mirror(ref: ModelRef, folder: Path, mirror: str) -> ModelRef:
    """The reference of a model whose folder was fetched from its mirror.

    Files that lie elsewhere (labels, say) are not in the mirror: then the reference has none.
    """
    assumed = tuple(line.replace(str(folder), mirror) for line in ref.assumed)
    complete = not any(os.path.isabs(each) for each in ref.files)  # noqa: PTH117
    return replace(ref, assumed=assumed, mirror=mirror if complete else None)


@contextmanager
def errors_name(mirror: str, *, instead_of: Path) -> Iterator[None]:
    """Errors name the place that the user gave, not its copy in the cache."""
    try:
        yield
    except TallyError as error:
        error.message = error.message.replace(str(instead_of), mirror)
        if error.hint is not None:
            error.hint = error.hint.replace(str(instead_of), mirror)
        raise


def _inside(files: Sequence[str]) -> tuple[str, ...]:
    """The files of a reference as they are in a folder that holds all of them."""
    return tuple(dict.fromkeys(Path(each).name if os.path.isabs(each) else each for each in files))  # noqa: PTH117


def _moved(ref: ModelRef, folder: Path) -> ModelRef:
    (artifacts,) = _inside([ref.artifacts])
    return replace(ref, location=folder, files=_inside(ref.files), artifacts=artifacts)


# ----------------------------------------------------------------------------------------------- mirrors


def put(name: str, store: Store, files: Iterable[tuple[str, Path]], wanted: str) -> None:
    """Write content to a mirror, the list of it last. files: names and paths; wanted: the hash that they must have.

    Raises ModelChangedError, StorageError.
    """
    named = dict(files)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        digests = dict(zip(named, pool.map(known_hash, named.values()), strict=True))
        if combined(digests.items()) != wanted:
            raise ModelChangedError(f"model {name}: it changed while it was copied to {store.url}", hint="Start again.")
        list(pool.map(store.upload, named, named.values()))
    sizes = {each: [path.stat().st_size, digests[each].hex()] for each, path in named.items()}
    store.write(CONTENTS, json.dumps({"hash": wanted, "files": sizes}).encode())


def is_whole(store: Store, wanted: str) -> bool:
    """Whether a mirror's list is there and its files have the sizes that it says."""
    listed = _listed(store, wanted)
    if listed is None:
        return False
    there = {entry.name: entry.size for entry in store.list()}
    return all(there.get(name) == size for name, (size, _) in listed.items())


def discard(store: Store) -> None:
    """Remove what :func:`put` wrote, the list of it first."""
    store.delete([CONTENTS])
    store.delete_tree()


def fetch(name: str, mirror: str, files: Sequence[str], wanted: str) -> Path:
    """The folder of the cache with the content of this hash, fetched unless it is there and right.

    name: of the model, for messages. files: what of the mirror counts; folders are taken with all that is in them.
    Raises ModelNotFoundError, ModelChangedError, StorageError.
    """
    from tally.storage import cache_folder, open_store

    store = open_store(mirror)

    def fill(folder: Path) -> None:
        copy(name, store, files, wanted, folder)

    def right(folder: Path) -> bool:
        try:
            return content_hash(folder, files) == wanted
        except OSError:
            return False

    return build(cache_folder() / "models" / wanted.removeprefix("sha256:"), right, fill)


def copy(name: str, store: Store, files: Sequence[str], wanted: str, folder: Path) -> None:
    """Copy a mirror's content to a folder, and compare it with its hash."""
    listed = _listed(store, wanted)
    damaged = ModelChangedError(
        f"model {name}: what {store.url} holds is not its content ({wanted[:19]}...)",
        hint="It was changed or damaged there. Bring the old content back, or start a new job with what is there now.",
    )
    try:
        if listed is None:
            download(store, _names(store, files), folder)
        else:
            download(store, listed, folder)
            wrong = [each for each, (_, digest) in listed.items() if known_hash(folder / each).hex() != digest]
            download(store, wrong, folder)  # once more: a connection may have been at fault
            for each in files:  # an empty folder, which no store has
                if not any(each in (".", other) or other.startswith(f"{each}/") for other in listed):
                    (folder / each).mkdir(parents=True)
        if content_hash(folder, files) != wanted:
            raise damaged
    except SourceNotFoundError as error:
        raise ModelNotFoundError(
            f"model {name}: its content is missing or incomplete at {store.url}: {error.message}",
            hint=f"It was looked for from {platform.node()}. {_EVERYWHERE}",
        ) from None


def _listed(store: Store, wanted: str) -> Mapping[str, tuple[int, str]] | None:
    """Name, size and SHA-256 of a mirror's files; None without a list of this very content."""
    try:
        listed = json.loads(store.read(CONTENTS))
        files = {name: (int(size), str(digest)) for name, (size, digest) in listed["files"].items()}
        digests = ((name, bytes.fromhex(digest)) for name, (_, digest) in files.items())
        return files if listed["hash"] == combined(digests) == wanted else None
    except SourceNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):  # not a list that Tally wrote
        return None


def _names(store: Store, files: Sequence[str]) -> list[str]:
    """Names of the objects that ``files`` stand for. Raises SourceNotFoundError for one that is not there."""
    names: list[str] = []
    for each in files:
        if each != "." and store.exists(each):
            names.append(each)
            continue
        prefix = "" if each == "." else f"{each}/"
        within = [entry.name for entry in store.list(prefix) if counts(entry.name[len(prefix) :])]
        if not within:
            raise SourceNotFoundError(f"there is no {'file' if each == '.' else repr(each)}")
        names += within
    return names


def download(store: Store, names: Iterable[str], folder: Path) -> None:
    """Copy objects to files of the same names below a folder, several at a time."""
    from tally.storage import failure

    def one(name: str) -> None:
        target = folder / _harmless(name)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            store.download(name, target)
            _protect(target)
        except StorageError:
            raise
        except OSError as error:
            raise failure("write", str(target), error, hint="TALLY_CACHE names the folder of fetched models.") from None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        waiting = [pool.submit(one, name) for name in names]
        try:
            for each in waiting:
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _harmless(name: str) -> str:
    """The name itself. Raises StorageError for one that would lead out of a folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise StorageError(f"{name!r} cannot be the name of a model's file")
    return name


# --------------------------------------------------------------------------------------------- the cache


def build(folder: Path, right: Callable[[Path], bool], fill: Callable[[Path], None]) -> Path:
    """The folder, filled unless a right one is there. It gets its name only when it is complete.

    If several processes want it at the same time, one fills it and the others wait.
    """
    if right(folder):
        return folder
    try:
        make_private(folder.parent)
        with _locked(folder.with_name(f".{folder.name}.lock")) as alone:
            if not right(folder):
                _fill(folder, right, fill, alone=alone)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot keep a model in {folder.parent}: {error.strerror or error}",
            hint="TALLY_CACHE names another folder for what is fetched.",
        ) from error
    return folder


def _fill(folder: Path, right: Callable[[Path], bool], fill: Callable[[Path], None], *, alone: bool) -> None:
    prefix = f".{folder.name}-"
    if alone:  # left by killed processes
        for each in folder.parent.glob(f"{prefix}*"):
            shutil.rmtree(each, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        new = part / "new"
        new.mkdir()
        fill(new)
        for path in new.rglob("*"):
            if path.is_file():
                _protect(path)
        with suppress(FileNotFoundError):
            folder.rename(part / "old")
        try:
            new.rename(folder)
        except OSError:  # where no locks can be had, another was faster
            if not right(folder):
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _protect(path: Path) -> None:
    """Let nobody write to a file by mistake."""
    mode = path.stat().st_mode
    if mode & 0o222:
        path.chmod(mode & 0o555)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock among the processes of this machine; False where the file system has none.

    A process that ends, even by kill -9, gives it back. The file is there only while a process wants the lock.
    """
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            os.close(descriptor)
            yield False
            return
        except BaseException:
            os.close(descriptor)
            raise
        try:
            same = os.path.samestat(os.fstat(descriptor), path.stat())
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(descriptor)  # its last holder removed it while we waited
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
