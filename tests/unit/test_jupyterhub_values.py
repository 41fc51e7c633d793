"""Values for Zero to JupyterHub: what the chart takes, who is let in, and nothing secret."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from tests.conftest import Ran

from tally.deploy.jupyterhub import HubSpec, values
from tally.errors import SpecError

SCHEMA = Path(__file__).resolve().parents[2].parent / "shared" / "schemas" / "jupyterhub-values.schema.yaml"

LEAST = {"host": "hub.example.org", "image": "registry.example.org:5000/tally/notebook:1.2", "orgs": ("my-org",)}


def hub(**fields: Any) -> dict[str, Any]:
    return values(HubSpec(**{**LEAST, "letsencrypt": "ops@example.org", **fields}))


def without_required(schema: Any) -> Any:
    """A schema for values that the chart's own are added to."""
    if isinstance(schema, dict):
        return {name: without_required(each) for name, each in schema.items() if name != "required"}
    return [without_required(each) for each in schema] if isinstance(schema, list) else schema


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"letsencrypt": None, "tls_secret": "hub-tls", "gpus": 2, "storage_class": "managed-csi", "users": ("Ana",)},
        {
            "github_url": "https://github.example.org/",
            "cpu": ("1", "1"),
            "memory": ("512Mi", "2G"),
            "admins": ("root",),
        },
    ],
)
def test_the_chart_takes_them(fields: dict[str, Any]) -> None:
    if not SCHEMA.exists():
        pytest.skip("the chart's schema is not here (../shared/schemas)")
    schema = without_required(yaml.safe_load(SCHEMA.read_text("utf-8")))
    jsonschema.Draft7Validator(schema).validate(hub(**fields))
    with pytest.raises(jsonschema.ValidationError):  # it tells what is unknown
        jsonschema.Draft7Validator(schema).validate({**hub(**fields), "singleusers": {}})


def test_only_who_is_named_is_let_in_and_secrets_are_referred_to() -> None:
    told = hub(orgs=("My-Org", "my-org:research"), users=("Ana",), admins=("Root",), github_secret="app")
    login = told["hub"]["config"]["GitHubOAuthenticator"]
    assert login == {
        "oauth_callback_url": "https://hub.example.org/hub/oauth_callback",
        "allow_all": False,
        "allow_existing_users": False,
        "allowed_organizations": ["My-Org", "my-org:research"],
        "allowed_users": ["ana"],
        "admin_users": ["root"],
        "scope": ["read:org"],
    }
    assert told["hub"]["extraEnv"] == {
        "OAUTH_CLIENT_ID": {"valueFrom": {"secretKeyRef": {"name": "app", "key": "client-id"}}},
        "OAUTH_CLIENT_SECRET": {"valueFrom": {"secretKeyRef": {"name": "app", "key": "client-secret"}}},
    }
    assert told["proxy"]["https"]["enabled"] is True
    assert hub(orgs=(), users=("ana",))["hub"]["config"]["GitHubOAuthenticator"]["scope"] == []


def test_each_user_has_a_volume_and_shares_another() -> None:
    user = hub(storage="20Gi", storage_class="fast", shared="photos", cpu=("500m", "4"), memory=("1Gi", "8Gi"), gpus=1)[
        "singleuser"
    ]
    assert user["image"] == {"name": "registry.example.org:5000/tally/notebook", "tag": "1.2"}
    assert user["storage"] == {
        "capacity": "20Gi",
        "homeMountPath": "/home/jovyan",
        "dynamic": {"storageClass": "fast"},
        "extraVolumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": "photos"}}],
        "extraVolumeMounts": [{"name": "shared", "mountPath": "/home/jovyan/shared"}],
    }
    assert (user["cpu"], user["memory"]) == ({"guarantee": 0.5, "limit": 4.0}, {"guarantee": 2**30, "limit": 2**33})
    assert [each["display_name"] for each in user["profileList"]] == ["CPU", "GPU"]


def test_every_problem_is_told_at_once(cli: Callable[..., Ran]) -> None:
    with pytest.raises(SpecError) as refused:
        HubSpec(
            host="hub_1", image="notebook", github_secret="A b", cpu=("4", "2"), memory=("x", "x"), storage="0", gpus=-1
        )
    assert [each.partition(":")[0] for each in refused.value.problems] == [
        "--host", "--org", "--letsencrypt", "--image", "--github-secret", "--gpus", "--cpu", "--memory", "--storage",
    ]  # fmt: skip
    ran = cli("notebook", "values", "--host", "hub.example.org", "--tls-secret", "hub-tls")
    assert (ran.code, ran.out) == (2, "")
    assert "--org: say who may log in" in ran.err
