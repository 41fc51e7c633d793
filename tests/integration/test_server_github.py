"""Logging in with an account of GitHub; a stand-in for it is on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.github import CLIENT, SECRET, GitHubStandIn, github
from tests.server import PATIENCE, Server, running

pytest.importorskip("authlib")


@pytest.fixture(scope="module")
def standin() -> Iterator[GitHubStandIn]:
    with github() as standin:
        yield standin


@pytest.fixture(scope="module")
def server(standin: GitHubStandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALLY_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("TALLY_GITHUB_SECRET", SECRET)
        lists = ("--github-admin", "Ana", "--github-operator", "@Ops-Team", "--github-viewer", "@house")
        with running("--github-url", f"{standin.url}/", "--github-client-id", CLIENT, *lists) as server:
            yield server


@pytest.fixture(autouse=True)
def as_it_should_be(standin: GitHubStandIn) -> None:
    standin.login, standin.down = "ana", None
    standin.members = {("ben", "ops-team"): "active", ("ben", "house"): "active", ("cy", "house"): "active"}
    standin.members |= {("dee", "house"): "pending"}


@pytest.fixture
def browser(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(
        base_url=server.url, follow_redirects=True, headers={"accept": "text/html"}, timeout=PATIENCE
    ) as browser:
        yield browser


def test_an_account_that_is_listed_logs_in_for_as_long_as_a_session(
    standin: GitHubStandIn, server: Server, browser: httpx2.Client
) -> None:
    assert '<a href="/login/github">with GitHub</a>' in browser.get("/login").text
    back = browser.get("/login/github")
    assert (back.status_code, "url=/" in back.text) == (200, True)
    assert standin.asked["scope"] == "read:org"
    assert standin.asked["redirect_uri"] == f"{server.url}/login/github/callback"
    assert browser.get("/keys").status_code == 200  # a page of admins
    assert not [name for name in browser.cookies if name == "tally_login"]
    with server.client() as admin:
        (key,) = [each for each in admin.get("/keys").json() if each["name"] == "ana@github"]
        assert (key["role"], key["expires_at"] - key["created_at"]) == ("admin", pytest.approx(12 * 3600))
        lines = admin.get("/audit").json()
        assert ("ana@github", "log_in", 200) in [(each["who"], each["action"], each["status"]) for each in lines]
        admin.post(f"/keys/{key['id']}/revoke")
    assert browser.get("/keys").url.path == "/login"


@pytest.mark.parametrize(("login", "role"), [("ben", "operator"), ("cy", "viewer")])
def test_members_of_an_organisation_have_its_highest_role(
    standin: GitHubStandIn, browser: httpx2.Client, login: str, role: str
) -> None:
    standin.login = login
    assert browser.get("/login/github").status_code == 200
    assert f"{login}@github ({role})" in browser.get("/").text
    assert browser.get("/keys").status_code == 403
    assert browser.get("/jobs/new").status_code == (200 if role == "operator" else 403)


@pytest.mark.parametrize(
    ("login", "said"),
    [
        ("eve", "eve@github may not log in here"),
        ("dee", "dee@github may not log in here"),  # invited, and not a member yet
        ("house", "may not log in here"),
        ("@house", "logging in failed"),
        ("../../user", "logging in failed"),
        (None, "logging in failed"),
    ],
)
def test_who_is_not_listed_is_refused(standin: GitHubStandIn, browser: httpx2.Client, login: Any, said: str) -> None:
    standin.login = login
    answer = browser.get("/login/github")
    assert answer.status_code == 403
    assert said in answer.text
    assert browser.get("/").url.path == "/login"


def test_an_api_that_fails_lets_nobody_in(standin: GitHubStandIn, browser: httpx2.Client) -> None:
    for status in (500, 302, 403):
        standin.down = status
        answer = browser.get("/login/github")
        assert (answer.status_code, f"GitHub answered {status}" in answer.text) == (403, True)


def test_a_login_ends_in_the_browser_that_began_it_and_once(browser: httpx2.Client, standin: GitHubStandIn) -> None:
    step = browser.get("/login/github", follow_redirects=False)
    assert re.search("httponly", step.headers["set-cookie"], re.IGNORECASE)
    back = httpx2.get(step.headers["location"], follow_redirects=False, timeout=PATIENCE).headers["location"]
    with httpx2.Client(timeout=PATIENCE) as another:
        assert another.get(back).status_code == 403
    assert browser.get(re.sub("state=[^&]*", "state=guessed", back)).status_code == 403
    assert "bad_verification_code" in browser.get(re.sub("code=[^&]*", "code=guessed", back)).text
    assert browser.get(back).status_code == 200
    assert browser.get(back).status_code == 403
    refused = browser.get("/login/github/callback?error=access_denied")
    assert (refused.status_code, "access_denied" in refused.text) == (403, True)


def test_without_organisations_no_right_is_asked_for(
    standin: GitHubStandIn, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALLY_GITHUB_SECRET", SECRET)
    options = ("--github-url", standin.url, "--github-client-id", CLIENT, "--github-viewer", "ana")
    with (
        running(*options) as server,
        httpx2.Client(base_url=server.url, follow_redirects=True, timeout=PATIENCE) as browser,
    ):
        assert browser.get("/login/github").status_code == 200
        assert "scope" not in standin.asked
        assert "ana@github (viewer)" in browser.get("/").text


def test_what_is_missing_is_told(home: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TALLY_GITHUB_SECRET", raising=False)
    told = cli("up", "--port", "0", "--github-url", "http://example.com", "--github-viewer", "ana@example.com")
    assert told.code == 2
    for each in (
        "must be an https:// URL",
        "--github-client-id",
        "TALLY_GITHUB_SECRET",
        "'ana@example.com' is neither",
    ):
        assert each in told.err
    told = cli("up", "--port", "0", "--github-client-id", "tally")
    assert "lets nobody in without --github-admin" in told.err
