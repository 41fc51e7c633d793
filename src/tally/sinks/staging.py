"""Outputs that stage their files: who holds the output, what is staged, and how results are published.

A job *claims* its output with a file that only one job can create, and stages everything below ``_tally/``.
A generation of results is published in two steps, so that a crash at any point costs nothing but time:

1. *Assemble*: build the final files below ``_tally/final/``, and at last the plan (``_tally/manifest.json``), which
   will be the manifest. Without a plan, this step is repeated.
2. *Move*: move the files to their places, then write ``_manifest.json``. Each of that can be repeated.

Then ``_SUCCESS`` is written and the staging folder is removed. If the job goes on instead, only what this generation
staged is removed, and the claim notes that it is published.

When a finished job is opened again (``jobs retry``), a new claim notes which generation is published. Its files and
``_SUCCESS`` stay as they are until the next plan is carried out: a retry never takes away what was there.
"""

from __future__ import annotations

import shutil
import socket
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from tally.errors import OutputExistsError, StorageError, TallyError
from tally.sinks.base import THUMBNAILS, Output, Sink
from tally.sinks.layout import File, OutputLayout
from tally.storage import key_of

_BYSTANDERS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_MANY = 1000
_PLAN_ONLY = ("moves", "staged")
"""Fields of a plan that the manifest does not have."""


class StagedSink(Sink):
    """A sink that stages its files in the output. Subclasses say how results are written and assembled.

    format: suffix of the final files of rows: ``parquet``, ``csv`` or ``jsonl``.
    """

    def __init__(self, layout: OutputLayout, format: str) -> None:  # noqa: A002  # the user's word for it
        self.layout = layout
        self.format = format

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.layout)!r}, format={self.format!r})"

    # -- what subclasses supply ---------------------------------------------------------------------

    @abstractmethod
    def assemble(
        self, outputs: Sequence[Output], dead: Iterable[dict[str, Any]], earlier: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Build the final files. Returns what the manifest says about them; see docs/reference/output.md.

        Besides, ``moves``: for final files that are staged files as they are, final name to staged name.
        """

    def _move_files(self, plan: dict[str, Any], outputs: Sequence[Output]) -> None:
        """Move the files of a plan to their places. Repeatable."""
        for name in _files_of(plan):
            self.layout.publish(name)

    def listed(self, manifest: dict[str, Any]) -> Iterator[str]:
        """The names of all files that belong to a manifest."""
        return iter(_files_of(manifest))

    def _retire(self, staged: Sequence[str]) -> None:
        """Remove staged files that are published. Repeatable."""
        self.layout.store.delete([self.layout.staging + name for name in staged])

    # -- the contract -------------------------------------------------------------------------------

    @property
    def work(self) -> str:
        return self.layout.address(self.layout.work).rstrip("/")

    @property
    def rolling(self) -> bool:
        """A folder can gain files. One file would have to be written anew each time."""
        return self.layout.merged is None

    def manifest(self) -> dict[str, Any] | None:
        """``_manifest.json`` as it is, or None while nothing has been published."""
        return self.layout.read_json(self.layout.manifest)

    @property
    def claimed(self) -> bool:
        """See :attr:`Sink.claimed`."""
        return self.layout.read_json(self.layout.claim) is not None

    @property
    def publishing(self) -> bool:
        """See :attr:`Sink.publishing`."""
        return self.layout.read_json(self.layout.plan) is not None

    def published(self) -> int | None:
        """The generation that was published last, or None."""
        manifest = self.manifest()
        return None if manifest is None else int(manifest["generation"])

    def claim(self, job_id: str, *, overwrite: bool = False) -> None:
        """See :meth:`Sink.claim`."""
        layout = self.layout
        claim = layout.read_json(layout.claim) or self._take(job_id, overwrite)
        if claim["job"] != job_id:
            raise OutputExistsError(
                f"{layout} is being written by job {claim['job']} since {_day(claim.get('claimed_at'))}, "
                "which is not finished",
                hint=f"Resume or cancel job {claim['job']}, or choose another output.",
            )
        manifest = self.manifest()
        if manifest is not None and manifest["job"] == claim.get("replaces"):
            self._remove(manifest)

    def finalize(
        self,
        outputs: Iterable[Output],
        dead: Iterable[dict[str, Any]],
        manifest: dict[str, Any],
        *,
        confirm: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """See :meth:`Sink.finalize`. ``outputs`` are those committed since the generation published last."""
        layout = self.layout
        with layout.confirmed(confirm):
            published = self._carry_out(outputs, dead, manifest)
        confirm()
        if layout.success:
            layout.store.write(layout.success, b"")
        layout.sweep()
        return published

    def publish(
        self,
        outputs: Iterable[Output],
        dead: Iterable[dict[str, Any]],
        manifest: dict[str, Any],
        *,
        confirm: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """See :meth:`Sink.publish`."""
        if not self.rolling:
            return super().publish(outputs, dead, manifest, confirm=confirm)
        with self.layout.confirmed(confirm):
            self._tidy_up(confirm)  # after a crash
            published = self._carry_out(outputs, dead, manifest)
            self._tidy_up(confirm)
        return published

    def _carry_out(
        self, outputs: Iterable[Output], dead: Iterable[dict[str, Any]], manifest: dict[str, Any]
    ) -> dict[str, Any]:
        """Assemble and publish a generation, unless that is done. Returns the manifest."""
        layout = self.layout
        earlier = self.manifest()
        generation = int(manifest.get("generation", 0))
        if earlier is not None and earlier["generation"] >= generation:
            return earlier
        outputs = list(outputs)
        plan = layout.read_json(layout.plan)
        if plan is None or plan["generation"] != generation:
            claim = layout.read_json(layout.claim) or {}
            plan = {
                "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "job": claim.get("job"),
                **manifest,
                "generation": generation,
                "layout": 1,
                **self._assembled(outputs, dead, earlier),
                **self._with_log(),
                "staged": [name for output in outputs for name in _staged(output)],
            }
            layout.confirm()
            layout.write_json(layout.plan, plan)
        self._move_files(plan, outputs)
        layout.confirm()
        layout.store.delete(set(self._dead_names()) - set(self.listed(plan)))
        layout.write_json(layout.manifest, {name: value for name, value in plan.items() if name not in _PLAN_ONLY})
        published = self.manifest()
        assert published is not None
        return published

    def _with_log(self) -> dict[str, Any]:
        """The log as one of the final files, and what the manifest says of it."""
        if self.log is None:
            return {}
        with self.layout.create(self.layout.log) as path:
            shutil.copyfile(self.log, path)
        return {"log_file": {"path": self.layout.log}}

    def read(self, name: str) -> bytes:
        """See :meth:`Sink.read`."""
        return self.layout.store.read(name)

    def _assembled(
        self, outputs: Sequence[Output], dead: Iterable[dict[str, Any]], earlier: dict[str, Any] | None
    ) -> dict[str, Any]:
        """As :meth:`assemble`; says so if staged files are gone."""
        try:
            return self.assemble(outputs, dead, earlier)
        except (OSError, TallyError):
            names = (self.layout.staging + name for output in outputs for name in _staged(output))
            gone = [name for name in names if not self.layout.store.exists(name)]
            if not gone:
                raise
            raise StorageError(
                f"what was scored is no longer there: {_files(len(gone))}, e.g. {self.layout.address(gone[0])}",
                hint="Bring back what was removed, or score again with --overwrite.",
            ) from None

    def _tidy_up(self, confirm: Callable[[], None]) -> None:
        """Remove what a published generation staged, and note in the claim that it is published.

        In this order: until the claim is written, readers read the final files only, and see nothing twice.
        """
        layout = self.layout
        plan, manifest = layout.read_json(layout.plan), self.manifest()
        if plan is None or manifest is None or plan["generation"] > manifest["generation"]:
            return
        confirm()
        self._retire(plan.get("staged", []))
        layout.store.delete_tree(layout.final)
        claim = layout.read_json(layout.claim)
        if claim is not None and claim.get("published") != manifest["generation"]:
            confirm()
            layout.write_json(layout.claim, {**claim, "published": manifest["generation"]})
        layout.store.delete([layout.plan])

    def holder(self) -> str | None:
        """See :meth:`Sink.holder`."""
        found = self.layout.read_json(self.layout.claim) or self.manifest()
        return None if found is None else str(found["job"])

    def release(self) -> None:
        """See :meth:`Sink.release`. A finished output has no claim, and stays as it is."""
        layout = self.layout
        if layout.read_json(layout.claim) is None:
            return
        manifest = self.manifest()
        plan = layout.read_json(layout.plan)
        if plan is not None:  # publishing had begun
            kept = set() if manifest is None else set(self.listed(manifest))
            layout.store.delete(name for name in list(self.listed(plan)) if name not in kept)
        if manifest is not None and layout.success:
            layout.store.write(layout.success, b"")
        layout.sweep()

    def withdraw(self) -> None:
        """See :meth:`Sink.withdraw`."""
        self.layout.sweep_again()

    def committed(self, outputs: Iterable[Output]) -> tuple[str, list[str]]:
        """See :meth:`Sink.committed`. While CSV or JSON Lines results are being added to, only those published."""
        layout = self.layout
        claim = layout.read_json(layout.claim)
        manifest = self.manifest()
        final = [] if manifest is None else [file["path"] for file in manifest["files"]]
        running = claim is not None and (manifest is None or manifest["generation"] == claim.get("published"))
        if running and final and layout.merged and layout.store.exists(layout.plan):
            # Once the plan's file is gone from here, it has replaced the one of the manifest.
            running = layout.store.exists(layout.final + layout.merged)
        if not running or (final and self.format != "parquet"):
            return self.format, [layout.address(name) for name in final]
        staged = self.still_staged(final, (name for output in outputs for name in output.files))
        return "parquet", [layout.address(name) for name in (*final, *staged)]

    def still_staged(self, final: Sequence[str], names: Iterable[str]) -> list[str]:
        """Where staged files of those names are now, which may be their places in the output already, or gone.

        final: files that are published.
        """
        layout = self.layout
        there = {entry.name for entry in layout.store.list(layout.attempts, sizes=False)}
        moved = {name: part for part, name in ((layout.read_json(layout.plan) or {}).get("moves") or {}).items()}
        there |= set(moved.values()) - set(final)
        now = (
            moved[name] if name in moved and layout.store.exists(moved[name]) else layout.staging + name
            for name in names
        )
        return [name for name in now if name in there]

    # -- claiming -----------------------------------------------------------------------------------

    def _take(self, job_id: str, overwrite: bool) -> dict[str, Any]:
        """Create the claim. If another job is faster, return its claim."""
        layout = self.layout
        manifest = self._check_free(job_id, overwrite)
        claim = {
            "job": job_id,
            "claimed_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "published": manifest["generation"] if manifest and manifest["job"] == job_id else None,
            "replaces": manifest["job"] if manifest and manifest["job"] != job_id else None,
        }
        try:
            layout.write_json(layout.claim, claim, exclusive=True)
        except OutputExistsError:
            if (winner := layout.read_json(layout.claim)) is not None:
                return winner
            raise OutputExistsError(f"{layout} has just been taken by another job") from None
        try:  # another job may have come and gone meanwhile
            if self._check_free(job_id, overwrite) != manifest:
                raise OutputExistsError(f"{layout} has just been written by another job")
        except BaseException:
            layout.sweep()
            raise
        return claim

    def _check_free(self, job_id: str, overwrite: bool) -> dict[str, Any] | None:
        """The manifest that may stay or be replaced, if any. Raises OutputExistsError if anything is in the way."""
        manifest = self.manifest()
        if manifest is not None:
            if manifest["job"] == job_id:
                return manifest
            if not overwrite:
                raise OutputExistsError(
                    f"{self.layout} holds the results of job {manifest['job']}, "
                    f"finished on {_day(manifest.get('finished_at'))}",
                    hint="Choose another output, or replace those results with --overwrite.",
                )
        ours = set() if manifest is None else set(self.listed(manifest))
        foreign = list(islice((name for name in self._present() if name not in ours), _MANY))
        if foreign:
            if self.layout.merged:
                message = f"{self.layout.address(foreign[0])} exists already, and Tally did not write it"
            else:
                count = f"{_MANY:,} files or more" if len(foreign) == _MANY else _files(len(foreign))
                message = f"{self.layout} is not empty: {count}, e.g. {foreign[0]!r}"
            raise OutputExistsError(
                message, hint="Tally leaves other files alone. Choose another output, or move them away."
            )
        return manifest

    def _present(self) -> Iterator[str]:
        """The files in the output, without Tally's own marks."""
        layout = self.layout
        if layout.merged:
            names = (layout.merged, *self._dead_names(), layout.log, layout.thumbnails(0))
            return (name for name in names if layout.store.exists(name))
        own = {layout.manifest, layout.success}
        staging = layout.staging.rstrip("/")
        entries = layout.store.list(enter=lambda folder: folder.rstrip("/") != staging, sizes=False)
        return (
            key_of(entry.name)
            for entry in entries
            if entry.name not in own and entry.name.rpartition("/")[2] not in _BYSTANDERS
        )

    def _dead_names(self) -> list[str]:
        return [self.layout.dead(self.format)]

    def _remove(self, manifest: dict[str, Any]) -> None:
        """Remove exactly the files of a manifest, and then the manifest."""
        layout = self.layout
        if layout.success:
            layout.store.delete([layout.success])
        layout.store.delete(list(self.listed(manifest)))
        layout.store.delete([layout.manifest])


def _files_of(manifest: dict[str, Any]) -> list[str]:
    beside: list[File | None] = [manifest["dead_file"], manifest.get("log_file")]
    return [file["path"] for file in (*manifest["files"], *manifest.get("thumbnails", ()), *beside) if file]


def _staged(output: Output) -> list[str]:
    """All files that belong to an output, relative to the staging folder."""
    return [*output.files, *(name for name, _, _ in output.facts.get(THUMBNAILS, ()))]


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"


def _day(moment: object) -> str:
    text = str(moment)
    with suppress(ValueError):
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M")
    return "an unknown date"
