"""Logging in with an account of an identity provider, by OpenID Connect: authorization code, PKCE, state and nonce."""

from __future__ import annotations

import secrets
from typing import Any

import requests
from authlib.common.errors import AuthlibBaseError
from authlib.integrations.requests_client import OAuth2Session
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from tally.errors import RefusedError
from tally.server.auth.accounts import TIMEOUT, failed, kept_parts, let_in
from tally.server.auth.keys import KeyStore
from tally.server.auth.roles import Principal
from tally.server.settings import OidcSettings

_LEEWAY = 60
"""Seconds by which the provider's clock may differ."""
_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


class Oidc:
    """One provider."""

    def __init__(self, settings: OidcSettings, keys: KeyStore) -> None:
        self._settings, self._keys = settings, keys
        self._metadata: dict[str, Any] | None = None

    def begin(self, back: str) -> tuple[str, str]:
        """See :meth:`Provider.begin`."""
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        try:
            with self._session(back) as session:
                url, _ = session.create_authorization_url(
                    self._described(session)["authorization_endpoint"], state=state, nonce=nonce, code_verifier=verifier
                )
        except (requests.RequestException, AuthlibBaseError, LookupError, ValueError) as error:
            raise failed(error) from None
        return str(url), f"{state}.{nonce}.{verifier}"

    def finish(self, back: str, kept: str, *, state: str, code: str) -> Principal:
        """See :meth:`Provider.finish`."""
        _, nonce, verifier = kept_parts(kept, state, 3)
        try:
            claims = self._claims(back, code, nonce, verifier)
        except (requests.RequestException, AuthlibBaseError, JoseError, LookupError, TypeError, ValueError) as error:
            raise failed(error) from None
        mail = claims.get("email")
        if not isinstance(mail, str) or mail.count("@") != 1 or claims.get("email_verified") is not True:
            raise RefusedError(403, "the provider vouches for no mail address of this account")
        return let_in(self._keys, mail, self._settings.role_of(mail))

    def _claims(self, back: str, code: str, nonce: str, verifier: str) -> dict[str, Any]:
        """What the provider says of the account, checked."""
        with self._session(back) as session:
            described = self._described(session)
            token = session.fetch_token(described["token_endpoint"], code=code, code_verifier=verifier)
            keys = KeySet.import_key_set(_json(session, described["jwks_uri"]))
        content = jwt.decode(token["id_token"], keys, algorithms=_ALGORITHMS)
        options = {
            "iss": {"essential": True, "value": self._settings.issuer},
            "aud": {"essential": True, "value": self._settings.client_id},
        }
        params = {"nonce": nonce, "client_id": self._settings.client_id, "access_token": token.get("access_token")}
        claims = CodeIDToken(content.claims, content.header, options, params)
        claims.validate(leeway=_LEEWAY)
        return dict(claims)

    def _session(self, back: str) -> Any:
        return OAuth2Session(
            self._settings.client_id, self._settings.secret, scope="openid email", redirect_uri=back,
            code_challenge_method="S256", default_timeout=TIMEOUT,
        )  # fmt: skip

    def _described(self, session: Any) -> dict[str, Any]:
        """What the provider says of itself; asked once."""
        if self._metadata is None:
            where = f"{self._settings.issuer.rstrip('/')}/.well-known/openid-configuration"
            found: dict[str, Any] = _json(session, where)
            if found["issuer"] != self._settings.issuer:
                raise ValueError(f"the issuer calls itself {found['issuer']!r}, not {self._settings.issuer!r}")
            self._metadata = found
        return self._metadata


def _json(session: Any, url: str) -> Any:
    answer = session.get(url, withhold_token=True, allow_redirects=False)
    answer.raise_for_status()
    return answer.json()
