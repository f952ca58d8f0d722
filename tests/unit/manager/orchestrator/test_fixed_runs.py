"""A run of a scheduled global job belongs to the nodes that it started on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator.changes import FillSlot, RemoveService, SettleRun
from skep.manager.schedules.due import decided
from skep.manager.services.job_runs import (
    COMPLETED,
    FAILED,
    away_from_retry,
    has_failed,
    is_going,
    outcome,
    retried,
)
from skep.model.node import Availability, Node, NodeState
from skep.model.options.labels import JOB_TTL
from skep.model.options.schedules import CRON, CRON_DEADLINE, parsed_schedule
from skep.model.service import (
    GlobalJob,
    JobStart,
    JobStatus,
    Placement,
    RestartCondition,
    RestartPolicy,
    ScheduleStatus,
    Service,
    ServiceMode,
)
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS, Timestamp, unix_ns
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_task
from tests.support.managers.worlds import World

DUE = Timestamp("2026-11-24T10:00:00Z")
DUE_NS = unix_ns(DUE)
MINUTE_NS = 60 * SECOND_NS
RUN = Version(index=7)
NODES = ("n1", "n2", "n3")


def a_nightly(condition: RestartCondition = RestartCondition.NONE, **labels: str) -> Service:
    """A run of it has just begun."""
    service = a_service("nightly", restart=RestartPolicy(condition=condition, delay=0))
    start = JobStart(at=DUE, iteration=RUN, scheduled_at=DUE)
    schedule = ScheduleStatus(settled=DUE, starts=(start,))
    status = JobStatus(job_iteration=RUN, last_execution=DUE, schedule=schedule)
    mode = ServiceMode(global_job=GlobalJob())
    spec = replace(service.spec, mode=mode, labels={CRON: "@hourly", **labels})
    return replace(service, spec=spec, job_status=status)


def ready(id: str) -> Node:
    return replace(a_node(id), created_at=Timestamp("2026-01-01T00:00:00Z"))


def away(id: str, how: str) -> Node:
    """A node that may not run it: down, drained, or without the label."""
    match how:
        case "down":
            return replace(ready(id), status=replace(ready(id).status, state=NodeState.DOWN))
        case "drained":
            return replace(ready(id), spec=replace(ready(id).spec, availability=Availability.DRAIN))
    return replace(ready(id), spec=replace(ready(id).spec, labels={"without": "backup"}))


AWAY = ("down", "drained", "unlabeled")


def a_world(
    *gone: tuple[str, str], condition: RestartCondition = RestartCondition.NONE, **labels: str
) -> World:
    """All nodes are ready but these; the tasks of the run are made."""
    service = a_nightly(condition, **labels)
    template = service.spec.task_template
    placement = replace(template.placement or Placement(), constraints=("node.labels.without!=backup",))
    service = replace(
        service, spec=replace(service.spec, task_template=replace(template, placement=placement))
    )
    world = World(service, nodes=[ready(id) for id in NODES])
    for id, how in gone:
        world.nodes[NodeId(id)] = away(id, how)
    world.settle()
    return world


def live(world: World) -> list[str]:
    return sorted(task.node_id for task in world.tasks.values() if task.is_active)


def ending(world: World) -> str:
    assert world.service.job_status is not None
    return world.service.job_status.outcome


def finish(world: World, state: TaskState = TaskState.COMPLETE) -> None:
    for task in list(world.tasks.values()):
        if task.is_active:
            world.report(task.id, state)
    world.settle()


@pytest.mark.parametrize("how", AWAY)
def test_a_node_that_returns_joins_neither_a_run_that_goes_on_nor_one_that_is_over(how: str) -> None:
    world = a_world(("n3", how))
    assert live(world) == ["n1", "n2"]
    world.nodes[NodeId("n3")] = ready("n3")
    world.settle()
    assert live(world) == ["n1", "n2"]
    finish(world)
    assert world.service.job_status is not None
    assert world.service.job_status.outcome == COMPLETED
    world.settle()
    assert live(world) == []


@pytest.mark.parametrize("how", AWAY)
def test_a_node_that_left_during_the_run_does_not_open_it_again(how: str) -> None:
    world = a_world()
    assert live(world) == list(NODES)
    world.nodes[NodeId("n3")] = away("n3", how)
    world.settle()
    finish(world)
    assert world.service.job_status is not None
    assert world.service.job_status.outcome == FAILED, "one node has not completed it"
    world.nodes[NodeId("n3")] = ready("n3")
    world.settle()
    assert live(world) == []


@pytest.mark.parametrize(
    ("end", "found"), [(TaskState.COMPLETE, COMPLETED), (TaskState.SHUTDOWN, FAILED)], ids=["done", "stopped"]
)
def test_a_run_waits_for_the_end_of_a_task_that_a_drain_stops(end: TaskState, found: str) -> None:
    """Its process may have ended with exit code 0 a moment before."""
    world = a_world()
    for task in list(world.tasks.values()):
        world.report(task.id, TaskState.RUNNING)
    world.nodes[NodeId("n3")] = away("n3", "drained")
    world.settle()
    (stopping,) = (task for task in world.tasks.values() if not task.is_wanted)
    assert live(world) == ["n1", "n2"]
    finish(world)
    assert world.service.job_status is not None
    assert (world.service.job_status.outcome, is_going(world, world.service)) == ("", True)
    world.report(stopping.id, end)
    world.settle()
    assert (world.service.job_status.outcome, is_going(world, world.service)) == (found, False)


def test_a_run_does_not_wait_for_a_task_whose_node_is_down() -> None:
    world = a_world()
    for task in list(world.tasks.values()):
        world.report(task.id, TaskState.RUNNING)
    world.nodes[NodeId("n3")] = away("n3", "down")
    world.settle()
    finish(world)
    assert world.service.job_status is not None
    assert world.service.job_status.outcome == FAILED


def test_a_run_is_over_only_when_all_of_its_tasks_are_whatever_the_decision_saw() -> None:
    """A decision may be about some of the nodes, or older than a task that is to be replaced."""
    world = a_world()
    one, *others = world.tasks.values()
    world.report(one.id, TaskState.COMPLETE)
    world.apply([SettleRun(world.service, is_over=True)])
    assert world.service.job_status is not None
    assert world.service.job_status.outcome == ""
    for other in others:
        world.report(other.id, TaskState.FAILED)
    world.apply([SettleRun(world.service, is_over=True)])
    assert world.service.job_status.outcome == "", "the restart policy has not decided about the others"
    world.settle()
    assert world.service.job_status.outcome == FAILED


def test_nodes_are_fixed_only_when_each_has_a_task_whatever_the_decision_saw() -> None:
    world = a_world()
    assert world.service.job_status is not None
    world.put(replace(world.service, job_status=replace(world.service.job_status, nodes_fixed=False)))
    world.tasks.popitem()
    world.apply([SettleRun(world.service)])
    assert world.service.job_status is not None
    assert not world.service.job_status.nodes_fixed


def test_a_node_that_is_back_while_the_run_goes_on_elsewhere_does_its_part() -> None:
    world = a_world()
    world.nodes[NodeId("n3")] = away("n3", "down")
    world.settle()
    world.nodes[NodeId("n3")] = ready("n3")
    world.settle()
    assert live(world) == list(NODES)


def test_a_run_that_no_node_may_have_yet_waits_and_has_failed_at_its_deadline() -> None:
    world = a_world(*((id, "down") for id in NODES), **{CRON_DEADLINE: "5m"})
    assert world.service.job_status is not None
    assert not world.service.job_status.nodes_fixed
    world.nodes[NodeId("n1")] = ready("n1")
    assert [step.node_id for step in world.steps() if isinstance(step, FillSlot)] == ["n1"]
    world.now_ns = DUE_NS + 6 * MINUTE_NS
    world.settle()
    assert live(world) == []
    assert world.service.job_status.outcome == FAILED


def test_a_task_without_room_on_its_node_is_given_up_at_the_deadline() -> None:
    world = a_world(**{CRON_DEADLINE: "5m"})
    for task in list(world.tasks.values()):
        if task.node_id != "n3":
            world.report(task.id, TaskState.RUNNING)
    world.now_ns = DUE_NS + 4 * MINUTE_NS
    assert any(isinstance(step, Recheck) and 60 <= step.at <= 61 for step in world.steps())
    world.now_ns = DUE_NS + 6 * MINUTE_NS
    world.settle()
    assert live(world) == ["n1", "n2"], "what has started goes on"
    finish(world)
    assert world.service.job_status is not None
    assert world.service.job_status.outcome == FAILED


def test_a_task_that_fails_after_the_deadline_is_restarted_by_its_policy() -> None:
    world = a_world(condition=RestartCondition.ON_FAILURE, **{CRON_DEADLINE: "5m"})
    for task in list(world.tasks.values()):
        world.report(task.id, TaskState.RUNNING)
    world.settle()
    world.now_ns = DUE_NS + 10 * MINUTE_NS
    (failing,) = (task for task in world.tasks.values() if task.node_id == "n1")
    world.report(failing.id, TaskState.FAILED)
    world.settle()
    assert live(world) == ["n1", "n2", "n3"], "n1 has started in time, and tries again"


def test_a_run_that_an_older_manager_starts_has_no_outcome_yet() -> None:
    """It keeps the fields that it does not know, which are about the run before."""
    world = a_world()
    finish(world)
    job = world.service.job_status
    assert job is not None
    assert job.present_outcome == COMPLETED
    world.put(replace(world.service, job_status=replace(job, job_iteration=Version(index=8))))
    world.settle()
    assert sorted(task.node_id for task in world.tasks.values() if task.is_active) == list(NODES)


def test_a_job_whose_nodes_are_all_gone_is_removed_after_its_time_to_live() -> None:
    world = a_world(**{JOB_TTL: "10m"})
    status = world.service.job_status
    assert status is not None
    plain = replace(status, schedule=None, outcome=COMPLETED, settled_iteration=RUN)
    world.put(replace(world.service, job_status=plain))
    world.tasks.clear()
    world.nodes.clear()
    world.now_ns = DUE_NS + 4 * MINUTE_NS
    (step,) = world.steps()
    assert isinstance(step, Recheck)
    assert step.at - world.now == 360
    world.now_ns = DUE_NS + 10 * MINUTE_NS
    assert [type(step) for step in world.steps()] == [RemoveService]


def test_a_retry_opens_a_run_again_on_its_own_nodes_and_also_after_the_deadline() -> None:
    world = a_world(("n3", "down"), **{CRON_DEADLINE: "5m"})
    finish(world, TaskState.FAILED)
    world.now_ns = DUE_NS + 6 * MINUTE_NS
    world.nodes[NodeId("n3")] = ready("n3")
    world.put(replace(world.service, job_status=retried(world, world.service)))  # type: ignore[arg-type]
    world.settle()
    assert live(world) == ["n1", "n2"]


def test_a_retry_without_the_drained_node_on_which_the_run_failed_fails_again() -> None:
    """It was called completed, although the task of that node had been stopped, and that node ran nothing more."""
    world = a_world()
    world.nodes[NodeId("n3")] = away("n3", "drained")
    world.settle()
    world.stop_all()
    world.settle()
    finish(world)
    assert ending(world) == FAILED
    for way, end in ("drained", FAILED), ("ready", COMPLETED):
        world.nodes[NodeId("n3")] = ready("n3") if way == "ready" else away("n3", way)
        assert has_failed(world, world.service)  # type: ignore[arg-type]
        assert away_from_retry(world, world.service) == ([] if way == "ready" else ["n3"])  # type: ignore[arg-type]
        world.put(replace(world.service, job_status=retried(world, world.service)))  # type: ignore[arg-type]
        world.settle()
        assert live(world) == (["n3"] if way == "ready" else [])
        finish(world)
        assert ending(world) == end


@given(st.lists(st.tuples(st.sampled_from(NODES), st.sampled_from([*AWAY, "ready"]), st.booleans())))
def test_whatever_nodes_do_a_run_is_at_most_once_on_each_and_once_over_stays_over(
    happenings: list[tuple[str, str, bool]],
) -> None:
    world = a_world()
    for id, how, ends in happenings:
        world.nodes[NodeId(id)] = ready(id) if how == "ready" else away(id, how)
        world.settle()
        was_over = bool(world.service.job_status and world.service.job_status.outcome)
        assert not (was_over and live(world))
        assert len(live(world)) == len(set(live(world)))
        if ends:
            finish(world)


async def stored(service: Service, nodes: list[Node], tasks: list[Task]) -> MemoryStore:
    store = MemoryStore(SystemClock())

    def fill(tx: Transaction) -> None:
        made = tx.put(service)
        for node in nodes:
            tx.put(node)
        for task in tasks:
            tx.put(replace(task, service_id=made.id, spec_version=made.spec_version, job_iteration=RUN))

    await store.update(fill)
    return store


def a_run(node: str, state: TaskState) -> Task:
    return a_task(slot=0, node=node, state=state, desired=TaskState.COMPLETE)


@pytest.mark.parametrize(
    ("nodes", "tasks", "skipped"),
    [
        ([ready("n1"), ready("n2")], [("n1", TaskState.COMPLETE), ("n2", TaskState.PENDING)], ""),
        ([ready("n1"), away("n2", "down")], [("n1", TaskState.COMPLETE), ("n2", TaskState.RUNNING)], ""),
        ([ready("n1"), ready("n2")], [("n1", TaskState.COMPLETE)], ""),
        (
            [ready("n1"), ready("n2")],
            [("n1", TaskState.COMPLETE), ("n2", TaskState.RUNNING)],
            "run 7 is still going on n2",
        ),
    ],
    ids=["no room", "down", "not in the run", "running"],
)
async def test_the_next_run_is_held_up_only_by_a_node_that_runs_the_last_one(
    nodes: list[Node], tasks: list[tuple[str, TaskState]], skipped: str
) -> None:
    store = await stored(a_nightly(), nodes, [a_run(*one) for one in tasks])
    service = store.view().get(Service, "nightly")
    job = decided(store.view(), service, parsed_schedule(service.spec.labels), DUE_NS + 3600 * SECOND_NS)
    assert job is not None
    assert job.schedule is not None
    assert job.schedule.starts[-1].skipped == skipped


async def test_a_run_that_is_over_is_not_going_whatever_its_nodes_are_like() -> None:
    job = a_nightly()
    assert job.job_status is not None
    status = replace(job.job_status, nodes_fixed=True, outcome=FAILED, settled_iteration=RUN)
    job = replace(job, job_status=status)
    store = await stored(job, [ready("n1"), ready("n2")], [a_run("n1", TaskState.COMPLETE)])
    assert not is_going(store.view(), job)
    assert outcome(store.view(), job) == FAILED
