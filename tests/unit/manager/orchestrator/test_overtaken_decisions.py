"""Decisions that are overtaken: what users, nodes and other managers write comes between a decision and its write."""

from collections.abc import Callable
from functools import partial
from random import Random

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.aio.clock import SystemClock
from skep.errors import Unavailable
from skep.manager.control.updates import pause_update, resume_update
from skep.manager.orchestrator.changes import (
    Cause,
    Change,
    FillSlot,
    RemoveService,
    ReplaceTask,
    RetireTask,
    RollBack,
    SetUpdateStatus,
    apply,
    cause_to_leave,
)
from skep.manager.orchestrator.state import OrchestratorState
from skep.manager.services.removal import hide_service
from skep.model.node import Availability, Node, NodeState
from skep.model.service import (
    GlobalJob,
    JobStatus,
    ReplicatedJob,
    RestartCondition,
    RestartPolicy,
    Service,
    ServiceMode,
    UpdateConfig,
    UpdateOrder,
    UpdateState,
)
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, new_id
from skep.model.values.times import Timestamp
from skep.store.interface import Commit, Updated
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.rollouts import a_spec, a_world, state, wanted
from tests.support.managers.worlds import World

N1 = NodeId("n1")
ASKED_AT = Timestamp("2026-01-02T00:00:00Z")
OLD = Timestamp("2026-01-01T00:00:00Z")
UNUSABLE = [a_node("n1", state=NodeState.DOWN), a_node("n1", availability=Availability.DRAIN)]


def a_job(mode: ServiceMode, ttl: str = "") -> Service:
    service = a_service("job")
    labels = {"skep.job.ttl": ttl} if ttl else {}
    spec = replace(service.spec, mode=mode, labels=labels)
    return replace(service, spec=spec, job_status=JobStatus(last_execution=ASKED_AT))


def retired(changes: list[Change]) -> list[Task]:
    return [change.task for change in changes if isinstance(change, RetireTask)]


def runs_on_where_its_node_is_well_again(world: World, well: Node) -> None:
    """The only task, which is to be retired, is not if the node is ``well`` before that is written."""
    (task,) = world.tasks.values()
    changes = world.changes()
    assert retired(changes) == [task], "the case that is to be tested"
    world.nodes[N1] = well
    world.apply(changes)
    assert [*world.tasks.values()] == [task]


def test_the_old_task_runs_on_if_its_update_was_withdrawn() -> None:
    start_first = UpdateConfig(order=UpdateOrder.START_FIRST)
    world = a_world(start_first, replicas=1)
    world.update(a_spec("app:2", replicas=1, update=start_first))
    world.settle()
    world.run_all()
    (old,) = wanted(world, "app:1")
    changes = world.changes()
    assert retired(changes) == [old], "the case that is to be tested"
    world.update(a_spec("app:1", replicas=1, update=start_first))
    world.apply(changes)
    assert wanted(world, "app:1") == [old]


def test_an_update_that_a_user_resumed_since_the_decision_is_not_paused_again() -> None:
    """The leader was about to write the failure that the user tolerates, or the share of a paused update."""
    world = a_world(replicas=2)
    world.update(a_spec("app:2", replicas=2))
    world.settle()
    world.report(wanted(world, "app:2")[0].id, TaskState.REJECTED)
    changes = [change for change in world.changes() if isinstance(change, SetUpdateStatus)]
    assert [change.state for change in changes] == [UpdateState.PAUSED], "the case that is to be tested"
    pause_update(world, world.service.id, now=OLD)  # type: ignore[arg-type]
    resume_update(world, world.service.id)  # type: ignore[arg-type]
    world.apply(changes)
    assert state(world) is UpdateState.UPDATING


def test_a_paused_staged_update_that_a_user_resumed_since_the_decision_is_not_paused_again() -> None:
    world = a_world(UpdateConfig(parallelism=0))
    spec = a_spec("app:2", update=UpdateConfig(parallelism=0))
    world.update(replace(spec, labels={"skep.update": "canary", "skep.update.steps": "5%,50%"}))
    world.settle()
    pause_update(world, world.service.id, now=OLD)  # type: ignore[arg-type]
    world.run_all()
    changes = [change for change in world.changes() if isinstance(change, SetUpdateStatus)]
    assert [change.state for change in changes] == [UpdateState.PAUSED], "it has a share now"
    resume_update(world, world.service.id)  # type: ignore[arg-type]
    world.apply(changes)
    assert state(world) is UpdateState.UPDATING


def test_tasks_run_on_if_a_service_is_scaled_up_again_as_they_are_to_be_removed() -> None:
    world = a_world(replicas=3)
    world.update(a_spec(replicas=1))
    changes = world.changes()
    assert len(retired(changes)) == 2, "the case that is to be tested"
    world.update(a_spec(replicas=3))
    world.apply(changes)
    assert len(wanted(world)) == 3


async def test_a_leader_that_is_behind_removes_no_task_of_a_service_that_was_scaled_up_again() -> None:
    other = MemoryStore(SystemClock())
    leader = MemoryStore(SystemClock(), other.cluster)
    service = await other.update(lambda tx: tx.put(a_service(replicas=1)))
    task = await other.update(lambda tx: tx.put(a_task(slot=2, service=service, node="n1")))
    surplus = RetireTask(task, TaskState.REMOVE, service=service)
    leader.faults.lag_s = 0.05
    spec = a_service_spec(replicas=2)
    await other.update(lambda tx: tx.put(replace(tx.get(Service, service.id), spec=spec)))
    assert leader.view().get(Service, service.id).spec.replicas == 1, "the case that is to be tested"
    await leader.update_each(lambda tx, change: apply(tx, change, new_id, OLD), [surplus])
    await other.barrier()
    assert other.view().get(Task, task.id).is_wanted


@pytest.mark.parametrize("change", [RollBack, partial(SetUpdateStatus, state=UpdateState.PAUSED)])
async def test_a_service_that_was_removed_meanwhile_is_not_updated(change: Callable[..., Change]) -> None:
    """A rollback would claim its name and ports once more, and restart the services that depend on it."""
    store = MemoryStore(SystemClock())
    old = a_service_spec(replicas=3)
    service = replace(a_service(replicas=1), previous_spec=old)
    await store.update(lambda tx: tx.put(service))
    await store.update(lambda tx: hide_service(tx, tx.get(Service, service.id), OLD))
    removed = store.view().get(Service, service.id)
    await store.update(lambda tx: apply(tx, change(service, message="update failed"), new_id, OLD))
    assert store.view().get(Service, service.id) == removed


@pytest.mark.parametrize("unusable", UNUSABLE)
def test_a_task_that_is_not_restarted_runs_on_where_its_node_is_well_again(unusable: Node) -> None:
    """Nothing would fill its slot again."""
    service = a_service("web", restart=RestartPolicy(condition=RestartCondition.NONE))
    task = a_task(service=service, node="n1")
    runs_on_where_its_node_is_well_again(World(service, [task], [unusable]), a_node("n1"))


@pytest.mark.parametrize("unusable", UNUSABLE)
def test_a_task_of_a_global_service_runs_on_where_its_node_is_well_again(unusable: Node) -> None:
    service = a_service("agent", is_global=True)
    task = a_task(slot=0, service=service, node="n1")
    runs_on_where_its_node_is_well_again(World(service, [task], [unusable]), a_node("n1"))


@pytest.mark.parametrize("unusable", UNUSABLE)
def test_a_run_of_a_global_job_goes_on_where_its_node_is_well_again(unusable: Node) -> None:
    """It would begin again from nothing."""
    well = replace(a_node("n1"), created_at=OLD)
    world = World(a_job(ServiceMode(global_job=GlobalJob())), nodes=[well])
    world.settle()
    (task,) = world.tasks.values()
    world.report(task.id, TaskState.RUNNING)
    world.nodes[N1] = replace(unusable, created_at=OLD)
    runs_on_where_its_node_is_well_again(world, well)


def test_a_job_that_is_retried_as_it_is_to_be_removed_stays() -> None:
    world = World(
        a_job(ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1)), "1s")
    )
    world.settle()
    (task,) = world.tasks.values()
    world.report(task.id, TaskState.FAILED)
    world.put(replace(world.tasks[task.id], desired_state=TaskState.SHUTDOWN))
    removal = RemoveService(world.service)
    assert world.service.job_status is not None
    world.put(replace(world.service, job_status=replace(world.service.job_status, retried_until=ASKED_AT)))
    world.apply([removal])
    assert world.service.removed_at is None


def test_a_task_whose_status_has_become_unreadable_is_not_taken_for_one_that_does_not_run() -> None:
    world = a_world(replicas=1)
    (task,) = world.tasks.values()
    world.report(task.id, TaskState.STARTING)
    (task,) = world.tasks.values()
    world.unknown.add(task.id)
    change = ReplaceTask(task, FillSlot(world.service, 1), Cause.DOES_NOT_RUN)
    with pytest.raises(Unavailable, match="cannot be read"):
        world.apply([change])
    assert [*world.tasks.values()] == [task]


def test_a_task_that_began_to_run_on_a_drained_node_since_the_decision_leaves_once_it_is_replaced() -> None:
    world = a_world(replicas=1)
    (task,) = world.tasks.values()
    world.nodes[task.node_id] = a_node(task.node_id, availability=Availability.DRAIN)
    world.report(task.id, TaskState.STARTING)
    changes = world.changes()
    replaced = [change.task.id for change in changes if isinstance(change, ReplaceTask)]
    assert replaced == [task.id], "the case that is to be tested"
    world.report(task.id, TaskState.RUNNING)
    world.apply(changes)
    assert [one.id for one in wanted(world)] == [task.id]
    world.settle()
    assert [one.status.state for one in wanted(world)] == [TaskState.RUNNING, TaskState.NEW]


def test_no_task_of_a_lost_node_is_replaced_while_a_disruption_may_begin_but_afterwards() -> None:
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    orchestrator = OrchestratorState(MemoryStore(clock), clock, Random(1))
    task, service = a_task(node="n1"), a_service()
    lost = ReplaceTask(task, FillSlot(service, 1), Cause.NODE_IS_LOST)
    drained = ReplaceTask(task, FillSlot(service, 1), Cause.NODE_IS_UNFIT)
    assert not orchestrator.is_held(service.id, lost)
    orchestrator.disruption.replaces_from = clock.monotonic() + 7.0
    assert not orchestrator.is_held(service.id, drained)
    assert orchestrator.is_held(service.id, lost)
    assert loop.run_until_complete(orchestrator.queue.take(10)) == [service.id]
    assert clock.monotonic() >= orchestrator.disruption.replaces_from
    assert not orchestrator.is_held(service.id, lost)
    loop.close()


@pytest.mark.parametrize(("action", "is_held"), [("stop", True), ("keep", True), ("replace", False)])
def test_a_node_that_was_back_between_decision_and_write_has_its_whole_delay_once_more(
    action: str, is_held: bool
) -> None:
    """Changes of a large service may wait for minutes.  Meanwhile its tasks may run on the node again."""
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    store = MemoryStore(clock)
    orchestrator = OrchestratorState(store, clock, Random(1))
    labels = {"skep.on-disconnect": action} | (
        {"skep.on-disconnect-delay": "60s"} if action == "stop" else {}
    )
    service = a_service(spec=replace(a_service_spec(), labels=labels))
    ready, down = a_node("n1"), a_node("n1", state=NodeState.DOWN)
    loop.run_until_complete(store.update(lambda tx: [tx.put(service), tx.put(down)]))
    lost = ReplaceTask(a_task(node="n1", service=service), FillSlot(service, 1), Cause.NODE_IS_LOST)
    loop.run_until_complete(clock.sleep(200.0))
    if action != "keep":
        assert not orchestrator.is_held(service.id, lost), "it is down for longer than the delay"
    orchestrator.on_commit(Commit(1, (Updated(down, ready),)))
    orchestrator.on_commit(Commit(2, (Updated(ready, down),)))
    orchestrator.queue.take_due(10)
    assert orchestrator.is_held(service.id, lost) is is_held
    if action == "stop":
        assert loop.run_until_complete(orchestrator.queue.take(10)) == [service.id]
        assert clock.monotonic() >= 260.0
        assert not orchestrator.is_held(service.id, lost)
    loop.close()


def test_tasks_leave_a_node_that_is_drained_while_it_is_down_whatever_is_frozen() -> None:
    task = a_task(node="n1")
    assert cause_to_leave(task, a_node("n1", state=NodeState.DOWN)) is Cause.NODE_IS_LOST
    drained = a_node("n1", state=NodeState.DOWN, availability=Availability.DRAIN)
    assert cause_to_leave(task, drained) is Cause.NODE_IS_LOST_AND_DRAINED


def test_a_task_whose_drained_node_returned_since_the_decision_leaves_once_it_is_replaced() -> None:
    world = a_world(replicas=1)
    (task,) = world.tasks.values()
    world.nodes[N1] = a_node("n1", state=NodeState.DOWN, availability=Availability.DRAIN)
    changes = world.changes()
    assert [type(change) for change in changes] == [ReplaceTask], "the case that is to be tested"
    world.nodes[N1] = a_node("n1", availability=Availability.DRAIN)
    world.apply(changes)
    assert world.tasks[task.id].is_wanted
    world.settle()
    assert [one.status.state for one in wanted(world)] == [TaskState.RUNNING, TaskState.NEW]


@pytest.mark.parametrize(("state", "stays"), [(TaskState.PENDING, False), (TaskState.ASSIGNED, True)])
def test_a_task_that_got_a_node_before_it_was_retired_as_late_stays(state: TaskState, stays: bool) -> None:
    """A slow store wrote the retirement four seconds after the assignment (simulated life 23)."""
    world = a_world(replicas=1)
    (task,) = world.tasks.values()
    late = RetireTask(task, cause=Cause.IS_LATE)
    world.put(replace(task, status=replace(task.status, state=state)))
    world.apply([late])
    assert world.tasks[task.id].is_wanted is stays
