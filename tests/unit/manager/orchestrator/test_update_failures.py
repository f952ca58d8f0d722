"""Updates that go wrong: what counts as a failure, what follows from it, and what the user sees."""

import pytest
from msgspec.structs import replace

from skep.manager.control.updates import resume_update
from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.manager.orchestrator.reaper.history import surplus_history
from skep.manager.orchestrator.slots import age
from skep.model.node import Availability, Node, NodeState
from skep.model.options.dependencies import WAITS_FOR
from skep.model.service import (
    RestartCondition,
    RestartPolicy,
    ServiceSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import TaskState, TaskStatus
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.times import SECOND_NS
from tests.support.builders import a_node, a_service, a_task
from tests.support.managers.rollouts import a_spec, a_world, advance, message, state, wanted
from tests.support.managers.worlds import World

RUNNING = TaskState.RUNNING


def test_a_failure_pauses_with_dockers_words_and_a_further_update_goes_on() -> None:
    world = a_world()
    world.update(a_spec("app:2"))
    world.settle()
    lead = wanted(world, "app:2")[0]
    world.report(lead.id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.PAUSED
    assert message(world) == f"update paused due to failure or early termination of task {lead.id}"
    advance(world)
    assert len(wanted(world, "app:1")) == 3
    world.update(a_spec("app:3"))
    for _ in range(4):
        advance(world)
    assert len(wanted(world, "app:3")) == 4


def test_the_message_of_a_failed_update_names_the_cause() -> None:
    world = a_world(replicas=1)
    world.update(a_spec("app:2", replicas=1))
    world.settle()
    (lead,) = wanted(world, "app:2")
    status = replace(lead.status, state=TaskState.REJECTED, err="No such image: app:2")
    world.put(replace(lead, status=status))
    world.settle()
    words = f"update paused due to failure or early termination of task {lead.id}: No such image: app:2"
    assert (state(world), message(world)) == (UpdateState.PAUSED, words)


def test_the_message_of_a_failed_update_has_the_words_of_the_reason() -> None:
    world = a_world(replicas=1)
    world.update(a_spec("app:2", replicas=1))
    world.settle()
    (lead,) = wanted(world, "app:2")
    runc = 'runc create failed: unable to start container process: exec: "none": not found: unknown'
    err = f"starting container failed: OCI runtime create failed: {runc}"
    world.put(replace(lead, status=replace(lead.status, state=TaskState.FAILED, err=err)))
    world.settle()
    assert message(world).endswith(
        f'task {lead.id}: its process could not be started: exec: "none": not found'
    )


def test_an_update_goes_on_when_the_node_of_its_first_task_is_lost() -> None:
    world = a_world(replicas=2)
    world.nodes[a_node("n2").id] = a_node("n2")
    world.update(a_spec("app:2", replicas=2))
    world.settle()
    world.stop_all()
    world.settle()
    (lead,) = wanted(world, "app:2")
    world.put(replace(lead, node_id=a_node("n2").id, status=replace(lead.status, state=TaskState.PREPARING)))
    world.nodes[a_node("n2").id] = a_node("n2", state=NodeState.DOWN)
    for _ in range(6):
        world.settle()
        for task in list(world.tasks.values()):
            if task.desired_state is TaskState.READY and task.node_id != "n2":
                world.report(task.id, TaskState.READY)
            if task.node_id != "n2" and task.desired_state > RUNNING and not task.status.state.is_terminal:
                world.report(task.id, TaskState.SHUTDOWN)
        world.run_all()
        world.now += 6
    world.settle()
    assert world.tasks[lead.id].status.state is TaskState.PREPARING
    assert state(world) is UpdateState.COMPLETED
    assert len(wanted(world, "app:2")) == 2


def test_a_task_that_is_orphaned_with_its_node_lets_an_update_start_with_no_further_slot() -> None:
    world = a_world(replicas=2)
    world.nodes[a_node("n2").id] = a_node("n2")
    world.update(a_spec("app:2", replicas=2))
    world.settle()
    (lead,) = wanted(world, "app:2")
    world.put(replace(lead, node_id=a_node("n2").id, status=replace(lead.status, state=TaskState.PREPARING)))
    del world.nodes[a_node("n2").id]
    world.settle()
    world.report(lead.id, TaskState.ORPHANED)
    world.now += 60
    world.settle()
    assert not world.tasks[lead.id].is_wanted
    assert len(wanted(world, "app:2")) == 1


@pytest.mark.parametrize(
    "node", [a_node("n2", state=NodeState.DOWN), a_node("n2", availability=Availability.DRAIN)]
)
def test_a_task_that_is_stopped_before_it_ran_lets_an_update_start_with_no_further_slot(node: Node) -> None:
    """It was stopped with its node, which reports that; the next one in its slot is only prepared."""
    world = a_world(replicas=2)
    world.nodes[node.id] = a_node("n2")
    world.update(a_spec("app:2", replicas=2))
    world.settle()
    (lead,) = wanted(world, "app:2")
    world.put(replace(lead, node_id=node.id, status=replace(lead.status, state=TaskState.PREPARING)))
    world.nodes[node.id] = node
    world.settle()
    assert not world.tasks[lead.id].is_wanted
    world.report(lead.id, TaskState.SHUTDOWN)
    world.nodes[node.id] = a_node("n2")
    world.settle()
    assert len(wanted(world, "app:2")) == 1
    for _ in range(3):
        world.now += 6
        advance(world)
    assert (state(world), len(wanted(world, "app:2"))) == (UpdateState.COMPLETED, 2)


def deadline(seconds: int, action: UpdateFailureAction = UpdateFailureAction.PAUSE) -> ServiceSpec:
    update = UpdateConfig(parallelism=1, failure_action=action, monitor=SECOND_NS)
    spec = a_spec("app:2", replicas=2, update=update)
    return replace(spec, labels={"skep.progress-deadline": f"{seconds}s"})


def test_a_task_that_gets_nowhere_ends_the_update_after_its_deadline() -> None:
    world = a_world(replicas=2)
    world.update(deadline(30))
    world.settle()
    (lead,) = wanted(world, "app:2")
    world.now = 39.9
    world.settle()
    assert state(world) is UpdateState.UPDATING
    assert Recheck(40.0) in world.steps()
    world.now = 40.0
    world.settle()
    words = f"update paused because task {lead.id} made no progress within 40 s: it is new"
    assert (state(world), message(world)) == (UpdateState.PAUSED, words)


def test_time_in_which_a_task_waits_for_another_service_is_not_that_of_the_deadline() -> None:
    world = a_world(replicas=2)
    world.update(deadline(30))
    world.settle()
    (lead,) = wanted(world, "app:2")
    status = TaskStatus(state=TaskState.PENDING, err=f"{WAITS_FOR}db to be healthy")
    world.put(replace(world.tasks[lead.id], status=status))
    for now in (39.0, 41.0, 3_600.0):
        world.now = now
        world.settle()
        assert state(world) is UpdateState.UPDATING
        assert not [step for step in world.steps() if isinstance(step, Recheck)]
    world.report(lead.id, TaskState.ASSIGNED)
    world.now = 3_639.9
    world.settle()
    assert state(world) is UpdateState.UPDATING
    world.now = 3_640.0
    world.settle()
    assert state(world) is UpdateState.PAUSED


def test_time_in_which_a_task_waits_for_the_last_one_to_stop_is_not_that_of_the_deadline() -> None:
    """A node that is down stops it by itself, for which the service gives it 15 minutes and the stop grace."""
    world = held_by_a_lost_node()
    (new,) = wanted(world)
    for now in (610.0, 909.9):
        world.now = now
        world.settle()
        assert (state(world), world.tasks[new.id].desired_state) == (UpdateState.UPDATING, TaskState.READY)
        assert [step for step in world.steps() if isinstance(step, Recheck)] == [Recheck(910.0)]
    world.now = 910.0
    world.settle()
    assert (state(world), world.tasks[new.id].desired_state) == (UpdateState.UPDATING, RUNNING)
    assert world.steps() == [Recheck(910.0 + 610.0)]
    world.now = 910.0 + 610.0
    world.settle()
    assert state(world) is UpdateState.PAUSED


@pytest.mark.parametrize("node", [a_node("n1"), None])
def test_a_task_that_waits_for_a_node_that_is_back_or_removed_has_its_deadline_from_its_start(
    node: Node | None,
) -> None:
    world = held_by_a_lost_node()
    (new,) = wanted(world)
    world.now = 700.0
    if node is None:
        del world.nodes[NodeId("n1")]
    else:
        world.nodes[node.id] = node
        world.stop_all()
    world.settle()
    assert (state(world), world.tasks[new.id].desired_state) == (UpdateState.UPDATING, RUNNING)
    assert world.steps() == [Recheck(700.0 + 610.0)]


def held_by_a_lost_node() -> World:
    """The new task is ready on n2, and n1, which runs the old one, is down: the service's nodes stop tasks."""
    world = a_world(replicas=1)
    labels = {"skep.on-disconnect": "stop", "skep.on-disconnect-delay": "15m"}
    world.nodes = {node.id: node for node in (a_node("n1", state=NodeState.DOWN), a_node("n2"))}
    world.update(replace(a_spec("app:2", replicas=1), labels=labels))
    world.settle()
    (new,) = wanted(world, "app:2")
    world.put(replace(new, node_id=NodeId("n2"), status=replace(new.status, state=TaskState.READY)))
    world.settle()
    assert wanted(world) == [world.tasks[new.id]]
    return world


def test_a_task_that_is_not_restarted_and_whose_node_is_lost_fails_the_update_at_its_deadline() -> None:
    """It never ends, and nothing takes its place; afterwards no check is scheduled for a past time."""
    spec = deadline(30)
    once = replace(spec.task_template, restart_policy=RestartPolicy(condition=RestartCondition.NONE))
    world = a_world(replicas=2)
    world.update(replace(spec, task_template=once))
    world.settle()
    (lead,) = wanted(world, "app:2")
    world.nodes[a_node("n2").id] = a_node("n2", state=NodeState.DOWN)
    world.put(replace(lead, node_id=a_node("n2").id, status=replace(lead.status, state=TaskState.PREPARING)))
    world.settle()
    world.now = 50.0
    assert not world.tasks[lead.id].is_wanted
    world.settle()
    assert state(world) is UpdateState.PAUSED
    assert lead.id in message(world)
    assert [step for step in world.steps() if isinstance(step, Recheck)] == []


def test_an_overdue_task_rolls_the_update_back_or_lets_it_go_on_as_the_failure_action_says() -> None:
    world = a_world(replicas=2)
    world.update(deadline(30, UpdateFailureAction.ROLLBACK))
    world.settle()
    (lead,) = wanted(world, "app:2")
    world.now = 40.0
    world.settle()
    assert state(world) is UpdateState.ROLLBACK_COMPLETED
    assert f"task {lead.id} made no progress within 40 s" in message(world)
    world = a_world(replicas=2)
    world.update(deadline(30, UpdateFailureAction.CONTINUE))
    world.settle()
    assert len(wanted(world, "app:2")) == 1
    world.now = 40.0
    world.settle()
    assert len(wanted(world, "app:2")) == 2


def test_a_task_that_fails_after_the_monitor_time_is_no_failure_of_the_update() -> None:
    update = UpdateConfig(parallelism=1, delay=100 * SECOND_NS, monitor=SECOND_NS)
    world = a_world(update)
    world.update(a_spec("app:2", update=update))
    advance(world)
    world.now = 2.0
    world.report(wanted(world, "app:2")[0].id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.UPDATING


def test_the_ratio_allows_some_failures() -> None:
    update = UpdateConfig(parallelism=0, max_failure_ratio=0.25)
    world = a_world(update)
    world.update(a_spec("app:2", update=update))
    world.settle()
    first, second, *_ = wanted(world, "app:2")
    world.report(first.id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.UPDATING
    world.report(second.id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.PAUSED


def test_continue_ignores_failures() -> None:
    update = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.CONTINUE)
    world = a_world(update, replicas=2)
    world.update(a_spec("app:2", replicas=2, update=update))
    for _ in range(2):
        world.settle()
        world.stop_all()
        for task in wanted(world, "app:2"):
            world.report(task.id, TaskState.FAILED)
    advance(world)
    assert len(wanted(world, "app:2")) == 2


def test_an_update_that_goes_on_in_spite_of_failures_comes_to_an_end() -> None:
    action = UpdateFailureAction.CONTINUE
    update = UpdateConfig(parallelism=1, order=UpdateOrder.START_FIRST, failure_action=action)
    world = a_world(update, replicas=2)
    world.update(a_spec("app:2", replicas=2, update=update))
    for _ in range(4):
        world.settle()
        for task in wanted(world, "app:2"):
            world.report(task.id, TaskState.REJECTED)
        world.now += 5.0
    world.settle()
    assert state(world) is UpdateState.COMPLETED
    assert len(wanted(world, "app:1")) == 2


@pytest.mark.parametrize(
    "incident",
    [
        "the leader changes",
        "the first attempt is given up with its node",
        "the first attempt is stopped with its node",
    ],
)
def test_an_update_in_spite_of_a_crash_loop_goes_on_whatever_history_is_kept(incident: str) -> None:
    """Restarts come faster than the update's delay ends: it counts from one attempt, which is kept."""
    update = UpdateConfig(
        parallelism=1, delay=6 * SECOND_NS, failure_action=UpdateFailureAction.CONTINUE, monitor=3 * SECOND_NS
    )
    world = a_world(update, replicas=3)
    world.nodes[NodeId("n2")] = a_node("n2")
    spec = a_spec("app:2", replicas=3, update=update)
    policy = RestartPolicy(delay=2 * SECOND_NS)
    world.update(replace(spec, task_template=replace(spec.task_template, restart_policy=policy)))
    advance(world)
    (lead,) = wanted(world, "app:2")
    if incident == "the leader changes":
        world.report(lead.id, TaskState.FAILED)
        world.now += 1.0
        world.seen = ObservedTimes(world.now)
    else:
        world.tasks[lead.id] = replace(
            lead, node_id=NodeId("gone"), status=TaskStatus(state=TaskState.ASSIGNED)
        )
        world.seen = ObservedTimes(world.now)
        world.settle()
        is_gone = incident == "the first attempt is given up with its node"
        world.report(lead.id, TaskState.ORPHANED if is_gone else TaskState.SHUTDOWN)
    for _ in range(120):
        world.now += 0.5
        for task in wanted(world, "app:2"):
            if task.status.state is TaskState.RUNNING:
                world.report(task.id, TaskState.FAILED)
        advance(world)
        for slot in (1, 2, 3):
            past = sorted((one for one in world.tasks.values() if one.slot == slot), key=age)
            for surplus in surplus_history(past, 0, updating=[world.service.spec_version]):
                del world.tasks[surplus.id]
    assert state(world) is UpdateState.COMPLETED
    assert {task.slot for task in wanted(world, "app:2")} == {1, 2, 3}


@pytest.mark.parametrize("incident", ["a user resumes the update", "the leader changes"])
def test_the_first_attempt_that_counts_decides_whatever_history_is_kept(incident: str) -> None:
    """It ran for the monitor time.  A later attempt that fails at once must not take its place."""
    update = UpdateConfig(parallelism=1, delay=60 * SECOND_NS, monitor=3 * SECOND_NS)
    world = a_world(update, replicas=2)
    world.update(a_spec("app:2", replicas=2, update=update))
    advance(world)
    (lead,) = wanted(world, "app:2")
    world.report(lead.id, TaskState.FAILED)
    newest = max(world.tasks.values(), key=age).created_at
    if incident == "the leader changes":
        world.seen = ObservedTimes(world.now)
    else:
        world.settle()
        assert state(world) is UpdateState.PAUSED
        resume_update(world, world.service.id)  # type: ignore[arg-type]
    advance(world)
    for seconds in (4.0, 0.1, 0.1):
        world.now += seconds
        for task in wanted(world, "app:2"):
            world.report(task.id, TaskState.FAILED)
        advance(world)
        for slot in (1, 2):
            past = sorted((one for one in world.tasks.values() if one.slot == slot), key=age)
            updating = [world.service.spec_version]
            for surplus in surplus_history(past, 0, updating=updating, times=[newest]):
                del world.tasks[surplus.id]
    assert state(world) is UpdateState.UPDATING


def test_a_rollback_returns_to_the_previous_spec_and_says_why_to_the_end() -> None:
    update = UpdateConfig(parallelism=2, failure_action=UpdateFailureAction.ROLLBACK)
    world = a_world(update)
    world.update(a_spec("app:2", update=update))
    advance(world)
    lead, other = wanted(world, "app:2")[:2]
    world.report(lead.id, TaskState.FAILED)
    world.settle()
    cause = f"update rolled back due to failure or early termination of task {lead.id}"
    assert (state(world), message(world)) == (UpdateState.ROLLBACK_STARTED, cause)
    assert world.service.previous_spec is None
    for _ in range(3):
        advance(world)
    world.now += 5.0
    world.settle()
    assert len(wanted(world, "app:1")) == 4
    assert not world.tasks[other.id].is_wanted
    assert (state(world), message(world)) == (UpdateState.ROLLBACK_COMPLETED, f"rollback completed: {cause}")


def test_what_could_not_be_prepared_is_rolled_back_without_a_stop() -> None:
    update = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.ROLLBACK)
    world = a_world(update)
    before = wanted(world)
    world.update(a_spec("app:2", update=update))
    world.settle()
    world.report(wanted(world, "app:2")[0].id, TaskState.REJECTED)
    world.settle()
    assert state(world) is UpdateState.ROLLBACK_COMPLETED
    assert wanted(world) == before


def test_a_rollback_that_fails_is_paused_and_not_rolled_back() -> None:
    update = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.ROLLBACK)
    world = a_world(update)
    world.update(a_spec("app:2", update=update))
    advance(world)
    world.report(wanted(world, "app:2")[0].id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.ROLLBACK_STARTED
    world.report(wanted(world, "app:1")[-1].id, TaskState.REJECTED)
    world.settle()
    assert state(world) is UpdateState.ROLLBACK_PAUSED
    assert message(world).startswith("rollback paused due to failure or early termination of task ")


def test_the_rollback_of_a_service_without_replicas_is_completed() -> None:
    world = a_world(replicas=0)
    swapped = UpdateStatus(state=UpdateState.ROLLBACK_STARTED, message="manually requested rollback")
    before = a_spec("app:0", replicas=0)
    world.put(replace(world.service, spec=before, previous_spec=world.service.spec, update_status=swapped))
    world.settle()
    assert (state(world), message(world)) == (UpdateState.ROLLBACK_COMPLETED, "rollback completed")


def test_a_rollback_has_settings_of_its_own() -> None:
    """One at a time forwards, all at once back, and a failure on the way back does not stop it."""
    update = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.ROLLBACK, max_failure_ratio=0.5)
    back = UpdateConfig(parallelism=0, failure_action=UpdateFailureAction.CONTINUE)
    world = a_world(update)
    world.update(replace(a_spec("app:2", update=update), rollback_config=back))
    for _ in range(4):
        advance(world)
    assert len(wanted(world, "app:2")) == 4
    spec = world.service.spec
    swapped = UpdateStatus(state=UpdateState.ROLLBACK_STARTED, message="manually requested rollback")
    before = replace(a_spec("app:1", update=update), rollback_config=back)
    world.put(replace(world.service, spec=before, previous_spec=spec, update_status=swapped))
    world.settle()
    assert len(wanted(world, "app:1")) == 4
    world.report(wanted(world, "app:1")[0].id, TaskState.REJECTED)
    for _ in range(3):
        advance(world)
    world.now += 5.0
    world.settle()
    assert (state(world), message(world)) == (UpdateState.ROLLBACK_COMPLETED, "rollback completed")
    assert wanted(world, "app:2") == []


def test_a_slot_begun_under_a_version_with_other_labels_takes_its_place_until_it_runs_or_is_overdue() -> None:
    """Labels that change in the middle of an update ask for the same tasks, which so get no lead of theirs."""
    spec = deadline(30, UpdateFailureAction.CONTINUE)
    world = a_world(replicas=2)
    world.update(spec)
    world.settle()
    world.prepare_all()
    world.update(replace(spec, labels={**spec.labels, "more": "words"}))
    world.settle()
    assert (len(wanted(world, "app:1")), len(wanted(world, "app:2"))) == (1, 1)
    world.stop_all()
    world.settle()
    assert Recheck(40.0) in world.steps()
    world.now = 40.0
    world.settle()
    assert len(wanted(world, "app:2")) == 2


ONCE = RestartPolicy(condition=RestartCondition.NONE)


def one_shot(image: str, policy: RestartPolicy, update: UpdateConfig | None = None) -> ServiceSpec:
    spec = a_spec(image, replicas=1, update=update)
    return replace(spec, task_template=replace(spec.task_template, restart_policy=policy))


@pytest.mark.parametrize("order", list(UpdateOrder))
@pytest.mark.parametrize("condition", [RestartCondition.NONE, RestartCondition.ON_FAILURE])
def test_a_one_shot_service_that_ends_with_0_completes_its_update(
    condition: RestartCondition, order: UpdateOrder
) -> None:
    policy, update = RestartPolicy(condition=condition, delay=0), UpdateConfig(order=order)
    world = World(a_service(spec=one_shot("app:1", policy, update)), nodes=[a_node("n1")])
    world.put(a_task("old", slot=1, node="n1", service=world.service))
    world.report(TaskId("old"), TaskState.COMPLETE)
    world.settle()
    world.update(one_shot("app:2", policy, update))
    world.settle()
    (lead,) = wanted(world, "app:2")
    world.report(lead.id, TaskState.COMPLETE)
    for _ in range(2):
        advance(world)
    assert (state(world), len(world.tasks)) == (UpdateState.COMPLETED, 2), "a done task is not monitored"


def test_a_one_shot_service_that_ends_with_0_retires_the_running_task_that_it_replaces() -> None:
    """With start-first nothing else would: the new task has ended before the old one was stopped."""
    update = UpdateConfig(order=UpdateOrder.START_FIRST)
    world = a_world(update, replicas=1)
    world.update(one_shot("app:2", ONCE, update))
    world.settle()
    world.report(wanted(world, "app:2")[0].id, TaskState.COMPLETE)
    world.now = 6.0
    for _ in range(3):
        advance(world)
    assert (wanted(world), state(world)) == ([], UpdateState.COMPLETED)


def test_a_rollback_runs_a_one_shot_service_once_where_the_update_has_failed_and_not_elsewhere() -> None:
    """By swarmkit, each slot whose task is done runs again, and again until the rollback is complete."""
    update = UpdateConfig(parallelism=1, failure_action=UpdateFailureAction.ROLLBACK)
    policy, mode = RestartPolicy(condition=RestartCondition.NONE, delay=0), a_spec(replicas=2).mode
    before = replace(one_shot("app:1", policy, update), mode=mode)
    world = World(a_service(spec=before), nodes=[a_node("n1")])
    for slot in (1, 2):
        world.put(a_task(f"old-{slot}", slot=slot, node="n1", service=world.service))
        world.report(TaskId(f"old-{slot}"), TaskState.COMPLETE)
    world.settle()
    world.update(replace(one_shot("app:2", policy, update), mode=mode))
    world.settle()
    world.report(wanted(world, "app:2")[0].id, TaskState.FAILED)
    world.settle()
    assert state(world) is UpdateState.ROLLBACK_STARTED
    (again,) = wanted(world, "app:1")
    world.report(again.id, TaskState.COMPLETE)
    for _ in range(4):
        advance(world)
        world.now += 5.0
        world.settle()
    assert state(world) is UpdateState.ROLLBACK_COMPLETED
    assert len(world.tasks) == 4, "two before, one that failed, and one after it"


@pytest.mark.parametrize(
    ("policy", "end"),
    [(ONCE, TaskState.FAILED), (RestartPolicy(condition=RestartCondition.ANY), TaskState.COMPLETE)],
)
def test_an_early_end_of_another_kind_pauses_the_update_as_before(
    policy: RestartPolicy, end: TaskState
) -> None:
    world = a_world(replicas=1)
    world.update(one_shot("app:2", policy))
    world.settle()
    world.report(wanted(world, "app:2")[0].id, end)
    world.settle()
    assert state(world) is UpdateState.PAUSED
    assert ("its process ended with exit code 0" in message(world)) is (end is TaskState.COMPLETE)
