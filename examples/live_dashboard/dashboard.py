"""The live page and the routes it asks: what a detector has found, how fast, and what that costs.

    uvicorn --app-dir examples/live_dashboard dashboard:app --port 7071

Environment: DATABASE, the URL of the database that boxes are pushed into, here with SQLAlchemy's names of drivers
(``sqlite:///dashboard.db``); BOXES and THUMBS, where the two jobs write to, and the bucket's credentials; TALLY_SERVER
and TALLY_KEY, a viewer's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, Response
from obstore.exceptions import BaseError
from obstore.store import from_url

import tally

LATEST, MOST = 10, 100
BOXES = os.environ["BOXES"]

# The table that boxes are pushed into: id and seen are the database's own, and say what is new.
metadata = sa.MetaData()
inferences = sa.Table(
    "inferences",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("seen", sa.DateTime(timezone=True), server_default=sa.func.current_timestamp()),
    sa.Column("key", sa.Text, nullable=False, index=True),
    sa.Column("item_row", sa.Integer),
    sa.Column("label", sa.Text),
    *(sa.Column(name, sa.Double) for name in ("score", "xmin", "ymin", "xmax", "ymax")),
    sqlite_autoincrement=True,
)
database = sa.create_engine(os.environ["DATABASE"])
metadata.create_all(database)

server, thumbs = tally.Client(), from_url(os.environ["THUMBS"])
app = FastAPI(title="Live dashboard")
# Any page may look; none but this one may delete.
app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["GET"])
api = APIRouter(prefix="/api/coco")


def pictures_after(last: int, most: int) -> list[tuple[int, str]]:
    """Id and key of the newest pictures whose boxes came after the row of that id, oldest first."""
    newest = sa.func.max(inferences.c.id)
    query = sa.select(newest, inferences.c.key).group_by(inferences.c.key).having(newest > last)
    with database.connect() as connection:
        found = connection.execute(query.order_by(newest.desc()).limit(most)).all()
    return [(row[0], row[1]) for row in reversed(found)]


def labels_of(keys: Sequence[str]) -> dict[str, list[str]]:
    """The distinct labels of each picture, the surest first."""
    query = sa.select(inferences.c.key, inferences.c.label).where(inferences.c.key.in_(keys))
    found: dict[str, dict[str, None]] = {key: {} for key in keys}
    with database.connect() as connection:
        for key, label in connection.execute(query.order_by(inferences.c.item_row)):
            found[key][label] = None
    return {key: list(labels) for key, labels in found.items()}


@api.get("/vis")
def latest() -> dict[str, Any]:
    """The labels of the last ten pictures, as a graph."""
    return since(0)


@api.get("/vis/{last}")
def since(last: int) -> dict[str, Any]:
    """The same of pictures that are newer. Edges join each label of a picture and the next one."""
    pictures = pictures_after(last, MOST if last else LATEST)
    labels = labels_of([key for _, key in pictures]).values()
    return {
        "nodes": [
            {"title": label, "label": label, "id": label, "group": label, "font": "12px sans-serif"}
            for label in dict.fromkeys(each for some in labels for each in some)
        ],
        "edges": [{"from": one, "to": other} for some in labels for one, other in pairwise(some)],
        "lastObject": str(pictures[-1][0] if pictures else last),
    }


@api.get("/images/{last}")
def images(last: int) -> list[dict[str, str]]:
    """Pictures that are newer: the hundred newest, at most."""
    return [{"_id": str(number), "image": key} for number, key in pictures_after(last, MOST)]


@api.get("/agents")
def agents() -> dict[str, int]:
    """How many workers the job keeps busy, on average, and one at least while it runs."""
    job = server.get(BOXES)
    busy = [each.workers for each in server.figures().running if each.id == job.id]
    return {"agents": max(1, math.ceil(busy[0])) if busy else 0}


@api.get("/cost")
def cost() -> dict[str, str]:
    """What the workers have cost, in the server's currency: for the seconds that they were busy."""
    seconds = server.get(BOXES).stages.get("worker_seconds", 0.0)
    return {"cost": f"{Decimal(f'{seconds / 3600 * server.figures().price_per_hour:.2e}'):f}"}


@api.get("/stats")
def stats() -> dict[str, int]:
    """Pictures of the last minute."""
    query = sa.select(sa.func.count(inferences.c.key.distinct()))
    with database.connect() as connection:
        ago = datetime.now(UTC) - timedelta(minutes=1)
        return {"tpm": connection.scalar(query.where(inferences.c.seen > ago)) or 0}


@api.delete("/clear")
def clear() -> dict[str, str]:
    """Forget what was found. A link, an image or a page of another site asks with GET, and deletes nothing."""
    with database.begin() as connection:
        connection.execute(sa.delete(inferences))
    return {"message": "OK"}


@api.get("/thumbs/{name:path}")
def thumbnail(name: str) -> Response:
    """The thumbnail of a picture, from the bucket."""
    try:
        content = bytes(thumbs.get(name).bytes())
    except (FileNotFoundError, BaseError):
        raise HTTPException(404, "there is no such thumbnail yet") from None
    return Response(content, media_type="image/jpeg", headers={"X-Content-Type-Options": "nosniff"})


@app.get("/", include_in_schema=False)
def page() -> FileResponse:
    """The live page."""
    return FileResponse(Path(__file__).with_name("page.html"))


app.include_router(api)
