"""The store of pipelines keeps its promises on every database: one process drives a run, and its nodes are there."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.contracts.conftest import lose
from tests.workflows import written

from tally.database.leased import Lease
from tally.database.tables import pipeline_cache, pipeline_runs
from tally.errors import OwnershipLostError, PipelineNotFoundError, PipelineStateError
from tally.pipelines.facade import Pipelines
from tally.pipelines.options import Options
from tally.pipelines.store import Node, PipelineStore


@pytest.fixture
def store(engine: sa.Engine) -> PipelineStore:
    return PipelineStore(engine)


def begun(store: PipelineStore, name: str = "run") -> Lease:
    return store.create(name=name, folder="/f", spec={"a": 1}, parameters={"p": "1\0"})


def test_nodes_are_kept_as_they_are_last(store: PipelineStore) -> None:
    lease = begun(store)
    first = Node("run", "run", "Steps", "main", "", number=1, phase="Running", inputs={"a": "é\0"})
    second = Node("run[0].a" + "x" * 3000, "a", "Pod", "a", first.id, number=2)
    store.save(lease, [first, second])
    first.phase, first.outputs, second.exit_code = "Succeeded", {"parameters": {"x": "1"}}, 3
    store.save(lease, [first, second], [("cache", "key", first)])
    one, two = store.nodes(lease.id)
    assert (one.phase, one.outputs, one.inputs, one.supplied) == ("Succeeded", first.outputs, {"a": "é\\0"}, None)
    assert (two.name, two.exit_code, two.parent) == (second.name, 3, first.id)
    assert store.get(lease.id).parameters == {"p": "1\\0"}
    cached = store.cached("cache", "key")
    assert cached is not None
    assert (cached.outputs, cached.run_id, cached.node_id) == (first.outputs, lease.id, first.id)
    assert cached.age < 60
    assert store.cached("cache", "other") is None


def test_one_process_drives_a_run(store: PipelineStore) -> None:
    lease = begun(store)
    with pytest.raises(PipelineStateError, match="by another process"):
        store.resume(lease.id)
    with pytest.raises(PipelineStateError, match="is running"):
        store.delete(lease.id)
    lose(store.engine, pipeline_runs, lease.id)
    assert store.get(lease.id).state == "interrupted"
    other = store.resume(lease.id[:6])
    for change in (lambda: store.save(lease, []), lambda: store.renew(lease), lambda: store.finish(lease, "succeeded")):
        with pytest.raises(OwnershipLostError):
            change()
    store.want(other.id, "cancel")
    assert store.renew(other) == "cancel"
    store.finish(other, "cancelled")
    with pytest.raises(PipelineStateError, match="is cancelled"):
        store.resume(other.id)
    store.delete(other.id)
    with pytest.raises(PipelineNotFoundError):
        store.get(other.id)


def test_runs_are_found_by_their_names(store: PipelineStore) -> None:
    leases = [begun(store, "same"), begun(store, "same"), begun(store, "other")]
    assert store.get("other").id == leases[2].id
    with pytest.raises(PipelineNotFoundError, match="means several"):
        store.get("same")
    page = store.list(limit=2)
    found = [*page.runs, *store.list(limit=2, after=page.next).runs]
    assert len(page.runs) == 2
    assert sorted(each.id for each in found) == sorted(each.id for each in leases)
    lose(store.engine, pipeline_runs, leases[0].id)
    store.finish(leases[2], "succeeded")
    assert [each.id for each in store.list(state="interrupted").runs] == [leases[0].id]
    assert [each.id for each in store.list(state="running").runs] == [leases[1].id]
    assert [each.id for each in store.list(text="OTH", state="succeeded").runs] == [leases[2].id]
    now = store.get(leases[2].id).created_at
    assert store.list(until=now - 3600).runs == store.list(since=now + 3600).runs == store.list(text="o_her").runs == []


def test_what_a_person_supplies_is_for_who_waits(store: PipelineStore) -> None:
    lease = begun(store)
    waits = Node("run", "run", "Suspend", "main", "", number=1, phase="Running")
    store.save(lease, [waits])
    assert store.supplied(lease, [waits.id]) == {}
    store.supply(lease.id, waits.id, {"a": "b"})
    store.save(lease, [waits])
    assert store.supplied(lease, [waits.id]) == {waits.id: {"a": "b"}}


def test_places_are_held_until_given_back_or_the_run_is_over(store: PipelineStore) -> None:
    one, two = begun(store), begun(store)
    assert store.lock(one, "m", 2, "a")
    assert store.lock(one, "m", 2, "a")
    assert store.lock(two, "m", 2, "b")
    assert not store.lock(one, "m", 2, "c")
    lose(store.engine, pipeline_runs, two.id)
    assert not store.lock(one, "m", 2, "c")
    store.finish(store.resume(two.id), "failed")
    assert store.lock(one, "m", 2, "c")
    store.unlock(one, "a")
    assert store.lock(one, "m", 2, "d")


def test_a_deleted_run_is_remembered_by_nobody(store: PipelineStore) -> None:
    lease = begun(store)
    node = Node("run", "run", "Pod", "main", "", number=1, phase="Succeeded")
    store.save(lease, [node], [("steps", "k", node)])
    store.finish(lease, "succeeded")
    store.delete(lease.id)
    with store.engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(pipeline_cache)) == 0


def test_a_workflow_runs_on_it(store: PipelineStore, tmp_path: Path) -> None:
    file = written(tmp_path, """
  entrypoint: main
  templates:
  - name: main
    steps: [[{name: each, template: one, withSequence: {count: 5}, arguments: {parameters: [{name: i, value: "{{item}}"}]}}]]
    outputs: {parameters: [{name: all, valueFrom: {parameter: "{{steps.each.outputs.result}}"}}]}
  - name: one
    inputs: {parameters: [{name: i}]}
    container: {image: busybox, command: [echo, "{{inputs.parameters.i}}"]}
""")  # fmt: skip  # noqa: E501
    pipelines = Pipelines(store)
    lease, _ = pipelines.start(file, {}, Options())
    assert pipelines.drive(lease) == "succeeded"
    nodes = store.nodes(lease.id)
    assert nodes[0].outputs["parameters"] == {"all": "[0,1,2,3,4]"}
    assert [each.number for each in nodes] == sorted(each.number for each in nodes)
    pipelines.delete(lease.id)
    assert not list((tmp_path / "tally-home" / "pipelines").glob(lease.id))
