"""What is done next while the root is rotated."""

from msgspec.structs import replace

from skep.manager.ca.rotation import (
    RENEWAL_S,
    REQUESTED_MAX,
    Finish,
    RequestRenewals,
    next_step,
    rotation_warnings,
)
from skep.model.node import Node, NodeCertificate, NodeDescription, NodeState, NodeStatus
from skep.model.swarm import RootRotation, Swarm
from skep.model.values.ids import ClusterId, NodeId
from skep.security.authority import Authority
from skep.security.trust import tls_info
from skep.store.state import State

OLD, NEW = tls_info(Authority.create().root_pem), tls_info(Authority.create().root_pem)
ROTATING = Swarm(
    id=ClusterId("c"),
    tls_info=replace(NEW, trust_root=OLD.trust_root),
    rotation=RootRotation(root=NEW.trust_root, cross_signed="x"),
)


def a_node(
    id: str, *, has_new: bool = False, state: NodeState = NodeState.READY, asked: bool = False
) -> Node:
    info = replace(NEW, trust_root=OLD.trust_root) if has_new else OLD
    return Node(
        id=NodeId(id),
        description=NodeDescription(tls_info=info),
        status=NodeStatus(state=state),
        certificate=NodeCertificate(state="rotate" if asked else "issued"),
    )


def state_of(swarm: Swarm, *nodes: Node) -> State:
    state = State()
    state.table_by_type[Swarm].store(swarm.id, None, swarm)
    for one in nodes:
        state.table_by_type[Node].store(one.id, None, one)
    return state


def test_without_a_rotation_nothing_is_to_be_done():
    assert next_step(Swarm(id=ClusterId("c"), tls_info=OLD), [a_node("n1")], {}, 0.0) is None


def test_nodes_that_are_left_are_asked_in_order():
    nodes = [a_node("n2"), a_node("n1"), a_node("n3", has_new=True)]
    assert next_step(ROTATING, nodes, {}, 0.0) == RequestRenewals(node_ids=(NodeId("n1"), NodeId("n2")))


def test_no_more_are_asked_at_a_time_than_the_bound():
    nodes = [a_node(f"n{number:03}") for number in range(100)]
    step = next_step(ROTATING, nodes, {}, 0.0)
    assert isinstance(step, RequestRenewals)
    assert len(step.node_ids) == REQUESTED_MAX
    asked = dict.fromkeys(step.node_ids, 0.0)
    assert next_step(ROTATING, nodes, asked, 1.0) is None
    done = [a_node(node.id, has_new=node.id == "n000") for node in nodes]
    assert next_step(ROTATING, done, asked, 1.0) == RequestRenewals(node_ids=(NodeId("n030"),))


def test_a_node_that_does_not_renew_makes_room_and_is_asked_again():
    nodes = [a_node("n1", asked=True)]
    asked = {NodeId("n1"): 0.0}
    assert next_step(ROTATING, nodes, asked, RENEWAL_S - 1) is None
    assert next_step(ROTATING, nodes, asked, RENEWAL_S) == RequestRenewals(node_ids=(NodeId("n1"),))


def test_an_absent_node_is_asked_once_and_uses_no_slot():
    away = [a_node(f"down{number:02}", state=NodeState.DOWN) for number in range(40)]
    step = next_step(ROTATING, [*away, a_node("up")], {}, 0.0)
    assert isinstance(step, RequestRenewals)
    assert "up" in step.node_ids
    reported = [a_node(node.id, state=NodeState.DOWN, asked=True) for node in away]
    assert next_step(ROTATING, reported, {}, 100.0) is None


def test_an_absent_node_without_a_certificate_is_not_asked_again_at_once():
    """The request changes nothing, so the leader would repeat it thousands of times a second."""
    nodes = [replace(a_node("n1", state=NodeState.UNKNOWN), certificate=None)]
    request = RequestRenewals(node_ids=(NodeId("n1"),))
    assert next_step(ROTATING, nodes, {}, 0.0) == request
    assert next_step(ROTATING, nodes, {NodeId("n1"): 0.0}, RENEWAL_S - 1) is None
    assert next_step(ROTATING, nodes, {NodeId("n1"): 0.0}, RENEWAL_S) == request


def test_it_ends_when_every_node_has_said_so():
    assert next_step(ROTATING, [a_node("n1", has_new=True)], {}, 0.0) == Finish(root=NEW.trust_root)
    waiting = [a_node("n1", has_new=True), a_node("n2", state=NodeState.DOWN, asked=True)]
    assert next_step(ROTATING, waiting, {}, 0.0) is None


def test_unavailable_nodes_that_delay_the_rotation_are_named():
    away = [a_node(f"n{number}", state=NodeState.DOWN, asked=True) for number in range(1, 8)]
    nodes = [*away, a_node("n8"), a_node("n9", has_new=True, state=NodeState.DOWN)]
    [warning] = rotation_warnings(state_of(ROTATING, *nodes))
    assert "root certificate waits for nodes that do not respond: n1, n2, n3, n4, n5 and 2 more. " in warning
    assert not list(rotation_warnings(state_of(ROTATING, *nodes[-2:])))
    assert not list(rotation_warnings(state_of(replace(ROTATING, rotation=None), *nodes)))
