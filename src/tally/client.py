"""A server's jobs, models, schedules, watches and queues from Python: ``tally.Client(url, key=...)``."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar
from urllib.parse import quote, urlsplit

from pydantic import TypeAdapter, ValidationError

from tally import errors
from tally.alerts.alert import Alert
from tally.errors import (
    JobExistsError,
    JobNotFoundError,
    RefusedError,
    ServerAwayError,
    SourceNotFoundError,
    SpecError,
    TallyError,
)
from tally.jobs.printed import Printed
from tally.jobs.states import ENDED, State
from tally.models.registry import ModelVersion, RegisteredModel
from tally.network import is_loopback
from tally.pipelines.store import RunState as PipelineState
from tally.server.api.views import (
    AddedWatch,
    AuditEntry,
    CurveView,
    DeadItem,
    DeadList,
    EndpointView,
    Figures,
    JobDetail,
    JobList,
    JobView,
    KeyView,
    Lines,
    Me,
    MessageView,
    NewKey,
    NodeView,
    PipelineDetail,
    PipelineList,
    Replayed,
    ResultFile,
    RowPage,
    RunDetail,
    RunList,
    ScheduleDetail,
    StepLog,
    SweepDetail,
    SweepList,
    WatchDetail,
)
from tally.server.auth.roles import Role
from tally.server.uploads import Upload
from tally.sources.queues.base import Depth
from tally.storage import temporary
from tally.text import expanded
from tally.training.runs.store import RunState
from tally.triggers.store import Run, Schedule
from tally.triggers.watch import Watch

if TYPE_CHECKING:
    import httpx2

SERVER, KEY = "TALLY_SERVER", "TALLY_KEY"
"""The environment variables with the server's address and the key."""

TRIES = 4
"""How often a request is sent whose answer does not come."""
SILENCE_SECONDS = 40.0
"""After which a stream of events counts as lost: the server says something every 15 s."""
_PAGE = 1000
_ARROW_ROWS = 1_000_000
_ID = re.compile(r"[0-9a-z]{1,32}")
_NO_DOTS = {".": "%2E", "..": "%2E%2E"}

Answer = TypeVar("Answer")


class Client:
    """What can be done on a server, with the words of :class:`tally.jobs.facade.Jobs`.

    url: such as ``https://tally.example.com``; by default what ``TALLY_SERVER`` says. key: what ``tally keys add`` has
    printed; by default what ``TALLY_KEY`` says. timeout: seconds that an answer may take to begin.

    ``job`` is a job's id, the beginning of it, or the place that it writes to. Places in what is submitted are those
    of the server's machine. Every method raises the error that the server met with, as the same class of
    :mod:`tally.errors`; RefusedError if the key does not allow that; ServerAwayError if the server does not answer. A
    request whose answer was lost is sent again, and carried out once. Methods may be called from several threads.
    """

    def __init__(self, url: str | None = None, *, key: str | None = None, timeout: float = 60.0) -> None:
        import httpx2

        url, key = url or os.environ.get(SERVER), key or os.environ.get(KEY)
        problems = []
        if not url:
            problems.append(f"no server: give its address, or set {SERVER}")
        elif not _is_address(url):
            problems.append(f"{url!r} is no address of a server, such as https://tally.example.com")
        if not key:
            problems.append(f"no key for the server: give one, or set {KEY}")
        elif not re.fullmatch(r"[\x21-\x7e]+", key.strip()):
            problems.append("the key holds characters that no key has")
        if problems or not url or not key:
            raise SpecError(problems, hint="An admin makes keys: tally keys add NAME --role operator")
        self.url = url.rstrip("/")
        self._http = httpx2.Client(
            base_url=f"{self.url}/api/v1/",
            headers={"Authorization": f"Bearer {key.strip()}", "User-Agent": "tally-client"},
            timeout=timeout,
            follow_redirects=False,  # the key goes to this server only
            trust_env=not is_loopback(urlsplit(self.url).hostname or ""),
        )

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the connections."""
        self._http.close()

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def submit(self, *, overwrite: bool = False, **fields: Any) -> JobView:
        """Have a new job started. fields: those of a job file, ``source``, ``model`` and ``out`` among them.

        The job waits until the server has room. overwrite: score again, over the results of the same job.
        """
        return self._post(JobView, "jobs", _plain(fields), params={"overwrite": overwrite})

    def get(self, job: str) -> JobDetail:
        """Everything about a job."""
        return self._get(JobDetail, f"jobs/{self._id(job)}")

    def list(
        self,
        *,
        state: State | None = None,
        model: str | None = None,
        out: str | None = None,
        text: str | None = None,
        since: float | None = None,
        until: float | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> JobList:
        """A page of jobs, newest first: those that match all given filters. after: ``next`` of the page before."""
        asked = {
            "state": state, "model": model, "out": out, "text": text, "since": since, "until": until, "after": after,
            "limit": limit,
        }  # fmt: skip
        return self._get(JobList, "jobs", params=asked)

    def follow(self, job: str) -> Iterator[JobView]:
        """The job whenever something about it has changed, until it has ended; also over restarts of the server.

        Raises JobNotFoundError if it is deleted meanwhile.
        """
        job_id, last, tries = self._id(job), None, 0
        while True:
            try:
                for name, data in self._events(f"jobs/{job_id}/events"):
                    tries = 0
                    if name == "deleted":
                        raise JobNotFoundError(f"job {job_id} was deleted")
                    view = _read(JobView, data)
                    if view != last:
                        yield view
                    last = view
            except ServerAwayError:
                tries += 1
                if tries >= 2 * TRIES:
                    raise
                _pause(tries)
                continue
            if last is not None and last.state in (*ENDED, "failed") and not last.alive and not last.starting:
                return

    def pause(self, job: str) -> JobView:
        """Hand out nothing more until the job is resumed. What runs is finished and saved."""
        return self._post(JobView, f"jobs/{self._id(job)}/pause")

    def resume(self, job: str, **options: Any) -> JobView:
        """Go on with a job that was paused or interrupted, or has failed. options: ``workers``, ``device``, limits."""
        return self._post(JobView, f"jobs/{self._id(job)}/resume", _plain(options) or None)

    def retry(self, job: str) -> JobView:
        """Replay the dead items of a job that has ended."""
        return self._post(JobView, f"jobs/{self._id(job)}/retry")

    def cancel(self, job: str) -> JobView:
        """Stop the job for good, and remove what it had not finished writing."""
        return self._post(JobView, f"jobs/{self._id(job)}/cancel")

    def delete(self, job: str) -> None:
        """Forget a job that nobody drives; finished results stay where they are."""
        self._send("DELETE", f"jobs/{self._id(job)}")

    def dead(self, job: str) -> Iterator[DeadItem]:
        """The dead items, in the source's order."""
        job_id, offset = self._id(job), 0
        while True:
            page = self._get(DeadList, f"jobs/{job_id}/dead", params={"offset": offset, "limit": _PAGE})
            yield from page.dead
            if page.next is None:
                return
            offset = page.next

    def printed(self, job: str, *, lines: int = 100) -> Printed:
        """The last lines that the job's coordinator and its workers wrote on the server's machine."""
        return self._get(Printed, f"jobs/{self._id(job)}/log", params={"lines": lines})

    def alerts(self, job: str, *, send: bool = False) -> Sequence[Alert]:
        """The rules of a job that has ended, and what was measured. send: send those that are not delivered."""
        path = f"jobs/{self._id(job)}/alerts"
        return self._post(list[Alert], f"{path}/send") if send else self._get(list[Alert], path)

    # -- results -------------------------------------------------------------------------------------------------------

    def query(self, job: str, sql: str, *, limit: int = 100_000) -> Any:
        """SQL (DuckDB's) over the views ``results`` and ``dead``, as a ``pyarrow.Table`` of at most a million rows."""
        return self._arrow(self._id(job, begun=True), sql, limit)[0]

    def results(self, job: str) -> Any:
        """All rows, as a ``pyarrow.Table``; of a job that is not finished, those committed."""
        import pyarrow as pa

        job_id, more = self._id(job, begun=True), True
        parts: list[Any] = []
        while more:
            begin = len(parts) * _ARROW_ROWS
            # One more than is asked for shows that there are more.
            sql = f"from results limit {_ARROW_ROWS + 1} offset {begin}"
            part, more = self._arrow(job_id, sql, _ARROW_ROWS)
            parts.append(part)
        return pa.concat_tables(parts, promote_options="default")

    def rows(self, job: str, *, order: Literal["source", "key"] = "source") -> Iterator[dict[str, Any]]:
        """The rows, page by page, as JSON has them: for programs without Arrow."""
        job_id, after = self._id(job, begun=True), None
        while True:
            asked = {"order": order, "after": after, "limit": _PAGE}
            page = self._get(RowPage, f"jobs/{job_id}/rows", params=asked)
            yield from page.rows
            if (after := page.next) is None:
                return

    def files(self, job: str) -> Sequence[ResultFile]:
        """The files of a job whose results are published."""
        return self._get(list[ResultFile], f"jobs/{self._id(job, begun=True)}/files")

    def download(self, job: str, name: str, target: str | Path) -> Path:
        """Write a file of the output to ``target``; cut off on the way, it goes on where it was."""
        path, target = f"jobs/{self._id(job, begun=True)}/files/{_quoted_path(name)}", Path(target)
        part, tag, tries = target.with_name(f".{target.name}.part"), "", 0
        part.unlink(missing_ok=True)
        while True:
            try:
                have = part.stat().st_size if tag else 0
                headers = {"Range": f"bytes={have}-", "If-Range": tag} if have else {}
                with self._stream("GET", path, headers=headers) as answer:
                    tag = answer.headers.get("etag", "")
                    with part.open("ab" if answer.status_code == 206 else "wb") as file:
                        for block in answer.iter_bytes():
                            file.write(block)
                            tries = 0
                part.replace(target)
                return target
            except ServerAwayError:
                tries += 1
                if tries >= TRIES:
                    raise
                _pause(tries)

    # -- models --------------------------------------------------------------------------------------------------------

    def models(self) -> Sequence[ModelVersion]:
        """Every version of every model."""
        return self._get(list[ModelVersion], "models")

    def model(self, name: str) -> RegisteredModel:
        """A model's versions, and what its aliases pointed at."""
        return self._get(RegisteredModel, f"models/{_quoted(name)}")

    def add_model(self, name: str, model: str | Path, *, alias: str | None = None, **options: Any) -> ModelVersion:
        """Add a model as the next version of ``name``.

        model: a file or a package's folder on this machine (a ``Path``, or a text that names one), which is uploaded;
        or a place that the server reaches. options: task, labels, artifacts, settings, metadata, trust.
        """
        place = str(model)
        if "://" not in place and (local := expanded(model)).exists():
            beside = local.with_name(local.name + ".yaml")
            files = [local, beside] if local.is_file() and beside.is_file() else [local]
            place = f"{self.upload(*files).place}/{local.resolve().name}"
        elif isinstance(model, Path):
            raise SourceNotFoundError(f"there is no {place}")
        body = {"model": place, "alias": alias, **_plain(options)}
        return self._post(ModelVersion, f"models/{_quoted(name)}/versions", body)

    def set_alias(self, name: str, alias: str, version: int) -> ModelVersion:
        """Point an alias at a version from now on."""
        path = f"models/{_quoted(name)}/aliases/{_quoted(alias)}"
        return _read(ModelVersion, self._send("PUT", path, json={"version": version}).content)

    def remove_alias(self, name: str, alias: str) -> ModelVersion:
        """Remove an alias; returns the version that it pointed at."""
        path = f"models/{_quoted(name)}/aliases/{_quoted(alias)}"
        return _read(ModelVersion, self._send("DELETE", path).content)

    def rollback(self, name: str, alias: str) -> ModelVersion:
        """Point an alias back at the version before."""
        return self._post(ModelVersion, f"models/{_quoted(name)}/aliases/{_quoted(alias)}/rollback")

    def tag_model(self, name: str, version: int, tags: Mapping[str, str | None]) -> ModelVersion:
        """Set tags of a version; None takes one away."""
        path = f"models/{_quoted(name)}/versions/{version:d}/tags"
        return _read(ModelVersion, self._send("PATCH", path, json={"tags": dict(tags)}).content)

    def remove_model(self, name: str, version: int) -> None:
        """Remove a version for good."""
        self._send("DELETE", f"models/{_quoted(name)}/versions/{version:d}")

    # -- endpoints -----------------------------------------------------------------------------------------------------

    def endpoints(self) -> Sequence[EndpointView]:
        """All kept endpoints."""
        return self._get(list[EndpointView], "endpoints")

    def endpoint(self, name: str) -> EndpointView:
        """What an endpoint serves, its replicas, how it has done lately, and what it served before."""
        return self._get(EndpointView, f"endpoints/{_quoted(name)}")

    def add_endpoint(self, name: str, model: str, **options: Any) -> EndpointView:
        """Keep a model online on the server's machine. options: task, labels, artifacts, settings, trust; port,
        grpc_port, replicas, drain, and the other limits of ``tally serve``."""
        return self._post(EndpointView, "endpoints", {"name": name, "model": model, **_plain(options)})

    def serve_version(self, name: str, model: str, *, share: float | None = None, **options: Any) -> EndpointView:
        """Serve another version: instead of all others, or with a share (0 to 1) of the requests beside them. options:
        as of :meth:`add_endpoint`; those of the endpoint, such as replicas, stay as they are if they are left out."""
        wanted = {"model": model, **_plain({"share": share, **options})}
        return self._post(EndpointView, f"endpoints/{_quoted(name)}/versions", wanted)

    def scale_endpoint(self, name: str, least: int, most: int | None = None) -> EndpointView:
        """Keep so many replicas, or as many as are needed between the two."""
        wanted = {"replicas": [least, least if most is None else most]}
        return self._post(EndpointView, f"endpoints/{_quoted(name)}/scale", wanted)

    def split_endpoint(
        self, name: str, split: Mapping[str, float], *, shadows: Mapping[str, float] = {}
    ) -> EndpointView:
        """Share out its requests. split: number of a version to its weight. shadows: to the share (0 to 1) of requests
        of which it gets a copy."""
        wanted = {"split": dict(split), "shadows": dict(shadows)}
        return self._post(EndpointView, f"endpoints/{_quoted(name)}/split", wanted)

    def reload_endpoint(self, name: str) -> EndpointView:
        """Look up its model again, an alias say, and serve what it is now."""
        return self._post(EndpointView, f"endpoints/{_quoted(name)}/reload")

    def roll_back_endpoint(self, name: str) -> EndpointView:
        """Serve what it served before its last change."""
        return self._post(EndpointView, f"endpoints/{_quoted(name)}/rollback")

    def endpoint_log(self, name: str, *, lines: int = 100) -> Sequence[str]:
        """The last lines that its process has printed; none where it runs on another machine."""
        return self._get(Lines, f"endpoints/{_quoted(name)}/log", params={"lines": lines}).lines

    def remove_endpoint(self, name: str) -> None:
        """Serve it no more, once it has answered what it was sent."""
        self._send("DELETE", f"endpoints/{_quoted(name)}")

    # -- runs ----------------------------------------------------------------------------------------------------------

    def runs(
        self,
        *,
        state: RunState | None = None,
        kind: str | None = None,
        sweep: str | None = None,
        text: str | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> RunList:
        """A page of the trainings, newest first."""
        wanted = {"state": state, "kind": kind, "sweep": sweep, "text": text, "after": after, "limit": limit}
        return self._get(RunList, "runs", params=_plain(wanted))

    def run(self, run: str) -> RunDetail:
        """All that is known of a training, by its id or the beginning of it."""
        return self._get(RunDetail, f"runs/{_quoted(run)}")

    def run_values(self, run: str, metrics: Sequence[str] = (), *, most: int = 1000) -> dict[str, CurveView]:
        """The values of a training's metrics, at most so many of each; of all metrics, if none is named."""
        params = {"metric": list(metrics), "most": most}
        return self._get(dict[str, CurveView], f"runs/{_quoted(run)}/values", params=params)

    def delete_run(self, run: str, *, keep_files: bool = False) -> None:
        """Forget a training, with its files if the server's Tally has made their folder."""
        self._send("DELETE", f"runs/{_quoted(run)}", params={"keep_files": keep_files})

    # -- sweeps --------------------------------------------------------------------------------------------------------

    def sweeps(self, *, after: str | None = None, limit: int = 50) -> SweepList:
        """A page of the sweeps, newest first."""
        return self._get(SweepList, "sweeps", params=_plain({"after": after, "limit": limit}))

    def sweep(self, sweep: str) -> SweepDetail:
        """All that is known of a sweep, with its trials, by its id or the beginning of it."""
        return self._get(SweepDetail, f"sweeps/{_quoted(sweep)}")

    def delete_sweep(self, sweep: str) -> None:
        """Forget a sweep, with the runs of its trials and all files. What was registered stays."""
        self._send("DELETE", f"sweeps/{_quoted(sweep)}")

    # -- pipelines -----------------------------------------------------------------------------------------------------

    def pipelines(
        self,
        *,
        state: PipelineState | None = None,
        text: str | None = None,
        since: float | None = None,
        until: float | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> PipelineList:
        """A page of the runs of pipelines, newest first: those that match all given filters."""
        wanted = {"state": state, "text": text, "since": since, "until": until, "after": after, "limit": limit}
        return self._get(PipelineList, "pipelines", params=_plain(wanted))

    def pipeline(self, run: str) -> PipelineDetail:
        """A run with its steps and what waits for a person, by its id, the beginning of it, or its name."""
        return self._get(PipelineDetail, f"pipelines/{_quoted(run)}")

    def pipeline_logs(self, run: str, step: str | None = None, *, lines: int = 100) -> Sequence[StepLog]:
        """The last lines that each step has printed, or that ``step`` has: a name of it, or of its template."""
        return self._get(list[StepLog], f"pipelines/{_quoted(run)}/logs", params=_plain({"step": step, "lines": lines}))

    def resume_pipeline(
        self, run: str, values: Mapping[str, str] | None = None, *, step: str | None = None
    ) -> Sequence[NodeView]:
        """Go on with a run that waits or was interrupted, in a process of the server's machine; the steps that waited
        and go on. values: what they wait for."""
        return self._post(
            list[NodeView], f"pipelines/{_quoted(run)}/resume", {"values": dict(values or {}), "step": step}
        )

    def cancel_pipeline(self, run: str) -> None:
        """Stop a run; its exit handler is run."""
        self._send("POST", f"pipelines/{_quoted(run)}/cancel")

    def delete_pipeline(self, run: str) -> None:
        """Forget a run that nobody drives, with its logs and artifacts."""
        self._send("DELETE", f"pipelines/{_quoted(run)}")

    # -- schedules -----------------------------------------------------------------------------------------------------

    def schedules(self) -> Sequence[ScheduleDetail]:
        """All schedules, each with its next interval and its last run."""
        return self._get(list[ScheduleDetail], "schedules")

    def schedule(self, name: str, *, limit: int = 10) -> ScheduleDetail:
        """A schedule, its next intervals, and its last ``limit`` runs."""
        return self._get(ScheduleDetail, f"schedules/{_quoted(name)}", params={"limit": limit})

    def add_schedule(self, name: str, job: Mapping[str, Any], *, cron: str | None = None, **options: Any) -> Schedule:
        """Run a job, a training, a pipeline or a clean-up on time. job: the fields of its file. cron: needed, but of a
        CronWorkflow. options: timezone, overlap, catch_up, since, replace."""
        wanted = {"name": name, "job": _plain(job), **_plain({"cron": cron, **options})}
        return self._post(Schedule, "schedules", wanted)

    def pause_schedule(self, name: str) -> Schedule:
        """Start no new runs; what is running continues."""
        return self._post(Schedule, f"schedules/{_quoted(name)}/pause")

    def resume_schedule(self, name: str) -> Schedule:
        """Start runs again."""
        return self._post(Schedule, f"schedules/{_quoted(name)}/resume")

    def run_schedule(self, name: str, *, again: bool = False) -> Run:
        """Run the newest interval that is over now. again: also if it is finished already."""
        return self._post(Run, f"schedules/{_quoted(name)}/run", params={"again": again})

    def remove_schedule(self, name: str) -> None:
        """Forget a schedule; jobs, trainings and results stay."""
        self._send("DELETE", f"schedules/{_quoted(name)}")

    # -- watches -------------------------------------------------------------------------------------------------------

    def watches(self) -> Sequence[WatchDetail]:
        """All watches, and what they have seen."""
        return self._get(list[WatchDetail], "watches")

    def watch(self, name: str, *, limit: int = 10) -> WatchDetail:
        """A watch, and what it has seen: its counts, and the newest ``limit`` objects with their jobs."""
        return self._get(WatchDetail, f"watches/{_quoted(name)}", params={"limit": limit})

    def add_watch(self, name: str, place: str, job: Mapping[str, Any], **options: Any) -> AddedWatch:
        """Start a job for each new object in a place. options: pattern, exclude, parallel, existing."""
        return self._post(AddedWatch, "watches", {"name": name, "place": place, "job": _plain(job), **_plain(options)})

    def pause_watch(self, name: str) -> Watch:
        """Take nothing more, for a while."""
        return self._post(Watch, f"watches/{_quoted(name)}/pause")

    def resume_watch(self, name: str) -> Watch:
        """Go on; what has come meanwhile is taken."""
        return self._post(Watch, f"watches/{_quoted(name)}/resume")

    def remove_watch(self, name: str) -> None:
        """Forget a watch; its jobs stay."""
        self._send("DELETE", f"watches/{_quoted(name)}")

    # -- queues --------------------------------------------------------------------------------------------------------

    def queue_depth(self, url: str) -> Depth:
        """How many messages wait, are in hand, and are dead."""
        return self._get(Depth, "queues/depth", params={"url": url})

    def queue_messages(self, url: str, *, limit: int = 10, dead: bool = False) -> Sequence[MessageView]:
        """The oldest messages; they stay where they are."""
        asked = {"url": url, "limit": limit, "dead": dead}
        return self._get(list[MessageView], "queues/messages", params=asked)

    def replay_queue(self, url: str, *, limit: int = 1000) -> int:
        """Put dead messages back into the queue; how many it were."""
        return self._post(Replayed, "queues/replay", {"url": url, "limit": limit}).replayed

    # -- uploads, keys, figures ----------------------------------------------------------------------------------------

    def upload(self, *paths: str | Path) -> Upload:
        """Bring files along, or folders with all that is in them. The answer's ``place`` may be a job's source."""
        found = [expanded(each) for each in paths]
        if any(each.is_dir() for each in found):
            with temporary.folder("upload") as folder:
                archive = folder / "files.zip"
                _pack(found, archive)
                return self._upload([archive], unpack=True)
        return self._upload(found, unpack=False)

    def me(self) -> Me:
        """Whose key this is."""
        return self._get(Me, "me")

    def keys(self) -> Sequence[KeyView]:
        """All keys, newest first."""
        return self._get(list[KeyView], "keys")

    def add_key(self, name: str, role: Role, *, days: float | None = None) -> NewKey:
        """A new key; its text is in this answer only."""
        return self._post(NewKey, "keys", {"name": name, "role": role, "days": days})

    def revoke_key(self, key: str) -> KeyView:
        """Refuse the key of this id from now on."""
        return self._post(KeyView, f"keys/{_quoted(key)}/revoke")

    def audit(self, *, before: int | None = None, limit: int = 100) -> Sequence[AuditEntry]:
        """Who changed what, the newest first. before: the last id of the page before."""
        return self._get(list[AuditEntry], "audit", params={"before": before, "limit": limit})

    def figures(self) -> Figures:
        """How much the server has to do, and what it costs."""
        return self._get(Figures, "figures")

    # -- requests ------------------------------------------------------------------------------------------------------

    def _id(self, job: str, *, begun: bool = False) -> str:
        """The id of a job that is given by its id, the beginning of it, or the place that it writes to. begun: of those
        that write to a place, rather one whose results may be there."""
        if is_id(job):
            return job
        there = [each for each in self.list(out=job).jobs if each.state != "cancelled"]
        # Results of an earlier job stay while the next one waits.
        for each in [each for each in there if begun and each.kind is not None] + there:
            return each.id
        raise JobNotFoundError(f"no job {job!r}", hint="'tally jobs list' shows the jobs there are.")

    def _get(self, kind: type[Answer], path: str, *, params: Mapping[str, Any] | None = None) -> Answer:
        return _read(kind, self._send("GET", path, params=params).content)

    def _post(
        self, kind: type[Answer], path: str, body: Any = None, *, params: Mapping[str, Any] | None = None
    ) -> Answer:
        return _read(kind, self._send("POST", path, json=body, params=params).content)

    def _upload(self, paths: Sequence[Path], *, unpack: bool) -> Upload:
        def files(stack: ExitStack) -> Any:
            try:
                return [("files", (each.name, stack.enter_context(each.open("rb")))) for each in paths]
            except OSError as error:
                raise SourceNotFoundError(f"cannot read {error.filename}: {error.strerror}") from None

        answer = self._send("POST", "uploads", params={"unpack": unpack}, files=files)
        return _read(Upload, answer.content)

    def _arrow(self, job_id: str, sql: str, limit: int) -> tuple[Any, bool]:
        import pyarrow as pa

        answer = self._send("POST", f"jobs/{job_id}/query", json={"sql": sql, "limit": limit, "format": "arrow"})
        return pa.ipc.open_stream(io.BytesIO(answer.content)).read_all(), answer.headers.get("x-truncated") == "true"

    def _send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Any = None,
        files: Callable[[ExitStack], Any] | None = None,
    ) -> httpx2.Response:
        """The answer to a request, which is sent again where none comes. Raises what the server says went wrong."""
        headers = {"Idempotency-Key": secrets.token_urlsafe(16)} if method == "POST" else {}
        given: list[tuple[str, str | int | float | bool | None]] = [
            (name, _param(each))
            for name, value in (params or {}).items()
            if value is not None
            for each in (value if isinstance(value, (list, tuple)) else [value])
        ]
        for number in range(1, TRIES + 1):
            try:
                with ExitStack() as stack, self._answering():
                    more = {} if files is None else {"files": files(stack)}
                    answer = self._http.request(method, path, params=given, json=json, headers=headers, **more)
                break
            except ServerAwayError:
                if number == TRIES:
                    raise
                _pause(number)
        self._check(answer)
        return answer

    @contextmanager
    def _stream(self, method: str, path: str, **options: Any) -> Iterator[httpx2.Response]:
        with self._answering(), self._http.stream(method, path, **options) as answer:
            if answer.is_error:
                answer.read()
            self._check(answer)
            yield answer

    def _events(self, path: str) -> Iterator[tuple[str, str]]:
        """Name and data of each server-sent event."""
        with self._stream("GET", path, timeout=SILENCE_SECONDS) as answer:
            name, data = "", []
            for line in answer.iter_lines():
                field, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if field == "event":
                    name = value
                elif field == "data":
                    data.append(value)
                elif not line:
                    if data:
                        yield name, "\n".join(data)
                    name, data = "", []

    @contextmanager
    def _answering(self) -> Iterator[None]:
        import httpx2

        try:
            yield
        except httpx2.TransportError as error:
            why = str(error) or type(error).__name__
            hint = "Check the address, and that 'tally up' runs there."
            raise ServerAwayError(f"{self.url} does not answer: {why}", hint=hint) from None
        except httpx2.HTTPError as error:
            raise TallyError(f"{self.url} cannot be asked: {error}") from None

    def _check(self, answer: httpx2.Response) -> None:
        if answer.is_success:
            return
        try:
            problem = json.loads(answer.content)["error"]
            kind, message, hint = str(problem["type"]), str(problem["message"]), problem.get("hint")
        except (ValueError, TypeError, LookupError):
            raise ServerAwayError(
                f"{self.url} answered {answer.status_code}, and not as a server of Tally does",
                hint="Is it the right address?",
            ) from None
        raise _error(kind, message, hint, problem, answer)


def _error(
    kind: str, message: str, hint: str | None, problem: Mapping[str, Any], answer: httpx2.Response
) -> TallyError:
    found = getattr(errors, kind, None)
    if found is SpecError:
        return SpecError(problem.get("problems") or message, hint=hint)
    if found is JobExistsError:
        return JobExistsError(message, job_id=str(problem.get("job", "")), hint=hint)
    if found is RefusedError:
        after = answer.headers.get("retry-after", "")
        return RefusedError(
            answer.status_code, message, hint=hint, retry_after=float(after) if after.isdecimal() else None
        )
    if isinstance(found, type) and issubclass(found, TallyError):
        return found(message, hint=hint)
    return TallyError(message, hint=hint)


def _read(kind: type[Answer], content: str | bytes) -> Answer:
    try:
        return TypeAdapter(kind).validate_json(content)
    except ValidationError as error:
        raise ServerAwayError(f"the server's answer is not understood: {error.errors()[0]['msg']}") from None


def is_id(job: str) -> bool:
    """Whether the text may be a job's id, or the beginning of one."""
    return _ID.fullmatch(job) is not None


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc and url.isprintable()
        )
    except ValueError:
        return False


def _quoted(name: str) -> str:
    """A name as a part of a path; dots alone would be a step."""
    return _NO_DOTS.get(name, quote(name, safe=""))


def _quoted_path(name: str) -> str:
    return "/".join(map(_quoted, name.split("/")))


def _param(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    """Fields as JSON knows them; those that are None are left out."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, os.PathLike) else value


def _pack(paths: Sequence[Path], archive: Path) -> None:
    """Put files, and folders under their names, into an archive; hidden files are left out."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED, strict_timestamps=False) as packed:
        for path in paths:
            if path.is_file():
                packed.write(path, path.name)
            for each in sorted(path.rglob("*")):
                name = each.relative_to(path)
                if each.is_file() and not any(part.startswith(".") for part in name.parts):
                    packed.write(each, f"{path.resolve().name}/{name.as_posix()}")


def _pause(number: int) -> None:
    time.sleep(0.2 * 2**number)
