"""A job's results over HTTP: rows in pages, SQL, and the files that were written, whole or in ranges."""

from __future__ import annotations

import hashlib
import mimetypes
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.background import BackgroundTask

from tally.errors import RefusedError, SpecError
from tally.server.api.jobs import AllJobs, JobId
from tally.server.api.views import ResultFile, RowPage, Rows
from tally.server.auth.guard import GuardedRoute, Viewer
from tally.server.errors import answers
from tally.server.middleware import POLICY_OF_FILES
from tally.server.results import Results, read_blocks
from tally.storage import Store

router = APIRouter(
    prefix="/jobs",
    tags=["results"],
    route_class=GuardedRoute,
    responses=answers(400, 401, 403, 404, 409, 422, 429, 503),
)

ARROW = "application/vnd.apache.arrow.stream"
_MOST_ROWS = {"json": 10_000, "arrow": 1_000_000}
_SHOWN = re.compile(r"(image/(jpeg|png|webp|gif)|video/(mp4|webm|quicktime|x-matroska)|text/csv|application/json)")
"""Types that a browser may show; it is told of no other, and runs none of these."""
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


class SqlQuery(BaseModel):
    """A question. limit: rows of the answer, at most. format: JSON has at most 10,000 rows, Arrow a million."""

    sql: str = Field(min_length=1, max_length=20_000)
    limit: int = Field(1000, ge=1, le=1_000_000)
    format: Literal["json", "arrow"] = "json"


def results_of(request: Request) -> Results:
    found: Results = request.app.state.results
    return found


@router.post("/{job}/query", response_model=Rows, responses={200: {"content": {ARROW: _BINARY}, "description": "Rows"}})
def query_job(request: Request, who: Viewer, jobs: AllJobs, job: JobId, asked: SqlQuery) -> Any:
    """One SELECT in DuckDB's SQL over the views ``results`` and ``dead``. Nothing else can be read."""
    if asked.limit > (most := _MOST_ROWS[asked.format]):
        raise SpecError(f"limit: an answer as {asked.format} has at most {most:,} rows, not {asked.limit:,}")
    job_id, results = jobs.store.get(job).id, results_of(request)
    if asked.format == "json":
        return results.query(job_id, asked.sql, limit=asked.limit)
    with tempfile.NamedTemporaryFile(prefix="tally-answer-", delete=False) as file:
        path = FilePath(file.name)
    try:
        more = results.arrow(job_id, asked.sql, path, limit=asked.limit)
    except BaseException:
        path.unlink()
        raise
    headers = {"X-Truncated": str(more).lower()}
    return FileResponse(path, media_type=ARROW, headers=headers, background=BackgroundTask(path.unlink))


@router.get("/{job}/rows")
def job_rows(
    request: Request,
    who: Viewer,
    jobs: AllJobs,
    job: JobId,
    order: Annotated[Literal["source", "key"], Query(description="That of the source; or by key.")] = "source",
    after: Annotated[str | None, Query(description="``next`` of the page before.", max_length=8000)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
) -> RowPage:
    """A page of the rows. In the source's order, ``after`` may also be how many rows to pass over."""
    found, following = results_of(request).page(jobs.store.get(job).id, order=order, after=after, limit=limit)
    return RowPage(**found.model_dump(), next=following)


@router.get("/{job}/files")
def job_files(request: Request, who: Viewer, jobs: AllJobs, job: JobId) -> list[ResultFile]:
    """The files of a job whose results are published; none before that."""
    return results_of(request).files(jobs.store.get(job).id)


@router.get(
    "/{job}/files/{name:path}",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/octet-stream": _BINARY}, "description": "The file"},
        206: {"content": {"application/octet-stream": _BINARY}, "description": "A part of it"},
        **answers(416),
    },
)
def job_file(
    request: Request,
    who: Viewer,
    jobs: AllJobs,
    job: JobId,
    name: Annotated[str, Path(min_length=1, max_length=4000)],
    range_: Annotated[str | None, Header(alias="Range", max_length=1000)] = None,
    if_range: Annotated[str | None, Header(alias="If-Range", max_length=1000)] = None,
) -> Response:
    """A file of the output, as it was written; with the header ``Range``, one part of it. Pictures that the job has
    made are those of the column ``file`` of its rows."""
    store, size = results_of(request).file(jobs.store.get(job).id, name)
    return send_file(store, name, size, range_, if_range)


def send_file(store: Store, name: str, size: int, range_: str | None, if_range: str | None) -> Response:
    """The file, or the part of it that the headers ``Range`` and ``If-Range`` ask for. Raises RefusedError (416)."""
    tag = '"' + hashlib.sha256(store.version(name).encode()).hexdigest()[:32] + '"'
    kind = mimetypes.guess_type(name)[0] or ""
    shown = _SHOWN.fullmatch(kind) is not None
    last = quote(name.rpartition("/")[2], safe="")
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Security-Policy": POLICY_OF_FILES,
        "ETag": tag,
        "Content-Disposition": f"{'inline' if shown else 'attachment'}; filename*=UTF-8''{last}",
    }
    start, stop, status = 0, size, 200
    if range_ is not None and (if_range is None or if_range == tag) and (asked := _RANGE.fullmatch(range_.strip())):
        start, stop = _part(asked[1], asked[2], size)
        status = 206
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["Content-Length"] = str(stop - start)

    def content() -> Iterator[bytes]:
        yield from read_blocks(store, name, start, stop)

    return StreamingResponse(content(), status, headers, media_type=kind if shown else "application/octet-stream")


def _part(first: str, last: str, size: int) -> tuple[int, int]:
    """The bytes that a range names. Raises RefusedError (416) where there are none of them."""
    if first:
        start, stop = int(first), min(int(last) + 1, size) if last else size
    else:
        start, stop = max(0, size - int(last or 0)), size
    if start >= stop:
        raise RefusedError(416, f"the file has {size:,} bytes, and none of those that the range names")
    return start, stop
