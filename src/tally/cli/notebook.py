"""``tally notebook``: worked notebooks in JupyterLab, and the values of a JupyterHub."""

from __future__ import annotations

from pathlib import Path

import click

from tally.cli.console import say


@click.group(invoke_without_command=True)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("notebooks"),
    show_default=True,
    help="Where the notebooks are put; those that are there stay as they are.",
)
@click.option("--port", type=int, help="Port to listen on.  [default: 8888, or the next that is free]")
@click.option("--no-browser", is_flag=True, help="Open no browser; print the address.")
@click.pass_context
def notebook(ctx: click.Context, folder: Path, port: int | None, no_browser: bool) -> None:
    """Open worked notebooks in JupyterLab: score and explore, retrain, sweep, video, sensors."""
    if ctx.invoked_subcommand is not None:
        return
    from tally.notebooks import worked

    worked.check_installed()
    for name in worked.copy(folder):
        say(f"{folder / name}", err=True)
    arguments = [] if port is None else [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    worked.open_lab(folder, [*arguments, "--no-browser"] if no_browser else arguments)


def _bounds(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[str, str]:
    least, dots, most = value.partition("..")
    return (least, most) if dots else (value, value)


@notebook.command(short_help="Values of Zero to JupyterHub: notebooks on a cluster, with GitHub login.")
@click.option("--host", required=True, help="The name that browsers reach it by.")
@click.option("--org", "orgs", multiple=True, metavar="ORG[:TEAM]", help="An organisation whose members may log in.")
@click.option("--user", "users", multiple=True, metavar="ACCOUNT", help="An account that may log in.")
@click.option("--admin", "admins", multiple=True, metavar="ACCOUNT", help="An account that may log in, and is admin.")
@click.option("--letsencrypt", metavar="MAIL", help="Have Let's Encrypt give the certificate, and write there.")
@click.option("--tls-secret", metavar="NAME", help="The Secret with a certificate that you have.")
@click.option(
    "--github-secret",
    default="jupyterhub-github",
    show_default=True,
    metavar="NAME",
    help="The Secret with client-id and client-secret of the OAuth application.",
)
@click.option("--github-url", metavar="URL", help="A GitHub Enterprise Server instead of github.com.")
@click.option("--image", metavar="NAME:TAG", help="What users run.  [default: tally-notebook and Tally's version]")
@click.option(
    "--cpu", callback=_bounds, default="0.5..2", show_default=True, help="Cores of each user: promised..at most."
)
@click.option(
    "--memory", callback=_bounds, default="1Gi..4Gi", show_default=True, help="Memory of each user, in the same way."
)
@click.option("--gpus", type=int, default=0, show_default=True, help="GPUs of users who choose to have some.")
@click.option("--storage", default="10Gi", show_default=True, help="Size of each user's own volume.")
@click.option("--storage-class", metavar="NAME", help="Its StorageClass.  [default: the cluster's]")
@click.option("--shared", default="tally-shared", show_default=True, metavar="CLAIM", help="The volume of all users.")
def values(
    host: str,
    orgs: tuple[str, ...],
    users: tuple[str, ...],
    admins: tuple[str, ...],
    letsencrypt: str | None,
    tls_secret: str | None,
    github_secret: str,
    github_url: str | None,
    image: str | None,
    cpu: tuple[str, str],
    memory: tuple[str, str],
    gpus: int,
    storage: str,
    storage_class: str | None,
    shared: str,
) -> None:
    """Print values for the Helm chart Zero to JupyterHub: notebooks for members of an organisation of GitHub.

    \b
    tally notebook values --host hub.example.org --org my-org --letsencrypt ops@example.org > values.yaml
    """
    from tally import __version__
    from tally.deploy.base import dump
    from tally.deploy.jupyterhub import HubSpec
    from tally.deploy.jupyterhub import values as chart_values

    spec = HubSpec(
        host=host,
        orgs=orgs,
        users=users,
        admins=admins,
        letsencrypt=letsencrypt,
        tls_secret=tls_secret,
        github_secret=github_secret,
        github_url=github_url,
        image=image or f"tally-notebook:{__version__.partition('+')[0]}",
        cpu=cpu,
        memory=memory,
        gpus=gpus,
        storage=storage,
        storage_class=storage_class,
        shared=shared,
    )
    click.echo(dump([chart_values(spec)]), nl=False)
    say(f"GitHub has to know the application's callback: https://{spec.host}/hub/oauth_callback", err=True)
    say(f"The namespace needs the Secret {spec.github_secret} and the claim {spec.shared} (docs: notebooks)", err=True)
