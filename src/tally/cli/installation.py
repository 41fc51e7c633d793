"""Where commands work: on this machine's installation, or on a server (``tally --server URL --key ...``).

Commands get jobs, models and the rest from here, and do not know which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import subprocess

    import sqlalchemy as sa

    from tally.client import Client
    from tally.deploy.base import S, Target
    from tally.engines.base import Engine
    from tally.jobs.facade import Jobs
    from tally.jobs.spec import JobSpec
    from tally.models.registry import Registry
    from tally.pipelines.facade import Pipelines
    from tally.server.auth.keys import KeyStore
    from tally.serving.deployments import DeploymentStore
    from tally.sources.queues.base import Queue
    from tally.training.runs.store import RunStore
    from tally.training.sweeps.store import SweepStore
    from tally.triggers.store import ScheduleStore
    from tally.triggers.watch import WatchStore

_CLIENT = "tally.client"
HERE_ONLY = (
    "demo",
    "train",
    "tensorboard",
    "up",
    "new",
    "simulate",
    "doctor",
    "inject",
    "serve",
    "predict",
    "load",
)
"""Commands that are about this machine."""


@dataclass(frozen=True, slots=True, repr=False)
class Server:
    """The server that commands are for. key: None where the environment has it."""

    url: str
    key: str | None


def use(server: Server, command: str | None) -> None:
    """Have the command work on a server. Raises UsageError if it cannot."""
    if command in HERE_ONLY:
        raise click.UsageError(
            f"'tally {command}' works on this machine and not on a server: leave --server out, and unset TALLY_SERVER"
        )
    click.get_current_context().obj = server


def jobs() -> Jobs:
    """All jobs."""
    if (client := _client()) is not None:
        from tally.cli.remote import RemoteJobs

        return RemoteJobs(client)
    from tally.jobs.facade import Jobs

    return Jobs()


def registry() -> Registry:
    """All models."""
    if (client := _client()) is not None:
        from tally.cli.remote import RemoteRegistry

        return RemoteRegistry(client)
    from tally.models.registry import open_registry

    return open_registry()


def schedules() -> ScheduleStore:
    """All schedules."""
    if (client := _client()) is not None:
        from tally.cli.remote import RemoteSchedules

        return RemoteSchedules(client)
    from tally.triggers.store import ScheduleStore

    return ScheduleStore(_database())


def watches() -> WatchStore:
    """All watches."""
    if (client := _client()) is not None:
        from tally.cli.remote import RemoteWatches

        return RemoteWatches(client)
    from tally.triggers.watch import WatchStore

    return WatchStore(_database())


def deployments() -> DeploymentStore:
    """All kept endpoints."""
    if (client := _client()) is not None:
        from tally.cli.remote import RemoteEndpoints

        return RemoteEndpoints(client)
    from tally.serving.deployments import DeploymentStore

    return DeploymentStore(_database())


def deployment(kind: type[Target[S]], spec: S) -> Target[Any]:
    """The endpoint at its target. Raises UsageError for a target that this machine reaches and a server does not."""
    if (client := _client()) is None:
        return kind(spec)
    from tally.cli.remote_deploy import ServerTarget
    from tally.deploy.local import LocalSpec

    if not isinstance(spec, LocalSpec):
        check_here(f"deploy --target {kind.name}")
        return kind(spec)
    return ServerTarget(spec, client)


def check_here(words: str) -> None:
    """Raises UsageError where a command is for a server that only this machine can carry out."""
    if _server() is not None:
        raise click.UsageError(
            f"'tally {words}' works from this machine, with what reaches it from here: leave --server out, and unset "
            "TALLY_SERVER"
        )


def restarted(store: DeploymentStore, name: str) -> subprocess.Popen[bytes] | None:
    """A process for the endpoint, where none serves it; none if a server sees to that."""
    if _server() is not None:
        return None
    from tally.serving.launch import restart_if_down

    return restart_if_down(store, name)


def place() -> str:
    """Where commands work, for messages."""
    server = _server()
    return "this machine" if server is None else f"the machine of {server.url}"


def keys() -> KeyStore:
    """All keys of the server."""
    if (client := _client()) is not None:
        from tally.cli.remote import RemoteKeys

        return RemoteKeys(client)
    from tally.server.auth.keys import KeyStore

    return KeyStore(_database())


def queue(url: str, opened: Callable[[str], Queue]) -> Queue:
    """The queue of the URL; on this machine, by ``opened``."""
    if (client := _client()) is not None:
        from tally.cli.remote import RemoteQueue

        return RemoteQueue(client, url)
    return opened(url)


def runs() -> RunStore:
    """All trainings."""
    if (client := _client()) is not None:
        from tally.cli.remote_runs import RemoteRuns

        return RemoteRuns(client)
    from tally.training.runs.store import RunStore

    return RunStore(_database())


def sweeps() -> SweepStore:
    """All sweeps."""
    if (client := _client()) is not None:
        from tally.cli.remote_runs import RemoteSweeps

        return RemoteSweeps(client)
    from tally.training.sweeps.store import SweepStore

    return SweepStore(_database())


def pipelines() -> Pipelines:
    """All runs of pipelines."""
    if (client := _client()) is not None:
        from tally.cli.remote_runs import RemotePipelines

        return RemotePipelines(client)
    from tally.pipelines.facade import open_pipelines

    return open_pipelines()


@contextmanager
def prestarted(spec: JobSpec) -> Iterator[Engine | None]:
    """Workers that start while the command still prepares the job; none if a server will run it."""
    if _server() is not None:
        yield None
        return
    from tally.jobs.prestart import prestarted

    with prestarted(spec) as engine:
        yield engine


def _server() -> Server | None:
    context = click.get_current_context(silent=True)
    return None if context is None else context.find_object(Server)


def _client() -> Client | None:
    server = _server()
    if server is None:
        return None
    from tally.client import Client

    context = click.get_current_context().find_root()
    if _CLIENT not in context.meta:
        context.meta[_CLIENT] = client = Client(server.url, key=server.key)
        context.call_on_close(client.close)
    found: Client = context.meta[_CLIENT]
    return found


def _database() -> sa.Engine:
    from tally.config import settings
    from tally.database.connect import connect

    return connect(settings().database)
