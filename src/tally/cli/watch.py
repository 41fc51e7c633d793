"""``tally watch``: each upload starts a job, once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from tally.cli import installation
from tally.cli.console import say, table
from tally.text import local_time


@click.group()
def watch() -> None:
    """Start a job for each object that is uploaded to a folder or a bucket, once.

    'tally up' looks at watched places and runs the jobs.
    """


@watch.command()
@click.argument("name")
@click.argument("place")
@click.argument("file")
@click.option("--pattern", default="*", show_default=True, help="Take what matches this glob: '*.mp4', 'in/**/*.jpg'.")
@click.option("--exclude", help="Leave out what matches this glob: '*processed*'.")
@click.option(
    "--parallel",
    type=click.IntRange(1, 1_000_000_000),
    default=4,
    show_default=True,
    help="Jobs of this watch at once.",
)
@click.option("--existing", is_flag=True, help="Take what is there already, too.")
def add(name: str, place: str, file: str, pattern: str, exclude: str | None, parallel: int, existing: bool) -> None:
    """Run the job of FILE for each new object in PLACE.

    PLACE is a folder or a bucket, FILE a job in YAML. Its source is '{url}', the object. Other values may hold {name}
    (the object's name in PLACE), {stem} (the same without suffix) and {folder}; 'out' must contain one. The file is
    read once, now.

    \b
    tally watch add incoming s3://bucket/in job.yaml --pattern '*.mp4' --exclude '*processed*'
    tally up
    """
    from tally.jobs.spec import absolute
    from tally.triggers.watch import read

    store, place = installation.watches(), absolute(place)
    fields = read(file)
    _, count = store.add(
        name, place, pattern=pattern, exclude=exclude, template=fields, file=str(Path(file).absolute()),
        parallel=parallel, existing=existing,
    )  # fmt: skip
    what = "start jobs, too" if existing else "are passed over: only new ones start jobs (--existing takes them, too)"
    say(f"watch {name}: {count:,} objects are there already, and {what}")
    say("  Something has to look: tally up", err=True)


@watch.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_(as_json: bool) -> None:
    """All watches, and what they have seen."""
    from tally.jobs.spec import shown

    store = installation.watches()
    found = store.all()
    if as_json:
        for each in found:
            say(json.dumps(asdict(each) | {"template": shown(each.template), "objects": store.counts(each.name)}))
        return
    if not found:
        say("no watches yet; add one with: tally watch add NAME PLACE job.yaml", err=True)
        return
    rows = []
    for each in found:
        seen = ", ".join(f"{count:,} {state}" for state, count in sorted(store.counts(each.name).items()))
        state = "paused" if each.paused else each.error or f"looked at {local_time(each.looked_at)}"
        rows.append((each.name, each.url, each.pattern, seen or "-", state))
    table(("NAME", "PLACE", "PATTERN", "OBJECTS", "STATE"), rows)


@watch.command()
@click.argument("name")
def pause(name: str) -> None:
    """Take nothing more from NAME, for a while."""
    installation.watches().pause(name, True)
    say(f"watch {name} is paused; go on with: tally watch resume {name}")


@watch.command()
@click.argument("name")
def resume(name: str) -> None:
    """Go on with NAME; what has come meanwhile is taken."""
    installation.watches().pause(name, False)
    say(f"watch {name} goes on")


@watch.command()
@click.argument("name")
def delete(name: str) -> None:
    """Forget NAME; its jobs and their results stay."""
    installation.watches().delete(name)
    say(f"watch {name} is forgotten; its jobs stay")
