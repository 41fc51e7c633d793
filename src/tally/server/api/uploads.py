"""Uploads over HTTP: files that a job may name as its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from tally.errors import SpecError
from tally.jobs.facade import Jobs
from tally.jobs.states import ENDED
from tally.server.api.jobs import AllJobs
from tally.server.auth.guard import Operator
from tally.server.errors import answers
from tally.server.once import OnceRoute
from tally.server.uploads import MAX_FILES, Upload, Uploads

router = APIRouter(
    prefix="/uploads", tags=["uploads"], route_class=OnceRoute, responses=answers(400, 401, 403, 413, 422, 429, 503)
)


_FILES = {"type": "array", "minItems": 1, "items": {"type": "string", "contentMediaType": "application/octet-stream"}}
_FORM = {"type": "object", "required": ["files"], "properties": {"files": _FILES}}


@router.post(
    "",
    status_code=201,
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}},
)
async def upload_files(
    request: Request,
    who: Operator,
    jobs: AllJobs,
    unpack: Annotated[bool, Query(description="They are zip archives, whose files are kept instead.")] = False,
) -> Upload:
    """Keep files for a week. The answer's ``place`` may be a job's source, and its files a model's."""
    # FastAPI would read a parameter's files before it asks whether whoever sends them may do so.
    async with request.form(max_files=MAX_FILES) as form:
        files = [each for each in form.getlist("files") if isinstance(each, UploadFile)]
        if not files or len(files) < len(form.getlist("files")):
            raise SpecError("body.files: should be files, as a form with a field for files sends them")
        return await run_in_threadpool(keep, request.app.state.uploads, jobs, files, unpack=unpack)


def keep(uploads: Uploads, jobs: Jobs, files: Sequence[UploadFile], *, unpack: bool) -> Upload:
    """Keep these files, and remove what has expired. Raises as :meth:`Uploads.add`."""
    uploads.sweep(lambda upload: any(each.state not in ENDED for each in jobs.list(text=upload, limit=1000).jobs))
    return uploads.add([(each.filename or "", each.file) for each in files], unpack=unpack)
