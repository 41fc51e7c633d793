"""``tally endpoints``: kept endpoints, which outlive commands and crashes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tally.cli import installation, values
from tally.cli.console import say, table
from tally.errors import EndpointError, SpecError
from tally.text import local_time

if TYPE_CHECKING:
    from tally.deploy.base import Fleet, Status
    from tally.serving.deployments import Deployment, EndpointSpec

F = TypeVar("F", bound=Callable[..., Any])
WAIT_SECONDS = 600.0


@click.group()
def endpoints() -> None:
    """Endpoints that are kept: 'tally deploy' makes them, and 'tally up' keeps them alive."""


def _at_target(command: F) -> F:
    """Options that say where endpoints are."""
    options = (
        click.option("--namespace", help="Kubernetes: the namespace.  [default: the context's]"),
        click.option("--context", help="Kubernetes: the kubeconfig's context.  [default: its current one]"),
        click.option(
            "--target", default="local", show_default=True, metavar="local|kubernetes", help="Where they are."
        ),
    )
    for option in options:
        command = option(command)
    return command


def _fleet(target: str, context: str | None, namespace: str | None) -> Fleet | None:
    """The endpoints at a target; None for those that are kept."""
    where = {"context": context, "namespace": namespace}
    if target == "local":
        if wrong := [name for name, value in where.items() if value is not None]:
            raise SpecError([f"--{name} is for --target kubernetes" for name in wrong])
        return None
    from tally.deploy import targets

    installation.check_here(f"endpoints --target {target}")
    return targets.fleet(target, **where)


@endpoints.command("list", short_help="All endpoints, here or on a cluster.")
@_at_target
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_(target: str, context: str | None, namespace: str | None, as_json: bool) -> None:
    """List all endpoints: those that are kept, or those that 'tally deploy' made in a namespace of a cluster."""
    fleet = _fleet(target, context, namespace)
    if fleet is not None:
        with fleet:
            _list_fleet(fleet, as_json=as_json)
        return
    found = installation.deployments().list()
    if as_json:
        for each in found:
            say(json.dumps(_view(each)))
        return
    rows = [
        (each.name, each.state, _shares(each.spec), _replicas(each), each.url or "-", local_time(each.changed_at))
        for each in found
    ]
    table(("ENDPOINT", "STATE", "VERSIONS", "REPLICAS", "URL", "CHANGED"), rows)


@endpoints.command(short_help="What NAME serves, and how.")
@click.argument("name")
@_at_target
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def show(name: str, target: str, context: str | None, namespace: str | None, as_json: bool) -> None:
    """Show what endpoint NAME serves, its replicas, and what can be called."""
    fleet = _fleet(target, context, namespace)
    if fleet is not None:
        with fleet:
            _show_status(fleet.get(name), as_json=as_json)
        return
    found = installation.deployments().get(name)
    if as_json:
        say(json.dumps(_view(found)))
        return
    say(f"{found.name}: {found.state}, revision {found.revision} of {local_time(found.changed_at)}")
    if error := found.observed.get("error"):
        say(f"  {error}")
    for number, version in found.spec.versions.items():
        share = found.spec.split.get(number, 0.0)
        shadow = found.spec.shadows.get(number)
        what = f"{share:g} %" + (f", a copy of {shadow:.0%}" if shadow else "")
        say(f"  version {number}: {version.model} ({what})")
    for pool in found.observed.get("pools", ()) if found.alive else ():
        for each in pool["replicas"]:
            say(f"  replica {each['pid']} of version {pool['version']}: {each['state']}, {each['requests']} requests")
    if found.url:
        say(f"  scoring_uri: {found.url}/score")
        say(f"  swagger_uri: {found.url}/swagger.json")
    if found.grpc:
        say(f"  grpc: {found.grpc}")


@endpoints.command(short_help="Keep N replicas of NAME.")
@click.argument("name")
@click.argument("replicas", callback=values.replicas, metavar="N")
@click.option("--no-wait", is_flag=True, help="Do not wait until it is so.")
def scale(name: str, replicas: tuple[int, int], no_wait: bool) -> None:
    """Keep N replicas of endpoint NAME; or 0..4, as many as are needed."""
    _settle(installation.deployments().scale(name, replicas, who=_who()), wait=not no_wait)


@endpoints.command("reload", short_help="Look up NAME's model again.")
@click.argument("name")
@click.option("--no-wait", is_flag=True, help="Do not wait until it is served.")
def reload_(name: str, no_wait: bool) -> None:
    """Look up the model of endpoint NAME again, an alias say, and serve what it is now.

    Of several versions that is the one with the largest share, which it keeps, as the others keep theirs.
    Requests that the old version has been given are answered by it.
    """
    _settle(installation.deployments().reload(name, who=_who()), wait=not no_wait)


@endpoints.command(short_help="Serve what NAME served before.")
@click.argument("name")
@click.option("--no-wait", is_flag=True, help="Do not wait until it is served.")
def rollback(name: str, no_wait: bool) -> None:
    """Serve what endpoint NAME served before its last change."""
    _settle(installation.deployments().roll_back(name, who=_who()), wait=not no_wait)


@endpoints.command(short_help="Share out NAME's requests.")
@click.argument("name")
@click.argument("shares", nargs=-1, required=True, metavar="VERSION=SHARE...")
@click.option("--shadow", "shadows", multiple=True, metavar="VERSION=SHARE", help="Gets copies, e.g. 3=0.1.")
@click.option("--no-wait", is_flag=True, help="Do not wait until it is so.")
def split(name: str, shares: tuple[str, ...], shadows: tuple[str, ...], no_wait: bool) -> None:
    """Share out the requests to endpoint NAME that name no version, e.g. 1=90 2=10.

    A version with the share 0 gets none and ends. The header X-Tally-Version chooses one.
    """
    found, copied = _numbers(shares, "shares"), _numbers(shadows, "--shadow")
    _settle(installation.deployments().share_out(name, found, copied, who=_who()), wait=not no_wait)


@endpoints.command(short_help="What NAME's process has printed.")
@click.argument("name")
@click.option("-n", "--lines", type=click.IntRange(1, 100_000), default=50, show_default=True, help="How many lines.")
def logs(name: str, lines: int) -> None:
    """Print the last lines that the process of endpoint NAME has printed, and its replicas."""
    printed = installation.deployments().printed(name, lines=lines)
    if not printed:
        raise EndpointError(f"nothing that endpoint {name} has printed is on {installation.place()}")
    for line in printed:
        say(line)


@endpoints.command(short_help="Serve NAME no more.")
@click.argument("name")
@_at_target
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(name: str, target: str, context: str | None, namespace: str | None, yes: bool) -> None:
    """Serve endpoint NAME no more, once it has answered what it was sent.

    On a cluster, what 'tally deploy' made for it is deleted, and nothing else: the Secret with its keys stays.
    """
    fleet = _fleet(target, context, namespace)
    if fleet is not None:
        with fleet:
            parts = fleet.parts(name)
            if not yes:
                click.confirm(f"Delete {', '.join(parts)} in {fleet.place}?", abort=True)
            for each in fleet.delete(name):
                say(f"deleted {each}")
        return
    store = installation.deployments()
    store.get(name)
    if not yes:
        click.confirm(f"Serve {name} no more?", abort=True)
    store.delete(name)
    say(f"endpoint {name} is served no more")


def _list_fleet(fleet: Fleet, *, as_json: bool) -> None:
    found = fleet.list()
    if as_json:
        for each in found:
            say(json.dumps(asdict(each)))
        return
    rows = [
        (
            each.name, _state(each), f"{each.ready} of {each.wanted}", each.model or "-", each.version or "-",
            each.image or "-",
        )
        for each in found
    ]  # fmt: skip
    table(("ENDPOINT", "STATE", "REPLICAS", "MODEL", "VERSION", "IMAGE"), rows)


def _show_status(found: Status, *, as_json: bool) -> None:
    if as_json:
        say(json.dumps(asdict(found)))
        return
    say(f"{found.name}: {_state(found)}, {found.ready} of {found.wanted} replicas ready")
    for each in found.problems:
        say(f"  {each}")
    version = f" (version {found.version})" if found.version else ""
    for what, text in (("model", found.model + version), ("image", found.image), ("profile", found.profile)):
        if text:
            say(f"  {what}: {text}")
    for what, uri in found.uris.items():
        say(f"  {what}: {uri}")


def _state(found: Status) -> str:
    return "ready" if found.ready >= found.wanted and not found.problems else "not ready"


def _settle(changed: Deployment, *, wait: bool) -> None:
    from tally.serving.launch import settled

    store = installation.deployments()
    started = installation.restarted(store, changed.name)
    if wait:
        changed = settled(store, changed.name, changed.revision, WAIT_SECONDS, started)
    say(f"endpoint {changed.name}: {changed.state}, {_shares(changed.spec)}, revision {changed.revision}")


def _numbers(pairs: tuple[str, ...], what: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for pair in pairs:
        number, equals, share = pair.partition("=")
        try:
            found[number] = float(share.removesuffix("%"))
        except ValueError:
            equals = ""
        if not equals:
            raise SpecError(f"{what}: {pair!r} is not VERSION=SHARE, as in 2=10")
    return found


def _shares(spec: EndpointSpec) -> str:
    total = sum(spec.split.values())
    told = [f"{number}: {share / total:.0%}" for number, share in spec.split.items() if share]
    told += [f"{number}: a copy of {share:.0%}" for number, share in spec.shadows.items() if share]
    return ", ".join(told)


def _replicas(deployment: Deployment) -> str:
    spec = deployment.spec
    versions = {number for shares in (spec.split, spec.shadows) for number, share in shares.items() if share}
    least, most = (each * len(versions) for each in spec.limits.replicas)  # of each version
    wanted = str(least) if least == most else f"{least}..{most}"
    ready = sum(pool["ready"] for pool in deployment.observed.get("pools", ())) if deployment.alive else 0
    return f"{ready} of {wanted}"


def _view(deployment: Deployment) -> dict[str, Any]:
    return {
        "name": deployment.name,
        "state": deployment.state,
        "url": deployment.url,
        "grpc": deployment.grpc,
        "revision": deployment.revision,
        "changed_at": deployment.changed_at,
        "changed_by": deployment.changed_by,
        "versions": {number: each.model for number, each in deployment.spec.versions.items()},
        "split": dict(deployment.spec.split),
        "shadows": dict(deployment.spec.shadows),
        "replicas": list(deployment.spec.limits.replicas),
        "observed": dict(deployment.observed) if deployment.alive else {},
        "error": deployment.observed.get("error"),
        "at": time.time(),
    }


def _who() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):  # nobody of that number is known
        return ""
