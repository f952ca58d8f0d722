"""What is said of a task or a service that is not as wanted."""

from collections.abc import Mapping

import pytest
from msgspec.structs import replace

from skep.manager.diagnosis.explanations import (
    explain_service,
    explain_task,
    next_attempt,
    summary,
)
from skep.manager.diagnosis.scaling_explanations import explain_autoscaling
from skep.manager.diagnosis.service_problems import problems_of
from skep.manager.scheduler.explaining.explain import NodeVerdict, reserve_for, verdict
from skep.manager.scheduler.nodes.accounting import Accounting
from skep.manager.scheduler.nodes.requirements import requirements_of
from skep.manager.services.job_listing import failure
from skep.model.container import ContainerSpec, HealthConfig
from skep.model.measures.readings import IdleReports, ScalingMeasurements
from skep.model.node import Availability, Node, NodeState
from skep.model.options.autoscaling import TaskUsage
from skep.model.options.labels import STOPPED
from skep.model.service import (
    GlobalJob,
    HealthState,
    JobStatus,
    ReplicatedJob,
    Resources,
    RestartCondition,
    RestartPolicy,
    ScheduleStatus,
    Service,
    ServiceHealth,
    ServiceMode,
)
from skep.model.task import ContainerStatus, Restart, StopCause, Task, TaskState, TaskStatus
from skep.model.task_end import FAILED_CHECK, EndCause, KeptLine, TaskEnd, signal_of
from skep.model.values.ids import NodeId
from skep.model.values.meta import Version
from skep.model.values.times import Timestamp, timestamp
from skep.store.state import State
from skep.store.transactions.transaction import LocalTransaction
from tests.support.builders import a_node, a_service, a_service_spec, a_task


def verdicts(task: Task, *nodes: Node, others: tuple[Task, ...] = ()) -> list[NodeVerdict]:
    books = Accounting()
    for node in nodes:
        books.set_node(node)
    for other in others:
        reserve_for(books, other, State())
    requested = requirements_of(task, None)
    return [
        verdict(requested, account, books.copies(task.service_id)[id])
        for id, account in books.accounts.items()
    ]


def test_every_node_says_everything_that_speaks_against_it() -> None:
    service = a_service(
        "web",
        reserve=Resources(nano_cpus=2 * 10**9, memory_bytes=1 << 30),
        constraints=("node.labels.zone == north",),
    )
    task = a_task(service=service, state=TaskState.PENDING)
    small = a_node("small", has=Resources(nano_cpus=10**9, memory_bytes=2 << 30), labels={"zone": "south"})
    drained = a_node("drained", availability=Availability.DRAIN, labels={"zone": "north"})
    good = a_node("good", labels={"zone": "north"})
    refusals = {str(one.node_id): one.reasons for one in verdicts(task, small, drained, good)}
    assert refusals == {
        "small": (
            "insufficient resources: 2 CPUs requested, 1 not reserved",
            "constraints not satisfied: node.labels.zone == north",
        ),
        "drained": ("the node's availability is drain",),
        "good": (),
    }


def test_what_other_tasks_reserved_is_not_free() -> None:
    service = a_service("web", reserve=Resources(memory_bytes=3 << 30))
    running = a_task(service=service, node="n1")
    task = a_task(service=service, state=TaskState.PENDING)
    node = a_node("n1", has=Resources(nano_cpus=1, memory_bytes=4 << 30))
    (one,) = verdicts(task, node, others=(running,))
    assert one.reasons == ("insufficient resources: 3072 MiB of memory requested, 1024 not reserved",)


def test_a_node_that_is_down_says_since_its_silence() -> None:
    down = a_node("n1", state=NodeState.DOWN)
    down = replace(down, status=replace(down.status, message="heartbeat failure"))
    (one,) = verdicts(a_task(state=TaskState.PENDING), down)
    assert one.reasons == ("the node is down (heartbeat failure)",)


def failed_with(code: int, err: str) -> Task:
    status = TaskStatus(
        state=TaskState.FAILED,
        err=err,
        container_status=ContainerStatus(container_id="c" * 64, exit_code=code),
    )
    return replace(a_task(node="n1", desired=TaskState.SHUTDOWN), status=status)


def test_a_process_that_never_was_has_no_code() -> None:
    failed = failed_with(
        127, 'starting container failed: OCI runtime create failed: exec: "nosuch": not found'
    )
    assert summary(failed, None) == (
        'its process could not be started: OCI runtime create failed: exec: "nosuch": not found'
    )
    gone = failed_with(0, "No such container: web.4.x")
    assert summary(gone, None) == "its container was gone before it ended: No such container: web.4.x"


def test_a_task_that_failed_before_it_had_a_container_has_the_code_of_its_error() -> None:
    failed = failed_with(0, "No such image: nosuch:1")
    without = replace(failed, status=replace(failed.status, container_status=ContainerStatus()))
    assert explain_task(without, None).exit_code is None
    coded = replace(without, status=replace(without.status, err="task: non-zero exit (3)"))
    assert explain_task(coded, None).exit_code == 3


def test_a_failed_task_shows_its_code_its_signal_and_the_error_of_the_engine() -> None:
    task = failed_with(137, "task: non-zero exit (137): killed by a user")
    reported = explain_task(task, a_node("n1"))
    assert (reported.exit_code, reported.signal) == (137, "SIGKILL")
    assert reported.summary == "exit 137 (SIGKILL): killed by a user"


@pytest.mark.parametrize("cause", ["unhealthy", "stop-timeout"])
def test_a_signal_that_skep_sent_is_not_named(cause: str) -> None:
    task = failed_with(137, "task: non-zero exit (137): dockerexec: unhealthy container")
    task = replace(task, status=replace(task.status, end=TaskEnd(cause=cause, signal="SIGKILL")))
    assert explain_task(task, a_node("n1")).signal == ""


@pytest.mark.parametrize(("code", "name"), [(0, ""), (1, ""), (128, ""), (143, "SIGTERM"), (255, "")])
def test_only_codes_above_128_name_a_signal(code: int, name: str) -> None:
    assert signal_of(code) == name


@pytest.mark.parametrize("state", [state for state in TaskState if state is not TaskState.NEW])
def test_there_is_something_to_say_in_every_state(state: TaskState) -> None:
    assert summary(a_task(node="n1", state=state), a_node("n1"))


def test_a_pending_task_that_some_node_could_take_says_so() -> None:
    task = a_task(state=TaskState.PENDING)
    reported = explain_task(task, None, verdicts(task, a_node("n1"), a_node("n2", state=NodeState.DOWN)))
    assert reported.summary == "1 of 2 nodes could take it now: the scheduler has not come to it yet"


def test_a_service_counts_what_its_tasks_wait_for_and_failed_of() -> None:
    web = a_service("web", replicas=4)
    refused = TaskStatus(state=TaskState.PENDING, err="no suitable node (insufficient resources on 1 node)")
    tasks = [
        a_task(service=web, slot=1, node="n1"),
        *(
            replace(a_task(service=web, slot=slot, state=TaskState.PENDING), status=refused)
            for slot in (2, 3)
        ),
        replace(failed_with(1, "task: non-zero exit (1)"), slot=4),
    ]
    reported = explain_service(web, tasks, wanted=4, nodes={a_node("n1").id: a_node("n1")}, now_ns=0)
    assert reported.summary == "exit 1; not restarted, by its restart policy; 1 of 4 tasks run"
    assert [(one.summary, one.tasks, one.example, one.name) for one in reported.reasons] == [
        (refused.err, 2, tasks[1].id, "web.2"),
    ]
    assert [reason.summary for reason in reported.failures] == ["exit 1"]


def test_a_crash_loop_is_the_headline_with_exit_code_last_line_and_next_attempt() -> None:
    web = a_service("web", replicas=2)
    end = TaskEnd(lines=(KeptLine(text="starting"), KeptLine(text="boom: cannot connect to db")))
    failed = failed_with(3, "task: non-zero exit (3)")
    failed = replace(failed, slot=1, service_id=web.id, status=replace(failed.status, end=end))
    waits = replace(a_task_that_waits(5), slot=1, service_id=web.id)
    reported = explain_service(
        web, [a_task(service=web, slot=2, node="n1"), failed, waits], wanted=2, nodes={}, now_ns=0
    )
    assert reported.summary == (
        'exit 3, last line "boom: cannot connect to db"; crash loop, 5 failures in a row; '
        "next attempt at 00:01:46 UTC; 1 of 2 tasks run"
    )
    later = explain_service(web, [failed, waits], wanted=2, nodes={}, now_ns=107 * 10**9)
    assert "5 failures in a row; 0 of 2" in later.summary, "no leader has made the attempt"
    assert "next attempt" not in f"{later.summary} {later.restart_summary}"
    once = explain_service(web, [failed, replace(waits, restart=None)], wanted=2, nodes={}, now_ns=0)
    assert "crash loop" not in once.summary


def test_a_service_as_wanted_says_so() -> None:
    web = a_service("web", replicas=1)
    reported = explain_service(web, [a_task(service=web, node="n1")], wanted=1, nodes={}, now_ns=0)
    assert reported.summary == "1 of 1 tasks run: healthy"


def test_a_stopped_service_is_healthy_says_that_it_is_stopped_and_how_to_start_it() -> None:
    web = a_service("web", replicas=1)
    web = replace(web, spec=replace(web.spec, labels={STOPPED: "true"}))
    reported = explain_service(web, [], wanted=0, nodes={}, now_ns=0)
    assert reported.summary == "stopped: skep service start web starts its tasks"
    assert reported.health == ServiceHealth(reason="stopped")
    stopping = a_task(service=web, node="n1", desired=TaskState.REMOVE)
    assert not explain_service(web, [stopping], wanted=0, running=1, nodes={}, now_ns=0).is_healthy


def test_an_image_that_cannot_be_pulled_is_named_in_the_reason() -> None:
    task = a_task(node="n1", state=TaskState.REJECTED)
    task = replace(
        task,
        spec=replace(task.spec, container_spec=ContainerSpec(image="nope:1")),
        status=replace(task.status, err="No such image: nope:1"),
    )
    assert summary(task, a_node("n1")) == "No such image: nope:1"


# -- jobs ----------------------------------------------------------------------------------------------------------

STAMP = timestamp(10**18)


def a_job(total: int | None = 2) -> Service:
    if total is not None:
        mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=total))
    else:
        mode = ServiceMode(global_job=GlobalJob())
    job = a_service("job")
    return replace(
        job, spec=replace(job.spec, mode=mode), job_status=JobStatus(job_iteration=Version(index=3))
    )


def a_run(service: Service, slot: int, state: TaskState, *, iteration: int = 3, node: str = "n1") -> Task:
    desired = TaskState.SHUTDOWN if state is TaskState.FAILED else TaskState.COMPLETE
    task = a_task(service=service, slot=slot, node=node, state=state, desired=desired)
    ended = ContainerStatus(container_id="c", exit_code=1)
    return replace(
        task,
        job_iteration=Version(index=iteration),
        status=replace(task.status, container_status=ended, timestamp=STAMP),
    )


def test_a_job_that_completed_says_so_and_since_when() -> None:
    job = a_job(2)
    tasks = [a_run(job, 1, TaskState.COMPLETE), a_run(job, 2, TaskState.COMPLETE)]
    reported = explain_service(job, tasks, wanted=1, nodes={}, now_ns=0)
    assert (reported.summary, reported.is_healthy, reported.ended_at) == ("2 of 2 completed", True, STAMP)


def test_a_global_job_that_completed_says_on_how_many_nodes() -> None:
    job = a_job(None)
    tasks = [a_run(job, 0, TaskState.COMPLETE, node=node) for node in ("n1", "n2")]
    assert explain_service(job, tasks, wanted=0, nodes={}, now_ns=0).summary == "2 of 2 completed"


@pytest.mark.parametrize(
    ("failures", "words"), [(1, "without a restart"), (2, "after 1 restart"), (7, "after 6 restarts")]
)
def test_a_job_that_gave_up_says_where_after_how_many_restarts_and_of_what(failures: int, words: str) -> None:
    job = a_job(2)
    moved = replace(a_run(job, 2, TaskState.SHUTDOWN), desired_state=TaskState.SHUTDOWN)
    failed = [a_run(job, 2, TaskState.FAILED) for _ in range(failures)]
    tasks = [a_run(job, 1, TaskState.COMPLETE), moved, *failed]
    reported = explain_service(job, tasks, wanted=1, nodes={}, now_ns=0)
    assert not reported.is_healthy
    assert reported.summary == f"FAILED: exit 1; slot 1 gave up {words}; 1 of 2 completed", "as in NAME.1"


def test_a_global_job_has_not_failed_on_a_node_that_is_drained_until_its_run_has_ended_without_it() -> None:
    job = a_job(None)
    stopped = replace(a_run(job, 0, TaskState.SHUTDOWN, node="n2"), desired_state=TaskState.SHUTDOWN)
    tasks = [a_run(job, 0, TaskState.RUNNING), stopped]
    node = a_node("n2")
    nodes = {node.id: replace(node, spec=replace(node.spec, availability=Availability.DRAIN))}
    going = explain_service(job, tasks, wanted=1, nodes=nodes, now_ns=0)
    assert going.summary == "0 of 1 completed, 1 running; not on n2, whose availability is drain"
    assert (going.reason, going.is_healthy) == ("1 running; not on n2, whose availability is drain", False)
    tasks[0] = a_run(job, 0, TaskState.COMPLETE)
    done = explain_service(job, tasks, wanted=1, nodes=nodes, now_ns=0)
    assert (done.reason, done.is_healthy) == ("not on n2, whose availability is drain", True)
    assert job.job_status is not None
    status = replace(job.job_status, outcome="failed", settled_iteration=Version(index=3))
    schedule = ScheduleStatus(settled=STAMP)
    over = replace(job, job_status=replace(status, schedule=schedule, last_execution=STAMP))
    summary = explain_service(over, tasks, wanted=1, nodes=nodes, now_ns=0).summary
    assert summary == "FAILED: its task was stopped on n2; 1 of 2 completed"
    tasks[1] = replace(stopped, restart=Restart(stop_cause=StopCause.NODE_DRAINED.value))
    summary = explain_service(over, tasks, wanted=1, nodes=nodes, now_ns=0).summary
    assert summary == "FAILED: its task was stopped, because its node n2 was drained; 1 of 2 completed", (
        "as in skep job ls, also if n2 is active again"
    )
    down = Restart(stop_cause=StopCause.NODE_DOWN.value)
    last = replace(
        a_run(job, 0, TaskState.SHUTDOWN, node="n3"), desired_state=TaskState.SHUTDOWN, restart=down
    )
    for task, second in ((tasks[1], "00.12"), (last, "00.1")):
        at = Timestamp(f"2026-12-01T15:00:{second}Z")
        tasks = [
            *(one for one in tasks if one.id != task.id),
            replace(task, status=replace(task.status, timestamp=at)),
        ]
    summary = explain_service(over, tasks, wanted=1, nodes=nodes, now_ns=0).summary
    assert summary.startswith("FAILED: 2 tasks were stopped, one because its node n2 was drained")
    store = LocalTransaction(State(), 0)
    for one in (node, over, *tasks):
        store.put(one)
    assert failure(store, over) == "its task was stopped, because its node n2 was drained", "of the same task"


def test_a_global_job_that_no_node_may_run_is_not_one_whose_tasks_come_next() -> None:
    job = a_job(None)
    alone = explain_service(job, [], wanted=0, nodes={}, now_ns=0)
    assert (alone.summary, alone.is_healthy) == ("0 of 0 completed: no node is eligible", True)
    agent = a_service("agent", is_global=True)
    for one in (alone, explain_service(agent, [], wanted=0, nodes={}, now_ns=0)):
        assert one.reason == "no node is eligible"
    drained = replace(a_run(job, 0, TaskState.SHUTDOWN), desired_state=TaskState.SHUTDOWN)
    waits = explain_service(job, [drained], wanted=0, nodes={}, now_ns=0)
    assert (waits.summary, waits.is_healthy) == ("0 of 0 completed; not on node n1", True)
    begins = explain_service(job, [], wanted=0, nodes={}, now_ns=0, can_begin=lambda: True)
    assert (begins.reason, begins.is_healthy) == ("its tasks are not created yet", False)


def test_a_job_under_way_is_neither_done_nor_failed_and_earlier_iterations_do_not_count() -> None:
    job = a_job(2)
    tasks = [a_run(job, 1, TaskState.COMPLETE, iteration=2), a_run(job, 1, TaskState.RUNNING)]
    reported = explain_service(job, tasks, wanted=1, nodes={}, now_ns=0)
    assert (reported.summary, reported.is_healthy) == ("0 of 2 completed, 1 running", False)


def a_task_that_waits(failures: int) -> Task:
    task = a_task(state=TaskState.READY, desired=TaskState.READY, node="n1")
    return replace(
        task, restart=Restart(failures=failures, delay=6 * 10**9, not_before=timestamp(106 * 10**9))
    )


@pytest.mark.parametrize("check", [None, HealthConfig(test=("CMD", "true"))])
def test_a_start_names_the_health_check_that_fails_meanwhile(check: HealthConfig | None) -> None:
    """The image may have the check."""
    failure = 'its health check "true" failed: exit 1, no output'
    task = a_task(state=TaskState.STARTING, node="m1")
    task = replace(
        task,
        spec=replace(task.spec, container_spec=ContainerSpec(image="w", healthcheck=check)),
        status=replace(task.status, message=f"starting: {failure}"),
    )
    reported = explain_task(task, a_node("m1"))
    assert reported.summary == f"m1 waits for it to become healthy: {failure}"


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        ("", "waiting"),
        (", which has failed", "dependency"),
        (", which does not exist", "dependency"),
        (", which is stopped", "dependency"),
    ],
)
def test_a_wait_for_a_service_that_cannot_become_ready_is_a_kind_of_its_own(end: str, kind: str) -> None:
    web = a_service("web")
    task = a_task(service=web, state=TaskState.PENDING)
    task = replace(task, status=replace(task.status, err=f"waits for migrate to complete{end}"))
    reported = explain_service(web, [task], wanted=1, nodes={}, now_ns=0)
    assert reported.problem is not None
    assert (reported.problem.kind, reported.reason) == (kind, f"it waits for migrate to complete{end}")
    assert reported.state is HealthState.CONVERGING


def test_a_task_that_waits_for_its_next_attempt_says_when_that_is() -> None:
    now_ns = 100 * 10**9
    assert next_attempt(a_task_that_waits(1), now_ns) == "next attempt in 6 s"
    assert next_attempt(a_task_that_waits(5), now_ns) == "next attempt in 6 s (crash loop, 5th)"
    assert next_attempt(a_task_that_waits(11), now_ns).endswith("(crash loop, 11th)")
    assert next_attempt(a_task_that_waits(22), now_ns).endswith("(crash loop, 22nd)")
    assert next_attempt(a_task(state=TaskState.READY, desired=TaskState.READY), now_ns) == ""
    started = replace(a_task_that_waits(5), desired_state=TaskState.RUNNING)
    assert next_attempt(started, now_ns) == ""
    reported = summary(a_task_that_waits(3), a_node("n1"))
    assert reported == (
        "earlier tasks failed, and none of them is kept; crash loop, 3 failures in a row; next attempt at 00:01:46 UTC"
    )


def test_a_new_attempt_shows_the_end_of_the_task_before_it() -> None:
    end = TaskEnd(cause="exit", lines=(KeptLine(text="boom"),))
    failed = failed_with(3, "task: non-zero exit (3)")
    failed = replace(failed, status=replace(failed.status, end=end))
    waits = a_task_that_waits(5)
    reported = explain_task(waits, a_node("n1"), slot=(failed, waits))
    assert (reported.end, reported.summary) == (
        end,
        'exit 3, last line "boom"; crash loop, 5 failures in a row, the last on n1; next attempt at 00:01:46 UTC',
    )
    running = replace(waits, status=TaskStatus(state=TaskState.RUNNING), desired_state=TaskState.RUNNING)
    found = explain_task(running, a_node("n1"), slot=(failed, running))
    assert (found.end, found.summary) == (None, "it runs on n1")


def test_a_task_that_waits_for_a_service_says_so_whatever_the_nodes_could_take() -> None:
    task = a_task(service=a_service("web"), state=TaskState.PENDING)
    task = replace(task, status=replace(task.status, err="waits for db to be healthy"))
    assert explain_task(task, None, verdicts(task, a_node("good"))).summary == "it waits for db to be healthy"
    assert summary(task, None) == "it waits for db to be healthy"


def test_a_start_that_ends_as_unhealthy_is_not_called_a_wait_for_health() -> None:
    """The node stops the container, which may take its whole grace period."""
    task = a_task(node="n1", state=TaskState.STARTING)
    failed = 'its health check "false" failed: exit 1, no output'
    for words, expected in (
        (failed, f"n1 waits for it to become healthy: {failed}"),
        (f"unhealthy: {failed}", f"n1 stops it: unhealthy: {failed}"),
    ):
        message = f"{FAILED_CHECK}{words}"
        found = replace(task, status=replace(task.status, message=message))
        assert explain_task(found, a_node("n1")).summary == expected


def test_a_running_task_that_its_node_stops_as_unhealthy_is_a_problem_of_its_service() -> None:
    service, node = a_service("web", replicas=2), a_node("n1")
    tasks = [
        a_task(f"t{slot}", slot=slot, node="n1", service=service, state=TaskState.RUNNING) for slot in (1, 2)
    ]
    end = TaskEnd(
        cause=EndCause.UNHEALTHY.value, health_command="false", health_failures=3, health_exit_code=1
    )
    tasks[1] = replace(tasks[1], status=replace(tasks[1].status, end=end))
    words = (
        'unhealthy: its health check "false" failed 3 times in a row, last: exit 1, no output; n1 stops it'
    )
    assert explain_task(tasks[1], node).summary == words
    (problem,) = problems_of(service, tasks, {node.id: node}, wanted=2, now_ns=0)
    assert (problem.task_id, problem.kind, problem.reason) == ("t2", "unhealthy", words)


def test_an_autoscaled_service_says_what_it_goes_by_and_why_it_is_not_scaled() -> None:
    spec = replace(a_service_spec(replicas=2), labels={"skep.autoscale": "1..2", "skep.autoscale.cpu": "50"})
    service = a_service("web", spec=spec)
    tasks = [a_task(f"t{slot}", slot=slot, service=service, state=TaskState.RUNNING) for slot in (1, 2)]
    usages = {task.id: TaskUsage(nano_cpus=900_000_000, memory_bytes=0) for task in tasks}

    def explained(known: int) -> tuple[str, int]:
        some = {task.id: usages[task.id] for task in tasks[:known]}
        found = explain_autoscaling(
            service, tasks, ScalingMeasurements(usages=some), lambda number: (number, "")
        )
        assert found is not None
        return found.summary, found.unmeasured

    assert explained(2) == (
        "cpu 90%, target 50%, over 2 of 2 tasks: it is at its maximum number of tasks",
        0,
    )
    assert explained(0) == ("none of its 2 tasks is measured", 2)
    assert (
        explain_autoscaling(
            a_service("web"), tasks, ScalingMeasurements(usages=usages), lambda number: (number, "")
        )
        is None
    )


def test_a_freeze_that_keeps_an_autoscaled_service_from_fewer_tasks_is_named() -> None:
    service = a_service("web", spec=replace(a_service_spec(replicas=2), labels={"skep.autoscale": "1..5"}))
    tasks = [a_task(f"t{slot}", slot=slot, service=service, state=TaskState.RUNNING) for slot in (1, 2)]
    usages = {task.id: TaskUsage(nano_cpus=0, memory_bytes=0) for task in tasks}

    def explained(frozen: str) -> str:
        found = explain_autoscaling(
            service, tasks, ScalingMeasurements(usages=usages), lambda number: (number, ""), frozen=frozen
        )
        assert found is not None
        return found.summary

    assert explained("").endswith(": 1 would suffice, scaling down after 300 s")
    assert explained("the cluster is frozen").endswith(": 1 would suffice, but the cluster is frozen")


@pytest.mark.parametrize(
    ("idle", "doors", "frozen", "expected"),
    [
        ({}, {}, "", "because no proxy of the front door counts its requests"),
        ({"n1": {"web": 7.0}}, {"n1": "m1", "n2": "w2"}, "", "because its requests on w2 are not known"),
        ({"n1": {"web": 7.0}}, {"n1": "m1"}, "", "after 300 s without a request, 7 s of which are over"),
        ({"n1": {"web": 400.0}}, {"n1": "m1"}, "the cluster is frozen", "stays: the cluster is frozen"),
    ],
)
def test_the_reason_names_why_a_service_is_not_scaled_to_zero(
    idle: IdleReports, doors: Mapping[NodeId, str], frozen: str, expected: str
) -> None:
    labels = {"skep.autoscale": "0..5", "skep.http": "web.example.com"}
    service = a_service("web", spec=replace(a_service_spec(replicas=1), labels=labels))
    found = explain_autoscaling(
        service,
        [a_task(service=service, state=TaskState.RUNNING)],
        ScalingMeasurements(idle=idle),
        lambda number: (number, ""),
        doors=doors,
        frozen=frozen,
    )
    assert found is not None
    assert found.summary.endswith(expected)


def test_a_quota_that_keeps_a_service_from_more_tasks_is_named() -> None:
    service = a_service("web", spec=replace(a_service_spec(replicas=1), labels={"skep.autoscale": "1..5"}))
    task = a_task(service=service, state=TaskState.RUNNING)
    usages = {task.id: TaskUsage(nano_cpus=3_000_000_000, memory_bytes=0)}
    found = explain_autoscaling(
        service,
        [task],
        ScalingMeasurements(usages=usages),
        lambda _: (1, "the quota of the stack shop is exceeded"),
    )
    assert found is not None
    assert found.summary == "the quota of the stack shop is exceeded"


def test_a_task_that_was_stopped_because_of_its_node_says_so() -> None:
    task = a_task("t1", service="web", node="n1", state=TaskState.SHUTDOWN)
    task = replace(task, status=replace(task.status, err="killed"))
    assert explain_task(task, a_node("n1")).summary == "killed"
    stopped = replace(task, restart=Restart(was_stopped=True, stop_cause=StopCause.NODE_DRAINED.value))
    words = "it was stopped, because its node n1 was drained: killed"
    assert explain_task(stopped, a_node("n1")).summary == words
    newer = replace(task, restart=Restart(was_stopped=True, stop_cause="a later cause"))
    assert explain_task(newer, a_node("n1")).summary == "killed"
    lost = a_task("t1", service="web", node="n1", state=TaskState.ORPHANED)
    assert explain_task(lost, None).summary == "it was lost, because its node was removed"


@pytest.mark.parametrize(
    "state", [TaskState.RUNNING, TaskState.SHUTDOWN, TaskState.FAILED, TaskState.ORPHANED]
)
def test_a_service_whose_task_left_its_node_and_is_not_restarted_waits_for_no_other(state: TaskState) -> None:
    policy = RestartPolicy(condition=RestartCondition.NONE)
    service = a_service("once", replicas=2, restart=policy)
    runs = a_task("t1", service=service, slot=1, node="n1")
    stopped = a_task("t2", service=service, slot=2, node="n2", state=state, desired=TaskState.SHUTDOWN)
    stopped = replace(stopped, restart=Restart(was_stopped=True, stop_cause=StopCause.NODE_DOWN.value))
    found = explain_service(service, [runs, stopped], wanted=2, nodes={}, now_ns=0)
    assert found.summary == "its node n2 was down; not restarted, by its restart policy; 1 of 2 tasks run"
    assert found.state is HealthState.DEGRADED
    evicted = replace(stopped, restart=None, status=replace(stopped.status, state=TaskState.ORPHANED))
    found = explain_service(service, [runs, evicted], wanted=2, nodes={}, now_ns=0)
    assert found.summary == "its node was removed; not restarted, by its restart policy; 1 of 2 tasks run"
    other = replace(stopped, spec=replace(stopped.spec, restart_policy=None))
    again = explain_service(service, [runs, other], wanted=2, nodes={}, now_ns=0)
    assert again.reason == "its tasks are not created yet", "it gets another one"


def test_a_global_service_lacks_no_task_on_a_node_that_takes_none() -> None:
    service = a_service("once", is_global=True, restart=RestartPolicy(condition=RestartCondition.NONE))
    stopped = a_task(
        "t", service=service, slot=0, node="n1", state=TaskState.SHUTDOWN, desired=TaskState.SHUTDOWN
    )
    drained = a_node("n1", availability=Availability.DRAIN)
    away = explain_service(service, [stopped], wanted=1, nodes={drained.id: drained}, now_ns=0)
    assert away.reason == "its tasks are not created yet", "of another node"
    back = explain_service(service, [stopped], wanted=1, nodes={drained.id: a_node("n1")}, now_ns=0)
    assert back.reason == "its task on n1 was stopped"
