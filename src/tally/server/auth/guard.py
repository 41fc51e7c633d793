"""Who a request comes from, and whether that may do what it asks.

A request proves it with ``Authorization: Bearer KEY``, or with the cookie of a browser that has logged in. A cookie
goes with every request that any page makes, so a change that comes with one must also carry the page's CSRF token.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated, Any

from fastapi import Depends, Request, Response, Security
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer

from tally.errors import DatabaseAwayError, RefusedError
from tally.server.auth.keys import KeyStore, csrf_token
from tally.server.auth.roles import Principal, Role
from tally.server.auth.throttle import Throttle

COOKIE = "tally_session"
CSRF_HEADER = "X-CSRF-Token"
CSRF_FIELD = "csrf"
_SAFE = ("GET", "HEAD", "OPTIONS")
_OUR_SITE = ("same-origin", "none")
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")

_bearer = HTTPBearer(auto_error=False, scheme_name="key", description="A key that 'tally keys add' has printed.")
_cookie = APIKeyCookie(name=COOKIE, auto_error=False, scheme_name="session", description="A browser that logged in.")


class Guard:
    """Finds out who a request comes from. Used by every route that is not public."""

    def __init__(self, keys: KeyStore, throttle: Throttle) -> None:
        self.keys, self._throttle = keys, throttle

    def with_key(self, key: str, address: str) -> Principal:
        """Whose key this is. Raises RefusedError (401, or 429 after too many wrong ones)."""
        wait = self._throttle.wait(address)
        if wait > 0:
            raise RefusedError(
                429, f"too many wrong keys from {address}", hint=f"Try again in {wait:.0f} s.", retry_after=wait
            )
        principal = self.keys.principal(key)
        if principal is None:
            self._throttle.failed(address)
            raise RefusedError(401, "the key is wrong, has expired or was revoked", hint="Ask an admin for another.")
        self._throttle.succeeded(address)
        return principal


def address_of(request: Request) -> str:
    """The client's address. Behind a proxy, uvicorn has put the right one here (``--forwarded-allow-ips``)."""
    return request.client.host if request.client is not None else "unknown"


async def signed_in(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    cookie: Annotated[str | None, Security(_cookie)],
) -> Principal:
    """Who the request comes from. Raises RefusedError."""
    known: Principal | None = getattr(request.state, "principal", None)
    if known is not None:  # found out before the request was read
        return known
    guard: Guard = request.app.state.guard
    principal: Principal | None = None
    if bearer is not None:
        principal = await asyncio.to_thread(guard.with_key, bearer.credentials, address_of(request))
    elif cookie is not None:
        principal = await asyncio.to_thread(guard.keys.of_session, cookie)
        if principal is not None and request.method not in _SAFE:
            if request.headers.get("sec-fetch-site", "none") not in _OUR_SITE:  # said by browsers; the body is not read
                raise RefusedError(403, "a page of another site sent this", hint="Use the pages of this server.")
            shown = await _csrf(request)
            if not hmac.compare_digest(shown.encode("utf-8", "replace"), csrf_token(cookie).encode()):
                raise RefusedError(403, "the page that sent this is not one of this session", hint="Load it anew.")
    if principal is None:
        raise RefusedError(401, "this needs a key", hint="Send 'Authorization: Bearer KEY', or log in on the page.")
    request.state.principal = principal  # for the audit log
    return principal


async def principal_of(request: Request) -> Principal:
    """As :func:`signed_in`, of a request at hand."""
    return await signed_in(request, await _bearer(request), await _cookie(request))


def still_signed_in(request: Request) -> Callable[[], Awaitable[bool]]:
    """Asks whether who has sent the request may still be told something: for answers that go on for long."""
    keys, principal, cookie = request.app.state.guard.keys, request.state.principal, request.cookies.get(COOKIE)
    by_session = cookie is not None and "authorization" not in request.headers

    def look() -> bool:
        if by_session:
            return keys.of_session(cookie) is not None
        return bool(keys.get(principal.key_id).state == "valid")

    async def ask() -> bool:
        try:
            return await asyncio.to_thread(look)
        except DatabaseAwayError:  # there is nothing new to be told
            return True

    return ask


async def _csrf(request: Request) -> str:
    """The token that the request carries, in a header or in its form."""
    if CSRF_HEADER in request.headers:
        return request.headers[CSRF_HEADER]
    if request.headers.get("content-type", "").startswith(_FORMS):
        return str((await request.form()).get(CSRF_FIELD, ""))
    return ""


def needs(role: Role) -> Any:
    """A dependency: only who has this role gets through."""

    def check(principal: Annotated[Principal, Depends(signed_in)]) -> Principal:
        check_role(principal, role)
        return principal

    check.role = role  # type: ignore[attr-defined]
    return Depends(check)


class GuardedRoute(APIRoute):
    """A route that finds out who asks, and whether they may, before it reads what they send."""

    async def let_in(self, request: Request) -> Principal | None:
        """Who asks; None where anybody may. Raises RefusedError."""
        roles = [*_roles(self.dependant)]
        if not roles:
            return None
        principal = await principal_of(request)
        for role in roles:
            check_role(principal, role)
        return principal

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        plain = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            await self.let_in(request)
            return await plain(request)

        return guarded


def _roles(dependant: Dependant) -> Iterator[Role]:
    """The roles that a route asks for."""
    for each in dependant.dependencies:
        if (role := getattr(each.call, "role", None)) is not None:
            yield role
        yield from _roles(each)


def check_role(principal: Principal, role: Role) -> None:
    """Raises RefusedError where they have not that role."""
    if not principal.may(role):
        raise RefusedError(
            403, f"this needs the role {role}, and {principal.name!r} is {principal.role}", hint="Ask an admin."
        )


Viewer = Annotated[Principal, needs("viewer")]
Operator = Annotated[Principal, needs("operator")]
Admin = Annotated[Principal, needs("admin")]
