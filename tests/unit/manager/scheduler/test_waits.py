"""Groups of tasks that wait for services are decided again when that can have changed, and not for other events."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.scheduler.dependencies import REPORTED_S, Waits, awaited
from skep.model.node import Availability, Node, NodeState, SessionOwner
from skep.model.options.dependencies import DEPENDS_ON, is_wait
from skep.model.service import GlobalService, RestartCondition, RestartPolicy, Service, ServiceMode
from skep.model.task import Restart, Task, TaskState
from skep.store.interface import Commit, Transaction, Updated
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.harness.clocks import PausingClock
from tests.support.managers.counted_calls import counting_calls_of_callbacks
from tests.support.managers.visited_objects import CountingStore
from tests.unit.manager.scheduler.test_scheduler_loop import put, scheduling, wait_for

DB_NODES, OTHER_NODES = ("n1", "n2"), ("n3", "n4")
VALUES: Final = (
    "db=service_started",
    "db=service_healthy",
    "db=service_completed_successfully",
    "db=service_healthy+restart",
    "db=service_healthy+optional",
    "job=service_completed_successfully,db=service_started",
    "late=service_started",
)
Happening: TypeAlias = tuple[str, int, int]
happenings = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "report",
                "report",
                "create",
                "retire",
                "delete",
                "register",
                "down",
                "up",
                "drain",
                "scale",
                "late",
                "label",
            ]
        ),
        st.integers(0, 7),
        st.integers(0, 4),
    ),
    min_size=1,
    max_size=8,
)
STATES: Final = (
    TaskState.PREPARING,
    TaskState.STARTING,
    TaskState.RUNNING,
    TaskState.COMPLETE,
    TaskState.FAILED,
)


def depending(name: str, value: str) -> Service:
    service = a_service(name)
    return replace(service, spec=replace(service.spec, labels={DEPENDS_ON: value}))


class Cluster:
    """Waiting services, what they wait for, and the groups that are due."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.waits = Waits(0.0)
        self.now = 0.0
        self.due: dict[str, float] = {}
        self.waiting: dict[str, Task] = {}
        self.looks = 0
        self._watch = store.watch(Service, Task, Node)

    async def start(self, values: Sequence[str]) -> None:
        await self.store.update_each(put, [a_node(id) for id in (*DB_NODES, *OTHER_NODES)])
        run_once = RestartPolicy(condition=RestartCondition.ON_FAILURE)
        await self.store.update_each(
            put,
            [
                a_service("db", is_global=True, restart=run_once),
                replace(
                    depending("job", "db=service_started"),
                    spec=replace(
                        depending("job", "db=service_started").spec,
                        task_template=a_service_spec(restart=run_once).task_template,
                    ),
                ),
                a_service("other"),
                *(depending(f"web{n}", value) for n, value in enumerate(values)),
            ],
        )
        view = self.store.view()
        tasks = [
            a_task(f"db{n}", slot=0, node=id, state=TaskState.RUNNING, service=view.get(Service, "db"))
            for n, id in enumerate(DB_NODES)
        ]
        tasks.append(a_task("job1", node="n3", state=TaskState.PREPARING, service=view.get(Service, "job")))
        tasks += [a_task(f"o{n}", slot=n + 1, node=id, service="other") for n, id in enumerate(OTHER_NODES)]
        for n in range(len(values)):
            task = a_task(f"w{n}", state=TaskState.PENDING, service=view.get(Service, f"web{n}"))
            tasks.append(task)
            self.due[f"w{n}"] = 0.0
        await self.store.update_each(put, tasks)
        self.waiting = {f"w{n}": self.store.view().get(Task, f"w{n}") for n in range(len(values))}
        self._commits = await self._watch.__aenter__()
        self.decide()

    def decide(self) -> None:
        """Look at the groups that are due."""
        found: dict = {}  # type: ignore[type-arg]
        for group in [group for group, at in self.due.items() if at <= self.now]:
            del self.due[group]
            self.looks += 1
            waiting = self.waits.of(group, self.waiting[group], self.store.view(), self.now, found)
            if waiting is None:
                del self.waiting[group]
            elif waiting.until is not None:
                self.due[group] = waiting.until

    async def commit(self, body: Callable[[Transaction], object], passed_s: float = 0.0) -> None:
        self.now += passed_s
        self.decide()
        await self.store.update(body)
        for commit in self._commits.waiting():
            for group, at in self.waits.record(commit, self.now).items():
                self.due[group] = min(at, self.due.get(group, at))
        self.decide()

    def unnoticed(self) -> list[str]:
        """Groups that wait for nothing, and that nothing will have decided again."""
        view, confirmed = self.store.view(), self.waits.confirmed.at
        return [
            group for group, task in self.waiting.items() if awaited(task, view, confirmed, self.now) is None
        ]


def happen(what: str, which: int, variant: int) -> Callable[[Transaction], object]:
    def body(tx: Transaction) -> None:
        nodes = tx.find(Node)
        tasks = [task for task in tx.find(Task) if task.service_id in ("db", "job")]
        node = nodes[which % len(nodes)]
        match what:
            case "report" | "retire" | "delete" if tasks:
                _happen_to(tx, tasks[which % len(tasks)], what, STATES[variant])
            case "create":
                owner = tx.get(Service, ("db", "job")[which % 2])
                new = a_task(node=node.id, slot=which % 2, state=TaskState.PREPARING, service=owner)
                tx.put(replace(new, restart=Restart(failures=1) if variant > 2 else None))
            case "register":
                session = SessionOwner(session_id=f"s{which}{variant}{tx.revision}")  # type: ignore[arg-type]
                tx.put(replace(node, session=session, status=replace(node.status, state=NodeState.READY)))
            case "down" | "up":
                state = NodeState.DOWN if what == "down" else NodeState.READY
                tx.put(replace(node, status=replace(node.status, state=state)))
            case "drain":
                tx.put(replace(node, spec=replace(node.spec, availability=Availability.DRAIN)))
            case "scale":
                job = tx.get(Service, "job")
                mode = replace(job.spec.mode.replicated, replicas=variant)  # type: ignore[type-var]
                tx.put(replace(job, spec=replace(job.spec, mode=replace(job.spec.mode, replicated=mode))))
            case "late" if tx.lookup(Service, "late") is None:
                tx.put(a_service("late", replicas=variant % 2))
            case "label":
                job = tx.get(Service, "job")
                tx.put(
                    replace(
                        job,
                        spec=replace(
                            job.spec,
                            labels={DEPENDS_ON: f"web{which % 2}=service_started"} if variant else {},
                        ),
                    )
                )

    return body


def _happen_to(tx: Transaction, task: Task, what: str, state: TaskState) -> None:
    if what == "delete":
        tx.delete(Task, task.id)
    elif what == "retire":
        tx.put(replace(task, desired_state=TaskState.SHUTDOWN))
    elif state > task.status.state:
        tx.put(replace(task, status=replace(task.status, state=state)))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(VALUES), min_size=2, max_size=3),
    happenings,
    st.lists(st.sampled_from([0.0, 1.0, 11.0, 100.0]), min_size=8, max_size=8),
)
def test_no_group_waits_for_what_has_come(
    values: Sequence[str], some: Sequence[Happening], passed_s: Sequence[float]
) -> None:
    async def run() -> None:
        cluster = Cluster(MemoryStore(SystemClock()))
        await cluster.start(values)
        for happening, seconds in zip(some, passed_s, strict=False):
            await cluster.commit(happen(*happening), seconds)
            assert cluster.unnoticed() == []
        event(f"{len(values) - len(cluster.waiting)} of {len(values)} came")

    asyncio.run(run())


async def a_cluster(*values: str) -> Cluster:
    cluster = Cluster(MemoryStore(SystemClock()))
    await cluster.start(values)
    cluster.looks = 0
    return cluster


@pytest.mark.parametrize(
    "what", [("register", 2, 0), ("down", 3, 0), ("drain", 2, 0), ("late", 0, 1)], ids=lambda what: what[0]
)
async def test_what_has_nothing_to_do_with_it_makes_no_group_due(what: Happening) -> None:
    cluster = await a_cluster("db=service_started", "db=service_healthy")
    await cluster.commit(happen(*what))
    assert cluster.looks == 0


async def test_registrations_of_many_nodes_make_a_group_due_once() -> None:
    cluster = await a_cluster("db=service_started")
    for number in range(6):
        await cluster.commit(happen("register", number % 2, number), 0.1)
    assert cluster.looks == 0
    assert cluster.due == {"w0": pytest.approx(0.1 + REPORTED_S)}
    await cluster.commit(happen("register", 3, 9), REPORTED_S)
    assert (cluster.looks, cluster.waiting) == (1, {})


async def test_a_service_that_was_missing_makes_only_those_due_that_wait_for_it() -> None:
    cluster = await a_cluster("late=service_started", "db=service_started")
    await cluster.commit(happen("late", 0, 0))
    assert (cluster.looks, [*cluster.waiting]) == (1, ["w1"])  # it wants no task: nothing to wait for


async def test_tasks_of_a_service_are_read_once_for_all_that_wait_for_it() -> None:
    cluster = await a_cluster(*["db=service_started"] * 50)
    counts = CountingStore(cluster.store)
    view, waits = counts.view(), Waits(0.0)
    for group, task in cluster.waiting.items():
        assert waits.of(group, task, view, 0.0, {}) is not None  # type: ignore[arg-type]
    once = len(DB_NODES)
    for_each = 10
    assert counts.visited <= once * 2 + 50 * for_each


async def test_no_step_looks_at_more_than_what_one_service_waits_for() -> None:
    tasks_of_one, waiting = 300, 20
    store = MemoryStore(SystemClock())
    mode = ServiceMode(global_=GlobalService())
    for n in range(waiting):
        await store.update(
            put, replace(a_service(f"db{n}"), spec=replace(a_service_spec(f"db{n}"), mode=mode))
        )
    await store.update_each(put, [a_node(f"n{n}", state=NodeState.DOWN) for n in range(tasks_of_one)])
    await store.update_each(put, [depending(f"web{n}", f"db{n}=service_started") for n in range(waiting)])
    view = store.view()
    for n in range(waiting):
        service = view.get(Service, f"db{n}")
        tasks = [a_task(f"{n}-{k}", slot=0, node=f"n{k}", service=service) for k in range(tasks_of_one)]
        await store.update_each(put, tasks)
    pending = [
        a_task(f"w{n}", state=TaskState.PENDING, service=view.get(Service, f"web{n}")) for n in range(waiting)
    ]
    await store.update_each(put, pending)
    with counting_calls_of_callbacks() as counts:
        async with scheduling(store, PausingClock()), store.watch(Task) as watch:
            async for _ in watch:
                if all(store.view().get(Task, one.id).status.err for one in pending):
                    break
    assert {store.view().get(Task, one.id).status.err[:10] for one in pending} == {"waits for "}
    assert max(counts) < 20 * tasks_of_one


async def test_a_task_that_has_not_started_makes_nothing_due() -> None:
    cluster = await a_cluster("db=service_started")
    task = cluster.store.view().get(Task, "db0")
    pending, preparing = (
        replace(task, status=replace(task.status, state=state))
        for state in (TaskState.PENDING, TaskState.PREPARING)
    )
    assert cluster.waits.record(Commit(1, (Updated(pending, preparing),)), 0.0) == {}
    assert cluster.waits.record(Commit(1, (Updated(preparing, task),)), 0.0) == {"w0": 0.0}


@pytest.mark.parametrize("end", ["failed", "stopped", "lost"])
async def test_a_chain_of_services_names_the_one_at_its_end_that_has_failed(end: str) -> None:
    """It has also failed if it was stopped with its node and nothing replaces it."""
    store = MemoryStore(SystemClock())
    once = RestartPolicy(condition=RestartCondition.NONE)
    first = a_service("first", restart=once)
    second = depending("second", "first=service_completed_successfully")
    third, fourth = depending("third", "second=service_started"), depending("fourth", "third=service_healthy")
    optional = depending("optional", "second=service_started+optional")
    running = a_task("f1", node="n1", state=TaskState.RUNNING, service=first)
    waiting = [
        a_task(service.id, state=TaskState.PENDING, service=service)
        for service in (fourth, third, second, optional)
    ]
    await store.update_each(put, [a_node("n1"), first, second, third, fourth, optional, running, *waiting])

    def reasons() -> dict[str, str]:
        return {
            one.id: one.status.err for one in store.view().find(Task) if one.id != "f1" and one.status.err
        }

    async with scheduling(store, PausingClock()):
        await wait_for(store, lambda: len(reasons()) == 4)
        assert all(map(is_wait, reasons().values()))
        state = {"failed": TaskState.FAILED, "stopped": TaskState.SHUTDOWN}.get(end, TaskState.RUNNING)
        if end == "lost":
            await store.update(put, a_node("n1", state=NodeState.DOWN))
            await store.update(put, a_node("n2"))
        ended = replace(running.status, state=state)
        await store.update(put, replace(running, status=ended, desired_state=TaskState.SHUTDOWN))
        await wait_for(store, lambda: not any(map(is_wait, reasons().values())))
        free = "n2" if end == "lost" else "n1"
        await wait_for(store, lambda: store.view().get(Task, "optional").node_id == free)
    assert reasons() == {
        "second": "waits for first to complete, which has failed",
        "third": "waits for second to be started, which waits for first to complete, which has failed",
        "fourth": "waits for third to be healthy, which waits for first to complete, which has failed",
    }
