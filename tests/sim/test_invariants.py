"""Every rule rejects a history in which it was broken on purpose, and takes the same history without the fault."""

from math import inf

import msgspec
import pytest
from msgspec.structs import replace

from sim.invariants.acknowledgements import Acknowledgements
from sim.invariants.liveness import NoFalseDown, lease_violations
from sim.invariants.quiescence import replica_violations, rest_violations
from sim.invariants.services.tasks import (
    TasksAreSpread,
    UpdatesKeepServing,
    jobs_keep_within_bounds,
    names_are_unique,
    nodes_are_not_overcommitted,
    slots_are_filled_once,
    tasks_move_forward,
)
from sim.invariants.writers import one_leader_writes, session_owners_report, sessions_are_claimed
from skep.model.container import ContainerSpec, Mount
from skep.model.node import NodeState
from skep.model.options.labels import VOLUME_AFFINITY
from skep.model.service import (
    ReplicatedJob,
    Service,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    UpdateOrder,
)
from skep.model.task import Preemption, TaskState, TaskStatus, VolumeAttachment
from skep.model.values.ids import ServiceId, TaskId
from skep.model.values.meta import Version
from skep.model.volume import PublishState, VolumeScope, VolumeSharing
from skep.store.state import State
from skep.store.transactions.transaction import LocalTransaction
from tests.sim.histories import LEADER, OTHER, W1, W2, W3, History, a_node, a_run, a_service, a_task
from tests.support.builders import a_cluster_volume, a_service_spec, with_disks


def test_a_state_that_goes_back_is_rejected() -> None:
    history = History(tasks_move_forward)
    history.put(a_task("t1", node="w1", state=TaskState.RUNNING))
    assert history.violations == []
    history.put(a_task("t1", node="w1", state=TaskState.READY))
    assert history.violations == ["task t1 went back from running to ready"]


def test_a_task_that_moves_to_another_node_is_rejected() -> None:
    history = History(tasks_move_forward)
    history.put(
        a_task("t1", node="w1", state=TaskState.ASSIGNED), a_task("t1", node="w2", state=TaskState.ASSIGNED)
    )
    assert history.violations == ["task t1 moved from w1 to w2"]


@pytest.mark.parametrize(("order", "allowed"), [(UpdateOrder.STOP_FIRST, 1), (UpdateOrder.START_FIRST, 2)])
def test_a_slot_with_too_many_wanted_tasks_is_rejected(order: UpdateOrder, allowed: int) -> None:
    history = History(slots_are_filled_once)
    history.put(a_service(order), *(a_task(f"t{number}") for number in range(allowed)))
    assert history.violations == []
    history.put(a_task("t9"))
    assert len(history.violations) == 1


def test_a_slot_of_a_job_with_two_wanted_tasks_of_one_iteration_is_rejected() -> None:
    history = History(slots_are_filled_once)
    history.put(a_service(), a_run("t1", iteration=1), a_run("t2", iteration=2))
    assert history.violations == []
    history.put(a_run("t3", iteration=2))
    assert history.violations == ["slot 1 of web is filled by ['t2', 't3']"]


def test_more_runs_of_a_job_at_a_time_than_allowed_are_rejected() -> None:
    history = History(jobs_keep_within_bounds)
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=2, total_completions=5))
    history.put(
        Service(id=ServiceId("web"), spec=ServiceSpec(name="web", mode=mode, task_template=TaskSpec()))
    )
    version = history.state.get(Service, "web").spec_version
    history.put(*(a_run(f"t{slot}", slot=slot, spec_version=version) for slot in (1, 2)))
    done = msgspec.structs.replace(
        a_run("t1", spec_version=version), status=TaskStatus(state=TaskState.COMPLETE)
    )
    history.put(done, a_run("t3", slot=3, spec_version=version))
    assert history.violations == []
    history.put(a_run("t4", slot=4, spec_version=version))
    assert history.violations == ["job web has 3 tasks under way, 2 may be"]


def test_a_name_of_two_services_is_rejected() -> None:
    history = History(names_are_unique)
    history.put(a_service(), a_service(id="other", name="db"))
    assert history.violations == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalTransaction, "_claim", lambda *_: None)
        history.put(a_service(id="third"))
    assert history.violations == ["name web belongs to ['third', 'web']"]


def test_an_overcommitted_node_is_rejected() -> None:
    history = History(nodes_are_not_overcommitted)
    history.put(a_node(W1), a_task("t1", memory=600 << 20), a_task("t2", slot=2, memory=600 << 20))
    history.put(a_task("t1", memory=600 << 20, node="w1", state=TaskState.ASSIGNED))
    assert history.violations == []
    history.put(a_task("t2", slot=2, memory=600 << 20, node="w1", state=TaskState.ASSIGNED))
    assert history.violations == ["memory of w1 is over-committed"]


def test_a_task_on_the_fuller_node_is_rejected_while_nodes_are_quiet() -> None:
    history = History(TasksAreSpread(frozenset))
    history.put(a_node(W1), a_node(W2), a_service(), *(a_task(f"t{slot}", slot=slot) for slot in (1, 2, 3)))
    history.after(10).put(a_task("t1", slot=1, node="w1", state=TaskState.ASSIGNED))
    history.put(a_task("t2", slot=2, node="w1", state=TaskState.ASSIGNED))
    assert history.violations == []
    history.put(a_task("t3", slot=3, node="w1", state=TaskState.ASSIGNED))
    assert len(history.violations) == 1


@pytest.mark.parametrize(("affinity", "is_wrong"), [("preferred", False), ("none", True)])
def test_tasks_that_may_return_to_their_data_need_not_be_spread(affinity: str, is_wrong: bool) -> None:
    history = History(TasksAreSpread(frozenset))
    mount = Mount(type="volume", source="data-{{.Task.Slot}}", target="/data")
    template = TaskSpec(container_spec=ContainerSpec(image="app:1", mounts=(mount,)))
    service = a_service()
    spec = replace(service.spec, task_template=template, labels={VOLUME_AFFINITY: affinity})
    history.put(a_node(W1), a_node(W2), replace(service, spec=spec))
    tasks = [replace(a_task(f"t{slot}", slot=slot), spec=template) for slot in (1, 2, 3)]
    history.put(*tasks)
    history.after(10)
    history.put(*(replace(one, node_id=W1, status=TaskStatus(state=TaskState.ASSIGNED)) for one in tasks))
    assert bool(history.violations) is is_wrong


@pytest.mark.parametrize(
    ("on", "released_s", "is_wrong"),
    [
        ({}, 0.0, True),
        ({"w2": PublishState.PUBLISHED}, 0.0, True),
        ({"w2": PublishState.PENDING_NODE_UNPUBLISH}, 0.0, False),
        ({"w2": PublishState.PENDING_NODE_UNPUBLISH}, 0.1, False),
        ({"w2": PublishState.PENDING_NODE_UNPUBLISH}, TasksAreSpread.KNOWN_S + 1, True),
    ],
)
def test_tasks_with_cluster_volumes_are_spread_over_the_nodes_that_can_have_them(
    on: dict[str, PublishState], released_s: float, is_wrong: bool
) -> None:
    """``released_s``: seconds since the node has released the volume, or 0 if that is not over."""
    history = History(TasksAreSpread(frozenset))
    nodes = [with_disks(a_node(W1)), with_disks(a_node(W2))]
    history.put(*nodes, a_service(), *(a_task(f"t{slot}", slot=slot) for slot in (1, 2, 3)))
    volume = a_cluster_volume(scope=VolumeScope.MULTI, sharing=VolumeSharing.ALL)
    history.put(volume)
    history.put(a_cluster_volume(on=on, scope=VolumeScope.MULTI, sharing=VolumeSharing.ALL))
    history.after(10)
    if released_s:
        history.put(volume)
        history.after(released_s)
    for slot in (1, 2, 3):
        task = a_task(f"t{slot}", slot=slot, node="w1", state=TaskState.ASSIGNED)
        history.put(replace(task, volumes=(VolumeAttachment(id=volume.id, source="orders", target="/d"),)))
    assert bool(history.violations) is is_wrong


@pytest.mark.parametrize(("known_s", "is_wrong"), [(0.1, False), (TasksAreSpread.KNOWN_S + 1, True)])
def test_an_end_that_the_leader_may_not_have_seen_does_not_make_another_node_the_fuller_one(
    known_s: float, is_wrong: bool
) -> None:
    history = History(TasksAreSpread(frozenset))
    others = [a_task(f"t{slot}", slot=slot, node="w2", state=TaskState.RUNNING) for slot in (4, 5)]
    history.put(a_node(W1), a_node(W2), a_service(), *others)
    history.put(*(a_task(f"t{slot}", slot=slot) for slot in (1, 2, 3)))
    history.after(10).put(*(replace(one, status=TaskStatus(state=TaskState.SHUTDOWN)) for one in others))
    history.after(known_s)
    for slot in (1, 2, 3):
        history.put(a_task(f"t{slot}", slot=slot, node="w1", state=TaskState.ASSIGNED))
    assert bool(history.violations) is is_wrong


def test_a_task_is_not_on_the_fuller_node_while_no_node_that_takes_tasks_can_be_read() -> None:
    history = History(TasksAreSpread(lambda: {W1}))
    history.put(a_node(W1), a_service(), *(a_task(f"t{slot}", slot=slot) for slot in (1, 2, 3)))
    history.after(10)
    for slot in (1, 2, 3):
        history.put(a_task(f"t{slot}", slot=slot, node="w1", state=TaskState.ASSIGNED))
    assert history.violations == []


def test_a_task_whose_slot_has_a_newer_one_does_not_count_where_tasks_go() -> None:
    history = History(TasksAreSpread(frozenset))
    history.put(a_node(W1), a_node(W2), a_service())
    old = [a_task(f"old{slot}", slot=slot, node="w1", state=TaskState.RUNNING) for slot in range(1, 5)]
    new = [
        replace(a_task(f"new{slot}", slot=slot), created_at="2026-01-01T00:00:00Z") for slot in range(1, 5)
    ]
    history.put(*old, *new)
    history.after(10)
    for task, node in zip(new, (W1, W2, W1, W2), strict=True):
        history.put(replace(task, node_id=node, status=TaskStatus(state=TaskState.ASSIGNED)))
    assert history.violations == []


def test_with_start_first_a_task_that_stops_before_its_replacement_runs_is_rejected() -> None:
    history = History(UpdatesKeepServing())
    history.put(
        a_node(W1), a_service(UpdateOrder.START_FIRST), a_task("old", node="w1", state=TaskState.RUNNING)
    )
    history.put(a_task("new", image="app:2", node="w1", state=TaskState.PREPARING))
    assert history.violations == []
    history.put(a_task("old", node="w1", state=TaskState.RUNNING, desired=TaskState.SHUTDOWN))
    assert history.violations == ["task old was stopped before ['new'] ran"]


def test_with_start_first_a_task_is_preempted_before_its_replacement_runs() -> None:
    history = History(UpdatesKeepServing())
    old = a_task("old", node="w1", state=TaskState.RUNNING)
    history.put(a_node(W1), a_service(UpdateOrder.START_FIRST), old)
    history.put(a_task("new", image="app:2", node="w1", state=TaskState.PREPARING))
    preemption = Preemption(task_id=TaskId("t9"), service="db", priority=10)
    history.put(replace(old, preemption=preemption, desired_state=TaskState.SHUTDOWN))
    assert history.violations == []


def test_with_start_first_a_task_may_be_stopped_in_the_commit_in_which_its_node_is_back() -> None:
    history = History(UpdatesKeepServing())
    old = a_task("old", node="w1", state=TaskState.RUNNING)
    history.put(a_node(W1, state=NodeState.DOWN), a_service(UpdateOrder.START_FIRST), old)
    history.put(a_task("new", image="app:2", state=TaskState.PENDING))
    history.after(60)
    stopped = a_task("old", node="w1", state=TaskState.RUNNING, desired=TaskState.SHUTDOWN)
    history.commit(lambda tx: (tx.put(stopped), tx.put(a_node(W1))))
    assert history.violations == []


def test_with_start_first_a_task_that_has_just_started_may_be_stopped() -> None:
    history = History(UpdatesKeepServing())
    history.put(a_node(W1), a_service(UpdateOrder.START_FIRST), a_task("old", node="w1"))
    history.put(a_task("new", image="app:2", node="w1"), a_task("old", node="w1", state=TaskState.RUNNING))
    history.after(1).put(a_task("old", node="w1", state=TaskState.RUNNING, desired=TaskState.SHUTDOWN))
    assert history.violations == []


def test_with_start_first_no_task_is_stopped_whose_refused_successor_has_got_a_node() -> None:
    """Not even a moment later: the leader decides to stop it for a successor that was refused every node."""
    history = History(UpdatesKeepServing())
    old = a_task("old", node="w1", state=TaskState.RUNNING)
    history.put(a_node(W1), a_service(UpdateOrder.START_FIRST), old)
    new = a_task("new", image="app:2", state=TaskState.PENDING)
    history.put(replace(new, status=replace(new.status, err="no suitable node")))
    history.put(a_task("new", image="app:2", node="w2", state=TaskState.ASSIGNED))
    history.after(0.1).put(replace(old, desired_state=TaskState.SHUTDOWN))
    assert history.violations


def test_a_slot_that_is_removed_waits_for_no_replacement() -> None:
    history = History(UpdatesKeepServing())
    history.put(a_node(W1), a_service(UpdateOrder.START_FIRST))
    history.put(a_task("old", node="w1", state=TaskState.RUNNING), a_task("new", image="app:2", node="w1"))
    history.put(a_task("old", node="w1", state=TaskState.RUNNING, desired=TaskState.REMOVE))
    assert history.violations == []


def test_a_task_written_by_a_follower_is_rejected() -> None:
    history = History(one_leader_writes)
    history.put(a_task("t1"))
    assert history.violations == []
    history.put(a_task("t2"), by=OTHER)
    assert history.violations == ["m2 wrote task t2, while m1 leads"]


def test_a_report_written_without_the_session_is_rejected() -> None:
    history = History(session_owners_report)
    history.put(a_node(W1, owner=OTHER), a_task("t1", node="w1", state=TaskState.ASSIGNED))
    history.put(a_task("t1", node="w1", state=TaskState.ACCEPTED), by=OTHER)
    assert history.violations == []
    history.put(a_task("t1", node="w1", state=TaskState.RUNNING), by=LEADER)
    assert history.violations == ["m1 wrote a report of w1 on t1; m2 has its session"]


def test_a_node_marked_down_without_the_session_is_rejected() -> None:
    history = History(session_owners_report)
    history.put(a_node(W1, owner=OTHER))
    history.put(a_node(W1, owner=OTHER, state=NodeState.DOWN), by=LEADER)
    assert history.violations == ["m1 marked w1 down; m2 has its session"]


def test_a_session_that_is_given_away_is_rejected() -> None:
    history = History(sessions_are_claimed)
    history.put(a_node(W1, owner=OTHER))
    history.put(a_node(W1, owner=LEADER, session="s2"), by=LEADER)
    assert history.violations == []
    history.put(a_node(W1, owner=OTHER, session="s3"), by=LEADER)
    assert history.violations == ["m1 made m2 the owner of the session of w1"]


def test_a_node_marked_down_without_a_fault_is_rejected() -> None:
    up_since = {W1: 0.0, W2: 0.0, W3: inf}
    history = History(NoFalseDown(lambda: 90.0, up_since.__getitem__, lambda manager: 0.0))
    history.put(a_node(W1), a_node(W2), a_node(W3))
    history.put(a_node(W1, state=NodeState.DOWN))
    assert history.violations == [], "something was wrong ten seconds ago"
    history.after(10).put(a_node(W3, state=NodeState.DOWN))
    assert history.violations == [], "it has left"
    history.put(a_node(W2, state=NodeState.DOWN))
    assert history.violations == ["w2 was marked down after 20.0 s without a fault"]


def test_a_node_marked_down_by_a_manager_that_has_just_started_is_rejected() -> None:
    history = History(NoFalseDown(lambda: 99.0, lambda node: 0.0, lambda manager: 99.0))
    history.put(a_node(W1), a_node(W2))
    history.put(a_node(W1, state=NodeState.DOWN))
    history.after(4).put(a_node(W2, state=NodeState.DOWN))
    assert history.violations == ["w1 was marked down by m1, 1.0 s after its start"]


def test_a_task_shown_as_running_on_a_node_whose_lease_is_over_is_rejected() -> None:
    history = History()
    history.put(a_node(W1, state=NodeState.DOWN), a_task("t1", node="w1", state=TaskState.RUNNING))
    assert list(lease_violations(history.state, W1)) == [], "it is shown as unknown"
    history.put(a_node(W1))
    assert list(lease_violations(history.state, W1)) == [
        "task t1 is shown as running on w1, whose lease has expired"
    ]


class Observed:
    """A service whose creation was acknowledged."""

    def __init__(self) -> None:
        self.acknowledgements = Acknowledgements()
        self.history = History(self.acknowledgements)
        self.service = a_service()
        self.acknowledgements.requested(self.service.id, self.service.spec)
        self.history.put(self.service)
        stored = self.history.state.get(Service, "web")
        self.history.note(self.acknowledgements.acknowledge(stored, self.history.state))
        assert self.history.violations == []


def test_an_acknowledged_service_that_vanishes_is_rejected() -> None:
    reported = Observed()
    reported.history.commit(lambda tx: tx.delete(Service, "web"))
    assert reported.history.violations == ["service web vanished"]


def test_an_acknowledged_write_that_a_later_read_does_not_show_is_rejected() -> None:
    reported = Observed()
    assert (
        list(reported.acknowledgements.broken(reported.history.state, reported.acknowledgements.given()))
        == []
    )
    assert list(reported.acknowledgements.broken(State(), reported.acknowledgements.given())) == [
        "service web, acknowledged at 1, is not there"
    ]


def test_a_spec_that_was_not_requested_is_rejected() -> None:
    reported = Observed()
    reported.history.put(msgspec.structs.replace(reported.service, spec=a_service_spec("web", replicas=7)))
    assert reported.history.violations == ["service web got a spec that was not requested"]


def test_an_acknowledgement_of_what_is_not_committed_is_rejected() -> None:
    reported = Observed()
    later = msgspec.structs.replace(reported.service, version=Version(index=9))
    assert list(reported.acknowledgements.acknowledge(later, reported.history.state)) == [
        "service web is at 1, 9 was acknowledged"
    ]


def test_a_refused_service_that_exists_is_rejected() -> None:
    reported = Observed()
    record = reported.acknowledgements.services[ServiceId("web")]
    assert list(reported.acknowledgements.refused(record, reported.history.state)) == [
        "service web exists, though its creation was refused"
    ]


def test_a_refused_update_that_takes_effect_is_rejected() -> None:
    reported = Observed()
    spec = a_service_spec("web", replicas=7)
    reported.acknowledgements.requested(ServiceId("web"), spec)
    reported.history.put(msgspec.structs.replace(reported.service, spec=spec))
    assert reported.history.violations == []
    refused = reported.acknowledgements.refused_update(ServiceId("web"), spec, reported.history.state)
    assert list(refused) == ["service web got a spec that was refused"]


def test_a_running_task_without_a_container_is_rejected_at_rest() -> None:
    history = History()
    history.put(a_service())
    task = a_task("t1", node="w1", state=TaskState.RUNNING)
    history.put(task)
    assert list(rest_violations(history.state, [(W1, task)])) == []
    assert list(rest_violations(history.state, [])) == [
        "task t1 is reported as running on w1 and does not run"
    ]


def test_a_container_without_a_task_is_rejected_at_rest() -> None:
    stranger = a_task("t9", node="w1", state=TaskState.RUNNING)
    assert list(rest_violations(State(), [(W1, stranger)])) == [
        "container of task t9 on w1 belongs to no task that is to run there"
    ]


def test_state_that_a_node_keeps_of_a_removed_task_is_rejected_at_rest() -> None:
    history = History()
    history.put(a_service())
    history.put(a_task("here", node=W1, state=TaskState.COMPLETE, desired=TaskState.SHUTDOWN))
    kept = [(W1, TaskId("here")), (W1, TaskId("gone")), (W2, TaskId("here"))]
    assert list(rest_violations(history.state, [], kept)) == [
        "w1 keeps state of task gone, which is not assigned to it",
        "w2 keeps state of task here, which is not assigned to it",
    ]


def test_a_replica_that_differs_from_the_store_is_rejected() -> None:
    history, other = History(), History()
    history.put(a_node(W1))
    other.put(a_node(W2))
    assert list(replica_violations(LEADER, history.state, history.state)) == []
    assert len(list(replica_violations(LEADER, other.state, history.state))) == 2
    assert list(replica_violations(LEADER, State(), history.state)) == ["the replica of m1 is at 0 of 1"]
