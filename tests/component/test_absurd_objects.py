"""Objects that make no sense: all others converge, and they say so themselves."""

import asyncio
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.model.network import IPAMConfig, IPAMOptions
from skep.model.service import (
    NetworkAttachmentConfig,
    ReplicatedJob,
    Resources,
    Service,
    ServiceMode,
    TaskSpec,
)
from skep.model.task import Task
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec, a_task, an_overlay
from tests.support.managers.control_loops import leading, wait_for
from tests.support.store.damage_rigs import a_good_service_converges, cluster_with

pytestmark = pytest.mark.timeout(30)


def too_many(tx: Transaction) -> None:
    tx.put(a_service("absurd", replicas=10**9))


def too_many_runs(tx: Transaction) -> None:
    job = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=10**9, total_completions=10**9))
    tx.put(a_service("absurd", spec=replace(a_service_spec("absurd"), mode=job)))


def strange_constraints(tx: Transaction) -> None:
    tx.put(a_service("absurd", constraints=("neither nor",), is_global=True))


def strange_constraints_of_a_replica(tx: Transaction) -> None:
    tx.put(a_service("absurd", constraints=("neither nor",)))


def error_of(service: str) -> Callable[[MemoryStore], str]:
    """What a service or its tasks say about what is wrong."""

    def error(store: MemoryStore) -> str:
        status = store.view().get(Service, service).update_status
        errors = [task.status.err for task in store.view().find(Task, service_id=service)]
        return " ".join([status.message if status is not None else "", *errors])

    return error


@pytest.mark.parametrize(
    ("absurd", "words"),
    [
        (too_many, "at most 100000 tasks, not 1000000000"),
        (too_many_runs, "at most 100000 tasks, not 1000000000"),
        (strange_constraints, "constraint expected one operator"),
        (strange_constraints_of_a_replica, "constraint expected one operator"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_nonsensical_service_shows_its_error_and_affects_no_other(
    absurd: Callable[[Transaction], None], words: str
) -> None:
    cluster = cluster_with(a_node("n1"))

    async def live() -> None:
        store = MemoryStore(SystemClock(), cluster)
        await store.update(absurd)
        async with leading(store):
            await a_good_service_converges(store)
            await wait_for(store, lambda: words in error_of("absurd")(store))

    asyncio.run(live())


def test_a_nonsensical_network_shows_its_error_at_its_task_and_affects_no_other() -> None:
    nonsense = IPAMOptions(configs=(IPAMConfig(subnet="nonsense", gateway="no"),))
    network = an_overlay("bad", subnet="")
    network = replace(network, spec=replace(network.spec, ipam_options=nonsense))
    spec = a_service_spec("absurd")
    attached = replace(spec.task_template, networks=(NetworkAttachmentConfig(target="bad"),))
    cluster = cluster_with(
        a_node("n1"), network, a_service("absurd", spec=replace(spec, task_template=attached))
    )

    async def live() -> None:
        store = MemoryStore(SystemClock(), cluster)
        async with leading(store):
            await a_good_service_converges(store)
            await wait_for(store, lambda: bool(error_of("absurd")(store).strip()))

    asyncio.run(live())


def test_a_nonsensical_node_gets_no_tasks_and_affects_no_other() -> None:
    negative = Resources(nano_cpus=-1, memory_bytes=-(10**18))
    cluster = cluster_with(a_node("n1"), a_node("n2", has=negative))

    async def live() -> None:
        store = MemoryStore(SystemClock(), cluster)
        async with leading(store):
            await store.update(
                lambda tx: tx.put(a_service("hungry", replicas=1, reserve=Resources(memory_bytes=1)))
            )
            await wait_for(
                store, lambda: any(task.node_id for task in store.view().find(Task, service_id="hungry"))
            )
            assert {task.node_id for task in store.view().find(Task, service_id="hungry")} == {"n1"}
            await a_good_service_converges(store)

    asyncio.run(live())


def test_a_nonsensical_task_affects_no_other() -> None:
    """It has no spec, no service and a node that there never was."""
    task = replace(a_task("t1", service="nobody", node="nowhere"), spec=TaskSpec())
    cluster = cluster_with(a_node("n1"), task)

    async def live() -> None:
        store = MemoryStore(SystemClock(), cluster)
        async with leading(store):
            await a_good_service_converges(store)
            await wait_for(store, lambda: store.view().lookup(Task, "t1") is None)

    asyncio.run(live())
