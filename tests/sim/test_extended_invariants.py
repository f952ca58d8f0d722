"""The rules on what Docker does not have reject a history that violates them."""

from random import Random

import pytest
from msgspec.structs import replace

from sim.invariants.failures import FailedServices
from sim.invariants.nodes.placement import is_unplaceable
from sim.invariants.nodes.volumes import OnlyCopiesStay
from sim.invariants.services.dependencies import DependenciesComeFirst, missing_dependencies
from sim.invariants.services.removals import DisruptionsRemoveNoNode, TimesToLive
from sim.invariants.services.schedules import (
    DECIDED_S,
    SHOWN_S,
    DueTimesAreDecidedOnce,
    RetriesAreBounded,
    RunsKeepTheirNodes,
)
from sim.invariants.writers import SingleWriters
from sim.users.random_specs import Dependencies, a_spec
from sim.users.reference import Accepted, Create, Refused, ServiceState, State, Update, respond
from skep.model.container import Mount
from skep.model.node import Node, NodeState, NodeStatus
from skep.model.options.autoscaling import AUTOSCALE
from skep.model.options.dependencies import DEPENDS_ON
from skep.model.options.labels import JOB_TTL, PRIORITY, VOLUME_AFFINITY
from skep.model.options.schedules import CRON, CRON_CONCURRENCY
from skep.model.permissions.field_rights import SERVICE_LABELS
from skep.model.quota import QuotaSpec
from skep.model.service import (
    GlobalJob,
    JobStart,
    JobStatus,
    ReplicatedService,
    RestartPolicy,
    ScheduleStatus,
    Service,
    ServiceMode,
    ServiceSpec,
    UpdateConfig,
    UpdateOrder,
)
from skep.model.task import Task, TaskState, TaskStatus, VolumeAttachment
from skep.model.task_end import EndCause, TaskEnd
from skep.model.values.ids import ServiceId, VolumeId
from skep.model.values.meta import Version
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import Timestamp, timestamp
from skep.model.volume import (
    AccessMode,
    TypeMount,
    Volume,
    VolumeInfo,
    VolumeScope,
    VolumeSharing,
    VolumeSpec,
)
from tests.sim.histories import W1, W2, W3, History, a_node, a_run, a_service, a_task
from tests.support.builders import a_service_spec

WEB, DB = ServiceId("web"), ServiceId("db")
NOON, NEXT = Timestamp("2026-01-01T12:00:00Z"), Timestamp("2026-01-01T12:01:00Z")


def a_volume(
    *, sharing: VolumeSharing = VolumeSharing.NONE, scope: VolumeScope = VolumeScope.SINGLE
) -> Volume:
    mode = AccessMode(scope=scope, sharing=sharing, mount_volume=TypeMount())
    info = VolumeInfo(volume_id="disk")
    return Volume(id=VolumeId("v"), spec=VolumeSpec(name="v", access_mode=mode), info=info)


def with_volume(task: Task) -> Task:
    return replace(task, volumes=(VolumeAttachment(id="v", source="v", target="/data"),))


def mounting(spec: ServiceSpec, mount: Mount) -> ServiceSpec:
    container = spec.task_template.container_spec
    assert container is not None
    template = replace(spec.task_template, container_spec=replace(container, mounts=(mount,)))
    return replace(spec, task_template=template)


# -- writers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scope", "violations"), [(VolumeScope.SINGLE, 1), (VolumeScope.MULTI, 0)])
def test_a_volume_for_one_node_that_two_machines_write_to(scope: VolumeScope, violations: int) -> None:
    history, rule = History(), SingleWriters()
    history.commit(lambda tx: tx.put(a_volume(scope=scope, sharing=VolumeSharing.ALL)))
    old, new = with_volume(a_task("old")), with_volume(a_task("new"))
    assert list(rule.started(W1, old, history.state)) == []
    assert len(list(rule.started(W2, new, history.state))) == violations
    rule.ended(old.id)
    assert list(rule.started(W2, new, history.state)) == []


@pytest.mark.parametrize(
    ("sharing", "is_reader", "violations"),
    [
        (VolumeSharing.NONE, True, 1),
        (VolumeSharing.ONE_WRITER, False, 1),
        (VolumeSharing.ONE_WRITER, True, 0),
        (VolumeSharing.ALL, False, 0),
    ],
)
def test_two_tasks_of_one_node_with_one_volume(
    sharing: VolumeSharing, is_reader: bool, violations: int
) -> None:
    history, rule = History(), SingleWriters()
    history.commit(lambda tx: tx.put(a_volume(sharing=sharing)))

    def a_user(id: str, *, read_only: bool = False) -> Task:
        mount = Mount(type="cluster", source="v", target="/data", read_only=read_only)
        return replace(with_volume(a_task(id)), spec=mounting(a_service_spec("web"), mount).task_template)

    assert list(rule.started(W1, a_user("first"), history.state)) == []
    assert list(rule.started(W1, a_user("first"), history.state)) == [], "its process has restarted"
    second = a_user("second", read_only=is_reader)
    assert len(list(rule.started(W1, second, history.state))) == violations


def test_who_removes_a_node_says_that_nothing_writes_there() -> None:
    history, rule = History(), SingleWriters()
    history.commit(lambda tx: tx.put(a_volume()))
    rule.given_up = {W1}
    assert list(rule.started(W1, with_volume(a_task("old")), history.state)) == []
    assert list(rule.started(W2, with_volume(a_task("new")), history.state)) == []


@pytest.mark.parametrize(
    ("policy", "is_requested", "violations"),
    [("required", False, 1), ("required", True, 0), ("preferred", False, 0)],
)
def test_a_node_that_is_removed_with_the_only_data_of_a_slot(
    policy: str, is_requested: bool, violations: int
) -> None:
    stored = {W1: {("data", "web", 1)}, W2: set[tuple[str, str, int]]()}
    history = History(OnlyCopiesStay(stored.__getitem__, lambda _: is_requested))
    history.put(a_node(W1), a_node(W2))
    history.put(Service(id=WEB, spec=replace(a_service_spec("web"), labels={VOLUME_AFFINITY: policy})))
    history.commit(lambda tx: tx.delete(Node, W1))
    assert len(history.violations) == violations


def test_a_node_may_go_of_whose_data_another_one_has_a_copy() -> None:
    history = History(OnlyCopiesStay(lambda _: {("data", "web", 1)}, lambda _: False))
    history.put(a_node(W1), a_node(W2))
    history.put(Service(id=WEB, spec=replace(a_service_spec("web"), labels={VOLUME_AFFINITY: "required"})))
    history.commit(lambda tx: tx.delete(Node, W1))
    assert history.violations == []


# -- jobs ------------------------------------------------------------------------------------------------------------


def a_report(run: int) -> Service:
    spec = a_service_spec("report", image="job:1")
    spec = replace(spec, mode=ServiceMode(global_job=GlobalJob()), labels={CRON: "*/1 * * * *"})
    return Service(id=WEB, spec=spec, job_status=JobStatus(job_iteration=Version(index=run)))


def test_a_node_gets_no_task_of_a_run_that_began_before_it_could_take_one() -> None:
    history = History(RunsKeepTheirNodes())
    away = replace(a_node(W2), status=NodeStatus(state=NodeState.DOWN))
    history.put(a_node(W1), away, a_report(0))
    history.put(
        replace(history.state.get(Service, WEB), job_status=JobStatus(job_iteration=Version(index=1)))
    )
    history.after(DECIDED_S + 1).put(
        replace(history.state.get(Node, W2), status=NodeStatus(state=NodeState.READY))
    )
    history.put(a_run("t1", slot=0, node_id=W1))
    assert history.violations == []
    history.put(a_run("t2", slot=0, node_id=W2))
    assert len(history.violations) == 1


def a_due_job(*, labels: dict[str, str] | None = None, run: int = 0) -> Service:
    spec = a_service_spec("report", image="job:1")
    spec = replace(
        spec, mode=ServiceMode(global_job=GlobalJob()), labels={CRON: "*/1 * * * *", **(labels or {})}
    )
    status = JobStatus(
        job_iteration=Version(index=run), last_execution=NOON, schedule=ScheduleStatus(settled=NOON)
    )
    return Service(id=WEB, spec=spec, job_status=status)


def decide(history: History, *, skipped: str = "") -> None:
    """Decide about the minute after noon, as a leader does: start the next run, or skip it."""
    service = history.state.get(Service, WEB)
    assert service.job_status is not None
    run = service.job_status.job_iteration
    after = run if skipped else Version(index=run.index + 1)
    iteration = None if skipped else after
    start = JobStart(at=NEXT, scheduled_at=NEXT, iteration=iteration, skipped=skipped)
    schedule = ScheduleStatus(settled=NEXT, starts=(start,))
    status = replace(service.job_status, job_iteration=after, schedule=schedule)
    history.put(replace(service, job_status=status))


@pytest.mark.parametrize(
    ("state", "concurrency", "violations"),
    [
        (TaskState.RUNNING, "forbid", 1),
        (TaskState.COMPLETE, "forbid", 0),
        (TaskState.RUNNING, "replace", 0),
    ],
)
def test_a_due_run_begins_while_the_one_before_it_runs(
    state: TaskState, concurrency: str, violations: int
) -> None:
    history = History(DueTimesAreDecidedOnce())
    task = replace(a_run("t1", slot=0, iteration=0, node_id=W1), status=TaskStatus(state=state))
    history.put(a_node(W1), a_due_job(labels={CRON_CONCURRENCY: concurrency}), task)
    decide(history)
    assert len(history.violations) == violations, history.violations


@pytest.mark.parametrize(
    ("state", "down_s", "violation"),
    [
        (TaskState.RUNNING, None, ""),
        (TaskState.RUNNING, 1.0, ""),
        (TaskState.RUNNING, DECIDED_S + 1, "which is down"),
        (TaskState.COMPLETE, None, "which has no task of it"),
    ],
)
def test_a_due_time_is_skipped_for_a_node(state: TaskState, down_s: float | None, violation: str) -> None:
    history = History(DueTimesAreDecidedOnce())
    runs = [
        replace(a_run(id, slot=0, iteration=0, node_id=node), status=TaskStatus(state=one))
        for id, node, one in (("t1", W1, state), ("t2", W2, TaskState.RUNNING))
    ]
    history.put(a_node(W1), a_node(W2), a_due_job(), *runs)
    if down_s is not None:
        history.put(replace(history.state.get(Node, W1), status=NodeStatus(state=NodeState.DOWN)))
        history.after(down_s)
    decide(history, skipped=f"run 0 is still going on {W1} and 1 other nodes")
    assert len(history.violations) == bool(violation), history.violations
    assert all(violation in one for one in history.violations)


@pytest.mark.parametrize(("ended_s", "violations"), [(SHOWN_S - 0.1, 0), (SHOWN_S + 0.1, 2)])
def test_a_due_time_is_skipped_for_a_run_whose_end_the_leader_may_not_know(
    ended_s: float, violations: int
) -> None:
    history = History(DueTimesAreDecidedOnce())
    task = a_run("t1", slot=0, iteration=0, node_id=W1)
    history.put(a_node(W1), a_due_job(), replace(task, status=TaskStatus(state=TaskState.RUNNING)))
    history.put(replace(task, status=TaskStatus(state=TaskState.COMPLETE)))
    history.after(ended_s)
    decide(history, skipped=f"run 0 is still going on {W1}")
    assert len(history.violations) == violations, history.violations


@pytest.mark.parametrize(
    ("ended_s", "is_asked", "violations"),
    [(20.0, False, 0), (10.0, False, 1), (10.0, True, 0), (None, False, 1)],
)
def test_a_job_removes_itself_when_its_time_to_live_is_over(
    ended_s: float | None, is_asked: bool, violations: int
) -> None:
    history = History(TimesToLive(lambda _: is_asked))
    spec = replace(a_service_spec("migrate", image="job:1"), labels={JOB_TTL: "20s"})
    job = Service(id=WEB, spec=spec, job_status=JobStatus(job_iteration=Version(index=1)))
    history.put(job, a_run("t1"))
    if ended_s is not None:
        history.put(replace(history.state.get(Task, "t1"), status=TaskStatus(state=TaskState.COMPLETE)))
        history.after(ended_s)
    history.put(replace(job, removed_at=timestamp(1)))
    assert len(history.violations) == violations, history.violations


@pytest.mark.parametrize("is_required", [False, True])
def test_a_job_outlives_its_time_only_while_it_is_required(is_required: bool) -> None:
    rule = TimesToLive(lambda _: False)
    history = History(rule)
    spec = replace(a_service_spec("migrate", image="job:1"), labels={JOB_TTL: "20s"})
    iteration = Version(index=1)
    status = JobStatus(job_iteration=iteration, outcome="completed", settled_iteration=iteration)
    history.put(Service(id=DB, spec=spec, job_status=status))
    history.put(replace(a_run("t1"), service_id=DB, status=TaskStatus(state=TaskState.COMPLETE)))
    if is_required:
        labels = {DEPENDS_ON: "migrate=service_completed_successfully"}
        history.put(Service(id=WEB, spec=replace(a_service_spec("web"), labels=labels)))
    assert list(rule.overdue(history.now + 19, history.state)) == []
    found = list(rule.overdue(history.now + 21, history.state))
    assert found == ([] if is_required else ["job db has outlived its 20 s"])


@pytest.mark.parametrize(
    ("lost", "lasts_s", "is_requested", "violations"),
    [(2, 11.0, False, 1), (1, 11.0, False, 0), (2, 1.0, False, 0), (2, 11.0, True, 0)],
)
def test_a_node_is_removed_while_nodes_are_lost(
    lost: int, lasts_s: float, is_requested: bool, violations: int
) -> None:
    history = History(DisruptionsRemoveNoNode(lambda _: is_requested))
    history.put(a_node(W1), a_node(W2), a_node(W3))
    for id in (W1, W2)[:lost]:
        history.put(replace(history.state.get(Node, id), status=NodeStatus(state=NodeState.DOWN)))
    history.after(lasts_s).commit(lambda tx: tx.delete(Node, W1))
    assert len(history.violations) == violations


def test_a_retried_slot_has_the_attempts_of_its_policy() -> None:
    history = History(RetriesAreBounded())
    history.put(a_report(1))

    def fail(id: str) -> None:
        run = a_run(id, iteration=1)
        run = replace(run, spec=replace(run.spec, restart_policy=RestartPolicy(max_attempts=1)))
        history.put(run)
        history.put(replace(history.state.get(Task, id), status=TaskStatus(state=TaskState.FAILED)))

    for id in ("t1", "t2"):
        fail(id)
    assert history.violations == []
    service = history.state.get(Service, WEB)
    assert service.job_status is not None
    status = replace(service.job_status, retried_until=Timestamp("2026-01-01T00:00:00Z"))
    history.put(replace(service, job_status=status))
    for id in ("t3", "t4"):
        fail(id)
    assert history.violations == []
    fail("t5")
    assert len(history.violations) == 1


def test_a_slot_of_another_spec_has_attempts_of_its_own() -> None:
    history = History(RetriesAreBounded())
    history.put(a_report(1))
    for number, version in enumerate((1, 1, 2, 2, 2)):
        run = a_run(f"t{number}", iteration=1)
        spec = replace(run.spec, restart_policy=RestartPolicy(max_attempts=1))
        history.put(run := replace(run, spec=spec, spec_version=Version(version)))
        assert history.violations == []
        history.put(replace(run, status=TaskStatus(state=TaskState.FAILED)))
    assert len(history.violations) == 1


@pytest.mark.parametrize(
    ("end", "violations"), [(None, 1), (TaskEnd(cause=EndCause.NODE_RESTARTED.value), 0)]
)
def test_a_restart_of_the_node_is_no_attempt(end: TaskEnd | None, violations: int) -> None:
    history = History(RetriesAreBounded())
    history.put(a_report(1))
    for number in range(3):
        run = a_run(f"t{number}", iteration=1)
        history.put(run := replace(run, spec=replace(run.spec, restart_policy=RestartPolicy(max_attempts=1))))
        ended = TaskStatus(state=TaskState.FAILED, end=end if number == 1 else None)
        history.put(replace(run, status=ended))
    assert len(history.violations) == violations


def test_a_task_that_is_moved_is_no_failure_of_its_service() -> None:
    rule = FailedServices()
    history = History(rule)
    history.put(a_service(), a_task("t1", node="w1", state=TaskState.RUNNING))
    moved = replace(history.state.get(Task, "t1"), desired_state=TaskState.SHUTDOWN)
    history.put(moved)
    history.put(replace(history.state.get(Task, "t1"), status=TaskStatus(state=TaskState.SHUTDOWN)))
    assert not rule.may_be_given_up(history.state.get(Service, WEB))
    history.put(a_task("t2", node="w1", state=TaskState.RUNNING))
    history.put(replace(history.state.get(Task, "t2"), status=TaskStatus(state=TaskState.FAILED)))
    assert rule.may_be_given_up(history.state.get(Service, WEB))


def test_a_task_that_had_ended_before_its_move_may_be_given_up() -> None:
    """Its node was cut off, so that its end was heard of after the move."""
    rule = FailedServices()
    history = History(rule)
    history.put(a_service(), a_task("t1", node="w1", state=TaskState.RUNNING))
    history.put(replace(history.state.get(Task, "t1"), desired_state=TaskState.SHUTDOWN))
    history.put(replace(history.state.get(Task, "t1"), status=TaskStatus(state=TaskState.COMPLETE)))
    assert rule.may_be_given_up(history.state.get(Service, WEB))


# -- what a service may wait for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_asked", "is_required"), [(False, True), (True, True), (False, False)])
def test_a_job_that_removes_itself_while_a_service_requires_it_is_rejected(
    is_asked: bool, is_required: bool
) -> None:
    history = History(DependenciesComeFirst(lambda _: is_asked))
    labels = {DEPENDS_ON: "migrate=service_completed_successfully"} if is_required else {}
    web = Service(id=WEB, spec=replace(a_service_spec("web"), labels=labels))
    spec = replace(a_service_spec("migrate"), labels={JOB_TTL: "5s"})
    job = Service(id=ServiceId("migrate"), spec=spec)
    history.put(web, job)
    history.put(replace(job, removed_at=timestamp(1)))
    words = "job migrate has removed itself, and web requires it"
    assert history.violations == ([words] if is_required and not is_asked else [])
    assert list(missing_dependencies(web, history.state)) == (["migrate"] if is_required else [])


@pytest.mark.parametrize(
    ("order", "is_unable"), [(UpdateOrder.STOP_FIRST, False), (UpdateOrder.START_FIRST, True)]
)
def test_a_task_does_not_wait_for_the_volume_that_the_one_before_it_has(
    order: UpdateOrder, is_unable: bool
) -> None:
    history = History()
    mount = Mount(type="cluster", source="v", target="/data")
    service = Service(id=WEB, spec=mounting(a_service_spec("web", update=UpdateConfig(order=order)), mount))
    history.put(a_node(W1), service)
    history.commit(lambda tx: tx.put(a_volume()))
    old = replace(a_task("old", node=W1, state=TaskState.RUNNING), spec=service.spec.task_template)
    new = replace(a_task("new", state=TaskState.PENDING), spec=service.spec.task_template)
    history.put(with_volume(old), new)
    assert is_unplaceable(new, service, history.state) is is_unable
    other = replace(new, slot=2)
    assert is_unplaceable(other, service, history.state)


# -- requests --------------------------------------------------------------------------------------------------------


def test_a_start_first_update_is_refused_with_a_volume_that_tasks_cannot_share() -> None:
    mount = Mount(type="cluster", source="v", target="/data")
    spec = mounting(a_service_spec("web", update=UpdateConfig(order=UpdateOrder.START_FIRST)), mount)
    assert respond(State(unshared=frozenset({"v"})), Create(WEB, spec)) == Refused(400)
    assert isinstance(respond(State(), Create(WEB, spec)), Accepted)


def in_stack(replicas: int) -> ServiceSpec:
    return replace(a_service_spec("web", replicas=replicas), labels={STACK_LABEL: "shop"})


@pytest.mark.parametrize(("replicas", "is_refused"), [(2, False), (9, True)])
def test_what_shrinks_is_not_refused_by_a_quota(replicas: int, is_refused: bool) -> None:
    quota = QuotaSpec(name="shop", memory_bytes=1 << 30)
    held = ServiceState(in_stack(5), None, 1)
    response = respond(State({WEB: held}, quotas={"shop": quota}), Update(WEB, in_stack(replicas), 1))
    assert response == Refused(403) if is_refused else isinstance(response, Accepted)


def test_the_services_of_a_stack_share_its_quota() -> None:
    quota, held = QuotaSpec(name="shop", tasks=6), ServiceState(in_stack(4), None, 1)
    state = State({DB: held}, quotas={"shop": quota})
    assert isinstance(respond(state, Create(WEB, replace(in_stack(2), name="api"))), Accepted)
    assert respond(state, Create(WEB, replace(in_stack(3), name="api"))) == Refused(403)
    assert isinstance(respond(state, Create(WEB, a_service_spec("api", replicas=9))), Accepted)


# -- the generator ---------------------------------------------------------------------------------------------------


def test_specs_combine_all_labels_and_each_is_often_absent() -> None:
    random, extensions = Random(1), Random(2)
    known = Dependencies(services=("web", "api", "db", "cache"), volumes=("v1",))
    specs = [a_spec("web", random, known, extensions) for _ in range(400)]
    for label in (PRIORITY, STACK_LABEL, DEPENDS_ON, VOLUME_AFFINITY, AUTOSCALE, CRON, JOB_TTL):
        assert 0 < sum(label in spec.labels for spec in specs) < 0.6 * len(specs), label
    assert any(len({AUTOSCALE, DEPENDS_ON, PRIORITY} & spec.labels.keys()) == 3 for spec in specs)
    assert (
        any(isinstance(spec.mode.replicated, ReplicatedService) and CRON in spec.labels for spec in specs)
        is False
    )


NOT_DRAWN = {
    "simulated containers use processors only, and other measures are queries over HTTP": {
        *("skep.autoscale.cpu", "skep.autoscale.memory", "skep.autoscale.requests", "skep.autoscale.rps"),
        *("skep.autoscale.queue-field", "skep.autoscale.queue.exec", "skep.autoscale.queue.exec-in"),
        *("skep.update.max-errors", "skep.update.max-latency"),
    },
    "times of virtual runs have no zone": {"skep.autoscale.time-zone", "skep.cron.time-zone"},
    "requests set it, and no new service has it": {"skep.cron.suspend", "skep.stopped"},
    "a canary of the simulation has an upper bound, and its last step promotes it": {
        *("skep.update.query-min", "skep.update.query-wait", "skep.update.promote"),
    },
    "simulated nodes have no names, connections or logs": {
        *("skep.drain", "skep.last-lines", "skep.near", "skep.publish-not-ready"),
    },
    "a former name": {"skep.volumes"},
    "the front door of the simulation has services and no options": {
        label for label in SERVICE_LABELS if label.startswith(("skep.http.", "skep.http[", "skep.door"))
    },
    "no port of the simulation has options": {
        label for label in SERVICE_LABELS if label.startswith("skep.publish[")
    },
}
"""Labels that random specs lack, by the reason."""


def test_every_label_of_a_service_is_drawn_or_has_a_reason_why_not() -> None:
    random, extensions = Random(1), Random(2)
    known = Dependencies(services=("web", "api", "db", "cache"), volumes=("v1",))
    specs = [a_spec("web", random, known, extensions) for _ in range(2000)]
    drawn = {label for spec in specs for label in spec.labels if label.startswith("skep.")}
    excused = {label for labels in NOT_DRAWN.values() for label in labels}
    assert drawn & excused == set()
    assert drawn | excused == set(SERVICE_LABELS)


def test_without_extensions_specs_have_nothing_that_docker_lacks_but_disconnect_policies() -> None:
    random = Random(1)
    for _ in range(100):
        spec = a_spec("web", random, Dependencies())
        assert {label.partition("-")[0] for label in spec.labels} <= {"skep.on", "skep.progress"}
