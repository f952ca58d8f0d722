"""The scheduler's loop where room is short: the order of decisions, and tasks that leave for others."""

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.scheduler.state import BATCH
from skep.model.node import Availability, Node
from skep.model.options.affinity import ANTI_AFFINITY
from skep.model.options.labels import PREEMPTION, PRIORITY
from skep.model.service import Resources, Service, UpdateConfig, UpdateOrder
from skep.model.swarm import DEFAULT_SWARM_SPEC, Swarm
from skep.model.task import Task, TaskState
from skep.model.values.meta import Version
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task
from tests.unit.manager.scheduler.test_full_disks import full
from tests.unit.manager.scheduler.test_returning import a_stateful_service, past
from tests.unit.manager.scheduler.test_scheduler_loop import put, scheduling, wait_for

MIB = 1 << 20
PENDING, SHUTDOWN = TaskState.PENDING, TaskState.SHUTDOWN


def of_priority(priority: int, name: str, memory: int = 1) -> Service:
    service = a_service(name, reserve=Resources(memory_bytes=memory * MIB))
    labels = {PRIORITY: str(priority)} if priority else {}
    return replace(service, spec=replace(service.spec, labels=labels))


def waiting(service: Service, *slots: int) -> list[Task]:
    return [a_task(f"{service.id}{slot}", service=service, slot=slot, state=PENDING) for slot in slots]


def on(node: str, service: Service, *slots: int) -> list[Task]:
    return [a_task(f"{service.id}{slot}", service=service, slot=slot, node=node) for slot in slots]


def a_cluster(preemption: bool) -> Swarm:
    labels = {PREEMPTION: "true"} if preemption else {}
    return Swarm(id="c", spec=replace(DEFAULT_SWARM_SPEC, labels=labels))


async def a_store(*objects: object, nodes: int = 1, memory: int = 2, preemption: bool = True) -> MemoryStore:
    store = MemoryStore(SystemClock())
    has = Resources(memory_bytes=memory * MIB)
    made = [a_node(f"n{number}", has=has) for number in range(1, nodes + 1)]
    await store.update_each(put, [a_cluster(preemption), *made])
    await store.update_each(put, objects)
    return store


def task_of(store: MemoryStore, id: str) -> Task:
    return store.view().get(Task, id)


def placed(store: MemoryStore) -> set[str]:
    return {task.id for task in store.view().find(Task) if task.node_id and not task.status.state.is_terminal}


def leaving(store: MemoryStore) -> dict[str, str]:
    """The preempted tasks, and for which each of them leaves."""
    return {
        task.id: task.preemption.task_id for task in store.view().find(Task) if task.preemption is not None
    }


def is_refused(store: MemoryStore, *ids: str) -> bool:
    return all(task_of(store, id).status.err for id in ids)


async def end(store: MemoryStore, *ids: str) -> None:
    """The orchestrator retires the tasks, and their nodes report their end."""

    def ended(tx: Transaction, id: str) -> None:
        task = tx.get(Task, id)
        tx.put(replace(task, desired_state=SHUTDOWN, status=replace(task.status, state=SHUTDOWN)))

    await store.update_each(ended, ids)


async def test_where_room_is_short_tasks_of_higher_priority_get_it() -> None:
    low, usual, high = of_priority(-1, "low"), of_priority(0, "usual"), of_priority(1, "high")
    tasks = [*waiting(low, 1, 2, 3), *waiting(usual, 1, 2, 3), *waiting(high, 1, 2, 3)]
    store = await a_store(low, usual, high, memory=4, preemption=False)
    await store.update_each(put, tasks)
    async with scheduling(store):
        await wait_for(store, lambda: is_refused(store, "low1", "low2", "low3"))
        assert placed(store) >= {"high1", "high2", "high3"}
        assert len(placed(store)) == 4


async def test_a_large_service_of_higher_priority_is_placed_whole_before_others_get_anything() -> None:
    low, high = of_priority(-1, "low"), of_priority(1, "high")
    slots = range(1, BATCH + 51)
    singles = [of_priority(0, f"s{number}") for number in range(60)]
    store = await a_store(low, high, *singles, memory=len(slots), preemption=False)
    tasks = [*waiting(low, 1), *(task for one in singles for task in waiting(one, 1)), *waiting(high, *slots)]
    await store.update_each(put, tasks)
    async with scheduling(store):
        await wait_for(store, lambda: is_refused(store, "low1", *(f"s{number}1" for number in range(60))))
    assert placed(store) == {f"high{slot}" for slot in slots}


async def test_a_task_leaves_for_one_of_higher_priority_and_nothing_lower_takes_its_room() -> None:
    low, usual, high = of_priority(-1, "low"), of_priority(0, "usual"), of_priority(1, "high", memory=2)
    store = await a_store(low, usual, high, *on("n1", low, 1, 2))
    async with scheduling(store):
        await store.update_each(put, waiting(high, 1))
        await wait_for(store, lambda: len(leaving(store)) == 2 and is_refused(store, "high1"))
        assert leaving(store) == {"low1": "high1", "low2": "high1"}
        assert task_of(store, "low1").preemption.words == "preempted by a task of high, priority 1"
        assert task_of(store, "high1").status.err.endswith("; preempting tasks of lower priority on n1")
        await store.update_each(put, [*waiting(low, 3), *waiting(usual, 4)])
        await wait_for(store, lambda: is_refused(store, "low3", "usual4"))
        await end(store, "low1")
        await store.update_each(put, waiting(usual, 5))  # decided after what the end of low1 has queued
        await wait_for(store, lambda: is_refused(store, "usual5"))
        assert placed(store) == {"low2"}
        await end(store, "low2")
        await wait_for(store, lambda: bool(task_of(store, "high1").node_id))
        assert placed(store) == {"high1"}
        assert set(leaving(store)) == {"low1", "low2"}


async def test_without_the_clusters_leave_no_task_is_stopped_and_with_it_at_once() -> None:
    low, high = of_priority(0, "low"), of_priority(1, "high")
    store = await a_store(low, high, *on("n1", low, 1, 2), preemption=False)
    async with scheduling(store):
        await store.update_each(put, waiting(high, 1))
        await wait_for(store, lambda: is_refused(store, "high1"))
        assert leaving(store) == {}
        await store.update(put, a_cluster(preemption=True))
        await wait_for(store, lambda: bool(leaving(store)))
        assert leaving(store) == {"low2": "high1"}


async def test_a_raised_priority_counts_at_once() -> None:
    low, high = of_priority(0, "low"), of_priority(0, "high")
    store = await a_store(low, high, *on("n1", low, 1, 2))
    async with scheduling(store):
        await store.update_each(put, waiting(high, 1))
        await wait_for(store, lambda: is_refused(store, "high1"))
        assert leaving(store) == {}
        present = store.view().get(Service, "high")
        await store.update(put, replace(present, spec=replace(present.spec, labels={PRIORITY: "1"})))
        await wait_for(store, lambda: leaving(store) == {"low2": "high1"})


async def test_nothing_leaves_while_there_is_room_or_will_be() -> None:
    low, high = of_priority(0, "low"), of_priority(1, "high")
    stopping = replace(on("n1", low, 2)[0], desired_state=SHUTDOWN)
    store = await a_store(low, high, *on("n1", low, 1), stopping, *on("n2", low, 3), nodes=2)
    async with scheduling(store):
        await store.update_each(put, waiting(high, 1, 2))
        await wait_for(store, lambda: is_refused(store, "high2") and bool(task_of(store, "high1").node_id))
        assert leaving(store) == {}
        assert task_of(store, "high2").status.err.endswith("preempting tasks of lower priority on n1")
        await end(store, "low2")
        await wait_for(store, lambda: bool(task_of(store, "high2").node_id))


async def test_a_new_leader_chooses_no_further_victims() -> None:
    low, high = of_priority(0, "low"), of_priority(1, "high")
    tasks = [*on("n1", low, 1, 2), *on("n2", low, 3, 4)]
    store = await a_store(low, high, *tasks, nodes=2)
    async with scheduling(store):
        await store.update_each(put, waiting(high, 1))
        await wait_for(store, lambda: bool(leaving(store)))
    before = leaving(store)
    async with scheduling(store):
        await store.update_each(put, waiting(high, 2))  # decided with the first one
        await wait_for(store, lambda: len(leaving(store)) == 2)
    assert before.items() < leaving(store).items()


async def test_when_the_waiting_task_goes_others_get_its_room() -> None:
    low, usual, high = of_priority(-1, "low"), of_priority(0, "usual"), of_priority(1, "high", memory=2)
    store = await a_store(low, usual, high, *on("n1", low, 1))
    async with scheduling(store):
        await store.update_each(put, waiting(high, 1))
        await wait_for(store, lambda: bool(leaving(store)))
        await store.update_each(put, waiting(usual, 1))
        await wait_for(store, lambda: is_refused(store, "usual1"))
        await end(store, "high1")  # its service is removed
        await wait_for(store, lambda: bool(task_of(store, "usual1").node_id))


async def test_a_claim_moves_when_its_node_can_run_the_task_no_more() -> None:
    low, high = of_priority(0, "low", memory=2), of_priority(1, "high", memory=2)
    store = await a_store(low, high, *on("n1", low, 1), *on("n2", low, 2), nodes=2)
    async with scheduling(store):
        await store.update_each(put, waiting(high, 1))
        await wait_for(store, lambda: bool(leaving(store)))
        (victim,) = leaving(store)
        node = store.view().get(Node, task_of(store, victim).node_id)
        await store.update(put, replace(node, spec=replace(node.spec, availability=Availability.PAUSE)))
        await wait_for(store, lambda: len(leaving(store)) == 2)


async def test_two_services_choose_no_task_twice() -> None:
    low, high, higher = of_priority(0, "low"), of_priority(1, "high"), of_priority(2, "higher")
    store = await a_store(low, high, higher, *on("n1", low, 1, 2, 3), memory=3)
    await store.update_each(put, [*waiting(high, 1), *waiting(higher, 1)])
    async with scheduling(store):
        await wait_for(store, lambda: len(leaving(store)) == 2)
        assert set(leaving(store).values()) == {"high1", "higher1"}


async def test_room_that_is_claimed_goes_to_a_task_of_a_still_higher_priority() -> None:
    low, high, higher = of_priority(0, "low"), of_priority(1, "high"), of_priority(2, "higher")
    store = await a_store(low, high, higher, *on("n1", low, 1), memory=1)
    async with scheduling(store):
        await store.update_each(put, waiting(high, 1))
        await wait_for(store, lambda: bool(leaving(store)))
        await store.update_each(put, waiting(higher, 1))
        await wait_for(store, lambda: "preempting tasks" in task_of(store, "higher1").status.err)
        await end(store, "low1")
        await wait_for(store, lambda: bool(placed(store)))
        assert placed(store) == {"higher1"}


async def test_the_room_of_a_task_that_failed_is_kept_for_its_successor() -> None:
    low, high = of_priority(0, "low"), of_priority(1, "high")
    store = await a_store(low, high, *on("n1", high, 1, 2), preemption=False)

    def failed(tx: Transaction) -> None:
        task = tx.get(Task, "high1")
        tx.put(replace(task, status=replace(task.status, state=TaskState.FAILED)))

    async with scheduling(store):
        await store.update_each(put, waiting(low, 1))
        await wait_for(store, lambda: is_refused(store, "low1"))
        await store.update(failed)
        await store.update_each(put, waiting(high, 3))
        await wait_for(store, lambda: bool(task_of(store, "high3").node_id))
        assert placed(store) == {"high2", "high3"}


async def test_the_place_of_a_task_that_is_replaced_is_kept_for_its_successor() -> None:
    """Nothing is near it once it is to stop, but its successor waits for an address first."""
    low, high = of_priority(0, "low"), of_priority(1, "high")
    high = replace(high, spec=replace(high.spec, labels={**high.spec.labels, ANTI_AFFINITY: "low"}))
    store = await a_store(low, high, *on("n1", high, 1), memory=4, preemption=False)
    successor = a_task("high2", service=high, slot=1, state=TaskState.NEW)

    def replaced(tx: Transaction) -> None:
        tx.put(replace(tx.get(Task, "high1"), desired_state=SHUTDOWN))
        tx.put(successor)

    async with scheduling(store):
        await store.update_each(put, waiting(low, 1))
        await wait_for(store, lambda: is_refused(store, "low1"))
        await store.update(replaced)
        await store.update_each(put, [replace(successor, status=replace(successor.status, state=PENDING))])
        await wait_for(store, lambda: bool(task_of(store, "high2").node_id))
        assert not task_of(store, "low1").node_id


async def test_without_a_successor_the_room_of_a_task_that_failed_goes_to_others() -> None:
    low, high = of_priority(0, "low"), of_priority(1, "high")
    store = await a_store(low, high, *on("n1", high, 1, 2), preemption=False)

    def failed(tx: Transaction) -> None:
        task = tx.get(Task, "high1")
        tx.put(replace(task, status=replace(task.status, state=TaskState.FAILED)))

    async with scheduling(store):
        await store.update_each(put, waiting(low, 1))
        await wait_for(store, lambda: is_refused(store, "low1"))
        await store.update(failed)
        await wait_for(store, lambda: bool(task_of(store, "low1").node_id))


async def test_others_stop_for_a_refused_task_once_it_starts_first() -> None:
    """While it is prepared only, the update may stop the old task of its slot for it."""
    important, other = of_priority(10, "important"), of_priority(-10, "other")
    config = UpdateConfig(order=UpdateOrder.START_FIRST)
    important = replace(important, spec=replace(important.spec, update_config=config))
    old = on("n1", important, 1)
    prepared = a_task("new", service=important, slot=1, state=PENDING, desired=TaskState.READY)
    new = replace(prepared, spec_version=Version(index=9))
    store = await a_store(important, other, *old, *on("n1", other, 1), new)
    async with scheduling(store):
        await wait_for(store, lambda: is_refused(store, "new"))
        assert not leaving(store)
        await store.update(put, replace(task_of(store, "new"), desired_state=TaskState.RUNNING))
        await wait_for(store, lambda: leaving(store) == {"other1": "new"})


async def test_others_stop_for_a_task_that_returns_to_its_data_on_a_full_disk() -> None:
    important = a_stateful_service("required", reserve=Resources(memory_bytes=2 * MIB))
    labels = {**important.spec.labels, PRIORITY: "10"}
    important = replace(important, spec=replace(important.spec, labels=labels))
    other = of_priority(-10, "other")
    store = await a_store(full("n1", has=Resources(memory_bytes=2 * MIB)), nodes=0)
    await store.update_each(put, [important, other, *on("n1", other, 1), past(important, "n1")])
    await store.update(put, a_task("new", service=important, state=PENDING))
    async with scheduling(store):
        await wait_for(store, lambda: leaving(store) == {"other1": "new"})
