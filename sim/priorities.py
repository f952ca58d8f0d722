"""Short runs of clusters with too little room: services of different priorities, nodes that go and come, leaders that
change.  Then all faults end, and whoever is more important must have the room.

Some of the clusters do not allow preemption: there no task may be stopped for another one.
"""

from collections.abc import Callable
from functools import partial
from random import Random

from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.invariants.preemption import PreemptionsAreJust, held_by_lower
from sim.run import RunResult
from skep.agent.executor.simulated import Behaviour
from skep.manager.control.services import create_service, update_service
from skep.model.container import ContainerSpec
from skep.model.ids import ServiceId
from skep.model.labels import PREEMPTION, PRIORITY
from skep.model.node import Availability
from skep.model.service import (
    EndpointSpec,
    GlobalService,
    Placement,
    PortConfig,
    PublishMode,
    ReplicatedJob,
    ReplicatedService,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    UpdateConfig,
    UpdateOrder,
)
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.times import SECOND_NS, timestamp
from skep.store.interface import Transaction

UNIT = 64 << 20
UNITS_OF_A_NODE = 5
STEPS = 14
PAUSES_S = (0.01, 0.1, 0.5, 1.5, 4.0)
PRIORITIES = (-10, 0, 0, 5, 10)
SERVICES_MAX = 6
SETTLED_S = 60.0
STABLE_S = 3.0
QUIET_S = 10.0
"""Once all is settled, nothing is preempted for as long."""


def simulate(seed: int) -> RunResult:
    """Run the simulation of ``seed``."""
    random = Random(seed)
    with SimulatedCluster(
        managers=random.choice((1, 3)),
        workers=random.randint(2, 4),
        seed=seed,
        behaviour=Behaviour(shutdown_s=random.choice((0.05, 0.8, 2.0))),
        capacity=Resources(nano_cpus=4_000_000_000, memory_bytes=UNITS_OF_A_NODE * UNIT),
    ) as cluster:
        preemptions = PreemptionsAreJust()
        cluster.observer.rules.append(preemptions)
        allows = random.random() < 0.8
        if allows:
            _allow_preemption(cluster, is_allowed=True)
        for number in range(STEPS):
            random.choices(ACTIONS, WEIGHTS)[0](cluster, random, number)
            cluster.run_for(random.choice(PAUSES_S))
            if cluster.observer.violations:
                break
        else:
            _settle(cluster, preemptions, allows=allows)
        return RunResult(seed, list(cluster.observer.violations), cluster.trace.lines())


def _settle(cluster: SimulatedCluster, preemptions: PreemptionsAreJust, *, allows: bool) -> None:
    for id in cluster.workers:
        cluster.set_availability(id, Availability.ACTIVE)
    cluster.start_all()
    until, settled_at = cluster.loop.time() + SETTLED_S, cluster.loop.time()
    while cluster.loop.time() - settled_at < STABLE_S:
        cluster.run_for(0.5)
        if wrong := [*(held_by_lower(cluster.view) if allows else ()), *_unsettled(cluster)]:
            settled_at = cluster.loop.time()
            if settled_at > until:
                cluster.observer.note(settled_at, [f"{one} after {SETTLED_S} s" for one in wrong])
                return
    before = preemptions.count
    cluster.run_for(QUIET_S)
    late = [f"{preemptions.count - before} more tasks are preempted"] if preemptions.count > before else []
    if preemptions.count and not allows:
        late.append("tasks are preempted though the cluster never allowed it")
    lower = held_by_lower(cluster.view) if allows else ()
    cluster.observer.note(cluster.loop.time(), [*late, *lower, *cluster.rest_violations()])


def _unsettled(cluster: SimulatedCluster) -> list[str]:
    """Tasks that are under way, and nodes that are not there."""
    away = [f"{id} is not ready" for id in cluster.workers if not cluster.is_ready(id)]
    moving = [
        f"{task.id} is {task.status.state.value}"
        for task in cluster.view.find(Task)
        if not task.status.state.is_terminal
        and (task.status.state not in (TaskState.PENDING, TaskState.RUNNING) or not task.is_wanted)
    ]
    return away + moving


# -- what happens ----------------------------------------------------------------------------------------------------


def _create(cluster: SimulatedCluster, random: Random, number: int) -> None:
    if len(_services(cluster)) < SERVICES_MAX:
        id, now = ServiceId(f"s{number}"), timestamp(cluster.clocks[cluster.managers[0]].now_ns())
        body = partial(create_service, new_id=lambda: id, new_name=lambda: id, now=now)
        spec = _a_spec(id, random)
        cluster.write(lambda tx: body(tx, spec))


def _a_spec(name: str, random: Random) -> ServiceSpec:
    port = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
    priority = random.choice(PRIORITIES)
    match random.choices(("replicated", "global", "job"), (80, 10, 10))[0]:
        case "global":
            mode = ServiceMode(global_=GlobalService())
        case "job":
            mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=2, total_completions=3))
        case _:
            mode = ServiceMode(replicated=ReplicatedService(replicas=random.randint(1, 7)))
    is_job = mode.replicated_job is not None
    order = random.choice((UpdateOrder.STOP_FIRST, UpdateOrder.START_FIRST))
    return ServiceSpec(
        name=name,
        labels={PRIORITY: str(priority)} if priority else {},
        task_template=TaskSpec(
            container_spec=ContainerSpec(image="job:1" if is_job else "app:1", stop_grace_period=SECOND_NS),
            resources=ResourceRequirements(reservations=Resources(memory_bytes=random.randint(1, 4) * UNIT)),
            restart_policy=RestartPolicy(delay=SECOND_NS // 10),
            placement=Placement(max_replicas=random.choice((0, 0, 0, 1, 2))),
        ),
        mode=mode,
        update_config=None if is_job else UpdateConfig(parallelism=random.randint(0, 2), order=order),
        endpoint_spec=EndpointSpec(ports=(port,)) if random.random() < 0.15 else None,
    )


def _scale(cluster: SimulatedCluster, random: Random, number: int) -> None:
    replicated = [one for one in _services(cluster) if one.spec.mode.replicated is not None]
    if replicated:
        mode = ServiceMode(replicated=ReplicatedService(replicas=random.randint(0, 8)))
        _change(cluster, random.choice(replicated), lambda spec: replace(spec, mode=mode))


def _update(cluster: SimulatedCluster, random: Random, number: int) -> None:
    def updated(spec: ServiceSpec) -> ServiceSpec:
        reserved = ResourceRequirements(reservations=Resources(memory_bytes=random.randint(1, 4) * UNIT))
        return replace(spec, task_template=replace(spec.task_template, resources=reserved))

    if services := [one for one in _services(cluster) if one.job_status is None]:
        _change(cluster, random.choice(services), updated)


def _reprioritize(cluster: SimulatedCluster, random: Random, number: int) -> None:
    labels = {PRIORITY: str(random.choice(PRIORITIES))}
    if services := _services(cluster):
        _change(cluster, random.choice(services), lambda spec: replace(spec, labels=labels))


def _change(
    cluster: SimulatedCluster, service: Service, change: Callable[[ServiceSpec], ServiceSpec]
) -> None:
    now = timestamp(cluster.clocks[cluster.managers[0]].now_ns())

    def body(tx: Transaction) -> None:
        present = tx.get(Service, service.id)
        update_service(tx, service.id, change(present.spec), present.version.index, now=now)

    cluster.write(body)


def _remove(cluster: SimulatedCluster, random: Random, number: int) -> None:
    if services := _services(cluster):
        cluster.remove(random.choice(services).id)


def _lose_node(cluster: SimulatedCluster, random: Random, number: int) -> None:
    """Until it comes back in a later step."""
    cluster.kill_node(random.choice(cluster.workers))


def _restart_nodes(cluster: SimulatedCluster, random: Random, number: int) -> None:
    cluster.start_all()


def _set_availability(cluster: SimulatedCluster, random: Random, number: int) -> None:
    availability = random.choice((Availability.DRAIN, Availability.PAUSE, Availability.ACTIVE))
    cluster.set_availability(random.choice(cluster.workers), availability)


def _depose(cluster: SimulatedCluster, random: Random, number: int) -> None:
    cluster.depose(quietly=random.random() < 0.3)


def _kill_container(cluster: SimulatedCluster, random: Random, number: int) -> None:
    running = [
        task
        for task in cluster.view.find(Task)
        if task.status.state is TaskState.RUNNING and task.id in cluster.nodes[task.node_id].containers
    ]
    if running:
        cluster.kill_container(random.choice(running))


Action = Callable[[SimulatedCluster, Random, int], None]
ACTIONS: tuple[Action, ...] = (
    _create,
    _scale,
    _update,
    _reprioritize,
    _remove,
    _lose_node,
    _restart_nodes,
    _set_availability,
    _depose,
    _kill_container,
)
WEIGHTS = (35, 12, 8, 8, 5, 8, 8, 6, 5, 5)


def _services(cluster: SimulatedCluster) -> list[Service]:
    return [one for one in cluster.view.find(Service) if one.removed_at is None]


def _allow_preemption(cluster: SimulatedCluster, *, is_allowed: bool) -> None:
    def body(tx: Transaction) -> None:
        (swarm,) = tx.find(Swarm)
        tx.put(
            replace(swarm, spec=replace(swarm.spec, labels={PREEMPTION: "true" if is_allowed else "false"}))
        )

    cluster.write(body)
