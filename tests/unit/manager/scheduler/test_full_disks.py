"""A node whose disk is full gets no new tasks, and keeps the slots that it has."""

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.scheduler.explaining.explain import verdict
from skep.manager.scheduler.nodes.requirements import requirements_of
from skep.model.node import EngineDescription, Node
from skep.model.node_reports.conditions import DISK_PRESSURE_LABEL
from skep.model.service import JobStatus, Service
from skep.model.task import ContainerStatus, Task, TaskState
from skep.model.values.meta import Version
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.unit.manager.scheduler.test_placement import accounting_of, nodes_of, placed, reason
from tests.unit.manager.scheduler.test_returning import a_stateful_service, on, past, waiting
from tests.unit.manager.scheduler.test_scheduler_loop import put, scheduling, wait_for

FULL = "the disk at /var/lib/skep is 96 % full, 412 MiB left: no new tasks until it is below 93 %"


def full(id: str, **requested: object) -> Node:
    node = a_node(id, **requested)  # type: ignore[arg-type]
    engine = EngineDescription(labels={DISK_PRESSURE_LABEL: FULL})
    return replace(node, description=replace(node.description, engine=engine))


def crashed(service: Service, node: str, *, slot: int = 1) -> Task:
    """The slot's last task, which ran there."""
    task = a_task(service=service, slot=slot, node=node, state=TaskState.FAILED, desired=TaskState.SHUTDOWN)
    status = replace(task.status, container_status=ContainerStatus(container_id="c1", exit_code=1))
    return replace(task, status=status)


async def a_store(*objects: object) -> MemoryStore:
    store = MemoryStore(SystemClock())
    await store.update_each(put, objects)  # type: ignore[arg-type]
    return store


async def scheduled(store: MemoryStore, task: Task) -> Task:
    """The task once it is assigned or has a reason."""

    def is_decided() -> bool:
        status = store.view().get(Task, task.id).status
        return status.state is TaskState.ASSIGNED or bool(status.err)

    async with scheduling(store):
        await wait_for(store, is_decided)
    return store.view().get(Task, task.id)


def test_new_tasks_go_to_nodes_with_space() -> None:
    accounting = accounting_of([full("n1"), a_node("n2")], [a_task(node="n2", service="other")])
    assert nodes_of(placed(a_service(replicas=4), accounting)) == {"n2": 4}


def test_a_task_that_no_node_has_space_for_says_so_and_each_node_why() -> None:
    accounting = accounting_of([full("n1"), full("n2")])
    assert reason(placed(a_service(replicas=1), accounting)) == "no suitable node (disk full on 2 nodes)"
    service = a_service()
    requirements = requirements_of(a_task(service=service, state=TaskState.PENDING), service.spec)
    (account, _) = accounting.accounts.values()
    assert verdict(requirements, account, 0).reasons == (f"disk full: {FULL}",)


def test_what_a_node_lacks_for_good_is_named_before_its_disk() -> None:
    accounting = accounting_of([full("n1")])
    service = a_service(replicas=1, constraints=("node.labels.zone == north",))
    assert (
        reason(placed(service, accounting))
        == "no suitable node (scheduling constraints not satisfied on 1 node)"
    )


async def test_a_task_gets_its_node_once_that_has_space_again() -> None:
    task = a_task(service=a_service(), state=TaskState.PENDING)
    store = await a_store(full("n1"), task)
    async with scheduling(store):
        await wait_for(store, lambda: "disk full" in store.view().get(Task, task.id).status.err)
        await store.update(
            lambda tx: tx.put(replace(tx.get(Node, "n1"), description=a_node("n1").description))
        )
        await wait_for(store, lambda: on(store, task) == "n1")


async def test_a_crashed_task_is_restarted_on_its_full_node_if_no_other_has_space() -> None:
    """Docker would restart it: a disk that fills must not turn one crash into an outage."""
    service = a_service()
    task = a_task(service=service, state=TaskState.PENDING)
    assert (
        await scheduled(await a_store(full("n1"), full("n2"), crashed(service, "n2"), task), task)
    ).node_id == "n2"
    other = await a_store(full("n1"), a_node("n2"), crashed(service, "n1"), task)
    assert (await scheduled(other, task)).node_id == "n2"


async def test_a_slot_that_never_ran_on_a_full_node_does_not_begin_there() -> None:
    service = a_service()
    task = a_task(service=service, slot=2, state=TaskState.PENDING)
    rejected = a_task(
        service=service, slot=2, node="n1", state=TaskState.REJECTED, desired=TaskState.SHUTDOWN
    )
    store = await a_store(full("n1"), crashed(service, "n1", slot=1), rejected, task)
    assert "disk full on 1 node" in (await scheduled(store, task)).status.err


async def test_a_crashed_task_does_not_return_to_a_full_node_that_does_not_suit_it_any_more() -> None:
    service = a_service(constraints=("node.labels.zone == north",))
    task = a_task(service=service, state=TaskState.PENDING)
    store = await a_store(full("n1"), crashed(service, "n1"), task)
    assert (await scheduled(store, task)).status.err == (
        "no suitable node (scheduling constraints not satisfied on 1 node)"
    )


@pytest.mark.parametrize("has_run", [True, False])
async def test_a_global_services_task_on_a_full_node_is_replaced_and_none_begins(*, has_run: bool) -> None:
    service = a_service(spec=a_service_spec(is_global=True))
    task = a_task(service=service, slot=0, node="n1", state=TaskState.PENDING)
    before = [replace(crashed(service, "n1"), slot=0)] if has_run else []
    found = await scheduled(await a_store(full("n1"), *before, task), task)
    assert (found.status.state is TaskState.ASSIGNED) is has_run
    assert ("disk full on 1 node" in found.status.err) is not has_run


async def test_another_run_of_a_job_is_a_new_task() -> None:
    service = replace(a_service(), job_status=JobStatus(job_iteration=Version(index=1)))
    task = replace(a_task(service=service, state=TaskState.PENDING), job_iteration=Version(index=1))
    store = await a_store(full("n1"), replace(crashed(service, "n1"), job_iteration=Version(index=0)), task)
    assert "disk full on 1 node" in (await scheduled(store, task)).status.err


@pytest.mark.parametrize("policy", ["return", "keep"])
async def test_a_slot_returns_to_its_local_volume_on_a_full_disk(policy: str) -> None:
    """Elsewhere it would begin without its data."""
    service = a_stateful_service(policy)
    task = waiting(service)
    store = await a_store(full("n1"), a_node("n2"), service, past(service, "n1"), task)
    assert (await scheduled(store, task)).node_id == "n1"
