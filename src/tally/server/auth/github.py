"""Logging in with an account of GitHub: OAuth 2 with PKCE and state, and who the token belongs to by asking for it.

GitHub speaks no OpenID Connect: the token says nothing of the account. It is used at once, and not kept.
"""

from __future__ import annotations

import re
import secrets
from typing import Any
from urllib.parse import quote

import requests
from authlib.common.errors import AuthlibBaseError
from authlib.integrations.requests_client import OAuth2Session

from tally.server.auth.accounts import TIMEOUT, failed, kept_parts, let_in
from tally.server.auth.keys import KeyStore
from tally.server.auth.roles import Principal
from tally.server.settings import GitHubSettings

_LOGIN = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,38})")
_ACCEPT = {"Accept": "application/vnd.github+json"}


class GitHub:
    """GitHub, or a GitHub Enterprise Server."""

    def __init__(self, settings: GitHubSettings, keys: KeyStore) -> None:
        self._settings, self._keys = settings, keys

    def begin(self, back: str) -> tuple[str, str]:
        """See :meth:`Provider.begin`."""
        state, verifier = (secrets.token_urlsafe(32) for _ in range(2))
        with self._session(back) as session:
            url, _ = session.create_authorization_url(
                f"{self._settings.url}/login/oauth/authorize", state=state, code_verifier=verifier
            )
        return str(url), f"{state}.{verifier}"

    def finish(self, back: str, kept: str, *, state: str, code: str) -> Principal:
        """See :meth:`Provider.finish`."""
        _, verifier = kept_parts(kept, state, 2)
        try:
            with self._session(back) as session:
                where = f"{self._settings.url}/login/oauth/access_token"
                session.fetch_token(where, code=code, code_verifier=verifier, headers={"Accept": "application/json"})
                login = _get(session, f"{self._settings.api}/user").json()["login"]
                if not isinstance(login, str) or not _LOGIN.fullmatch(login):
                    raise ValueError(f"the account has no name, but {login!r}")
                role = self._settings.role_of(login, lambda name: self._is_member(session, name))
        except (requests.RequestException, AuthlibBaseError, LookupError, TypeError, ValueError) as error:
            raise failed(error) from None
        return let_in(self._keys, f"{login}@github", role)

    def _is_member(self, session: Any, organisation: str) -> bool:
        """Whether the account is an active member: who is only invited is none yet."""
        answer = _get(session, f"{self._settings.api}/user/memberships/orgs/{quote(organisation, safe='')}", 403, 404)
        return bool(answer.status_code == 200 and answer.json()["state"] == "active")

    def _session(self, back: str) -> Any:
        return OAuth2Session(
            self._settings.client_id, self._settings.secret, redirect_uri=back, code_challenge_method="S256",
            scope="read:org" if self._settings.organisations else None, default_timeout=TIMEOUT,
            token_endpoint_auth_method="client_secret_post",  # noqa: S106
        )  # fmt: skip


def _get(session: Any, url: str, *allowed: int) -> Any:
    answer = session.get(url, headers=_ACCEPT, allow_redirects=False)
    if answer.status_code not in (200, *allowed):
        raise ValueError(f"GitHub answered {answer.status_code} to {url}")
    return answer
