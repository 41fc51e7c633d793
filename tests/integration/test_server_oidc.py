"""Logging in with an account of an identity provider; a stand-in for one is on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx2
import pytest
from tests.server import PATIENCE, Server, running

pytest.importorskip("authlib")
SECRET = "not-to-be-told"


class Provider:
    """Logs everybody in at once, as :attr:`mail`. claims: others than the right ones. asked: the last request."""

    def __init__(self) -> None:
        from joserfc.jwk import RSAKey

        self.key, self.other = (RSAKey.generate_key(2048, {"kid": "one"}) for _ in range(2))
        self.mail = "ana@example.com"
        self.claims: dict[str, Any] = {}
        self.forged = False
        self.asked: dict[str, str] = {}
        self.codes: dict[str, dict[str, str]] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def token(self, asked: dict[str, str]) -> str:
        from joserfc import jwt

        claims = {
            "iss": self.url, "aud": "tally", "sub": "1", "iat": int(time.time()), "exp": int(time.time()) + 300,
            "nonce": asked["nonce"], "email": self.mail, "email_verified": True, **self.claims,
        }  # fmt: skip
        return jwt.encode({"alg": "RS256", "kid": "one"}, claims, self.other if self.forged else self.key)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                if url.path == "/.well-known/openid-configuration":
                    ends = {f"{name}_endpoint": f"{provider.url}/{name}" for name in ("authorization", "token")}
                    self._say({"issuer": provider.url, "jwks_uri": f"{provider.url}/keys", **ends})
                elif url.path == "/keys":
                    self._say({"keys": [provider.key.as_dict(private=False)]})
                else:
                    provider.asked = asked = {name: values[0] for name, values in parse_qs(url.query).items()}
                    code = secrets.token_urlsafe(8)
                    provider.codes[code] = asked
                    self.send_response(302)
                    back = urlencode({"state": asked["state"], "code": code})
                    self.send_header("location", f"{asked['redirect_uri']}?{back}")
                    self.end_headers()

            def do_POST(self) -> None:
                form = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
                asked = provider.codes.pop(form["code"][0])
                proof = hashlib.sha256(form["code_verifier"][0].encode()).digest()
                assert asked["code_challenge_method"] == "S256"
                assert base64.urlsafe_b64encode(proof).rstrip(b"=").decode() == asked["code_challenge"]
                assert form["redirect_uri"] == [asked["redirect_uri"]]
                known = base64.b64encode(f"tally:{SECRET}".encode()).decode()
                assert self.headers["authorization"] == f"Basic {known}"
                self._say({"access_token": "unused", "token_type": "Bearer", "id_token": provider.token(asked)})

            def _say(self, what: dict[str, Any]) -> None:
                content = json.dumps(what).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    provider = Provider()
    thread = threading.Thread(target=provider.server.serve_forever)
    thread.start()
    yield provider
    provider.server.shutdown()
    thread.join()
    provider.server.server_close()


@pytest.fixture(scope="module")
def server(provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALLY_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("TALLY_OIDC_SECRET", SECRET)
        options = ("--oidc-issuer", provider.url, "--oidc-client-id", "tally")
        lists = ("--oidc-admin", "Ana@example.com", "--oidc-viewer", "@example.com")
        with running(*options, *lists) as server:
            yield server


@pytest.fixture(autouse=True)
def as_it_should_be(provider: Provider) -> None:
    provider.mail, provider.claims, provider.forged = "ana@example.com", {}, False


@pytest.fixture
def browser(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(
        base_url=server.url, follow_redirects=True, headers={"accept": "text/html"}, timeout=PATIENCE
    ) as browser:
        yield browser


def test_an_admin_logs_in_for_as_long_as_a_session(provider: Provider, server: Server, browser: httpx2.Client) -> None:
    assert '<a href="/login/oidc">' in browser.get("/login").text
    back = browser.get("/login/oidc")
    assert (back.status_code, "url=/" in back.text) == (200, True)
    assert provider.asked["scope"] == "openid email"
    assert "samesite=strict" in back.headers["set-cookie"].lower()
    assert browser.get("/keys").status_code == 200  # a page of admins
    assert not [name for name in browser.cookies if name == "tally_login"]
    with server.client() as admin:
        (key,) = [each for each in admin.get("/keys").json() if each["name"] == "ana@example.com"]
        assert (key["role"], key["expires_at"] - key["created_at"]) == ("admin", pytest.approx(12 * 3600))
        lines = admin.get("/audit").json()
        assert ("ana@example.com", "log_in", 200) in [(each["who"], each["action"], each["status"]) for each in lines]
        admin.post(f"/keys/{key['id']}/revoke")
    assert browser.get("/keys").url.path == "/login"


def test_others_of_a_domain_only_look(provider: Provider, browser: httpx2.Client) -> None:
    provider.mail = "ben@Example.com"
    assert browser.get("/login/oidc").status_code == 200
    assert browser.get("/").url.path == "/"
    assert browser.get("/keys").status_code == 403


@pytest.mark.parametrize(
    ("mail", "claims", "said"),
    [
        ("eve@elsewhere.com", {}, "may not log in here"),
        ("eve@elsewhere.com@example.com", {}, "no mail address"),
        ("ana@example.com", {"email_verified": False}, "no mail address"),
        ("ana@example.com", {"email": None}, "no mail address"),
        ("ana@example.com", {"nonce": "of another login"}, "logging in failed"),
        ("ana@example.com", {"aud": "another client"}, "logging in failed"),
        ("ana@example.com", {"iss": "https://elsewhere.com"}, "logging in failed"),
        ("ana@example.com", {"exp": 1}, "logging in failed"),
    ],
)
def test_who_is_not_let_in(
    provider: Provider, browser: httpx2.Client, mail: str, claims: dict[str, Any], said: str
) -> None:
    provider.mail, provider.claims = mail, claims
    answer = browser.get("/login/oidc")
    assert answer.status_code == 403
    assert said in answer.text
    assert browser.get("/").url.path == "/login"


def test_a_token_that_the_provider_has_not_signed_is_refused(provider: Provider, browser: httpx2.Client) -> None:
    provider.forged = True
    assert browser.get("/login/oidc").status_code == 403


def test_a_login_ends_in_the_browser_that_began_it_and_once(browser: httpx2.Client, server: Server) -> None:
    step = browser.get("/login/oidc", follow_redirects=False)
    kept = step.headers["set-cookie"]
    assert re.search("httponly", kept, re.IGNORECASE)
    back = httpx2.get(step.headers["location"], follow_redirects=False, timeout=PATIENCE).headers["location"]
    with httpx2.Client(timeout=PATIENCE) as another:
        assert another.get(back).status_code == 403
    assert browser.get(re.sub("state=[^&]*", "state=guessed", back)).status_code == 403
    assert browser.get(back).status_code == 200
    assert browser.get(back).status_code == 403
    assert browser.get("/login/oidc/callback?error=access_denied").status_code == 403


def test_what_is_missing_is_told(home: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TALLY_OIDC_SECRET", raising=False)
    told = cli("up", "--port", "0", "--oidc-issuer", "http://example.com", "--oidc-viewer", "example.com")
    assert told.code == 2
    for each in ("must be an https:// URL", "--oidc-client-id", "TALLY_OIDC_SECRET", "'example.com' is neither"):
        assert each in told.err
