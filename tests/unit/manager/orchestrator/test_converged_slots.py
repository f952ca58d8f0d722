"""Slots about which nothing is to be decided are left out of a decision, and it comes out the same."""

from collections.abc import Iterator
from typing import TypeAlias
from unittest.mock import patch

from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.time_slices import SlicedWork, run_at_once
from skep.manager.orchestrator import convergence
from skep.manager.orchestrator.changes import FillSlot, ReplaceTask, Step
from skep.manager.orchestrator.converged_slots import converged_slots
from skep.manager.orchestrator.decision_inputs import Situation
from skep.manager.orchestrator.replacement import restart
from skep.model.node import Availability, NodeState
from skep.model.service import Resources, Service, UpdateConfig, UpdateState, UpdateStatus
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS, timestamp
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.counted_calls import calls_of
from tests.support.managers.worlds import World

NODES = (
    a_node("good", labels={"zone": "a"}),
    a_node("other"),
    a_node("down", labels={"zone": "a"}, state=NodeState.DOWN),
    a_node("drained", labels={"zone": "a"}, availability=Availability.DRAIN),
    a_node("paused", availability=Availability.PAUSE),
    a_node("small", labels={"zone": "a"}, has=Resources(nano_cpus=1, memory_bytes=1)),
)
PACED = UpdateConfig(parallelism=1, delay=5 * SECOND_NS)
SPECS = (
    a_service_spec(image="busybox:1", reserve=Resources(memory_bytes=2), update=PACED),
    a_service_spec(image="busybox:2", constraints=("node.labels.zone==a",), update=PACED),
    replace(a_service_spec(image="busybox:2", constraints=("node.labels.zone==a",)), labels={"new": "yes"}),
)
GOOD = ("good", TaskState.RUNNING, TaskState.RUNNING, 0)
Odd: TypeAlias = tuple[str, TaskState, TaskState, int]
"""Node, observed state, desired state; how many versions it is behind."""

odd = st.tuples(
    st.sampled_from([node.id for node in NODES] + ["good", "good", "gone", ""]),
    st.sampled_from([*TaskState][:-1] + [TaskState.RUNNING] * 12),
    st.sampled_from([TaskState.READY, TaskState.SHUTDOWN, TaskState.REMOVE] + [TaskState.RUNNING] * 3),
    st.integers(0, 2),
)


@settings(max_examples=200)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(1, 5), odd), max_size=4),
    st.sampled_from([0, 0, 0, -1, 1]),
    st.sampled_from([None, None, *UpdateState]),
    st.integers(1, 3),
)
@example(2, [(3, ("good", TaskState.RUNNING, TaskState.RUNNING, 1))], 1, None, 2)  # an update is to begin
@example(2, [], 0, UpdateState.UPDATING, 2)  # and here to end
@example(
    2, [(2, ("other", TaskState.RUNNING, TaskState.RUNNING, 0))], 0, None, 2
)  # out of place, and one too many
def test_a_decision_without_the_slots_at_rest_is_the_one_with_them(
    good: int, others: list[tuple[int, Odd]], more: int, state: UpdateState | None, version: int
) -> None:
    some = [*((slot, GOOD) for slot in range(1, good + 1)), *others]
    world = a_world(some, len({slot for slot, _ in some}) + more, state, version)
    assert convergence.next_steps(world.situation) == with_every_slot(world.situation)


def test_a_slot_is_at_rest_whatever_its_history_is() -> None:
    service = a_service(replicas=3)
    history = a_task(slot=1, node="n1", desired=TaskState.SHUTDOWN, state=TaskState.FAILED, version=0)
    running = [a_task(slot=slot, node="n1", service=service) for slot in (1, 2, 3)]
    world = World(service, [history, *running], [a_node("n1")])
    assert run_at_once(converged_slots(world.situation)) == {1, 2, 3}


def test_only_the_slot_of_a_task_that_ended_is_decided_about() -> None:
    service = a_service(replicas=1000)
    some = [a_task(slot=slot, node=f"n{slot % 7}", service=service) for slot in range(1, 1001)]
    world = World(service, some, [a_node(f"n{number}") for number in range(7)])
    world.report(some[41].id, TaskState.FAILED)
    with calls_of(restart.restart_steps) as asked:
        (step,) = world.changes()
    assert isinstance(step, ReplaceTask)
    assert [task.slot for call in asked.of(restart.restart_steps) for task in call["slot"]] == [42]


def test_missing_slots_are_filled_beside_those_at_rest() -> None:
    service = a_service(replicas=4)
    world = World(service, [a_task(slot=slot, node="n1", service=service) for slot in (1, 3)], [a_node("n1")])
    assert world.changes() == [FillSlot(service, 2), FillSlot(service, 4)]


def test_there_is_a_pause_after_each_node_that_is_looked_at() -> None:
    """All tasks of a node are gone through then: a thousand nodes in one go would take a tenth of a second."""
    service = a_service(replicas=50)
    some = [a_task(slot=slot, node=f"n{slot}", service=service) for slot in range(1, 51)]
    world = World(service, some, [a_node(f"n{slot}") for slot in range(1, 51)])
    looked_at: list[NodeId] = []

    def none(node_id: NodeId) -> frozenset[TaskId]:
        looked_at.append(node_id)
        return frozenset()

    at_pauses = [len(looked_at) for _ in converged_slots(replace(world.situation, overcommitted=none))]
    assert len(looked_at) == 50
    assert set(at_pauses) >= set(range(1, 51))


def a_world(some: list[tuple[int, Odd]], replicas: int, state: UpdateState | None, version: int) -> World:
    specs = [replace(spec, mode=a_service_spec(replicas=replicas).mode) for spec in SPECS]
    service = a_service(spec=specs[version - 1], version=version, previous=specs[0])
    if state is not None:
        service = replace(service, update_status=UpdateStatus(state=state))
    world = World(service, (), NODES)
    world.specs = {Version(index=index): spec for index, spec in enumerate(specs, 1)}
    world.tasks = {task.id: task for task in _made(some, service, world)}
    return world


def _made(some: list[tuple[int, Odd]], service: Service, world: World) -> Iterator[Task]:
    present = service.version.index
    for number, (slot, (node, status, desired, behind)) in enumerate(some):
        index = max(present - behind, 1)
        task = a_task(f"t{number}", slot=slot, node=node, state=status, desired=desired, version=index)
        template = world.specs[Version(index=index)].task_template
        stamp = timestamp(number * 1_000_000_000)
        yield replace(task, id=TaskId(task.id), created_at=stamp, spec=template, service_id=service.id)


def with_every_slot(situation: Situation) -> list[Step]:
    def none(_: Situation) -> SlicedWork[set[int]]:
        yield from ()
        return set()

    with patch.object(convergence, "converged_slots", none):
        return convergence.next_steps(situation)
