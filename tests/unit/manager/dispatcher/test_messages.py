"""What a node gets in its session."""

import msgspec

from skep.manager.dispatcher.node_sessions.messages import ManagerPeer, managers_of, session_message
from skep.model.node import ManagerStatus, NodeCertificate
from skep.model.swarm import Swarm
from skep.model.values.ids import ClusterId, NodeId, SessionId
from skep.model.values.meta import TLSInfo
from skep.wire import swarm_pb2 as pb
from tests.support.builders import a_node

OWN = ManagerPeer(node_id=NodeId("m1"), addr="10.0.0.1:2377")
SWARM = Swarm(id=ClusterId("c1"), tls_info=TLSInfo(trust_root="root\n"), data_path_port=4790)


def test_this_manager_is_in_the_list_before_the_store_has_it():
    assert managers_of([a_node("m1"), a_node("n1")], OWN) == (OWN,)


def test_every_manager_with_an_address_is_in_the_list():
    other = msgspec.structs.replace(a_node("m2"), manager_status=ManagerStatus(addr="10.0.0.2:2377"))
    moved = msgspec.structs.replace(a_node("m1"), manager_status=ManagerStatus(addr="10.0.0.9:2377"))
    silent = msgspec.structs.replace(a_node("m3"), manager_status=ManagerStatus())
    assert [peer.addr for peer in managers_of([other, moved, silent], OWN)] == [
        "10.0.0.9:2377",
        "10.0.0.2:2377",
    ]


def test_a_session_message_has_the_node_and_the_trusted_roots():
    certificate = NodeCertificate(state="rotate")
    node = msgspec.structs.replace(a_node("n1"), certificate=certificate)
    message = session_message(SessionId("s1"), node, SWARM, [OWN])
    assert message.session_id == "s1"
    assert message.node.id == "n1"
    assert message.node.VXLANUDPPort == 4790
    assert message.node.certificate.status.state == pb.IssuanceStatus.ROTATE
    assert message.RootCA == b"root\n"
    (peer,) = message.managers
    assert (peer.peer.node_id, peer.peer.addr, peer.weight) == ("m1", "10.0.0.1:2377", 10)
