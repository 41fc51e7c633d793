"""The output place: who holds it, what is staged in it, and how the finished result appears.

A job *claims* its output place with a file that only one can create, and stages everything below
``_tally/``. Finalizing has two steps, so that a crash at any point costs nothing but time:

1. *Assemble*: the final files are built below ``_tally/final/``, and last of all the plan
   (``_tally/manifest.json``), which is the manifest to be. Without a plan this step is simply repeated.
2. *Publish*: the files are moved to where they belong, then ``_manifest.json`` and ``_SUCCESS`` are
   written, then the staging folder is removed. Each of it can be repeated without harm.

When a finished job is opened again (``jobs retry``), ``_SUCCESS`` is removed and a new claim says which
generation is published already; its files stay as they are until the next plan is carried out.
"""

from __future__ import annotations

import json
import os
import socket
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tally.errors import OutputExistsError, StorageError
from tally.sinks.base import Output, Sink
from tally.storage import TEMPORARY, LocalStore, failure, key_of, open_store, temporary

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_BYSTANDERS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_MANY = 1000

File = dict[str, Any]
"""A finished file in the manifest: ``path``, ``rows``, ``bytes``."""


class Place:
    """Where everything of one output lies. Names are relative to :attr:`store`.

    root: the output folder; for a merged output the folder that it is in. merged: the name of that one
    file, or None. Picklable.
    """

    _confirm: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, root: str, merged: str | None = None) -> None:
        self.store = open_store(root)
        self.merged = merged
        self.staging = f"{merged}.tally/" if merged else "_tally/"
        self.manifest = f"{merged}.manifest.json" if merged else "_manifest.json"
        self.success = None if merged else "_SUCCESS"
        self.claim = self.staging + "job.json"
        self.plan = self.staging + "manifest.json"
        self.attempts = self.staging + "attempts/"
        self.final = self.staging + "final/"
        self.work = self.staging + "work/"

    def __str__(self) -> str:
        return self.address(self.merged) if self.merged else key_of(self.store.url)

    def address(self, name: str) -> str:
        """The local path or URL of a name."""
        return f"{self.store.url.rstrip('/')}/{name}"

    def part(self, number: int, suffix: str) -> str:
        """The name of a final file of rows."""
        return self.merged or f"part-{number:05d}.{suffix}"

    def dead(self, suffix: str) -> str:
        """The name of the list of dead items. Readers of a whole folder pass over names that begin with ``_``."""
        return f"{self.merged.rpartition('.')[0]}.dead.{suffix}" if self.merged else f"_dead.{suffix}"

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file, or None if it is not there."""
        try:
            text = self.store.read(name)
        except FileNotFoundError:
            return None
        try:
            content = json.loads(text)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise StorageError(
                f"{self.address(name)} is damaged: it holds no JSON object",
                hint="Restore it, or remove it together with the output it belongs to.",
            )
        return content

    def write_json(self, name: str, content: dict[str, Any], *, exclusive: bool = False) -> None:
        """Write a JSON file: keys sorted (inner ones keep their order, columns have one), indented."""
        text = json.dumps(dict(sorted(content.items())), indent=2, ensure_ascii=False, default=str)
        self.store.write(name, f"{text}\n".encode(errors="backslashreplace"), exclusive=exclusive)

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """A path of this machine to write a final file to. On leaving it is durable, and waits to be published."""
        self._confirm()
        if isinstance(self.store, LocalStore):
            path = Path(self.address(self.final + name))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                yield path
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise error if isinstance(error, StorageError) else failure("write", str(path), error) from None
            return
        with temporary.folder("final") as folder:
            path = Path(folder, name.rpartition("/")[2])
            try:
                yield path
            except OSError as error:
                raise error if isinstance(error, StorageError) else failure("write", str(path), error) from None
            self._confirm()
            self.store.upload(self.final + name, path)

    def publish(self, name: str) -> None:
        """Move a final file to its place, if that has not been done before."""
        self.move(self.final + name, name)

    @contextmanager
    def confirmed(self, confirm: Callable[[], None]) -> Iterator[None]:
        """Meanwhile, this is called before each file that is built or moved; it raises if the place is not ours."""
        self._confirm = confirm
        try:
            yield
        finally:
            del self._confirm

    def move(self, source: str, target: str) -> None:
        """Move a file that may have been moved already."""
        self._confirm()
        try:
            self.store.move(source, target)
        except FileNotFoundError:
            if not self.store.exists(target):
                raise

    def parquet(self, name: str) -> pq.ParquetFile:
        """Open a Parquet file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if isinstance(self.store, LocalStore):
                return pq.ParquetFile(self.address(name))
            return pq.ParquetFile(pa.BufferReader(self.store.read(name)))
        except StorageError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise failure("read", self.address(name), error) from None

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a Parquet file."""
        import pyarrow as pa

        with self.parquet(name) as file:
            try:
                return file.read(columns=columns)
            except (OSError, pa.ArrowException) as error:
                raise failure("read", self.address(name), error) from None

    def sweep(self) -> None:
        """Remove the staging folder, the claim last."""
        store = self.store
        self._clear()
        store.delete([self.plan])
        if isinstance(store, LocalStore):  # what killed writers left half written
            for folder in [self.staging] if self.merged else ["", self.staging]:
                for path in Path(self.address(folder)).glob(f"{TEMPORARY}*"):
                    path.unlink(missing_ok=True)
        store.delete([self.claim])
        self._close()

    def sweep_again(self) -> None:
        """Remove what was staged after the staging folder had been removed; if it is claimed, nothing."""
        if self.read_json(self.claim) is None:
            self._clear()
            self._close()

    def _clear(self) -> None:
        for folder in (self.final, self.attempts, self.work):
            self.store.delete_tree(folder)

    def _close(self) -> None:
        if isinstance(self.store, LocalStore):
            with suppress(OSError):  # it is gone, or somebody else may have claimed it meanwhile
                Path(self.address(self.staging)).rmdir()


def staged_name(attempt: str, number: int = 0, suffix: str = "parquet") -> str:
    """The name, inside the staging folder, of an attempt's file of results."""
    return f"attempts/{attempt}+{number}.{suffix}" if number else f"attempts/{attempt}.{suffix}"


def attempt_of(name: str) -> str:
    """The attempt that wrote the file of that name."""
    return name.removeprefix("attempts/").removesuffix(".parquet").partition("+")[0]


class StagedSink(Sink):
    """A sink that stages in its output place. Subclasses say how results are written and assembled.

    format: suffix of the final files of rows: ``parquet``, ``csv`` or ``jsonl``.
    """

    def __init__(self, place: Place, format: str) -> None:  # noqa: A002  # the user's word for it
        self.place = place
        self.format = format

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.place)!r}, format={self.format!r})"

    # -- what subclasses supply ---------------------------------------------------------------------

    @abstractmethod
    def _assemble(
        self, outputs: Sequence[Output], dead: Iterable[dict[str, Any]], earlier: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Build the final files; return what the manifest says of them (see docs/reference/output.md).

        ``moves`` in it, which the manifest does not say: final files that are staged ones (name to name).
        """

    def _publish(self, plan: dict[str, Any], outputs: Sequence[Output]) -> None:
        """Move the plan's files to their places. Repeatable."""
        for name in _files_of(plan):
            self.place.publish(name)

    def _listed(self, manifest: dict[str, Any]) -> Iterator[str]:
        """The names of all files that a manifest stands for."""
        return iter(_files_of(manifest))

    # -- the contract -------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any] | None:
        """``_manifest.json`` as it is, or None while nothing has been published."""
        return self.place.read_json(self.place.manifest)

    def published(self) -> int | None:
        """The generation that was published last, or None: what :meth:`finalize` is given was committed later."""
        manifest = self.manifest()
        return None if manifest is None else int(manifest["generation"])

    def claim(self, job_id: str, *, overwrite: bool = False) -> None:
        """See :meth:`Sink.claim`."""
        place = self.place
        claim = place.read_json(place.claim) or self._take(job_id, overwrite)
        if claim["job"] != job_id:
            raise OutputExistsError(
                f"{place} is being written by job {claim['job']} since {_day(claim.get('claimed_at'))}, "
                "which is not finished",
                hint=f"Resume or cancel job {claim['job']}, or choose another output.",
            )
        manifest = self.manifest()
        if manifest is not None and manifest["job"] == claim.get("replaces"):
            self._remove(manifest)
        elif manifest is not None and manifest["generation"] == claim.get("published") and place.success:
            place.store.delete([place.success])

    def finalize(
        self,
        outputs: Iterable[Output],
        dead: Iterable[dict[str, Any]],
        manifest: dict[str, Any],
        *,
        confirm: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """See :meth:`Sink.finalize`. ``outputs`` are those committed since the generation published last."""
        place = self.place
        earlier = self.manifest()
        generation = int(manifest.get("generation", 0))
        with place.confirmed(confirm):
            if earlier is None or earlier["generation"] < generation:
                outputs = list(outputs)
                plan = place.read_json(place.plan)
                if plan is None or plan["generation"] != generation:
                    claim = place.read_json(place.claim) or {}
                    plan = {
                        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
                        "job": claim.get("job"),
                        **manifest,
                        "generation": generation,
                        "layout": 1,
                        **self._assemble(outputs, dead, earlier),
                    }
                    confirm()
                    place.write_json(place.plan, plan)
                self._publish(plan, outputs)
                confirm()
                place.store.delete(set(self._dead_names()) - set(self._listed(plan)))
                place.write_json(place.manifest, {name: value for name, value in plan.items() if name != "moves"})
                earlier = place.read_json(place.manifest)
        confirm()
        if place.success:
            place.store.write(place.success, b"")
        place.sweep()
        assert earlier is not None
        return earlier

    def holder(self) -> str | None:
        """See :meth:`Sink.holder`."""
        found = self.place.read_json(self.place.claim) or self.manifest()
        return None if found is None else str(found["job"])

    def release(self) -> None:
        """See :meth:`Sink.release`. A finished output, which has no claim, is left as it is."""
        place = self.place
        if place.read_json(place.claim) is None:
            return
        manifest = self.manifest()
        plan = place.read_json(place.plan)
        if plan is not None:  # publishing had begun
            kept = set() if manifest is None else set(self._listed(manifest))
            place.store.delete(name for name in list(self._listed(plan)) if name not in kept)
        if manifest is not None and place.success:
            place.store.write(place.success, b"")
        place.sweep()

    def withdraw(self) -> None:
        """See :meth:`Sink.withdraw`."""
        self.place.sweep_again()

    def committed(self, outputs: Iterable[Output]) -> tuple[str, list[str]]:
        """See :meth:`Sink.committed`. While a CSV or JSON Lines result is being added to, what was finished before."""
        place = self.place
        claim = place.read_json(place.claim)
        manifest = self.manifest()
        final = [] if manifest is None else [file["path"] for file in manifest["files"]]
        running = claim is not None and (manifest is None or manifest["generation"] == claim.get("published"))
        if running and final and place.merged and place.store.exists(place.plan):
            # The plan's file has replaced the one that the manifest tells of once it is gone from here.
            running = place.store.exists(place.final + place.merged)
        if not running or (final and self.format != "parquet"):
            return self.format, [place.address(name) for name in final]
        there = {entry.name for entry in place.store.list(place.attempts, sizes=False)}
        moved = {name: part for part, name in ((place.read_json(place.plan) or {}).get("moves") or {}).items()}
        staged = [
            moved[name] if name in moved and place.store.exists(moved[name]) else place.staging + name
            for output in outputs
            for name in output.files
        ]
        there |= set(moved.values())
        return "parquet", [place.address(name) for name in (*final, *(name for name in staged if name in there))]

    # -- claiming -----------------------------------------------------------------------------------

    def _take(self, job_id: str, overwrite: bool) -> dict[str, Any]:
        """Create the claim, or return the one that another was faster to create."""
        place = self.place
        manifest = self._check_free(job_id, overwrite)
        claim = {
            "job": job_id,
            "claimed_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "published": manifest["generation"] if manifest and manifest["job"] == job_id else None,
            "replaces": manifest["job"] if manifest and manifest["job"] != job_id else None,
        }
        try:
            place.write_json(place.claim, claim, exclusive=True)
        except OutputExistsError:
            if (winner := place.read_json(place.claim)) is not None:
                return winner
            raise OutputExistsError(f"{place} has just been taken by another job") from None
        try:  # another job may have come and gone between the look and the claim
            if self._check_free(job_id, overwrite) != manifest:
                raise OutputExistsError(f"{place} has just been written by another job")
        except BaseException:
            place.sweep()
            raise
        return claim

    def _check_free(self, job_id: str, overwrite: bool) -> dict[str, Any] | None:
        """The manifest of a finished job that is there; an error if anything stands in the way."""
        manifest = self.manifest()
        if manifest is not None:
            if manifest["job"] == job_id:
                return manifest
            if not overwrite:
                raise OutputExistsError(
                    f"{self.place} holds the results of job {manifest['job']}, "
                    f"finished on {_day(manifest.get('finished_at'))}",
                    hint="Choose another output, or replace those results with --overwrite.",
                )
        ours = set() if manifest is None else set(self._listed(manifest))
        foreign = list(islice((name for name in self._present() if name not in ours), _MANY))
        if foreign:
            if self.place.merged:
                message = f"{self.place.address(foreign[0])} exists already, and Tally did not write it"
            else:
                count = f"{_MANY:,} files or more" if len(foreign) == _MANY else _files(len(foreign))
                message = f"{self.place} is not empty: {count}, e.g. {foreign[0]!r}"
            raise OutputExistsError(
                message, hint="Tally leaves other files alone. Choose another output, or move them away."
            )
        return manifest

    def _present(self) -> Iterator[str]:
        """Files in the output place, apart from Tally's own marks."""
        place = self.place
        if place.merged:
            return (name for name in (place.merged, *self._dead_names()) if place.store.exists(name))
        own = {place.manifest, place.success}
        staging = place.staging.rstrip("/")
        entries = place.store.list(enter=lambda folder: folder.rstrip("/") != staging, sizes=False)
        return (
            key_of(entry.name)
            for entry in entries
            if entry.name not in own and entry.name.rpartition("/")[2] not in _BYSTANDERS
        )

    def _dead_names(self) -> list[str]:
        return [self.place.dead(self.format)]

    def _remove(self, manifest: dict[str, Any]) -> None:
        """Remove exactly what a manifest stands for, itself last."""
        place = self.place
        if place.success:
            place.store.delete([place.success])
        place.store.delete(list(self._listed(manifest)))
        place.store.delete([place.manifest])


def _files_of(manifest: dict[str, Any]) -> list[str]:
    dead: File | None = manifest["dead_file"]
    return [file["path"] for file in [*manifest["files"], *([dead] if dead else [])]]


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"


def _day(moment: object) -> str:
    text = str(moment)
    with suppress(ValueError):
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M")
    return "an unknown date"
