"""How far the root is replaced, and for which nodes an eviction waits."""

import pytest
from msgspec.structs import replace

from skep.manager.eviction.steps import NO_ROOT_KEY, Eviction, RootProgress, root_progress, waits_for_restarts
from skep.model.node import Node, NodeDescription, NodeState, NodeStatus
from skep.model.swarm import RootRotation, Swarm
from skep.model.values.ids import ClusterId, NodeId
from skep.model.values.times import Timestamp
from skep.security.authority import Authority
from skep.security.trust import root_digest, tls_info

OLD, NEW = (Authority.create().root_pem for _ in range(2))
BEFORE = Swarm(id=ClusterId("c"), tls_info=tls_info(OLD))
ROTATING = replace(BEFORE, tls_info=tls_info(NEW), rotation=RootRotation(root=NEW.decode(), cross_signed=""))
AFTER = replace(BEFORE, tls_info=tls_info(NEW))
EVICTION = Eviction(
    node_id=NodeId("m3"),
    hostname="m3",
    was_manager=True,
    asked_by="root",
    asked_through=NodeId("m1"),
    asked_at=Timestamp("2026-01-02T03:04:05Z"),
    roots=(root_digest(OLD),),
)


def a_node(name: str, root: bytes, state: NodeState = NodeState.READY) -> Node:
    description = NodeDescription(hostname=name, tls_info=tls_info(root))
    return Node(id=NodeId(name), description=description, status=NodeStatus(state=state))


def progress(swarm: Swarm, *nodes: Node, has_root_key: bool = True) -> RootProgress:
    return root_progress(EVICTION, swarm, nodes, has_root_key=has_root_key)


def test_a_rotation_begins_where_the_root_is_one_that_the_node_had() -> None:
    assert progress(BEFORE, a_node("w1", OLD)).action == "rotate"


def test_without_the_roots_key_the_external_ca_is_waited_for() -> None:
    assert progress(BEFORE, has_root_key=False) == RootProgress(NO_ROOT_KEY)


def test_nodes_without_a_new_certificate_are_named() -> None:
    found = progress(ROTATING, a_node("w1", OLD), a_node("w2", NEW), a_node("w3", OLD, NodeState.DOWN))
    assert found == RootProgress("waiting for nodes to renew their certificates: w1, w3")


def test_if_only_nodes_that_are_down_are_waited_for_the_gossip_keys_are_replaced_first() -> None:
    found = progress(ROTATING, a_node("w1", NEW), a_node("w3", OLD, NodeState.DOWN))
    assert found.action == "replace gossip keys"
    assert found.waits_for.endswith("to return and renew their certificates: w3")


def test_with_all_certificates_renewed_only_the_rotation_is_waited_for() -> None:
    assert progress(ROTATING, a_node("w1", NEW)) == RootProgress("the root is being replaced")


def test_nothing_is_waited_for_once_the_cluster_trusts_the_new_root_alone() -> None:
    assert progress(AFTER, a_node("w1", OLD)) == RootProgress("")


@pytest.mark.parametrize(
    ("digests", "words"), [(("", root_digest(NEW)), "one after another: m1"), ((root_digest(NEW),) * 2, "")]
)
def test_managers_that_still_trust_the_former_root_are_named(digests: tuple[str, ...], words: str) -> None:
    nodes = [replace(a_node(f"m{number}", NEW), peer_roots=one) for number, one in enumerate(digests, 1)]
    assert waits_for_restarts(AFTER, nodes).endswith(words)
    assert bool(waits_for_restarts(AFTER, nodes)) == bool(words)
