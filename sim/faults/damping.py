"""Injects one fault into a cluster at rest.  Only tasks that the fault ended, or that are preempted for them, may be
replaced, and none of them may be shown as running.
"""

from collections import Counter
from collections.abc import Callable

from sim.cluster import SimulatedCluster
from sim.invariants.liveness import lease_violations
from sim.invariants.services.damping import surplus_violations
from sim.world.images import HOPELESS, image_of, program_of
from skep.manager.nodes.heartbeats import RECOVERY_GRACE_S
from skep.model.node import Node
from skep.model.options.autoscaling import AUTOSCALE
from skep.model.options.labels import OnDisconnect, disconnect_policy
from skep.model.service import UNDER_WAY, Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId

Lost = Counter[ServiceId]
"""Number of running tasks that a fault ended, by service."""

LEASE_S = RECOVERY_GRACE_S + 6.0
"""Time after which the lease of a dead node has expired, also if its manager died with it.

It is the sum of an election, two seconds until the leader adopts the session, the grace period of a leader that has
just started, and a margin.
"""
AFTERMATH_S = 20.0
"""Time after a fault until its node counts as down and the lost tasks run elsewhere."""
LOOK_S = 0.5
WITHIN_GRACE_S = 0.5
BEYOND_GRACE_S = 15.0


def one_more_fault(cluster: SimulatedCluster) -> None:
    """Inject a fault that ends.  It may not create more tasks than it ended."""
    fault = cluster.random.choice(
        (_container_ends, _process_restarts, _power_is_back, _manager_restarts, _leadership_moves, _cut_off)
    )
    _damped(cluster, fault)


def lose_a_node(cluster: SimulatedCluster) -> None:
    """Let a node die permanently, also the manager that has its session if the others keep their quorum."""
    _damped(cluster, _node_dies)


def _damped(cluster: SimulatedCluster, fault: Callable[[SimulatedCluster], Lost]) -> None:
    steady = [service.id for service in cluster.view.find(Service) if is_steady(cluster, service)]
    name = fault.__name__.strip("_").replace("_", " ")
    created, started = cluster.observer.created.copy(), cluster.observer.started.copy()
    preempted = cluster.observer.preempted.copy()
    cluster.trace.add(f"fault: {name}, in a cluster at rest")
    lost = fault(cluster)
    pass_time(cluster, AFTERMATH_S)
    # A lost task of higher priority may take the place of another one, which is then replaced as well.
    expected = {id: lost[id] + cluster.observer.preempted[id] - preempted[id] for id in steady}
    note, now = cluster.observer.note, cluster.loop.time()
    note(now, surplus_violations(f"'{name}'", expected, created, cluster.observer.created))
    note(now, surplus_violations(f"'{name}'", expected, started, cluster.observer.started))


def is_steady(cluster: SimulatedCluster, service: Service) -> bool:
    """Return whether the service has converged, and none of its tasks ends by itself or is stopped by its node.

    An autoscaled service is not steady, because its number of tasks changes by itself.  A task with a hopeless image
    is not steady either, also when the current spec has another image that an update has not rolled out yet.
    """
    status, container = service.update_status, service.spec.task_template.container_spec
    return (
        service.removed_at is None
        and (container is None or program_of(container) not in HOPELESS)
        and AUTOSCALE not in service.spec.labels
        and disconnect_policy(service.spec.labels).action is not OnDisconnect.STOP
        and service.job_status is None
        and (status is None or status.state not in UNDER_WAY)
        and all(_is_steady(task) for task in cluster.wanted(service.id))
    )


def _is_steady(task: Task) -> bool:
    return task.status.state is TaskState.RUNNING and image_of(task) not in HOPELESS


def _on(cluster: SimulatedCluster, node: NodeId) -> Lost:
    return Counter(task.service_id for task in cluster.view.find(Task, node_id=node) if task.is_wanted)


def pass_time(cluster: SimulatedCluster, seconds: float) -> None:
    """Let virtual time pass, and check the invariants on durations at intervals."""
    until = cluster.loop.time() + seconds
    while (left_s := until - cluster.loop.time()) > 0:
        cluster.run_for(min(left_s, LOOK_S))


# -- faults ----------------------------------------------------------------------------------------------------------


def _container_ends(cluster: SimulatedCluster) -> Lost:
    running = [task for node in cluster.nodes.values() for task in node.containers.values()]
    if not running:
        return Counter()
    task = cluster.random.choice(running)
    cluster.kill_container(task)
    return Counter([task.service_id])


def _process_restarts(cluster: SimulatedCluster) -> Lost:
    id = cluster.random.choice(cluster.workers)
    cluster.kill_node(id, keeps_containers=True)
    cluster.run_for(WITHIN_GRACE_S)
    cluster.start_node(id)
    return Counter()


def _power_is_back(cluster: SimulatedCluster) -> Lost:
    id = cluster.random.choice(cluster.workers)
    lost = _on(cluster, id)
    cluster.kill_node(id)
    pass_time(cluster, cluster.random.choice((WITHIN_GRACE_S, BEYOND_GRACE_S)))
    cluster.start_node(id)
    return lost


def _manager_restarts(cluster: SimulatedCluster) -> Lost:
    id = cluster.random.choice(cluster.managers)
    cluster.crash(id)
    pass_time(cluster, cluster.random.choice((WITHIN_GRACE_S, BEYOND_GRACE_S)))
    cluster.start_manager(id)
    return Counter()


def _leadership_moves(cluster: SimulatedCluster) -> Lost:
    cluster.depose(quietly=True)
    return Counter()


def _cut_off(cluster: SimulatedCluster) -> Lost:
    """Cut a node off.  Within the grace period no task moves, and after it each task of the node moves once."""
    id = cluster.random.choice(cluster.workers)
    lasts_s = cluster.random.choice((WITHIN_GRACE_S, BEYOND_GRACE_S))
    # The only manager keeps its own node, and loses all others.
    silent = [other for other in cluster.workers if other != id] if list(cluster.managers) == [id] else [id]
    lost = sum((_on(cluster, one) for one in silent if lasts_s > WITHIN_GRACE_S), Counter[ServiceId]())
    cut = cluster.links.cut([id], [*cluster.managers, *(other for other in cluster.workers if other != id)])
    pass_time(cluster, lasts_s)
    cluster.links.restore(cut)
    return lost


def _node_dies(cluster: SimulatedCluster) -> Lost:
    """Let a node die.  After its lease has expired no manager shows a task as running on it."""
    id = cluster.random.choice(cluster.workers)
    lost = _on(cluster, id)
    session = cluster.view.get(Node, id).session
    if session is not None and len(cluster.managers) > 2:
        cluster.crash(session.manager_id)
    cluster.kill_node(id)
    pass_time(cluster, LEASE_S)
    stores = [manager.store for manager in cluster.running_managers.values() if manager.store is not None]
    for view in (cluster.view, *(store.view() for store in stores)):
        cluster.observer.note(cluster.loop.time(), lease_violations(view, id))
    return lost
