"""The server's application: the API, the pages, and the thread that starts coordinators."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

import anyio.to_thread
from fastapi import APIRouter, FastAPI

import tally
from tally.alerts.delivery import delivering
from tally.jobs.facade import Jobs
from tally.jobs.pictures import MAX_BYTES
from tally.server import errors, health, metrics
from tally.server.api import endpoints as endpoints_api
from tally.server.api import figures, models, queues, schedules, uploads, watches
from tally.server.api import jobs as jobs_api
from tally.server.api import keys as keys_api
from tally.server.api import pipelines as pipelines_api
from tally.server.api import results as results_api
from tally.server.api import runs as runs_api
from tally.server.api import sweeps as sweeps_api
from tally.server.aside import Aside
from tally.server.auth.audit import AuditLog
from tally.server.auth.guard import Guard
from tally.server.auth.keys import KeyStore
from tally.server.auth.throttle import Throttle
from tally.server.feed import Feed
from tally.server.gallery import Gallery
from tally.server.machine import Machine
from tally.server.middleware import MAX_BODY, Audited, BodyLimit, Ending, InHand, SecurityHeaders
from tally.server.pages import accounts
from tally.server.pages import routes as pages
from tally.server.pages.labels import Labels
from tally.server.results import Results
from tally.server.room import THREADS, Room
from tally.server.settings import ServerSettings
from tally.server.supervisor import Supervisor
from tally.server.uploads import Uploads
from tally.serving.deployments import DeploymentStore
from tally.serving.launch import Endpoints
from tally.triggers.loop import Loop
from tally.triggers.store import ScheduleStore
from tally.triggers.watch import Watcher

log = logging.getLogger("tally")

BROKERS = 16
"""Requests that ask a broker at once, at most."""

DESCRIPTION = """
Start, watch and stop jobs. Every request but those for health needs a key: `Authorization: Bearer KEY`.
Every error has the shape `{"error": {"type", "message", "hint"}}`. Times are seconds since the epoch.
"""


def create_app(jobs: Jobs, settings: ServerSettings) -> FastAPI:
    """The application over the database of ``jobs``."""
    engine = jobs.store.engine
    audit = AuditLog(engine)
    supervisor = Supervisor(jobs, parallel=settings.parallel, keep_warm=settings.keep_warm)
    watcher = Watcher(jobs, taken=supervisor.wake)
    loop = Loop(ScheduleStore(engine), say=log.info)
    endpoints = Endpoints(DeploymentStore(engine))
    feed, aside, in_hand = Feed(), Aside(), InHand()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        threads = [
            threading.Thread(target=supervisor.run, name="tally-supervisor"),
            threading.Thread(target=watcher.run, name="tally-watcher"),
            threading.Thread(target=endpoints.run, name="tally-endpoints"),
        ]
        if settings.schedules:
            threads.append(threading.Thread(target=partial(loop.run, forever=True), name="tally-schedules"))
        for thread in threads:
            thread.start()
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="tally-request"))
        try:
            with delivering(engine):
                yield
        finally:
            await feed.close()
            await in_hand.ended()
            watcher.stop()
            loop.stop()
            supervisor.stop()
            endpoints.stop()
            for thread in threads:
                await asyncio.to_thread(thread.join)
            await asyncio.to_thread(aside.close)

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
    app.state.supervisor, app.state.aside, app.state.results = supervisor, aside, Results(jobs, aside)
    app.state.labels = Labels(app.state.results)
    app.state.gallery = Gallery(jobs, app.state.results, aside, settings.roots)
    app.state.brokers = Room(BROKERS)
    app.state.machine = Machine()
    app.state.uploads = Uploads(most=settings.max_upload)
    app.state.guard = Guard(KeyStore(engine), Throttle())
    errors.install(app)
    api = APIRouter(prefix="/api/v1")
    parts = (jobs_api, results_api, models, endpoints_api, schedules, watches, queues, uploads, figures, keys_api)
    for each in (*parts, runs_api, sweeps_api, pipelines_api):
        api.include_router(each.router)
    app.include_router(api)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.state.logins = {}
    # What these need is an extra.
    if settings.oidc is not None:
        from tally.server.auth.oidc import Oidc

        app.state.logins["oidc"] = "with your account"
        app.include_router(accounts.routes("oidc", Oidc(settings.oidc, KeyStore(engine))))
    if settings.github is not None:
        from tally.server.auth.github import GitHub

        app.state.logins["github"] = "with GitHub"
        app.include_router(accounts.routes("github", GitHub(settings.github, KeyStore(engine))))
    pages.install(app)
    # The last one added is the outermost.
    # Beside the files, an upload holds their names.
    limits = dict.fromkeys(("/api/v1/uploads", "/jobs/new", "/models"), settings.max_upload + MAX_BODY)
    app.add_middleware(BodyLimit, limits=limits | {"/endpoints/try": MAX_BYTES + MAX_BODY})
    app.add_middleware(Audited, audit=audit)
    app.add_middleware(Ending, in_hand=in_hand)
    app.add_middleware(SecurityHeaders)
    return app
