"""Tasks leave a node that no longer meets their constraints, or has less than they reserved."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.orchestrator.changes import Cause, ReplaceTask, RetireTask
from skep.manager.orchestrator.replacement.enforcement import overcommitted
from skep.model.container import ContainerSpec, Mount
from skep.model.node import Availability, Node, NodeDescription, NodeStatus
from skep.model.options.labels import DRAIN_NOW, MIN_AVAILABLE
from skep.model.service import (
    DiscreteResource,
    GenericResource,
    NamedResource,
    ReplicatedService,
    Resources,
    RestartCondition,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
)
from skep.model.task import Preemption, Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.times import SECOND_NS
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.worlds import World

NORTH = a_service("web", constraints=("node.labels.zone == north",))


def test_a_task_leaves_a_node_that_was_labeled_anew() -> None:
    task = a_task(service=NORTH, node="n1")
    world = World(NORTH, [task], [a_node("n1", labels={"zone": "north"})])
    assert world.steps() == []
    world.nodes[task.node_id] = a_node("n1", labels={"zone": "south"})
    assert [type(step) for step in world.steps()] == [ReplaceTask]
    world.settle()
    (successor,) = (other for other in world.tasks.values() if other.is_active)
    assert successor.node_id == ""


@pytest.mark.parametrize(
    "unfit",
    [
        a_node("n1", labels={"zone": "south"}),
        a_node("n1", availability=Availability.DRAIN, labels={DRAIN_NOW: "true"}),
    ],
)
def test_a_node_that_takes_its_tasks_again_before_they_are_replaced_keeps_them(unfit: Node) -> None:
    """A replacement that is written all the same stops a task for nothing, beside those that an update may stop."""
    task = a_task(TaskState.RUNNING, service=NORTH, node="n1")
    world = World(NORTH, [task], [unfit])
    changes = world.changes()
    assert [type(change) for change in changes] == [ReplaceTask], "the case that is to be tested"
    world.nodes[task.node_id] = a_node("n1", labels={"zone": "north"})
    world.apply(changes)
    assert [*world.tasks.values()] == [task]


def test_a_paused_node_keeps_a_task_that_its_labels_rule_out() -> None:
    task = a_task(service=NORTH, node="n1")
    world = World(NORTH, [task], [a_node("n1", availability=Availability.PAUSE)])
    assert world.steps() == []


def test_of_a_node_of_which_nothing_is_known_neither_constraints_nor_resources_are_judged() -> None:
    """What it has written about itself cannot be read, so that it seems to have no name and nothing to reserve."""
    unknown = replace(a_node("n1"), description=NodeDescription(), status=NodeStatus())
    here = a_service("web", constraints=("node.hostname == n1",), reserve=Resources(nano_cpus=1))
    task = a_task(TaskState.RUNNING, service=here, node="n1")
    assert World(here, [task], [unknown]).steps() == []
    assert overcommitted(unknown, [task]) == frozenset()


def test_a_task_that_is_not_restarted_leaves_without_a_successor() -> None:
    never = RestartPolicy(condition=RestartCondition.NONE)
    service = a_service("web", constraints=("node.labels.zone == north",), restart=never)
    task = a_task(service=service, node="n1")
    assert World(service, [task], [a_node("n1")]).steps() == [RetireTask(task, cause=Cause.NODE_IS_UNFIT)]


def test_a_global_service_leaves_a_node_that_was_labeled_anew() -> None:
    service = a_service("agent", is_global=True, constraints=("node.labels.zone == north",))
    task = a_task(slot=0, service=service, node="n1")
    assert World(service, [task], [a_node("n1")]).steps() == [
        RetireTask(task, is_due=True, cause=Cause.NODE_IS_UNFIT)
    ]


@pytest.mark.parametrize(
    ("has", "stay"),
    [
        (Resources(nano_cpus=3, memory_bytes=30), 3),
        (Resources(nano_cpus=2, memory_bytes=30), 2),
        (Resources(nano_cpus=3, memory_bytes=10), 1),
        (Resources(), 0),
    ],
)
def test_of_a_node_that_shrank_the_oldest_tasks_keep_their_place(has: Resources, stay: int) -> None:
    service = a_service("web", reserve=Resources(nano_cpus=1, memory_bytes=10))
    tasks = [a_task(service=service, slot=number, node="n1") for number in (1, 2, 3)]
    gone = overcommitted(a_node("n1", has=has), tasks[::-1])
    assert gone == {task.id for task in tasks[stay:]}


def test_a_named_resource_that_is_gone_takes_its_task_along() -> None:
    first, second = (GenericResource(named_resource_spec=NamedResource(kind="gpu", value=v)) for v in "ab")
    tasks = [replace(a_task(node="n1"), generic_resources=(resource,)) for resource in (first, second)]
    node = a_node("n1", has=Resources(generic_resources=(second,)))
    assert overcommitted(node, tasks) == {tasks[0].id}


def test_fewer_countable_resources_than_given_out_take_the_youngest_task_along() -> None:
    def chips(number: int) -> tuple[GenericResource, ...]:
        return (GenericResource(discrete_resource_spec=DiscreteResource(kind="chip", value=number)),)

    tasks = [replace(a_task(node="n1"), generic_resources=chips(2)) for _ in range(2)]
    assert overcommitted(a_node("n1", has=Resources(generic_resources=chips(3))), tasks) == {tasks[1].id}


def a_labeled_world(minimum: str | None, *, data: bool = False) -> World:
    """Three tasks run on three nodes, of which the third and a fourth one are in the north."""
    spec = with_minimum(NORTH.spec, minimum)
    if data:
        mounted = replace(
            spec.task_template.container_spec or ContainerSpec(),
            mounts=(Mount(type="volume", source="data", target="/data"),),
        )
        spec = replace(spec, task_template=replace(spec.task_template, container_spec=mounted))
    service = replace(NORTH, spec=replace(spec, mode=ServiceMode(replicated=ReplicatedService(replicas=3))))
    tasks = [a_task(f"old{slot}", slot=slot, service=service, node=f"n{slot}") for slot in (1, 2, 3)]
    zones = {"n1": "south", "n2": "south", "n3": "north", "n4": "north"}
    return World(service, tasks, [a_node(name, labels={"zone": zone}) for name, zone in zones.items()])


def with_minimum(spec: ServiceSpec, minimum: str | None) -> ServiceSpec:
    return replace(spec, labels={MIN_AVAILABLE: minimum} if minimum is not None else {})


def running_after(world: World) -> set[str]:
    world.settle()
    return {
        task.id for task in world.tasks.values() if task.is_wanted and task.status.state is TaskState.RUNNING
    }


@pytest.mark.parametrize("minimum", [None, "0"])
def test_all_tasks_of_relabeled_nodes_stop_at_once_without_a_minimum(minimum: str | None) -> None:
    assert running_after(a_labeled_world(minimum)) == {"old3"}


def test_a_task_with_a_minimum_leaves_a_relabeled_node_when_its_replacement_runs() -> None:
    world = a_labeled_world("1")
    assert running_after(world) == {"old1", "old2", "old3"}
    assert len([task for task in world.tasks.values() if task.is_active]) == 5
    for id in [id for id in world.tasks if id.startswith("new")]:
        world.put(replace(world.tasks[id], node_id=NodeId("n4")))
        world.report(id, TaskState.RUNNING)
    assert {world.tasks[TaskId(id)].node_id for id in running_after(world)} == {"n3", "n4"}


def test_tasks_that_write_data_leave_relabeled_nodes_as_the_budget_allows() -> None:
    assert running_after(a_labeled_world("2", data=True)) == {"old2", "old3"}
    assert running_after(a_labeled_world("3", data=True)) == {"old1", "old2", "old3"}


def test_tasks_of_a_node_that_shrank_stop_only_when_their_replacements_run() -> None:
    spec = a_service_spec("web", replicas=2, reserve=Resources(nano_cpus=1))
    service = replace(a_service("web"), spec=with_minimum(spec, "2"))
    tasks = [a_task(f"old{slot}", slot=slot, service=service, node="n1") for slot in (1, 2)]
    world = World(service, tasks, [a_node("n1", has=Resources(nano_cpus=1)), a_node("n2")])
    assert running_after(world) == {"old1", "old2"}
    (new,) = [task for task in world.tasks.values() if task.id.startswith("new")]
    world.put(replace(new, node_id=NodeId("n2")))
    world.report(new.id, TaskState.RUNNING)
    assert running_after(world) == {"old1", new.id}


sizes = st.lists(st.integers(0, 4), max_size=8)


@given(sizes, st.integers(0, 12), st.randoms())
def test_what_stays_fits_and_one_application_is_enough(wants: list[int], has: int, random: object) -> None:
    tasks: list[Task] = []
    for number, want in enumerate(wants, 1):
        service = a_service("web", reserve=Resources(nano_cpus=want))
        tasks.append(a_task(service=service, slot=number, node="n1"))
    node = a_node("n1", has=Resources(nano_cpus=has, memory_bytes=1))
    shuffled = list(tasks)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    gone = overcommitted(node, shuffled)
    assert gone == overcommitted(node, tasks)
    stay = [task for task in tasks if task.id not in gone]
    reserved = [task.spec.resources.reservations for task in stay if task.spec.resources]
    assert sum(one.nano_cpus for one in reserved if one is not None) <= has
    assert overcommitted(node, stay) == frozenset()


@pytest.mark.parametrize("is_global", [False, True])
def test_a_preempted_task_is_replaced_without_a_restart_delay(is_global: bool) -> None:
    """Once it has stopped, its successor may start; until there is room it waits for a node."""
    service = a_service("web", is_global=is_global, restart=RestartPolicy(delay=60 * SECOND_NS))
    task = a_task(slot=0 if is_global else 1, service=service, node="n1")
    world = World(service, [task], [a_node("n1")])
    assert world.steps() == []
    reason = Preemption(task_id=TaskId("t9"), service="shop", priority=10)
    world.tasks[task.id] = replace(task, preemption=reason)
    (step,) = world.steps()
    assert isinstance(step, ReplaceTask)
    assert (step.successor.delay_s, step.successor.desired) == (0.0, TaskState.READY)
    world.settle()
    (successor,) = (one for one in world.tasks.values() if one.is_active)
    assert successor.preemption is None
    world.stop_all()
    assert world.tasks[successor.id].desired_state is TaskState.READY
    world.settle()
    assert world.tasks[successor.id].desired_state is TaskState.RUNNING
