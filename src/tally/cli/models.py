"""``tally models``: keep models under names, with versions and aliases."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tally.cli import completion, installation
from tally.cli.console import pairs, say, table
from tally.cli.values import names
from tally.errors import ModelChangedError, ModelNotFoundError
from tally.text import expanded, visible


@click.group()
def models() -> None:
    """Keep models under names, with immutable versions and movable aliases.

    A registered model is used as --model models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME (the newest).
    """


@models.command()
@click.argument("name", shell_complete=completion.registered)
@click.argument("model", shell_complete=completion.models)
@click.option("--alias", help="Point this alias at the new version, e.g. production.")
@click.option(
    "-t",
    "--task",
    shell_complete=completion.tasks,
    help="classify, detect, restyle, embed, segment or values; detected by default.",
)
@click.option("--labels", help="Names of the classes: a text file with one per line, or JSON.")
@click.option("--artifacts", help="Folder with what a script loads (AZUREML_MODEL_DIR).")
@click.option("--set", "options", multiple=True, metavar="KEY=VALUE", help="An option, e.g. preprocess.channels=bgr.")
@click.option("--metric", "metrics", multiple=True, metavar="KEY=VALUE", help="A measured number to remember.")
@click.option("--note", "notes", multiple=True, metavar="KEY=VALUE", help="Anything else to remember.")
@click.option("--trust", is_flag=True, help="Accept a model that carries code. Only if you know where it comes from.")
def add(
    name: str,
    model: str,
    alias: str | None,
    task: str | None,
    labels: str | None,
    artifacts: str | None,
    options: tuple[str, ...],
    metrics: tuple[str, ...],
    notes: tuple[str, ...],
    trust: bool,
) -> None:
    """Copy MODEL into the registry as the next version of NAME.

    MODEL is an .onnx file, a package folder, a script, or another registered model; files and folders may be in a
    bucket. How it is to be used (task, labels, options) is kept with it.

    \b
    tally models add faces face_rfb320.onnx --task detect --alias production
    tally score photos/ --model models:/faces@production --out boxes/
    """
    from tally.models.resolve import resolve

    metadata: dict[str, Any] = pairs("--note", notes)
    if measured := pairs("--metric", metrics):
        metadata["metrics"] = measured
    ref = resolve(model, task=task, labels=labels, artifacts=artifacts, settings=pairs("--set", options), trust=trust)
    added = installation.registry().add(name, ref, alias=alias, metadata=metadata)
    for line in added.assumed:
        say(f"note: {line}", dim=True, err=True)
    if added.existed:
        say(f"{added} has this content already: nothing was added" + (f", {alias} points at it" if alias else ""))
    else:
        say(f"added {added} ({_size(added.bytes)}, {added.hash[:19]})" + (f" as {alias}" if alias else ""))
    use = f"models:/{name}@{alias}" if alias else str(added)
    say(f"  Use it: tally score SOURCE --model {use} --out OUT", err=True)


@models.command(short_help="Many models in one file.")
@click.argument("template")
@click.option("--by", required=True, callback=names, metavar="COLUMNS", help="Columns whose values choose a model.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option("--name", help="Register the package under this name.")
@click.option("--trust", is_flag=True, help="Open pickles, which run code. Only if you know where they come from.")
def pack(template: str, by: tuple[str, ...], out: Path, name: str | None, trust: bool) -> None:
    """Put one scikit-learn model for each key into one package.

    TEMPLATE names the files, with the key's columns in braces. One-class SVMs, alone or behind a StandardScaler, are
    kept as numbers and scored together; other models are kept whole.

    \b
    tally models pack 'models/{Device}_{Tag}.skops' --by Device,Tag --out models/pumps --name pumps
    tally score readings.parquet --model models:/pumps --out predictions/
    """
    from tally.scorers.per_key.files import pack as pack_models

    place = template if "://" in template else str(expanded(template).absolute())
    packed = pack_models(place, by, out, name=name, trusted=trust)
    kinds = [
        f"{count:,} {kind}" for count, kind in ((packed.batched, "batched SVMs"), (packed.whole, "kept whole")) if count
    ]
    size = sum(each.stat().st_size for each in out.iterdir() if each.is_file())
    say(f"packed {packed.models:,} models into {out}: {', '.join(kinds)}; {_size(size)}")
    if packed.requires_trust:
        say("note: some hold types that can do more than compute: scoring needs --trust too", dim=True, err=True)
    use = str(out)
    if name is not None:
        from tally.models.resolve import resolve

        added = installation.registry().add(name, resolve(out, trust=trust))
        say(f"{added} has this content already" if added.existed else f"added {added} ({added.hash[:19]})")
        use = f"models:/{name}"
    say(f"  Use it: tally score SOURCE --model {use} --out OUT", err=True)


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_(as_json: bool) -> None:
    """Every version of every model."""
    versions = installation.registry().list()
    if as_json:
        for each in versions:
            say(json.dumps(each.to_dict()))
        return
    if not versions:
        say("no models yet; add one with: tally models add NAME MODEL", err=True)
        return
    table(
        ("NAME", "VERSION", "ALIASES", "KIND", "SIZE", "ADDED", "HASH"),
        [
            (v.name, str(v.version), ", ".join(v.aliases), v.kind, _size(v.bytes), _when(v.created_at), v.hash[:19])
            for v in versions
        ],
    )


@models.command(short_help="A model's versions and aliases.")
@click.argument("name", shell_complete=completion.registered)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def show(name: str, as_json: bool) -> None:
    """A model's versions with their metadata, and what its aliases pointed at."""
    found = installation.registry().show(name)
    if as_json:
        say(json.dumps(found.to_dict()))
        return
    for version in found.versions:
        say(str(version), bold=True)
        facts = {
            "aliases": ", ".join(version.aliases),
            "kind": version.kind,
            "added": _when(version.created_at),
            "size": _size(version.bytes),
            "hash": version.hash,
            "folder": version.location,
            "added on": version.added_on or "",
            **{key: _text(value) for key, value in version.metadata.items()},
        }
        for key, value in facts.items():
            if value:
                say(f"  {visible(key):<12} {visible(str(value))}")
    if found.history:
        say()
        rows = [(_when(h.at), h.alias, str(h.version), h.action, h.who or "-") for h in found.history]
        table(("WHEN", "ALIAS", "VERSION", "CHANGE", "BY"), rows)


@models.command()
@click.argument("name", shell_complete=completion.registered)
@click.argument("alias")
@click.argument("version", type=int)
def alias(name: str, alias: str, version: int) -> None:
    """Point ALIAS at VERSION from now on."""
    installation.registry().alias(name, alias, version)
    say(f"models:/{name}@{alias} is now version {version}")


@models.command()
@click.argument("name", shell_complete=completion.registered)
@click.argument("alias")
def rollback(name: str, alias: str) -> None:
    """Point ALIAS back at the version before."""
    found = installation.registry().rollback(name, alias)
    say(f"models:/{name}@{alias} is version {found.version} again")


@models.command()
@click.argument("name", shell_complete=completion.registered)
@click.argument("alias")
def unalias(name: str, alias: str) -> None:
    """Remove ALIAS; the version that it points at stays."""
    found = installation.registry().unalias(name, alias)
    say(f"models:/{name}@{alias} is removed; it was version {found.version}")


@models.command(short_help="Remember something about a version.")
@click.argument("name", shell_complete=completion.registered)
@click.argument("version", type=int)
@click.argument("tags", nargs=-1, required=True, metavar="KEY=VALUE...")
def tag(name: str, version: int, tags: tuple[str, ...]) -> None:
    """Tag VERSION of NAME; KEY= without a value takes a tag away."""
    from tally.cli.console import text_pairs

    given = {key: value or None for key, value in text_pairs("KEY=VALUE", tags).items()}
    found = installation.registry().tag(name, version, given)
    say(f"{found}: {_text(found.metadata.get('tags', {})) or 'no tags'}")


@models.command(short_help="Compare content with its hash.")
@click.argument("name", required=False, shell_complete=completion.registered)
@click.argument("version", type=int, required=False)
def verify(name: str | None, version: int | None) -> int:
    """Compare content with its hash: of one version, of all of NAME, or of everything.

    Content in a bucket is downloaded to check it. The exit code is 1 if anything was changed, or is not there.
    """
    registry = installation.registry()
    if name is None:
        versions: Sequence[Any] = registry.list()
    elif version is None:
        versions = registry.show(name).versions
    else:
        versions = [registry.get(f"models:/{name}/{version}")]
    changed = False
    for each in versions:
        try:
            registry.verify(each.name, each.version)
        except ModelChangedError as error:
            changed = True
            click.echo(f"{click.style('CHANGED', fg='red')} {visible(error.message)}")
        except ModelNotFoundError as error:
            changed = True
            click.echo(f"{click.style('MISSING', fg='red')} {visible(error.message)}")
        else:
            click.echo(f"{click.style('ok', fg='green')}      {visible(str(each))} {each.hash}")
    return int(changed)


@models.command()
@click.argument("name", shell_complete=completion.registered)
@click.argument("version", type=int)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def remove(name: str, version: int, yes: bool) -> None:
    """Remove VERSION of NAME for good. Its number is not used again."""
    registry = installation.registry()
    found = registry.get(f"models:/{name}/{version}")
    if not yes and sys.stdin.isatty():
        click.confirm(f"Remove {found} ({_size(found.bytes)}) for good?", abort=True)
    registry.remove(name, version)
    say(f"removed {found}")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return str(value)


def _when(time: Any) -> str:
    return str(time.astimezone().strftime("%Y-%m-%d %H:%M"))


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
