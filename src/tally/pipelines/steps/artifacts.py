"""Artifacts of steps: where they come from, and where they are kept.

An artifact of a run is kept in the run's folder as the file or folder that it is; whether a cluster would pack it is of
no consequence to who reads it. One with a key alone is in this installation's repository; one with a bucket, there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tally.errors import StorageError
from tally.pipelines.options import Keys
from tally.pipelines.steps.errors import ArtifactError, MissingError
from tally.pipelines.steps.room import Room
from tally.pipelines.values import Artifact

HTTP_SECONDS = 60.0
_BLOCK = 1 << 20


class Artifacts:
    """folder: of the run. repository: of this installation."""

    def __init__(self, folder: Path, repository: Path, keys: Keys) -> None:
        self._folder, self._repository, self._keys = folder, repository, keys

    def give(self, artifact: Artifact, inside: str, room: Room, scratch: Path) -> None:
        """Put an artifact into a step's room. Raises MissingError, ArtifactError."""
        source = self._fetched(artifact, scratch)
        if sub := artifact.get("subPath"):
            found = (source / str(sub)).resolve()
            if not found.is_relative_to(source.resolve()):
                raise ArtifactError(f"the subPath {sub!r} leads out of the artifact")
            source = found
        if not source.exists():
            raise MissingError(f"there is no {artifact.get('subPath') or inside} in the artifact")
        room.put(source, inside)
        if (mode := artifact.get("mode")) is not None:
            target = room.at(inside)
            target.chmod(int(mode))
            if artifact.get("recurseMode"):
                for each in target.rglob("*"):
                    if not each.is_symlink():
                        each.chmod(int(mode))

    def _fetched(self, artifact: Artifact, scratch: Path) -> Path:
        if "at" in artifact:
            return Path(artifact["at"])
        scratch.mkdir(parents=True, exist_ok=True)
        target = scratch / "fetched"
        if "raw" in artifact:
            target.write_text(artifact["raw"].get("data", ""), "utf-8")
            return target
        if "http" in artifact:
            self._download(artifact["http"], target)
        elif "s3" in artifact:
            place = artifact["s3"]
            if not place.get("bucket"):
                kept = self._in_repository(place.get("key", ""))
                if not kept.exists():
                    raise MissingError(f"there is nothing under the key {place.get('key')!r}")
                return kept
            from tally.pipelines.steps import s3

            s3.download(place, self._keys, target)
        else:
            raise MissingError("nothing says where it is")
        return _unpacked(target, scratch / "unpacked", artifact.get("archive") or {})

    @staticmethod
    def _download(http: Mapping[str, Any], target: Path) -> None:
        import httpx2

        headers = {each["name"]: each.get("value", "") for each in http.get("headers", ())}
        try:
            with httpx2.stream(
                "GET", http["url"], headers=headers, timeout=HTTP_SECONDS, follow_redirects=True
            ) as answer:
                if answer.status_code == 404:
                    raise MissingError(f"{http['url']} is not there (404)")
                answer.raise_for_status()
                with target.open("wb") as file:
                    for block in answer.iter_bytes():
                        file.write(block)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ArtifactError(f"{http['url']}: {error}") from None

    def _in_repository(self, key: str) -> Path:
        path = (self._repository / key).resolve()
        if not key or not path.is_relative_to(self._repository.resolve()) or path == self._repository.resolve():
            raise ArtifactError(f"{key!r} is no key")
        return path

    def keep(self, artifact: Mapping[str, Any], room: Room, node: str) -> dict[str, Any]:
        """Keep what a step has left; where it is then. Raises MissingError, ArtifactError."""
        inside = artifact["path"]
        try:
            source = room.found(inside)
        except ValueError as error:
            raise ArtifactError(str(error)) from None
        if source is None:
            raise MissingError(f"the artifact {artifact['name']!r}: the step left nothing at {inside}")
        target = self._folder / "artifacts" / node / str(artifact["name"])
        own = str(source).startswith(str(room.root) + os.sep)
        try:
            _put(source, target, link=own)
            kept: dict[str, Any] = {"at": str(target), "hash": digest(target)}
            place = artifact.get("s3")
            if place and not place.get("bucket"):
                _put(target, self._in_repository(place.get("key", "")), link=False)
            elif place:
                from tally.pipelines.steps import s3

                s3.upload(target, place, self._keys, artifact.get("archive") or {})
        except (OSError, StorageError) as error:
            raise ArtifactError(f"the artifact {artifact['name']!r} cannot be kept: {error}") from None
        return kept


def _put(source: Path, target: Path, *, link: bool) -> None:
    """Copy a file or a folder, in place of what is there. link: what is copied is not used any more."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(target.name + ".new")
    for each in (new, target) if new.exists() else (new,):
        _remove(each)
    if source.is_dir():
        shutil.copytree(source, new, symlinks=True, copy_function=_linked if link else shutil.copy2)
    else:
        (_linked if link else shutil.copy2)(str(source), str(new))
    _remove(target)
    new.rename(target)


def _linked(source: str, target: str) -> str:
    if not stat.S_ISREG(mode := os.lstat(source).st_mode) and not stat.S_ISLNK(mode):
        raise ArtifactError(f"{source} is neither a file nor a folder nor a link")
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target, follow_symlinks=False)
    return target


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def _unpacked(file: Path, target: Path, archive: Mapping[str, Any]) -> Path:
    """What is in an archive, as Argo unpacks it: of tar and gzip, whether that is said or seen; of nothing else. A
    single file or folder in it stands for itself."""
    if "none" in archive or file.is_dir():
        return file
    if not _is_packed(file):
        if "tar" in archive:
            raise ArtifactError("it cannot be unpacked: it is no tar file in gzip")
        return file
    try:
        with tarfile.open(file, "r:gz") as tar:
            tar.extractall(target, filter="data")
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ArtifactError(f"it cannot be unpacked: {error}") from None
    inside = list(target.iterdir())
    return inside[0] if len(inside) == 1 else target


def _is_packed(file: Path) -> bool:
    """Whether it is a tar file in gzip that has something in it."""
    try:
        with tarfile.open(file, "r:gz") as tar:
            return tar.next() is not None
    except (OSError, EOFError, zlib.error, tarfile.TarError):
        return False


def digest(path: Path) -> str:
    """A hash of a file's or a folder's content."""
    found = hashlib.blake2b(digest_size=16)
    files = sorted(each for each in path.rglob("*")) if path.is_dir() else [path]
    for each in files:
        found.update(
            f"{each.relative_to(path)}\0{'l' if each.is_symlink() else 'd' if each.is_dir() else 'f'}\0".encode()
        )
        if each.is_symlink():
            found.update(str(each.readlink()).encode("utf-8", "surrogateescape"))
        elif each.is_file():
            with each.open("rb") as file:
                while block := file.read(_BLOCK):
                    found.update(block)
    return found.hexdigest()
