"""What a session stream sends, and what it waits for."""

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.manager.dispatcher.node_sessions.registration import NotRegistered
from skep.manager.dispatcher.session_streams import SessionContents, contents_for
from skep.model.networks.gossip import GossipKey, GossipKeys
from skep.model.node import Node
from skep.model.swarm import Swarm
from skep.model.values.ids import ClusterId, NodeId
from skep.model.values.meta import TLSInfo
from skep.model.values.times import Timestamp
from skep.store.interface import Object
from skep.store.kinds import GOSSIP_KEYS_ID, Payload
from skep.store.memory import MemoryStore
from tests.support.builders import a_docker_node, a_node
from tests.support.store.damage_rigs import put_all

MANAGERS = (ManagerPeer(node_id=NodeId("m1"), addr="10.0.0.1:2377"),)
WEIGHTS = {NodeId("m1"): 5}
SWARM = Swarm(id=ClusterId("c1"), tls_info=TLSInfo(trust_root="root\n"))
KEY = GossipKey(subsystem="networking:gossip", key=b"k" * 16, lamport_time=1)
KEYS = Payload(id=GOSSIP_KEYS_ID, data=GossipKeys(keys=(KEY,), rotated_at=Timestamp("")).encode())


def sent(node: Node, *objects: Object) -> SessionContents | None:
    loop = VirtualLoop()
    store = MemoryStore(VirtualClock(loop))
    loop.run_until_complete(put_all(store, node, *objects))
    loop.close()
    return contents_for(node.id, store.view(), MANAGERS, WEIGHTS)


def test_a_skep_node_is_sent_no_gossip_keys() -> None:
    found = sent(a_node(), SWARM, KEYS)
    assert found is not None
    assert (found.node.id, found.swarm.id, found.managers, found.weights) == ("n1", "c1", MANAGERS, WEIGHTS)
    assert found.keys == ()


def test_an_engine_is_sent_the_gossip_keys() -> None:
    found = sent(a_docker_node(), SWARM, KEYS)
    assert found is not None
    assert found.keys == (KEY,)


def test_an_engine_waits_for_keys_and_a_root() -> None:
    assert sent(a_docker_node(), SWARM) is None
    assert sent(a_docker_node(), replace(SWARM, tls_info=TLSInfo()), KEYS) is None


def test_a_node_without_a_cluster_is_not_registered() -> None:
    with pytest.raises(NotRegistered):
        sent(a_node())
