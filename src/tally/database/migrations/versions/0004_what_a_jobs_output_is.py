"""what a job's output is, and where; keys of endless sources; the same lease columns everywhere"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import sqlalchemy as sa
from alembic import op

from tally.storage import normalised

revision = "0004"
down_revision = "0003"

_ROWS = {".csv": "csv", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_VIDEOS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "mkv", ".webm": "webm"}
_IMAGES = ("jpg", "png", "webp")
_SOURCES = 16


def upgrade() -> None:
    # Not in batches, which would copy the tables: both databases add and rename columns in no time.
    for column in (
        sa.Column("output", sa.JSON(), nullable=True),
        sa.Column("place", sa.Text(), nullable=True),
        sa.Column("model_name", sa.Text(), nullable=True),
        sa.Column("search", sa.Text(), nullable=True),
    ):
        op.add_column("jobs", column)
    op.execute("ALTER TABLE schedule_runs RENAME COLUMN token TO owner")
    op.execute("ALTER TABLE alerts RENAME COLUMN token TO owner")
    op.add_column("alerts", sa.Column("owner_host", sa.String(length=255), nullable=True))
    op.add_column("alerts", sa.Column("owner_pid", sa.Integer(), nullable=True))
    op.create_table(
        "received_keys",
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("key", sa.String(length=32), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "key"),
    )
    op.create_index("received_keys_by_age", "received_keys", ["job_id", "at"])
    _describe_jobs(op.get_bind())
    op.create_index("jobs_by_place", "jobs", ["place", "created_at", "id"])
    op.create_index("jobs_by_creation", "jobs", ["created_at", "id"])


def _describe_jobs(connection: sa.Connection) -> None:
    """Fill the new columns from what the rows say: no model is opened, and no source or output is looked at."""
    jobs = sa.table(
        "jobs",
        sa.column("id", sa.String),
        sa.column("spec", sa.JSON),
        sa.column("model", sa.JSON),
        sa.column("manifest", sa.JSON),
        sa.column("output", sa.JSON),
        sa.column("place", sa.Text),
        sa.column("model_name", sa.Text),
        sa.column("search", sa.Text),
    )
    chunks = sa.table(
        "chunks", sa.column("job_id", sa.String), sa.column("state", sa.String), sa.column("output", sa.JSON)
    )
    last = ""
    while True:
        some = sa.select(jobs.c.id, jobs.c.spec, jobs.c.model, jobs.c.manifest).where(jobs.c.id > last)
        rows = connection.execute(some.order_by(jobs.c.id).limit(500)).all()
        if not rows:
            return
        for row in rows:
            staged = sa.select(chunks.c.output).where(chunks.c.job_id == row.id, chunks.c.state == "done").limit(20)
            spec, model = row.spec or {}, row.model or {}
            kind = _kind_from_manifest(row.manifest) or _kind_from_spec(spec, model)
            if kind is None:
                files = [name for output in connection.scalars(staged) for name in (output or {}).get("files", [])]
                kind = "video" if any(PurePosixPath(name).suffix in _VIDEOS for name in files) else "unknown"
            place = normalised(_text(spec.get("out") or "/"))
            name = _text(model.get("name") or "")
            sources = (spec.get("source") or ())[:_SOURCES]
            words = [row.id, _text(spec.get("model") or ""), name, *map(_text, sources), place]
            connection.execute(
                sa.update(jobs)
                .where(jobs.c.id == row.id)
                .values(
                    output=_output(kind, place, spec, row.manifest or {}),
                    place=place,
                    model_name=name,
                    search=" ".join(words).lower(),
                )
            )
        last = rows[-1].id


def _kind_from_manifest(manifest: dict[str, Any] | None) -> str | None:
    return {"rows": "rows", "image": "images", "video": "video"}.get((manifest or {}).get("output") or "")


def _kind_from_spec(spec: dict[str, Any], model: dict[str, Any]) -> str | None:
    """What the job can only be writing; None where that depends on the code of the user's scorer."""
    form, options, kind = spec.get("format"), model.get("options") or {}, model.get("kind")
    suffix = _suffix(spec)
    of_video = spec.get("codec") is not None or spec.get("crf") is not None or spec.get("audio") is False
    if suffix in _VIDEOS or form in _VIDEOS.values() or of_video:
        return "video"
    if suffix in _ROWS or form in _ROWS.values() or spec.get("media") == "table":
        return "rows"
    if spec.get("frames") is not None or form in _IMAGES:
        return "images"
    task = options.get("task")
    images = spec.get("overlay") or (
        kind == "onnx" and (task == "restyle" or (task == "segment" and options.get("output") == "image"))
    )
    if images:
        return "video" if spec.get("media") == "video" else "images"
    return None if kind in ("python", "object") else "rows"


def _output(known: str, place: str, spec: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    suffix, form = _suffix(spec), spec.get("format")
    kind = "rows" if known == "unknown" else known
    options = {name: spec.get(name) for name in ("codec", "crf", "audio")} if kind == "video" else {}
    if known == "unknown":  # rows or images, as the scorer's code says; what was published tells whoever opens it
        options = {"guessed": True}
    forms = {
        "rows": manifest.get("format") or _ROWS.get(suffix) or form or "parquet",
        "images": spec.get("frames") or form,
        "video": manifest.get("format") or _VIDEOS.get(suffix) or form or "mp4",
    }
    return {
        "kind": kind,
        "place": place,
        "merged": suffix in {"rows": _ROWS, "images": {}, "video": _VIDEOS}[kind],
        "format": forms[kind],
        "columns": None,
        "order": None,
        "options": options,
        "unit": {"video": "frames", "table": "rows"}.get(spec.get("media") or "", "items"),
    }


def _suffix(spec: dict[str, Any]) -> str:
    """Of an output that is one file; of a folder, nothing."""
    out: str = spec.get("out") or ""
    return "" if out.endswith("/") else PurePosixPath(out).suffix.lower()


def _text(text: str) -> str:
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
