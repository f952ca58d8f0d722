"""On which nodes a global service has a task."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.orchestrator.changes import Cause, FillSlot, RetireTask
from skep.manager.orchestrator.global_services import reconcile
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.model.node import Availability, Node, NodeDescription, NodeState, NodeStatus
from skep.model.options.labels import STOPPED
from skep.model.service import RestartCondition, RestartPolicy, Service, UpdateState, UpdateStatus
from skep.model.task import StopCause, Task, TaskState
from skep.model.values.ids import TaskId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS
from tests.support.builders import a_node, a_service, a_task
from tests.support.managers.worlds import World

AGENT = a_service("agent", is_global=True)


def test_every_ready_node_gets_one_task() -> None:
    nodes = [a_node("n1"), a_node("n2")]
    assert reconcile(AGENT, [], nodes) == [FillSlot(AGENT, 0, node.id) for node in nodes]


@pytest.mark.parametrize(
    "node",
    [
        a_node("n1", state=NodeState.DOWN),
        a_node("n1", availability=Availability.DRAIN),
        a_node("n1", availability=Availability.PAUSE),
    ],
)
def test_a_node_that_takes_no_tasks_gets_none(node: Node) -> None:
    assert reconcile(AGENT, [], [node]) == []


def test_constraints_choose_the_nodes() -> None:
    service = a_service("agent", is_global=True, constraints=("node.labels.zone == north",))
    nodes = [a_node("n1", labels={"zone": "north"}), a_node("n2")]
    assert reconcile(service, [], nodes) == [FillSlot(service, 0, nodes[0].id)]


def test_a_drained_node_loses_its_task_and_a_paused_one_keeps_it() -> None:
    tasks = [a_task(slot=0, node="n1", service=AGENT), a_task(slot=0, node="n2", service=AGENT)]
    nodes = [a_node("n1", availability=Availability.DRAIN), a_node("n2", availability=Availability.PAUSE)]
    assert reconcile(AGENT, tasks, nodes) == [RetireTask(tasks[0], is_due=True, cause=Cause.NODE_IS_UNFIT)]


NORTH = a_service("agent", is_global=True, constraints=("node.hostname == n1",))


@pytest.mark.parametrize("service", [AGENT, NORTH])
def test_a_node_of_which_nothing_is_known_keeps_its_task_and_gets_none(service: Service) -> None:
    """What it has written about itself cannot be read: its name and labels are not known, nor what it can run."""
    unknown = replace(a_node("n1"), description=NodeDescription(), status=NodeStatus())
    task = a_task(slot=0, node="n1", service=service)
    assert reconcile(service, [task], [unknown]) == []
    assert World(service, [task], [unknown]).steps() == []
    assert World(service, [], [unknown]).steps() == []


def test_what_ends_on_a_paused_node_is_not_replaced_there() -> None:
    task = a_task(slot=0, node="n1", service=AGENT, state=TaskState.FAILED)
    world = World(AGENT, [task], [a_node("n1", availability=Availability.PAUSE)])
    assert world.steps() == [RetireTask(task, is_due=True)]
    world.settle()
    world.nodes[a_node("n1").id] = a_node("n1")
    assert world.steps() == [FillSlot(AGENT, 0, a_node("n1").id)]


def test_a_node_that_was_down_since_its_task_failed_gets_the_next_one_at_once() -> None:
    task = a_task(slot=0, node="n1", service=AGENT, state=TaskState.FAILED)
    world = World(AGENT, [task], [a_node("n1", state=NodeState.DOWN)])
    assert world.steps() == [RetireTask(task, is_due=True)]
    world.settle()
    world.nodes[a_node("n1").id] = a_node("n1")
    assert world.steps() == [FillSlot(AGENT, 0, a_node("n1").id)]


WINDOWED = a_service(
    "agent", is_global=True, restart=RestartPolicy(max_attempts=1, window=3600 * SECOND_NS, delay=0)
)
AWAY = [
    a_node("n1", availability=Availability.PAUSE),
    a_node("n1", availability=Availability.DRAIN),
    a_node("n1", state=NodeState.DOWN),
]


@pytest.mark.parametrize(
    ("state", "ended", "is_refilled"),
    [
        (UpdateState.ROLLBACK_STARTED, TaskState.FAILED, True),
        (UpdateState.ROLLBACK_STARTED, TaskState.COMPLETE, False),
        (UpdateState.ROLLBACK_COMPLETED, TaskState.FAILED, False),
    ],
)
def test_a_task_that_failed_for_good_runs_again_during_a_rollback_and_not_after_it(
    state: UpdateState, ended: TaskState, *, is_refilled: bool
) -> None:
    """A new leader, which has seen nothing, decides the same.  By swarmkit, a task that is done runs again as well.

    Source: swarmkit, manager/orchestrator/restart/restart.go (UpdatableTasksInSlot).
    """
    policy = RestartPolicy(condition=RestartCondition.NONE)
    agent = a_service("agent", is_global=True, restart=policy)
    service = replace(agent, update_status=UpdateStatus(state=state))
    last = a_task("t1", service=service, node="n1", slot=0, state=ended, desired=TaskState.SHUTDOWN)
    node = a_node("n1")
    fills = [FillSlot(service, 0, node.id)] if is_refilled else []
    assert reconcile(service, [last], [node]) == fills
    other = replace(last, spec=replace(last.spec, force_update=9), spec_version=Version(index=8))
    if state is UpdateState.ROLLBACK_STARTED:
        assert reconcile(service, [other], [node]) == [FillSlot(service, 0, node.id)], (
            "of the spec that failed"
        )


@pytest.mark.parametrize("away", AWAY)
@pytest.mark.parametrize("ended", [TaskState.FAILED, TaskState.COMPLETE])
@pytest.mark.parametrize("is_first_leader", [True, False])
def test_a_new_leader_refills_the_slot_of_a_task_that_ended_on_a_node_that_took_none(
    away: Node, ended: TaskState, is_first_leader: bool
) -> None:
    world = World(WINDOWED, [a_task("t", slot=0, node="n1", service=WINDOWED)], [a_node("n1")])
    world.report("t", ended)
    world.nodes[away.id] = away
    if not is_first_leader:
        world.seen = ObservedTimes(0.0)
    world.settle()
    assert not world.tasks[TaskId("t")].is_wanted
    world.seen = ObservedTimes(world.now)
    world.nodes[away.id] = a_node("n1")
    world.settle()
    assert [task.node_id for task in world.tasks.values() if task.is_active] == ["n1"]


@pytest.mark.parametrize("away", AWAY[1:])
def test_a_new_leader_refills_the_slot_of_a_task_that_failed_as_it_was_stopped_with_its_node(
    away: Node,
) -> None:
    world = World(WINDOWED, [a_task("t", slot=0, node="n1", service=WINDOWED)], [away])
    world.settle()
    world.report("t", TaskState.FAILED)
    world.seen = ObservedTimes(world.now)
    world.nodes[away.id] = a_node("n1")
    world.settle()
    assert [task.node_id for task in world.tasks.values() if task.is_active] == ["n1"]


@pytest.mark.parametrize("away", AWAY)
def test_a_slot_whose_restarts_are_used_up_is_not_due_because_its_node_takes_no_tasks(away: Node) -> None:
    world = World(WINDOWED, [a_task("t", slot=0, node="n1", service=WINDOWED)], [a_node("n1")])
    world.report("t", TaskState.FAILED)
    world.settle()
    (second,) = (task for task in world.tasks.values() if task.is_wanted)
    world.report(second.id, TaskState.FAILED)
    world.nodes[away.id] = away
    world.settle()
    world.seen = ObservedTimes(world.now)
    world.nodes[away.id] = a_node("n1")
    world.settle()
    assert not any(task.is_wanted for task in world.tasks.values())


nodes_of_any_kind = st.lists(
    st.builds(
        a_node,
        st.sampled_from(["n1", "n2", "n3", "n4"]),
        state=st.sampled_from([NodeState.READY, NodeState.DOWN]),
        availability=st.sampled_from(list(Availability)),
    ),
    unique_by=lambda node: node.id,
)
tasks_of_any_kind = st.lists(
    st.builds(
        lambda node, state, desired: a_task(slot=0, node=node, service=AGENT, state=state, desired=desired),
        st.sampled_from(["n1", "n2", "n3", "gone"]),
        st.sampled_from([TaskState.NEW, TaskState.RUNNING, TaskState.FAILED, TaskState.SHUTDOWN]),
        st.sampled_from([TaskState.RUNNING, TaskState.SHUTDOWN, TaskState.REMOVE]),
    ),
    max_size=6,
)


@given(nodes_of_any_kind, tasks_of_any_kind)
def test_one_application_is_enough(nodes: list[Node], tasks: list[Task]) -> None:
    world = World(AGENT, tasks, nodes)
    world.apply(reconcile(AGENT, tasks, nodes))
    assert reconcile(AGENT, world.tasks.values(), nodes) == []


def test_a_stopped_service_has_no_tasks_and_no_history_of_them() -> None:
    stopped = replace(AGENT, spec=replace(AGENT.spec, labels={STOPPED: "true"}))
    past = a_task(slot=0, node="n1", service=stopped, state=TaskState.FAILED, desired=TaskState.SHUTDOWN)
    tasks = [past, a_task(slot=0, node="n1", service=stopped), a_task(slot=0, node="n2", service=stopped)]
    assert reconcile(stopped, tasks, [a_node("n1"), a_node("n2"), a_node("n3")]) == [
        RetireTask(task, TaskState.REMOVE) for task in tasks
    ]
    assert reconcile(AGENT, [], [a_node("n1")]) != []


@pytest.mark.parametrize(
    ("away", "cause"),
    [
        (a_node("n1", state=NodeState.DOWN), StopCause.NODE_DOWN),
        (a_node("n1", availability=Availability.DRAIN), StopCause.NODE_DRAINED),
    ],
)
def test_a_task_that_leaves_its_node_keeps_the_cause_after_the_node_is_back(
    away: Node, cause: StopCause
) -> None:
    world = World(WINDOWED, [a_task("t", slot=0, node="n1", service=WINDOWED)], [away])
    world.settle()
    world.nodes[away.id] = a_node("n1")
    world.settle()
    restart = world.tasks[TaskId("t")].restart
    assert restart is not None
    assert restart.stop_cause == cause.value
