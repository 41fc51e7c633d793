"""The server of endpoints: one process that takes requests, and starts the replicas that answer them.

It opens no model and runs no user's code, so that whatever a model does, health is answered, and a request whose
replica dies gets an answer. It ends with SIGTERM or SIGINT, after what it was sent has been answered; with SIGHUP it
looks up its models again, and serves what it finds.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import logging
import resource
import signal
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import uvloop

from tally import garbage
from tally.errors import SpecError, StorageError, TallyError
from tally.models.reference import ModelRef
from tally.models.resolve import resolve
from tally.optional import needed
from tally.serving import protocols
from tally.serving.endpoint import Endpoint, label_of
from tally.serving.http import Connection, Exchange, Server
from tally.serving.keys import Keys
from tally.serving.messages import Answer
from tally.serving.metrics import Metrics
from tally.serving.pool import Pending, Pool, facts
from tally.serving.protocols.base import Reply, RequestError, Route
from tally.serving.settings import ModelSettings, ServeSettings
from tally.text import did_you_mean

if TYPE_CHECKING:
    from tally.serving.grpc import GrpcServer

log = logging.getLogger("tally")

BACKLOG = 4096
QUIET_SECONDS = 0.5
"""When no connection has come for so long, whoever sends requests has noticed that this server is to end."""
HANDSHAKE_SECONDS = 0.05
SO_ATTACH_FILTER = 26
ROUTES_KEPT = 4096
JSON = [("Content-Type", "application/json")]


class ModelServer:
    """Serves models until a signal. say: gets lines for the user."""

    def __init__(self, settings: ServeSettings, say: Callable[[str], None]) -> None:
        self.settings, self._say = settings, say
        self.metrics = Metrics()
        self.endpoints: dict[str, Endpoint] = {}
        self._http = Server(self._handle, settings.max_body)
        self._keys = Keys(settings.keys)
        self._routes: dict[str, Route | None] = {}
        self._protocols = [protocols.get(name) for name in protocols.PROTOCOLS]
        self._stop = asyncio.Event()
        self._signals = 0
        self.url = ""
        self.grpc_port: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._grpc = None if settings.grpc_port is None else _grpc_server(self)

    # -- life ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises TallyError where a model cannot be loaded, or the port is taken."""
        _raise_limit()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_or_leave)
        loop.add_signal_handler(signal.SIGHUP, lambda: self.spawn(self.reload()))
        listener = self._listen()
        spare = listener.dup()
        serving = await loop.create_server(
            lambda: Connection(self._http), sock=listener, backlog=BACKLOG, ssl=self._tls()
        )
        sweeping = loop.create_task(self._http.sweep())
        try:
            for model in self.settings.models:
                self.endpoints[model.name] = Endpoint(model, self.metrics, self._changed)
            host, port = spare.getsockname()[:2]
            scheme = "https" if self.settings.certificate else "http"
            self.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
            if self._grpc is not None:
                self.grpc_port = await self._grpc.start()
            stopping = loop.create_task(self._stop.wait())
            loading = loop.create_task(self.load())
            await asyncio.wait([stopping, loading], return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                self._announce()
                garbage.keep_what_is_loaded()
                await stopping
            else:
                loading.cancel()
        finally:
            sweeping.cancel()
            await self._drain(serving, spare)

    def _announce(self) -> None:
        for name, endpoint in self.endpoints.items():
            for pool in endpoint.versions.values():
                text = pool.description.text if pool.description else "waits for its first request"
                self._say(f"{name} (version {pool.version}): {text}")
        if self._grpc is not None:
            self._say(f"gRPC at {self.grpc_address}")
        self._say(f"Serving at {self.url}")
        for name in self.endpoints:
            base = "" if len(self.endpoints) == 1 else f"/api/v1/service/{name}"
            self._say(f"  scoring_uri: {self.url}{base}/score")
            self._say(f"  swagger_uri: {self.url}{base}/swagger.json")

    @property
    def grpc_address(self) -> str | None:
        """Where it answers over gRPC: ``HOST:PORT``; None before that, and without gRPC."""
        if self.grpc_port is None:
            return None
        return f"{urlsplit(self.url).netloc.rpartition(':')[0]}:{self.grpc_port}"

    async def load(self) -> None:
        """Load what is to be served. Raises TallyError."""
        async with asyncio.TaskGroup() as group:
            for endpoint in self.endpoints.values():
                group.create_task(self._load(endpoint))

    async def _load(self, endpoint: Endpoint) -> Pool:
        """Look up the endpoint's model, and serve what it is now."""
        ref = await asyncio.to_thread(_resolved, endpoint.settings)
        for sentence in ref.assumed:
            log.warning("%s: %s", endpoint.name, sentence)
        return await endpoint.load(ref, endpoint.settings.limits, label=label_of(endpoint.settings.model))

    async def reload(self) -> None:
        """Look up all models again. What cannot be loaded leaves its endpoint as it is."""
        for endpoint in self.endpoints.values():
            try:
                pool = await self._load(endpoint)
            except TallyError as error:
                log.error("%s is served as before: %s", endpoint.name, error.message)
            else:
                log.info("%s is served as version %s now", endpoint.name, pool.version)

    def _stop_or_leave(self) -> None:
        self._signals += 1
        if self._signals > 1:
            self._http.connections.clear()
            signal.raise_signal(signal.SIGKILL)
        self._stop.set()

    async def _drain(self, serving: asyncio.Server, spare: socket.socket) -> None:
        """Answer what has been sent; then end."""
        http = self._http
        http.draining = True  # not ready any more; each answer ends its connection
        until = time.monotonic() + self.settings.drain
        if http.connections:
            while time.monotonic() < min(until, http.accepted + QUIET_SECONDS):
                await asyncio.sleep(0.05)
        serving.close()  # the socket still listens, as its copy is open
        spare.setblocking(False)
        _refuse_new(spare)
        await asyncio.sleep(HANDSHAKE_SECONDS)  # those that have begun to connect are let in
        await self._take_rest(spare)
        spare.close()
        stopping = asyncio.ensure_future(self._stop_grpc(until))
        while http.connections and time.monotonic() < until:
            for each in list(http.connections):
                each.drain()
            await asyncio.sleep(0.01)
        await stopping
        await asyncio.gather(*(each.close(max(0.5, until - time.monotonic())) for each in self.endpoints.values()))

    async def _stop_grpc(self, until: float) -> None:
        if self._grpc is not None:
            await self._grpc.stop(max(0.5, until - time.monotonic()))

    async def _take_rest(self, listener: socket.socket) -> None:
        """Serve the connections that the kernel has accepted for us: closing the socket would break them."""
        loop = asyncio.get_running_loop()
        for _ in range(BACKLOG):
            try:
                accepted, _ = listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):
                await loop.connect_accepted_socket(lambda: Connection(self._http), accepted, ssl=self._tls())

    def _listen(self) -> socket.socket:
        settings = self.settings
        try:
            family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
            return socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror or error}"
            raise StorageError(
                f"port {settings.port} of {settings.host} {why}",
                hint="Give another: --port 0 takes any that is free.",
            ) from None

    def _tls(self) -> ssl.SSLContext | None:
        if self.settings.certificate is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.settings.certificate, self.settings.private_key)
        except (OSError, ssl.SSLError) as error:
            raise SpecError(
                f"the certificate {self.settings.certificate} and its key cannot be used: {error}"
            ) from None
        return context

    def _changed(self) -> None:
        for endpoint in self.endpoints.values():
            endpoint.note()

    @property
    def draining(self) -> bool:
        """Whether it is about to end."""
        return self._http.draining

    @property
    def ready(self) -> bool:
        """Whether each model can be asked."""
        return not self.draining and bool(self.endpoints) and all(each.ready for each in self.endpoints.values())

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Have this done in the event loop, too."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a fault in Tally", exc_info=error)

    def stop(self) -> None:
        """Answer what has been sent; then end."""
        self._stop.set()

    # -- requests -----------------------------------------------------------------------------------------

    def _handle(self, exchange: Exchange) -> None:
        path = exchange.path
        route = self._routes.get(path)
        if route is None and path not in self._routes:
            route = self._find(path)
        if route is None:
            self._own(exchange)
            return
        try:
            if exchange.method not in route.methods:
                allowed = ", ".join(route.methods)
                raise RequestError(405, f"{path} is for {allowed}, not {exchange.method}", Allow=allowed)
            self.check_key(route, exchange.header(b"authorization"))
            if route.operation == "score":
                self._score(exchange, route)
            elif route.operation in ("load", "unload"):
                self.spawn(self._manage(exchange, route))
            else:
                reply = self.tell(route)
                exchange.answer(reply.status, reply.body, reply.headers)
        except RequestError as error:
            reply = route.protocol.refusal(error)
            exchange.answer(reply.status, reply.body, reply.headers)

    def _find(self, path: str) -> Route | None:
        route = next((found for each in self._protocols if (found := each.route(path)) is not None), None)
        if len(self._routes) >= ROUTES_KEPT:
            self._routes.clear()
        self._routes[path] = route
        return route

    def endpoint(self, route: Route) -> Endpoint:
        """The endpoint that a request is for. Raises RequestError."""
        if route.model is None:
            if len(self.endpoints) == 1:
                return next(iter(self.endpoints.values()))
            names = ", ".join(self.endpoints)
            raise RequestError(404, f"this server has several models: {names}; name one: /api/v1/service/NAME/score")
        endpoint = self.endpoints.get(route.model)
        if endpoint is None:
            known = ", ".join(self.endpoints)
            close = did_you_mean(route.model, self.endpoints)
            raise RequestError(404, f"there is no model {route.model!r}{close}; there is {known or 'none'}")
        return endpoint

    def _score(self, exchange: Exchange, route: Route) -> None:
        endpoint = self.endpoint(route)
        version = route.version
        if version is None:
            given = exchange.headers
            version = _text(given.get(b"x-tally-version") or given.get(b"azureml-model-deployment"))
        pool = endpoint.pool(version)
        protocol = route.protocol
        parameters = dict(route.parameters)
        description = pool.description
        if protocol.name == "azureml":
            parameters["method"] = exchange.method
            if description is None or description.responds:  # the model itself reads the request
                parameters["path"], parameters["query"] = exchange.path, exchange.query
                for name, text in exchange.headers.items():
                    parameters["header:" + name.decode("latin-1")] = text.decode("latin-1")
        for wanted in protocol.wanted_headers:
            if (value := exchange.headers.get(wanted)) is not None:
                parameters["header:" + wanted.decode()] = value.decode("latin-1")

        def done(outcome: Answer | RequestError) -> None:
            waited: float | None = None
            if isinstance(outcome, Answer):
                status, body, headers = outcome.status, outcome.body, outcome.headers
                waited = outcome.waited
            else:
                reply = protocol.refusal(outcome)
                status, body, headers = reply.status, reply.body, list(reply.headers)
            exchange.answer(status, body, [*headers, ("X-Tally-Version", pool.version)])
            pool.metrics.request(protocol.name, status, time.monotonic() - exchange.arrived, waited)

        deadline = exchange.arrived + pool.limits.timeout
        pending = Pending(protocol.name, exchange.body, parameters, deadline, done)
        exchange.on_gone = lambda: pool.abandon(pending)
        endpoint.submit(pool, pending)

    def tell(self, route: Route) -> Reply:
        """Answer what no replica is needed for. Raises RequestError."""
        served = None
        if route.model is not None:
            served = self.endpoint(route).served(route.version)
        elif len(self.endpoints) == 1 and route.protocol.name == "azureml":
            served = next(iter(self.endpoints.values())).served()
        return route.protocol.tell(route, served, [each.served() for each in self.endpoints.values()])

    async def manage(self, route: Route) -> None:
        """Load or unload a model, as the repository extension of the Open Inference Protocol has it.
        Raises RequestError."""
        endpoint = self.endpoint(route)
        try:
            if route.operation == "load":
                await self._load(endpoint)
            else:
                await endpoint.unload(self.settings.drain)
        except TallyError as error:
            raise RequestError(400, error.message) from None

    async def _manage(self, exchange: Exchange, route: Route) -> None:
        try:
            await self.manage(route)
            reply = Reply(200, b"{}")
        except RequestError as error:
            reply = route.protocol.refusal(error)
        exchange.answer(reply.status, reply.body, reply.headers)

    def _own(self, exchange: Exchange) -> None:
        """What is the server's own."""
        match exchange.path:
            case "/healthz":
                exchange.answer(200, b'{"status": "ok"}', JSON)
            case "/readyz":
                ready = self.ready
                models = {
                    name: [facts(pool) for pool in each.versions.values()] for name, each in self.endpoints.items()
                }
                said = {"status": "ready" if ready else "not ready", "models": models}
                exchange.answer(200 if ready else 503, json.dumps(said).encode(), JSON)
            case "/metrics":
                self._changed()
                self.metrics.open.set(len(self._http.connections))
                kind = "text/plain; version=0.0.4; charset=utf-8"
                exchange.answer(200, self.metrics.text(), [("Content-Type", kind)])
            case path:
                text = f"there is nothing at {path[:200]}; GET / tells whether the model answers, /ui what can be asked"
                exchange.answer(404, json.dumps({"error": text}).encode(), JSON)

    def check_key(self, route: Route, given: str | None) -> None:
        """Raises RequestError where the route needs a key, and what the Authorization header gives is none."""
        if route.operation not in _OPEN:
            self._keys.check(given)


def _text(header: bytes | None) -> str | None:
    return None if header is None else header.decode("latin-1")


_OPEN = frozenset({"health", "live", "ready"})
"""What needs no key: whether it is alive."""


def _grpc_server(models: ModelServer) -> GrpcServer:
    with needed("serving over gRPC needs", "server,grpc"):
        from tally.serving.grpc import GrpcServer
    return GrpcServer(models)


def _resolved(model: ModelSettings) -> ModelRef:
    return resolve(model.model, **model.options)


def _refuse_new(listener: socket.socket) -> None:
    """Have the kernel let nobody begin to connect any more, while those who have begun may end.

    A listening socket that is closed resets connections that it has accepted and not handed over. With a filter that
    drops SYN packets, none comes that would be. Their clients try again, and find the port closed.
    """
    if sys.platform != "linux":
        listener.listen(0)
        return
    instructions = (
        (0x30, 0, 0, 13),  # the flags of TCP
        (0x54, 0, 0, 0x12),  # SYN and ACK
        (0x15, 0, 1, 0x02),  # is it SYN alone?
        (0x06, 0, 0, 0),  # drop it
        (0x06, 0, 0, 0xFFFF),  # keep it
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in instructions))
    program = struct.pack("HP", len(instructions), ctypes.addressof(code))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


def _raise_limit() -> None:
    """As many connections as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 1 << 20, hard))


def serve(settings: ServeSettings, *, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. Raises TallyError where a model cannot be loaded, or the port is taken."""

    run(lambda: ModelServer(settings, say))


def run(make: Callable[[], ModelServer]) -> None:
    """Run a server, made in its event loop, until its end. Raises TallyError."""

    async def serving() -> None:
        await make().run()

    failure: TallyError | None = None
    try:
        uvloop.run(serving())
    except* TallyError as errors:
        failure = _first(errors)
    if failure is not None:  # raised within, it would be in a group again
        raise failure


def _first(errors: BaseExceptionGroup[TallyError]) -> TallyError:
    found: BaseException = errors
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, TallyError)
    return found
