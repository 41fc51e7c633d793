"""Deploying to Kubernetes, with a stand-in for its API server: what is applied, refused, and waited for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from tests.apiserver import ApiServer, running

from tally.cli.main import cli
from tally.deploy.kubernetes import target as target_module
from tally.deploy.kubernetes.spec import KubernetesSpec
from tally.deploy.kubernetes.target import KubernetesTarget
from tally.deploy.shipping import Shipped
from tally.deploy.spec import Environment
from tally.errors import DeployError, SpecError

PLASTIC: dict[str, Any] = {
    "name": "plastic",
    "model": "image:/opt/tally/model",
    "environment": Environment("image", "reg.example.com/plastic:1"),
}


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """A cluster with a namespace, three nodes, and the Secret with the clients' keys; the kubeconfig leads there."""
    with running() as (server, url):
        for number in range(3):
            add_node(server, f"node-{number}", cpu="7910m", memory="31Gi")
        server.put("secrets", {"metadata": {"name": "plastic-key"}, "data": {"TALLY_ENDPOINT_KEY": "a2V5"}})
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig", url)))
        monkeypatch.setattr(target_module, "PAUSE", 0.01)
        yield server


def add_node(server: ApiServer, name: str, *, ready: str = "True", taints: Any = (), **allocatable: str) -> None:
    server.put(
        "nodes",
        {
            "metadata": {"name": name},
            "spec": {"taints": list(taints)},
            "status": {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": ready}]},
        },
    )


OPENED = ExitStack()


@pytest.fixture(autouse=True)
def _close_all() -> Iterator[None]:
    with OPENED:
        yield


def target(**values: Any) -> KubernetesTarget:
    return OPENED.enter_context(KubernetesTarget(KubernetesSpec(**(PLASTIC | values))))


def deployed(**values: Any) -> KubernetesTarget:
    found = target(**values)
    found.difference()
    found.apply(lambda text: None)
    return found


def tally(*words: str) -> Result:
    return CliRunner().invoke(cli, ["deploy", *words], standalone_mode=False, catch_exceptions=True)


USUAL = (
    "image:/opt/tally/model",
    "--name",
    "plastic",
    "--target",
    "kubernetes",
    "--env",
    "image:reg.example.com/plastic:1",
)


def error(result: Result) -> str:
    assert result.exception is not None, result.output
    return str(result.exception)


# -- applying --------------------------------------------------------------------------------------------


def test_the_first_time_everything_is_created(api: ApiServer) -> None:
    found = target(profile="production")
    changes = found.difference()
    kinds = ["NetworkPolicy", "Service", "Deployment", "PodDisruptionBudget", "HorizontalPodAutoscaler"]
    assert [(each.action, each.what) for each in changes] == [("create", f"{kind} plastic") for kind in kinds]
    assert api.names("deployments") == []  # a dry run keeps nothing
    told: list[str] = []
    found.apply(told.append)
    assert told == [f"applied {kind} plastic" for kind in kinds]
    assert api.names("horizontalpodautoscalers") == ["plastic"]
    (manager,) = {each["manager"] for each in api.get("deployments", "plastic")["metadata"]["managedFields"]}  # type: ignore[index]
    assert manager == "tally"


def test_the_second_time_nothing_changes(api: ApiServer) -> None:
    deployed(profile="production")
    assert target(profile="production").difference() == []


def test_what_is_there_is_updated_in_place_and_the_difference_shown_first(api: ApiServer) -> None:
    deployed()
    before = api.get("deployments", "plastic")
    (change,) = target(cpu="2", environment=Environment("image", "reg.example.com/plastic:2")).difference()
    assert (change.action, change.what) == ("change", "Deployment plastic")
    marked = [line.replace(" ", "") for line in change.lines if line[0] in "+-"]
    assert "-image:reg.example.com/plastic:1" in marked
    assert "+image:reg.example.com/plastic:2" in marked
    assert "-cpu:'1'" in marked
    assert "+cpu:'2'" in marked
    assert not any("resourceVersion" in line or "managedFields" in line or "imagePullPolicy" in line for line in marked)
    deployed(cpu="2", environment=Environment("image", "reg.example.com/plastic:2"))
    after = api.get("deployments", "plastic")
    assert before is not None
    assert after is not None
    assert before["metadata"]["uid"] == after["metadata"]["uid"]
    assert after["spec"]["template"]["spec"]["containers"][0]["image"] == "reg.example.com/plastic:2"
    assert api.names("deployments") == ["plastic"]


def test_what_a_profile_does_not_have_is_removed_with_it(api: ApiServer) -> None:
    deployed(profile="production")
    # The autoscaler has scaled; Kubernetes notes it as the one who says how many replicas there are.
    api.edit("deployments", "plastic", "kube-controller-manager", {"spec": {"replicas": 3}})
    assert target(profile="production").difference() == []
    found = target()
    assert [(each.action, each.what) for each in found.difference()] == [
        ("change", "Deployment plastic"),
        ("remove", "PodDisruptionBudget plastic"),
        ("remove", "HorizontalPodAutoscaler plastic"),
    ]
    found.apply(lambda text: None)
    assert api.names("horizontalpodautoscalers") == []
    assert api.get("deployments", "plastic")["spec"]["replicas"] == 1  # type: ignore[index]


def test_what_others_changed_is_not_overwritten_unasked(api: ApiServer) -> None:
    deployed()
    theirs = {"template": {"spec": {"terminationGracePeriodSeconds": 600}}}
    api.edit("deployments", "plastic", "kubectl-edit", {"spec": theirs})
    with pytest.raises(DeployError, match=r"terminationGracePeriodSeconds \(conflict with .*kubectl-edit") as caught:
        target().difference()
    assert "--force" in str(caught.value)
    deployed(force=True)
    assert api.get("deployments", "plastic")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 45  # type: ignore[index]


def test_what_tally_did_not_make_is_left_alone(api: ApiServer) -> None:
    api.put("services", {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "plastic"}, "spec": {}})
    with pytest.raises(DeployError, match="a Service plastic that Tally did not make"):
        target().difference()
    assert api.names("deployments") == []


def test_what_others_set_beside_it_stays(api: ApiServer) -> None:
    deployed()
    api.edit("deployments", "plastic", "team", {"metadata": {"name": "plastic", "annotations": {"team/owner": "ana"}}})
    deployed(cpu="2")
    assert api.get("deployments", "plastic")["metadata"]["annotations"]["team/owner"] == "ana"  # type: ignore[index]


# -- before applying -------------------------------------------------------------------------------------


def refused(found: KubernetesTarget) -> str:
    with pytest.raises(DeployError) as caught:
        found.difference()
    return str(caught.value)


def test_a_missing_key_is_said_with_the_command_that_makes_one(api: ApiServer) -> None:
    api.remove("secrets", "plastic-key")
    said = refused(target(secrets=("bucket",)))
    assert "there is no Secret plastic-key in namespace ml" in said
    assert "kubectl --context test -n ml create secret generic plastic-key --from-literal=TALLY_ENDPOINT_KEY=" in said
    assert "there is no Secret bucket" in said
    api.put("secrets", {"metadata": {"name": "plastic-key"}, "data": {"KEY": "a2V5"}})
    assert "has no entry TALLY_ENDPOINT_KEY" in refused(target())


def test_who_may_not_read_secrets_may_deploy(api: ApiServer) -> None:
    api.deny.add(("GET", "secrets"))
    assert target().difference()


def test_production_asks_for_twelve_cores(api: ApiServer) -> None:
    api.remove("nodes", "node-2")
    add_node(api, "node-2", cpu="64", memory="256Gi", ready="False")
    add_node(api, "control", cpu="64", memory="256Gi", taints=[{"key": "node-role", "effect": "NoSchedule"}])
    api.remove("nodes", "node-1")
    said = refused(target(profile="production"))
    assert "has 7.9 cores in 1 nodes; production asks for 12 and more" in said
    assert "--unchecked" in said
    assert target().difference()  # dev-test does not ask
    assert target(profile="production", unchecked=True).difference()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cpu": "7", "replicas": (4, 8)}, "4 replicas need 28.0 cores, and the cluster has 23.7 cores"),
        ({"memory": "32Gi"}, "a replica needs 32.0 GiB, and no node has so much"),
        ({"gpu": 1}, "2 replicas need 2 GPUs, and the cluster has 0 GPUs"),
    ],
    ids=str,
)
def test_production_has_to_fit(api: ApiServer, values: dict[str, Any], said: str) -> None:
    assert said in refused(target(profile="production", **values))


def test_a_cluster_whose_nodes_may_not_be_seen_is_not_taken_for_large(api: ApiServer) -> None:
    api.deny.add(("GET", "nodes"))
    assert "has room for production cannot be seen" in refused(target(profile="production"))


def quota(server: ApiServer, hard: dict[str, str], used: dict[str, str]) -> None:
    server.put(
        "resourcequotas", {"metadata": {"name": "team"}, "spec": {"hard": hard}, "status": {"hard": hard, "used": used}}
    )


def test_a_quota_counts_the_replica_more_that_an_update_has(api: ApiServer) -> None:
    quota(api, {"requests.cpu": "4", "pods": "10"}, {"requests.cpu": "1500m", "pods": "3"})
    assert target().difference()  # 2 of 2.5 cores
    said = refused(target(cpu="1500m"))
    assert "the quota team has 2.5 cores of requests.cpu left, and 1 replicas" in said
    assert "need 3.0 cores" in said
    assert target(cpu="1500m", unchecked=True).difference()


def test_what_an_endpoint_uses_of_a_quota_counts_once(api: ApiServer) -> None:
    found = deployed()
    api.complete("plastic")
    quota(api, {"requests.cpu": "2", "limits.memory": "4Gi"}, {"requests.cpu": "1", "limits.memory": "2Gi"})
    assert found.spec.cpu == "1"
    assert target().difference() == []


def test_a_quota_of_cpu_limits_is_said(api: ApiServer) -> None:
    quota(api, {"limits.cpu": "8"}, {})
    assert "Tally sets no limit of CPU" in refused(target())


def test_a_missing_namespace_is_said(api: ApiServer) -> None:
    said = refused(target(namespace="elsewhere"))
    assert "has no namespace 'elsewhere'" in said
    assert "kubectl --context test create namespace elsewhere" in said


def test_a_cluster_without_the_gateway_api_is_said(api: ApiServer) -> None:
    del api.groups["gateway.networking.k8s.io/v1"]
    said = refused(target(gateway="infra/web"))
    assert "does not know HTTPRoute" in said
    assert "gateway controller brings it" in said
    assert target().difference()  # and nothing of it is asked of others


def test_what_may_not_be_done_is_said(api: ApiServer) -> None:
    api.deny.add(("PATCH", "deployments"))
    said = refused(target())
    assert "refuses Deployment plastic: deployments is forbidden" in said
    assert "auth can-i" in said


# -- the way to the cluster ------------------------------------------------------------------------------


def test_a_cluster_that_does_not_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as (server, url):
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "k", url)))
    said = refused(target())
    assert f"the cluster test ({url}) does not answer" in said
    assert "kubectl --context test" in said


def test_a_wrong_token_is_said_and_not_shown(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as (server, url):
        monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "k", url, token="old-token")))
        said = refused(target())
    assert "does not know who asks" in said
    assert "old-token" not in said


@pytest.mark.parametrize(
    ("text", "values", "said"),
    [
        (None, {}, "there is no cluster: no kubeconfig at"),
        ("{", {}, "is no kubeconfig"),
        ("a: 1", {}, "is no kubeconfig"),
        ("clusters: []\ncontexts: []\n", {}, "has no current context"),
        ("clusters: []\ncontexts: []\ncurrent-context: x\n", {}, "has no context 'x'"),
        ("USUAL", {"context": "tset"}, "has no context 'tset'; did you mean 'test'?"),
    ],
    ids=str,
)
def test_a_kubeconfig_that_leads_nowhere_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, values: dict[str, Any], said: str
) -> None:
    file = tmp_path / "kubeconfig"
    if text == "USUAL":
        ApiServer("ml").write_kubeconfig(file, "http://127.0.0.1:9")
    elif text is not None:
        file.write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(file))
    with pytest.raises(SpecError) as caught:
        target(**values).difference()
    assert said in str(caught.value)


def test_several_kubeconfigs_are_read_together(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = yaml.safe_load((tmp_path / "kubeconfig").read_text())
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text(yaml.safe_dump({"clusters": [], "contexts": whole["contexts"], "current-context": "test"}))
    other.write_text(yaml.safe_dump({"clusters": whole["clusters"], "contexts": [], "users": whole["users"]}))
    monkeypatch.setenv("KUBECONFIG", f"{one}:{tmp_path / 'missing'}:{other}")
    assert target().difference()


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_a_plugin_logs_in(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    plugin = tmp_path / "plugin"
    plugin.write_text(
        "#!/bin/sh\n"
        f'case "$KUBERNETES_EXEC_INFO" in *client.authentication.k8s.io/{version}\\"*) ;; *) exit 1;; esac\n'
        """echo '{"status": {"token": "secret-token"}}'\n"""
    )
    plugin.chmod(0o755)
    found = yaml.safe_load((tmp_path / "kubeconfig").read_text())
    how = {"apiVersion": f"client.authentication.k8s.io/{version}", "command": str(plugin)}
    found["users"] = [{"name": "u", "user": {"exec": how}}]
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(found))
    assert target().difference()
    plugin.write_text("#!/bin/sh\necho 'log in first' >&2\nexit 3\n")
    with pytest.raises(SpecError, match="log in first"):
        target().difference()
    plugin.unlink()
    with pytest.raises(SpecError, match="cannot be used"):
        target().difference()


# -- waiting ---------------------------------------------------------------------------------------------


def steps(server: ApiServer, *each: Callable[[], None]) -> None:
    """What happens before each look at the Deployment; the last again and again."""

    def endless() -> Iterator[Callable[[], None]]:
        yield from each
        while True:
            yield each[-1]

    server.each_look = endless()


def waited(found: KubernetesTarget, timeout: float = 30) -> list[str]:
    told: list[str] = []
    found.wait(told.append, timeout)
    return told


def in_vain(found: KubernetesTarget, timeout: float = 30) -> str:
    with pytest.raises(DeployError) as caught:
        found.wait(lambda text: None, timeout)
    return str(caught.value)


def test_a_rollout_is_waited_for(api: ApiServer) -> None:
    found = deployed(profile="production")

    def autoscale() -> None:
        api.edit("deployments", "plastic", "kube-controller-manager", {"spec": {"replicas": 2}})
        api.set_status("plastic", replicas=2, updatedReplicas=2, availableReplicas=1)

    steps(
        api,
        lambda: None,
        lambda: api.set_status("plastic", replicas=1, updatedReplicas=1),
        autoscale,
        lambda: api.set_status("plastic", replicas=3, updatedReplicas=2, availableReplicas=3),
        lambda: api.complete("plastic"),
    )
    assert waited(found) == [
        "0 of 2 replicas ready",
        "0 of 2 replicas ready; the autoscaler has asked for 1 yet",
        "1 of 2 replicas ready",
        "2 of 2 replicas ready; 1 of the version before are still ending",
        "2 of 2 replicas ready",
    ]


def test_a_cluster_that_is_away_for_a_while_is_asked_again(api: ApiServer) -> None:
    found = deployed()
    api.complete("plastic")
    api.busy = 6
    told = waited(found)
    assert any("does not answer" in each for each in told)
    assert any("the server is shutting down" in each for each in told)
    assert told[-1] == "1 of 1 replicas ready"
    api.busy = 1_000_000
    assert "the cluster test" in in_vain(found, timeout=0.1)


def waiting(reason: str, message: str, **more: Any) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"phase": "Pending", "containerStatuses": [{"name": "endpoint", "state": state, "ready": False, **more}]}


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            waiting("ImagePullBackOff", 'Back-off pulling image "reg.example.com/plastic:1": not found'),
            'ImagePullBackOff: the image cannot be pulled: Back-off pulling image "reg.example.com/plastic:1"',
        ),
        (waiting("InvalidImageName", "couldn't parse"), "the image's name is not valid"),
        (
            waiting("CreateContainerConfigError", 'secret "plastic-key" not found'),
            'missing: secret "plastic-key" not found',
        ),
        (
            waiting(
                "CrashLoopBackOff",
                "back-off",
                restartCount=4,
                lastState={
                    "terminated": {"reason": "Error", "exitCode": 2, "message": "loading\nerror: no model at /m\n"}
                },
            ),
            "it ended 4 times, last with Error, exit code 2. Its last lines:\n    loading\n    error: no model at /m",
        ),
        (
            waiting(
                "CrashLoopBackOff",
                "x",
                restartCount=2,
                lastState={"terminated": {"reason": "OOMKilled", "exitCode": 137}},
            ),
            "OOMKilled, exit code 137: it needs more than its memory; give more with --memory",
        ),
        ({"phase": "Failed", "reason": "Evicted", "message": "low on disk"}, "Evicted: low on disk"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_why_a_rollout_will_not_come_is_said_at_once(api: ApiServer, status: dict[str, Any], said: str) -> None:
    found = deployed()
    api.set_status("plastic", replicas=1, updatedReplicas=1)
    api.add_pod("plastic", "plastic-new-1", status)
    message = in_vain(found)
    assert message.startswith("plastic does not come up: plastic-new-1: ")
    assert said in message
    assert "kubectl --context test -n ml describe deployment,pod" in message


def test_a_crash_without_a_message_has_the_log(api: ApiServer) -> None:
    found = deployed()
    api.set_status("plastic", replicas=1, updatedReplicas=1)
    api.add_pod(
        "plastic", "p", waiting("CrashLoopBackOff", "x", restartCount=1, lastState={"terminated": {"exitCode": 1}})
    )
    api.logs["p"] = "one\ntwo\n"
    assert "Its last lines:\n    one\n    two" in in_vain(found)


def test_secrets_in_logs_are_not_shown(api: ApiServer) -> None:
    found = deployed()
    api.set_status("plastic", replicas=1, updatedReplicas=1)
    ended = {"exitCode": 1, "message": "cannot reach postgresql://tally:hunter2@db/tally"}
    api.add_pod("plastic", "p", waiting("CrashLoopBackOff", "x", lastState={"terminated": ended}))
    message = in_vain(found)
    assert "cannot reach postgresql://tally:" in message
    assert "hunter2" not in message


def test_pods_that_no_node_takes_are_waited_for_and_their_reason_told(api: ApiServer) -> None:
    found = deployed()
    reason = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    pending = {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "message": reason}]}
    api.set_status("plastic", replicas=1, updatedReplicas=1)
    api.add_pod("plastic", "p", pending)
    message = in_vain(found, timeout=0.2)
    assert "after 0.2 s, plastic has 0 of 1 replicas ready" in message
    assert f"p: Pending, as no node takes it: {reason}" in message
    steps(api, lambda: None, lambda: api.complete("plastic"))
    assert waited(found)[0].endswith(reason)  # a node may still come


def test_pods_that_cannot_be_made_are_said(api: ApiServer) -> None:
    found = deployed()
    message = 'pods "plastic-x" is forbidden: exceeded quota: team, requested: pods=1, used: pods=5, limited: pods=5'
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}
    api.set_status("plastic", replicas=0, conditions=[failure])
    assert f"no pod can be made: {message}" in in_vain(found)


def test_a_replica_that_is_not_ready_in_time_has_its_last_lines_told(api: ApiServer) -> None:
    found = deployed()
    api.set_status("plastic", replicas=1, updatedReplicas=1)
    up = {"phase": "Running", "containerStatuses": [{"name": "endpoint", "ready": False, "state": {"running": {}}}]}
    api.add_pod("plastic", "p", up)
    api.logs["p"] = "fetching the model\n"
    message = in_vain(found, timeout=0.1)
    assert "it runs, and is not ready yet" in message
    assert message.splitlines()[1].strip() == "fetching the model"


def test_only_pods_of_the_newest_version_count(api: ApiServer) -> None:
    found = deployed()
    live = api.get("deployments", "plastic")
    assert live is not None
    api.put(
        "deployments",
        live | {"metadata": live["metadata"] | {"annotations": {"deployment.kubernetes.io/revision": "2"}}},
    )
    labels = live["spec"]["template"]["metadata"]["labels"]
    for revision, hash_ in (("1", "old"), ("2", "new")):
        metadata = {
            "name": f"plastic-{hash_}",
            "labels": labels | {"pod-template-hash": hash_},
            "annotations": {"deployment.kubernetes.io/revision": revision},
        }
        api.put("replicasets", {"metadata": metadata})
    api.set_status("plastic", replicas=2, updatedReplicas=1, availableReplicas=1)
    api.add_pod("plastic", "old", waiting("ImagePullBackOff", "of the version before"), hash_="old")
    api.add_pod("plastic", "new", {"phase": "Running"}, hash_="new")
    steps(api, lambda: None, lambda: api.complete("plastic"))
    assert waited(found)[-1] == "1 of 1 replicas ready"


def test_an_endpoint_that_is_removed_meanwhile_is_said(api: ApiServer) -> None:
    assert "was removed while it was waited for" in in_vain(target())


def test_its_status_is_told(api: ApiServer) -> None:
    assert target().status().exists is False
    found = deployed()
    api.complete("plastic")
    now = found.status()
    assert (now.exists, now.ready, now.wanted, now.image) == (True, 1, 1, "reg.example.com/plastic:1")
    assert (now.model, now.problems) == ("image:/opt/tally/model", [])


def endpoints(*words: str) -> Result:
    return CliRunner().invoke(
        cli, ["endpoints", *words, "--target", "kubernetes"], standalone_mode=False, catch_exceptions=True
    )


def test_endpoints_of_a_cluster_are_listed_shown_and_deleted(
    api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "ENDPOINT" in endpoints("list").output
    deployed(profile="production", grpc_port=8500)
    api.edit("deployments", "plastic", "autoscaler", {"spec": {"replicas": 2}})
    api.complete("plastic")
    api.put("secrets", {"metadata": {"name": "bottles-key"}, "data": {"TALLY_ENDPOINT_KEY": "a2V5"}})
    shipped = Shipped("s3://b/d/3", "detector (version 3)", version=3)
    monkeypatch.setattr(KubernetesTarget, "shipped", shipped)
    deployed(name="bottles", model="models:/detector@champion")
    api.put("deployments", {"metadata": {"name": "other", "labels": {}}, "spec": {}})
    listed = endpoints("list").output
    assert [line.split()[0] for line in listed.splitlines()] == ["ENDPOINT", "bottles", "plastic"]
    assert "not ready  0 of 1" in listed
    shown = endpoints("show", "bottles")
    assert "  model: models:/detector@champion (version 3)\n" in shown.output
    shown = endpoints("show", "plastic")
    assert shown.output.splitlines() == [
        "plastic: ready, 2 of 2 replicas ready",
        "  model: image:/opt/tally/model",
        "  image: reg.example.com/plastic:1",
        "  profile: production",
        "  scoring_uri: http://plastic.ml.svc/api/v1/service/plastic/score",
        "  grpc: plastic.ml.svc:8500",
    ]
    assert json.loads(endpoints("show", "bottles", "--json").output)["version"] == "3"
    assert "did you mean 'plastic'" in error(endpoints("show", "plastik"))
    assert "was not made by Tally" in error(endpoints("delete", "other", "--yes"))

    # What Tally made, and nothing else: an object of the name that others made, the keys and the other endpoint stay.
    api.put("ingresses", {"metadata": {"name": "plastic", "labels": {"app.kubernetes.io/instance": "plastic"}}})
    deleted = endpoints("delete", "plastic", "--yes").output.splitlines()
    assert deleted == [
        f"deleted {kind} plastic"
        for kind in ("HorizontalPodAutoscaler", "PodDisruptionBudget", "Deployment", "Service", "NetworkPolicy")
    ]
    assert api.get("deployments", "plastic") is None
    for plural, name in (("ingresses", "plastic"), ("secrets", "plastic-key"), ("deployments", "bottles")):
        assert api.get(plural, name) is not None, name
    assert "there is no endpoint 'plastic'" in error(endpoints("delete", "plastic", "--yes"))
    refused = CliRunner().invoke(cli, ["endpoints", "list", "--namespace", "ml"], standalone_mode=False)
    assert "--namespace is for --target kubernetes" in error(refused)
    monkeypatch.setenv("TALLY_SERVER", "http://127.0.0.1:1")
    assert "works from this machine" in error(endpoints("list"))


# -- where clients find it -------------------------------------------------------------------------------


def test_clients_find_it_where_azure_ml_had_it(api: ApiServer) -> None:
    assert target().uris()["scoring_uri"] == "http://plastic.ml.svc/api/v1/service/plastic/score"
    listeners = [{"name": "web", "protocol": "HTTP", "port": 80}]
    web = {
        "metadata": {"name": "web"},
        "spec": {"listeners": listeners},
        "status": {"addresses": [{"value": "20.1.2.3"}]},
    }
    api.put("gateways", web)
    assert target(gateway="ml/web").uris() == {
        "scoring_uri": "http://20.1.2.3/api/v1/service/plastic/score",
        "swagger_uri": "http://20.1.2.3/api/v1/service/plastic/swagger.json",
    }
    spoken = target(gateway="ml/web", grpc_port=8500)
    assert spoken.uris()["grpc"] == "plastic.ml.svc:8500"  # no route of HTTP leads there
    assert "within the cluster" in "\n".join(spoken.plan().notes)
    assert target(gateway="web", hostname="m.example.com").address() == "http://m.example.com"
    ingress: dict[str, Any] = {"ingress_class": "nginx", "allow_from": ("ingress-nginx",), "hostname": "m.example.com"}
    assert target(**ingress, tls_secret="t").address() == "https://m.example.com"


# -- the command -----------------------------------------------------------------------------------------


def test_the_command_applies_waits_and_says_where_it_is(api: ApiServer) -> None:
    steps(api, lambda: None, lambda: None, lambda: None, lambda: None, lambda: api.complete("plastic"))

    result = tally(*USUAL, "--wait")
    assert result.exception is None, result.output
    lines = result.stdout.splitlines()
    assert "create Deployment plastic" in lines
    assert lines.index("create Deployment plastic") < lines.index("applied Deployment plastic")
    assert "1 of 1 replicas ready" in lines
    assert lines[-2] == "  scoring_uri: http://plastic.ml.svc/api/v1/service/plastic/score"
    again = tally(*USUAL)
    assert "nothing to change" in again.stdout


def test_a_dry_run_prints_yaml_and_asks_no_cluster(api: ApiServer) -> None:
    result = tally(*USUAL, "--profile", "production", "--dry-run")
    assert result.exception is None
    found = list(yaml.safe_load_all(result.stdout))
    assert [each["kind"] for each in found][:3] == ["NetworkPolicy", "Service", "Deployment"]
    assert "profile production: 2 to 4 replicas" in result.stderr
    assert api.requests == []
    assert "namespace" not in found[0]["metadata"]
    named = tally(*USUAL, "--namespace", "ml", "--dry-run")
    assert {each["metadata"]["namespace"] for each in yaml.safe_load_all(named.stdout)} == {"ml"}


def test_files_are_written_and_nothing_applied(api: ApiServer, tmp_path: Path) -> None:
    result = tally(*USUAL, "--out", str(tmp_path / "out"))
    assert result.exception is None
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["plastic.yaml"]
    assert api.requests == []


def test_what_is_wrong_with_the_options_is_said_together(api: ApiServer) -> None:
    result = tally(*USUAL, "--replicas", "3", "--memory", "2", "--location", "here")
    assert isinstance(result.exception, SpecError)
    assert len(result.exception.problems) == 3
    assert "did you mean 'kubernetes'" in error(tally("m", "--name", "p", "--target", "kubernete"))
    assert "is none of image:NAME" in error(tally(*USUAL[:-1], "docker:x"))
    assert "A: is given twice" in error(tally(*USUAL, "--variable", "A=1", "--variable", "A=2"))


def test_a_delay_of_nothing_is_not_left_out(api: ApiServer) -> None:
    result = tally(*USUAL, "--max-delay", "0", "--dry-run")
    command = list(yaml.safe_load_all(result.stdout))[2]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[command.index("--max-delay") + 1] == "0s"


def test_no_secret_is_asked_for_or_printed(api: ApiServer) -> None:
    result = tally(*USUAL)
    assert "a2V5" not in result.output
    assert "secret-token" not in result.output
    applied = json.dumps(api.get("deployments", "plastic"))
    assert '"secretName": "plastic-key"' in applied
