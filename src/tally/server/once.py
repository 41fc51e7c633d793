"""Idempotency keys: a request that is repeated, as its answer was lost, is answered again and not carried out again.

The header ``Idempotency-Key`` of a POST names the request. The answer is kept in the database for a day: the same key
with the same request gets it again, with another request it is refused, while the first one is still being carried out
too. An answer that holds a secret is not kept: there the repetition is told that it was done.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from fastapi import Request, Response
from starlette.datastructures import UploadFile

from tally.database.clock import now
from tally.database.tables import answers
from tally.errors import JobStateError, RefusedError, SpecError
from tally.server.auth.guard import GuardedRoute, principal_of
from tally.server.uploads import MAX_FILES

HEADER = "Idempotency-Key"
KEPT_SECONDS = 86_400.0
LOST_SECONDS = 300.0
"""After which a request counts as lost whose answer is not there: its server was killed."""
_KEY = re.compile(r"[\x21-\x7e]{1,200}")
_DESCRIPTION = (
    "Names this request: sent again within a day, it gets the same answer, and nothing is done a second time."
)
_PARAMETER = {
    "name": HEADER, "in": "header", "required": False, "description": _DESCRIPTION,
    "schema": {"type": "string", "minLength": 1, "maxLength": 200},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request was answered with. body: JSON; None where it was a secret."""

    status: int
    body: bytes | None


class AnswerStore:
    """The answers in one database. Safe to use from several threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def begin(self, key: str, request: str) -> Answer | None:
        """The answer that the request got before; None where it is to be carried out, by the caller now.

        Raises SpecError if the key was used for another request, JobStateError while it is being carried out.
        """
        stale = sa.or_(
            answers.c.at < now() - KEPT_SECONDS,
            sa.and_(answers.c.status.is_(None), answers.c.at < now() - LOST_SECONDS),
        )
        with self._engine.begin() as connection:
            connection.execute(sa.delete(answers).where(stale))
        try:
            with self._engine.begin() as connection:
                connection.execute(sa.insert(answers).values(key=key, request=request, at=now()))
        except sa.exc.IntegrityError:
            pass
        else:
            return None
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(answers).where(answers.c.key == key)).mappings().first()
        if row is not None and row["request"] != request:
            raise SpecError(f"this {HEADER} was sent with another request", hint="Each request has a key of its own.")
        if row is None or row["status"] is None:
            raise JobStateError(f"the request of this {HEADER} is being carried out", hint="Ask again in a moment.")
        return Answer(row["status"], row["body"])

    def end(self, key: str, answer: Answer | None) -> None:
        """Keep the answer; None: the request may be tried again."""
        mine = answers.c.key == key
        with self._engine.begin() as connection:
            if answer is None:
                connection.execute(sa.delete(answers).where(mine))
            else:
                connection.execute(sa.update(answers).where(mine).values(status=answer.status, body=answer.body))


class OnceRoute(GuardedRoute):
    """A route that carries out a POST with an idempotency key once."""

    secret = False
    """Whether answers hold what must not be kept."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if "POST" in (options.get("methods") or ()):
            options["openapi_extra"] = {"parameters": [_PARAMETER], **(options.get("openapi_extra") or {})}
            options["responses"] = {409: options["responses"][422], **options["responses"]}
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        plain = super().get_route_handler()

        async def handle(request: Request) -> Response:
            name = request.headers.get(HEADER)
            if name is None or request.method != "POST":
                return await plain(request)
            who = await self.let_in(request) or await principal_of(request)
            if not _KEY.fullmatch(name):
                raise SpecError(f"{HEADER}: should be 1 to 200 visible characters of ASCII")
            store = AnswerStore(request.app.state.jobs.store.engine)
            key = hashlib.sha256(f"{who.key_id}\0{name}".encode()).hexdigest()
            asked = await _digest(request)
            request.state.once = f"{key}{asked}"
            before = await asyncio.to_thread(store.begin, key, asked)
            if before is not None:
                if before.body is None:
                    raise RefusedError(409, "this was done already, and its answer was shown that once")
                return Response(before.body, before.status, media_type="application/json")
            kept: Answer | None = None
            try:
                answer = await plain(request)
                kept = Answer(answer.status_code, None if self.secret else bytes(answer.body))
            finally:  # an error has changed nothing: the request may be sent again, corrected or not
                await asyncio.to_thread(store.end, key, kept)
            return answer

        return handle


class SecretOnceRoute(OnceRoute):
    """As that, of answers that are not kept."""

    secret = True


def name_of(request: Request) -> str | None:
    """What names the request: the same when it is sent again; None where it has no idempotency key.

    A server that was killed between a change and the answer to it has left no answer. What the change makes is called
    after this, so that carrying the request out again makes it no second time.
    """
    found: str | None = getattr(request.state, "once", None)
    return found


async def _digest(request: Request) -> str:
    """A hash of what is asked. Of forms, of their fields: what is between them differs each time."""
    digest = hashlib.sha256(f"{request.method} {request.url.path}?{request.url.query}\0".encode())
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        for name, value in (await request.form(max_files=MAX_FILES)).multi_items():
            if isinstance(value, UploadFile):
                digest.update(f"{name}\0{value.filename}\0{value.size}\0".encode())
                while block := await value.read(1 << 20):
                    digest.update(block)
                await value.seek(0)
            else:
                digest.update(f"{name}\0{value}\0".encode())
    else:
        digest.update(await request.body())
    return digest.hexdigest()
