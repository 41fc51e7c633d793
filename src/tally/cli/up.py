"""``tally up``: the server, and ``tally keys``: who may use it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import click

from tally.cli import installation
from tally.cli.console import say, table
from tally.cli.values import Choice
from tally.config import settings, variable
from tally.text import expanded, local_time


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", type=int, default=8700, show_default=True, help="Port to listen on; 0 for any that is free.")
@click.option("--parallel", type=int, default=2, show_default=True, help="Jobs that may run at once.")
@click.option(
    "--keep-warm",
    type=float,
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long workers wait for the next job of the same model; 0 keeps none.",
)
@click.option(
    "--root",
    "roots",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="A folder whose files requests may name; may be repeated.",
)
@click.option("--price-per-hour", type=float, default=0.0, help="What one worker costs for an hour.")
@click.option("--currency", default="USD", show_default=True, help="What that is counted in.")
@click.option(
    "--allow-host",
    "allow_hosts",
    multiple=True,
    metavar="HOST",
    help="A private host, or a server of Kafka, that requests may name; may be repeated.",
)
@click.option("--max-upload", type=int, default=1024, show_default=True, help="MiB that one upload may have.")
@click.option("--schedules/--no-schedules", default=True, help="Whether it runs schedules.  [default: it does]")
@click.option("--oidc-issuer", metavar="URL", help="An identity provider whose accounts may log in.")
@click.option("--oidc-client-id", default="", metavar="ID", help="How it knows this server; secret: TALLY_OIDC_SECRET.")
@click.option("--oidc-admin", multiple=True, metavar="MAIL", help="Who is admin; @example.com for all there.")
@click.option("--oidc-operator", multiple=True, metavar="MAIL", help="Who is operator.")
@click.option("--oidc-viewer", multiple=True, metavar="MAIL", help="Who is viewer.")
@click.option("--github-client-id", default="", metavar="ID", help="Log in with GitHub; secret: TALLY_GITHUB_SECRET.")
@click.option("--github-admin", multiple=True, metavar="NAME", help="Who is admin; @NAME for an organisation.")
@click.option("--github-operator", multiple=True, metavar="NAME", help="Who is operator.")
@click.option("--github-viewer", multiple=True, metavar="NAME", help="Who is viewer.")
@click.option("--github-url", metavar="URL", help="A GitHub Enterprise Server instead of github.com.")
@click.option(
    "--log-format",
    type=Choice(("text", "json")),
    envvar="TALLY_LOG_FORMAT",
    default="text",
    show_default=True,
    help="Lines of text, or a JSON object a line; for the logs of jobs, too.",
)
def up(
    host: str,
    port: int,
    parallel: int,
    keep_warm: float,
    roots: tuple[Path, ...],
    price_per_hour: float,
    currency: str,
    allow_hosts: tuple[str, ...],
    max_upload: int,
    schedules: bool,
    oidc_issuer: str | None,
    oidc_client_id: str,
    oidc_admin: tuple[str, ...],
    oidc_operator: tuple[str, ...],
    oidc_viewer: tuple[str, ...],
    github_client_id: str,
    github_admin: tuple[str, ...],
    github_operator: tuple[str, ...],
    github_viewer: tuple[str, ...],
    github_url: str | None,
    log_format: str,
) -> int:
    """Start the server: API and pages.

    It also runs schedules and looks at watched places.

    \b
    It listens on this machine only, unless --host says otherwise; that needs a key first (tally keys add).
    The first time, a key for an admin is made and printed once.
    """
    from tally import logs
    from tally.jobs.facade import open_jobs
    from tally.optional import needed

    with needed("the server needs", "server"):
        from tally.server.serve import serve
        from tally.server.settings import GITHUB, GitHubSettings, OidcSettings, ServerSettings
    with_github = bool(github_client_id or github_admin or github_operator or github_viewer or github_url)
    with needed("logging in with accounts needs", "server,oidc"):
        for wanted, module in ((oidc_issuer is not None, "oidc"), (with_github, "github")):
            if wanted:
                import_module(f"tally.server.auth.{module}")
    oidc = None
    if oidc_issuer is not None:
        secret = variable("TALLY_OIDC_SECRET") or ""
        oidc = OidcSettings(oidc_issuer, oidc_client_id, secret, oidc_admin, oidc_operator, oidc_viewer)
    github = None
    if with_github:
        secret, url = variable("TALLY_GITHUB_SECRET") or "", (github_url or GITHUB).rstrip("/")
        github = GitHubSettings(github_client_id, secret, url, github_admin, github_operator, github_viewer)
    folders = tuple(expanded(each).absolute() for each in roots)
    settings = ServerSettings(
        host,
        port,
        parallel,
        keep_warm,
        folders,
        price_per_hour,
        currency,
        allow_hosts,
        max_upload << 20,
        schedules,
        oidc,
        github,
    )
    os.environ[logs.FORMAT] = log_format  # what is started logs like that, too
    logs.log_to_stderr()
    jobs = open_jobs(wait=lambda line: say(line, err=True))
    return serve(jobs, settings, say=say)


@click.command()
def migrate() -> None:
    """Bring the schema of the database up to date, and say which it has.

    Every command that uses the database does so by itself; this one does nothing else.
    """
    from tally.database.connect import connect
    from tally.database.migrate import HEAD

    connect(settings().database).dispose()
    say(f"the database has the schema {HEAD}")


@click.group()
def keys() -> None:
    """Keys for the server: who may use it, and for what.

    \b
    viewer    looks
    operator  starts, stops and retries jobs
    admin     deletes, and makes and revokes keys
    """


@keys.command(short_help="Make a key for NAME, and print it once.")
@click.argument("name")
@click.option("--role", type=Choice(("viewer", "operator", "admin")), default="viewer", show_default=True)
@click.option("--days", type=float, help="Days until it expires; never by default.")
def add(name: str, role: str, days: float | None) -> None:
    """Make a key for NAME, and print it: it cannot be shown again."""
    key, text = installation.keys().add(name, role, days=days)  # type: ignore[arg-type]
    say(f"key {key.id} for {key.name} ({key.role}), shown this once:", err=True)
    say(text)


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_(as_json: bool) -> None:
    """List all keys, newest first."""
    found = installation.keys().list()
    if as_json:
        for key in found:
            say(json.dumps(asdict(key)))
        return
    rows = [
        (k.id, k.name, k.role, k.state, local_time(k.created_at), local_time(k.expires_at), local_time(k.used_at))
        for k in found
    ]
    table(("KEY", "NAME", "ROLE", "STATE", "CREATED", "EXPIRES", "LAST USED"), rows)


@keys.command(short_help="Refuse KEY, and who logged in with it.")
@click.argument("key")
def revoke(key: str) -> None:
    """Refuse KEY (its id), and every browser that logged in with it, from now on."""
    revoked = installation.keys().revoke(key)
    say(f"key {revoked.id} of {revoked.name} is revoked")
