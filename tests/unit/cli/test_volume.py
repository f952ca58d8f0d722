"""``skep volume forget`` before a manager's API."""

from typing import Any

import pytest
from msgspec.structs import replace

from skep.cli.cluster.volume import _forget
from skep.errors import FailedPrecondition, NotFound
from skep.manager.routes import ManagerApi
from skep.model.container import ContainerSpec, Mount
from skep.model.node import EngineDescription, Node, NodeState, NodeStatus
from skep.model.options.slot_volumes import FORGOTTEN_LABEL, SLOT_VOLUMES_LABEL
from skep.model.service import TaskSpec
from skep.model.task import Task
from skep.model.values.times import Timestamp
from tests.support.builders import a_node, a_task


async def put(manager: ManagerApi, id: str, state: NodeState, label: str, *tasks: Task) -> None:
    node = a_node(id)
    engine = EngineDescription(labels={SLOT_VOLUMES_LABEL: label})
    node = replace(node, description=replace(node.description, engine=engine), status=NodeStatus(state=state))
    await manager.store.update(lambda tx: [tx.put(one) for one in (node, *tasks)])


def forgotten(manager: ManagerApi, id: str) -> str:
    return manager.store.view().get(Node, id).spec.labels.get(FORGOTTEN_LABEL, "")


async def test_a_volume_is_forgotten_on_nodes_that_are_down(cluster: tuple[ManagerApi, Any]) -> None:
    manager, host = cluster
    later = replace(a_task("t1", node="w1"), created_at="1970-01-01T00:00:09Z")  # type: ignore[arg-type]
    await put(manager, "w1", NodeState.DOWN, "db-2=db.2@5000 other=db.1@7000", later)
    await put(manager, "w2", NodeState.READY, "db-2=db.2@6000")
    assert await _forget(host, "db-2", "") == ["w1"]
    assert (forgotten(manager, "w1"), forgotten(manager, "w2")) == ("db-2@9000", "")
    assert await _forget(host, "other", "w1") == ["w1"]
    assert forgotten(manager, "w1") == "db-2@9000 other@9000"


async def test_a_volume_of_a_node_that_answers_is_removed_there(cluster: tuple[ManagerApi, Any]) -> None:
    manager, host = cluster
    await put(manager, "w2", NodeState.READY, "db-2=db.2@6000")
    with pytest.raises(
        FailedPrecondition,
        match=r"db-2 is on w2, which is not down\. To remove it, run docker volume rm db-2 there",
    ):
        await _forget(host, "db-2", "")
    with pytest.raises(NotFound, match="no node has a local volume db-3"):
        await _forget(host, "db-3", "")
    with pytest.raises(NotFound, match="w2 has no local volume db-3"):
        await _forget(host, "db-3", "w2")
    with pytest.raises(NotFound):
        await _forget(host, "db-2", "w9")
    assert forgotten(manager, "w2") == ""


async def test_a_volume_that_its_node_did_not_report_is_known_by_its_tasks(
    cluster: tuple[ManagerApi, Any],
) -> None:
    manager, host = cluster
    mount = Mount(type="volume", source="db-{{.Task.Slot}}", target="/data")
    task = replace(
        a_task("t1", node="w1"),
        created_at=Timestamp("1970-01-01T00:00:09Z"),
        spec=TaskSpec(container_spec=ContainerSpec(mounts=(mount,))),
    )
    await put(manager, "w1", NodeState.DOWN, "", task)
    await put(manager, "w3", NodeState.DOWN, "")
    with pytest.raises(NotFound, match="no node has a local volume cache"):
        await _forget(host, "cache", "")
    assert await _forget(host, "db-2", "") == ["w1"]
    assert (forgotten(manager, "w1"), forgotten(manager, "w3")) == ("db-2@9000", "")
