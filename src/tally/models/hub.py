"""Models of a Hugging Face hub: ``hf:ORG/NAME@REVISION``, fetched once by whoever describes a job.

Only data comes along: settings, vocabularies and weights, no code. Each file is checked against the hash that the hub
says it has, and the folder is kept by its commit. Workers fetch nothing.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tally.errors import ModelChangedError, ModelLoadError, ModelNotFoundError, SpecError, StorageError, error_line
from tally.models.hashing import known_hash
from tally.models.mirror import build
from tally.optional import needed
from tally.storage import cache_folder

PREFIX = "hf:"
_FORM = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_DATA = ("*.json", "*.txt", "*.model", "*.safetensors")
_PICKLED = ("pytorch_model*.bin",)
"""Weights that are pickles, read as weights alone; taken where there are no others."""
_MARKS = ".tally-marks.json"
"""What a fetched folder is made of: ``{name: sha256}``."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def parsed(text: str) -> tuple[str, str | None]:
    """Repository and revision. Raises SpecError."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise SpecError(f"{text!r} is no model of a hub", hint="Write hf:ORG/NAME, or hf:ORG/NAME@REVISION.")
    return found["repository"], found["revision"]


def fetched(text: str) -> tuple[Path, str]:
    """The folder with a model of the hub, and its commit.

    ``HF_ENDPOINT`` names another hub, ``HF_TOKEN`` opens private models. Raises SpecError, ModelNotFoundError,
    ModelChangedError, ModelLoadError, StorageError.
    """
    repository, revision = parsed(text)
    root = cache_folder() / "hub"
    name = repository.partition("/")[2]
    if revision is not None and _COMMIT.fullmatch(revision):
        kept = root / f"{repository.replace('/', '--')}-{revision}"
        if _right(kept):
            return kept / name, revision
    commit, files = _listed(text, repository, revision)
    kept = root / f"{repository.replace('/', '--')}-{commit}"
    return build(kept, _right, lambda new: _fill(new / name, text, repository, commit, files)) / name, commit


def _right(folder: Path) -> bool:
    try:
        marks = json.loads((folder / _MARKS).read_text("utf-8"))
        return all(known_hash(folder / name).hex() == found for name, found in marks.items())
    except (OSError, ValueError):
        return False


def _hub() -> Any:
    with needed("models of a hub need", "transformers", ModelLoadError):
        import huggingface_hub
    return huggingface_hub


def _listed(text: str, repository: str, revision: str | None) -> tuple[str, Mapping[str, Any]]:
    """The commit, and the files to fetch, by name, as the hub describes them."""
    hub = _hub()
    try:
        api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        found = api.model_info(repository, revision=revision, files_metadata=True)
    except hub.errors.RevisionNotFoundError:
        raise ModelNotFoundError(
            f"{text}: the hub knows the model, and no revision {revision!r} of it",
            hint="A revision is a branch, a tag or a commit; without one, the newest is taken.",
        ) from None
    except hub.errors.RepositoryNotFoundError:
        raise ModelNotFoundError(
            f"{text}: the hub has no such model, or it is private", hint="HF_TOKEN says who asks."
        ) from None
    except Exception as error:
        raise _away(text, error) from None
    there = {each.rfilename: each for each in found.siblings or ()}
    wanted = {name: each for name, each in there.items() if _is_one_of(name, _DATA)}
    if not any(name.endswith(".safetensors") for name in wanted):
        wanted |= {name: each for name, each in there.items() if _is_one_of(name, _PICKLED)}
    if outside := [name for name in wanted if name.startswith("/") or ".." in name.split("/")]:
        raise ModelLoadError(f"{text}: a file of it leads out of its folder: {outside[0]!r}")
    if "config.json" not in wanted:
        raise ModelLoadError(
            f"{text}: it has no config.json, and so is no model of transformers (it has "
            f"{', '.join(sorted(there)[:4]) or 'nothing'})",
            hint="Download the file that you want and give that.",
        )
    return str(found.sha), wanted


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name.rpartition("/")[2], pattern) for pattern in patterns)


def _fill(folder: Path, text: str, repository: str, commit: str, files: Mapping[str, Any]) -> None:
    hub = _hub()
    hub.utils.disable_progress_bars()
    folder.mkdir()
    for name, described in files.items():
        try:
            hub.hf_hub_download(
                repository, name, revision=commit, local_dir=folder, endpoint=os.environ.get("HF_ENDPOINT")
            )
        except Exception as error:
            raise _away(text, error) from None
        _check(folder / name, described, text)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    marks = {f"{folder.name}/{name}": known_hash(folder / name).hex() for name in files}
    (folder.parent / _MARKS).write_text(json.dumps(marks), "utf-8")


def _check(path: Path, described: Any, text: str) -> None:
    """Raises ModelChangedError unless a file has the hash that the hub says it has."""
    if described.lfs is not None:
        wanted, found = described.lfs.sha256, known_hash(path).hex()
    else:  # as git names it
        content = path.read_bytes()
        wanted = described.blob_id
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    if wanted != found:
        raise ModelChangedError(
            f"{text}: {path.name} has not the content that the hub says it has ({found}, not {wanted})",
            hint="Try again; what came is not the file (a proxy's page, say), or was damaged on its way.",
        )


def _away(text: str, error: Exception) -> StorageError:
    return StorageError(
        f"{text}: the hub does not answer: {error_line(error)[:300]}",
        hint="Is it reached from here? HF_ENDPOINT names another one; a model that is on this machine is given by its "
        "folder, or by a whole commit: hf:ORG/NAME@COMMIT.",
    )
