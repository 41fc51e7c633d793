"""Uploads over HTTP: files that a job may name as its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request, UploadFile
from starlette.datastructures import UploadFile as PlainUpload

from tally.jobs.facade import Jobs
from tally.jobs.states import ENDED
from tally.server.api.jobs import AllJobs
from tally.server.auth.guard import Operator
from tally.server.errors import answers
from tally.server.once import OnceRoute
from tally.server.uploads import Upload, Uploads

router = APIRouter(
    prefix="/uploads", tags=["uploads"], route_class=OnceRoute, responses=answers(400, 401, 403, 413, 422, 429, 503)
)


@router.post("", status_code=201)
def upload_files(
    request: Request,
    who: Operator,
    jobs: AllJobs,
    files: list[UploadFile],
    unpack: Annotated[bool, Query(description="They are zip archives, whose files are kept instead.")] = False,
) -> Upload:
    """Keep files for a week. The answer's ``place`` may be a job's source, and its files a model's."""
    return keep(request.app.state.uploads, jobs, files, unpack=unpack)


def keep(uploads: Uploads, jobs: Jobs, files: Sequence[PlainUpload], *, unpack: bool) -> Upload:
    """Keep these files, and remove what has expired. Raises as :meth:`Uploads.add`."""
    uploads.sweep(lambda upload: any(each.state not in ENDED for each in jobs.list(text=upload, limit=1000).jobs))
    return uploads.add([(each.filename or "", each.file) for each in files], unpack=unpack)
