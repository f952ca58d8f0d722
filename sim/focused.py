"""Short runs of small clusters that focus on one part of the managers, many times cheaper than a complete run.

* ``allocations``: services and networks are created and removed, some with the same subnet.
* ``sessions``: managers fail, nodes change their manager, and replicas lag.
* ``reports``: tasks end while nothing can be written, for less time than their sessions last.
* ``volumes``: tasks with local volumes end, and their nodes fail and return.
* ``disks``: disks of nodes fill and empty.
* ``maintenance``: nodes are drained and rebooted, services are stopped, started and returned to revisions.
* ``stack_commands``: commands on one stack meet, and are killed and suspended.
* ``autoscaling``: the load of an autoscaled service changes, during updates and changes of leader.

Then all faults end, and the cluster must converge.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import partial
from random import Random

from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.run import RunResult, capacity_of
from sim.users.random_specs import ENDING_IMAGES, with_image
from sim.users.stack_commands import StackCommands
from sim.users.users import Users
from sim.world.committed import Change
from sim.world.images import BROKEN
from skep.agent.executor.simulated import Behavior
from skep.agent.session.session import DESCRIPTION_CHECK_S
from skep.errors import SkepError
from skep.manager.control.networks import remove_network
from skep.model.container import ContainerSpec, Mount
from skep.model.network import IPAMConfig, IPAMOptions, Network, NetworkSpec
from skep.model.node import Availability, Node
from skep.model.options.autoscaling import AUTOSCALE, AUTOSCALE_DOWN_AFTER
from skep.model.options.labels import VOLUME_AFFINITY
from skep.model.service import (
    EndpointSpec,
    NetworkAttachmentConfig,
    PortConfig,
    ReplicatedService,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    UpdateConfig,
)
from skep.model.task import Task, TaskState
from skep.model.values.ids import NetworkId, NodeId, ServiceId
from skep.model.values.meta import Driver
from skep.model.values.times import SECOND_NS, timestamp
from skep.store.interface import Transaction, Updated, View

STEPS = 12
PAUSES_S = (0.01, 0.1, 0.4, 1.0)
SUBNETS = ("", "10.9.0.0/24")
NAMES = ("web", "api", "app")
WELL_S = 30.0
LAGS_S = (2.5, 4.0)
"""Longer than the leader's timeout for a manager, and longer than a node needs to reconnect."""
MAINTENANCE_STEPS = 14
MAINTENANCE_PAUSES_S = (0.5, 3.0, 12.0)
"""Shorter and longer than a reboot."""
GONE_S = 8.0
HANGS_S = (5.5, 9.0)
"""Longer than a writer waits for a write."""
REPLICAS = 3
VOLUME_STEPS = 8
DISK_STEPS = 6
REPORTED_S = DESCRIPTION_CHECK_S
"""Interval at which a node describes itself again."""
COMMAND_STEPS = 8
COMMAND_PAUSES_S = (0.3, 1.0, 6.0, 15.0)
LOAD_STEPS = 8
LOAD_STEPS_S = (10.0, 40.0)
"""They are shorter than a period of autoscaling, or longer than the window in which it removes no task."""
LOADS = (0, 300_000_000, 700_000_000, 3_000_000_000)
"""Nanoseconds of CPU time per second: no load, less than the target, the target, and four times as much."""
SETTLED_S = 15.0
"""Longer than the tolerance of the rule on local volumes."""


def allocations(seed: int) -> RunResult:
    """Create and remove services and networks."""
    random = Random(seed)
    with SimulatedCluster(
        workers=2, seed=seed, behavior=Behavior(shutdown_s=random.choice((0.05, 0.8)))
    ) as cluster:
        for number in range(STEPS):
            action = random.choice(
                (_add_network, _remove_network, _add_service, _add_service, _remove_service)
            )
            action(cluster, random, number)
            if random.random() < 0.2:
                _stall(cluster, random)
            cluster.run_for(random.choice(PAUSES_S))
            if cluster.observer.violations:
                break
        _end_stalls(cluster)
        for service in list(cluster.view.find(Service)):
            _remove(cluster, service.id)
        _until(cluster, lambda: [one.id for one in cluster.view.find(Task)], "are still there")
        cluster.run_for(1.0)
        cluster.observer.note(cluster.loop.time(), cluster.leftovers())
        return RunResult(seed, list(cluster.observer.violations), cluster.trace.lines())


def stack_commands(seed: int) -> RunResult:
    """Run commands on one stack, killed and suspended anywhere."""
    random = Random(seed)
    with SimulatedCluster(managers=3, workers=2, seed=seed) as cluster:
        for node in cluster.nodes.values():
            node.broken_images.add(BROKEN)
            node.ending_images.update(ENDING_IMAGES)
        commands = StackCommands(
            cluster, random, lambda found: cluster.observer.note(cluster.loop.time(), found)
        )
        for _ in range(COMMAND_STEPS):
            commands.act()
            cluster.run_for(random.choice(COMMAND_PAUSES_S))
        cluster.do(commands.end())
        return RunResult(seed, list(cluster.observer.violations), cluster.trace.lines())


def maintenance(seed: int) -> RunResult:
    """Let users maintain nodes and services whose specs have all features that Docker does not have."""
    random = Random(seed)
    with SimulatedCluster(managers=3, workers=4, seed=seed, capacity=capacity_of(random)) as cluster:
        users = Users(cluster, random)
        users.begin()
        cluster.run_for(MAINTENANCE_PAUSES_S[-1])
        for _ in range(MAINTENANCE_STEPS):
            users.maintain()
            cluster.run_for(random.choice(MAINTENANCE_PAUSES_S))
            if cluster.observer.violations:
                break
        cluster.do(users.wait_until_finished())
        cluster.do(users.settle())
        return RunResult(seed, list(cluster.observer.violations), cluster.trace.lines())


def sessions(seed: int) -> RunResult:
    """Let a manager fail or a node be partitioned, while replicas lag."""
    random = Random(seed)
    with SimulatedCluster(managers=3, workers=4, seed=seed) as cluster:
        action = random.choice((_lose_manager, _cut_node_off))
        action(cluster, random)
        for member in cluster.raft.members.values():
            member.watch_lag_s = 0.0
        _until(cluster, lambda: [id for id in cluster.workers if not cluster.is_ready(id)], "are not ready")
        return RunResult(seed, list(cluster.observer.violations), cluster.trace.lines())


def reports(seed: int) -> RunResult:
    """End containers while the disk of the only manager hangs, then restart its etcd."""
    random = Random(seed)
    with SimulatedCluster(managers=1, workers=2, seed=seed) as cluster:
        cluster.create(a_spec_of("web"))
        cluster.run_until(lambda: cluster.containers("web") == REPLICAS, within_s=WELL_S)
        (manager,) = cluster.managers
        cluster.raft.hang(manager)
        cluster.run_for(random.uniform(0.0, 1.0))
        for task in random.sample(cluster.tasks("web"), random.randint(1, REPLICAS)):
            cluster.kill_container(task)
        cluster.run_for(random.uniform(*HANGS_S))
        cluster.raft.crash(manager)  # writes that waited for the disk are lost
        cluster.raft.resume(manager)
        cluster.raft.start(manager)
        _until(cluster, lambda: range(cluster.containers("web"), REPLICAS), "are not replaced")
        return RunResult(seed, list(cluster.observer.violations), cluster.trace.lines())


def volumes(seed: int) -> RunResult:
    """Kill and update tasks with local volumes, and let their nodes fail and return."""
    random = Random(seed)
    with SimulatedCluster(managers=1, workers=4, seed=seed) as cluster:
        names = ("kept", "returning")
        for name, policy in zip(names, ("required", "preferred"), strict=True):
            cluster.create(replace(a_spec_with_volumes(name), labels={VOLUME_AFFINITY: policy}))
        _until(cluster, lambda: [one for one in names if cluster.containers(one) < REPLICAS], "do not run")
        cluster.run_for(SETTLED_S)
        for _ in range(VOLUME_STEPS):
            action = random.choice((_end_task, _end_task, _lose_node, _drain_node))
            action(cluster, random)
            cluster.run_for(random.uniform(0.5, 8.0))
            if cluster.observer.violations:
                break
        for id in cluster.workers:
            cluster.set_availability(id, Availability.ACTIVE)
        _until(cluster, lambda: [one for one in names if cluster.containers(one) < REPLICAS], "do not run")
        return RunResult(seed, list(cluster.observer.violations), cluster.trace.lines())


def disks(seed: int) -> RunResult:
    """Fill and empty disks of nodes while tasks end and the service is scaled, until all are full, and then none."""
    random = Random(seed)
    with SimulatedCluster(managers=1, workers=4, seed=seed) as cluster:
        id = cluster.create(a_spec_of("web"))
        _until(cluster, lambda: range(cluster.containers("web"), REPLICAS), "do not run")
        for _ in range(DISK_STEPS):
            _fill(cluster, [one for one in cluster.workers if random.random() < 0.5])
            if running := _running(cluster):
                cluster.kill_container(random.choice(running))
            _scale(cluster, id, random.randint(REPLICAS, 2 * REPLICAS))
            cluster.run_for(random.uniform(1.0, 2 * REPORTED_S))
        _fill(cluster, ())
        _scale(cluster, id, REPLICAS)
        cluster.run_for(2 * REPORTED_S)
        _until(cluster, lambda: range(cluster.containers("web"), REPLICAS), "do not run")
        _fill(cluster, cluster.workers)
        cluster.run_for(2 * REPORTED_S)
        _scale(cluster, id, 2 * REPLICAS)
        cluster.kill_container(random.choice(_running(cluster)))
        cluster.run_for(WELL_S)
        found = cluster.containers("web")
        if found != REPLICAS:
            cluster.observer.note(cluster.loop.time(), [f"{found} tasks run on full nodes, not {REPLICAS}"])
        _fill(cluster, ())
        _until(cluster, lambda: range(cluster.containers("web"), 2 * REPLICAS), "do not run")
        return RunResult(seed, list(cluster.observer.violations), cluster.trace.lines())


def autoscaling(seed: int) -> RunResult:
    """Change the load of an autoscaled service, update it, and move the leader."""
    random = Random(seed)
    with SimulatedCluster(managers=3, workers=4, seed=seed) as cluster:
        spec = replace(a_spec_of("web"), update_config=UpdateConfig(parallelism=1, delay=5 * SECOND_NS))
        cluster.create(replace(spec, labels={AUTOSCALE: "2..9", AUTOSCALE_DOWN_AFTER: "30s"}))
        _until(cluster, lambda: range(cluster.containers("web"), REPLICAS), "do not run")
        for _ in range(LOAD_STEPS):
            action = random.choice((_load, _load, _load, _update_image, _move_leader))
            action(cluster, random)
            cluster.run_for(random.uniform(*LOAD_STEPS_S))
            if cluster.observer.violations:
                break
        cluster.nano_cpus = lambda _: None
        _until(cluster, lambda: _lacking(cluster, "web"), "do not run")
        return RunResult(seed, list(cluster.observer.violations), cluster.trace.lines())


# -- autoscaling ---------------------------------------------------------------------------------------------------


def _load(cluster: SimulatedCluster, random: Random) -> None:
    """Change the CPU use of every task from now on."""
    used = random.choice(LOADS)
    cluster.trace.add(f"each task uses {used} ns per second")
    cluster.nano_cpus = lambda _: used


def _update_image(cluster: SimulatedCluster, random: Random) -> None:
    image = random.choice(("app:2", "app:3"))
    cluster.update("web", lambda spec: with_image(spec, image))


def _move_leader(cluster: SimulatedCluster, random: Random) -> None:
    cluster.depose(quietly=random.random() < 0.5)


def _lacking(cluster: SimulatedCluster, name: str) -> range:
    service = cluster.service(name)
    return range(cluster.containers(name), service.spec.replicas if service is not None else 0)


# -- disks ---------------------------------------------------------------------------------------------------------


def _fill(cluster: SimulatedCluster, full: Collection[NodeId]) -> None:
    """Let exactly these nodes have full disks."""
    cluster.trace.add(f"disks of {','.join(full) or 'no node'} are full")
    for id in cluster.workers:
        cluster.nodes[id].has_full_disk = id in full


def _scale(cluster: SimulatedCluster, id: ServiceId, replicas: int) -> None:
    def scale(tx: Transaction) -> None:
        service = tx.get(Service, id)
        mode = ServiceMode(replicated=ReplicatedService(replicas=replicas))
        tx.put(replace(service, spec=replace(service.spec, mode=mode)))

    cluster.write(scale)


def _running(cluster: SimulatedCluster) -> list[Task]:
    return [one for one in cluster.tasks("web") if one.status.state is TaskState.RUNNING]


# -- allocations ---------------------------------------------------------------------------------------------------


def _add_network(cluster: SimulatedCluster, random: Random, number: int) -> None:
    """Create a network.  With the subnet of another network it is usually refused, and with concurrent requests it
    waits.
    """
    subnet = random.choice(SUBNETS)
    ipam = IPAMOptions(configs=(IPAMConfig(subnet=subnet),)) if subnet else None
    driver = Driver(name="overlay")
    spec = NetworkSpec(name=f"x{number}", driver_configuration=driver, ipam_options=ipam)
    _request(cluster, lambda tx: tx.put(Network(id=NetworkId(f"x{number}"), spec=spec)))


def _remove_network(cluster: SimulatedCluster, random: Random, number: int) -> None:
    if networks := _networks(cluster):
        _request(cluster, partial(remove_network, id=random.choice(networks)))


def _add_service(cluster: SimulatedCluster, random: Random, number: int) -> None:
    networks = _networks(cluster)
    chosen = random.sample(networks, random.randint(0, min(2, len(networks))))
    name = random.choice(NAMES)
    spec = ServiceSpec(
        name=name,
        task_template=TaskSpec(
            container_spec=ContainerSpec(image="app:1", stop_grace_period=SECOND_NS),
            networks=tuple(NetworkAttachmentConfig(target=id) for id in chosen),
        ),
        mode=ServiceMode(replicated=ReplicatedService(replicas=random.randint(1, 3))),
        endpoint_spec=EndpointSpec(ports=(PortConfig(target_port=80),)) if random.random() < 0.5 else None,
    )
    _request(cluster, lambda tx: tx.put(Service(id=ServiceId(f"s{number}"), spec=spec)))


def _remove_service(cluster: SimulatedCluster, random: Random, number: int) -> None:
    """Remove a service, often together with its networks while its tasks still exist."""
    if services := [one for one in cluster.view.find(Service) if one.removed_at is None]:
        service = random.choice(services)
        _remove(cluster, service.id)
        for config in service.spec.task_template.networks:
            if random.random() < 0.7:
                _request(cluster, partial(remove_network, id=NetworkId(config.target)))


def _remove(cluster: SimulatedCluster, id: ServiceId) -> None:
    now = _now(cluster)
    _request(cluster, lambda tx: tx.put(replace(tx.get(Service, id), removed_at=now)))


def _stall(cluster: SimulatedCluster, random: Random) -> None:
    for member in cluster.raft.members.values():
        member.stall_s = random.choice((0.0, 0.2, 0.6))


def _end_stalls(cluster: SimulatedCluster) -> None:
    for member in cluster.raft.members.values():
        member.stall_s = 0.0


def _networks(cluster: SimulatedCluster) -> list[NetworkId]:
    return [one.id for one in cluster.view.find(Network) if one.id.startswith("x")]


def _now(cluster: SimulatedCluster) -> str:
    return timestamp(cluster.clocks[cluster.managers[0]].now_ns())


def _request(cluster: SimulatedCluster, body: Callable[[Transaction], object]) -> None:
    """Send a request that may be refused."""
    try:
        cluster.write(body)
    except SkepError as error:
        cluster.trace.add(f"refused: {error}")


# -- reports -------------------------------------------------------------------------------------------------------


def a_spec_of(name: str) -> ServiceSpec:
    """Return the spec of a service whose tasks are replaced soon after they have ended."""
    template = TaskSpec(
        container_spec=ContainerSpec(image="app:1"), restart_policy=RestartPolicy(delay=SECOND_NS // 10)
    )
    mode = ServiceMode(replicated=ReplicatedService(replicas=REPLICAS))
    return ServiceSpec(name=name, task_template=template, mode=mode)


# -- volumes -------------------------------------------------------------------------------------------------------


def a_spec_with_volumes(name: str) -> ServiceSpec:
    """Return the spec of such a service, with a local volume for each slot."""
    spec = a_spec_of(name)
    mount = Mount(type="volume", source=name + "-{{.Task.Slot}}", target="/data")
    template = replace(spec.task_template, container_spec=ContainerSpec(image="app:1", mounts=(mount,)))
    return replace(spec, task_template=template)


def _end_task(cluster: SimulatedCluster, random: Random) -> None:
    name = random.choice(("kept", "returning"))
    if running := [one for one in cluster.tasks(name) if one.status.state is TaskState.RUNNING]:
        cluster.kill_container(random.choice(running))


def _lose_node(cluster: SimulatedCluster, random: Random) -> None:
    """Stop a node until it is down."""
    id = random.choice(cluster.workers)
    cut = cluster.links.cut([id], cluster.managers)
    cluster.run_until(lambda: not cluster.is_ready(id), within_s=30)
    cluster.run_for(random.uniform(0.0, GONE_S))
    cluster.links.restore(cut)


def _drain_node(cluster: SimulatedCluster, random: Random) -> None:
    """Drain one random node and activate all others, so that at most one is drained."""
    drained = random.choice(cluster.workers)
    for id in cluster.workers:
        cluster.set_availability(id, Availability.DRAIN if id == drained else Availability.ACTIVE)


# -- sessions ------------------------------------------------------------------------------------------------------


def _lose_manager(cluster: SimulatedCluster, random: Random) -> None:
    """Fail a manager while the leader's replica shows new sessions late.

    Each node may lose one session to an adoption, but not more.
    """
    id = random.choice([one for one in cluster.managers if one != cluster.leader])
    cluster.raft.members[cluster.leader].watch_lag_s = random.choice(LAGS_S)
    taken: Counter[NodeId] = Counter()

    def count(change: Change, view: View) -> None:
        for event in change.events:
            match event:
                case Updated(Node() as before, Node() as after) if before.session != after.session:
                    taken[after.id] += 1

    cluster.committed.watchers.append(count)
    cluster.crash(id)
    cluster.run_for(GONE_S)
    cluster.committed.watchers.remove(count)
    often = {node_id: times for node_id, times in taken.items() if times > 2}
    cluster.observer.note(
        cluster.loop.time(), [f"the loss of {id} ended sessions repeatedly: {often}"] if often else []
    )
    cluster.start_manager(id)


def _cut_node_off(cluster: SimulatedCluster, random: Random) -> None:
    """Cut a node off until it is down.  Then it reconnects to any manager, including managers that do not show yet
    that it was down.
    """
    id = random.choice(cluster.workers)
    for member in cluster.raft.members.values():
        member.watch_lag_s = random.choice((0.0, *LAGS_S))
    cut = cluster.links.cut([id], cluster.managers)
    cluster.run_until(lambda: not cluster.is_ready(id), within_s=30)
    cluster.links.restore(cut)
    cluster.run_for(GONE_S)


def _until(cluster: SimulatedCluster, missing: Callable[[], Iterable[object]], words: str) -> None:
    until = cluster.loop.time() + WELL_S
    while lacking := list(missing()):
        if cluster.loop.time() > until:
            cluster.observer.note(cluster.loop.time(), [f"{lacking} {words} after {WELL_S} s"])
            return
        cluster.run_for(0.25)
