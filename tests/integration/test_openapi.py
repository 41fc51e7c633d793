"""Whatever is asked of the API, the answer is one that its document names: never a fault of the server.

Requests are made up from the document itself, for each route and each role, and without a key. By default a few of
each; many with TALLY_TEST_FULL=1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.server import Server, running

EXAMPLES = 200 if os.environ.get("TALLY_TEST_FULL") == "1" else 4
ROLES = ("nobody", "viewer", "operator", "admin")
PUBLIC = {"/healthz", "/readyz", "/metrics"}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TALLY_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9")  # no bucket is asked
        with running("--root", folder, "--max-upload", 1) as server:
            yield server


@pytest.fixture(scope="module")
def headers(server: Server) -> dict[str, dict[str, str]]:
    """What each role sends."""
    with server.client() as admin:
        keys = {
            role: admin.post("/keys", json={"name": role, "role": role}).raise_for_status().json()["text"]
            for role in ROLES[1:]
        }
    return {"nobody": {}} | {role: {"Authorization": f"Bearer {key}"} for role, key in keys.items()}


@pytest.mark.parametrize("role", ROLES)
def test_every_answer_is_documented(server: Server, headers: dict[str, dict[str, str]], role: str) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/api/v1/openapi.json")
    failures = []
    for found in schema.get_all_operations():
        try:
            _asking(found.ok(), server.url, headers[role], role)()
        except Exception as error:  # what is wrong with one route does not hide the others
            failures.append(f"{found.ok().label}: {error}")
    assert not failures, "\n\n".join(failures)
    with server.client() as admin:
        assert admin.get("/me").json()["role"] == "admin"


def _asking(operation: Any, url: str, headers: dict[str, str], role: str) -> Callable[[], None]:
    """Asks one route with many requests."""

    @seed(1)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        case.cookies.clear()
        case.headers.pop("Authorization", None)
        answer = case.call(base_url=url, headers=headers, timeout=60)
        case.validate_response(answer, checks=CHECKS)
        if role == "nobody" and operation.path not in PUBLIC:
            assert answer.status_code in (400, 401, 404, 405, 413), answer.status_code

    return ask  # type: ignore[no-any-return]


def test_every_route_names_its_errors(server: Server) -> None:
    with server.client() as admin:
        document = admin.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if path in PUBLIC:
                continue
            assert {"401", "403", "422"} <= set(operation["responses"]), (method, path)
            assert operation["description"], (method, path)
            if method == "post" and not path.endswith("/query"):  # which changes nothing
                assert "Idempotency-Key" in [each["name"] for each in operation["parameters"]], path


def test_the_document_says_nothing_of_this_machine(server: Server, tmp_path: Path) -> None:
    with server.client() as admin:
        text = admin.get("/openapi.json").text
    assert os.environ["TALLY_HOME"] not in text
    assert str(Path.home()) not in text
