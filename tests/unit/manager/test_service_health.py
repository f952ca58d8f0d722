"""Whether a service is in its desired state, and why not."""

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.manager.diagnosis.service_health import explanation_of, service_status, status_with_health
from skep.model.network import Network, NetworkSpec
from skep.model.node import Availability, Node, NodeState, NodeStatus
from skep.model.options.labels import STOPPED
from skep.model.options.schedules import CRON, CRON_SUSPEND
from skep.model.service import (
    GlobalJob,
    HealthState,
    JobStatus,
    ReplicatedJob,
    RestartCondition,
    RestartPolicy,
    ScheduleStatus,
    Service,
    ServiceHealth,
    ServiceMode,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import Restart, Task, TaskState, TaskStatus
from skep.model.values.ids import NetworkId, NodeId, TaskId
from skep.model.values.meta import Version
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import SECOND_NS, Timestamp, timestamp
from skep.store.interface import View
from skep.store.kinds import SpecVersion
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service, a_service_spec, a_task

CLOCK = SystemClock()
RUNNING, STARTING, SHUTDOWN = TaskState.RUNNING, TaskState.STARTING, TaskState.SHUTDOWN
EARLIER, LATER = Timestamp("2026-11-27T11:00:00Z"), Timestamp("2026-11-27T11:00:01Z")
NOW_NS = 1_800_000_000 * SECOND_NS
M1 = a_node("m1")


def web(replicas: int = 2, **changes: object) -> Service:
    return replace(a_service("web", spec=a_service_spec("web", replicas=replicas)), **changes)


def tasks(service: Service, *states: TaskState) -> list[Task]:
    return [
        a_task(service=service, slot=slot, node="m1", state=state) for slot, state in enumerate(states, 1)
    ]


async def stored(service: Service, found: list[Task], node: Node) -> View:
    store = MemoryStore(CLOCK)

    await store.update(lambda tx: [tx.put(one) for one in (node, service)])
    await store.update_each(lambda tx, task: tx.put(task), found)
    return store.view()


async def health(service: Service, found: list[Task], node: Node = M1) -> ServiceHealth:
    """Return the health, which an explanation of all tasks confirms."""
    view = await stored(service, found, node)
    status = await status_with_health(view, service, NOW_NS, CLOCK)
    explained = await explanation_of(view, service, await service_status(view, service), NOW_NS, CLOCK)
    assert status.health == explained.health
    assert status.health is not None
    return status.health


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"skep.door": "true"}, "the next request at the front door starts a task"),
        ({}, "and no request can start a task, because there is no front door. Create it with skep door up"),
    ],
)
async def test_a_service_at_zero_names_what_starts_it(labels: dict[str, str], words: str) -> None:
    asleep = {"skep.autoscale": "0..3", "skep.http": "a.example"}
    service = replace(web(0), spec=replace(web(0).spec, labels=asleep))
    door = replace(a_service_spec("door"), labels=labels)
    store = MemoryStore(CLOCK)
    await store.update(lambda tx: [tx.put(service), tx.put(a_service("door", spec=door))])
    spec = NetworkSpec(name="skep-door", labels={"skep.door": "true"})
    await store.update(lambda tx: tx.put(Network(id=NetworkId("n"), spec=spec)))
    view = store.view()
    found = await explanation_of(view, service, await service_status(view, service), NOW_NS, CLOCK)
    assert (found.reason, found.summary) == ("scaled to zero", f"scaled to zero, {words}")
    assert found.is_healthy


@pytest.mark.parametrize("is_global", [False, True])
async def test_a_stopped_service_is_shown_as_stopped_and_not_as_failed(is_global: bool) -> None:
    spec = replace(a_service_spec("web", replicas=2, is_global=is_global), labels={STOPPED: "true"})
    service = a_service("web", spec=spec)
    found = await health(service, [])
    assert (found.state, found.reason) == (HealthState.HEALTHY, "stopped")
    view = await stored(service, [], M1)
    explained = await explanation_of(view, service, await service_status(view, service), NOW_NS, CLOCK)
    assert explained.summary == "stopped: skep service start web starts its tasks"
    running = replace(service, spec=replace(spec, labels={}))
    assert (await health(running, [])).state is not HealthState.HEALTHY


async def test_a_service_whose_tasks_run_is_healthy() -> None:
    found = await health(web(), tasks(web(), RUNNING, RUNNING))
    assert (found.state, found.reason) == (HealthState.HEALTHY, "")


async def test_a_running_task_in_a_crash_loop_degrades_its_service() -> None:
    """It runs at the moment, and will end again."""
    one, two = tasks(web(), RUNNING, RUNNING)
    began = timestamp(NOW_NS - SECOND_NS)
    loops = replace(one, restart=Restart(failures=3), status=TaskStatus(state=RUNNING, timestamp=began))
    assert (await health(web(), [loops, two])).state is HealthState.DEGRADED


async def test_a_task_that_starts_or_waits_for_another_service_makes_it_converge() -> None:
    assert (await health(web(), tasks(web(), RUNNING, STARTING))).state is HealthState.CONVERGING
    one, two = tasks(web(), RUNNING, TaskState.PENDING)
    waits = replace(
        two, node_id="", status=replace(two.status, err="waits for service db, which has 0 of 1 tasks")
    )
    found = await health(web(), [one, waits])
    assert (found.state, found.reason) == (
        HealthState.CONVERGING,
        "it waits for service db, which has 0 of 1 tasks",
    )


async def test_a_task_without_a_suitable_node_or_on_a_lost_node_degrades_its_service() -> None:
    one, two = tasks(web(), RUNNING, TaskState.PENDING)
    homeless = replace(
        two,
        node_id="",
        status=replace(two.status, err="no suitable node (insufficient resources on 1 node)"),
    )
    assert (await health(web(), [one, homeless])).state is HealthState.DEGRADED
    down = replace(M1, status=NodeStatus(state=NodeState.DOWN))
    assert (await health(web(), tasks(web(), RUNNING, RUNNING), down)).state is HealthState.DEGRADED


def a_replacement(state: TaskState, err: str = "no suitable node (no space)", **changes: object) -> Task:
    task = a_task("new", service=web(1), state=state)
    made_at = Timestamp("2026-05-05T05:05:05Z")
    return replace(task, created_at=made_at, status=replace(task.status, err=err), **changes)


async def test_a_replacement_that_no_node_takes_leaves_the_service_of_a_drained_node_healthy() -> None:
    """Its task runs until the replacement does."""
    drained = a_node("m1", availability=Availability.DRAIN)
    old, new = tasks(web(1), RUNNING)[0], a_replacement(TaskState.PENDING)
    found = await health(web(1), [old, new], drained)
    assert (found.state, found.reason) == (
        HealthState.HEALTHY,
        "web.1: it stays on m1, which is drained: its replacement does not run yet: no suitable node (no space)",
    )
    assert (await health(web(1), [old, new])).state is HealthState.DEGRADED, "the node is not drained"
    missing = await health(web(2), [old, new], drained)
    assert missing.state is not HealthState.HEALTHY, "another task is missing"
    starting = await health(web(1), [old, a_replacement(STARTING, "")], drained)
    assert starting.state is HealthState.CONVERGING
    failing = a_replacement(STARTING, "", restart=Restart(failures=3))
    assert (await health(web(1), [old, failing], drained)).state is HealthState.DEGRADED


async def test_surplus_tasks_make_a_service_converge() -> None:
    found = await health(web(1), tasks(web(1), RUNNING, RUNNING))
    assert (found.state, found.reason) == (HealthState.CONVERGING, "its old tasks are being stopped")


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([RUNNING, RUNNING, RUNNING, RUNNING], "2 of 2 tasks run, 2 more will stop"),
        ([RUNNING, RUNNING, RUNNING, STARTING], "2 of 2 tasks run, 1 more will stop"),
        ([RUNNING, RUNNING, STARTING, STARTING], "2 of 2 tasks run"),
    ],
)
async def test_old_tasks_of_a_start_first_update_are_counted_apart(
    states: list[TaskState], words: str
) -> None:
    service = web(update_status=UpdateStatus(state=UpdateState.UPDATING, message="update in progress"))
    found = [*tasks(service, *states[:2]), *tasks(service, *states[2:])]
    view = await stored(service, found, M1)
    status = await service_status(view, service)
    explained = await explanation_of(view, service, status, NOW_NS, CLOCK)
    assert words in explained.summary.split("; "), explained.summary
    assert f"{len(found)} of" not in explained.summary


async def test_tasks_above_a_smaller_number_are_counted_apart() -> None:
    service = web(1)
    view = await stored(service, tasks(service, RUNNING, RUNNING), M1)
    status = await service_status(view, service)
    explained = await explanation_of(view, service, status, NOW_NS, CLOCK)
    assert explained.summary == "its old tasks are being stopped; 1 of 1 tasks run, 1 more will stop"


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (UpdateState.PAUSED, HealthState.DEGRADED),
        (UpdateState.ROLLBACK_PAUSED, HealthState.DEGRADED),
        (UpdateState.UPDATING, HealthState.CONVERGING),
        (UpdateState.ROLLBACK_STARTED, HealthState.CONVERGING),
        (UpdateState.COMPLETED, HealthState.HEALTHY),
        (UpdateState.ROLLBACK_COMPLETED, HealthState.HEALTHY),
    ],
)
async def test_an_update_counts_although_all_tasks_run(state: UpdateState, expected: HealthState) -> None:
    service = web(update_status=UpdateStatus(state=state, message="why"))
    found = await health(service, tasks(service, RUNNING, RUNNING))
    assert (found.state, found.reason) == (expected, "" if expected is HealthState.HEALTHY else "why")


async def test_a_slot_whose_task_is_only_being_stopped_is_not_healthy() -> None:
    """Two tasks run, as many as should, but one of them will end and has no successor yet."""
    one, two = tasks(web(), RUNNING, RUNNING)
    assert (await health(web(), [one, replace(two, desired_state=SHUTDOWN)])).state is HealthState.CONVERGING


async def test_of_a_large_service_the_task_with_a_problem_is_found() -> None:
    service = web(3_000)
    found = tasks(service, *[RUNNING] * 2_999)
    failed = a_task(
        service=service, slot=3_000, node="m1", state=TaskState.FAILED, desired=TaskState.SHUTDOWN
    )
    failed = replace(failed, status=replace(failed.status, err="task: non-zero exit (7)"))
    starts = a_task(service=service, slot=3_000, node="m1", state=STARTING)
    starts = replace(starts, id=TaskId("again"), restart=Restart(failures=1), created_at=timestamp(NOW_NS))
    shown = await health(service, [*found, failed, starts])
    assert (shown.state, shown.reason) == (HealthState.DEGRADED, "exit 7")


async def test_a_job_converges_until_it_has_completed() -> None:
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=2))
    job = web(spec=replace(a_service_spec("job"), mode=mode), job_status=JobStatus(job_iteration=Version(1)))

    def of_job(*states: TaskState) -> list[Task]:
        return [replace(task, job_iteration=Version(1)) for task in tasks(job, *states)]

    assert (await health(job, of_job(TaskState.COMPLETE, RUNNING))).state is HealthState.CONVERGING
    done = await health(job, of_job(TaskState.COMPLETE, TaskState.COMPLETE))
    assert (done.state, done.reason) == (HealthState.HEALTHY, "")
    waits = replace(job, job_status=JobStatus(job_iteration=Version(0), schedule=ScheduleStatus()))
    assert (await health(waits, [])).state is HealthState.HEALTHY, "a scheduled job before its first run"


async def test_a_slot_of_a_one_shot_service_that_is_done_needs_no_task() -> None:
    spec = a_service_spec("migrate", replicas=2)
    policy = RestartPolicy(condition=RestartCondition.ON_FAILURE)
    once = web(spec=replace(spec, task_template=replace(spec.task_template, restart_policy=policy)))
    half = await health(once, tasks(once, TaskState.COMPLETE, RUNNING))
    assert (half.state, half.reason) == (HealthState.HEALTHY, "1 running"), "beside 1/2 done"
    assert (await health(once, tasks(once, TaskState.COMPLETE))).state is HealthState.CONVERGING


async def test_a_job_that_is_stopped_during_its_run_has_the_schedule_of_the_service() -> None:
    """The run keeps the spec with which it began."""
    status = JobStatus(job_iteration=Version(index=1), spec_version=Version(index=1))
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
    begun = replace(a_service_spec("tick"), mode=mode, labels={CRON: "* * * * *"})
    stopped = replace(begun, labels={**begun.labels, CRON_SUSPEND: "true", STOPPED: "true"})
    service = replace(a_service("tick", spec=stopped), job_status=status, spec_version=Version(index=3))
    store = MemoryStore(CLOCK)
    version = SpecVersion(id=f"{service.id}/1", service_id=service.id, index=1, spec=begun)
    await store.update(lambda tx: [tx.put(one) for one in (M1, service, version)])
    view = store.view()
    found = await explanation_of(view, service, await service_status(view, service), NOW_NS, CLOCK)
    assert found.schedule == "* * * * * (UTC); stopped: skep service start tick resumes its schedule"


async def test_a_task_that_waited_for_its_restart_at_a_retry_has_the_reason_of_the_failure() -> None:
    retried = JobStatus(job_iteration=Version(index=1), retried_until=LATER)
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
    service = replace(a_service("big", spec=replace(a_service_spec("big"), mode=mode)), job_status=retried)
    failed, waiting = (
        replace(task, job_iteration=retried.job_iteration) for task in tasks(service, RUNNING, STARTING)
    )
    failed = replace(
        failed,
        status=TaskStatus(state=TaskState.FAILED, err="task: non-zero exit (7)"),
        desired_state=TaskState.SHUTDOWN,
        created_at=EARLIER,
    )
    waiting = replace(waiting, slot=failed.slot, created_at=LATER, restart=Restart(failures=1))
    found = await health(service, [failed, waiting])
    assert found.reason.startswith("exit 7")


async def test_a_stopped_service_names_the_nodes_that_are_down_with_its_tasks() -> None:
    service = web()
    service = replace(service, spec=replace(service.spec, labels={STOPPED: "true"}))
    down = replace(M1, status=NodeStatus(state=NodeState.DOWN))
    left = [replace(task, desired_state=TaskState.SHUTDOWN) for task in tasks(service, RUNNING, SHUTDOWN)]
    view = await stored(service, left, down)
    found = await explanation_of(view, service, await service_status(view, service), NOW_NS, CLOCK)
    name = M1.description.hostname
    assert found.summary.endswith(f"starts its tasks; 1 may still run on {name}, which is down")


async def test_services_that_keep_an_affinity_from_being_met_are_named() -> None:
    """The service that it must run near is missing or has no tasks, or another one must run apart from it."""
    refused = "no suitable node ({} not satisfied on 1 node)"

    async def reason(labels: dict[str, str], refusal: str, *others: Service | Task) -> str:
        service = a_service("web", spec=replace(a_service_spec("web"), labels=labels))
        task = a_task(service=service, state=TaskState.PENDING)
        task = replace(task, status=replace(task.status, err=refused.format(refusal)), node_id=NodeId(""))
        store = MemoryStore(CLOCK)
        await store.update_each(lambda tx, one: tx.put(one), (M1, service, task, *others))
        view = store.view()
        found = await explanation_of(view, service, await service_status(view, service), NOW_NS, CLOCK)
        assert found.reason in found.summary
        return found.reason.replace(refused.format(refusal), "").replace("; ; ", "; ").strip("; ")

    near, needs = {"skep.affinity": "DB"}, "needs a node with a task of DB"
    assert await reason(near, "affinity") == f"{needs}; service DB does not exist"
    words = f"{needs}; service DB has no task on a node"
    assert await reason(near, "affinity", a_service("db")) == words
    waits = a_task("t9", service=a_service("db"), state=TaskState.PENDING)
    assert await reason(near, "affinity", a_service("db"), waits) == words
    there = a_task("t9", service=a_service("db"), node="m1")
    assert await reason(near, "affinity", a_service("db"), there) == needs
    apart = replace(a_service_spec("batch"), labels={"skep.anti-affinity": "web"})
    words = "the label skep.anti-affinity of batch keeps it apart"
    assert await reason({}, "anti-affinity", a_service("batch", spec=apart)) == words
    words = "the label skep.anti-affinity of services of other stacks keeps it apart"
    assert await reason({STACK_LABEL: "shop"}, "anti-affinity", a_service("batch", spec=apart)) == words


async def test_a_global_service_or_job_that_no_node_may_run_says_so() -> None:
    agent = a_service_spec("agent", is_global=True, constraints=("node.labels.gpu==yes",))
    scan = replace(agent, mode=ServiceMode(global_job=GlobalJob()))
    status = JobStatus(job_iteration=Version(index=0))
    for service in (a_service("agent", spec=agent), replace(a_service(spec=scan), job_status=status)):
        assert await health(service, []) == ServiceHealth(reason="no node is eligible")
    anywhere = replace(scan, task_template=a_service_spec().task_template)
    found = await health(replace(a_service(spec=anywhere), job_status=status), [])
    assert (found.state, found.reason) == (HealthState.CONVERGING, "its tasks are not created yet")


async def test_the_nodes_of_a_global_job_count_also_if_their_tasks_failed_and_not_if_they_were_stopped() -> (
    None
):
    spec = replace(a_service_spec("scan"), mode=ServiceMode(global_job=GlobalJob()))
    scan = replace(a_service("scan", spec=spec), job_status=JobStatus(job_iteration=Version(index=0)))
    # The last one was stopped, because its node is drained.
    states = {"n1": TaskState.COMPLETE, "n2": TaskState.FAILED, "n3": TaskState.SHUTDOWN}
    tasks = [
        replace(
            a_task(f"on-{node}", service=scan, slot=0, node=node, state=state, desired=TaskState.SHUTDOWN),
            job_iteration=Version(index=0),
        )
        for node, state in states.items()
    ]
    view = await stored(scan, tasks, M1)
    status = await service_status(view, scan)
    assert (status.completed_tasks, status.total_tasks) == (1, 2), "n3 runs it again when it takes tasks"
