"""Tasks with data stay in the store until their node has reported the data."""

import asyncio
from collections.abc import AsyncIterator
from random import Random

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.orchestrator.reaper.loop import Reaper
from skep.manager.orchestrator.reaper.state import unreported
from skep.model.container import ContainerSpec, Mount
from skep.model.networks.data_planes import NODE_LABEL
from skep.model.node import EngineDescription, Node
from skep.model.node_reports.conditions import ConditionName, condition_label
from skep.model.options.labels import VOLUME_AFFINITY
from skep.model.options.slot_volumes import FORGOTTEN_LABEL, SLOT_VOLUMES_LABEL, created_ms
from skep.model.service import Service
from skep.model.task import ContainerStatus, Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.ids import new_id as a_new_id
from skep.model.values.meta import Version
from skep.model.values.times import Timestamp
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task
from tests.support.store.damage_rigs import damage

REMOVE = TaskState.REMOVE
CREATED = ContainerStatus(container_id="c1")


def keeping(**labels: str) -> Service:
    service = a_service("web")
    mounts = (Mount(type="volume", source="data-{{.Task.Slot}}", target="/d"),)
    container = ContainerSpec(image="app:1", mounts=mounts)
    template = replace(service.spec.task_template, container_spec=container)
    return replace(
        service,
        spec=replace(service.spec, task_template=template, labels=labels or {VOLUME_AFFINITY: "required"}),
    )


SERVICE = keeping()


def ended(
    state: TaskState = TaskState.COMPLETE, *, container: ContainerStatus | None = None, **options: str
) -> Task:
    task = a_task(service=SERVICE, slot=2, node=options.pop("node", "n1"), state=state, desired=REMOVE)
    return replace(task, status=replace(task.status, container_status=container))


def reporting(label: str = "", *, engine: str = "1", forgotten: str = "", **labels: str) -> Node:
    node = a_node("n1")
    labels = {**({SLOT_VOLUMES_LABEL: label} if label else {}), **labels}
    description = replace(node.description, engine=EngineDescription(engine_version=engine, labels=labels))
    spec = replace(node.spec, labels={FORGOTTEN_LABEL: forgotten} if forgotten else {})
    return replace(node, description=description, spec=spec)


SKEP = {NODE_LABEL: "true"}


def waits(*tasks: Task, node: Node | None, service: Service = SERVICE) -> list[TaskId]:
    return sorted(unreported(tasks, service, lambda node_id: node if node_id == "n1" else None))


def test_a_task_with_data_waits_for_a_report_that_has_it_or_a_later_one() -> None:
    task = ended()
    at = created_ms(task)
    assert waits(task, node=reporting(**SKEP)) == [task.id]
    for other in (f"data-2=web.2@{at - 1}", f"data-2=web.1@{at}", f"other=web.2@{at}", f"data-2=db.2@{at}"):
        assert waits(task, node=reporting(other, **SKEP)) == [task.id], other
    assert waits(task, node=reporting(f"data-2=web.2@{at}", **SKEP)) == []
    assert waits(task, node=reporting(f"data-2=web.2@{at + 1}", **SKEP)) == []


def test_a_task_of_a_job_waits_for_a_report_with_the_number_that_nodes_know() -> None:
    task = replace(ended(), job_iteration=Version())
    at = created_ms(task)
    assert waits(task, node=reporting(f"data-2=web.2@{at}", **SKEP)) == [task.id]
    assert waits(task, node=reporting(f"data-1=web.1@{at}", **SKEP)) == []


def test_only_the_last_task_with_data_of_a_slot_on_a_node_waits() -> None:
    first, last = ended(), ended()
    assert waits(last, first, node=reporting(**SKEP)) == [last.id]
    rejected = ended(TaskState.REJECTED)
    assert waits(first, last, rejected, node=reporting(**SKEP)) == [last.id]
    assert waits(first, ended(node="n2"), node=reporting(**SKEP)) == [first.id], "n2 is not in the cluster"


@pytest.mark.parametrize("state", [TaskState.REJECTED, TaskState.SHUTDOWN])
def test_a_task_without_a_container_has_no_data(state: TaskState) -> None:
    assert waits(ended(state), node=reporting(**SKEP)) == []
    task = ended(state, container=CREATED)
    assert waits(task, node=reporting(**SKEP)) == [task.id]


def test_nothing_waits_for_a_report_that_never_comes_or_need_not_come() -> None:
    task = ended()
    assert waits(task, node=None) == []
    assert waits(task, node=reporting()) == [], "a Docker Engine"
    assert (
        waits(task, node=reporting(**SKEP, **{condition_label(ConditionName.DESCRIPTION_SIZE): "cut"})) == []
    )
    assert waits(task, node=reporting(forgotten=f"data-2@{created_ms(task)}", **SKEP)) == []
    assert waits(task, node=reporting(**SKEP), service=keeping(**{VOLUME_AFFINITY: "preferred"})) == []
    removed = replace(SERVICE, removed_at=Timestamp("2026-01-01T00:00:00Z"))
    assert waits(task, node=reporting(**SKEP), service=removed) == []


@pytest.mark.parametrize("parts", [("",), ("status",), ("", "status")])
async def test_a_node_whose_record_cannot_be_read_is_not_taken_for_a_removed_one(
    store: MemoryStore, parts: tuple[str, ...]
) -> None:
    """The store shows it with the defaults of the unreadable parts, like a node that has not reported."""
    at = created_ms(store.view().get(Task, "t1"))
    for part in parts:
        damage(store.cluster, "node", "n1", part)
    later = MemoryStore(SystemClock(), store.cluster)
    reaper = asyncio.create_task(Reaper(later, SystemClock(), a_new_id, Random(1)).run())
    idle = a_task("idle2", slot=3, service=SERVICE, state=TaskState.NEW, desired=REMOVE)
    await later.update(lambda tx: tx.put(idle))
    await gone(later, "idle2")
    assert later.view().lookup(Task, "t1") is not None
    # The node registers again, and its record is written as a whole.
    await later.update(lambda tx: tx.put(reporting(f"data-2=web.2@{at}", **SKEP)))
    await gone(later, "t1")
    reaper.cancel()
    await asyncio.wait([reaper])


@pytest.fixture
async def store() -> AsyncIterator[MemoryStore]:
    """A store with a task that waits, whose reaper runs."""
    made = MemoryStore(SystemClock())
    for one in (SERVICE, reporting(**SKEP), replace(ended(), id=TaskId("t1"))):
        await made.update(lambda tx, one=one: tx.put(one))
    reaper = asyncio.create_task(Reaper(made, SystemClock(), a_new_id, Random(1)).run())
    # The reaper decides in order: once it has deleted this task, it has decided about the other one.
    idle = a_task("idle", slot=3, service=SERVICE, state=TaskState.NEW, desired=REMOVE)
    await made.update(lambda tx: tx.put(idle))
    await gone(made, "idle")
    assert made.view().lookup(Task, "t1") is not None
    yield made
    reaper.cancel()
    await asyncio.wait([reaper])


async def gone(store: MemoryStore, id: str) -> None:
    async with asyncio.timeout(10), store.watch(Task) as watch:
        if store.view().lookup(Task, id) is None:
            return
        async for _ in watch:
            if store.view().lookup(Task, id) is None:
                return


async def test_the_task_is_deleted_after_the_report(store: MemoryStore) -> None:
    at = created_ms(store.view().get(Task, "t1"))
    await store.update(lambda tx: tx.put(reporting(f"data-2=web.2@{at}", **SKEP)))
    await gone(store, "t1")


async def test_the_task_is_deleted_when_its_data_need_not_be_kept(store: MemoryStore) -> None:
    await store.update(lambda tx: tx.put(keeping(**{VOLUME_AFFINITY: "preferred"})))
    await gone(store, "t1")


async def test_the_task_is_deleted_with_its_service(store: MemoryStore) -> None:
    removed = replace(SERVICE, removed_at=Timestamp("2026-01-01T00:00:00Z"))
    await store.update(lambda tx: tx.put(removed))
    await gone(store, "t1")


async def test_the_task_is_deleted_with_its_node(store: MemoryStore) -> None:
    await store.update(lambda tx: tx.delete(Node, NodeId("n1")))
    await gone(store, "t1")
