"""The one reason why a service is not in its desired state: in words, and stable from one attempt to the next."""

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.diagnosis.explanations import ServiceExplanation, explain_service, explain_task
from skep.manager.diagnosis.reasons import CauseKind, TaskProblem
from skep.manager.scheduler.explaining.explain import NodeVerdict
from skep.model.container import ContainerSpec, HealthConfig, Mount
from skep.model.node import Availability, EnginePlugin, Node, NodeState
from skep.model.node_reports.conditions import DISK_PRESSURE_LABEL
from skep.model.service import (
    DiscreteResource,
    GenericResource,
    Placement,
    Platform,
    PortConfig,
    PublishMode,
    Resources,
    Service,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import ContainerStatus, Restart, Task, TaskState, TaskStatus
from skep.model.task_end import EndCause, KeptLine, TaskEnd
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.meta import Driver
from skep.model.values.times import SECOND_NS, Timestamp, timestamp
from tests.support.builders import a_node, a_service, a_task

FAILED, READY = TaskState.FAILED, TaskState.READY
M1 = a_node("m1")
NODES = {M1.id: M1}
WEB = a_service("web", replicas=1)
BOOM = TaskEnd(cause=EndCause.EXIT.value, lines=(KeptLine(text="starting"), KeptLine(text="boom: no db")))
BOTH_LINES = (KeptLine(text="only \x1b[31mred"), KeptLine(text="  \n"))
SICK = TaskEnd(
    cause=EndCause.UNHEALTHY.value,
    signal="SIGKILL",  # as nodes of earlier versions report it
    health_output="connection refused\nsecond line\n",
    health_command="curl -f localhost",
    health_failures=3,
    health_exit_code=7,
)


def at(second: int) -> Timestamp:
    return timestamp(second * SECOND_NS)


def ended(
    code: int,
    end: TaskEnd | None = None,
    err: str = "",
    *,
    second: int = 0,
    slot: int = 1,
    service: Service = WEB,
    state: TaskState = FAILED,
) -> Task:
    """A task that ended by itself, was created at ``second`` and has a successor."""
    status = TaskStatus(
        state=state,
        err=err or (f"task: non-zero exit ({code})" if code else ""),
        container_status=ContainerStatus(container_id="c" * 64, exit_code=code),
        end=end,
        timestamp=at(second + 1),
    )
    task = a_task(service=service, slot=slot, node="m1", desired=TaskState.SHUTDOWN)
    return replace(task, id=TaskId(f"t{slot}-{second}"), created_at=at(second), status=status)


def attempt(
    state: TaskState, *, failures: int = 1, second: int = 100, slot: int = 1, service: Service = WEB
) -> Task:
    """The successor of failed tasks, on its way."""
    desired = READY if state < TaskState.STARTING else TaskState.RUNNING
    task = a_task(service=service, slot=slot, node="m1", state=state, desired=desired)
    restart = Restart(failures=failures, delay=6 * SECOND_NS, not_before=at(second + 6), since=at(22))
    return replace(task, id=TaskId(f"t{slot}-{second}"), created_at=at(second), restart=restart)


def explained(
    *tasks: Task, service: Service = WEB, wanted: int = 1, nodes: Sequence[Node] = (M1,), now_s: float = 0.0
) -> ServiceExplanation:
    by_id = {node.id: node for node in nodes}
    return explain_service(service, tasks, wanted=wanted, nodes=by_id, now_ns=int(now_s * SECOND_NS))


def problem(*tasks: Task, service: Service = WEB) -> TaskProblem:
    found = explained(*tasks, service=service).problem
    assert found is not None
    return found


CHECK = 'unhealthy: its health check "curl -f localhost" failed 3 times in a row, last: '
UNHEALTHY = f'{CHECK}exit 7, output "connection refused second line"'


@pytest.mark.parametrize(
    ("task", "kind", "reason"),
    [
        (ended(1, BOOM), CauseKind.EXIT, 'exit 1, last line "boom: no db"'),
        (ended(3), CauseKind.EXIT, "exit 3"),
        (ended(1, replace(BOOM, lines=BOTH_LINES)), CauseKind.EXIT, 'exit 1, last line "only red"'),
        (ended(139, TaskEnd(cause="signal", signal="SIGSEGV")), CauseKind.SIGNAL, "exit 139 (SIGSEGV)"),
        (
            ended(0, state=TaskState.COMPLETE),
            CauseKind.COMPLETED,
            "its process ended with code 0; a service needs a command that keeps running",
        ),
        (
            ended(137, SICK, "task: non-zero exit (137): dockerexec: unhealthy container"),
            CauseKind.UNHEALTHY,
            UNHEALTHY,
        ),
        (
            ended(
                137, replace(SICK, health_exit_code=None, health_output="Health check exceeded timeout (1s)")
            ),
            CauseKind.UNHEALTHY,
            f"{CHECK}Health check exceeded timeout (1s)",
        ),
        (
            ended(
                137,
                replace(
                    SICK,
                    health_exit_code=None,
                    health_output="OCI runtime exec failed: exec failed: unable to start container process: "
                    'exec: "curl": executable file not found in $PATH: unknown',
                ),
            ),
            CauseKind.UNHEALTHY,
            f'{CHECK}exec: "curl": executable file not found in $PATH',
        ),
        (
            ended(137, replace(SICK, health_output="")),
            CauseKind.UNHEALTHY,
            f"{CHECK}exit 7, no output",
        ),
        (
            ended(
                137,
                TaskEnd(cause="out-of-memory", signal="SIGKILL"),
                "task: non-zero exit (137): out of memory",
            ),
            CauseKind.OUT_OF_MEMORY,
            "out of memory",
        ),
        (
            ended(127, err='starting container failed: exec: "nosuch": executable file not found in $PATH'),
            CauseKind.START_FAILED,
            'its process could not be started: exec: "nosuch": executable file not found in $PATH',
        ),
        (
            ended(
                127,
                err="starting container failed: OCI runtime create failed: runc create failed: unable to start "
                'container process: exec: "nosuch": executable file not found in $PATH: unknown',
            ),
            CauseKind.START_FAILED,
            'its process could not be started: exec: "nosuch": executable file not found in $PATH',
        ),
        (
            ended(0, err="No such image: nope:1", state=TaskState.REJECTED),
            CauseKind.REJECTED,
            "No such image: nope:1",
        ),
    ],
)
def test_a_failure_is_said_in_words(task: Task, kind: CauseKind, reason: str) -> None:
    found = explained(task, attempt(READY))
    assert (found.reason, problem(task, attempt(READY)).kind) == (reason, kind.value)
    assert found.summary.startswith(reason)
    if kind in (CauseKind.UNHEALTHY, CauseKind.OUT_OF_MEMORY):
        assert "137" not in found.summary
        assert "SIGKILL" not in found.summary


def test_a_node_of_an_earlier_version_or_of_docker_reports_less_and_the_spec_has_the_check() -> None:
    template = ContainerSpec(image="i", healthcheck=HealthConfig(test=("CMD-SHELL", "exit 1")))
    task = ended(137, None, "task: non-zero exit (137): dockerexec: unhealthy container")
    task = replace(task, spec=replace(task.spec, container_spec=template))
    successor = replace(attempt(READY), spec=task.spec)
    assert explained(task, successor).reason == 'unhealthy: its health check "exit 1" failed'


@pytest.mark.parametrize(
    "state",
    [
        TaskState.NEW,
        TaskState.PENDING,
        TaskState.ASSIGNED,
        TaskState.ACCEPTED,
        TaskState.PREPARING,
        TaskState.READY,
        TaskState.STARTING,
    ],
)
def test_a_new_attempt_on_its_way_does_not_hide_the_failure(state: TaskState) -> None:
    earlier = [ended(1, TaskEnd(lines=(KeptLine(text=f"{n}"),)), second=n) for n in range(3)]
    found = explained(*earlier, ended(1, BOOM, second=50), attempt(state, failures=4))
    assert found.reason == 'exit 1, last line "boom: no db"'
    assert found.problem is not None
    assert (found.problem.failures, found.problem.since, found.problem.at) == (4, at(22), at(51))
    assert (found.problem.end, found.problem.is_given_up) == (BOOM, False)
    assert found.restart_summary.startswith(
        "crash loop, 4 failures in a row since 00:00:22 UTC, the last on m1"
    )


def started(task: Task, second: int) -> Task:
    return replace(task, status=replace(task.status, timestamp=at(second)))


@pytest.mark.parametrize(
    ("now_s", "is_healthy"), [(108.0, False), (110.0, False), (119.9, False), (120.0, True), (90.0, True)]
)
def test_a_task_in_a_crash_loop_keeps_the_reason_until_it_has_run_for_long_enough(
    now_s: float, is_healthy: bool
) -> None:
    looping = started(attempt(TaskState.RUNNING, failures=3), 110)
    found = explained(ended(1, BOOM), looping, now_s=now_s)
    assert found.is_healthy is is_healthy
    if is_healthy:
        assert (found.reason, found.problem) == ("", None)
        return
    assert found.reason == 'exit 1, last line "boom: no db"'
    assert found.summary.endswith("1 of 1 tasks run")
    assert found.problem is not None
    assert (found.problem.failures, found.problem.since) == (3, at(22))


def test_a_task_that_runs_after_one_failure_is_in_no_crash_loop() -> None:
    once = started(attempt(TaskState.RUNNING, failures=1), 110)
    assert explained(ended(1, BOOM), once, now_s=111.0).is_healthy


def test_a_task_that_was_stopped_moved_or_lost_is_no_failure_and_hides_none() -> None:
    moved = replace(
        ended(143, second=60), restart=Restart(failures=3, was_stopped=True), status=TaskStatus(state=FAILED)
    )
    assert explained(ended(1, BOOM, second=50), moved, attempt(READY, failures=3)).reason.startswith("exit 1")
    fresh = replace(attempt(TaskState.PREPARING), restart=None)
    assert explained(moved, fresh).reason == "m1 prepares it: image, mounts and networks"


def test_failures_of_the_spec_before_an_update_are_not_the_reason_of_the_new_one() -> None:
    other = replace(WEB.spec.task_template, force_update=1)
    new = replace(attempt(TaskState.PREPARING), spec=other, spec_version=None, restart=None)
    old = ended(1, BOOM)
    assert explained(replace(old, spec=replace(old.spec, force_update=5)), new).reason.startswith(
        "m1 prepares"
    )


def test_what_keeps_the_new_attempt_now_comes_before_what_failed() -> None:
    waits = attempt(TaskState.PENDING)
    waits = replace(
        waits, status=replace(waits.status, err="no suitable node (max replicas per node limit exceed)")
    )
    assert explained(ended(1, BOOM), waits).reason.startswith("no suitable node")


def test_a_service_that_gave_up_says_so() -> None:
    found = explained(ended(1, BOOM))
    assert found.reason == 'exit 1, last line "boom: no db"'
    assert (
        found.summary
        == 'exit 1, last line "boom: no db"; not restarted, by its restart policy; 0 of 1 tasks run'
    )
    assert found.problem is not None
    assert found.problem.is_given_up


def test_a_task_that_has_just_failed_is_not_given_up() -> None:
    task = replace(ended(1, BOOM), desired_state=TaskState.RUNNING)
    found = explained(task)
    assert found.problem is not None
    assert (found.reason, found.problem.is_given_up) == ('exit 1, last line "boom: no db"', False)


def test_the_oldest_failure_is_named_before_others_and_before_what_is_on_its_way() -> None:
    late = replace(attempt(READY, slot=1), restart=Restart(failures=9, since=at(90)))
    old = replace(attempt(READY, slot=2), restart=Restart(failures=2, since=at(10)))
    new = attempt(TaskState.PENDING, slot=3)
    new = replace(new, restart=None, status=replace(new.status, err="no suitable node"))
    tasks = [ended(1, slot=1), late, ended(2, slot=2), old, new]
    found = explained(*tasks, wanted=3)
    assert (found.reason, [one.name for one in found.reasons]) == ("exit 2", ["web.2", "web.1", "web.3"])


@pytest.mark.parametrize(
    ("err", "kind", "reason", "code"),
    [
        ("task: non-zero exit (3)", CauseKind.EXIT, "exit 3", 3),
        ("task: non-zero exit (3): no db", CauseKind.EXIT, "exit 3: no db", 3),
        ("task: non-zero exit (139)", CauseKind.SIGNAL, "exit 139 (SIGSEGV)", 139),
        ("task: non-zero exit", CauseKind.EXIT, "task: non-zero exit", None),
        ("its executor is not there", CauseKind.START_FAILED, "its executor is not there", None),
    ],
)
def test_a_process_without_a_container_that_ended_was_started(
    err: str, kind: CauseKind, reason: str, code: int | None
) -> None:
    task = ended(1)
    found = problem(replace(task, status=TaskStatus(state=FAILED, err=err)), attempt(READY))
    assert (found.kind, found.reason, found.exit_code) == (kind.value, reason, code)


def test_a_need_that_no_node_meets_is_one_sentence_with_the_largest_node() -> None:
    service = a_service("web", reserve=Resources(nano_cpus=16 * 10**9, memory_bytes=1 << 30))
    refused = "no suitable node (insufficient resources on 2 nodes)"
    task = a_task(service=service, state=TaskState.PENDING)
    task = replace(task, status=replace(task.status, err=refused), node_id=NodeId(""))
    small = a_node("w1", has=Resources(nano_cpus=10**9, memory_bytes=2 << 30))
    large = a_node("m1", has=Resources(nano_cpus=2 * 10**9, memory_bytes=2 << 30))
    found = explained(task, service=service, nodes=(small, large))
    assert found.reason == "needs 16 CPUs; the largest node, m1, has 2"
    enough = a_node("w2", has=Resources(nano_cpus=32 * 10**9, memory_bytes=2 << 30))
    assert explained(task, service=service, nodes=(small, enough)).reason == (
        f"needs 16 CPUs, 1024 MiB of memory; {refused}"
    )
    tight = a_service("web", reserve=Resources(memory_bytes=4 << 30))
    task = replace(task, spec=tight.spec.task_template)
    assert explained(task, service=tight, nodes=(small, large)).reason == (
        "needs 4096 MiB of memory; the largest node, m1, has 2048 MiB"
    )


def test_a_host_port_that_no_node_has_left_is_named_for_the_service_and_the_task() -> None:
    ports = tuple(
        PortConfig(target_port=80, published_port=number, publish_mode=PublishMode.HOST)
        for number in (80, 443)
    )
    service = a_service("web", ports=ports)
    refused = "no suitable node (host-mode port already in use on 2 nodes)"
    task = a_task(service=service, state=TaskState.PENDING)
    task = replace(task, status=replace(task.status, err=refused), node_id=NodeId(""))
    reason = f"needs ports 80/tcp, 443/tcp; {refused}"
    assert explained(task, service=service, nodes=(a_node("m1"),)).reason == reason
    verdicts = [NodeVerdict(node_id=NodeId("m1"), hostname="m1", reasons=("refused",))]
    assert explain_task(task, None, verdicts, spec=service.spec).summary == reason


@pytest.mark.parametrize(
    ("availability", "state", "words"),
    [
        (Availability.ACTIVE, NodeState.DOWN, "down"),
        (Availability.DRAIN, NodeState.READY, "drained"),
        (Availability.PAUSE, NodeState.READY, "paused"),
    ],
)
def test_unavailable_nodes_that_meet_a_constraint_are_named_with_their_states(
    availability: Availability, state: NodeState, words: str
) -> None:
    service = a_service("web", constraints=("node.labels.ssd==yes",))
    refused = "no suitable node (scheduling constraints not satisfied on 1 node; 1 node not available for new tasks)"
    task = a_task(service=service, state=TaskState.PENDING)
    task = replace(task, status=replace(task.status, err=refused), node_id=NodeId(""))
    fitting = a_node("w1", labels={"ssd": "yes"}, availability=availability, state=state)
    reason = explained(task, service=service, nodes=(a_node("m1"), fitting)).reason
    assert (
        reason
        == f"needs node.labels.ssd==yes; no node that meets this is available: w1 is {words}; {refused}"
    )
    other = a_node("w2", labels={"ssd": "yes"})
    assert "available:" not in explained(task, service=service, nodes=(other, fitting)).reason


@pytest.mark.parametrize(
    ("full", "words"),
    [
        (("w1",), "w1"),
        (("w3", "w1", "w2"), "w1, w2, w3"),
        (("w1", "w2", "w3", "w4", "w5"), "w1, w2, w3 and 2 more"),
    ],
)
def test_nodes_with_a_full_disk_are_named(full: tuple[str, ...], words: str) -> None:
    refused = f"no suitable node (disk full on {len(full)} nodes)"
    task = a_task(service=WEB, state=TaskState.PENDING)
    task = replace(task, status=replace(task.status, err=refused), node_id=NodeId(""))
    nodes = [a_full_node(name) for name in full]
    drained = replace(
        a_full_node("w9"), spec=replace(a_full_node("w9").spec, availability=Availability.DRAIN)
    )
    reason = explained(task, nodes=(M1, *nodes, drained)).reason
    assert reason == f"{refused}; free disk space or inodes on {words}"


def a_full_node(name: str) -> Node:
    node = a_node(name)
    labels = {DISK_PRESSURE_LABEL: "the disk at /var/lib/skep is 96 % full"}
    engine = replace(node.description.engine, labels=labels)
    return replace(node, description=replace(node.description, engine=engine))


def test_a_credential_in_the_last_line_or_in_the_check_is_masked() -> None:
    end = TaskEnd(lines=(KeptLine(text="cannot reach postgres://app:hunter2@db with DB_PASSWORD=hunter2"),))
    assert "hunter2" not in explained(ended(1, end), attempt(READY)).reason
    sick = replace(
        SICK, health_command="check --token=hunter2 http://a:hunter2@x", health_output="PASSWORD=hunter2"
    )
    assert "hunter2" not in explained(ended(137, sick), attempt(READY)).reason


def test_a_paused_update_says_why_its_task_failed_first() -> None:
    message = "update paused due to failure or early termination of task t1"
    paused = replace(WEB, update_status=UpdateStatus(state=UpdateState.PAUSED, message=message))
    assert explained(ended(1, BOOM), attempt(READY), service=paused).reason == (
        'exit 1, last line "boom: no db"; its update is paused'
    )
    by_hand = replace(WEB, update_status=UpdateStatus(state=UpdateState.PAUSED, message="paused by a user"))
    assert explained(a_task(service=WEB, node="m1"), service=by_hand).reason == "paused by a user"


def test_a_service_whose_tasks_are_not_created_yet_says_so() -> None:
    assert explained().summary == "its tasks are not created yet; 0 of 1 tasks run"


def attempts() -> Iterator[TaskState]:
    return (state for state in TaskState if not state.is_terminal and state is not TaskState.RUNNING)


@given(
    state=st.sampled_from([*attempts()]),
    failures=st.integers(1, 99),
    second=st.integers(60, 9999),
)
def test_the_reason_is_the_same_whatever_the_next_attempt_is_at(
    state: TaskState, failures: int, second: int
) -> None:
    before = ended(1, BOOM, second=50)
    found = explained(before, attempt(state, failures=failures, second=second))
    if state is not TaskState.UNKNOWN:
        assert found.reason == 'exit 1, last line "boom: no db"'
    assert not found.is_healthy


@pytest.mark.parametrize(
    ("refusal", "placement", "generic", "offered", "reason"),
    [
        (
            "scheduling constraints not satisfied on 2 nodes",
            Placement(constraints=("node.labels.disk == ssd", "node.role == worker")),
            0,
            0,
            "needs node.labels.disk == ssd, node.role == worker; {refused}",
        ),
        (
            "max replicas per node limit exceed",
            Placement(max_replicas=1),
            0,
            0,
            "needs at most 1 of its service per node; {refused}",
        ),
        (
            "unsupported platform on 2 nodes",
            Placement(platforms=(Platform(os="linux", architecture="arm64"),)),
            0,
            0,
            "needs linux/arm64; {refused}",
        ),
        ("insufficient resources on 2 nodes", Placement(), 2, 0, "needs 2 gpu; no node has any"),
        ("insufficient resources on 2 nodes", Placement(), 2, 1, "needs 2 gpu; the largest node, m1, has 1"),
        ("insufficient resources on 2 nodes", Placement(), 2, 4, "needs 2 gpu; {refused}"),
        ("missing plugin on 2 nodes", Placement(), 0, 0, "{refused}"),
    ],
)
def test_a_task_that_no_node_takes_names_what_it_needs(
    refusal: str, placement: Placement, generic: int, offered: int, reason: str
) -> None:
    def gpus(amount: int) -> Resources:
        one = GenericResource(discrete_resource_spec=DiscreteResource(kind="gpu", value=amount))
        return Resources(generic_resources=(one,) if amount else ())

    refused = f"no suitable node ({refusal})"
    service = a_service("web", reserve=gpus(generic))
    template = replace(service.spec.task_template, placement=placement)
    service = replace(service, spec=replace(service.spec, task_template=template))
    task = a_task(service=service, state=TaskState.PENDING)
    task = replace(task, status=replace(task.status, err=refused), node_id=NodeId(""))
    nodes = (a_node("m1", has=gpus(offered)), a_node("w1", has=Resources()))
    found = explained(task, service=service, nodes=nodes)
    assert found.reason == reason.format(refused=refused)
    verdicts = [NodeVerdict(node_id=NodeId("m1"), hostname="m1", reasons=("refused",))]
    own = explain_task(task, None, verdicts, (), {node.id: node for node in nodes})
    assert own.summary == found.reason, "the task and its service have one reason"


def test_a_driver_that_no_node_has_is_named_and_one_that_some_nodes_have_is_a_need() -> None:
    refused = "no suitable node (missing plugin on 1 node; insufficient resources on 1 node)"
    template = replace(WEB.spec.task_template, log_driver=Driver(name="splunkk"))
    service = replace(WEB, spec=replace(WEB.spec, task_template=template))
    task = a_task(service=service, state=TaskState.PENDING)
    task = replace(task, status=replace(task.status, err=refused), node_id=NodeId(""))

    def node(name: str, *drivers: str) -> Node:
        found = a_node(name)
        plugins = tuple(EnginePlugin(type="Log", name=one) for one in drivers)
        engine = replace(found.description.engine, plugins=plugins)
        return replace(found, description=replace(found.description, engine=engine))

    found = explained(task, service=service, nodes=(node("m1", "json-file"), node("w1", "syslog")))
    assert found.problem is not None
    assert found.problem.kind == CauseKind.TOO_LARGE.value
    assert found.reason == "needs the log driver splunkk; no node has it"
    found = explained(task, service=service, nodes=(node("m1", "json-file"), node("w1", "splunkk:latest")))
    assert found.problem is not None
    assert found.problem.kind == CauseKind.NO_NODE.value
    assert found.reason == f"needs the log driver splunkk; {refused}"


def test_missing_rights_devices_and_cluster_volumes_are_named() -> None:
    labels = {"skep.privileged": "true", "skep.devices": "/dev/kvm"}
    mounts = (Mount(type="cluster", source="photos", target="/photos"),)
    template = replace(WEB.spec.task_template, container_spec=ContainerSpec(labels=labels, mounts=mounts))
    service = replace(WEB, spec=replace(WEB.spec, task_template=template))
    for refusal, needs in (
        ("rights over the machine not allowed on 1 node", "nodes that allow devices,privileged"),
        ("missing device on 1 node", "/dev/kvm"),
        ("cannot fulfill requested CSI volume mounts on 1 node", "the volume photos"),
    ):
        task = a_task(service=service, state=TaskState.PENDING)
        task = replace(
            task, status=replace(task.status, err=f"no suitable node ({refusal})"), node_id=NodeId("")
        )
        assert explained(task, service=service).reason == f"needs {needs}; no suitable node ({refusal})"


def test_a_path_in_a_reason_is_that_of_the_container() -> None:
    root = f"/run/skep/bundles/{'60a9' * 16}/rootfs"
    err = f'starting container failed: error mounting "/v" to rootfs at "/a/b": open {root}/a/b: not a directory'
    found = explained(ended(127, err=err)).reason
    words = 'error mounting "/v" to rootfs at "/a/b": open /a/b: not a directory'
    assert found == f"its process could not be started: {words}"


def test_a_task_that_is_given_up_is_in_no_crash_loop() -> None:
    found = TaskProblem(failures=7, node="w2", since=Timestamp("2026-11-27T00:36:00Z"), is_given_up=True)
    assert found.restart_summary == "gave up after 7 failures in a row since 00:36:00 UTC, the last on w2"


def test_a_task_without_addresses_is_not_called_a_wait_for_another_service() -> None:
    task = a_task(service=WEB, state=TaskState.NEW)
    words = "no available IPv4 addresses on this network's address pools: tiny"
    task = replace(task, status=replace(task.status, err=words), node_id=NodeId(""))
    found = explained(task).problem
    assert found is not None
    assert (found.kind, found.reason) == (CauseKind.NOT_ALLOCATED.value, words)


@pytest.mark.parametrize(
    ("test", "words"),
    [
        (("CMD", "true"), "m1 waits for it to become healthy"),
        (("NONE",), "m1 starts it"),
        ((), "m1 starts it, or waits for the health check of its image"),
    ],
)
def test_a_start_waits_for_a_health_check_only_if_there_may_be_one(test: tuple[str, ...], words: str) -> None:
    service = a_service("web")
    container = ContainerSpec(image="w", healthcheck=HealthConfig(test=test) if test else None)
    task = a_task(service=service, node="m1", state=TaskState.STARTING)
    task = replace(task, spec=replace(task.spec, container_spec=container))
    assert explained(task, service=service).reason == words


def test_a_host_port_of_the_task_before_it_is_no_problem_while_that_one_stops() -> None:
    refused = "no suitable node (host-mode port already in use on 1 node)"
    task = attempt(TaskState.PENDING)
    task = replace(task, status=replace(task.status, err=refused), restart=None)
    before = replace(attempt(TaskState.RUNNING, second=1), id=TaskId("before"))
    stopping = replace(before, desired_state=TaskState.SHUTDOWN)
    found = explained(stopping, task).problem
    assert found is not None
    words = "it starts when the task before it has stopped, which has its port"
    assert (found.kind, found.reason) == (CauseKind.PROGRESSING.value, words)
    for other in (before, replace(stopping, status=replace(stopping.status, state=TaskState.SHUTDOWN))):
        found = explained(other, task).problem
        assert found is not None
        assert found.kind == CauseKind.NO_NODE.value
