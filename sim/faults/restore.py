"""Disaster recovery, at the end of a run: all managers are lost, and one is restored from a snapshot."""

from collections import deque
from collections.abc import Iterable
from inspect import isfunction
from typing import Any, cast

from sim.cluster import WRAPPING_KEY, SimulatedCluster
from sim.etcd.client import SimulatedClient
from sim.initial_state import address_of
from sim.invariants.observer import Observer
from sim.world.committed import Change, CommittedState
from sim.world.manager import NoProcess
from skep.manager.storage.recovery import show_survivor
from skep.model.task import Task
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.times import SECOND_NS, Timestamp
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.initialize import raise_incarnation_on
from skep.store.etcd.membership import RaftMembers
from skep.store.etcd.process.member import EtcdMember
from skep.store.etcd.store import store_on
from skep.store.interface import Created, View

WITHOUT_S = 5.0
"""Seconds from the loss of the managers to the restore.  Nodes keep running."""


def restore(cluster: SimulatedCluster, revision: int) -> None:
    """Restore one manager from the state at ``revision``, as ``manager.storage.recovery`` does.

    Later acknowledged writes are lost, so only stateless rules are checked from then on.
    """
    plain = [id for id in cluster.managers if id not in cluster.nodes]
    survivor = cluster.random.choice(plain or cluster.managers)
    cluster.trace.add(f"fault: all managers are lost, {survivor} goes on from revision {revision}")
    cluster.start_all()
    for id in cluster.managers:
        cluster.crash(id)
    cluster.managers = (survivor,)
    cluster.run_for(WITHOUT_S)
    cluster.raft.restore(survivor, revision)
    cluster.committed.restore(cluster.raft.kv.events(2, revision))
    cluster.observe_with(StatelessObserver)
    cluster.raft.start(survivor)
    member = cluster.raft.members[survivor]
    client = SimulatedClient(cluster.raft, member, cluster.links, cluster.random)
    now_s = cluster.clocks[survivor].now_ns() // SECOND_NS
    cluster.do(raise_incarnation_on(client, now_s))
    cluster.do(_finish(cluster, client, survivor))
    cluster.start_manager(survivor)


async def _finish(cluster: SimulatedCluster, client: EtcdClient, survivor: NodeId) -> None:
    """Finish the recovery before the manager serves, as ``manager.storage.recovery.finish_recovery`` does.

    Otherwise it would show registered nodes as unknown.
    """
    members = RaftMembers(client, cast("EtcdMember", NoProcess()))
    await members.count()
    async with store_on(
        *(client, survivor, WRAPPING_KEY, cluster.clocks[survivor]),
        rng=cluster.random.random,
        is_only_member=members.is_only_member,
    ) as store:
        await store.update(show_survivor, survivor, address_of(survivor), Timestamp(""))


class StatelessObserver(Observer):
    """An observer with only the rules that have no state, and with the restored tasks of each slot."""

    def __init__(self, committed: CommittedState, *args: Any) -> None:
        super().__init__(committed, *args)
        self.rules = [*(rule for rule in self.rules if isfunction(rule)), self._record_ends]
        tasks = sorted(committed.view.find(Task), key=lambda task: task.created_at)
        events = tuple(Created(task) for task in tasks)
        restored = Change(committed.now(), NodeId(""), None, 0, committed.view.revision, (), events)
        self._record_ends(restored, committed.view)

    def _record_ends(self, change: Change, view: View) -> Iterable[str]:
        """Record failures and slots that are given up.

        Whether restarts were allowed before the restore is not judged.
        """
        for rule in (self.restarts, self.failures):
            deque(rule(change, view), maxlen=0)
        return ()

    def check_durations(self) -> None:
        """Skip these checks, because the start times of processes are unknown."""

    def container_started(self, node_id: NodeId, task: Task) -> None:
        self._trace.add(f"{node_id} starts task {task.id[:6]}")

    def container_stopped(self, node_id: NodeId, task_id: TaskId) -> None:
        self._trace.add(f"{node_id} stops task {task_id[:6]}")
