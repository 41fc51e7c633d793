"""The server's application: the API, the pages, and the thread that starts coordinators."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI

import tally
from tally.jobs.facade import Jobs
from tally.server import errors, health
from tally.server.api import jobs as jobs_api
from tally.server.api import keys as keys_api
from tally.server.auth.audit import AuditLog
from tally.server.auth.guard import Guard
from tally.server.auth.keys import KeyStore
from tally.server.auth.throttle import Throttle
from tally.server.feed import Feed
from tally.server.middleware import Audited, BodyLimit, SecurityHeaders
from tally.server.pages import routes as pages
from tally.server.results import Results
from tally.server.settings import ServerSettings
from tally.server.supervisor import Supervisor
from tally.triggers.watch import Watcher

DESCRIPTION = """
Start, watch and stop jobs. Every request but those for health needs a key: `Authorization: Bearer KEY`.
Every error has the shape `{"error": {"type", "message", "hint"}}`. Times are seconds since the epoch.
"""


def create_app(jobs: Jobs, settings: ServerSettings) -> FastAPI:
    """The application over the database of ``jobs``."""
    engine = jobs.store.engine
    audit = AuditLog(engine)
    supervisor = Supervisor(jobs, parallel=settings.parallel)
    watcher = Watcher(jobs, taken=supervisor.wake)
    feed, results = Feed(), Results(jobs)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        threads = [
            threading.Thread(target=supervisor.run, name="tally-supervisor"),
            threading.Thread(target=watcher.run, name="tally-watcher"),
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            await feed.close()
            watcher.stop()
            supervisor.stop()
            for thread in threads:
                await asyncio.to_thread(thread.join)
            await asyncio.to_thread(results.close)

    app = FastAPI(
        title="Tally",
        version=tally.__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        openapi_url="/api/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    app.state.jobs, app.state.settings, app.state.feed, app.state.audit = jobs, settings, feed, audit
    app.state.supervisor, app.state.results = supervisor, results
    app.state.guard = Guard(KeyStore(engine), Throttle())
    errors.install(app)
    api = APIRouter(prefix="/api/v1")
    api.include_router(jobs_api.router)
    api.include_router(keys_api.router)
    app.include_router(api)
    app.include_router(health.router)
    pages.install(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit)
    app.add_middleware(Audited, audit=audit)
    app.add_middleware(SecurityHeaders)
    return app
