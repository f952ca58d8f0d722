"""Taking a session: by managers whose replicas are behind too."""

from skep.aio.clock import SystemClock
from skep.manager.dispatcher.node_sessions.registration import (
    Registration,
    SilentNode,
    mark_down,
    take_session,
)
from skep.model.node import Node, NodeDescription, NodeState
from skep.model.values.ids import NodeId, SessionId
from skep.model.values.times import SECOND_NS
from skep.store.interface import Transaction
from skep.store.memory import MemoryCluster, MemoryStore


def a_registration(manager: str, session: str) -> Registration:
    return Registration(
        node_id=NodeId("w1"),
        manager_id=NodeId(manager),
        session_id=SessionId(session),
        description=NodeDescription(hostname="w1"),
        address="10.0.0.1",
    )


async def test_a_node_becomes_ready_at_a_manager_whose_replica_does_not_show_it_as_down() -> None:
    """Found by the simulation: the stale replica showed READY, so nothing was written over DOWN."""
    cluster = MemoryCluster()
    one, other = MemoryStore(SystemClock(), cluster), MemoryStore(SystemClock(), cluster)
    await one.update(lambda tx: tx.put(Node(id=NodeId("w1"))))
    await one.update(take_session, a_registration("m1", "s1"))
    other.faults.lag_s = 0.05

    def down(tx: Transaction) -> bool:
        return mark_down(tx, SilentNode(node_id=NodeId("w1"), session_id=SessionId("s1")), SECOND_NS)

    await one.update(down)
    assert other.view().get(Node, "w1").status.state is NodeState.READY, "it is behind"
    await other.update(take_session, a_registration("m2", "s2"))
    assert one.view().get(Node, "w1").status.state is NodeState.READY
