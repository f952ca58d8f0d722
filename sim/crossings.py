"""Short runs that combine two features, which random runs would need too many seeds to combine.

They also detect mutants of the rules that they exercise.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial

from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.faults.trial import check_planned
from sim.run import RunResult
from sim.seeds import Simulate
from sim.users.operators import Operators
from sim.users.random_specs import ENDING_IMAGES, MEMORY_BYTES, STACKS, with_image, with_labels, with_mount
from sim.users.users import Users
from sim.world.certificates import root
from sim.world.images import BROKEN, CRASHING, HANGING
from sim.world.storage import DRIVER, SimulatedStorage
from skep.errors import InvalidArgument, PermissionDenied, SkepError
from skep.manager.control.files import create_secret, remove_secret
from skep.manager.control.jobs import retry_job
from skep.manager.control.quotas import set_quota
from skep.manager.control.services import create_service, update_service
from skep.manager.control.swarm import Rotations, update_swarm
from skep.manager.control.volumes import create_volume
from skep.manager.services.freezes import set_freeze, set_window
from skep.manager.verify.objects import EXTRA
from skep.model.container import ContainerSpec, Mount, SecretFileTarget, SecretReference
from skep.model.node import Availability, Node
from skep.model.options.dependencies import DEPENDS_ON
from skep.model.options.freezes import FreezeRequest, MaintenanceWindow
from skep.model.options.labels import (
    FORGET_NODES,
    JOB_TTL,
    MIN_AVAILABLE,
    ON_DISCONNECT,
    PREEMPTION,
    PRIORITY,
    PROGRESS_DEADLINE,
    VOLUME_AFFINITY,
)
from skep.model.options.schedules import CRON, CRON_DEADLINE, CRON_MAX_ATTEMPTS
from skep.model.quota import QuotaSpec
from skep.model.secret import SecretSpec
from skep.model.service import (
    GlobalJob,
    GlobalService,
    Placement,
    ReplicatedJob,
    ReplicatedService,
    ResourceRequirements,
    Resources,
    RestartCondition,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    UpdateConfig,
    UpdateOrder,
    UpdateState,
)
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, SecretId, ServiceId
from skep.model.values.meta import Driver
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import SECOND_NS, moment, timestamp
from skep.model.volume import AccessMode, TypeMount, VolumeSharing, VolumeSpec
from skep.store.interface import Transaction

SOON = RestartPolicy(delay=SECOND_NS // 2)
ONE_ATTEMPT = RestartPolicy(condition=RestartCondition.ON_FAILURE, max_attempts=1, delay=0)
ONE = ServiceMode(replicated=ReplicatedService(replicas=1))
MOST_BYTES = 5 << 30
"""Memory of a task that is more than half of a node's."""
LOST_S = 120.0
"""Seconds for which a node is lost.  These clusters remove lost nodes after a minute."""
AWAY_S = 30.0
"""Time without managers, after which nodes retry with their longest delays."""
WELL_S = 40.0
DUE_THRICE_S = 200.0
"""Longer than three minutes, and shorter than four."""
BACK_S = 60.0
"""Time until a node is back, halfway between two due times."""


def _simulate(seed: int, act: Callable[[SimulatedCluster], None]) -> RunResult:
    with SimulatedCluster(managers=3, workers=4, seed=seed, storage=SimulatedStorage()) as cluster:
        for node in cluster.nodes.values():
            node.ending_images.update(ENDING_IMAGES)
            node.broken_images.add(BROKEN)
            node.hanging_images.add(HANGING)
        try:
            act(cluster)
        except SkepError as error:
            cluster.observer.note(cluster.loop.time(), [f"refused: {error}"])
        return RunResult(seed, list(cluster.observer.violations), cluster.trace.lines())


# -- cluster volumes and local data ------------------------------------------------------------------------------------


def _cut_off_with_a_volume(cluster: SimulatedCluster) -> None:
    """A machine that is cut off keeps writing to its volume when the leader removes lost nodes."""
    _create_database(cluster)
    cluster.write(_remove_lost_nodes)
    cluster.links.cut([_home(cluster, "db")], cluster.managers)
    cluster.run_for(LOST_S)


def _update_with_a_volume(cluster: SimulatedCluster) -> None:
    """An update of a service whose tasks cannot share their volume."""
    _update(cluster, _create_database(cluster), partial(with_image, image="app:2"))
    _expect(cluster, "the update does not end", lambda: cluster.running("db", "app:2") == 1)


def _lost_with_the_only_data(cluster: SimulatedCluster) -> None:
    """The only node with a slot's data is lost while the service has no tasks."""
    id = _create_with_data(cluster)
    cluster.run_for(15.0)
    home = _home(cluster, "db")
    _update(cluster, id, lambda spec: replace(spec, mode=_replicas(0)))
    _expect(cluster, "db does not end", lambda: not cluster.tasks("db"))
    _lose(cluster, home)


def _ended_before_its_report(cluster: SimulatedCluster) -> None:
    """A task ends at once, and its node is lost after it has reported the task's data."""
    home = _end_at_once(cluster)
    _expect(cluster, "the task stays after the report", lambda: not cluster.tasks("db"))
    cluster.run_for(15.0)
    _lose(cluster, home)


def _lost_before_its_report(cluster: SimulatedCluster) -> None:
    """A task ends at once, and its node is lost before it has reported the task's data."""
    _lose(cluster, _end_at_once(cluster))


def _end_at_once(cluster: SimulatedCluster) -> NodeId:
    """Return the node of a service whose only task has ended."""
    id = _create_with_data(cluster)
    home = _home(cluster, "db")
    _update(cluster, id, lambda spec: replace(spec, mode=_replicas(0)))
    cluster.run_for(3.0)
    return home


def _create_with_data(cluster: SimulatedCluster) -> ServiceId:
    """Create a service with one task whose local data must stay."""
    mount = Mount(type="volume", source="db-{{.Task.Slot}}", target="/data")
    id = _create(cluster, with_labels(with_mount(_a_spec("db", ONE), mount), {VOLUME_AFFINITY: "required"}))
    _expect(cluster, "db does not run", lambda: cluster.running("db") == 1)
    return id


def _lose(cluster: SimulatedCluster, id: NodeId) -> None:
    cluster.write(_remove_lost_nodes)
    cluster.kill_node(id)
    cluster.run_for(LOST_S)


def _create_database(cluster: SimulatedCluster) -> ServiceId:
    """Create a service with one task and a cluster volume that tasks cannot share."""
    _create_volume(cluster, AccessMode(mount_volume=TypeMount()))
    mount = Mount(type="cluster", source="orders", target="/data")
    id = _create(cluster, with_mount(_a_spec("db", ONE), mount))
    _expect(cluster, "db does not run", lambda: cluster.running("db") == 1)
    return id


def _create_volume(cluster: SimulatedCluster, mode: AccessMode) -> None:
    spec = VolumeSpec(name="orders", driver=Driver(name=DRIVER), access_mode=mode)
    now = timestamp(_now_ns(cluster))
    cluster.write(lambda tx: create_volume(tx, spec, new_id=lambda: "orders", now=now))


# -- restarts, dependencies, quotas ------------------------------------------------------------------------------------


def _starts_first_with_a_volume(cluster: SimulatedCluster) -> None:
    """A start-first update needs a volume twice that tasks cannot share.  Such a service has to be refused."""
    _create_volume(cluster, AccessMode(mount_volume=TypeMount()))
    mount = Mount(type="cluster", source="orders", target="/data")
    config = UpdateConfig(order=UpdateOrder.START_FIRST)
    try:
        _create(cluster, with_mount(replace(_a_spec("db", ONE), update_config=config), mount))
    except InvalidArgument:
        return
    cluster.observer.note(cluster.loop.time(), ["a start-first service has a volume that tasks cannot share"])


def _shared_by_two_tasks(cluster: SimulatedCluster, sharing: VolumeSharing) -> None:
    """Two tasks share a volume for one node, so both go to the same node.  If they must not share it, one waits."""
    _create_volume(cluster, AccessMode(sharing=sharing, mount_volume=TypeMount()))
    mount = Mount(type="cluster", source="orders", target="/data")
    _create(cluster, with_mount(_a_spec("db", _replicas(2)), mount))
    if sharing is VolumeSharing.ALL:
        _expect(cluster, "the tasks do not share the volume", lambda: cluster.running("db") == 2)
    else:
        cluster.run_for(WELL_S)


def _drained_often(cluster: SimulatedCluster) -> None:
    """Nodes of a service with one restart attempt are drained one after the other.  Then its task fails once."""
    _create(cluster, _a_spec("web", ONE, restart=ONE_ATTEMPT))
    for _ in range(4):
        _expect(cluster, "web, which never failed, does not run", lambda: cluster.running("web") == 1)
        if cluster.observer.violations:
            return
        drained = _home(cluster, "web")
        for id in cluster.workers:
            cluster.set_availability(id, Availability.DRAIN if id == drained else Availability.ACTIVE)
        cluster.run_for(5.0)
    _expect(cluster, "web does not run after the last move", partial(_is_running, cluster, 1))
    for task in cluster.wanted("web"):
        cluster.kill_container(task)
    cluster.run_for(1.0)
    _expect(cluster, "web, which has failed once, is given up", partial(_is_running, cluster, 1))


def _drained_and_updated(cluster: SimulatedCluster) -> None:
    """A service that stops its tasks first keeps two of three while its nodes are drained in turn and it is updated."""
    spec = with_mount(_a_spec("db", _replicas(3)), Mount(type="volume", source="data", target="/data"))
    spec = with_labels(replace(spec, update_config=UpdateConfig(parallelism=0)), {MIN_AVAILABLE: "2"})
    _create(cluster, spec)
    for number in range(3):
        _expect(cluster, "db does not run", lambda: cluster.running("db") == 3)
        drained = {cluster.workers[number], cluster.workers[number + 1]}
        for id in cluster.workers:
            cluster.set_availability(id, Availability.DRAIN if id in drained else Availability.ACTIVE)
        _update(cluster, ServiceId("db"), partial(with_image, image=f"app:{number + 2}"))
        cluster.run_for(3.0)
    for id in cluster.workers:
        cluster.set_availability(id, Availability.ACTIVE)
    _expect(cluster, "db does not run at the end", lambda: cluster.running("db") == 3)


def _relabeled_at_once(cluster: SimulatedCluster) -> None:
    """A service keeps two of three tasks although all its nodes get other labels at the same moment."""
    north, south = cluster.workers[::2], cluster.workers[1::2]
    for id in cluster.workers:
        cluster.label(id, zone="north" if id in north else "south")
    spec = _a_spec("web", _replicas(3))
    template = replace(spec.task_template, placement=Placement(constraints=("node.labels.zone==north",)))
    _create(cluster, with_labels(replace(spec, task_template=template), {MIN_AVAILABLE: "2"}))
    for place, other in ((north, south), (south, north)):
        _expect(cluster, "web does not run in the north", partial(_runs_only_on, cluster, place))
        for id in cluster.workers:
            cluster.label(id, zone="north" if id in other else "south")
    _expect(cluster, "web does not run at the end", partial(_runs_only_on, cluster, north))


def _frozen(cluster: SimulatedCluster) -> None:
    """Tasks stay on relabeled nodes until the freeze ends, while failed tasks and tasks of lost nodes are replaced."""

    def hold(tx: Transaction, now_ns: int) -> None:
        until = FreezeRequest(until=timestamp(now_ns + 60 * SECOND_NS))
        set_freeze(tx, "", until, by="", now_ns=now_ns)

    _held(cluster, hold)


def _outside_the_window(cluster: SimulatedCluster) -> None:
    """The same until the window of the stack opens."""

    def hold(tx: Transaction, now_ns: int) -> None:
        minute = (now_ns // SECOND_NS + 90) // 60 % 60
        window = MaintenanceWindow(cron=f"{minute} * * * *", length=600 * SECOND_NS)
        set_window(tx, window, "shop", now_ns=now_ns)

    _held(cluster, hold)


def _held(cluster: SimulatedCluster, hold: Callable[[Transaction, int], None]) -> None:
    north, south = cluster.workers[::2], cluster.workers[1::2]
    for id in cluster.workers:
        cluster.label(id, zone="north")
    spec = _a_spec("web", _replicas(3))
    template = replace(spec.task_template, placement=Placement(constraints=("node.labels.zone==north",)))
    _create(cluster, with_labels(replace(spec, task_template=template), {STACK_LABEL: "shop"}))
    _expect(cluster, "web does not run", lambda: cluster.running("web") == 3)
    now_ns = _now_ns(cluster)
    cluster.write(lambda tx: hold(tx, now_ns))
    cluster.run_for(1.0)  # until every manager's replica shows it
    for id in south:
        cluster.label(id, zone="south")
    cluster.run_for(5.0)
    for task in cluster.wanted("web")[:1]:
        cluster.kill_container(task)
    lost = north[0]
    cluster.kill_node(lost)
    cluster.run_for(5.0)
    _expect(cluster, "web is not repaired during the freeze", lambda: _runs_off(cluster, lost))
    cluster.run_for(80.0)
    _expect(cluster, "web does not run in the north", partial(_runs_only_on, cluster, north[1:]))


def _runs_off(cluster: SimulatedCluster, lost: NodeId) -> bool:
    homes = [task.node_id for task in cluster.wanted("web") if task.status.state is TaskState.RUNNING]
    return len(homes) == 3 and lost not in homes


def _runs_only_on(cluster: SimulatedCluster, nodes: Collection[NodeId]) -> bool:
    homes = [task.node_id for task in cluster.wanted("web") if task.status.state is TaskState.RUNNING]
    return len(homes) == 3 and {*homes} <= {*nodes}


def _depends_on_a_job_that_removes_itself(cluster: SimulatedCluster) -> None:
    """All tasks end after the job they depended on.  Creating the two may also be refused."""
    once = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
    _create(cluster, with_labels(_a_spec("migrate", once, image="job:1"), {JOB_TTL: "5s"}))
    spec = with_labels(_a_spec("web", ONE), {DEPENDS_ON: "migrate=service_completed_successfully"})
    try:
        _create(cluster, spec)
    except InvalidArgument:
        return
    _expect(cluster, "web does not run", lambda: cluster.running("web") == 1)
    cluster.run_for(20.0)
    for task in cluster.wanted("web"):
        cluster.kill_container(task)
    cluster.run_for(5.0)
    _expect(cluster, "web waits for a job that has completed", lambda: cluster.running("web") == 1)


def _shrinks_under_a_quota(cluster: SimulatedCluster) -> None:
    """A service without reservations is scaled down under a memory quota."""
    stack = STACKS[0]
    id = _create(cluster, with_labels(_a_spec("web", _replicas(6)), {STACK_LABEL: stack}))
    quota, now = QuotaSpec(name=stack, memory_bytes=MEMORY_BYTES), timestamp(_now_ns(cluster))
    cluster.write(lambda tx: set_quota(tx, quota, new_id=lambda: "q", now=now))
    cluster.run_for(1.0)  # until every manager's replica shows it
    _update(cluster, id, lambda spec: replace(spec, mode=_replicas(2)))


def _grows_beyond_a_quota(cluster: SimulatedCluster) -> None:
    """A service of more tasks than its stack may have is created, which has to be refused."""
    quota, now = QuotaSpec(name=STACKS[0], tasks=4), timestamp(_now_ns(cluster))
    cluster.write(lambda tx: set_quota(tx, quota, new_id=lambda: "q", now=now))
    cluster.run_for(1.0)  # until every manager's replica shows it
    try:
        _create(cluster, with_labels(_a_spec("web", _replicas(6)), {STACK_LABEL: STACKS[0]}))
    except PermissionDenied:
        return
    cluster.observer.note(cluster.loop.time(), ["a service of 6 tasks is created, and its stack may have 4"])


def _updated_often(cluster: SimulatedCluster) -> None:
    """A service is updated more often than its tasks and specs are kept."""
    cluster.write(_keep_one_task)
    id = _create(cluster, _a_spec("web", ONE))
    for number in range(EXTRA + 4):
        _update(cluster, id, partial(with_image, image=f"app:{number}"))
        _expect(cluster, "the update does not end", partial(_is_running, cluster, 1, f"app:{number}"))
    cluster.run_for(WELL_S)
    cluster.observer.note(cluster.loop.time(), cluster.rest_violations())


def _updated_beyond_any_node(cluster: SimulatedCluster) -> None:
    """An update reserves more memory than any node has.  The dry run refuses it, or its tasks get nodes."""
    id = _create(cluster, _a_spec("web", _replicas(2)))
    _expect(cluster, "web does not run", lambda: cluster.running("web") == 2)
    spec = _enlarged(cluster.view.get(Service, id).spec, 1 << 40)
    check_planned(cluster, id, spec, lambda: _update(cluster, id, lambda _: spec))


def _waits_for_resources(cluster: SimulatedCluster, priority: int, *, allows: bool) -> None:
    """A task waits for what a service of priority 5 has on all nodes, in a cluster that allows preemption or not."""
    spec = _enlarged(_a_spec("web", _replicas(len(cluster.workers))), MOST_BYTES)
    _create(cluster, with_labels(spec, {PRIORITY: "5"}))
    _expect(cluster, "web does not run", lambda: cluster.running("web") == len(cluster.workers))
    if allows:
        cluster.write(partial(_label_cluster, labels={PREEMPTION: "true"}))
    cluster.run_for(10.0)  # until every manager's replica shows it
    _create(cluster, with_labels(_enlarged(_a_spec("api", ONE), MOST_BYTES), {PRIORITY: str(priority)}))
    if allows and priority > 5:
        _expect(cluster, "api does not run", lambda: cluster.running("api") == 1)
    else:
        _watch(cluster, WELL_S)


def _updated_to(cluster: SimulatedCluster, image: str, state: UpdateState) -> None:
    """An update to an image has to end in a state within a minute, also if its leader is deposed meanwhile."""
    spec = with_labels(_a_spec("web", _replicas(3)), {PROGRESS_DEADLINE: "5s"})
    id = _create(cluster, replace(spec, update_config=UpdateConfig(parallelism=1, monitor=2 * SECOND_NS)))
    _expect(cluster, "web does not run", lambda: cluster.running("web") == 3)
    _update(cluster, id, partial(with_image, image=image))
    if cluster.random.random() < 0.5:
        cluster.run_for(cluster.random.uniform(0.1, 5.0))
        cluster.depose()
    _expect(cluster, f"the update is not {state.value}", lambda: _update_state(cluster, id) is state)


def _update_state(cluster: SimulatedCluster, id: ServiceId) -> UpdateState | None:
    status = cluster.view.get(Service, id).update_status
    return status.state if status is not None else None


# -- jobs and nodes ----------------------------------------------------------------------------------------------------


def _back_after_the_run(cluster: SimulatedCluster) -> None:
    """A node comes back after a run of a scheduled global job."""
    job = _a_spec("report", ServiceMode(global_job=GlobalJob()), image="job:1")
    _create(cluster, with_labels(job, {CRON: "*/2 * * * *", CRON_DEADLINE: "20s"}))
    cluster.kill_node(cluster.workers[0])
    cluster.run_until(lambda: cluster.created("report") > 0, within_s=180.0)
    cluster.run_for(BACK_S)
    cluster.start_node(cluster.workers[0])
    cluster.run_for(WELL_S)


def _due_while_a_run_goes_on(cluster: SimulatedCluster) -> None:
    """Two jobs are due every minute.  One job's runs have ended by then. The other job's runs never end."""
    once = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
    _create(cluster, with_labels(_a_spec("short", once, image="job:1"), {CRON: "*/1 * * * *"}))
    _create(cluster, with_labels(_a_spec("long", once), {CRON: "*/1 * * * *"}))
    _watch(cluster, DUE_THRICE_S)
    short, long = cluster.created("short"), cluster.created("long")
    if short < 3 or long != 1:
        problem = f"in {DUE_THRICE_S:g} s the short job ran {short} times, and the long one {long} times"
        cluster.observer.note(cluster.loop.time(), [problem])


def _due_and_fails(cluster: SimulatedCluster) -> None:
    """The runs of a scheduled job fail, and may be attempted twice."""
    once = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
    labels = {CRON: "*/1 * * * *", CRON_MAX_ATTEMPTS: "1"}
    _create(cluster, with_labels(_a_spec("report", once, image=CRASHING), labels))
    _watch(cluster, DUE_THRICE_S)
    if (number := cluster.created("report")) < 4:
        cluster.observer.note(cluster.loop.time(), [f"three runs had {number} tasks"])


def _due_while_its_node_is_down(cluster: SimulatedCluster) -> None:
    """A global job is due every minute.  The only node that may run it is lost during a run, and keeps its task."""
    home = cluster.workers[0]
    cluster.label(home, zone="north")
    job = _a_spec("report", ServiceMode(global_job=GlobalJob()))
    placement = Placement(constraints=("node.labels.zone==north",))
    job = replace(job, task_template=replace(job.task_template, placement=placement))
    _create(cluster, with_labels(job, {CRON: "*/1 * * * *", ON_DISCONNECT: "keep"}))
    cluster.run_until(lambda: cluster.containers("report") == 1, within_s=90.0)
    cluster.links.cut([home], cluster.managers)
    cluster.run_for(LOST_S)


def _secret_that_a_service_uses(cluster: SimulatedCluster) -> None:
    """A secret is removed while a service uses it, which has to be refused, and after its last update."""
    key = _create_secret(cluster)
    id = _create(cluster, _with_secret(_a_spec("web", ONE), key))
    _expect(cluster, "web does not run", lambda: cluster.running("web") == 1)
    _refuse_removal(cluster, key)
    _update(cluster, id, _without_secrets)
    cluster.run_for(1.0)  # until every manager's replica shows it
    cluster.write(partial(remove_secret, id=key))


def _secret_that_a_run_uses(cluster: SimulatedCluster) -> None:
    """A secret is removed while a run of a scheduled job uses it, whose service no longer does."""
    key = _create_secret(cluster)
    once = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
    id = _create(cluster, with_labels(_with_secret(_a_spec("report", once), key), {CRON: "*/1 * * * *"}))
    cluster.run_until(lambda: cluster.containers("report") == 1, within_s=90.0)
    _update(cluster, id, _without_secrets)
    cluster.run_for(1.0)
    _refuse_removal(cluster, key)


def _create_secret(cluster: SimulatedCluster) -> SecretId:
    key, now = SecretId("key"), timestamp(_now_ns(cluster))
    cluster.write(lambda tx: create_secret(tx, SecretSpec(name=key), b"key", new_id=lambda: key, now=now))
    cluster.run_for(1.0)  # until every manager's replica shows it
    return key


def _refuse_removal(cluster: SimulatedCluster, key: SecretId) -> None:
    """Request the removal of a secret.  The rules find that it was removed if it was not refused."""
    with suppress(InvalidArgument):
        cluster.write(partial(remove_secret, id=key))


def _with_secret(spec: ServiceSpec, key: SecretId) -> ServiceSpec:
    used = SecretReference(file=SecretFileTarget(name=key), secret_id=key, secret_name=key)
    return _with_container(spec, lambda container: replace(container, secrets=(used,)))


def _without_secrets(spec: ServiceSpec) -> ServiceSpec:
    return _with_container(spec, lambda container: replace(container, secrets=()))


def _with_container(spec: ServiceSpec, change: Callable[[ContainerSpec], ContainerSpec]) -> ServiceSpec:
    container = spec.task_template.container_spec
    assert container is not None
    return replace(spec, task_template=replace(spec.task_template, container_spec=change(container)))


def _removes_itself(cluster: SimulatedCluster) -> None:
    """A job with a time to live completes under a leader that is deposed afterwards."""
    once = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=2, total_completions=2))
    id = _create(cluster, with_labels(_a_spec("migrate", once, image="job:1"), {JOB_TTL: "20s"}))
    cluster.run_for(10.0)
    cluster.depose()
    cluster.run_for(WELL_S)
    _expect(cluster, "migrate does not remove itself", lambda: cluster.view.lookup(Service, id) is None)


def _most_nodes_are_lost(cluster: SimulatedCluster) -> None:
    """Most nodes lose their power for longer than lost nodes are kept."""
    _create(cluster, _a_spec("web", _replicas(4)))
    _expect(cluster, "web does not run", lambda: cluster.running("web") == 4)
    cluster.write(_remove_lost_nodes)
    for id in cluster.workers:
        cluster.kill_node(id)
    cluster.run_for(LOST_S)
    cluster.start_all()
    _expect(cluster, "web does not run again", lambda: cluster.running("web") == 4)


def _cut_off_and_kept(cluster: SimulatedCluster) -> None:
    """A node is partitioned.  Its tasks stay, because their service keeps them, and run when the node is back."""
    _create(cluster, with_labels(_a_spec("web", _replicas(4)), {ON_DISCONNECT: "keep"}))
    _expect(cluster, "web does not run", lambda: cluster.running("web") == 4)
    home = _home(cluster, "web")
    cut = cluster.links.cut([home], cluster.managers)
    _expect(cluster, "the node is not marked down", lambda: not cluster.is_ready(home))
    _watch(cluster, WELL_S)
    cluster.links.restore(cut)
    _expect(cluster, "the node does not return", lambda: cluster.is_ready(home))
    _expect(cluster, "web does not run again", lambda: cluster.running("web") == 4)


def _no_manager_for_a_while(cluster: SimulatedCluster) -> None:
    """All managers are away until nodes retry with their longest delays.  No task may be replaced at their return."""
    _create(cluster, _a_spec("web", _replicas(4)))
    _expect(cluster, "web does not run", lambda: cluster.running("web") == 4)
    for id in cluster.managers:
        cluster.crash(id)
    cluster.run_for(AWAY_S)
    for id in cluster.managers:
        cluster.start_manager(id)
    cluster.run_for(WELL_S)
    if (number := cluster.created("web") - 4) > 0:
        cluster.observer.note(
            cluster.loop.time(), [f"{number} tasks were replaced when the managers returned"]
        )


def _rotated_while_a_node_is_away(cluster: SimulatedCluster) -> None:
    """The root is rotated while a node is switched off.  The rotation ends after its return."""
    Operators(cluster, Users(cluster), lambda: ())  # lets nodes renew their certificates
    away = cluster.workers[0]
    cluster.kill_node(away)
    _expect(cluster, "the node is not marked down", lambda: not cluster.is_ready(away))
    now = moment(_now_ns(cluster))

    def rotate(tx: Transaction) -> None:
        (swarm,) = tx.find(Swarm)
        forced = replace(swarm.spec.ca_config, force_rotate=swarm.spec.ca_config.force_rotate + 1)
        update_swarm(
            tx,
            replace(swarm.spec, ca_config=forced),
            swarm.version.index,
            Rotations(),
            new_id=lambda: "token",
            now=now,
            new_root=lambda: root(1),
        )

    cluster.write(rotate)
    cluster.run_for(WELL_S)
    cluster.start_node(away)
    _expect(cluster, "the node does not return", lambda: cluster.is_ready(away))
    _expect(
        cluster,
        "the rotation does not end",
        lambda: all(one.rotation is None for one in cluster.view.find(Swarm)),
    )


def _more_replicas_than_nodes_may_have(cluster: SimulatedCluster) -> None:
    """A service has more replicas than its nodes may have, while a node is paused, drained and back.

    The drained node keeps its task, because no other node may have one more.
    """
    spec = _a_spec("web", _replicas(6))
    spec = replace(spec, task_template=replace(spec.task_template, placement=Placement(max_replicas=1)))
    changed = cluster.workers[0]
    cluster.set_availability(changed, Availability.PAUSE)
    _create(cluster, spec)
    _expect(cluster, "not 3 replicas run", partial(_is_running, cluster, 3))
    for availability, number in ((Availability.ACTIVE, 4), (Availability.DRAIN, 4), (Availability.ACTIVE, 4)):
        cluster.set_availability(changed, availability)
        _expect(cluster, f"not {number} replicas run", partial(_is_running, cluster, number))


def _is_running(cluster: SimulatedCluster, number: int, image: str | None = None) -> bool:
    return cluster.running("web", image) == number


def _removed_under_a_global_service(cluster: SimulatedCluster) -> None:
    """A node is removed permanently."""
    _create(cluster, _a_spec("agent", ServiceMode(global_=GlobalService())))
    _expect(cluster, "agent does not run", lambda: cluster.running("agent") == len(cluster.workers))
    gone = cluster.workers[0]
    cluster.kill_node(gone)
    cluster.forget(gone)
    _expect(cluster, "the node is not gone", lambda: cluster.view.lookup(Node, gone) is None)
    _expect(cluster, "tasks of the node remain", lambda: not cluster.view.find(Task, node_id=gone))


def _retried_after_a_change_of_clock(cluster: SimulatedCluster) -> None:
    """A failed task is retried under a leader whose clock is behind the tasks' timestamps."""
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=2, total_completions=2))
    id = _create(cluster, _a_spec("job", mode, image="crashing:1", restart=ONE_ATTEMPT))
    _expect(cluster, "the job does not fail", lambda: cluster.created("job") == 4)
    cluster.run_for(10.0)
    for manager in cluster.managers:
        cluster.clocks[manager].wall_off_s -= 60.0
    cluster.depose()
    cluster.run_for(5.0)
    cluster.write(lambda tx: retry_job(tx, id))
    cluster.run_for(10.0)


CROSSINGS: Mapping[str, Simulate] = {
    name: partial(_simulate, act=act)
    for name, act in (
        ("cut off with a volume", _cut_off_with_a_volume),
        ("update with a volume", _update_with_a_volume),
        ("start-first with a volume", _starts_first_with_a_volume),
        ("volume that two tasks share", partial(_shared_by_two_tasks, sharing=VolumeSharing.ALL)),
        ("volume that two tasks must not share", partial(_shared_by_two_tasks, sharing=VolumeSharing.NONE)),
        ("volume with one writer", partial(_shared_by_two_tasks, sharing=VolumeSharing.ONE_WRITER)),
        ("lost with the only data", _lost_with_the_only_data),
        ("ended before its report", _ended_before_its_report),
        ("lost before its report", _lost_before_its_report),
        ("drained often", _drained_often),
        ("drained and updated", _drained_and_updated),
        ("relabeled at once", _relabeled_at_once),
        ("frozen", _frozen),
        ("outside the window", _outside_the_window),
        ("dependency that removes itself", _depends_on_a_job_that_removes_itself),
        ("shrinks under a quota", _shrinks_under_a_quota),
        ("task of higher priority", partial(_waits_for_resources, priority=10, allows=True)),
        ("task of equal priority", partial(_waits_for_resources, priority=5, allows=True)),
        ("task without preemption", partial(_waits_for_resources, priority=10, allows=False)),
        ("growth beyond a quota", _grows_beyond_a_quota),
        ("updated often", _updated_often),
        ("update larger than any node", _updated_beyond_any_node),
        ("update to a good image", partial(_updated_to, image="app:2", state=UpdateState.COMPLETED)),
        ("update to a broken image", partial(_updated_to, image=BROKEN, state=UpdateState.PAUSED)),
        ("update to a crashing image", partial(_updated_to, image=CRASHING, state=UpdateState.PAUSED)),
        ("update to a hanging image", partial(_updated_to, image=HANGING, state=UpdateState.PAUSED)),
        ("back after the run", _back_after_the_run),
        ("due while a run goes on", _due_while_a_run_goes_on),
        ("due and fails", _due_and_fails),
        ("due while its node is down", _due_while_its_node_is_down),
        ("secret that a service uses", _secret_that_a_service_uses),
        ("secret that a run uses", _secret_that_a_run_uses),
        ("removes itself", _removes_itself),
        ("more replicas than nodes may have", _more_replicas_than_nodes_may_have),
        ("most nodes are lost", _most_nodes_are_lost),
        ("cut off and kept", _cut_off_and_kept),
        ("no manager for a while", _no_manager_for_a_while),
        ("rotated while a node is away", _rotated_while_a_node_is_away),
        ("removed under a global service", _removed_under_a_global_service),
        ("retried under another clock", _retried_after_a_change_of_clock),
    )
}


# -- requests ----------------------------------------------------------------------------------------------------------


def _a_spec(
    name: str, mode: ServiceMode, *, image: str = "app:1", restart: RestartPolicy = SOON
) -> ServiceSpec:
    template = TaskSpec(container_spec=ContainerSpec(image=image), restart_policy=restart)
    return ServiceSpec(name=name, task_template=template, mode=mode)


def _enlarged(spec: ServiceSpec, memory_bytes: int) -> ServiceSpec:
    reserved = ResourceRequirements(reservations=Resources(memory_bytes=memory_bytes))
    return replace(spec, task_template=replace(spec.task_template, resources=reserved))


def _replicas(number: int) -> ServiceMode:
    return ServiceMode(replicated=ReplicatedService(replicas=number))


def _create(cluster: SimulatedCluster, spec: ServiceSpec) -> ServiceId:
    id, now = ServiceId(spec.name), timestamp(_now_ns(cluster))
    cluster.write(lambda tx: create_service(tx, spec, new_id=lambda: id, new_name=lambda: id, now=now))
    return id


def _update(cluster: SimulatedCluster, id: ServiceId, change: Callable[[ServiceSpec], ServiceSpec]) -> None:
    now = timestamp(_now_ns(cluster))

    def body(tx: Transaction) -> None:
        service = tx.get(Service, id)
        update_service(tx, id, change(service.spec), service.version.index, now=now)

    cluster.write(body)


def _remove_lost_nodes(tx: Transaction) -> None:
    _label_cluster(tx, {FORGET_NODES: "1m"})


def _keep_one_task(tx: Transaction) -> None:
    (swarm,) = tx.find(Swarm)
    kept = replace(swarm.spec.orchestration, task_history_retention_limit=1)
    tx.put(replace(swarm, spec=replace(swarm.spec, orchestration=kept)))


def _label_cluster(tx: Transaction, labels: Mapping[str, str]) -> None:
    (swarm,) = tx.find(Swarm)
    tx.put(replace(swarm, spec=replace(swarm.spec, labels=labels)))


def _expect(cluster: SimulatedCluster, problem: str, condition: Callable[[], bool]) -> None:
    """Let time pass until ``condition``.  It is a violation if ``condition`` is not met within ``WELL_S``."""
    until = cluster.loop.time() + WELL_S
    while not condition():
        if cluster.loop.time() > until:
            cluster.observer.note(until, [f"{problem} after {WELL_S:g} s"])
            return
        cluster.run_for(0.25)


def _watch(cluster: SimulatedCluster, seconds: float) -> None:
    """Let time pass until the first violation.  A broken rule may keep the managers busy from then on."""
    until = cluster.loop.time() + seconds
    while cluster.loop.time() < until and not cluster.observer.violations:
        cluster.run_for(0.25)


def _home(cluster: SimulatedCluster, name: str) -> NodeId:
    return next((task.node_id for task in cluster.wanted(name)), cluster.workers[0])


def _now_ns(cluster: SimulatedCluster) -> int:
    return cluster.clocks[cluster.managers[0]].now_ns()
