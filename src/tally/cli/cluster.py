"""``tally cluster``: Tally on a cluster of Kubernetes, as an overlay describes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tally.cli import installation, values
from tally.cli.console import say
from tally.cli.deploy import show_changes
from tally.text import visible

if TYPE_CHECKING:
    from tally.deploy.kubernetes.installation import Installation

F = TypeVar("F", bound=Callable[..., Any])
_SIZE = re.compile(r"([a-z0-9-]+)=(\d{1,6})(?:\.\.(\d{1,6}))?")


@click.group()
def cluster() -> None:
    """Tally on a cluster of Kubernetes: plan, apply, check, scale, take away.

    An overlay of kustomize says what there is to be: one of deploy/kubernetes/overlays by its name, or a folder.
    """
    installation.check_here("cluster")


def _overlay(command: F) -> F:
    return click.option("--overlay", required=True, metavar="NAME|FOLDER", help="What there is to be.")(command)


def _context(command: F) -> F:
    return click.option("--context", help="The kubeconfig's context.  [default: its current one]")(command)


@contextmanager
def _opened(overlay: str, context: str | None, *, force: bool = False) -> Iterator[Installation]:
    from tally.deploy.kubernetes.overlay import Overlay
    from tally.optional import needed

    with needed("a cluster needs", "kubernetes"):
        from tally.deploy.kubernetes.installation import Installation
        from tally.kubernetes import Cluster
    found = Overlay.find(overlay)
    reached = Cluster(context, found.namespace)
    try:
        yield Installation(found, reached, force=force)
    finally:
        reached.close()


def _show_left(found: Installation) -> None:
    for each in found.left():
        say(f"stays, though the overlay has it no more: {each}", fg="yellow")


@cluster.command(short_help="Print what an overlay renders to, once it is in order.")
@_overlay
def render(overlay: str) -> None:
    """Print what an overlay renders to, as YAML, once nothing is wrong with it. Connects to nothing."""
    from tally.deploy.kubernetes.overlay import Overlay

    found = Overlay.find(overlay)
    assert found.manifests
    click.echo(visible(found.text, lines=True), nl=False)


@cluster.command(short_help="Show what applying an overlay would change.")
@_overlay
@_context
def plan(overlay: str, context: str | None) -> int:
    """Show what applying an overlay would change, as the cluster itself says. The exit code is 1 if it cannot be
    applied as things are."""
    with _opened(overlay, context) as found:
        changes = found.difference()
        show_changes(changes)
        if not changes:
            say("nothing to change")
        _show_left(found)
        missing = list(found.missing())
        for each in missing:
            say(f"missing: {each}", fg="yellow")
        return int(bool(missing))


@cluster.command(short_help="Make the cluster as an overlay says.")
@_overlay
@_context
@click.option("--force", is_flag=True, help="Set fields that others have changed, too.")
@click.option("--wait", is_flag=True, help="Return when all of it is up, or say what is not.")
@click.option("--timeout", default="10m", show_default=True, callback=values.duration, help="How long to wait at most.")
def apply(overlay: str, context: str | None, force: bool, wait: bool, timeout: float) -> None:
    """Make the cluster as an overlay says: the difference is shown, then applied server-side.

    What an overlay had before and has no more is removed; claims stay, as they hold data. How many workers an
    autoscaler has decided on stays, too.
    """
    with _opened(overlay, context, force=force) as found:
        changes = found.difference()
        show_changes(changes)
        found.apply(changes, say)
        _show_left(found)
        if not changes:
            say("nothing to change")
        kubectl = f"kubectl --context {found.cluster.name} -n {found.overlay.namespace}"
        if wait:
            found.wait(say, timeout)
            say(f"all of it is up; {kubectl} port-forward service/tally 8700:80  leads to its pages")
        elif changes:
            say(f"{kubectl} get pods  shows how they come up, and --wait waits for that")


@cluster.command(short_help="Check whether a cluster has what an overlay needs.")
@_overlay
@_context
@click.option("--location", help="Azure: also ask the quota there, and choose a machine with a GPU or without.")
@click.option("--nodes", type=click.IntRange(1), default=3, show_default=True, help="Azure: how many machines.")
@click.option("--pod/--no-pod", default=True, help="Whether a pod looks from within, too.  [default: it does]")
def doctor(overlay: str, context: str | None, location: str | None, nodes: int, pod: bool) -> int:
    """Check whether a cluster has what an overlay needs: kinds and their versions, Secrets, classes of storage, quota,
    a pool of GPUs or CPUs; and, by a pod that runs 'tally doctor' within, that the image is pulled, names are found,
    and database and buckets are reached.

    The exit code is 1 if anything failed.
    """
    from tally.cli.doctor import Check, report

    with _opened(overlay, context) as found:
        from tally.deploy.kubernetes.doctor import POD_SECONDS, checks

        assert found.overlay.manifests
        seconds = {"from within": POD_SECONDS + 30}
        every = checks(found, location=location, nodes=nodes, pod=pod)
        try:
            return report([Check(name, run, seconds=seconds.get(name, 60.0)) for name, run in every])
        finally:  # Ctrl-C: a pod that waits for a node would have one brought
            for each in list(found.passing):
                found.cluster.delete_any(each)


@cluster.command(short_help="Have more or fewer workers, servers or consumers.")
@click.argument("sizes", nargs=-1, required=True, metavar="NAME=NUMBER|NAME=LEAST..MOST...")
@_overlay
@_context
def scale(sizes: tuple[str, ...], overlay: str, context: str | None) -> None:
    """Have more or fewer: a group of Ray's workers (cpu=0..16), the server (server=3), consumers (consumer=0..20).

    It holds until the overlay is applied again: write there what is to stay.
    """
    wanted = {}
    for each in sizes:
        match = _SIZE.fullmatch(each)
        if match is None:
            raise click.BadParameter(f"{each!r} is not of the form NAME=NUMBER or NAME=LEAST..MOST")
        wanted[match[1]] = int(match[2]), int(match[3] or match[2])
        if wanted[match[1]][0] > wanted[match[1]][1]:
            raise click.BadParameter(f"{each!r}: at least {match[2]} and at most {match[3]}")
    with _opened(overlay, context) as found:
        found.scale(wanted, say)


@cluster.command(short_help="Take away what an overlay has made.")
@_overlay
@_context
@click.option("--data", is_flag=True, help="Also claims and volumes: what is on them is lost.")
@click.option("--dry-run", is_flag=True, help="List what would go; change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def down(overlay: str, context: str | None, data: bool, dry_run: bool, yes: bool) -> None:
    """Take away what an overlay has made: not the namespace, Secrets, or what is on claims and volumes."""
    with _opened(overlay, context) as found:
        parts = found.parts(data=data)
        for each in parts if dry_run or not yes else ():
            say(f"{'would go' if dry_run else 'goes'}: {each['kind']} {each['metadata']['name']}")
        if not parts:
            say("nothing is there")
        elif not dry_run:
            if not yes:
                click.confirm(f"take these away from {found.cluster.name}?", abort=True)
            found.down(parts, say)
