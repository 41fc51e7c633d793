"""gRPC for the server of endpoints: in its event loop, with its models, keys and certificates.

Nothing of a request is read here but its model's name: its bytes are passed on as they are, and replicas read them.
What the protocols mean say their files in :mod:`tally.serving.protocols`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast

import grpc
import grpc.aio

from tally.errors import StorageError
from tally.serving import protobuf, protocols
from tally.serving.endpoint import Endpoint
from tally.serving.messages import Answer
from tally.serving.pool import Pending
from tally.serving.protocols.base import GrpcProtocol, Reply, RequestError, Route
from tally.serving.settings import ServeSettings

HEALTH = "grpc.health.v1.Health"
HEALTH_SECONDS = 0.5
"""How often whoever watches the health is told of a change, at most."""
KEEPALIVE_SECONDS = 60
"""A connection that has been silent for so long is asked whether it is still there."""
STREAMS = 1024
"""Requests of one connection that may be in work; its client holds back more."""
HOLD_SECONDS = 1.0
"""How long answers are held back at the end, at most."""
STILL_SECONDS = 0.1
"""When no request has come for so long, all that were sent have."""
DETAILS = 1000
"""Characters of an error that are sent: details are a header, and clients refuse long ones."""

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""A status of HTTP as gRPC has it."""


class Models(Protocol):
    """What is served, whatever it is asked by. draining: it is about to end. ready: each model can be asked."""

    settings: ServeSettings
    endpoints: dict[str, Endpoint]

    @property
    def draining(self) -> bool: ...

    @property
    def ready(self) -> bool: ...

    def check_key(self, route: Route, given: str | None) -> None:
        """Raises RequestError where the route needs a key, and what the Authorization header gives is none."""

    def endpoint(self, route: Route) -> Endpoint:
        """The endpoint that a request is for. Raises RequestError."""

    def tell(self, route: Route) -> Reply:
        """Answer what no replica is needed for. Raises RequestError."""

    async def manage(self, route: Route) -> None:
        """Load or unload a model. Raises RequestError."""


class GrpcServer:
    """Serves models over gRPC. Used in their event loop only."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._server: Any = None
        self._handlers: dict[str, Any] = {
            f"/{HEALTH}/Check": grpc.unary_unary_rpc_method_handler(self._check),
            f"/{HEALTH}/Watch": grpc.unary_stream_rpc_method_handler(self._watch),
        }
        self._protocols: Sequence[GrpcProtocol] = protocols.over_grpc()
        self._arrived = 0.0
        self._answering = asyncio.Event()
        self._answering.set()
        self._services = {HEALTH, *(service for each in self._protocols for service in each.services)}

    async def start(self) -> int:
        """Listen, and return the port. Raises StorageError where that cannot be done."""
        settings = self._models.settings
        options = {
            "grpc.so_reuseport": 0,  # a port that another server has is an error
            "grpc.max_receive_message_length": settings.max_body,
            "grpc.max_send_message_length": -1,
            "grpc.max_concurrent_streams": STREAMS,
            "grpc.keepalive_time_ms": KEEPALIVE_SECONDS * 1000,
            "grpc.http2.min_ping_interval_without_data_ms": 10_000,
        }
        self._server = grpc.aio.server(options=list(options.items()))
        self._server.add_generic_rpc_handlers((self,))
        address = f"{f'[{settings.host}]' if ':' in settings.host else settings.host}:{settings.grpc_port}"
        try:
            if settings.certificate is not None and settings.private_key is not None:
                pair = settings.private_key.read_bytes(), settings.certificate.read_bytes()
                port = self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
            else:
                port = self._server.add_insecure_port(address)
        except (RuntimeError, OSError):
            port = 0
        if not port:
            raise StorageError(
                f"port {settings.grpc_port} of {settings.host} cannot be used for gRPC: is it in use?",
                hint="Give another: --grpc-port 0 takes any that is free.",
            )
        await self._server.start()
        return int(port)

    async def stop(self, seconds: float) -> None:
        """Answer what has been sent, and end.

        A gRPC server that ends refuses what comes before its clients know. So answers are held back until clients have
        nothing more to send, and let go once their connections say, before the answers, that this is the end.
        """
        if self._server is None:
            return
        self._answering.clear()
        until = time.monotonic() + min(seconds / 2, HOLD_SECONDS)
        while (now := time.monotonic()) < until and now - self._arrived < STILL_SECONDS:
            await asyncio.sleep(0.01)
        stopping = asyncio.ensure_future(self._server.stop(seconds))
        await asyncio.sleep(STILL_SECONDS)
        self._answering.set()
        await stopping

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """What answers a method; None for UNIMPLEMENTED."""
        path = details.method
        handler = self._handlers.get(path)
        if handler is None:
            route = next((found for each in self._protocols if (found := each.route(path)) is not None), None)
            if route is not None:
                handler = grpc.unary_unary_rpc_method_handler(self._handler(route))
                self._handlers[path] = handler
        return handler

    # -- requests -----------------------------------------------------------------------------------------

    def _handler(self, route: Route) -> Any:
        """A handler for what a route is about."""

        async def answer(body: bytes, context: Any) -> bytes:
            self._arrived = time.monotonic()
            try:
                reply = await self._reply(route, body, context)
            except RequestError as error:
                reply = route.protocol.refusal(error)
            await self._answering.wait()
            if reply.status == 200:
                return reply.body
            context.set_code(CODES.get(reply.status, grpc.StatusCode.UNKNOWN))
            context.set_details((reply.error or "")[:DETAILS].encode("utf-8", "backslashreplace").decode())
            if seconds := dict(reply.headers).get("Retry-After"):
                context.set_trailing_metadata((("grpc-retry-pushback-ms", f"{seconds}000"),))
            return b""

        return answer

    async def _reply(self, route: Route, body: bytes, context: Any) -> Reply:
        """The answer to a request. Raises RequestError."""
        arrived = time.monotonic()
        models = self._models
        sent = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        models.check_key(route, sent.get("authorization"))
        route = cast("GrpcProtocol", route.protocol).about(route, body)
        if route.operation == "score":
            if route.version is None:
                route = replace(route, version=sent.get("x-tally-version"))
            return await self._score(route, body, arrived, context)
        if route.operation in ("load", "unload"):
            await models.manage(route)
        return models.tell(route)

    async def _score(self, route: Route, body: bytes, arrived: float, context: Any) -> Reply:
        """The answer of a replica. If the client goes, or its deadline passes, nobody waits for it."""
        endpoint = self._models.endpoint(route)
        pool = endpoint.pool(route.version)
        answered: asyncio.Future[Answer | RequestError] = asyncio.get_running_loop().create_future()

        def done(outcome: Answer | RequestError) -> None:
            if not answered.done():  # cancelled, and we have not been told yet
                answered.set_result(outcome)

        left = context.time_remaining()
        deadline = arrived + (pool.limits.timeout if left is None else min(left, pool.limits.timeout))
        pending = Pending(route.protocol.name, body, dict(route.parameters), deadline, done)
        endpoint.submit(pool, pending)
        try:
            outcome = await answered
        except asyncio.CancelledError:
            pool.abandon(pending)
            raise
        if isinstance(outcome, Answer):
            waited: float | None = outcome.waited
            reply = Reply(outcome.status, outcome.body, outcome.headers, outcome.error)
        else:
            waited = None
            reply = route.protocol.refusal(outcome)
        pool.metrics.request(route.protocol.name, reply.status, time.monotonic() - arrived, waited)
        return reply

    # -- health -------------------------------------------------------------------------------------------

    async def _check(self, body: bytes, context: Any) -> bytes:
        try:
            status = self._health(body)
        except RequestError as error:
            context.set_code(CODES[error.status])
            context.set_details(error.message)
            return b""
        if status == "SERVICE_UNKNOWN":
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details("there is neither a service nor a model of this name")
        return _told(status)

    async def _watch(self, body: bytes, context: Any) -> AsyncIterator[bytes]:
        before = None
        while before != "NOT_SERVING" or not self._models.draining:
            status = self._health(body)
            if status != before:
                yield _told(status)
                before = status
            await asyncio.sleep(HEALTH_SECONDS)

    def _health(self, body: bytes) -> str:
        """The status of what a request names: the server, one of its services, or a model."""
        name = protobuf.parsed("grpc.health.v1.HealthCheckRequest", body).service
        models = self._models
        if name in models.endpoints:
            ready = models.endpoints[name].ready and not models.draining
        elif not name or name in self._services:
            ready = models.ready
        else:
            return "SERVICE_UNKNOWN"
        return "SERVING" if ready else "NOT_SERVING"


def _told(status: str) -> bytes:
    number = protobuf.enum("grpc.health.v1.HealthCheckResponse.ServingStatus")[status]
    told: bytes = protobuf.message("grpc.health.v1.HealthCheckResponse")(status=number).SerializeToString()
    return told
