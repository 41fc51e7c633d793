"""Every answer that is an error has one shape: ``{"error": {"type", "message", "hint", ...}}``."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from tally.errors import (
    DatabaseAwayError,
    JobExistsError,
    JobNotFoundError,
    JobStateError,
    ModelNotFoundError,
    OutputExistsError,
    RefusedError,
    SourceNotFoundError,
    SpecError,
    StorageAwayError,
    StorageError,
    TallyError,
    TriggerNotFoundError,
)

log = logging.getLogger("tally")

AWAY_SECONDS = 5
"""After how long to ask again for what is away."""

_DESCRIBED = "/api/v1/openapi.json describes what can be asked."
_SHOWN = 500
"""Characters of a path that are shown, at most."""

_STATUS: Sequence[tuple[type[TallyError | LookupError], int]] = (
    (TriggerNotFoundError, 404),
    (SpecError, 422),
    (JobNotFoundError, 404),
    (ModelNotFoundError, 404),
    (SourceNotFoundError, 404),
    (JobExistsError, 409),
    (JobStateError, 409),
    (OutputExistsError, 409),
    (DatabaseAwayError, 503),
    (StorageAwayError, 503),
    (LookupError, 404),
    (StorageError, 409),
    (TallyError, 409),
)
"""The first that fits."""


class Problem(BaseModel):
    """What went wrong."""

    type: str = Field(description="The name of the error, such as JobNotFoundError.")
    message: str = Field(description="What happened, with the offending value.")
    hint: str | None = Field(None, description="The next step.")
    problems: list[str] | None = Field(None, description="Everything that is wrong with the request.")
    job: str | None = Field(None, description="The job that is in the way.")


class ErrorAnswer(BaseModel):
    """The one shape of every error."""

    error: Problem


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's ``responses``: the errors that it may answer with."""
    return {status: {"model": ErrorAnswer} for status in statuses}


def answers_beside(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """As :func:`answers`, of a route whose answer is no JSON: FastAPI would say of errors that they are none either."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def install(app: FastAPI) -> None:
    """Have the app answer errors in this shape."""

    @app.exception_handler(TallyError)
    async def ours(request: Request, error: TallyError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        return answer(SpecError(problems, hint=_DESCRIBED))

    @app.exception_handler(RecursionError)
    async def too_deep(request: Request, error: RecursionError) -> JSONResponse:
        return answer(SpecError("something given is nested too deeply"))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        message, hint = str(error.detail), None
        if error.status_code in (404, 405):
            message = f"there is no {request.method} {request.url.path}"[:_SHOWN]
            hint = _DESCRIBED
        return answer(RefusedError(error.status_code, message, hint=hint), headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        problem = Problem(
            type="InternalError",
            message="the server failed at this; its log says why",
            hint=None,
            problems=None,
            job=None,
        )
        return _json(500, problem)


def answer(error: TallyError, *, headers: Any = None) -> JSONResponse:
    """The error as an answer."""
    headers = dict(headers or {})
    if isinstance(error, RefusedError):
        status = error.status
        if error.retry_after is not None:
            headers["Retry-After"] = str(math.ceil(error.retry_after))
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
    else:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        if status == 503:
            headers["Retry-After"] = str(AWAY_SECONDS)
    problem = Problem(
        type=type(error).__name__,
        message=error.message,
        hint=error.hint,
        problems=error.problems if isinstance(error, SpecError) else None,
        job=error.job_id if isinstance(error, JobExistsError) else None,
    )
    return _json(status, problem, headers)


def _json(status: int, problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": problem.model_dump(exclude_none=True)}, status_code=status, headers=headers)
