"""Which tasks are stopped to make room for one of a higher priority."""

import asyncio
from collections.abc import Iterable, Sequence
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.aio.time_slices import SlicedWork, run_at_once
from skep.manager.scheduler.decision_writer import DecisionWriter
from skep.manager.scheduler.groups import group_of
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.nodes.filters import filters_for
from skep.manager.scheduler.nodes.requirements import Requirements, requirements_of
from skep.manager.scheduler.preemption.preemption import (
    AT_ONCE,
    Candidate,
    Nomination,
    Occupants,
    Preempt,
    candidate_on,
    frees_own_resources,
    making_nominations,
    reserve_candidate,
)
from skep.manager.scheduler.preemption.preemptor import BUDGET_S, STOPPING_S, Preemptor
from skep.manager.scheduler.preemption.priorities import Priorities
from skep.model.container import ContainerSpec, Mount
from skep.model.needs import holds_of, host_ports
from skep.model.node import Node, NodeState
from skep.model.options.freezes import ChangeFreeze, MaintenanceWindow
from skep.model.options.labels import MIN_AVAILABLE, PREEMPTION, PRIORITY
from skep.model.service import (
    DiscreteResource,
    GenericResource,
    NamedResource,
    PortConfig,
    PublishMode,
    Resources,
    Service,
)
from skep.model.swarm import Swarm, SwarmSpec
from skep.model.task import Preemption, Task, TaskState
from skep.model.values.ids import ClusterId, NodeId, TaskId, VolumeId
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import ZERO_TIME, timestamp
from skep.store.interface import Object, View
from skep.store.keys import object_key
from skep.store.memory import MemoryStore
from skep.store.state import State
from skep.store.tables import KeyChange
from skep.store.transactions.proposal import Unchanged
from skep.store.transactions.transaction import LocalTransaction
from tests.support.builders import a_cluster_volume, a_node, a_service, a_task, with_disks
from tests.support.managers.counted_calls import most_calls_between_pauses
from tests.unit.manager.scheduler.test_scheduler_loop import put

MIB = 1 << 20
ROOM = Resources(nano_cpus=8_000_000_000, memory_bytes=8 * MIB)


def of_priority(priority: int, name: str, **requested: object) -> Service:
    service = a_service(name, **requested)
    return replace(service, spec=replace(service.spec, labels={PRIORITY: str(priority)}))


def reserving(memory: int = 0, cpus: int = 0, generic: tuple[GenericResource, ...] = ()) -> Resources:
    return Resources(memory_bytes=memory * MIB, nano_cpus=cpus * 1_000_000_000, generic_resources=generic)


async def view_of(tasks: Iterable[Object]) -> View:
    store = MemoryStore(SystemClock())
    await store.update_each(put, list(tasks))
    return store.view()


class World:
    """Nodes and tasks, as the scheduler sees them."""

    def __init__(self, nodes: Sequence[Node], services: Sequence[Service], tasks: Sequence[Task]) -> None:
        self.tasks = {task.id: task for task in tasks}
        self.services = {service.id: service for service in services}
        self.view = asyncio.run(view_of(self.tasks.values()))
        self.accounting = Accounting()
        self.priorities = Priorities()
        for service in self.services.values():
            self.priorities.set(service)
        for node in nodes:
            self.accounting.set_node(node)
        for task in self.tasks.values():
            owner = self.services.get(task.service_id)
            self.accounting.reserve(
                task.id, task.node_id, holds_of(task, host_ports(owner.spec if owner else None))
            )

    def occupants(self, service: Service) -> Occupants:
        return Occupants(lambda: self.view, self.priorities, self.priorities.of(service.id))

    def candidate(self, service: Service, node: str = "n1") -> Candidate | None:
        return candidate_on(NodeId(node), wanted(service), self.accounting, self.occupants(service))

    def victims(self, service: Service, node: str = "n1") -> set[str] | None:
        candidate = self.candidate(service, node)
        return None if candidate is None else set(candidate.victims)

    def nominations(self, service: Service, count: int = 1, victims_max: int = AT_ONCE) -> list[Nomination]:
        return run_at_once(self.nominating(service, count, victims_max))

    def nominating(
        self, service: Service, count: int, victims_max: int = AT_ONCE
    ) -> SlicedWork[list[Nomination]]:
        tasks = [a_task(slot=n, service=service, state=TaskState.PENDING) for n in range(1, count + 1)]
        requirements = wanted(service)
        return making_nominations(
            tasks,
            requirements,
            list(self.accounting.accounts),
            self.accounting,
            self.occupants(service),
            claim=lambda one: reserve_candidate(self.accounting, one.task.id, one.candidate, requirements),
            victims_max=victims_max,
        )


def wanted(service: Service) -> Requirements:
    return requirements_of(a_task(service=service, state=TaskState.PENDING), service.spec)


def chosen(nominations: Sequence[Nomination]) -> list[tuple[str, set[str]]]:
    return [(one.candidate.node_id, set(one.candidate.victims)) for one in nominations]


IMPORTANT = of_priority(10, "important", reserve=reserving(4))
TRIVIAL = of_priority(-5, "trivial", reserve=reserving(2))
USUAL = a_service("usual", reserve=reserving(2))


def on_n1(
    service: Service, *slots: int, state: TaskState = TaskState.RUNNING, node: str = "n1"
) -> list[Task]:
    return [
        a_task(f"{service.id}{slot}", service=service, slot=slot, node=node, state=state) for slot in slots
    ]


def test_tasks_of_the_lowest_priority_go_and_no_more_of_them_than_needed() -> None:
    tasks = [*on_n1(USUAL, 1), *on_n1(TRIVIAL, 1, 2, 3)]
    world = World([a_node(has=ROOM)], [IMPORTANT, TRIVIAL, USUAL], tasks)
    assert world.victims(IMPORTANT) == {"trivial2", "trivial3"}  # the youngest, of equals


def test_those_of_a_higher_priority_go_where_the_others_are_not_enough() -> None:
    tasks = [*on_n1(USUAL, 1, 2, 3), *on_n1(TRIVIAL, 1)]
    world = World([a_node(has=ROOM)], [IMPORTANT, TRIVIAL, USUAL], tasks)
    assert world.victims(IMPORTANT) == {"usual3", "trivial1"}


def test_a_task_that_would_go_for_nothing_stays() -> None:
    small = of_priority(-9, "small", reserve=reserving(1))
    large = of_priority(-5, "large", reserve=reserving(4))
    tasks = [*on_n1(small, 1), *on_n1(large, 1), *on_n1(USUAL, 1)]
    world = World([a_node(has=ROOM)], [IMPORTANT, small, large, USUAL], tasks)
    assert world.victims(IMPORTANT) == {"large1"}


def test_nothing_of_the_same_or_a_higher_priority_goes() -> None:
    same = of_priority(10, "same", reserve=reserving(2))
    world = World([a_node(has=ROOM)], [IMPORTANT, same], on_n1(same, 1, 2, 3, 4))
    assert world.victims(IMPORTANT) is None


def test_the_service_with_other_running_tasks_gives_them_first() -> None:
    single = of_priority(-5, "single", reserve=reserving(2))
    little = of_priority(10, "little", reserve=reserving(4))
    nodes = [a_node(has=ROOM), a_node("n2", has=ROOM)]
    tasks = [*on_n1(USUAL, 1), *on_n1(TRIVIAL, 1), *on_n1(single, 1)]
    for state, victim in ((TaskState.RUNNING, "trivial1"), (TaskState.PREPARING, "single1")):
        elsewhere = on_n1(TRIVIAL, 2, node="n2", state=state)
        world = World(nodes, [little, TRIVIAL, single, USUAL], [*tasks, *elsewhere])
        assert world.victims(little) == {victim}, "the youngest, where neither has others"


def keeping(minimum: str) -> tuple[World, list[Task]]:
    """Return four tasks of a service on one node, and the world in which their service keeps ``minimum`` of them."""
    service = of_priority(-5, "keeps", reserve=reserving(2), replicas=4)
    labels = {**service.spec.labels, MIN_AVAILABLE: minimum}
    service = replace(service, spec=replace(service.spec, labels=labels))
    node, tasks = a_node(has=ROOM), on_n1(service, 1, 2, 3, 4)
    world = World([node], [IMPORTANT, service], tasks)
    world.view = asyncio.run(view_of([*tasks, service, node]))
    return world, tasks


def test_no_more_tasks_go_than_the_budget_of_their_service_spares() -> None:
    assert keeping("2")[0].victims(IMPORTANT) == {"keeps3", "keeps4"}
    assert keeping("3")[0].victims(IMPORTANT) is None, "one would not be enough"


def test_a_task_that_a_budget_refused_is_tried_again_later() -> None:
    world, _ = keeping("100%")
    preemptor = Preemptor(world.accounting, lambda: world.view, lambda: 7.0)
    for service in world.services.values():
        preemptor.priorities.set(service)
    pending = a_task("important1", service=IMPORTANT, state=TaskState.PENDING)
    nominating = preemptor.nominating(group_of(pending), [pending], wanted(IMPORTANT), [NodeId("n1")])
    assert run_at_once(nominating) == []
    assert preemptor.more_at() == 7.0 + BUDGET_S


def test_what_leaves_anyway_is_waited_for() -> None:
    leaving = on_n1(TRIVIAL, 1, 2)
    retired = replace(leaving[0], desired_state=TaskState.SHUTDOWN)
    preempted = replace(leaving[1], preemption=Preemption(task_id=TaskId("other"), service="x", priority=1))
    world = World([a_node(has=ROOM)], [IMPORTANT, TRIVIAL], [retired, preempted, *on_n1(TRIVIAL, 3, 4)])
    assert world.victims(IMPORTANT) == set()


def test_host_ports_and_generic_resources_are_made_free() -> None:
    port = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
    gpu = GenericResource(discrete_resource_spec=DiscreteResource(kind="gpu", value=2))
    named = tuple(GenericResource(named_resource_spec=NamedResource(kind="gpu", value=one)) for one in "ab")
    proxy = of_priority(-5, "proxy", ports=(port,))
    learner = of_priority(-5, "learner", reserve=reserving(generic=(gpu,)))
    learning = [replace(one, generic_resources=named) for one in on_n1(learner, 1)]
    node = a_node(has=replace(ROOM, generic_resources=named))
    world = World([node], [proxy, learner, TRIVIAL], [*on_n1(proxy, 1), *learning, *on_n1(TRIVIAL, 1)])
    assert world.victims(of_priority(1, "edge", ports=(port,))) == {"proxy1"}
    candidate = world.candidate(of_priority(1, "model", reserve=reserving(generic=(gpu,))))
    assert candidate is not None
    assert set(candidate.victims) == {"learner1"}
    assert set(candidate.generic) == set(named)


def test_no_room_is_made_on_a_node_that_cannot_run_the_task() -> None:
    world = World([a_node(has=ROOM, state=NodeState.DOWN)], [IMPORTANT, TRIVIAL], on_n1(TRIVIAL, 1, 2, 3, 4))
    assert world.victims(IMPORTANT) is None
    tied = of_priority(10, "tied", reserve=reserving(4), constraints=("node.labels.zone==north",))
    world = World([a_node(has=ROOM)], [tied, TRIVIAL], on_n1(TRIVIAL, 1, 2, 3, 4))
    assert world.victims(tied) is None


def test_the_node_is_taken_whose_victims_are_the_least_important() -> None:
    nodes = [a_node(f"n{number}", has=ROOM) for number in (1, 2, 3)]
    tasks = [
        *on_n1(USUAL, 1, 2, 3, 4),
        *on_n1(TRIVIAL, 1, 2, 3, 4, node="n2"),
        *on_n1(USUAL, 5, 6, 7, node="n3"),
        *on_n1(TRIVIAL, 5, node="n3"),
    ]
    world = World(nodes, [IMPORTANT, TRIVIAL, USUAL], tasks)
    assert chosen(world.nominations(IMPORTANT)) == [("n2", {"trivial3", "trivial4"})]


def test_every_task_gets_room_of_its_own() -> None:
    nodes = [a_node(f"n{number}", has=ROOM) for number in (1, 2)]
    tasks = [*on_n1(TRIVIAL, 1, 2, 3, 4), *on_n1(TRIVIAL, 5, 6, 7, 8, node="n2")]
    world = World(nodes, [IMPORTANT, TRIVIAL], tasks)
    nominations = chosen(world.nominations(IMPORTANT, count=5))
    assert [node for node, _ in nominations] == ["n1", "n2", "n1", "n2"], "spread, and no more than fit"
    assert set().union(*(victims for _, victims in nominations)) == {task.id for task in tasks}
    assert sum(len(victims) for _, victims in nominations) == len(tasks)


def test_between_two_pauses_some_nodes_are_looked_at_however_many_tasks_get_room() -> None:
    low, high = of_priority(0, "low", reserve=reserving(8)), of_priority(1, "high", reserve=reserving(8))

    def most_calls(count: int) -> int:
        nodes = [a_node(f"n{n}", has=ROOM) for n in range(count)]
        tasks = [a_task(slot=n + 1, service=low, node=f"n{n}") for n in range(count)]
        leaving = [replace(one, desired_state=TaskState.SHUTDOWN) for one in tasks]
        world = World(nodes, [low, high], leaving)
        assert len(world.nominations(high, count)) == count
        return most_calls_between_pauses(World(nodes, [low, high], leaving).nominating(high, count))

    assert most_calls(200) < 2 * most_calls(20)


def test_only_so_many_are_stopped_at_a_time() -> None:
    tasks = on_n1(TRIVIAL, *range(1, 5))
    world = World([a_node(has=ROOM)], [IMPORTANT, TRIVIAL], tasks)
    assert len(world.nominations(IMPORTANT, count=2, victims_max=3)) == 1
    assert world.nominations(IMPORTANT, victims_max=1) == []


def test_nothing_is_preempted_in_a_frozen_stack_or_cluster() -> None:
    shop = replace(TRIVIAL, spec=replace(TRIVIAL.spec, labels={**TRIVIAL.spec.labels, STACK_LABEL: "shop"}))
    world = World([a_node(has=ROOM)], [IMPORTANT, shop], on_n1(shop, *range(1, 5)))
    preempts = Swarm(id=ClusterId("c"), spec=SwarmSpec(labels={PREEMPTION: "true"}))
    freeze = ChangeFreeze(until=timestamp(4 * 10**18))

    def victims(**freezes: ChangeFreeze) -> set[str] | None:
        frozen = replace(preempts, change_freezes=freezes)
        world.view = asyncio.run(view_of([*world.tasks.values(), shop, frozen]))
        return world.victims(IMPORTANT)

    assert victims()
    assert victims(blog=freeze)
    assert victims(shop=freeze) is None
    closed = MaintenanceWindow(closed_until=timestamp(4 * 10**18))
    for windows, is_held in (
        ({"shop": closed}, True),
        ({"blog": closed, "shop": MaintenanceWindow()}, False),
    ):
        narrowed = replace(preempts, stack_windows=windows)
        world.view = asyncio.run(view_of([*world.tasks.values(), shop, narrowed]))
        assert (world.victims(IMPORTANT) is None) is is_held
    preemptor = Preemptor(world.accounting, lambda: world.view, lambda: 0.0)
    for service in (IMPORTANT, shop):
        preemptor.priorities.set(service)
    pending = a_task(service=IMPORTANT, state=TaskState.PENDING)
    preemptor.set_cluster(preempts)
    assert preemptor.may_preempt(pending)
    assert preemptor.set_cluster(replace(preempts, change_freezes={"": freeze})), (
        "the groups are decided again"
    )
    assert not preemptor.may_preempt(pending)


def test_victims_with_an_hour_of_grace_hold_up_no_preemption_elsewhere() -> None:
    slow = on_n1(TRIVIAL, *range(1, AT_ONCE + 1))
    other = a_task("other", slot=99, node="n2", service=TRIVIAL)
    candidate = Resources(memory_bytes=4 * MIB, nano_cpus=10**9)
    world = World([a_node("n1", has=ROOM), a_node("n2", has=candidate)], [IMPORTANT, TRIVIAL], [*slow, other])
    now = 0.0
    preemptor = Preemptor(world.accounting, lambda: world.view, lambda: now)
    preemptor.set_cluster(Swarm(id=ClusterId("c"), spec=SwarmSpec(labels={PREEMPTION: "true"})))
    for service in (IMPORTANT, TRIVIAL):
        preemptor.priorities.set(service)
    for victim in slow:
        preemptor.add_victim(victim.id)
    pending = a_task(service=IMPORTANT, state=TaskState.PENDING)

    def nominations() -> list[Nomination]:
        nodes = [NodeId("n2")]
        return run_at_once(preemptor.nominating(group_of(pending), [pending], wanted(IMPORTANT), nodes))

    assert nominations() == []
    assert preemptor.more_at() == STOPPING_S
    now = STOPPING_S
    assert preemptor.more_at() is None
    assert [one.candidate.victims for one in nominations()] == [("other",)]


def test_a_task_that_needs_more_than_that_gets_them_when_no_other_is_stopped() -> None:
    tiny = of_priority(-5, "tiny", reserve=reserving(1))
    count = AT_ONCE + 5
    node = a_node(has=Resources(memory_bytes=count * MIB))
    whole = of_priority(10, "whole", reserve=reserving(count))
    world = World([node], [whole, tiny], on_n1(tiny, *range(1, count + 1)))
    assert world.nominations(whole, victims_max=AT_ONCE - 1) == []
    (only,) = world.nominations(whole)
    assert len(only.candidate.victims) == count


def test_an_update_that_stops_a_task_of_the_slot_first_needs_no_other_victim() -> None:
    old = replace(a_task(service=IMPORTANT, node="n1"), desired_state=TaskState.SHUTDOWN)
    new = a_task(service=IMPORTANT, state=TaskState.PENDING)
    world = World([a_node(has=ROOM)], [IMPORTANT], [old])
    assert frees_own_resources(new, world.accounting, world.view)
    world = World([a_node(has=ROOM, state=NodeState.DOWN)], [IMPORTANT], [old])
    assert not frees_own_resources(new, world.accounting, world.view), "its node cannot stop it"


def test_a_start_first_update_preempts_others_since_it_keeps_the_old_task() -> None:
    """Both waited for each other: preemption for the old task's end, and the update for the new task's start."""
    old = a_task(service=IMPORTANT, node="n1")
    new = replace(a_task(service=IMPORTANT, state=TaskState.PENDING), id=TaskId("new"))
    world = World([a_node(has=ROOM)], [IMPORTANT], [old])
    assert not frees_own_resources(new, world.accounting, world.view)
    prepared = replace(new, desired_state=TaskState.READY)
    assert frees_own_resources(prepared, world.accounting, world.view), (
        "stop-first retires the old task for it"
    )


def test_nothing_stops_for_a_task_that_is_removed_at_the_same_moment() -> None:
    """Its removal fails the commit, and the decision is made again."""
    task = replace(a_task(service=IMPORTANT, state=TaskState.PENDING), spec_version=None)
    victim = replace(a_task(service=TRIVIAL, node="n1"), spec_version=None)
    state = State()
    tx = LocalTransaction(state, 0)
    for one in (task, victim):
        tx.put(one)
    state.apply(1, [KeyChange(key, value, 1, 1) for key, value in tx.proposal().puts])
    tx = LocalTransaction(state, 0)
    preempt = Preempt(task, (victim.id,), Preemption(task_id=task.id))
    DecisionWriter(ZERO_TIME).write(tx, preempt)
    assert Unchanged(object_key("task", task.id), 1) in tx.proposal().compares


def test_room_is_made_for_one_task_only_if_there_is_one_volume() -> None:
    """The other would wait for the volume, and its victims would have stopped for nothing."""
    mount = Mount(type="cluster", source="orders", target="/d")
    container = ContainerSpec(image="db", mounts=(mount,))
    template = replace(IMPORTANT.spec.task_template, container_spec=container)
    important = replace(IMPORTANT, spec=replace(IMPORTANT.spec, task_template=template))
    world = World([with_disks(a_node(has=ROOM))], [important, TRIVIAL], on_n1(TRIVIAL, *range(1, 5)))
    world.accounting.update_volume(VolumeId("id-orders"), a_cluster_volume("orders"))
    assert len(world.nominations(important, count=2)) == 1


# -- for all clusters ------------------------------------------------------------------------------------------------

PORT = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
GPU = GenericResource(discrete_resource_spec=DiscreteResource(kind="gpu", value=1))


@st.composite
def services(draw: st.DrawFn, name: str) -> Service:
    generic = draw(st.sampled_from([(), (), (GPU,)]))
    ports = draw(st.sampled_from([(), (), (PORT,)]))
    reserve = reserving(draw(st.integers(0, 4)), draw(st.integers(0, 4)), generic)
    return of_priority(draw(st.integers(-2, 2)), name, reserve=reserve, ports=ports)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    has = replace(
        ROOM, generic_resources=(replace(GPU, discrete_resource_spec=DiscreteResource(kind="gpu", value=3)),)
    )
    nodes = [a_node(f"n{number}", has=has) for number in range(1, draw(st.integers(1, 3)) + 1)]
    made = [draw(services(f"s{number}")) for number in range(1, draw(st.integers(1, 4)) + 1)]
    accounting = Accounting()
    for node in nodes:
        accounting.set_node(node)
    tasks: list[Task] = []
    states = (TaskState.RUNNING, TaskState.RUNNING, TaskState.PREPARING)
    for number in range(draw(st.integers(0, 14))):
        service, node = draw(st.sampled_from(made)), draw(st.sampled_from(nodes))
        task = a_task(service=service, slot=number + 1, node=node.id, state=draw(st.sampled_from(states)))
        if service.spec.task_template.resources and GPU in reserved(service).generic_resources:
            task = replace(task, generic_resources=(GPU,))
        if passes(wanted(service), accounting, node.id):
            accounting.reserve(task.id, node.id, holds_of(task, host_ports(service.spec)))
            tasks.append(replace(task, desired_state=draw(st.sampled_from(DESIRED))))
    return World(nodes, [*made, draw(services("new"))], tasks)


DESIRED = (TaskState.RUNNING, TaskState.RUNNING, TaskState.RUNNING, TaskState.SHUTDOWN)


def reserved(service: Service) -> Resources:
    resources = service.spec.task_template.resources
    return (resources.reservations if resources else None) or Resources()


def passes(requirements: Requirements, accounting: Accounting, node: str) -> bool:
    account = accounting.accounts[NodeId(node)]
    copies = accounting.copies(requirements.service_id)[NodeId(node)]
    return all(one.passes(requirements, account, copies) for one in filters_for(requirements))


def fits_without(world: World, service: Service, node: str, gone: Iterable[str]) -> bool:
    """Whether the task fits when ``gone`` and what leaves anyway have ended, by an accounting of their absence."""
    accounting = Accounting()
    accounting.set_node(world.accounting.accounts[NodeId(node)].node)
    for task in world.tasks.values():
        if task.node_id == node and task.is_wanted and task.id not in gone:
            owner = world.services[task.service_id]
            accounting.reserve(task.id, task.node_id, holds_of(task, host_ports(owner.spec)))
    return passes(wanted(service), accounting, node)


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_victims_are_of_lower_priority_make_room_and_none_could_stay(world: World) -> None:
    new = world.services["new"]
    for node in world.accounting.accounts:
        victims = world.victims(new, node)
        lower = {
            task.id
            for task in world.tasks.values()
            if task.node_id == node
            and task.is_wanted
            and world.priorities.of(task.service_id) < world.priorities.of(new.id)
        }
        assert (victims is not None) == fits_without(world, new, node, lower)
        if victims is None:
            continue
        assert victims <= lower
        assert fits_without(world, new, node, victims)
        for fewer in combinations(victims, len(victims) - 1) if victims else ():
            assert not fits_without(world, new, node, fewer)


@settings(max_examples=100, deadline=None)
@given(worlds(), st.integers(1, 4))
def test_nominations_do_not_depend_on_the_order_of_anything_and_fit_together(
    world: World, count: int
) -> None:
    new = world.services["new"]
    other = World(
        [one.node for one in reversed(world.accounting.accounts.values())],
        list(reversed(world.services.values())),
        list(reversed(world.tasks.values())),
    )
    nominations = world.nominations(new, count)
    assert chosen(nominations) == chosen(other.nominations(new, count))
    victims = [victim for one in nominations for victim in one.candidate.victims]
    assert len(victims) == len(set(victims))
    for task in world.tasks.values():
        if task.id in victims or not task.is_wanted:
            world.accounting.remove(task.id)
    for account in world.accounting.accounts.values():
        assert account.free_memory_bytes >= 0
        assert account.free_nano_cpus >= 0
        assert account.host_ports["tcp", 8080] <= 1


@settings(max_examples=100, deadline=None)
@given(worlds())
def test_a_task_that_fits_as_it_is_has_no_victims(world: World) -> None:
    new = world.services["new"]
    for node in world.accounting.accounts:
        if passes(wanted(new), world.accounting, node):
            assert world.victims(new, node) == set()
