"""``tally deploy``: endpoints on other machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tally.cli import completion, installation, options, values
from tally.cli.console import say, text_pairs
from tally.cli.values import Choice
from tally.storage import failure
from tally.text import visible

if TYPE_CHECKING:
    from tally.deploy.base import Change, Plan, Target
    from tally.deploy.container import Build
    from tally.deploy.spec import Environment

_FLAGS = {"environment": "--env", "settings": "--set", "secrets": "--secret", "variables": "--variable"}
"""Options that are not called what their field is."""
_PACKED = ("task", "labels", "artifacts", "settings")
"""What the package in an image says: it is not said again when the image is deployed."""


def _environment(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Environment | None:
    from tally.deploy.spec import Environment

    if value is None:
        return None
    try:
        return Environment.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


@click.command(short_help="Keep a model online: here, on Kubernetes, on Azure.")
@click.argument("model", shell_complete=completion.models)
@click.option("--name", required=True, help="Of the endpoint: small letters, digits and '-'.")
@click.option("--target", required=True, metavar="local|aci|kubernetes", help="Where it is to run.")
@click.option(
    "--profile",
    type=Choice(["dev-test", "production"]),
    help="One replica, or two and more with an autoscaler.  [default: dev-test]",
)
@click.option(
    "-r", "--replicas", callback=values.replicas, help="3, or 3..9: the least and the most.  [default: by profile]"
)
@click.option("--cpu", help="Cores for each replica: 2, 0.5, 500m.  [default: 1]")
@click.option("--memory", help="Memory for each replica: 512Mi, 4Gi.  [default: 2Gi]")
@click.option("--gpu", type=int, help="GPUs for each replica.  [default: 0]")
@click.option(
    "--env",
    "environment",
    callback=_environment,
    metavar="FORM:WHAT",
    help="What the container has: image:NAME, pip:FILE, conda:FILE, containerfile:FILE.",
)
@click.option("--image", help="The name of an image that is built from a file.")
@click.option("--max-batch", type=int, help="Items scored together.  [default: as the model says]")
@click.option("--max-delay", callback=values.delay, help="How long a batch may wait for more items.  [default: 5ms]")
@click.option("--grpc-port", type=int, help="Where clients reach it over gRPC.  [default: no gRPC]")
@click.option("--drain", callback=values.duration, help="For what is in work at the end.  [default: 30s]")
@options.of_pictures
@click.option("-t", "--task", shell_complete=completion.tasks, help="As with 'tally score'.")
@click.option("--labels", help="As with 'tally score'; for containers in a bucket, on the web, or image:/path.")
@click.option("--artifacts", help="As with 'tally score'; for containers in a bucket, or image:/path.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="An option of the model, e.g. top=5.")
@click.option("--trust", is_flag=True, help="Open models whose opening runs code that they carry.")
@click.option("--variable", "assigned", multiple=True, metavar="KEY=VALUE", help="Of the container's environment.")
@click.option(
    "--secret",
    "secrets",
    multiple=True,
    metavar="NAME",
    help="Kubernetes: a Secret with variables. ACI: a variable of this environment.",
)
@click.option("--port", type=int, help="Local: where it listens.  [default: 8890]")
@click.option("--share", callback=values.share, help="Local: of the requests, beside the versions there are, e.g. 10%.")
@click.option("--context", help="Kubernetes: the kubeconfig's context.  [default: its current one]")
@click.option("--namespace", help="Kubernetes: the namespace.  [default: the context's]")
@click.option("--gateway", metavar="[NAMESPACE/]NAME", help="Kubernetes: the Gateway that leads to it.")
@click.option("--ingress-class", metavar="CLASS", help="Kubernetes: of the Ingress that leads to it.")
@click.option("--hostname", help="Kubernetes: of the Gateway or the Ingress.")
@click.option("--tls-secret", metavar="NAME", help="Kubernetes: the certificate of the Ingress.")
@click.option(
    "--allow-from", multiple=True, metavar="NAMESPACE", help="Kubernetes: whose pods may connect, besides its own."
)
@click.option("--key-secret", metavar="NAME", help="Kubernetes: with the clients' keys.  [default: NAME-key]")
@click.option("--pull-secret", metavar="NAME", help="Kubernetes: for a private registry of images.")
@click.option("--service-account", metavar="NAME", help="Kubernetes: whom the replicas act as.")
@click.option("--force", is_flag=True, help="Kubernetes: set fields that others have changed, too.")
@click.option("--unchecked", is_flag=True, help="Kubernetes: apply also where there seems to be no room.")
@click.option("--resource-group", metavar="NAME", help="ACI: where it is put.")
@click.option("--location", help="ACI: for example westeurope.")
@click.option("--dry-run", is_flag=True, help="Print what would be applied, as YAML; connect to nothing.")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Write it, and apply nothing.")
@click.option("--wait", is_flag=True, help="Return when all replicas answer, or say why they do not.")
@click.option("--timeout", default="10m", show_default=True, callback=values.duration, help="How long to wait at most.")
def deploy(
    target: str,
    assigned: tuple[str, ...],
    dry_run: bool,
    out: Path | None,
    wait: bool,
    timeout: float,
    **given: Any,
) -> None:
    """Put MODEL online as the endpoint NAME: here, on Kubernetes, or in Azure Container Instances.

    \b
    local       a process of this machine; 'tally up' keeps it alive, 'tally endpoints' changes it
                with 'tally --server URL deploy ...', of the server's machine
    kubernetes  applied with your kubeconfig
    aci         applied with az

    \b
    MODEL is what 'tally score --model' takes. A container has to get it: models:/ of a registry in a
    bucket, a bucket, https://, or image:/path for one that is in the image. What is there by this name is
    updated in place; the difference is shown first. Tally builds no images: of a pip, conda or
    Containerfile, --out writes what to build from, and says the commands.
    """
    from tally.deploy import targets
    from tally.deploy.spec import made
    from tally.errors import SpecError

    kind = targets.get(target)
    said = {name: value for name, value in given.items() if value is not None and value is not False and value != ()}
    if assigned:
        said["variables"] = text_pairs("--variable", assigned)
    with installation.deployment(kind, made(kind.spec_type, target, said)) as deployment:
        plan = deployment.plan()
        build = _build(deployment, out or Path("FOLDER"), said)
        if dry_run:
            click.echo(visible(plan.text, lines=True), nl=False)
            _tell(plan, build, err=True)
        elif out is not None:
            _write(plan, build, out)
            _tell(plan, build)
        elif build is not None:
            raise SpecError(
                f"the image {deployment.spec.container_image} has to be built first, and Tally builds none",
                hint="--out FOLDER writes what it is built from, and says the commands; --dry-run prints it.",
            )
        else:
            _apply(deployment, plan, wait=wait, timeout=timeout)


def _build(deployment: Target[Any], folder: Path, said: Mapping[str, Any]) -> Build | None:
    """How the image is made, where it is not there yet."""
    if not deployment.spec.environment.is_built:
        return None
    from tally.deploy import container

    dropped = _PACKED if deployment.shipped.local is not None else ()
    words = ["--target", deployment.name, *_words({key: each for key, each in said.items() if key not in dropped})]
    return container.build(deployment.spec, deployment.shipped, folder, words)


def _apply(deployment: Target[Any], plan: Plan, *, wait: bool, timeout: float) -> None:
    for note in plan.notes:
        say(note)
    changes = deployment.difference()
    show_changes(changes)
    if changes:
        deployment.apply(say)
    else:
        say("nothing to change")
    if wait:
        deployment.wait(say, timeout)
    for name, uri in deployment.uris().items():
        say(f"  {name}: {uri}")


def show_changes(changes: Sequence[Change]) -> None:
    colours = {"+": "green", "-": "red"}
    for change in changes:
        say(f"{change.action} {change.what}")
        for line in change.lines:
            say(f"  {line}", fg=colours.get(line[:1]))


def _write(plan: Plan, build: Build | None, folder: Path) -> None:

    if build is not None:
        build.write(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / plan.file).write_text(plan.text, "utf-8")
    except OSError as error:
        raise failure("write", str(folder), error) from None
    say(f"wrote {folder / plan.file}")


def _tell(plan: Plan, build: Build | None, *, err: bool = False) -> None:
    for note in plan.notes:
        say(note, err=err)
    if build is None:
        return
    if build.containerfile is not None:
        say(f"the image is built from this:\n\n{build.containerfile}", err=err)
    say("Tally builds no images. Build it, push it, and deploy it:", err=err)
    for step in build.steps:
        say(f"  {step}", err=err)


def _words(said: Mapping[str, Any]) -> list[str]:
    """The options as they were given, but for those of which an image is built."""
    words: list[str] = []
    for name, value in said.items():
        if name in ("model", "environment", "image"):
            continue
        flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
        match value:
            case True:
                words.append(flag)
            case (int(red), int(green), int(blue)):
                words += [flag, f"#{red:02x}{green:02x}{blue:02x}"]
            case (int(least), int(most)):
                words += [flag, str(least) if least == most else f"{least}..{most}"]
            case tuple():
                words += [word for each in value for word in (flag, str(each))]
            case dict():
                words += [word for key, each in value.items() for word in (flag, f"{key}={each}")]
            case float():
                words += [flag, f"{value:g}s"]
            case _:
                words += [flag, str(value)]
    return words
