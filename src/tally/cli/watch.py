"""``tally watch``: each upload starts a job, once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tally.cli import installation
from tally.cli.console import say, table
from tally.text import local_time, visible

if TYPE_CHECKING:
    from tally.triggers.watch import Seen


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
    one = count == 1
    there = "1 object is" if one else f"{count:,} objects are"
    what = f"start{'s a job' if one else ' jobs'}, too"
    if not existing:
        what = f"{'is' if one else 'are'} passed over: only new ones start jobs (--existing takes those, too)"
    say(f"watch {name}: {there} there already, and {what}")
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


@watch.command(short_help="What a watch does, and its newest objects.")
@click.argument("name")
@click.option(
    "-n", "--limit", type=click.IntRange(1, 1_000_000_000), default=10, show_default=True, help="How many objects."
)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def show(name: str, limit: int, as_json: bool) -> None:
    """Everything about a watch: what it does, and the newest objects with their jobs and errors."""
    from tally.jobs.spec import shown

    store = installation.watches()
    found, counts, seen = store.get(name), store.counts(name), store.seen(name, limit=limit)
    template = shown(found.template)
    if as_json:
        say(json.dumps(asdict(found) | {"template": template, "objects": counts, "seen": [asdict(s) for s in seen]}))
        return
    for label, value in (
        ("watch", found.name + (" (paused)" if found.paused else "")),
        ("place", found.url),
        ("pattern", found.pattern),
        ("exclude", found.exclude),
        ("at once", f"{found.parallel:,} jobs at most" if found.parallel > 1 else "1 job at most"),
        ("job file", found.file),
        *((f"  {field}", _text(value)) for field, value in template.items() if value is not None),
        ("added", local_time(found.created_at)),
        ("looked at", local_time(found.looked_at)),
        ("objects", ", ".join(f"{count:,} {state}" for state, count in sorted(counts.items())) or "none"),
        ("error", found.error),
    ):
        if value:
            say(f"{label:<12} {visible(value)}")
    if seen:
        say()
        rows = [
            (each.name, each.state, local_time(each.seen_at), each.job_id or "-", each.job_state or "-", _short(each))
            for each in seen
        ]
        table(("OBJECT", "STATE", "SEEN", "JOB", "JOB'S STATE", "ERROR"), rows)


def _text(value: Any) -> str:
    """A field of a job file as people write it."""
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(seen: Seen) -> str:
    return seen.error.splitlines()[0] if seen.error else ""


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
