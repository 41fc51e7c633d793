"""A stand-in for GitHub, as far as logging in goes: its addresses, and the answers that its documents describe.

https://docs.github.com/en/apps/oauth-apps/building-oauth-apps/authorizing-oauth-apps
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

CLIENT, SECRET = "tally-app", "not-to-be-told"


class GitHubStandIn:
    """Logs everybody in at once, as :attr:`login`. members: the state of each account in each organisation. down: the
    status that its API answers with instead. asked: the last request to log in."""

    def __init__(self) -> None:
        self.login: Any = "ana"
        self.members: dict[tuple[str, str], str] = {}
        self.down: int | None = None
        self.asked: dict[str, str] = {}
        self._codes: dict[str, dict[str, str]] = {}
        self._tokens: dict[str, str] = {}
        """The scope of each token."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def token(self, form: dict[str, str]) -> dict[str, str]:
        """The answer to a code. What is wrong is told with the status 200, as GitHub does."""
        if (form["client_id"], form["client_secret"]) != (CLIENT, SECRET):
            return {"error": "incorrect_client_credentials", "error_description": "The client_id is incorrect."}
        asked = self._codes.pop(form["code"], None)
        if asked is None:
            return {"error": "bad_verification_code", "error_description": "The code is incorrect or expired."}
        proof = hashlib.sha256(form["code_verifier"].encode()).digest()
        assert asked["code_challenge_method"] == "S256"
        assert base64.urlsafe_b64encode(proof).rstrip(b"=").decode() == asked["code_challenge"]
        assert form["redirect_uri"] == asked["redirect_uri"]
        token = f"gho_{secrets.token_urlsafe(24)}"
        self._tokens[token] = asked.get("scope", "")
        return {"access_token": token, "scope": self._tokens[token], "token_type": "bearer"}

    def api(self, path: str, token: str) -> tuple[int, Any]:
        """Status and content of the answer to who shows this token."""
        if self.down is not None:
            return self.down, {"message": "Server Error"}
        if token not in self._tokens:
            return 401, {"message": "Bad credentials"}
        if path == "/user":
            return 200, {"login": self.login, "id": 1, "type": "User", "email": None}
        if path == "/user/emails":
            return 200, []
        if member := re.fullmatch("/orgs/([^/]+)/members/([^/]+)", path):  # who may not see it is sent elsewhere
            organisation, login = member.groups()
            seen = self._tokens[token] == "read:org" and self.members.get((login, organisation.lower())) == "active"
            return (204, None) if seen else (404, {"message": "Not Found"})
        organisation = path.removeprefix("/user/memberships/orgs/")
        if self._tokens[token] != "read:org":
            return 403, {"message": "You need read:org scope"}
        state = self.members.get((self.login, organisation.lower()))
        return (404, {"message": "Not Found"}) if state is None else (200, {"state": state, "role": "member"})

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        standin = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                if url.path.startswith("/api/v3/"):
                    token = self.headers["authorization"].removeprefix("Bearer ")
                    self._say(*standin.api(url.path.removeprefix("/api/v3"), token))
                    return
                assert url.path == "/login/oauth/authorize"
                standin.asked = asked = {name: values[0] for name, values in parse_qs(url.query).items()}
                assert asked["client_id"] == CLIENT
                code = secrets.token_urlsafe(8)
                standin._codes[code] = asked
                self.send_response(302)
                back = urlencode({"state": asked["state"], "code": code})
                self.send_header("location", f"{asked['redirect_uri']}?{back}")
                self.end_headers()

            def do_POST(self) -> None:
                assert self.path == "/login/oauth/access_token"
                assert self.headers["accept"] == "application/json"  # or it would answer with a form
                form = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
                self._say(200, standin.token({name: values[0] for name, values in form.items()}))

            def _say(self, status: int, what: Any) -> None:
                content = b"" if what is None else json.dumps(what).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json; charset=utf-8")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler


@contextmanager
def github() -> Iterator[GitHubStandIn]:
    standin = GitHubStandIn()
    thread = threading.Thread(target=standin.server.serve_forever)
    thread.start()
    try:
        yield standin
    finally:
        standin.server.shutdown()
        thread.join()
        standin.server.server_close()
