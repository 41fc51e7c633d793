"""A real JupyterHub with what ``tally notebook values`` says, a stand-in of GitHub, and a real browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from tests.github import CLIENT, SECRET, GitHubStandIn, github
from tests.https import https
from tests.ports import free_ports
from tests.server import PATIENCE
from tests.waiting import wait_for

pytest.importorskip("jupyterhub")
pytest.importorskip("oauthenticator")
pytest.importorskip("playwright")

from playwright.sync_api import Browser, expect

SECRETS = {"hub-app": {"client-id": CLIENT, "client-secret": SECRET}}
"""The Secrets of the namespace."""

# As the chart hands its values to the hub; the rest is what a machine without Kubernetes has instead.
CONFIG = """
import json, os, sys
settings = json.load(open(os.environ["HUB_SETTINGS"]))
for name, traits in settings["values"]["hub"]["config"].items():
    for trait, value in traits.items():
        c[name][trait] = value
folder = settings["folder"]
c.JupyterHub.bind_url = settings["bind_url"]
c.JupyterHub.hub_port = settings["hub_port"]
c.JupyterHub.db_url = f"sqlite:///{folder}/hub.sqlite"
c.JupyterHub.cookie_secret_file = f"{folder}/cookie"
c.JupyterHub.spawner_class = "simple"
c.JupyterHub.cleanup_servers = True
c.SimpleLocalProcessSpawner.home_dir_template = folder + "/{username}"
c.Spawner.default_url = settings["values"]["singleuser"]["defaultUrl"]
c.Spawner.cmd = [sys.executable, "-m", "jupyterhub.singleuser"]
c.Spawner.args = ["--allow-root"]
c.ConfigurableHTTPProxy.command = [sys.executable, "-c", "from configurable_http_proxy.cli import main; main()"]
c.ConfigurableHTTPProxy.api_url = settings["api_url"]
"""


def values(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tally", "notebook", "values", *arguments]
    told: dict[str, Any] = yaml.safe_load(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    return told


def variables(extra: Mapping[str, Any]) -> dict[str, str]:
    """The hub's environment, as Kubernetes makes it of what refers to Secrets."""
    references = {name: each["valueFrom"]["secretKeyRef"] for name, each in extra.items()}
    return {name: SECRETS[each["name"]][each["key"]] for name, each in references.items()}


@contextmanager
def hub(folder: Path, github_url: str) -> Iterator[str]:
    port, inner, hub_port, api_port = free_ports(4)
    url = f"https://127.0.0.1:{port}"
    options = ("--org", "House", "--admin", "Root", "--github-secret", "hub-app", "--github-url", github_url)
    told = values("--host", f"127.0.0.1:{port}", *options, "--tls-secret", "hub-tls")
    settings = {"values": told, "folder": str(folder), "hub_port": hub_port}
    settings |= {"bind_url": f"http://127.0.0.1:{inner}", "api_url": f"http://127.0.0.1:{api_port}"}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "config.py").write_text(CONFIG)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OAUTH_", "GITHUB_", "JUPYTER"))}
    environment = kept | variables(told["hub"]["extraEnv"]) | {"HUB_SETTINGS": str(folder / "settings.json")}
    command = [sys.executable, "-m", "jupyterhub", "--config", str(folder / "config.py")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:

        def answers() -> bool:
            try:
                return httpx2.get(f"{url}/hub/health", verify=False, timeout=5).status_code == 200
            except httpx2.HTTPError:
                return False

        with https(folder, port, inner):
            wait_for(answers, process, PATIENCE, (folder / "log").read_text)
            yield url
    finally:
        process.terminate()  # it ends the servers of its users, too
        process.wait(PATIENCE)


@pytest.fixture
def standin() -> Iterator[GitHubStandIn]:
    with github() as standin:
        standin.members = {("ana", "house"): "active", ("dee", "house"): "pending"}
        yield standin


def test_members_run_notebooks_and_strangers_stay_outside(
    standin: GitHubStandIn, browser: Browser, tmp_path: Path
) -> None:
    with hub(tmp_path, standin.url) as url:
        for login in ("eve", "dee"):  # nobody, and one who is invited
            standin.login = login
            stranger = browser.new_context(ignore_https_errors=True)
            page = stranger.new_page()
            page.goto(url)
            page.get_by_role("button", name="Sign in with GitHub").click()
            expect(page.locator("body")).to_contain_text("403")
            assert standin.asked["redirect_uri"] == f"{url}/hub/oauth_callback"
            assert standin.asked["scope"] == "read:org"
            page.goto(f"{url}/hub/home")
            expect(page.get_by_role("button", name="Sign in with GitHub")).to_be_visible()
            stranger.close()

        standin.login = "Ana"
        member = browser.new_context(ignore_https_errors=True)
        page = member.new_page()
        page.goto(url)
        page.get_by_role("button", name="Sign in with GitHub").click()
        page.wait_for_url("**/user/ana/lab**", timeout=PATIENCE * 1000)
        page.locator(".jp-LauncherCard[data-category='Notebook']").first.click()
        # JupyterLab draws the notebook anew when its kernel has begun: what is typed before is lost.
        expect(page.get_by_role("button", name="Python 3 (ipykernel) | Idle")).to_be_visible()
        cell = page.locator(".jp-Notebook .jp-Cell .cm-content").first
        cell.fill("import tally; print(tally.Scorer.__name__, 6 * 7)")
        expect(cell).to_have_text("import tally; print(tally.Scorer.__name__, 6 * 7)")
        cell.press("Shift+Enter")
        expect(page.locator(".jp-OutputArea-output").first).to_contain_text("Scorer 42")
        member.close()
    assert SECRET not in (tmp_path / "log").read_text()
