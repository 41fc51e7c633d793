"""What is deployed is described whole, and all that is wrong is said at once."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tally.deploy import targets
from tally.deploy.aci import AciSpec
from tally.deploy.kubernetes.spec import KubernetesSpec
from tally.deploy.local import LocalSpec
from tally.deploy.quantities import amount, shown_bytes
from tally.deploy.spec import Environment, made
from tally.errors import SpecError

IMAGE = Environment("image", "registry.example.com/plastic:1")


def kubernetes(**values: Any) -> KubernetesSpec:
    return made(KubernetesSpec, "kubernetes", {"name": "plastic", "model": "image:/m", "environment": IMAGE} | values)


def problems(**values: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        kubernetes(**values)
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("500m", Decimal("0.5")),
        ("2Gi", 2 << 30),
        ("1.5Gi", 3 << 29),
        ("4G", 4 * 10**9),
        ("1e3", 1000),
        ("2E", 2 * 10**18),
        ("1Ei", 1 << 60),
        (".5", Decimal("0.5")),
        ("128974848", 128974848),
        ("100k", 100_000),
        ("5n", Decimal("5e-9")),
    ],
)
def test_quantities_are_read_as_kubernetes_reads_them(text: str, value: Any) -> None:
    assert amount(text) == value


@pytest.mark.parametrize(
    "text", ["", "Gi", "2GB", "2 Gi", "1GiB", "0x10", "1e", "two", "1,5", "NaN", "inf", "1" * 65, "٣"]
)
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no quantity"):
        amount(text)


@given(st.text(max_size=20))
def test_any_text_is_a_quantity_or_refused(text: str) -> None:
    try:
        assert amount(text).is_finite()
    except ValueError:
        pass


def test_sizes_are_shown_as_people_read_them() -> None:
    assert [shown_bytes(Decimal(each)) for each in (300 << 20, 3 << 29)] == ["300 MiB", "1.5 GiB"]


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        kubernetes().cpu = "2"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"name": "Plastic"}, "name: 'Plastic' is no DNS label"),
        ({"name": "1st"}, "name: '1st'"),
        ({"name": "a" * 64}, "name: 'aaa"),
        ({"name": "a-"}, "name: 'a-'"),
        ({"environment": Environment("image", "Not An Image")}, "is no name of an image"),
        ({"environment": Environment("pip", "r.txt")}, "needs a name"),
        ({"image": "a/b"}, "names the image already"),
        ({"cpu": "-1"}, "cpu: '-1'"),
        ({"cpu": "0.0001"}, "cpu: '0.0001'"),
        ({"cpu": "4Gi"}, "cpu: '4Gi'"),
        ({"memory": "2"}, "memory: '2' is 2 bytes"),
        ({"memory": "2GB"}, "memory: '2GB' is no quantity"),
        ({"memory": "200.5"}, "memory: '200.5'"),
        ({"gpu": -1}, "gpu: 0 to 64"),
        ({"profile": "prod"}, "profile: 'prod'"),
        ({"profile": "production", "replicas": (1, 1)}, "production has at least two"),
        ({"replicas": (2, 2)}, "the profile dev-test has one"),
        ({"replicas": (3, 2)}, "replicas: from 1 or more"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_delay": 61.0}, "max_delay"),
        ({"drain": 0.0}, "drain"),
        ({"pages": "each"}, "pages: first or all, not 'each'"),
        ({"max_pixels": 0}, "max_pixels: 1 or more, not 0"),
        ({"grpc_port": 0}, "grpc_port: 1 to 65535, not 0"),
        ({"grpc_port": 80}, "grpc_port: 80 is the port of HTTP already"),
        ({"settings": ("top",)}, "settings: 'top' is not of the form KEY=VALUE"),
        ({"settings": ("=5",)}, "settings: '=5'"),
        ({"variables": {"A-B": "1"}}, "cannot be the name of a variable"),
        ({"variables": {"TALLY_ENDPOINT_KEY": "k"}}, "is a secret"),
        ({"variables": {"AWS_SECRET_ACCESS_KEY": "k"}}, "is a secret"),
        ({"variables": {"PLACE": "postgresql://u:pw@host/db"}}, "is a secret"),
        ({"namespace": "a.b"}, "namespace: 'a.b'"),
        ({"key_secret": "A"}, "key_secret: 'A'"),
        ({"secrets": ("ok", "not ok")}, "secrets: 'not ok'"),
        ({"gateway": "a/b/c"}, "gateway: 'a/b/c'"),
        ({"gateway": "g", "ingress_class": "nginx", "allow_from": ("n",)}, "not both"),
        ({"hostname": "a.example.com"}, "nothing leads there"),
        ({"hostname": "under_score.example", "gateway": "g"}, "no name of a host"),
        ({"ingress_class": "nginx"}, "allow_from: name the namespace"),
        ({"tls_secret": "t"}, "tls_secret: it is for an Ingress"),
        ({"ingress_class": "nginx", "allow_from": ("n",), "tls_secret": "t"}, "tls_secret: a certificate"),
    ],
    ids=str,
)
def test_each_mistake_is_said(wrong: dict[str, Any], said: str) -> None:
    assert any(said in each for each in problems(**wrong)), problems(**wrong)


def test_all_mistakes_are_said_together() -> None:
    found = problems(name="No", cpu="x", memory="y", gpu=65, location="here", variables={"TOKEN": "t"})
    assert [each.partition(":")[0] for each in found] == ["location", "name", "cpu", "memory", "gpu", "variables"]


def test_secrets_are_not_repeated_in_what_is_said_of_them() -> None:
    assert "hunter2" not in str(problems(variables={"PASSWORD": "hunter2"}))


def test_what_the_container_has_must_be_said() -> None:
    with pytest.raises(SpecError, match="say what the container has"):
        made(KubernetesSpec, "kubernetes", {"name": "plastic", "model": "image:/m"})


def test_a_production_endpoint_has_two_replicas_and_may_grow() -> None:
    assert kubernetes(profile="production").bounds == (2, 4)
    assert kubernetes(profile="production", replicas=(3, 3)).bounds == (3, 6)
    assert kubernetes(profile="production", replicas=(3, 5)).bounds == (3, 5)
    assert kubernetes().bounds == (1, 1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"name": "four"}, "at least 5 characters"),
        ({"profile": "production"}, "production is for kubernetes"),
        ({"replicas": (2, 2)}, "one replica"),
        ({"gpu": 1}, "gpu:"),
        ({"location": "West Europe"}, "location:"),
        ({"location": ""}, "location:"),
        ({"resource_group": "a."}, "resource_group:"),
        ({"secrets": ("A-B",)}, "secrets:"),
        ({"namespace": "ml"}, "namespace: it is not for the target aci"),
    ],
    ids=str,
)
def test_each_mistake_of_a_container_group_is_said(wrong: dict[str, Any], said: str) -> None:
    right = {"name": "plastic", "model": "image:/m", "environment": IMAGE, "location": "westeurope"}
    assert made(AciSpec, "aci", right).location == "westeurope"
    with pytest.raises(SpecError) as caught:
        made(AciSpec, "aci", right | wrong)
    assert any(said in each for each in caught.value.problems), caught.value.problems


@pytest.mark.parametrize("text", ["image:a/b:1", "pip:r.txt", "conda:e.yml", "containerfile:C"])
def test_an_environment_is_written_as_it_is_read(text: str) -> None:
    assert str(Environment.parse(text)) == text
    assert Environment.parse(text).is_built == (not text.startswith("image"))


@pytest.mark.parametrize("text", ["", "image", "image:", "docker:x", "r.txt"])
def test_what_is_no_environment_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is none of"):
        Environment.parse(text)


def test_targets_are_known_by_name() -> None:
    assert targets.get("kubernetes").spec_type is KubernetesSpec
    assert targets.get("aci").spec_type is AciSpec
    with pytest.raises(SpecError, match="did you mean 'kubernetes'"):
        targets.get("kubernets")
    assert targets.get("local").spec_type is LocalSpec
