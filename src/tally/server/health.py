"""``/healthz`` and ``/readyz``: for who runs the server, without a key.

``/healthz`` is true while the process answers; ``/readyz`` while its database
does, too.
"""

from __future__ import annotations

import asyncio

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

import tally
from tally.errors import TallyError
from tally.version import commit

router = APIRouter(tags=["health"])

READY_SECONDS = 1.0
"""How long the database may take to answer."""


@router.get("/healthz")
async def healthz() -> dict[str, str | None]:
    """The process answers. commit: that this Tally was built from; null where that is not known."""
    return {"status": "ok", "version": tally.__version__, "commit": commit()}


@router.get("/readyz", responses={503: {"description": "The database does not answer."}})
async def readyz(request: Request) -> Response:
    """The database answers, too."""
    engine = request.app.state.jobs.store.engine
    try:
        await asyncio.wait_for(asyncio.to_thread(_ask, engine), READY_SECONDS)
    except TimeoutError:
        return _unready(f"the database has not answered within {READY_SECONDS:g} s")
    except TallyError as error:
        return _unready(error.message)
    return JSONResponse({"status": "ok", "version": tally.__version__, "commit": commit()})


def _ask(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        connection.execute(sa.select(sa.literal(1)))


def _unready(reason: str) -> Response:
    return JSONResponse({"status": "unready", "reason": reason}, status_code=503)
