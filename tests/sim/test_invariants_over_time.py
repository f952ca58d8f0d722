"""Rules with a memory, on containers and decisions: each rejects a history in which it was broken on purpose."""

from collections import Counter

import msgspec
import pytest

from sim.invariants.nodes.containers import Containers
from sim.invariants.services.attempts import NoRedundantTasks
from sim.invariants.services.autoscaling import AutoscalingIsCalm
from sim.invariants.services.damping import DecisionsAreStable, surplus_violations
from skep.model.node import Availability, Node, NodeSpec, NodeState
from skep.model.options.autoscaling import with_replicas
from skep.model.service import (
    Autoscaled,
    JobStatus,
    Service,
    UpdateOrder,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import Relocation, Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.meta import Version
from skep.model.values.times import Timestamp
from tests.sim.histories import W1, W2, History, a_node, a_run, a_service, a_task
from tests.support.builders import a_service_spec


def test_more_new_tasks_than_a_fault_ended_are_rejected() -> None:
    web, db = ServiceId("web"), ServiceId("db")
    before = Counter({web: 3, db: 2})
    after = before + Counter({web: 2, db: 7})
    assert list(surplus_violations("'a fault'", {web: 2}, before, after)) == [], (
        "other services are not checked"
    )
    assert list(surplus_violations("'a fault'", {web: 1}, before, after)) == [
        "2 tasks of web were created, though 'a fault' ended 1"
    ]


def begin(history: History, task: Task) -> None:
    """As a leader does that knows the present spec."""
    service = history.state.get(Service, "web")
    history.put(msgspec.structs.replace(task, spec_version=service.spec_version))


def ask_for(history: History, image: str) -> None:
    service = history.state.get(Service, "web")
    history.put(msgspec.structs.replace(service, spec=a_service_spec("web", image=image)))


def an_update_that_is_taken_back(first: TaskState = TaskState.RUNNING) -> History:
    """A slot with its task, beside which another one was begun and has failed."""
    history = History(NoRedundantTasks())
    history.put(a_node(W1), a_service())
    ask_for(history, "app:1")
    begin(history.after(30), a_task("t1", node=W1, state=first))
    ask_for(history, "app:2")
    begin(history, a_task("t2", node=W1, state=TaskState.FAILED))
    ask_for(history, "app:1")
    return history


def test_a_second_task_of_the_current_spec_is_rejected() -> None:
    history = an_update_that_is_taken_back()
    begin(history, a_task("t3", slot=2))
    history.put(a_task("t4"))
    assert history.violations == [], "another slot; and a leader that knew another spec"
    begin(history, a_task("t5"))
    assert history.violations == ["task t5 was created beside t1, which has the current spec and is healthy"]


def test_a_second_task_is_begun_where_the_first_has_ended_or_is_another_or_not_well() -> None:
    ended = an_update_that_is_taken_back(TaskState.FAILED)
    begin(ended, a_task("t5"))
    another = an_update_that_is_taken_back()
    ask_for(another, "app:3")
    begin(another, a_task("t5"))
    unwell = an_update_that_is_taken_back()
    unwell.put(a_node(W1, state=NodeState.DOWN), a_node(W1))
    begin(unwell, a_task("t5"))
    assert ended.violations == another.violations == unwell.violations == []


class Decided:
    """A service of three replicas, whose third task got its node a while ago."""

    def __init__(self) -> None:
        self.history = History(DecisionsAreStable())
        self.service = a_service()
        self.history.put(a_node(W1), self.service)
        self.task = a_task("t3", slot=3, image="busybox:1")
        self.placed = msgspec.structs.replace(
            self.task,
            spec=self.service.spec.task_template,
            node_id=W1,
            status=TaskStatus(state=TaskState.RUNNING),
        )
        self.history.after(30).put(msgspec.structs.replace(self.task, spec=self.placed.spec), self.placed)

    def end(self, desired: TaskState = TaskState.SHUTDOWN) -> None:
        task = self.history.state.get(Task, "t3")
        self.history.after(30).put(msgspec.structs.replace(task, desired_state=desired))


@pytest.mark.parametrize(("is_undone", "violations"), [(True, 0), (False, 1)])
def test_a_replacement_may_be_taken_back_if_the_drain_that_it_was_for_is_undone(
    is_undone: bool, violations: int
) -> None:
    decided = Decided()
    older = msgspec.structs.replace(decided.placed, id=TaskId("t2"), node_id=W2)
    decided.history.put(a_node(W2), older)
    newer = msgspec.structs.replace(decided.placed, id=TaskId("t4"))
    decided.history.after(30).put(newer)
    if is_undone:
        node = decided.history.state.get(Node, W2)
        decided.history.put(
            msgspec.structs.replace(node, spec=msgspec.structs.replace(node.spec, labels={"a": "b"}))
        )
    decided.history.after(30).put(msgspec.structs.replace(newer, desired_state=TaskState.SHUTDOWN))
    assert len(decided.history.violations) == violations


def test_a_move_to_another_node_is_a_cause() -> None:
    decided = Decided()
    move = Relocation(target=W2, at=Timestamp("2026-01-01T00:00:00Z"))
    decided.history.put(msgspec.structs.replace(decided.history.state.get(Task, "t3"), relocation=move))
    decided.end()
    assert decided.history.violations == []


def test_a_placement_that_is_reversed_without_a_cause_is_rejected() -> None:
    decided = Decided()
    decided.end()
    assert decided.history.violations == [
        "task t3 of web is retired 30.0 s after it was created or assigned, without a cause"
    ]


def test_a_placement_is_taken_back_when_its_node_changes() -> None:
    decided = Decided()
    decided.history.put(a_node(W1, state=NodeState.DOWN))
    decided.end()
    assert decided.history.violations == []


def test_a_placement_on_a_node_that_was_removed_before_it_was_committed_is_taken_back() -> None:
    decided = Decided()
    decided.history.commit(lambda tx: tx.delete(Node, W1))
    decided.history.after(30).put(
        msgspec.structs.replace(decided.placed, id=TaskId("t4"), slot=4),
    )
    decided.history.put(
        msgspec.structs.replace(decided.placed, id=TaskId("t4"), slot=4, desired_state=TaskState.SHUTDOWN)
    )
    assert decided.history.violations == []


@pytest.mark.parametrize("is_scaled", [True, False])
def test_a_task_that_was_assigned_late_is_taken_back_for_a_spec_of_after_its_creation(
    is_scaled: bool,
) -> None:
    decided = Decided()
    late = msgspec.structs.replace(decided.placed, id=TaskId("t4"), slot=4, node_id=NodeId(""))
    decided.history.put(late)
    if is_scaled:
        decided.history.put(msgspec.structs.replace(decided.service, spec=a_service_spec(replicas=0)))
    decided.history.after(30).put(msgspec.structs.replace(late, node_id=W1))
    service = decided.history.state.get(Service, decided.service.id)
    decided.history.put(
        msgspec.structs.replace(
            late, node_id=W1, spec=service.spec.task_template, desired_state=TaskState.REMOVE
        )
    )
    assert bool(decided.history.violations) is not is_scaled


@pytest.mark.parametrize("is_overtaken", [True, False])
def test_a_run_of_a_job_that_was_assigned_late_is_taken_back_only_for_a_newer_run(is_overtaken: bool) -> None:
    decided = Decided()
    job = msgspec.structs.replace(
        decided.service, job_status=JobStatus(job_iteration=Version(index=1 + is_overtaken))
    )
    run = msgspec.structs.replace(decided.placed, id=TaskId("t4"), slot=4, job_iteration=Version(index=1))
    decided.history.put(job)
    decided.history.after(30).put(run)
    decided.history.put(msgspec.structs.replace(run, desired_state=TaskState.REMOVE))
    assert bool(decided.history.violations) is not is_overtaken


def test_a_restart_that_is_taken_back_because_another_node_is_back_is_rejected() -> None:
    decided = Decided()
    decided.history.put(a_node(W2))
    decided.end()
    assert len(decided.history.violations) == 1


def test_a_task_that_has_ended_is_not_taken_back() -> None:
    decided = Decided()
    decided.history.put(msgspec.structs.replace(decided.placed, status=TaskStatus(state=TaskState.FAILED)))
    decided.end()
    assert decided.history.violations == []


def test_a_scale_down_that_is_reversed_without_a_cause_is_rejected() -> None:
    decided = Decided()
    decided.history.put(msgspec.structs.replace(decided.service, spec=a_service_spec("web", replicas=2)))
    decided.end(TaskState.REMOVE)
    assert decided.history.violations == []
    decided.history.put(a_task("t4", slot=3))
    assert decided.history.violations == ["slot 3 of web is filled again, though it was scaled away"]


def test_a_slot_that_was_scaled_away_is_filled_again_when_that_is_asked_for() -> None:
    decided = Decided()
    for replicas, task in ((2, None), (3, a_task("t4", slot=3))):
        spec = a_service_spec("web", replicas=replicas)
        decided.history.put(msgspec.structs.replace(decided.service, spec=spec))
        if task is None:
            decided.end(TaskState.REMOVE)
        else:
            decided.history.put(task)
    assert decided.history.violations == []


def test_a_container_stopped_though_it_is_to_run_is_rejected() -> None:
    rule = Containers()
    history = History(rule)
    history.put(a_node(W1), a_task("t1", node="w1", state=TaskState.RUNNING))
    history.note(rule.stopped(W1, TaskId("t1"), history.state))
    assert history.violations == ["w1 stopped the container of task t1, which is to run there"]
    history.put(a_task("t1", node="w1", state=TaskState.RUNNING, desired=TaskState.SHUTDOWN))
    history.note(rule.stopped(W1, TaskId("t1"), history.state))
    assert len(history.violations) == 1


def test_a_container_started_beside_the_one_it_replaces_is_rejected() -> None:
    rule = Containers()
    history = History(rule)
    history.put(a_node(W1), a_node(W2), a_service())
    old = a_task("old", node="w1", state=TaskState.RUNNING)
    history.put(old)
    history.after(100).note(rule.started(W1, old, history.now, history.state))
    history.put(msgspec.structs.replace(old, desired_state=TaskState.SHUTDOWN))
    new = a_task("new", node="w2", state=TaskState.STARTING)
    history.put(new)
    history.note(rule.started(W2, new, history.now, history.state))
    assert history.violations == ["task new started while old, which it replaces, still ran on w1"]


def test_a_container_that_a_node_starts_late_may_stand_beside_its_successor() -> None:
    """The node was partitioned, and receives the task long after its replacement."""
    rule = Containers()
    history = History(rule)
    late = a_task("late", node="w1", state=TaskState.ASSIGNED)
    successor = a_task("successor", node="w2", state=TaskState.RUNNING)
    history.put(a_node(W1), a_node(W2), a_service(), late, successor)
    history.note(rule.started(W2, successor, history.now, history.state))
    history.put(msgspec.structs.replace(successor, desired_state=TaskState.REMOVE))
    history.note(rule.started(W1, late, history.now, history.state))
    assert history.violations == []


@pytest.mark.parametrize(("order", "room"), [(UpdateOrder.STOP_FIRST, 1), (UpdateOrder.START_FIRST, 2)])
def test_a_slot_that_has_too_many_containers_for_long_is_rejected(order: UpdateOrder, room: int) -> None:
    rule = Containers()
    history = History(rule)
    crowd = [a_task(f"t{number}", node="w1", state=TaskState.RUNNING) for number in range(room + 1)]
    history.put(a_node(W1), a_service(order), *crowd)
    for task in crowd:
        history.note(rule.started(W1, task, history.now, history.state))
    calm_since = history.now + 100
    for seconds in (0, 108, 1):
        history.after(seconds).note(rule.lasting(history.now, calm_since, history.state))
    assert history.violations == []
    for _ in range(2):  # it is said once
        history.after(2).note(rule.lasting(history.now, calm_since, history.state))
    assert history.violations == [f"slot web/1 has {room + 1} containers, 11.0 s after the last fault"]


def test_a_slot_that_has_two_containers_now_and_then_is_not_rejected() -> None:
    rule = Containers()
    history = History(rule)
    both = [a_task(id, node="w1", state=TaskState.RUNNING) for id in ("t1", "t2")]
    history.put(a_node(W1), a_service(), *both)
    history.note(rule.started(W1, both[0], history.now, history.state))
    for _ in range(5):
        history.after(5).note(rule.started(W1, both[1], history.now, history.state))
        history.note(rule.lasting(history.now, 0.0, history.state))
        rule.ended(both[1].id)
        history.after(5).note(rule.lasting(history.now, 0.0, history.state))
    assert history.violations == []


def test_a_container_started_before_the_restart_delay_is_over_is_rejected() -> None:
    rule = Containers()
    history = History(rule)
    failed = a_task("t1", node="w1", state=TaskState.RUNNING, delay_s=5)
    history.put(a_node(W1), a_service(), failed)
    history.put(msgspec.structs.replace(failed, status=TaskStatus(state=TaskState.FAILED)))
    successor = a_task("t2", node="w1", state=TaskState.STARTING, delay_s=5)
    history.put(successor)
    history.after(6).note(rule.started(W1, successor, history.now, history.state))
    assert history.violations == []
    history.after(-4).note(rule.started(W1, successor, history.now, history.state))
    assert history.violations == ["task t2 started 2.00 s after t1 failed, not 4.95"]


@pytest.mark.parametrize("is_retried", [True, False])
def test_the_successor_of_a_failed_task_of_a_job_that_a_user_retries_has_no_delay(is_retried: bool) -> None:
    rule = Containers()
    history = History(rule)
    failed = a_task("t1", node="w1", state=TaskState.RUNNING, delay_s=5)
    job = msgspec.structs.replace(a_service(), job_status=JobStatus())
    history.put(a_node(W1), job, failed)
    history.put(msgspec.structs.replace(failed, status=TaskStatus(state=TaskState.FAILED)))
    if is_retried:
        retried = JobStatus(retried_until=Timestamp("2023-11-14T22:13:20Z"))
        history.put(msgspec.structs.replace(job, job_status=retried))
    successor = a_task("t2", node="w1", state=TaskState.STARTING, delay_s=5)
    history.put(successor)
    history.after(1).note(rule.started(W1, successor, history.now, history.state))
    assert len(history.violations) == (not is_retried), history.violations


@pytest.mark.parametrize("is_drained_first", [True, False])
def test_the_successor_of_a_task_that_failed_on_a_drained_node_has_no_delay(is_drained_first: bool) -> None:
    rule = Containers()
    history = History(rule)
    failed = a_task("t1", node="w1", state=TaskState.RUNNING, delay_s=5)
    drained = msgspec.structs.replace(a_node(W1), spec=NodeSpec(availability=Availability.DRAIN))
    history.put(a_node(W1), a_service(), failed)
    history.put(msgspec.structs.replace(failed, status=TaskStatus(state=TaskState.FAILED)))
    successor = a_task("t2", node="w2", state=TaskState.STARTING, delay_s=5)
    history.put(*([drained, successor] if is_drained_first else [successor, drained]))
    history.note(rule.started(W2, successor, history.now, history.state))
    assert len(history.violations) == (0 if is_drained_first else 1)


@pytest.mark.parametrize("is_replaced", [False, True], ids=["filled again", "replaced"])
@pytest.mark.parametrize("cause", ["was down", "unreadable", ""])
def test_the_successor_on_a_node_that_was_down_since_a_task_of_a_global_service_failed_has_no_delay(
    cause: str, is_replaced: bool
) -> None:
    """Nor does it where the leader could not read the node, and took it for paused."""
    rule = Containers(unreadable=lambda: [W1] if cause == "unreadable" else [])
    history = History(rule)
    running = a_task("t1", node="w1", slot=0, state=TaskState.RUNNING, delay_s=5)
    failed = msgspec.structs.replace(running, status=TaskStatus(state=TaskState.FAILED))
    retired = msgspec.structs.replace(failed, desired_state=TaskState.SHUTDOWN)
    successor = a_task("t2", node="w1", slot=0, state=TaskState.STARTING, delay_s=5)
    history.put(a_node(W1), a_service(), running)
    history.put(failed)
    history.after(1)
    if cause == "was down":
        history.put(a_node(W1, state=NodeState.DOWN))
    if not is_replaced:
        history.put(retired)
    if cause == "was down":
        history.after(0.1).put(a_node(W1))
    history.after(0.1).put(*([retired, successor] if is_replaced else [successor]))
    history.note(rule.started(W1, successor, history.now, history.state))
    assert len(history.violations) == (0 if cause and not is_replaced else 1)


def test_the_place_of_a_run_is_what_was_committed_though_its_node_counts_otherwise() -> None:
    rule = Containers()
    history = History(rule)
    old, new = a_run("old", node_id=W1), a_run("new", node_id=W2)
    history.put(a_node(W1), a_node(W2), a_service(), old)
    history.after(100).note(
        rule.started(W1, msgspec.structs.replace(old, slot=0), history.now, history.state)
    )
    history.put(msgspec.structs.replace(old, desired_state=TaskState.SHUTDOWN), new)
    assert history.violations == []
    history.after(10).note(rule.started(W2, msgspec.structs.replace(new, slot=0), history.now, history.state))
    assert history.violations == ["task new started while old, which it replaces, still ran on w1"]


def autoscaled(history: History, replicas: int) -> None:
    """As a leader writes it."""
    service = history.state.get(Service, "web")
    before = service.spec.replicas
    done = Autoscaled(before=before, after=replicas, reason=f"at {history.now}")
    spec = with_replicas(service.spec, replicas)
    history.put(msgspec.structs.replace(service, spec=spec, autoscaled=done))


def an_autoscaled_service(state: UpdateState | None = None) -> History:
    history = History(AutoscalingIsCalm())
    labels = {"skep.autoscale": "2..10", "skep.autoscale.down-after": "1m"}
    spec = msgspec.structs.replace(a_service_spec("web", replicas=4), labels=labels)
    status = UpdateStatus(state=state) if state is not None else None
    history.put(msgspec.structs.replace(a_service(), spec=spec, update_status=status))
    return history


def test_numbers_that_autoscaling_may_write_are_accepted() -> None:
    history = an_autoscaled_service()
    autoscaled(history, 8)
    autoscaled(history.after(15), 10)
    autoscaled(history.after(61), 3)
    autoscaled(history.after(15), 2)
    autoscaled(history.after(15), 4)
    assert history.violations == []


@pytest.mark.parametrize(
    ("replicas", "violation"),
    [
        (1, "web is scaled to 1, out of 2 to 10"),
        (11, "web is scaled to 11, out of 2 to 10"),
        (9, "web is scaled from 4 to 9 at once"),
    ],
)
def test_a_number_out_of_the_range_or_more_than_doubled_is_rejected(replicas: int, violation: str) -> None:
    history = an_autoscaled_service()
    autoscaled(history, replicas)
    assert violation in history.violations


def test_tasks_that_go_within_the_window_after_others_came_are_rejected() -> None:
    history = an_autoscaled_service()
    autoscaled(history, 6)
    autoscaled(history.after(30), 5)
    assert history.violations == ["web is scaled down 30 s after it was scaled up"]


def test_a_number_that_changes_during_an_update_is_rejected() -> None:
    history = an_autoscaled_service(UpdateState.UPDATING)
    autoscaled(history, 6)
    assert history.violations == ["web is scaled though its update is updating"]
