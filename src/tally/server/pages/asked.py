"""What a job was asked for, as the text of a job file: for a form in which another one like it is made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tally import plain_yaml
from tally.errors import SpecError
from tally.jobs.spec import JobSpec, is_in_home, parsed, shown
from tally.server.uploads import uploads_folder

OWN = ("source", "model", "out", "task")
"""What the form of a job has fields of its own for."""
_TICK = "{interval_start_utc:%Y-%m-%dT%H%M}"
_BUCKET = "s3://bucket/{interval_start_utc:%Y/%m/%d/%H}"


def filled(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The job form's fields for a job like this one. ``more``: as a job file, what it has no fields of its own for;
    ``hidden``: names of what is left out, as it holds a secret."""
    given, hidden = _given(spec)
    more = {name: value for name, value in given.items() if name not in OWN}
    return {
        **{name: value for name, value in given.items() if name in OWN},
        "out": "" if is_in_home(spec["out"].rstrip("/")) else spec["out"],
        "more": _text(more),
        "hidden": hidden,
    }


def scheduled(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule form's ``job`` for a schedule of such jobs, whose output names the interval, and ``hidden``."""
    given, hidden = _given(spec)
    source = [_BUCKET if _is_upload(each) else each for each in given["source"]]
    out = _of_interval(given["out"])
    return {"job": _text({**given, "source": source[0] if len(source) == 1 else source, "out": out}), "hidden": hidden}


def with_more(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a form, those in ``more`` among them. Raises SpecError."""
    text = str(fields.get("more") or "")
    more = parsed(text, "what is under More") if text.strip() else {}
    if twice := sorted(set(more) & set(OWN)):
        raise SpecError(f"{', '.join(twice)}: has a field of its own above", hint="Take it away under More.")
    return {**{name: value for name, value in fields.items() if name != "more"}, **more}


def _given(spec: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What differs from the defaults, in a job file's order, and the names of what is left out as it holds a secret."""
    fields = JobSpec(**spec).model_dump(mode="json", exclude_defaults=True)
    plain = shown(fields)
    return (
        {name: value for name, value in fields.items() if plain[name] == value},
        [name for name, value in fields.items() if plain[name] != value],
    )


def _text(fields: Mapping[str, Any]) -> str:
    return "".join(plain_yaml.dump({name: value}) for name, value in fields.items())


def _of_interval(out: str) -> str:
    folder, slash, name = out.rstrip("/").rpartition("/")
    if out.endswith("/") or not (suffix := PurePosixPath(name).suffix):
        return f"{out.rstrip('/')}{'-' if is_in_home(out.rstrip('/')) else '/'}{_TICK}"
    return f"{folder}{slash}{name.removesuffix(suffix)}-{_TICK}{suffix}"


def _is_upload(place: str) -> bool:
    return Path(place).is_relative_to(uploads_folder())
