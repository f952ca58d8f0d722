"""Tasks return to the node with their slot's local volumes, or wait for it where their service says so."""

from functools import partial

import pytest
from msgspec.structs import replace

from skep.manager.scheduler.returning import away_words, must_wait, volumes_elsewhere
from skep.manager.scheduler.state import SchedulerState
from skep.model.container import ContainerSpec, Mount
from skep.model.node import Availability, EngineDescription, Node, NodeState
from skep.model.options.labels import VOLUME_AFFINITY
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL, Home, SlotVolumeIndex, homes_of
from skep.model.service import (
    JobStatus,
    Placement,
    Resources,
    Service,
    UpdateConfig,
    UpdateOrder,
    UpdateState,
    UpdateStatus,
)
from skep.model.staging.updates import CANARY, UPDATE
from skep.model.task import ContainerStatus, Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId
from skep.model.values.meta import Version
from skep.model.volume import PublishState, VolumeScope, VolumeSharing
from skep.store.memory import MemoryStore
from tests.support.builders import a_cluster_volume, a_node, a_service, a_task, with_disks
from tests.support.managers.counted_calls import calls_of
from tests.unit.manager.scheduler.test_scheduler_loop import a_store, put, scheduling, wait_for

PENDING, SHUTDOWN = TaskState.PENDING, TaskState.SHUTDOWN
CREATED = ContainerStatus(container_id="c1")


def a_stateful_service(policy: str = "", *, source: str = "data", **requested: object) -> Service:
    service = a_service(**requested)  # type: ignore[arg-type]
    container = ContainerSpec(image="db:1", mounts=(Mount(type="volume", source=source, target="/data"),))
    template = replace(service.spec.task_template, container_spec=container)
    labels = {VOLUME_AFFINITY: policy} if policy else {}
    return replace(service, spec=replace(service.spec, labels=labels, task_template=template))


def past(service: Service, node: str, *, slot: int = 1) -> Task:
    """Return an ended task of the slot that had a container."""
    task = a_task(service=service, slot=slot, node=node, state=SHUTDOWN, desired=SHUTDOWN)
    return replace(task, status=replace(task.status, container_status=CREATED))


def waiting(service: Service, *, slot: int = 1) -> Task:
    return a_task(service=service, slot=slot, state=PENDING)


def down(id: str) -> Node:
    return a_node(id, state=NodeState.DOWN)


def on(store: MemoryStore, task: Task) -> str:
    return store.view().get(Task, task.id).node_id


def reporting(id: str, label: str) -> Node:
    node = a_node(id)
    engine = EngineDescription(labels={SLOT_VOLUMES_LABEL: label})
    return replace(node, description=replace(node.description, engine=engine))


async def scheduled(store: MemoryStore, *tasks: Task) -> None:
    """Return when each of ``tasks`` has a node."""
    async with scheduling(store):
        await wait_for(store, lambda: all(on(store, task) for task in tasks))


async def test_each_slot_returns_to_the_node_with_its_volume() -> None:
    service = a_stateful_service(replicas=10)
    earlier = [past(service, f"n{(slot * 7 + 3) % 10}", slot=slot) for slot in range(1, 11)]
    tasks = [waiting(service, slot=slot) for slot in range(1, 11)]
    store = await a_store(service, *earlier, *tasks)
    await scheduled(store, *tasks)
    assert [on(store, task) for task in tasks] == [one.node_id for one in earlier]


async def test_a_slot_whose_tasks_are_gone_is_found_by_what_nodes_report() -> None:
    service = a_stateful_service(source="data-{{.Task.Slot}}", replicas=3)
    tasks = [waiting(service, slot=slot) for slot in range(1, 4)]
    nodes = [reporting(f"n{8 - slot}", f"data-{slot}=web.{slot}@{slot}") for slot in range(1, 4)]
    store = await a_store(service, *nodes, *tasks)
    await scheduled(store, *tasks)
    assert [on(store, task) for task in tasks] == ["n7", "n6", "n5"]


async def test_a_slot_of_a_job_is_found_by_the_number_that_nodes_know() -> None:
    service = replace(a_stateful_service("required", source="data-{{.Task.Slot}}"), job_status=JobStatus())
    first, second = (replace(waiting(service, slot=slot), job_iteration=Version()) for slot in (1, 2))
    away = reporting("away", "data-0=web.0@1")
    away = replace(away, status=replace(away.status, state=NodeState.DOWN))
    store = await a_store(away, reporting("n2", "data-1=web.1@1"), service, first, second)
    async with scheduling(store):
        await wait_for(store, lambda: on(store, second) and store.view().get(Task, first.id).status.err)
        assert "slot 0 is on node away" in store.view().get(Task, first.id).status.err
        present = store.view().get(Node, "away")
        await store.update(put, replace(present, description=reporting("away", "data-5=web.5@1").description))
        await wait_for(store, lambda: on(store, first) != "")
    assert on(store, second) == "n2"


def test_the_data_of_a_jobs_first_slot_has_the_name_that_its_node_gave_it() -> None:
    service = a_stateful_service(source="data-{{.Task.Slot}}")
    for slot, name in ((1, "data-n3"), (2, "data-1")):
        task, before = (
            replace(one, job_iteration=Version())
            for one in (waiting(service, slot=slot), past(service, "n3", slot=slot))
        )
        assert homes_of(task, "web", [before], SlotVolumeIndex()) == (Home(NodeId("n3"), name),)


async def test_without_its_node_a_task_goes_elsewhere_and_says_so() -> None:
    service = a_stateful_service()
    task = waiting(service)
    store = await a_store(service, down("n3"), past(service, "n3"), task)
    await scheduled(store, task)
    assert on(store, task) != "n3"
    words = "scheduler assigned task to node; volume data of slot 1 is on node n3, which is down"
    assert store.view().get(Task, task.id).status.message == words
    assert volumes_elsewhere(store.view().get(Task, task.id), store.view()) == [
        ("n3", "volume data of slot 1 is on node n3, which is down")
    ]


async def test_a_kept_task_waits_for_its_node_and_says_so_and_holds_up_no_other() -> None:
    service = a_stateful_service("required", replicas=300)
    kept = [waiting(service, slot=slot) for slot in range(1, 261)]  # more than one batch
    others = [waiting(service, slot=slot) for slot in range(261, 301)]
    store = await a_store(service, down("n3"), *(past(service, "n3", slot=one.slot) for one in kept))
    await store.update_each(put, [*kept, *others])
    async with scheduling(store):
        await wait_for(store, lambda: all(on(store, task) for task in others))
        errors = [f"volume data of slot {one.slot} is on node n3, which is down" for one in kept]
        await wait_for(store, lambda: [store.view().get(Task, one.id).status.err for one in kept] == errors)
        assert must_wait(kept[0], store.view())
        await store.update_each(put, [a_node("n3", has=Resources(memory_bytes=1 << 40))])
        await wait_for(store, lambda: all(on(store, task) for task in kept))
    assert {on(store, task) for task in kept} == {"n3"}


@pytest.mark.parametrize("number", [1, 3])
async def test_a_task_that_waits_for_room_waits_for_its_data_once_its_service_requires_that(
    number: int,
) -> None:
    service = a_stateful_service("none", replicas=number, constraints=("node.labels.disk==ssd",))
    tasks = [waiting(service, slot=slot) for slot in range(1, number + 1)]
    store = await a_store(service, down("n3"), *(past(service, "n3", slot=one.slot) for one in tasks), *tasks)

    def errors() -> list[str]:
        return [store.view().get(Task, one.id).status.err for one in tasks]

    async with scheduling(store):
        await wait_for(store, lambda: all(errors()))
        labels = {VOLUME_AFFINITY: "required"}
        present = store.view().get(Service, service.id)
        await store.update(put, replace(present, spec=replace(present.spec, labels=labels)))
        await store.update(put, a_node("n4", labels={"disk": "ssd"}))
        words = [f"volume data of slot {one.slot} is on node n3, which is down" for one in tasks]
        await wait_for(store, lambda: errors() == words)
    assert not any(on(store, task) for task in tasks)


async def test_a_node_that_is_drained_is_named_with_its_availability() -> None:
    service = a_stateful_service("required")
    task = waiting(service)
    drained = a_node("n3", availability=Availability.DRAIN)
    store = await a_store(service, drained, past(service, "n3"), task)
    words = "volume data of slot 1 is on node n3, whose availability is drain"
    async with scheduling(store):
        await wait_for(store, lambda: store.view().get(Task, task.id).status.err == words)


def test_the_slot_of_a_job_has_the_number_in_the_name_of_its_task() -> None:
    task = replace(waiting(a_stateful_service()), job_iteration=Version(index=1))
    words = away_words(task, Home(NodeId("n3"), "data"), down("n3"), ", which is down")
    assert words == "volume data of slot 0 is on node n3, which is down", "as in NAME.0"


async def test_a_kept_task_goes_elsewhere_once_its_volume_is_given_up() -> None:
    service = a_stateful_service("required")
    task = waiting(service)
    store = await a_store(service, down("n3"), past(service, "n3"), task)
    async with scheduling(store):
        await wait_for(store, lambda: bool(store.view().get(Task, task.id).status.err))
        spread = replace(service, spec=replace(service.spec, labels={VOLUME_AFFINITY: "none"}))
        await store.update_each(put, [spread])
        await wait_for(store, lambda: bool(on(store, task)))
    assert on(store, task) != "n3"
    assert store.view().get(Task, task.id).status.message == "scheduler assigned task to node"


async def test_a_kept_task_goes_elsewhere_once_its_node_is_removed() -> None:
    service = a_stateful_service("required")
    task = waiting(service)
    store = await a_store(service, down("n3"), past(service, "n3"), task)
    async with scheduling(store):
        await wait_for(store, lambda: bool(store.view().get(Task, task.id).status.err))
        await store.update_each(lambda tx, node: tx.delete(Node, node.id), [down("n3")])
        await wait_for(store, lambda: bool(on(store, task)))
    assert on(store, task) != "n3"


async def test_a_spread_task_goes_where_there_is_most_room() -> None:
    service = a_stateful_service("none")
    busy = [a_task(node="n3", service="other") for _ in range(5)]
    task = waiting(service)
    store = await a_store(service, past(service, "n3"), *busy, task)
    await scheduled(store, task)
    assert on(store, task) != "n3"


def an_update(order: UpdateOrder) -> tuple[Service, Task, Task]:
    """A service that is updated, its running task on n3, which fills the node, and the next one."""
    service = a_stateful_service(reserve=Resources(memory_bytes=6 << 30), update=UpdateConfig(order=order))
    return service, a_task(service=service, node="n3"), waiting(service)


async def test_a_task_waits_for_what_its_predecessor_holds() -> None:
    service, before, task = an_update(UpdateOrder.STOP_FIRST)
    store = await a_store(service, a_node("n3"), before, task)
    async with scheduling(store):
        await wait_for(store, lambda: bool(store.view().get(Task, task.id).status.err))
        assert "insufficient resources" in store.view().get(Task, task.id).status.err
        await store.update_each(
            put, [replace(before, status=TaskStatus(state=SHUTDOWN, container_status=CREATED))]
        )
        await wait_for(store, lambda: bool(on(store, task)))
    assert on(store, task) == "n3"


async def test_a_task_waits_while_its_cluster_volume_leaves_the_node_with_its_data() -> None:
    service = a_stateful_service()
    template = service.spec.task_template
    assert template.container_spec is not None
    mounts = (*template.container_spec.mounts, Mount(type="cluster", source="shared", target="/shared"))
    template = replace(template, container_spec=replace(template.container_spec, mounts=mounts))
    service = replace(service, spec=replace(service.spec, task_template=template))
    shared = partial(a_cluster_volume, "shared", scope=VolumeScope.MULTI, sharing=VolumeSharing.ALL)
    leaving = shared(on={"n3": PublishState.PENDING_NODE_UNPUBLISH})
    nodes = [with_disks(a_node(id)) for id in ("n1", "n3")]
    task = waiting(service)
    store = await a_store(service, *nodes, leaving, past(service, "n3"), task)
    async with scheduling(store):
        await wait_for(store, lambda: bool(store.view().get(Task, task.id).status.err))
        assert "shared is being unpublished from the node" in store.view().get(Task, task.id).status.err
        await store.update_each(put, [shared()])
        await wait_for(store, lambda: bool(on(store, task)))
    assert on(store, task) == "n3"


async def test_a_freed_place_goes_to_the_slot_with_data_there_before_tasks_that_waited_longer() -> None:
    service, before, task = an_update(UpdateOrder.STOP_FIRST)
    template = replace(
        service.spec.task_template, placement=Placement(constraints=("node.labels.disk==ssd",))
    )
    service = replace(service, spec=replace(service.spec, task_template=template))
    before, task, other = (replace(one, spec=template) for one in (before, task, waiting(service, slot=2)))
    store = await a_store(service, a_node("n3", labels={"disk": "ssd"}), before, other)
    async with scheduling(store):
        await wait_for(store, lambda: bool(store.view().get(Task, other.id).status.err))
        await store.update_each(put, [task])
        await wait_for(store, lambda: bool(store.view().get(Task, task.id).status.err))
        ended = TaskStatus(state=SHUTDOWN, container_status=CREATED)
        await store.update_each(put, [replace(before, status=ended)])
        await wait_for(store, lambda: bool(on(store, task) or on(store, other)))
    assert (on(store, task), on(store, other)) == ("n3", "")


async def test_a_task_that_starts_first_does_not_wait_for_what_its_predecessor_holds() -> None:
    service, before, task = an_update(UpdateOrder.START_FIRST)
    store = await a_store(service, a_node("n3"), before, task)
    await scheduled(store, task)
    assert on(store, task) != "n3"


async def test_a_task_no_longer_waits_for_its_predecessor_once_the_update_starts_first() -> None:
    service, before, task = an_update(UpdateOrder.STOP_FIRST)
    store = await a_store(service, a_node("n3"), before, task)
    async with scheduling(store):
        await wait_for(store, lambda: bool(store.view().get(Task, task.id).status.err))
        present = store.view().get(Service, service.id)
        config = UpdateConfig(order=UpdateOrder.START_FIRST)
        await store.update(put, replace(present, spec=replace(present.spec, update_config=config)))
        await wait_for(store, lambda: bool(on(store, task)))
    assert on(store, task) != "n3"


@pytest.mark.parametrize("waits", [True, False])
async def test_the_order_of_a_rollback_decides_whether_a_task_waits_for_its_predecessor(waits: bool) -> None:
    orders = UpdateOrder.START_FIRST, UpdateOrder.STOP_FIRST
    update, rollback = (UpdateConfig(order=one) for one in (orders if waits else orders[::-1]))
    service, before, task = an_update(update.order)
    status = UpdateStatus(state=UpdateState.ROLLBACK_STARTED)
    service = replace(service, spec=replace(service.spec, rollback_config=rollback), update_status=status)
    store = await a_store(service, a_node("n3"), before, task)
    async with scheduling(store):
        await wait_for(store, lambda: bool(on(store, task) or store.view().get(Task, task.id).status.err))
    assert (on(store, task) == "") is waits


async def test_a_task_of_a_staged_update_does_not_wait_for_the_old_one_that_stays() -> None:
    service, before, task = an_update(UpdateOrder.STOP_FIRST)
    service = replace(service, spec=replace(service.spec, labels={UPDATE: CANARY}))
    store = await a_store(service, a_node("n3"), before, task)
    await scheduled(store, task)
    assert on(store, task) != "n3"


async def test_a_task_whose_node_comes_back_together_with_others_returns_to_it() -> None:
    service = a_stateful_service(constraints=("node.labels.disk==ssd",))
    task = waiting(service)
    store = await a_store(service, down("n7"), past(service, "n7"), task)
    ready = [a_node(f"n{number}", labels={"disk": "ssd"}) for number in range(10)]
    async with scheduling(store):
        await wait_for(store, lambda: "no suitable node" in store.view().get(Task, task.id).status.err)
        await store.update_each(lambda tx, nodes: [tx.put(node) for node in nodes], [ready])
        await wait_for(store, lambda: bool(on(store, task)))
    assert on(store, task) == "n7"
    assert store.view().get(Task, task.id).status.message == "scheduler assigned task to node"


async def test_a_node_that_reports_other_volumes_has_only_tasks_of_their_slots_decided_again() -> None:
    service = a_stateful_service("required")
    refused = a_service("refused", constraints=("node.labels.x==1",))
    away = reporting("away", "data=web.1@1 data=other.1@1")
    away = replace(away, status=replace(away.status, state=NodeState.DOWN))
    task, other = waiting(service), a_task("other", service=refused, state=PENDING)
    store = await a_store(away, service, refused, task, other)
    async with scheduling(store):
        await wait_for(store, lambda: all(one.status.err for one in store.view().find(Task)))
        present = store.view().get(Node, "away")
        label = reporting("away", "data=other.1@2").description
        with calls_of(SchedulerState.decide) as decided:
            await store.update(put, replace(present, description=label))
            await wait_for(store, lambda: on(store, task) != "")
    looked = {group for call in decided.of(SchedulerState.decide) for group in call["due"]}
    assert looked == {task.id, "web/1"}
