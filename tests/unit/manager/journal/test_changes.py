"""What a change of an object in the store means for the history."""

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from skep.manager.eviction.steps import EVICTION_ID, WORKER_STEPS, Eviction
from skep.manager.journal.changes import entries_of, folded, folded_requests
from skep.model.history import By, EntryType, JournalEntry, Severity
from skep.model.node import (
    Availability,
    EngineDescription,
    ManagerStatus,
    Node,
    NodeRole,
    NodeState,
    NodeStatus,
)
from skep.model.node_reports.conditions import DISK_PRESSURE_LABEL
from skep.model.secret import Secret, SecretSpec
from skep.model.service import Autoscaled, RestartCondition, RestartPolicy, UpdateState, UpdateStatus
from skep.model.task import ContainerStatus, Preemption, Restart, StopCause, Task, TaskState, TaskStatus
from skep.model.task_end import EndCause, TaskEnd
from skep.model.values.ids import NodeId, SecretId, TaskId
from skep.model.values.times import SECOND_NS, Timestamp
from skep.store.interface import Created, Deleted, Event, Updated
from skep.store.kinds import Payload, Revocation
from skep.store.state import State
from tests.support.builders import a_node, a_service, a_service_spec, a_task

NOW = Timestamp("2026-01-31T12:00:00Z")
EARLIER, LATER = Timestamp("2026-01-31T11:00:00Z"), Timestamp("2026-01-31T11:30:00Z")


class Known(State):
    """A view with some objects."""

    def __init__(self, *objects: object) -> None:
        super().__init__()
        for one in objects:
            self.table_by_type[type(one)].store(one.id, None, one, moves=True)  # type: ignore[arg-type, attr-defined]


def entries(event: Event, *known: object) -> Sequence[JournalEntry]:
    return list(entries_of(event, Known(*known)))


def told(event: Event, *known: object) -> list[tuple[str, str]]:
    return [(entry.action, entry.message) for entry in entries(event, *known)]


def at(state: TaskState, **status: object) -> TaskStatus:
    return TaskStatus(state=state, **status)  # type: ignore[arg-type]


# -- tasks ---------------------------------------------------------------------------------------------------------


def test_the_first_task_of_a_slot_has_an_entry_when_it_runs() -> None:
    task = a_task("t1", service="web", slot=2, node="n1", state=TaskState.ASSIGNED)
    web, node = a_service("web"), a_node("n1")
    assert told(Created(task), web, task) == []
    (entry,) = entries(Updated(task, replace(task, status=at(TaskState.RUNNING))), web, node)
    assert (entry.action, entry.name, entry.service, entry.node_id) == ("start", "web.2", "web", "n1")
    assert (entry.kind, entry.severity) == (EntryType.CHANGE, Severity.INFO)


def test_a_task_that_fails_has_an_entry_with_its_end() -> None:
    task = a_task("t1", service="web", node="n1")
    end = TaskEnd(cause="out-of-memory")
    container = ContainerStatus(container_id="c", exit_code=137)
    failed = at(TaskState.FAILED, err="task: non-zero exit (137)", container_status=container, end=end)
    (entry,) = entries(Updated(task, replace(task, status=failed)), a_service("web"), a_node("n1"))
    assert (entry.action, entry.severity) == ("fail", Severity.ERROR)
    assert entry.message == f"task web.1 on {entry.node} failed: out of memory"


def replaced(last: Task, *known: object, **fields: object) -> str:
    """The reason that is told when a second task comes into the slot of ``last``."""
    last = replace(last, created_at=EARLIER)
    next_one = replace(last, id="t2", created_at=LATER, status=at(TaskState.NEW), node_id="", **fields)
    (entry,) = entries(Created(next_one), a_service("web"), last, next_one, *known)
    assert (entry.action, entry.task_id, entry.name) == ("replace", "t2", "web.1")
    return entry.message.partition(" is replaced: ")[2]


def test_every_task_that_is_replaced_has_a_reason() -> None:
    last = a_task("t1", service="web", node="n1")
    down = replace(a_node("n1"), status=NodeStatus(state=NodeState.DOWN, message="heartbeat failure"))
    name = down.description.hostname or down.id
    assert replaced(last, down) == f"its node {name} is down: heartbeat failure"
    assert replaced(last, a_node("n1", availability=Availability.DRAIN)) == f"its node {name} is drained"
    assert replaced(last) == "its node was removed"
    failed = replace(last, status=at(TaskState.FAILED, err="no space left"))
    assert replaced(failed, a_node("n1")) == "it failed: no space left"
    assert replaced(replace(last, status=at(TaskState.REJECTED, err="no such image"))) == (
        "it was rejected: no such image"
    )
    assert replaced(replace(last, status=at(TaskState.COMPLETE))) == "its process ended with code 0"
    assert replaced(last, a_node("n1")) == f"it no longer fits its node {name}, or was stopped"
    assert replaced(replace(last, node_id="")) == "it had no node yet"


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (StopCause.NODE_DOWN, "its node {name} was down"),
        (StopCause.NODE_DRAINED, "its node {name} was drained"),
        (StopCause.NODE_UNFIT, "its node {name} no longer met its constraints"),
    ],
)
def test_a_task_that_left_its_node_has_the_cause_after_the_node_is_back(cause: StopCause, words: str) -> None:
    node = a_node("n1")
    last = replace(
        a_task("t1", service="web", node="n1"),
        restart=Restart(was_stopped=True, stop_cause=cause.value),
        status=at(TaskState.FAILED, err="task: non-zero exit (143)"),
    )
    assert replaced(last, node) == words.format(name=node.description.hostname or node.id)
    down = replace(node, status=NodeStatus(state=NodeState.DOWN, message="heartbeat failure"))
    assert replaced(replace(last, status=at(TaskState.RUNNING)), down).endswith(" is down: heartbeat failure")


def test_a_task_that_left_for_another_one_says_for_which() -> None:
    reason = Preemption(task_id=TaskId("t9"), service="shop", priority=10)
    last = replace(a_task("t1", service="web", node="n1"), preemption=reason)
    assert replaced(last, a_node("n1")) == "it was preempted by a task of shop, priority 10"
    stopped = Updated(last, replace(last, status=at(TaskState.SHUTDOWN)))
    ((action, message),) = told(stopped, a_service("web"), a_node("n1"))
    assert action == "stop"
    assert message.endswith("was stopped: preempted by a task of shop, priority 10")


def test_a_task_that_was_killed_at_its_stop_says_so() -> None:
    last = a_task("t1", service="web", node="n1")
    killed = TaskEnd(cause=EndCause.STOP_TIMEOUT.value, grace=3 * SECOND_NS)
    ((_, message),) = told(Updated(last, replace(last, status=at(TaskState.SHUTDOWN, end=killed))))
    assert message.endswith("was stopped: killed: it did not end within 3 s of its stop signal")
    ((_, message),) = told(Updated(last, replace(last, status=at(TaskState.SHUTDOWN))))
    assert message.endswith("was stopped")
    drained = Restart(was_stopped=True, stop_cause=StopCause.NODE_DRAINED.value)
    left = replace(last, restart=drained, status=at(TaskState.SHUTDOWN, end=killed))
    ((_, message),) = told(Updated(last, left), a_node("n1"))
    because = "because its node n1 was drained: killed: it did not end within 3 s"
    assert f"was stopped, {because}" in message, "a task of a global service has no successor that says so"


def test_a_task_that_is_lost_with_its_node_and_not_restarted_says_so_at_once() -> None:
    task = a_task("t1", service="web", node="n1")
    never = replace(task.spec, restart_policy=RestartPolicy(condition=RestartCondition.NONE))
    for spec, expected in ((never, ["give-up"]), (task.spec, [])):
        runs = replace(task, spec=spec)
        lost = Restart(was_stopped=True, stop_cause=StopCause.NODE_DOWN.value)
        left = replace(runs, desired_state=TaskState.SHUTDOWN, restart=lost)
        found = told(Updated(runs, left), a_service("web"), a_node("n1"))
        assert [action for action, _ in found] == expected, "the entry of a successor names the node"
    ((_, message),) = told(
        Updated(replace(task, spec=never), replace(left, spec=never)), a_service("web"), a_node("n1")
    )
    assert message == "task web.1 is not restarted, by its restart policy: its node n1 was down"
    again = Updated(replace(left, spec=never), replace(left, spec=never, preemption=None))
    assert not told(again, a_service("web"), a_node("n1"))


@pytest.mark.parametrize("was_stopped", [False, True])
def test_an_end_that_nobody_saw_is_named_once_and_without_a_made_up_exit_code(was_stopped: bool) -> None:
    """A task that was replaced while its node was down has the same reason as any other."""
    task = replace(a_task("t1", service="web", node="n1"), restart=Restart(was_stopped=was_stopped))
    err = "task: non-zero exit (255): the container's monitor was lost: its container monitor was killed"
    container = ContainerStatus(container_id="c", exit_code=255)
    end = TaskEnd(cause=EndCause.MONITOR_LOST.value)
    failed = at(TaskState.FAILED, err=err, container_status=container, end=end)
    (entry,) = entries(Updated(task, replace(task, status=failed)), a_service("web"), a_node("n1"))
    assert entry.message == f"task web.1 on {entry.node} failed: its container monitor was killed"


def test_a_task_that_an_update_replaces_has_an_entry_with_both_images() -> None:
    last = a_task("t1", service="web", node="n1")
    new = a_service_spec(image="busybox:2@sha256:1").task_template
    version = replace(last.spec_version, index=99) if last.spec_version is not None else None
    assert version is not None
    reason = replaced(last, a_node("n1"), spec=new, spec_version=version)
    assert reason.startswith("its service was updated")
    assert "→ busybox:2" in reason
    assert replaced(last, a_node("n1"), spec_version=version) == "its service was updated"


def test_a_task_that_a_rollback_left_is_replaced_for_what_comes_later() -> None:
    last = a_task("t1", service="web", node="n1")
    assert last.spec_version is not None
    drained = a_node("n1")
    drained = replace(drained, spec=replace(drained.spec, availability=Availability.DRAIN))
    reason = replaced(last, drained, spec_version=replace(last.spec_version, index=99))
    assert reason.endswith("is drained")


def test_credentials_in_what_a_node_reports_are_masked() -> None:
    status = TaskStatus(state=TaskState.REJECTED, err="cannot pull https://bot:hunter2@registry/web")
    (entry,) = entries(Updated(a_task("t1"), replace(a_task("t1"), status=status)))
    assert "was rejected: cannot pull https://bot:***@registry/web" in entry.message


def test_a_thousand_tasks_of_one_service_are_a_few_entries() -> None:
    many = [
        JournalEntry(type="task", action="start", service_id="s", service="web", message=f"m{n}", revision=n)
        for n in range(1000)
    ]
    lone = JournalEntry(type="task", action="fail", service_id="s", message="why")
    found = folded([*many[:500], lone, *many[500:]])
    assert len(found) == 21
    assert lone in found
    assert sum(one.count for one in found) == 1001
    assert found[19].message == "m19, and 980 more tasks of web"


# -- services --------------------------------------------------------------------------------------------------------


def test_an_update_names_what_changed_and_no_value() -> None:
    old = a_service("web", spec=a_service_spec(replicas=1, image="busybox:1"))
    spec = a_service_spec(replicas=3, image="busybox:2")
    container = spec.task_template.container_spec
    assert container is not None
    container = replace(container, env=("DB_PASSWORD=hunter2", "X=1"))
    spec = replace(spec, task_template=replace(spec.task_template, container_spec=container))
    (entry,) = entries(Updated(old, replace(old, spec=spec)))
    assert entry.message == (
        "service web updated: image busybox:1 → busybox:2; replicas 1 → 3; environment +DB_PASSWORD +X"
    )


@pytest.mark.parametrize(
    ("state", "action", "severity"),
    [
        (UpdateState.PAUSED, "update-paused", Severity.ERROR),
        (UpdateState.ROLLBACK_STARTED, "rollback-started", Severity.WARNING),
        (UpdateState.COMPLETED, "update-completed", Severity.INFO),
    ],
)
def test_the_states_of_an_update_have_one_entry_each(
    state: UpdateState, action: str, severity: Severity
) -> None:
    old = a_service("web")
    new = replace(old, update_status=UpdateStatus(state=state, message="update paused: task web.1 failed"))
    (entry,) = entries(Updated(old, new))
    assert (entry.action, entry.severity) == (action, severity)
    assert "task web.1 failed" in entry.message
    status = new.update_status
    assert status is not None
    assert entries(Updated(new, replace(new, update_status=replace(status, message="other")))) == []


def test_a_removed_service_has_an_entry_when_the_user_removes_it() -> None:
    old = a_service("web")
    gone = replace(old, removed_at=NOW)
    assert told(Updated(old, gone)) == [("remove", "service web was removed")]
    assert told(Deleted(gone)) == []


# -- the rest --------------------------------------------------------------------------------------------------------


def test_nodes_and_their_managers() -> None:
    node = a_node("n1", role=NodeRole.MANAGER)
    name = node.description.hostname or node.id
    down = replace(node, status=NodeStatus(state=NodeState.DOWN, message="no heartbeat"))
    assert told(Updated(node, down)) == [("down", f"node {name} is down: no heartbeat")]
    assert told(Updated(down, node)) == [("up", f"node {name} is ready")]
    leads = replace(node, manager_status=ManagerStatus(leader=True))
    assert told(Updated(node, leads)) == [("leader", f"manager {name} became the leader")]
    assert told(Updated(leads, leads)) == []
    assert told(Deleted(node)) == [("remove", f"node {name} was removed")]


def test_each_eviction_of_a_node_has_an_entry_with_its_user() -> None:
    first = Eviction(
        node_id=NodeId("n1"),
        hostname="n1",
        was_manager=False,
        asked_by="ada",
        asked_through=NodeId("m1"),
        asked_at=EARLIER,
        done=WORKER_STEPS,
    )
    again = replace(first, asked_by="bob", asked_at=LATER, done=())
    before, after = (Payload(id=EVICTION_ID, data=one.encode()) for one in (first, again))
    assert told(Updated(before, after)) == [("evict", "eviction of node n1 requested by bob")]
    waits = Payload(id=EVICTION_ID, data=replace(again, waits_for="a node").encode())
    assert told(Updated(after, waits)) == []


def test_of_secrets_only_their_names_are_recorded() -> None:
    secret = Secret(id=SecretId("s"), spec=SecretSpec(name="db"))
    assert told(Created(secret)) == [("create", "secret db created")]
    assert told(Created(Payload(id="secret/s", data=b"hunter2"))) == []


def test_the_same_request_many_times_is_one_entry() -> None:
    ask = JournalEntry(
        kind=EntryType.REQUEST, method="POST", path="/services/x/update", status=404, by=By(uid=0)
    )
    other = replace(ask, by=By(uid=7))
    found = folded_requests([replace(ask, id="1"), other, replace(ask, id="2"), replace(ask, id="3")])
    assert [(one.id, one.count) for one in found] == [("", 1), ("3", 3)]


def test_a_number_that_autoscaling_has_set_is_told_with_its_reason() -> None:
    old = a_service("web", replicas=2)
    done = Autoscaled(before=2, after=4, reason="cpu 140%, target 70%, over 2 tasks", at=NOW)
    new = replace(old, spec=a_service_spec("web", replicas=4), autoscaled=done)
    assert told(Updated(old, new)) == [
        ("autoscale", "service web autoscaled: replicas 2 → 4 (cpu 140%, target 70%, over 2 tasks)")
    ]
    by_hand = replace(new, spec=a_service_spec("web", replicas=3))
    assert told(Updated(new, by_hand)) == [("update", "service web updated: replicas 4 → 3")]


def test_measures_that_are_not_known_are_told_once_and_so_is_their_return() -> None:
    well = a_service("web", replicas=2)
    ill = replace(well, autoscaling_problem="query not known: timeout")
    lacks = "autoscaling of service web lacks measures: query not known: timeout"
    assert told(Updated(well, ill)) == [("autoscale", lacks)]
    assert told(Updated(ill, replace(ill, spec_version=None))) == []
    assert told(Updated(ill, well)) == [
        ("autoscale", "autoscaling of service web has all its measures again")
    ]


def test_a_disk_that_fills_and_has_space_again_is_told_once_each() -> None:
    node = a_node("n1")

    def full(words: str) -> Node:
        engine = EngineDescription(labels={DISK_PRESSURE_LABEL: words})
        return replace(node, description=replace(node.description, engine=engine))

    first = full("the disk at /d is 96 % full, 1.0 GiB left: no new tasks until it is below 93 %")
    assert told(Updated(node, first)) == [
        (
            "disk-full",
            "node n1: the disk at /d is 96 % full, 1.0 GiB left: no new tasks until it is below 93 %",
        )
    ]
    assert told(Updated(first, full("the disk at /d is 98 % full"))) == []
    assert told(Updated(first, node)) == [("disk-free", "the disk of node n1 has space again")]


def test_tasks_of_a_removed_node_keep_its_name() -> None:
    web = a_service("web")
    task = replace(a_task("t1", service=web, slot=0, node="n9"), status=at(TaskState.RUNNING))
    gone = Revocation(id="n9", until=Timestamp("2027-01-01T00:00:00Z"), is_removed=True, hostname="w9")
    lost = replace(task, status=at(TaskState.ORPHANED))
    (entry,) = entries(Updated(task, lost), web, gone, lost)
    assert (entry.message, entry.node) == ("task web.w9 on w9 was lost, because its node was removed", "w9")
