"""A job as HTML: its state and counts, the first of its rows, and pictures."""

from __future__ import annotations

import base64
from collections.abc import Collection
from html import escape
from typing import Any

from tally.errors import TallyError
from tally.jobs import pictures
from tally.jobs.facade import Jobs
from tally.jobs.store import JobRecord
from tally.storage import open_store
from tally.text import local_time, visible

ROWS, PICTURES, COLUMNS = 5, 4, 12
"""The most that are shown."""
SIDE = 160
"""Pixels of a picture's longer side."""
_LONGEST = 80


def html(jobs: Jobs, record: JobRecord) -> str:
    """What a notebook shows of a job. Nothing in it leads out of the notebook, and no text of it is taken for HTML."""
    counts = f"{record.done:,} of {record.items:,} {record.unit}" if record.items else f"no {record.unit} yet"
    facts = [
        ("state", record.state),
        ("done", counts),
        ("failed", f"{record.dead:,}" if record.dead else ""),
        ("model", record.model["name"]),
        ("out", str(record.spec["out"])),
        ("finished", local_time(record.finished_at) if record.finished_at else ""),
        ("error", record.error or ""),
    ]
    head = "".join(f"<tr><th>{name}</th><td>{_cell(value)}</td></tr>" for name, value in facts if value)
    return f"<div><b>Job {escape(record.id)}</b><table>{head}</table>{_results(jobs, record)}</div>"


def _results(jobs: Jobs, record: JobRecord) -> str:
    if not record.done:
        return ""
    try:
        rows = jobs.query(record.id, "from results", limit=ROWS).to_pylist()
        shown = "".join(map(_picture, item_pictures(jobs, record, limit=PICTURES)))
    except TallyError as error:  # they are gone, or were never rows
        return f"<div>{_cell(error.message)}</div>"
    if not rows:
        return shown
    columns = list(rows[0])
    names, left = columns[:COLUMNS], len(columns) - COLUMNS
    head = "".join(f"<th>{_cell(name)}</th>" for name in names) + ("<th>…</th>" if left > 0 else "")
    body = "".join("<tr>" + "".join(f"<td>{_cell(row[name])}</td>" for name in names) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>{shown}"


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return escape(visible(text if len(text) <= _LONGEST else text[:_LONGEST] + "…"))


def _picture(shown: tuple[str, bytes]) -> str:
    key, jpeg = shown
    data = base64.b64encode(jpeg).decode()
    return f'<img src="data:image/jpeg;base64,{data}" title="{_cell(key)}" alt="{_cell(key)}" style="margin:2px">'


def item_pictures(
    jobs: Jobs, record: JobRecord, *, limit: int, where: str | None = None, side: int = SIDE
) -> list[tuple[str, bytes]]:
    """Keys of items that are pictures, in their order, and the pictures as JPEG with what was found in them.

    where: a condition in SQL on the rows. Pictures that are gone, or cannot be read, are left out.
    """
    if record.output.get("kind") == "video":
        return []

    def ask(sql: str, most: int) -> tuple[Collection[str], list[dict[str, Any]]]:
        answer = jobs.query(record.id, sql, limit=most)
        return answer.column_names, answer.to_pylist()

    items = pictures.items_of(ask, limit=limit, where=where, rows=limit * pictures.MAX_BOXES)
    makes = record.output.get("kind") == "images" and record.manifest is not None
    kept = {} if makes else jobs.thumbnails(record.id, items)
    found = []
    for key, rows in items.items():
        try:
            if key in kept:
                found.append((key, pictures.kept_thumbnail(kept[key], side, pictures.drawable(rows))))
            elif makes:
                made = open_store(jobs.sink(record.id).place)
                found.append((key, pictures.read_thumbnail(made, rows[0]["file"], side)))
            elif pictures.is_media(key, "image"):
                store, name = pictures.find(record.spec["source"], key)
                found.append((key, pictures.read_thumbnail(store, name, side, pictures.drawable(rows))))
        except TallyError:
            continue
    return found
