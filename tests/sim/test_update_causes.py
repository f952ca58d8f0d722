"""Rules on stopped updates and on leaders reject what they should, and nothing else."""

import pytest
from msgspec.structs import replace

from sim.cluster import LED_S, SimulatedCluster
from sim.invariants import causes
from sim.invariants.causes import UpdateEndsHaveCauses, replacements_are_recorded
from skep.model.node import NodeState
from skep.model.service import (
    GlobalService,
    Service,
    ServiceMode,
    UpdateConfig,
    UpdateFailureAction,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import TaskState
from skep.model.values.times import SECOND_NS, timestamp
from tests.sim.histories import W1, History, a_node, a_service, a_task


def stop(history: History, message: str) -> None:
    service = history.state.find(Service)[0]
    status = UpdateStatus(state=UpdateState.PAUSED, message=message)
    history.put(replace(service, update_status=status))


def an_update(state: TaskState, action: UpdateFailureAction = UpdateFailureAction.PAUSE) -> History:
    """A task of the present version is in this state."""
    history, service = History(UpdateEndsHaveCauses()), a_service()
    config = UpdateConfig(failure_action=action)
    history.put(a_node(W1), replace(service, spec=replace(service.spec, update_config=config)))
    version = history.state.find(Service)[0].spec_version
    task = replace(a_task("t1", node="w1"), spec_version=version)
    history.put(task, replace(task, status=replace(task.status, state=state)))
    return history


MESSAGES = (
    "update paused due to failure",
    "update rolled back due to failure",
    "rollback paused due to failure",
)


@pytest.mark.parametrize("message", MESSAGES)
def test_an_update_that_is_stopped_for_nothing_is_rejected(message: str) -> None:
    history = an_update(TaskState.RUNNING)
    stop(history, message)
    assert history.violations == [f"web: {message}, though no task of it has failed"]


def test_one_that_is_stopped_for_a_failure_a_deadline_or_by_its_user_is_not() -> None:
    failed, overdue, users = (
        an_update(TaskState.FAILED),
        an_update(TaskState.PREPARING),
        an_update(TaskState.RUNNING),
    )
    stop(failed, MESSAGES[0])
    stop(overdue.after(1000.0), MESSAGES[0])
    stop(users, "rollback in progress")
    assert failed.violations == overdue.violations == users.violations == []


@pytest.mark.parametrize(
    ("state", "action", "violations"),
    [
        (TaskState.REJECTED, UpdateFailureAction.PAUSE, 1),
        (TaskState.PREPARING, UpdateFailureAction.ROLLBACK, 1),
        (TaskState.RUNNING, UpdateFailureAction.PAUSE, 0),
        (TaskState.REJECTED, UpdateFailureAction.CONTINUE, 0),
    ],
)
def test_an_update_that_has_completed_without_a_running_task_is_rejected(
    state: TaskState, action: UpdateFailureAction, violations: int
) -> None:
    history = an_update(state, action)
    for update in (UpdateState.UPDATING, UpdateState.COMPLETED):
        service = history.state.find(Service)[0]
        history.put(replace(service, update_status=UpdateStatus(state=update)))
    assert len(history.violations) == violations, history.violations


@pytest.mark.parametrize("is_global", [True, False])
def test_an_update_of_a_global_service_completes_where_all_its_nodes_are_down(is_global: bool) -> None:
    history = an_update(TaskState.ASSIGNED)
    history.put(a_node(W1, state=NodeState.DOWN))
    for update in (UpdateState.UPDATING, UpdateState.COMPLETED):
        service = history.state.find(Service)[0]
        mode = ServiceMode(global_=GlobalService()) if is_global else service.spec.mode
        spec = replace(service.spec, mode=mode)
        history.put(replace(service, spec=spec, update_status=UpdateStatus(state=update)))
    assert len(history.violations) == (not is_global), history.violations


def test_a_reason_that_is_shown_again_after_an_error_stops_nothing_twice() -> None:
    history = an_update(TaskState.RUNNING)
    for message in (f"decision failed: boom; {MESSAGES[1]}", MESSAGES[1]):
        (service,) = history.state.find(Service)
        status = UpdateStatus(state=UpdateState.ROLLBACK_STARTED, message=message)
        history.put(replace(service, update_status=status))
    assert history.violations == []
    stop(history, MESSAGES[2])
    assert history.violations == [f"web: {MESSAGES[2]}, though no task of it has failed"]


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_replacement_that_the_history_does_not_record_is_rejected(
    is_recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_recorded:
        monkeypatch.setattr(causes, "entries_of", lambda _event, _view: iter(()))
    history = History(replacements_are_recorded)
    failed = replace(a_task("t1", state=TaskState.FAILED), created_at=timestamp(SECOND_NS))
    history.put(a_service(), failed, replace(a_task("t2"), created_at=timestamp(2 * SECOND_NS)))
    assert history.violations == ([] if is_recorded else ["t2 in slot 1: 1 tasks before it, history: []"])


@pytest.mark.parametrize("is_well", [True, False])
def test_a_healthy_majority_without_a_leader_is_rejected(is_well: bool) -> None:
    with SimulatedCluster(managers=3, workers=0, seed=1) as cluster:
        cluster.run_for(5.0)
        for manager in cluster.running_managers.values():
            manager.leads = False
        if not is_well:
            for id in cluster.managers[:2]:
                cluster.raft.members[id].stall_s = 1.0
        for _ in range(3):
            cluster.run_for(LED_S - 1)
        reported = [text for text in cluster.observer.violations if "no leader" in text]
        assert len(reported) == is_well
