"""Models on the web: fetched once, kept under their checksum."""

from __future__ import annotations

import hashlib
import re
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tally.config import settings
from tally.errors import ModelChangedError, ModelNotFoundError, SpecError, StorageError
from tally.scorers.content import file_hash


def download(url: str) -> Path:
    """The local copy of ``https://host/path/model.onnx#sha256=...``.

    Raises SpecError, saying which checksum to append, where the URL has none; ModelChangedError where
    the content is another one; ModelNotFoundError, StorageError.
    """
    parts = urlsplit(url)
    if parts.scheme != "https":
        raise SpecError(f"models come from https:// URLs, not {parts.scheme}://: {url}")
    name = unquote(parts.path).rpartition("/")[2]
    if Path(name).suffix.lower() not in (".onnx", ".py"):
        raise SpecError(f"the URL must name an .onnx or .py file, not {name!r}: {url}")
    wanted = parts.fragment.removeprefix("sha256=").lower()
    if parts.fragment and not re.fullmatch(r"sha256=[0-9A-Fa-f]{64}", parts.fragment):
        raise SpecError(f"the URL must end in #sha256= and 64 hexadecimal digits, not #{parts.fragment}")
    folder = settings().home / "downloads"
    plain = url.partition("#")[0]
    if not wanted:
        found = _fetch(plain, folder, name)
        raise SpecError(
            f"the URL does not say which content is expected: {plain}",
            hint=f"If what is there now is right, write {plain}#sha256={found}",
        )
    kept = folder / wanted / name
    if not kept.is_file() or file_hash(kept).hex() != wanted:
        found = _fetch(plain, folder, name)
        if found != wanted:
            raise ModelChangedError(
                f"{plain} has the content sha256={found}, not sha256={wanted}",
                hint="Its publisher changed it, or what came is not the model (an error page, say).",
            )
    return kept


def _fetch(url: str, folder: Path, name: str) -> str:
    """Download to ``folder/<sha256>/name``; returns the checksum."""
    digest = hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            part = Path(temporary) / name
            with urllib.request.urlopen(url, timeout=60) as response, part.open("wb") as file:  # noqa: S310 - https
                while block := response.read(1 << 20):
                    digest.update(block)
                    file.write(block)
            kept = folder / digest.hexdigest() / name
            kept.parent.mkdir(exist_ok=True)
            part.replace(kept)
    except urllib.error.URLError as error:
        raise ModelNotFoundError(f"cannot download {url}: {getattr(error, 'reason', error)}") from error
    except OSError as error:
        raise StorageError(f"cannot download {url} to {folder}: {error}") from error
    return digest.hexdigest()
