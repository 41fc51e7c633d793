"""The way of a browser to who vouches for its account, and back."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from tally.errors import RefusedError
from tally.server.auth.accounts import SECONDS, Provider
from tally.server.auth.guard import COOKIE, address_of
from tally.server.auth.keys import SESSION_SECONDS

_KEPT = "tally_login"
_GO_ON = '<!doctype html><meta http-equiv="refresh" content="0;url=/"><a href="/">Tally</a>'
"""A page of ours that goes on, as browsers send the session's cookie with no request that another site has led to."""


def routes(name: str, provider: Provider) -> APIRouter:
    """``/login/NAME``, and its ``/callback``."""
    router = APIRouter(include_in_schema=False, prefix=f"/login/{name}")

    def back(request: Request) -> str:
        return str(request.url_for(f"back_from_{name}"))

    @router.get("")
    def log_in_at_provider(request: Request) -> Response:
        url, kept = provider.begin(back(request))
        answer = RedirectResponse(url, status_code=303)
        # Lax: it has to come along when the provider leads back here.
        answer.set_cookie(
            _KEPT, kept, max_age=SECONDS, path=router.prefix, httponly=True, samesite="lax", secure=_is_secure(request)
        )
        return answer

    @router.get("/callback", name=f"back_from_{name}")
    def back_from_provider(request: Request, state: str = "", code: str = "", error: str = "") -> Response:
        principal, status = None, 403
        try:
            if error:
                raise RefusedError(403, f"the provider says: {error[:200]}")
            principal = provider.finish(back(request), request.cookies.get(_KEPT, ""), state=state, code=code)
            status = 200
        finally:
            request.app.state.audit.write(
                principal, action="log_in", target=f"GET {router.prefix}/callback", status=status,
                address=address_of(request),
            )  # fmt: skip
        answer = HTMLResponse(_GO_ON)
        answer.set_cookie(
            COOKIE,
            request.app.state.guard.keys.log_in(principal),
            max_age=int(SESSION_SECONDS),
            httponly=True,
            samesite="strict",
            secure=_is_secure(request),
        )
        answer.delete_cookie(_KEPT, path=router.prefix)
        return answer

    return router


def _is_secure(request: Request) -> bool:
    return request.url.scheme == "https"
