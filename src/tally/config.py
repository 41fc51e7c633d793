"""Settings of this installation, read from the environment when asked for."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tally.errors import SpecError
from tally.masking import has_secret, mask
from tally.text import expanded

_AT = re.compile(r"postgresql(\+\w+)?://[^@]*@[^/?]*@")
_SCHEME = re.compile(r"(sqlite|postgresql)(\+\w+)?://")

SECRETS = "TALLY_SECRETS"
"""The environment variable with a folder whose files are secrets, each called as the variable that it stands for."""
_OF_BUCKETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_KEY",
)


def variable(name: str) -> str | None:
    """An environment variable; where it is not set, the content of the file of that name in the folder of secrets.

    Containers are given such folders. The file is read anew each time, so a secret that is changed there counts without
    a restart. Raises SpecError for a file that cannot be read.
    """
    if (given := os.environ.get(name)) or not (folder := os.environ.get(SECRETS)) or not name.isidentifier():
        return given
    try:
        return Path(folder, name).read_text("utf-8").strip()
    except FileNotFoundError:
        return given
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"the secret {name} in {folder} ({SECRETS}) cannot be read: {error}") from None


def credentials(prefix: str = "") -> dict[str, str]:
    """Credentials of buckets that are kept as files in the folder of secrets, by the variable that each stands for."""
    names = (each for each in _OF_BUCKETS if each.startswith(prefix) and not os.environ.get(each))
    return {name: value for name in names if (value := variable(name))}


@dataclass(frozen=True, slots=True, repr=False)
class Settings:
    """Where Tally keeps its state.

    home: folder of the database, the registry's content and downloads (``TALLY_HOME``).
    database: SQLAlchemy URL of jobs and registry (``TALLY_DATABASE``, also a file in ``TALLY_SECRETS``).
    registry: folder or bucket URL of the registry's content (``TALLY_REGISTRY``).
    """

    home: Path
    database: str
    registry: str

    def log_of(self, job_id: str) -> Path:
        """The file of what the job's workers print: scripts, native libraries, warnings. Its folder is created."""
        folder = self.home / "logs"
        make_private(folder)
        return folder / f"{job_id}.log"

    def coordinator_log_of(self, job_id: str) -> Path:
        """The file of what a coordinator that a server started prints."""
        return self.home / "logs" / f"{job_id}.coordinator.log"

    def endpoint_log_of(self, name: str) -> Path:
        """The file of what the process that serves an endpoint prints, and its replicas."""
        return self.home / "logs" / f"endpoint-{name}.log"

    def __repr__(self) -> str:
        return f"Settings(home={str(self.home)!r}, database={mask(self.database)!r}, registry={mask(self.registry)!r})"


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for this user only. Raises OSError."""
    for each in reversed([folder, *folder.parents]):
        if not each.is_dir():
            each.mkdir(mode=0o700, exist_ok=True)


def append_private(path: Path) -> BinaryIO:
    """A file to append to, which only this user can read; its folder is made. Raises OSError."""
    make_private(path.parent)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")


def settings() -> Settings:
    """The settings that the environment gives now. Raises SpecError with every problem that there is."""
    problems = []
    if given := os.environ.get("TALLY_HOME"):
        home = expanded(given).absolute()
    else:
        from platformdirs import user_data_path

        home = user_data_path("tally")
    if _is_no_folder(home):
        problems.append(f"TALLY_HOME must name a folder, but {str(home)!r} is a file")
    database = variable("TALLY_DATABASE") or f"sqlite:///{home / 'tally.db'}"
    database = re.sub(r"^postgres://", "postgresql://", database)  # libpq knows both
    if not _SCHEME.match(database):
        problems.append(f"TALLY_DATABASE must be a sqlite:/// or postgresql:// URL, not {mask(database)!r}")
    elif _AT.match(database):
        problems.append("TALLY_DATABASE: the password has an @, which is written %40 there")
    registry = os.environ.get("TALLY_REGISTRY") or str(home / "models")
    if "://" not in registry:
        path = expanded(registry).absolute()
        registry = str(path)
        if _is_no_folder(path):
            problems.append(f"TALLY_REGISTRY must name a folder or a bucket, but {registry!r} is a file")
    elif has_secret(registry):
        problems.append(f"TALLY_REGISTRY must be a URL without credentials, not {mask(registry)!r}")
    if problems:
        raise SpecError(problems, hint="Correct the environment, or unset the variable to get the default.")
    return Settings(home, database, registry)


def _is_no_folder(path: Path) -> bool:
    """Whether something else is there, as far as it can be seen."""
    try:
        return path.exists() and not path.is_dir()
    except OSError:  # whoever uses it says so
        return False
