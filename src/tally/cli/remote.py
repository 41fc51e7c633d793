"""Jobs, models, endpoints, schedules, watches, queues and keys of a server, with the methods of those of this machine.

What only the server's own machine can do says so: all of that asks for the database, which is not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tally.alerts.alert import Alert
from tally.client import Client, is_id
from tally.errors import JobError, JobNotFoundError, JobStateError, SpecError, TallyError
from tally.jobs.events import Events
from tally.jobs.facade import Jobs, may_be_place
from tally.jobs.follow import Follower
from tally.jobs.outbox import Pushes
from tally.jobs.printed import Printed
from tally.jobs.spec import JobSpec, absolute, is_in_home, settled
from tally.jobs.states import NOTHING_LEFT, State
from tally.jobs.store import JobPage, JobRecord, Part
from tally.models.mirror import fetched
from tally.models.package import write_package
from tally.models.reference import ModelRef
from tally.models.registry import ModelVersion, RegisteredModel, Registry
from tally.server.api.views import EndpointView, JobDetail, JobView, KeyView
from tally.server.auth.keys import Key, KeyStore
from tally.server.auth.roles import Role
from tally.serving.deployments import Deployment, DeploymentStore, EndpointSpec, LookUp, Version
from tally.sources.queues.base import Depth, Message, Queue
from tally.storage import temporary
from tally.triggers.cron import Interval
from tally.triggers.store import Run, Schedule, ScheduleStore
from tally.triggers.watch import SEEN, Seen, Watch, WatchStore
from tally.triggers.works.base import Work

if TYPE_CHECKING:
    from tally.engines.base import Engine
    from tally.jobs.stop import Stop
    from tally.scorers.base import Scorer


def _not_here(self: object) -> NoReturn:
    raise TallyError("this works on the server's own machine only", hint="Give the command there, without --server.")


absent: Any = property(_not_here)
"""In place of the database."""


class RemoteJobs(Jobs):
    """The jobs of a server."""

    elsewhere = "on the server"
    store = starts = absent

    def __init__(self, client: Client) -> None:
        self._client = client
        self._options: dict[str, Any] = {}

    # -- making and running ------------------------------------------------------------------------

    def submit(
        self,
        spec: JobSpec,
        *,
        model: Scorer | type[Scorer] | Callable[[Any], Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
        waiting: str | None = None,
    ) -> JobRecord:
        given = settled(spec)
        if spec.push is not None and is_in_home(spec.out):  # that of the server will be another one
            given["out"] = given.pop("push")["url"]
        if resume and (earlier := self._begun_at(given["out"])) is not None:
            return earlier
        return self.get(self._client.submit(overwrite=overwrite, **given).id)

    def _begun_at(self, place: str) -> JobRecord | None:
        """The job to go on with. One that failed before it began is none: it is asked for again."""
        record = self.at(place)
        if record is None or record.state == "finished":
            return None
        return record if record.state == "waiting" or record.output["kind"] is not None else None

    def run(
        self,
        job: str,
        *,
        events: Events | None = None,
        stop: Stop | None = None,
        engine: Engine | None = None,
        retry_dead: bool = False,
        in_this_process: bool = False,
    ) -> JobRecord:
        now = self._look_up(job)[1]
        if retry_dead:
            self._client.retry(now.id)
        elif now.state in ("paused", "interrupted", "failed") and not now.starting:
            self._client.resume(now.id, **self._options)
        record = self.follow(now.id, events=events, stop=stop)
        if record.state == "failed" and not (stop is not None and stop.asked):
            raise JobError(record.error or "the job failed")
        return record

    def follow(self, job: str, *, events: Events | None = None, stop: Stop | None = None) -> JobRecord:
        follower = Follower(self, self.get(job), Events() if events is None else events, stop)

        def ended(record: JobRecord) -> JobRecord | None:
            now = self._client.get(record.id)
            return None if now.alive or now.starting else _record(now)

        return follower.until(ended)

    def runs_in_a_cluster(self, record: JobRecord) -> bool:
        return True  # it can be followed from here

    # -- asking of a job ---------------------------------------------------------------------------

    def pause(self, job: str) -> JobRecord:
        return self.get(self._client.pause(self.get(job).id).id)

    def unpause(self, job: str) -> JobRecord:
        record = self.get(job)
        if record.alive:
            self._client.resume(record.id, **self._options)
        elif record.state in ("cancelled", "finished"):
            raise JobStateError(f"job {record.id} is {record.state}", hint=NOTHING_LEFT[record.state])
        return record

    def change(self, job: str, **options: Any) -> JobRecord:
        self._options = {name: value for name, value in options.items() if value is not None}
        return self.get(job)

    def cancel(self, job: str) -> JobRecord:
        return self.get(self._client.cancel(self.get(job).id).id)

    def delete(self, job: str) -> JobRecord:
        record = self.get(job)
        self._client.delete(record.id)
        return record

    def alerts(self, job: str) -> list[Alert]:
        return list(self._client.alerts(self.get(job).id))

    def send_alerts(self, job: str) -> list[Alert]:
        return list(self._client.alerts(self.get(job).id, send=True))

    # -- looking -----------------------------------------------------------------------------------

    def get(self, job: str) -> JobRecord:
        return _record(self._look_up(job)[1])

    def _look_up(self, job: str) -> tuple[str, JobDetail]:
        """The job, and its id or place as the server knows it. What is relative is meant from here."""
        names = [each for each in (job, absolute(job)) if "/" in each or is_id(each)] if job else []
        for name in reversed(names) if may_be_place(job) else names:
            try:
                return name, self._client.get(name)
            except JobNotFoundError:
                continue
        raise JobNotFoundError(f"no job {job!r}", hint="'tally jobs list' shows the jobs there are.")

    def pushes(self, job: str) -> Pushes | None:
        return self._look_up(job)[1].pushes

    def parts(self, job: str) -> Sequence[Part]:
        return self._look_up(job)[1].parts

    def at(self, place: str) -> JobRecord | None:
        found = [each for each in self._client.list(out=place).jobs if each.state != "cancelled"]
        return self.get(found[0].id) if found else None

    def dead(self, job: str) -> Iterator[Any]:
        return self._client.dead(self.get(job).id)

    def printed(self, job: str, *, lines: int = 100) -> Printed:
        return self._client.printed(self.get(job).id, lines=lines)

    def results(self, job: str) -> Any:
        return self._client.results(self._look_up(job)[0])

    def query(self, job: str, sql: str, *, limit: int | None = None, memory: str | None = None) -> Any:
        name = self._look_up(job)[0]
        return self._client.query(name, sql) if limit is None else self._client.query(name, sql, limit=limit)

    def list(
        self,
        *,
        state: State | None = None,
        model: str | None = None,
        place: str | None = None,
        text: str | None = None,
        since: float | None = None,
        until: float | None = None,
        after: str | None = None,
        limit: int = 50,
    ) -> JobPage:
        out = None if place is None else absolute(place)
        page = self._client.list(
            state=state, model=model, out=out, text=text, since=since, until=until, after=after, limit=min(limit, 1000)
        )
        return JobPage([_record(each) for each in page.jobs], page.next)


def _record(view: JobView) -> JobRecord:
    """The job as this machine's are."""
    detail = view if isinstance(view, JobDetail) else None
    manifest = None if detail is None else detail.manifest
    return JobRecord(
        id=view.id, fingerprint="", spec={"source": view.source, "out": view.out} if detail is None else detail.spec,
        model={name: value for name, value in view.model.model_dump().items() if value is not None}
        | {"name": view.model.name, "assumed": view.assumed},
        state=view.state, wanted="run" if detail is None else detail.wanted, error=view.error, remarks=view.remarks,
        generation=0, created_at=view.created_at, started_at=view.started_at, finished_at=view.finished_at,
        owner=None, owner_host=None if detail is None else detail.driver, owner_pid=None, lease_until=None,
        plan_cursor=None, planned=view.planned, items=view.items, done=view.done, dead=view.dead, rows=view.rows,
        bytes=view.bytes, usage={**view.stages, "seconds": view.seconds}, manifest=manifest,
        output={"unit": view.unit, "kind": view.kind, "columns": None if detail is None else detail.columns},
        place=view.out.rstrip("/"), alive=view.alive,
    )  # fmt: skip


class RemoteRegistry(Registry):
    """The models of a server."""

    engine = absent

    def __init__(self, client: Client) -> None:
        self._client = client

    def add(
        self,
        name: str,
        model: ModelRef,
        *,
        alias: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        who: str | None = None,
    ) -> ModelVersion:
        ref = fetched(model)  # the server knows who asks
        with temporary.folder("package") as folder:
            write_package(ref, folder / "package")
            return self._client.add_model(
                name, folder / "package", alias=alias, metadata=dict(metadata or {}), trust=ref.trusted
            )

    def list(self) -> list[ModelVersion]:
        return list(self._client.models())

    def show(self, name: str) -> RegisteredModel:
        return self._client.model(name)

    def get(self, uri: str) -> ModelVersion:
        name, _, version = uri.removeprefix("models:/").partition("/")
        for each in self._client.model(name).versions:
            if str(each.version) == version:
                return each
        raise SpecError(f"model {name!r} has no version {version}")

    def alias(self, name: str, alias: str, version: int, *, who: str | None = None) -> ModelVersion:
        return self._client.set_alias(name, alias, version)

    def rollback(self, name: str, alias: str, *, who: str | None = None) -> ModelVersion:
        return self._client.rollback(name, alias)

    def unalias(self, name: str, alias: str, *, who: str | None = None) -> ModelVersion:
        return self._client.remove_alias(name, alias)

    def tag(self, name: str, version: int, tags: Mapping[str, str | None]) -> ModelVersion:
        return self._client.tag_model(name, version, tags)

    def remove(self, name: str, version: int) -> None:
        self._client.remove_model(name, version)

    def verify(self, name: str, version: int) -> ModelVersion:
        _not_here(self)


class RemoteSchedules(ScheduleStore):
    """The schedules of a server."""

    engine = absent

    def __init__(self, client: Client) -> None:
        self._client = client

    def clock(self) -> float:
        return self._client.figures().at

    def all(self) -> list[Schedule]:
        return [each.schedule for each in self._client.schedules()]

    def get(self, name: str) -> Schedule:
        return self._client.schedule(name).schedule

    def runs(self, name: str, *, within: Interval | None = None, limit: int | None = None) -> list[Run]:
        if within is not None:
            _not_here(self)
        return self._client.schedule(name, limit=limit or 1000).runs

    def counts(self, name: str, *, within: Interval | None = None) -> dict[str, int]:
        return self._client.schedule(name).counts

    def define(
        self,
        name: str,
        read: Callable[[], Mapping[str, Any]],
        *,
        file: str,
        cron: str | None = None,
        timezone: str | None = None,
        overlap: str | None = None,
        catch_up: str | None = None,
        since: str | None = None,
        replace: bool = False,
        allow: Callable[[Work], None] = lambda work: None,
    ) -> Schedule:
        return self._client.add_schedule(
            name, read(), file=file, cron=cron, timezone=timezone, overlap=overlap, catch_up=catch_up, since=since,
            replace=replace,
        )  # fmt: skip

    def pause(self, name: str, paused: bool) -> Schedule:
        return self._client.pause_schedule(name) if paused else self._client.resume_schedule(name)

    def remove(self, name: str) -> None:
        self._client.remove_schedule(name)


class RemoteWatches(WatchStore):
    """The watches of a server."""

    engine = absent

    def __init__(self, client: Client) -> None:
        self._client = client

    def all(self) -> list[Watch]:
        return [each.watch for each in self._client.watches()]

    def get(self, name: str) -> Watch:
        return self._client.watch(name).watch

    def counts(self, name: str) -> dict[str, int]:
        return self._client.watch(name).objects

    def seen(self, name: str, *, limit: int = SEEN) -> list[Seen]:
        return self._client.watch(name, limit=min(limit, 1000)).seen

    def add(
        self, name: str, url: str, *, pattern: str, exclude: str | None, template: Mapping[str, Any], file: str,
        parallel: int = 4, existing: bool = False,
    ) -> tuple[Watch, int]:  # fmt: skip
        added = self._client.add_watch(
            name, url, template, pattern=pattern, exclude=exclude, file=file, parallel=parallel, existing=existing
        )
        return added.watch, added.there

    def pause(self, name: str, paused: bool) -> Watch:
        return self._client.pause_watch(name) if paused else self._client.resume_watch(name)

    def delete(self, name: str) -> None:
        self._client.remove_watch(name)


class RemoteEndpoints(DeploymentStore):
    """The kept endpoints of a server."""

    _engine = absent

    def __init__(self, client: Client) -> None:
        self._client = client

    def get(self, name: str) -> Deployment:
        return _deployment(self._client.endpoint(name))

    def list(self) -> list[Deployment]:
        return [_deployment(each) for each in self._client.endpoints()]

    def scale(self, name: str, replicas: tuple[int, int], *, who: str = "") -> Deployment:
        return _deployment(self._client.scale_endpoint(name, *replicas))

    def share_out(
        self, name: str, split: Mapping[str, float], shadows: Mapping[str, float], *, who: str = ""
    ) -> Deployment:
        return _deployment(self._client.split_endpoint(name, split, shadows=shadows))

    def reload(self, name: str, *, look_up: LookUp | None = None, who: str = "") -> Deployment:
        return _deployment(self._client.reload_endpoint(name))

    def roll_back(self, name: str, *, who: str = "") -> Deployment:
        return _deployment(self._client.roll_back_endpoint(name))

    def printed(self, name: str, *, lines: int) -> Sequence[str]:
        return self._client.endpoint_log(name, lines=min(lines, 10_000))

    def delete(self, name: str) -> None:
        self._client.remove_endpoint(name)


def _deployment(view: EndpointView) -> Deployment:
    """The endpoint as this machine's are; where its models lie is the server's."""
    versions = {
        number: Version(
            each.model,
            ModelRef(each.kind, each.name, Path(), "", each.hash, version=each.version),
            each.options,
        )
        for number, each in view.versions.items()
    }
    split = {number: each.share for number, each in view.versions.items()}
    shadows = {number: each.shadow for number, each in view.versions.items() if each.shadow}
    return Deployment(
        name=view.name,
        spec=EndpointSpec(
            versions,
            split,
            view.limits,
            shadows,
            port=view.port,
            grpc_port=view.grpc_port,
            max_body=view.max_body,
            drain=view.drain,
        ),
        history=[each.model_dump() for each in view.history],
        revision=view.revision,
        created_at=view.created_at,
        changed_at=view.changed_at,
        changed_by=view.changed_by,
        observed={} if view.observed is None else view.observed.model_dump(),
        alive=view.alive,
        failures=view.failures,
    )


class RemoteKeys(KeyStore):
    """The keys of a server."""

    _engine = absent

    def __init__(self, client: Client) -> None:
        self._client = client

    def add(self, name: str, role: Role, *, days: float | None = None) -> tuple[Key, str]:
        made = self._client.add_key(name, role, days=days)
        return _key(made), made.text

    def list(self) -> list[Key]:
        return [_key(each) for each in self._client.keys()]  # noqa: SIM118 - it is no dict

    def revoke(self, key_id: str) -> Key:
        return _key(self._client.revoke_key(key_id))


def _key(view: KeyView) -> Key:
    return Key(**{each.name: getattr(view, each.name) for each in fields(Key)})


class RemoteQueue(Queue):
    """A queue that a server reaches."""

    def __init__(self, client: Client, url: str) -> None:
        self._client, self._url = client, url

    def depth(self) -> Depth:
        return self._client.queue_depth(self._url)

    def peek(self, most: int, *, dead: bool = False) -> list[Message]:
        found = self._client.queue_messages(self._url, limit=min(most, 1000), dead=dead)
        return [Message(each.body.encode(), each.headers) for each in found]

    def replay(self, most: int) -> int:
        return self._client.replay_queue(self._url, limit=min(most, 100_000))

    def receive(self, most: int, seconds: float) -> list[Message]:
        _not_here(self)

    def acknowledge(self, messages: Sequence[Message]) -> None:
        _not_here(self)

    def reject(self, rejected: Sequence[tuple[Message, str]]) -> None:
        _not_here(self)

    def send(self, messages: Sequence[Message]) -> None:
        _not_here(self)

    def close(self) -> None:
        pass  # the command closes the client
