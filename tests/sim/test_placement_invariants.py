"""Rules on where tasks are and for how long, and what has to be there in the end: each rejects what is wrong."""

from collections.abc import Iterable, Sequence

import pytest
from msgspec.structs import replace

from sim.invariants.convergence import unmet
from sim.invariants.nodes.affinity import AffinitiesHold
from sim.invariants.nodes.containers import Containers
from sim.invariants.nodes.disconnection import DisconnectPolicies
from sim.invariants.nodes.placement import (
    ReservesAreKept,
    device_violations,
    devices_are_exclusive,
    global_jobs_run_once,
    homes_of,
    meets,
    port_violations,
)
from sim.invariants.nodes.volumes import LocalVolumesStay
from sim.world.storage import DRIVER
from skep.model.container import ContainerSpec, Mount
from skep.model.node import Availability, EngineDescription, Node, NodeSpec, NodeState
from skep.model.options.labels import ON_DISCONNECT, ON_DISCONNECT_DELAY, RESERVE_MEMORY, VOLUME_AFFINITY
from skep.model.service import (
    DiscreteResource,
    EndpointSpec,
    GenericResource,
    GlobalJob,
    JobStatus,
    NamedResource,
    Placement,
    PortConfig,
    PublishMode,
    ResourceRequirements,
    Resources,
    Service,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    UpdateConfig,
    UpdateSplit,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import ContainerStatus, Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, ServiceId, TaskId, VolumeId
from skep.model.values.meta import Driver, Version
from skep.model.values.times import SECOND_NS, timestamp
from skep.model.volume import (
    AccessMode,
    PublishState,
    PublishStatus,
    TypeMount,
    Volume,
    VolumeInfo,
    VolumeScope,
    VolumeSharing,
    VolumeSpec,
)
from tests.sim.histories import W1, W2, History, a_node, a_run, a_task
from tests.support.builders import a_service_spec

HOST_PORT = EndpointSpec(
    ports=(PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST),)
)
RUNNING, PENDING = TaskState.RUNNING, TaskState.PENDING


def a_spec(name: str = "web", **fields: object) -> ServiceSpec:
    return replace(a_service_spec(name, replicas=1, image="app:1"), **fields)


def of(task: Task, spec: ServiceSpec, service: str = "web") -> Task:
    return replace(task, spec=spec.task_template, service_id=ServiceId(service))


# -- ports, constraints, runs on each node ---------------------------------------------------------------------------


def test_two_containers_with_one_port_on_a_node_are_rejected() -> None:
    history = History()
    history.put(Service(id=ServiceId("web"), spec=a_spec("web", endpoint_spec=HOST_PORT)))
    history.put(Service(id=ServiceId("api"), spec=a_spec("api", endpoint_spec=HOST_PORT)))
    history.put(Service(id=ServiceId("db"), spec=a_spec("db")))
    task, other, free = (
        of(a_task(id, node=W1), a_spec(), service)
        for id, service in (("t1", "web"), ("t2", "api"), ("t3", "db"))
    )
    assert list(port_violations(W1, task, [task, free], history.state)) == []
    assert list(port_violations(W1, task, [task, other], history.state)) == [
        "tasks t2 and t1 both hold [('tcp', 8080)] on w1"
    ]


@pytest.mark.parametrize(
    ("constraint", "is_met"),
    [
        ("node.labels.zone==north", True),
        ("node.labels.zone != north", False),
        (" node.labels.zone == south ", False),
        ("node.labels.other!=x", True),
        ("node.hostname!=w1", False),
        ("node.role==worker", True),
        ("what.is.this==x", False),
        ("node.labels.zone not like n*", False),
        ("node.labels.zone not in (south)", True),
        ("node.facts.kernel >= 6.12.0", True),
        ("node.facts.kernel > 6.12", False),
        ("node.facts.kernel > 6.9", True),
        ("node.facts.kernel < 6.9", False),
        ("node.facts.kernel <= 6.12", True),
        ("node.facts.memory >= 1", False),
    ],
)
def test_constraints_are_met_or_not(constraint: str, is_met: bool) -> None:
    found = a_node(W1)
    facts = EngineDescription(labels={"skep.fact.kernel": "6.12.0-18-amd64"})
    description = replace(found.description, engine=facts)
    node = replace(found, spec=NodeSpec(labels={"zone": "north"}), description=description)
    assert meets((constraint,), node) is is_met


def with_devices(task: Task, wanted: int, *given: str) -> Task:
    """Let a task reserve devices, and have some."""
    reserved = Resources(generic_resources=(a_resource(wanted),))
    template = replace(task.spec, resources=ResourceRequirements(reservations=reserved))
    return replace(task, spec=template, generic_resources=tuple(map(a_resource, given)))


def a_resource(what: int | str) -> GenericResource:
    if isinstance(what, int):
        return GenericResource(discrete_resource_spec=DiscreteResource(kind="gpu", value=what))
    return GenericResource(named_resource_spec=NamedResource(kind="gpu", value=what))


@pytest.mark.parametrize(
    ("wanted", "given", "violations"),
    [
        (1, ("b",), []),
        (1, ("a",), ["gpu a of w1 is given to 2 tasks, among them t2"]),
        (1, ("c",), ["gpu c of w1 is given to 1 tasks, among them t2"]),
        (2, ("b",), ["task t2 gets 1 devices on w1 instead of 2"]),
    ],
)
def test_a_device_that_another_task_has_is_rejected(
    wanted: int, given: Sequence[str], violations: Sequence[str]
) -> None:
    history, node = History(devices_are_exclusive), a_node(W1)
    resources = Resources(generic_resources=(a_resource("a"), a_resource("b")))
    history.put(replace(node, description=replace(node.description, resources=resources)))
    history.put(with_devices(a_task("t1", node=W1, state=TaskState.RUNNING), 1, "a"))
    history.put(a_task("t2", slot=2))
    history.put(with_devices(a_task("t2", slot=2, node=W1, state=TaskState.ASSIGNED), wanted, *given))
    assert history.violations == violations


@pytest.mark.parametrize(
    ("reserved", "labeled_s_ago", "is_rejected"),
    [(0, 60.0, False), (256, 60.0, False), (257, 60.0, True), (257, 1.0, False)],
)
def test_a_task_that_takes_what_its_node_keeps_for_the_system_is_rejected(
    reserved: int, labeled_s_ago: float, is_rejected: bool
) -> None:
    """At first no leader needs to know the label."""
    history = History(ReservesAreKept())
    node = a_node(W1)
    history.put(
        replace(node, description=replace(node.description, resources=Resources(memory_bytes=512 << 20)))
    )
    history.put(
        replace(history.state.get(Node, W1), spec=replace(node.spec, labels={RESERVE_MEMORY: "256MiB"}))
    )
    history.after(labeled_s_ago)
    needs = ResourceRequirements(reservations=Resources(memory_bytes=reserved << 20))
    task = a_task("t1")
    task = replace(task, spec=replace(task.spec, resources=needs))
    history.put(task)
    history.put(replace(task, node_id=W1, status=TaskStatus(state=TaskState.ASSIGNED)))
    assert bool(history.violations) is is_rejected, history.violations


def test_two_containers_with_one_device_on_a_node_are_rejected() -> None:
    first, second, other = (
        with_devices(a_task(id, node=W1), 1, name) for id, name in (("t1", "a"), ("t2", "a"), ("t3", "b"))
    )
    assert list(device_violations(W1, second, [second, other])) == []
    assert list(device_violations(W1, second, [first, second])) == [
        "tasks t1 and t2 both use ['gpu a'] on w1"
    ]


def test_a_second_completed_run_of_a_global_job_on_a_node_is_rejected() -> None:
    history = History(global_jobs_run_once)
    spec = a_spec(mode=ServiceMode(global_job=GlobalJob()))
    history.put(Service(id=ServiceId("web"), spec=spec, job_status=JobStatus()))
    for id, iteration in (("t1", 1), ("t2", 2), ("t3", 2)):
        run = a_run(id, slot=0, iteration=iteration, node_id=W1)
        history.put(run)
        history.put(replace(run, status=TaskStatus(state=TaskState.COMPLETE)))
    assert history.violations == ["2 runs of web are completed on w1"]


# -- nodes that are cut off ------------------------------------------------------------------------------------------


def a_lost_node(**labels: str) -> History:
    """A task runs on w1, which goes down."""
    history = History(DisconnectPolicies())
    spec = a_spec(labels=labels)
    history.put(a_node(W1))
    history.put(Service(id=ServiceId("web"), spec=spec))
    history.put(of(a_task("t1", node=W1, state=RUNNING), spec))
    history.put(a_node(W1, state=NodeState.DOWN))
    return history


def replaced(history: History) -> None:
    task = history.state.get(Task, "t1")

    def body(tx: object) -> None:
        tx.put(replace(task, desired_state=TaskState.SHUTDOWN))  # type: ignore[attr-defined]
        tx.put(replace(task, id="t2", node_id=NodeId(""), status=TaskStatus()))  # type: ignore[attr-defined]

    history.commit(body)


@pytest.mark.parametrize(
    ("labels", "kept_s"),
    [
        ({}, 0.0),
        ({ON_DISCONNECT: "replace", ON_DISCONNECT_DELAY: "5s"}, 5.0),
        ({ON_DISCONNECT: "stop", ON_DISCONNECT_DELAY: "5s"}, 15.0),  # and ten seconds to stop
    ],
)
def test_a_task_that_is_replaced_before_the_delay_is_over_is_rejected(
    labels: dict[str, str], kept_s: float
) -> None:
    early, late = a_lost_node(**labels), a_lost_node(**labels)
    replaced(late.after(kept_s))
    assert late.violations == []
    if kept_s:
        replaced(early.after(kept_s - 1.0))
        assert early.violations == [
            f"task t1 was replaced {kept_s - 1:.2f} s after w1 went down, not {kept_s:.2f}"
        ]


def test_a_task_that_is_replaced_despite_keep_is_rejected() -> None:
    history = a_lost_node(**{ON_DISCONNECT: "keep"})
    replaced(history.after(1000.0))
    assert history.violations == ["task t1 was replaced despite keep, 1000.00 s after w1 went down"]


def test_a_task_with_keep_is_replaced_on_request() -> None:
    drained, updated = (a_lost_node(**{ON_DISCONNECT: "keep"}) for _ in range(2))
    node = drained.state.get(Node, W1)
    drained.put(replace(node, spec=NodeSpec(availability=Availability.DRAIN)))
    replaced(drained)
    assert drained.violations == []
    service = updated.state.get(Service, "web")
    updated.put(
        replace(service, spec=replace(a_service_spec("web", image="app:2"), labels=service.spec.labels))
    )
    replaced(updated)
    assert updated.violations == []


@pytest.mark.parametrize(("worked_s", "is_wrong"), [(20.0, True), (10.0, False)])
def test_a_container_that_its_node_had_the_time_to_stop_by_itself_has_no_successor_beside_it(
    worked_s: float, is_wrong: bool
) -> None:
    began = 100.0
    containers = Containers(lambda node_id: began + 40.0 - worked_s)
    history = History(containers)
    spec = a_spec(labels={ON_DISCONNECT: "stop", ON_DISCONNECT_DELAY: "5s"})
    history.put(a_node(W1), a_node(W2))
    history.put(Service(id=ServiceId("web"), spec=spec))
    old = of(a_task("t1", node=W1, state=RUNNING), spec)
    history.put(old)
    history.note(containers.started(W1, old, history.now, history.state))
    history.put(a_node(W1, state=NodeState.DOWN))
    history.put(replace(old, desired_state=TaskState.SHUTDOWN))
    successor = of(a_task("t2", node=W2), spec)
    history.put(successor)
    history.after(40.0).note(containers.started(W2, successor, history.now, history.state))
    reported = ["task t2 started while t1, which w1 was to stop by itself, still ran there"]
    assert history.violations == (reported if is_wrong else [])


@pytest.mark.parametrize(
    ("since_s", "on_disconnect", "is_wrong"),
    [(30.0, "stop", True), (15.0, "stop", False), (30.0, "keep", False)],
)
def test_a_container_that_its_node_had_to_stop_because_it_is_cut_off_is_gone(
    since_s: float, on_disconnect: str, is_wrong: bool
) -> None:
    containers = Containers(lambda node_id: 0.0, lambda node_id: 140.0 - since_s)
    history = History(containers)
    delay = {ON_DISCONNECT_DELAY: "5s"} if on_disconnect == "stop" else {}
    spec = a_spec(labels={ON_DISCONNECT: on_disconnect, **delay})
    history.put(a_node(W1), Service(id=ServiceId("web"), spec=spec))
    task = of(a_task("t1", node=W1, state=RUNNING), spec)
    history.put(task)
    history.note(containers.started(W1, task, history.now, history.state))
    for _ in range(2):  # it is reported once
        history.note(containers.outlasting(140.0, history.state))
    reported = ["task t1 still runs on w1, disconnected for 30.0 s with the policy stop"]
    assert history.violations == (reported if is_wrong else [])


# -- what has to be there in the end ---------------------------------------------------------------------------------


def a_settled(spec: ServiceSpec, *tasks: Task, **fields: object) -> tuple[History, Service]:
    history = History()
    north = replace(a_node(W1), spec=NodeSpec(labels={"zone": "north"}))
    history.put(north, a_node(W2), *tasks)
    service = Service(id=ServiceId(spec.name), spec=spec, **fields)  # type: ignore[arg-type]
    history.put(service)
    return history, service


def lacking(spec: ServiceSpec, *tasks: Task, **fields: object) -> Iterable[str]:
    history, service = a_settled(spec, *tasks, **fields)
    return list(unmet(history.state, service))


def test_a_slot_that_does_not_run_is_not_settled() -> None:
    assert lacking(a_spec(), a_task("t1", node=W1, state=RUNNING)) == []
    assert lacking(a_spec()) == ["web has 0 slots of 1"]
    (reported,) = lacking(a_spec(), a_task("t1", node=W1, state=TaskState.STARTING))
    assert reported.startswith("slot 1 of web does not run app:1")


def test_a_task_on_a_node_that_it_may_not_be_on_is_not_settled() -> None:
    spec = a_service_spec("web", replicas=1, constraints=("node.labels.zone==north",))
    there, elsewhere = (of(a_task("t1", node=node, state=RUNNING), spec) for node in (W1, W2))
    assert lacking(spec, there) == []
    assert lacking(spec, elsewhere) == ["task t1 of web is on w2, which does not meet its constraints"]


def test_a_task_waits_only_while_no_node_can_take_it() -> None:
    nowhere = a_service_spec("web", replicas=1, constraints=("node.labels.zone==south",))
    assert lacking(nowhere, of(a_task("t1", state=PENDING), nowhere)) == []
    (reported,) = lacking(a_spec(), a_task("t1", state=PENDING))
    assert reported.startswith("slot 1 of web does not run")


def test_a_port_that_others_hold_everywhere_is_waited_for() -> None:
    spec = replace(a_service_spec("web", replicas=3), endpoint_spec=HOST_PORT)
    tasks = [of(a_task(f"t{n}", slot=n, node=f"w{n}", state=RUNNING), spec) for n in (1, 2)]
    assert lacking(spec, *tasks, of(a_task("t3", slot=3, state=PENDING), spec)) == []
    two = replace(a_service_spec("web", replicas=2), endpoint_spec=HOST_PORT)
    (reported,) = lacking(two, tasks[0], of(a_task("t3", slot=2, state=PENDING), two))
    assert reported.startswith("slot 2 of web does not run")


def test_more_replicas_on_a_node_than_may_be_are_not_settled() -> None:
    template = replace(a_spec().task_template, placement=Placement(max_replicas=1))
    spec = replace(a_service_spec("web", replicas=2), task_template=template)
    tasks = [of(a_task(f"t{n}", slot=n, node=W1, state=RUNNING), spec) for n in (1, 2)]
    assert lacking(spec, *tasks) == ["web has {'w1': 2} copies, 1 may be on a node"]


def test_a_global_job_that_has_not_run_on_a_node_is_not_settled() -> None:
    spec = a_spec(mode=ServiceMode(global_job=GlobalJob()))
    status = JobStatus(job_iteration=Version(index=1), last_execution=timestamp(2 * SECOND_NS))
    done = [
        replace(a_run(f"t{node}", slot=0, node_id=node), status=TaskStatus(state=TaskState.COMPLETE))
        for node in (W1, W2)
    ]
    assert lacking(spec, *done, job_status=status) == []
    assert lacking(spec, done[0], job_status=status) == ["web has not run on w2"]


def test_an_update_that_is_still_under_way_is_not_settled() -> None:
    updating = UpdateStatus(state=UpdateState.UPDATING)
    reported = lacking(a_spec(), a_task("t1", node=W1, state=RUNNING), update_status=updating)
    assert reported == ["web is still being updated"]


@pytest.mark.parametrize(
    ("image", "reported"),
    [
        ("app:1", "web is still being updated"),
        ("hanging:1", "the update of web to hanging:1 does not end"),
    ],
)
def test_the_step_of_a_canary_lasts_while_the_service_has_no_replicas(image: str, reported: str) -> None:
    labels = {"skep.update": "canary", "skep.progress-deadline": "1s"}
    spec = replace(a_service_spec("web", image=image, replicas=0), labels=labels)
    updating = UpdateStatus(state=UpdateState.UPDATING, split=UpdateSplit(old=1, changes=1))
    assert lacking(spec, update_status=updating) == []
    del labels["skep.update"]
    assert lacking(spec, update_status=updating) == [reported]


@pytest.mark.parametrize(
    ("parallelism", "desired", "is_settled"),
    [
        (1, TaskState.READY, True),
        (2, TaskState.READY, False),
        (0, TaskState.READY, False),
        (1, RUNNING, False),
    ],
)
def test_a_prepared_task_waits_for_its_turn_only_while_the_update_may_stop_no_further_slot(
    parallelism: int, desired: TaskState, is_settled: bool
) -> None:
    """No node has a port left for slot 2, which counts against the parallelism."""
    config = UpdateConfig(parallelism=parallelism)
    spec = replace(a_service_spec("web", replicas=2, update=config, image="app:1"), endpoint_spec=HOST_PORT)
    old = a_task("t1", node=W1, state=RUNNING, image="app:0")
    new = of(a_task("t2", node=W2, state=TaskState.READY, desired=desired), spec)
    refused = of(a_task("t3", slot=2, state=PENDING), spec)
    updating = UpdateStatus(state=UpdateState.UPDATING)
    reported = lacking(spec, old, new, refused, update_status=updating)
    assert bool(reported) is not is_settled
    assert all(one.startswith("slot 1 of web does not run app:1") for one in reported)


@pytest.mark.parametrize("split", [UpdateSplit(old=1, versions=(2,)), None])
def test_slots_of_a_blue_green_update_keep_both_tasks_while_another_new_task_finds_no_node(
    split: UpdateSplit | None,
) -> None:
    """No node has a port left for slot 2.  Without a split, the update has to stop the old task of slot 1."""
    spec = replace(a_service_spec("web", replicas=2, image="app:1"), endpoint_spec=HOST_PORT)
    old = a_task("t1", node=W1, state=RUNNING, image="app:0")
    new = of(a_task("t2", node=W2, state=RUNNING), spec)
    kept = a_task("t3", slot=2, node=W1, state=RUNNING, image="app:0")
    refused = of(a_task("t4", slot=2, state=PENDING), spec)
    updating = UpdateStatus(state=UpdateState.UPDATING, split=split)
    reported = lacking(spec, old, new, kept, refused, update_status=updating)
    assert bool(reported) is (split is None)


@pytest.mark.parametrize(("parallelism", "is_settled"), [(1, True), (2, False)])
def test_a_pending_successor_waits_for_its_turn_while_the_update_may_stop_no_further_slot(
    parallelism: int, is_settled: bool
) -> None:
    """The volume of slot 2 is gone, so it has no node and counts against the parallelism."""
    spec = a_service_spec("web", replicas=2, update=UpdateConfig(parallelism=parallelism), image="app:1")
    mount = Mount(type="cluster", source="gone", target="/data")
    nowhere = TaskSpec(container_spec=ContainerSpec(image="app:1", mounts=(mount,)))
    old = a_task("t1", node=W1, state=RUNNING, image="app:0")
    new = a_task("t2", state=PENDING, desired=TaskState.READY, image="app:1")
    refused = of(a_task("t3", slot=2, state=PENDING), replace(spec, task_template=nowhere))
    reported = lacking(spec, old, new, refused, update_status=UpdateStatus(state=UpdateState.UPDATING))
    assert [one[:32] for one in reported] == ([] if is_settled else ["slot 1 of web does not run app:1"])


def test_a_paused_update_leaves_a_successor_that_waits_for_its_predecessor():
    spec = a_service_spec("web", replicas=1, image="app:1")
    paused = UpdateStatus(state=UpdateState.PAUSED)
    old = a_task("t1", node=W1, state=RUNNING, image="app:0")
    new = a_task("t2", state=PENDING, desired=TaskState.READY, image="app:1")
    assert lacking(spec, old, new, update_status=paused) == []
    assert lacking(spec, new, update_status=paused) == ["web: ['t2'] do not run, its update is paused"]


def test_a_prepared_task_does_not_wait_for_its_turn_without_a_slot_that_is_out_of_service() -> None:
    spec = a_service_spec("web", replicas=1, update=UpdateConfig(parallelism=1), image="app:1")
    old = a_task("t1", node=W1, state=RUNNING, image="app:0")
    new = of(a_task("t2", node=W2, state=TaskState.READY, desired=TaskState.READY), spec)
    (*_, reported) = lacking(spec, old, new, update_status=UpdateStatus(state=UpdateState.UPDATING))
    assert reported.startswith("slot 1 of web does not run app:1")


# -- local volumes ---------------------------------------------------------------------------------------------------


def a_slot_with_data(policy: str, **node: object) -> tuple[History, Task]:
    """A task of a slot has had its volume on w1 for a while, and has ended; gives the next one, without a node."""
    history = History(LocalVolumesStay())
    spec = a_spec(labels={VOLUME_AFFINITY: policy})
    mount = Mount(type="volume", source="data", target="/data")
    template = replace(spec.task_template, container_spec=ContainerSpec(image="app:1", mounts=(mount,)))
    history.put(Service(id=ServiceId("web"), spec=replace(spec, task_template=template)))
    history.put(replace(a_node(W1), **node), a_node(W2))
    before, after = (
        replace(a_task(id), spec=template, service_id=ServiceId("web"), slot=1, status=TaskStatus())
        for id in ("t1", "t2")
    )
    for one in (
        replace(before, node_id=NodeId("")),
        replace(before, node_id=W1, status=TaskStatus(state=TaskState.ASSIGNED)),
        replace(before, node_id=W1, status=TaskStatus(state=RUNNING)),
        replace(before, node_id=W1, status=TaskStatus(state=TaskState.FAILED)),
        replace(after, node_id=NodeId("")),
    ):
        history.put(one)
    return history.after(60), after


CREATED = ContainerStatus(container_id="c1")
DRAINED = NodeSpec(availability=Availability.DRAIN)


@pytest.mark.parametrize(
    ("policy", "home", "node", "is_wrong"),
    [
        ("required", NodeSpec(), W1, False),
        ("required", NodeSpec(), W2, True),
        ("required", DRAINED, W2, True),
        ("preferred", NodeSpec(), W2, True),
        ("preferred", DRAINED, W2, False),
        ("none", NodeSpec(), W2, False),
    ],
)
def test_a_task_that_starts_away_from_its_volumes_is_rejected(
    policy: str, home: NodeSpec, node: NodeId, is_wrong: bool
) -> None:
    history, task = a_slot_with_data(policy, spec=home)
    history.put(replace(task, node_id=node, status=TaskStatus(state=TaskState.ASSIGNED)))
    words = f"task t2 of web got {node}: its volumes are on ['w1']"
    assert history.violations == ([words] if is_wrong else [])


@pytest.mark.parametrize(("scope", "is_wrong"), [(VolumeScope.SINGLE, False), (VolumeScope.MULTI, True)])
def test_a_task_does_not_return_to_its_data_while_its_cluster_volume_is_published_elsewhere(
    scope: VolumeScope, is_wrong: bool
) -> None:
    history, task = a_slot_with_data("preferred")
    mode = AccessMode(scope=scope, sharing=VolumeSharing.ALL, mount_volume=TypeMount())
    spec = VolumeSpec(name="shared", driver=Driver(name=DRIVER), access_mode=mode)
    published = PublishStatus(node_id=W2, state=PublishState.PUBLISHED)
    volume = Volume(id=VolumeId("v"), spec=spec, info=VolumeInfo(volume_id="v"), publish_status=(published,))
    history.commit(lambda tx: tx.put(volume))
    container = task.spec.container_spec
    assert container is not None
    mounts = (*container.mounts, Mount(type="cluster", source="shared", target="/shared"))
    task = replace(task, spec=replace(task.spec, container_spec=replace(container, mounts=mounts)))
    history.put(task)
    history.put(replace(task, node_id=W2, status=TaskStatus(state=TaskState.ASSIGNED)))
    words = "task t2 of web got w2: its volumes are on ['w1']"
    assert history.violations == ([words] if is_wrong else [])


@pytest.mark.parametrize(("container", "is_wrong"), [(None, False), (CREATED, True)])
def test_a_task_that_was_stopped_has_data_if_it_had_a_container(
    container: ContainerStatus | None, is_wrong: bool
) -> None:
    history, task = a_slot_with_data("required")
    stopped = replace(task, id=TaskId("t3"), slot=2)
    end = TaskStatus(state=TaskState.SHUTDOWN, container_status=container)
    for node, status in (("", TaskStatus()), (W2, TaskStatus(state=TaskState.ASSIGNED)), (W2, end)):
        history.put(replace(stopped, node_id=NodeId(node), status=status))
    history.after(60)
    successor = replace(task, id=TaskId("t4"), slot=2)
    history.put(successor)
    history.put(replace(successor, node_id=W1, status=TaskStatus(state=TaskState.ASSIGNED)))
    assert bool(history.violations) is is_wrong


def test_a_task_does_not_wait_for_a_node_without_its_data() -> None:
    history, task = a_slot_with_data("required")
    stopped = replace(task, id=TaskId("t3"), slot=2, node_id=W2, status=TaskStatus(state=TaskState.SHUTDOWN))
    successor = replace(task, id=TaskId("t4"), slot=2)
    service = history.state.get(Service, ServiceId("web"))
    history.put(stopped, successor)
    assert homes_of(successor, service, history.state) == set()
    history.put(replace(stopped, status=replace(stopped.status, container_status=CREATED)))
    assert homes_of(successor, service, history.state) == {W2}


# -- affinity --------------------------------------------------------------------------------------------------------


def test_a_task_next_to_a_service_that_it_keeps_apart_from_is_rejected() -> None:
    """In both directions, but not while a label has just changed."""
    history = History(AffinitiesHold())
    for id in (W1, W2):
        history.put(replace(a_node(id), spec=NodeSpec(labels={"zone": "north" if id == W1 else ""})))
    history.put(Service(id=ServiceId("web"), spec=a_spec("web")))
    history.put(
        Service(
            id=ServiceId("api"), spec=a_spec("api", labels={"skep.anti-affinity": "web@node.labels.zone"})
        )
    )
    history.put(
        of(a_task("t1", node=W1, state=RUNNING), a_spec()),
        of(a_task("t2", node=W1, state=RUNNING), a_spec(), "api"),
    )
    waiting = [replace(of(a_task(f"n{number}"), a_spec(), "api"), node_id=NodeId("")) for number in range(3)]
    history.put(*waiting)
    history.put(replace(waiting[0], node_id=W1))
    assert history.violations == []
    history.after(20).put(replace(waiting[1], node_id=W2))
    assert history.violations == []
    history.put(replace(waiting[2], node_id=W1))
    (violation,) = history.violations
    assert "task n2 of api is assigned to w1: not apart from ['web'] by zone" in violation
    other = replace(of(a_task("t9"), a_spec()), node_id=NodeId(""))
    history.put(other)
    history.put(replace(other, node_id=W1))
    assert "of web is assigned to w1: not apart from ['api'] by zone" in history.violations[-1]
