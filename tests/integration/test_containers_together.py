"""A server, PostgreSQL, a store like S3 and Ray in containers that find each other by name: by compose, and as pods."""

from __future__ import annotations

import copy
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from tests import containers
from tests.containers import REPOSITORY, call, until
from tests.server import lengths
from tests.server import until as until_job
from tests.services import require

from tally.storage import buckets, open_store

pytestmark = pytest.mark.skipif(
    os.environ.get("TALLY_TEST_FULL") != "1", reason="images are built and run with TALLY_TEST_FULL=1"
)

ITEMS = 20
EXTRAS = "EXTRAS=server,postgres,ray"
RESOLVER = "GRPC_DNS_RESOLVER"
"""Ray's library asks name servers, and here is none: the names are in files."""


def score_on_ray(server: str, key: str, store: str, secret: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is brought to the server, and scores on Ray what is in the store. server, store: their addresses."""
    for name, value in (
        ("ENDPOINT", f"http://{store}:8333"), ("ACCESS_KEY_ID", "tally"), ("SECRET_ACCESS_KEY", secret),
        ("REGION", "us-east-1"),
    ):  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(buckets, "_clients", {})
    for number in range(ITEMS):
        open_store("s3://tally/in").write(f"{number:03}", b"x" * number)
    (folder / "lengths.py").write_text(lengths())
    headers = {"Authorization": f"Bearer {key}"}
    with httpx2.Client(base_url=f"http://{server}:8700/api/v1", headers=headers, timeout=60) as client:
        with (folder / "lengths.py").open("rb") as file:
            kept = client.post("/uploads", files={"files": file}).raise_for_status().json()
        model = {"model": f"{kept['place']}/lengths.py"}
        client.post("/models/lengths/versions", json=model).raise_for_status()
        fields = {"source": ["s3://tally/in"], "model": "models:/lengths", "out": "s3://tally/out", "workers": 2}
        started = client.post("/jobs", json={**fields, "engine": "ray"}).raise_for_status().json()["id"]
        ended = until_job(client, started, lambda view: view["state"] in ("finished", "failed"))
        assert (ended["state"], ended["done"], ended["dead"]) == ("finished", ITEMS, 0), ended["error"]
        rows = client.get(f"/jobs/{started}/rows", params={"limit": 100}).json()["rows"]
    assert sorted(each["length"] for each in rows) == list(range(ITEMS))


# -- compose -------------------------------------------------------------------------------------------

ORDER = (("postgres", "seaweedfs"), ("server", "ray-head"), ("ray-worker",))
"""What compose starts after what, as podman of a machine without systemd cannot tell it when a service is healthy."""


def test_compose_brings_up_all_that_a_team_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    containers.require_podman()
    podman_compose = Path(sys.executable).with_name("podman-compose")
    require("podman-compose (make .venv/test-containers.stamp)", podman_compose.exists())
    deploy = tmp_path / "deploy"
    deploy.mkdir()
    for name in ("compose.yaml", "make_secrets.py"):
        (deploy / name).write_text((REPOSITORY / "deploy" / name).read_text("utf-8"))
    runpy.run_path(str(deploy / "make_secrets.py"), run_name="__main__")
    image = containers.image(EXTRAS)
    names = [name for each in ORDER for name in each]
    with containers.network(*names) as network:
        services = {
            name: {
                "image": containers.service(name) if name in ORDER[0] else image,
                "network_mode": network.mode(name),
                "extra_hosts": [f"{each}:{address}" for each, address in network.addresses.items()],
            }
            for name in names
        }
        services["ray-worker"] |= {"environment": {RESOLVER: "native"}, "deploy": {"replicas": 1}}
        (deploy / "here.yaml").write_text(yaml.safe_dump({"services": services}))
        compose = (podman_compose, "-p", network.prefix, "-f", deploy / "compose.yaml", "-f", deploy / "here.yaml")
        try:
            for each in ORDER:
                call(*compose, "up", "--detach", "--no-build", "--no-deps", *each)
                for name in each:
                    container = f"{network.prefix}_{name}_1"
                    until(
                        lambda container=container: is_healthy(container),
                        lambda container=container: containers.Container(container).log,
                    )
            key, secret = ((deploy / "secrets" / name).read_text() for name in ("admin-key", "s3-key"))
            server, store = network.addresses["server"], network.addresses["seaweedfs"]
            score_on_ray(server, key, store, secret, tmp_path, monkeypatch)
        finally:
            call(*compose, "down", "--volumes", "--timeout", "0")


def is_healthy(container: str) -> bool:
    return subprocess.run(["podman", "healthcheck", "run", container], capture_output=True, check=False).returncode == 0


# -- pods ----------------------------------------------------------------------------------------------

PODS = ("tally-postgres", "tally-objects", "tally-migrate", "tally", "tally-ray-head", "tally-ray-worker")


def test_the_pods_of_dev_test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the overlay renders to, by ``podman kube play``. Names, volumes and secrets are put in as a cluster does."""
    containers.require_podman()
    (tmp_path / "make_secrets.py").write_text((REPOSITORY / "deploy" / "make_secrets.py").read_text("utf-8"))
    made = yaml.safe_load_all(call(sys.executable, tmp_path / "make_secrets.py", "--kubernetes"))
    secrets = {each["metadata"]["name"]: each["stringData"] for each in made}
    key, secret = ((tmp_path / "secrets" / name).read_text() for name in ("admin-key", "s3-key"))
    objects = [*yaml.safe_load_all(call(sys.executable, "-m", "tally", "cluster", "render", "--overlay", "dev-test"))]
    workloads = {each["metadata"]["name"]: each for each in objects if "template" in each.get("spec", {})}
    assert set(workloads) == set(PODS)
    configuration = [each for each in objects if each["kind"] == "ConfigMap"]
    with containers.network(*PODS) as network, ExitStack() as pods:

        def play(name: str) -> containers.Container:
            made = pod(workloads[name], network, tmp_path / "volumes", secrets)
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all([*configuration, made]))
            return pods.enter_context(playing(tmp_path / f"{name}.yaml", made, network, name))

        database = play("tally-postgres")
        until(lambda: "ready to accept" in database.log, lambda: database.log)
        play("tally-objects")
        migration = play("tally-migrate")
        assert migration.wait() == 0, migration.log
        addresses = network.addresses
        for name, well in (
            ("tally", "8700/readyz"), ("tally-ray-head", "8265/api/gcs_healthz"),
            ("tally-ray-worker", "52365/api/local_raylet_healthz"),
        ):  # fmt: skip
            played = play(name)
            until(
                lambda name=name, well=well: answers(f"http://{addresses[name]}:{well}"),
                lambda played=played: played.log,
            )
        score_on_ray(addresses["tally"], key, addresses["tally-objects"], secret, tmp_path, monkeypatch)


def pod(
    workload: dict[str, Any], network: containers.Network, folder: Path, secrets: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """The pod of a Deployment, a StatefulSet or a Job, for podman: with images and names of this machine, and without
    ports, which podman would forward. folder: gets a folder for each volume. secrets: what is in each."""
    name = workload["metadata"]["name"]
    spec = copy.deepcopy(workload["spec"]["template"]["spec"])
    for claim in workload["spec"].get("volumeClaimTemplates", ()):
        spec["volumes"].append({"name": claim["metadata"]["name"]})
    group = spec["securityContext"]["fsGroup"]
    for number, each in enumerate(spec["volumes"]):  # as a cluster does
        place = folder / name / each["name"]
        place.mkdir(parents=True)
        for key, value in secrets[each["secret"]["secretName"]].items() if "secret" in each else ():
            (place / key).write_text(value)
            os.chown(place / key, -1, group)
            (place / key).chmod(0o440)
        os.chown(place, -1, group)
        place.chmod(0o2777)
        spec["volumes"][number] = {"name": each["name"], "hostPath": {"path": str(place), "type": "Directory"}}
    addresses = network.addresses | {"tally-ray-head-svc": network.addresses["tally-ray-head"]}
    names = folder / name / "hosts"
    names.write_text("".join(f"{address} {each}\n" for each, address in addresses.items()) + "127.0.0.1 localhost\n")
    spec["volumes"].append({"name": "names", "hostPath": {"path": str(names), "type": "File"}})
    for each in spec["containers"]:
        published = each["image"].rpartition("/")[2].partition(":")[0]
        each["image"] = containers.image(EXTRAS) if published == "tally" else containers.service(published)
        each["imagePullPolicy"] = "Never"
        each["volumeMounts"].append({"name": "names", "mountPath": "/etc/hosts", "readOnly": True})
        each.pop("ports", None)
        given = [source["secretRef"]["name"] for source in each.get("envFrom", ()) if "secretRef" in source]
        each["envFrom"] = [source for source in each.get("envFrom", ()) if "secretRef" not in source]
        variables = {RESOLVER: "native"} | {k: v for name in given for k, v in secrets[name].items()}
        each.setdefault("env", []).extend({"name": k, "value": v} for k, v in variables.items())
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            each.pop(probe, None)  # they name ports, and need a systemd to run them
    labels = workload["spec"]["template"]["metadata"]["labels"]
    metadata = {"name": f"{network.prefix}-{name}", "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


@contextmanager
def playing(file: Path, made: dict[str, Any], network: containers.Network, name: str) -> Iterator[containers.Container]:
    """The pod, until it is left: its only container."""
    try:
        # The network of the pod is that of the process which starts it.
        call("nsenter", f"--net=/run/netns/{network.prefix}-{name}", "podman", "kube", "play", "--network=host", file)
        [container] = made["spec"]["containers"]
        yield containers.Container(f"{made['metadata']['name']}-{container['name']}")
    finally:
        call("podman", "kube", "play", "--down", file)


def answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False
