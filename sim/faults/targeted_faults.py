"""Faults that are injected in situations that random faults rarely hit."""

import asyncio
from collections.abc import Callable, Iterable
from math import inf

from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.faults.damping import is_steady, pass_time
from sim.users.users import Users
from sim.world.images import BROKEN, program_of
from sim.world.software import is_before_rotation
from sim.world.time import VirtualClock
from skep.model.node import Node
from skep.model.options.affinity import has_affinities
from skep.model.options.labels import FORGET_NODES, OnDisconnect, disconnect_policy
from skep.model.service import RestartCondition, Service, ServiceSpec
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.node.supervision.responses import wait_hung
from skep.store.interface import Transaction

CUT_OFF_S = 15.0
"""Longer than any requested delay of ``skep.on-disconnect``, and longer than a container takes to stop."""
BACK_S = 10.0
"""Time until a node is back and the cluster has converged."""
LOOK_S = 0.02
"""Shorter than the preparation of a task."""
WAITED_S = 4.0
AWAY_S = (0.01, 0.1)
ATTEMPTED_S = 0.5
"""Time within which an update has begun and its first task was rejected."""
LAG_S = 3.0
SLOW_MANAGER_S = 1.6
SLOW_NODE_S = 0.4
"""Chosen so that one call to the slow manager takes longer than the registration with another one (three
latencies).
"""
PATIENCE_S = (0.6, 2.0)
"""Timeout of a node for the response of a manager."""
SHOWN_S = 1.0
REVISIONS = (50, 150, 400)
FEW = 3
"""The loss of one worker counts as a disruption, in which no node is removed, if there are at most this many."""
LOST_S = 110.0
"""Longer than the minute after which lost nodes can be removed, and longer than their tasks take to run elsewhere."""
STARTED_S = 8.0
"""Time until the tasks of a new service run."""
UNDECIDED_S = 3.0
"""Longer than any requested restart delay."""


def hang_manager(cluster: SimulatedCluster, id: NodeId, *, for_s: float = inf) -> Callable[[], None]:
    """Hang a manager process while its etcd member continues, until the supervisor replaces both.

    After ``for_s`` the process continues by itself.  Return a function that ends the fault at once.
    """
    cluster.disturbances += 1
    cluster.links.hang(id)

    async def is_answered() -> bool:
        return not cluster.links.is_frozen(id)

    async def hand_over() -> None:
        if cluster.raft.current is not None and cluster.leader == id:
            cluster.depose()

    def thaw() -> None:
        if cluster.links.is_frozen(id):
            cluster.links.thaw(id)
            cluster.disturbances -= 1

    async def supervise() -> None:
        try:
            async with asyncio.timeout(for_s if for_s < inf else None):
                await wait_hung(is_answered, hand_over, VirtualClock(cluster.loop))
        except TimeoutError:
            thaw()
            return
        process = cluster.kill_manager(id)
        thaw()  # a killed process ends even if it was stopped
        await asyncio.wait([process], timeout=1.0)
        cluster.start_manager(id)

    def end() -> None:
        if cluster.links.is_frozen(id):
            supervising.cancel()
            thaw()

    supervising = cluster.loop.create_task(supervise(), name=f"supervisor of {id}")
    cluster.supervise(supervising)
    return end


def cut_off_for_long(cluster: SimulatedCluster) -> None:
    """Partition a node until it has stopped the tasks that ``skep.on-disconnect`` requires to stop."""
    stopping = {service.id for service in cluster.view.find(Service) if _is_to_stop(service)}
    nodes = _nodes_of(
        task
        for node in cluster.nodes.values()
        for task in node.containers.values()
        if task.service_id in stopping
    )
    if not nodes:
        return
    id = cluster.random.choice(nodes)
    cluster.trace.add(f"fault: {id} is cut off for {CUT_OFF_S} s, in a cluster at rest")
    cut = cluster.links.cut([id], [*cluster.managers, *(other for other in cluster.workers if other != id)])
    pass_time(cluster, CUT_OFF_S)
    cluster.links.restore(cut)
    pass_time(cluster, BACK_S)


def restart_before_it_runs(cluster: SimulatedCluster) -> None:
    """Kill a node process while a prepared task waits for its start, which is not yet stored on the disk."""
    waiting = [
        task
        for node in cluster.nodes.values()
        for task in node.containers.values()
        if (policy := task.spec.restart_policy) is not None and policy.delay
    ]
    if not waiting:
        return
    task = cluster.random.choice(waiting)
    cluster.trace.add(f"fault: container of {task.id[:6]} ends, in a cluster at rest")
    cluster.kill_container(task)
    until = cluster.loop.time() + WAITED_S
    while not (nodes := _nodes_of(_prepared(cluster))) and cluster.loop.time() < until:
        cluster.run_for(LOOK_S)
    if nodes:
        id = cluster.random.choice(nodes)
        cluster.trace.add(f"fault: node process of {id} dies")
        cluster.kill_node(id, keeps_containers=True)
        cluster.run_for(cluster.random.choice(AWAY_S))
        cluster.start_node(id)
    pass_time(cluster, BACK_S)


def take_an_update_back(cluster: SimulatedCluster, users: Users) -> None:
    """Revert an update that cannot succeed while no decision is made on its service.

    The next decision finds a slot with a task of the current spec, and a younger task that has failed.
    """
    steady = [one for one in cluster.view.find(Service) if _is_updatable(one) and is_steady(cluster, one)]
    if not steady:
        return
    service = cluster.random.choice(steady)
    container = service.spec.task_template.container_spec
    assert container is not None
    users.update(service.id, BROKEN)
    cluster.run_for(ATTEMPTED_S)
    cluster.trace.add(f"fault: failing decisions {service.id}, in a cluster at rest")
    cluster.poisoned.add(service.id)
    users.update(service.id, program_of(container))
    cluster.run_for(UNDECIDED_S)
    cluster.poisoned.discard(service.id)
    cluster.disturb()
    cluster.do(users.wait_until_finished())
    pass_time(cluster, BACK_S)


def leave_uneven(cluster: SimulatedCluster, users: Users) -> None:
    """Start all tasks of a new service on one node while the others are paused, so that a rebalance has work."""
    if (spec := users.a_free_spec(_can_be_uneven)) is None:
        return
    busy = cluster.random.choice(cluster.workers)
    cluster.do(users.pause_all_but(busy))
    cluster.do(users.create(users.next_id(), spec))
    pass_time(cluster, STARTED_S)
    cluster.do(users.activate_all())
    cluster.trace.add(f"{spec.name} is on {busy}, in a cluster at rest")


def _can_be_uneven(spec: ServiceSpec) -> bool:
    """Return whether several tasks of the service may start on one node, and move later."""
    template = spec.task_template
    container, policy = template.container_spec, template.restart_policy
    return (
        spec.mode.name == "replicated"
        and spec.replicas > 1
        and spec.endpoint_spec is None
        and template.placement is None
        and (policy is None or policy.condition is not RestartCondition.NONE)
        and (container is None or not container.mounts)
        and not has_affinities(spec.labels)
    )


def serve_stale_state(cluster: SimulatedCluster) -> None:
    """Let a manager send its nodes a state from before the newest containers, until it restarts."""
    committed, kv = cluster.committed, cluster.raft.kv
    since = max(kv.revision - cluster.random.choice(REVISIONS), 2)
    past = committed.past(kv.events(2, since))
    if is_before_rotation(past, cluster.view):
        return
    for id in cluster.random.sample(cluster.managers, len(cluster.managers)):
        manager = cluster.running_managers.get(id)
        if manager is not None and manager.serve_stale_state(past):
            cluster.trace.add(f"fault: {id} serves the state at {since}, in a cluster at rest")
            cluster.run_for(SHOWN_S)
            cluster.crash(id)
            cluster.start_manager(id)
            pass_time(cluster, BACK_S)
            return


def move_during_report(cluster: SimulatedCluster) -> None:
    """Deliver a report to a slow manager after its node has moved to another one, which has not received it yet.

    The replica of the slow manager does not show the new session yet.
    """
    nodes = _nodes_of(task for node in cluster.nodes.values() for task in node.containers.values())
    if not nodes or len(cluster.managers) == 1:
        return
    id = cluster.random.choice(nodes)
    session = cluster.view.get(Node, id).session
    if (
        session is None
        or cluster.raft.current is None
        or cluster.raft.current.member.id == session.manager_id
    ):
        return  # a lagging leader is a different fault
    member, slow = cluster.raft.members[session.manager_id], cluster.network.slow
    cluster.trace.add(
        f"fault: {session.manager_id} is slow and its watch lags, {id} is slow, in a cluster at rest"
    )
    cluster.disturb()
    member.watch_lag_s, slow[session.manager_id], slow[id] = LAG_S, SLOW_MANAGER_S, SLOW_NODE_S
    cluster.run_for(cluster.random.uniform(*PATIENCE_S))
    for task in list(cluster.nodes[id].containers.values())[:1]:
        cluster.kill_container(task)
    cluster.run_for(2 * SLOW_MANAGER_S)
    for one in (session.manager_id, id):
        slow.pop(one, None)  # the machine may have left meanwhile
    member.watch_lag_s = 0.0
    cluster.disturb()
    pass_time(cluster, BACK_S)


def lose_a_node_for_long(cluster: SimulatedCluster) -> None:
    """Partition a running node with volumes until a cluster that is configured for it removes lost nodes."""
    if len(cluster.workers) < FEW:
        return
    using = [
        id for id in cluster.workers if any(one.volumes for one in cluster.nodes[id].containers.values())
    ]
    storing = [id for id in cluster.workers if cluster.nodes[id].slot_volumes]
    if not using and not storing:
        return
    id = cluster.random.choice(cluster.random.choice([ids for ids in (using, storing) if ids]))
    cluster.trace.add(f"fault: {id} is cut off for {LOST_S} s, in a cluster at rest that removes lost nodes")
    cluster.write(lambda tx: _set_label(tx, FORGET_NODES, "1m"))
    cut = cluster.links.cut([id], cluster.managers)
    pass_time(cluster, LOST_S)
    end_removed_nodes(cluster)
    cluster.links.restore(cut)
    pass_time(cluster, BACK_S)


def end_removed_nodes(cluster: SimulatedCluster) -> None:
    """Switch off the machines whose nodes the leader has removed, as an operator would."""
    known = {node.id for node in cluster.view.find(Node)}
    for id in [one for one in cluster.workers if one not in known and one not in cluster.changing]:
        cluster.trace.add(f"operator: {id}, which was removed, is switched off")
        cluster.workers = tuple(one for one in cluster.workers if one != id)
        cluster.do(cluster.end_node(id))


def _set_label(tx: Transaction, name: str, value: str) -> None:
    (swarm,) = tx.find(Swarm)
    tx.put(replace(swarm, spec=replace(swarm.spec, labels={**swarm.spec.labels, name: value})))


def _is_updatable(service: Service) -> bool:
    return service.removed_at is None and service.spec.mode.name in ("replicated", "global")


def _is_to_stop(service: Service) -> bool:
    return disconnect_policy(service.spec.labels).action is OnDisconnect.STOP


def _prepared(cluster: SimulatedCluster) -> Iterable[Task]:
    for task in cluster.view.find(Task):
        if task.is_wanted and TaskState.PREPARING < task.status.state < TaskState.RUNNING:
            yield task


def _nodes_of(tasks: Iterable[Task]) -> list[NodeId]:
    return sorted({task.node_id for task in tasks})
