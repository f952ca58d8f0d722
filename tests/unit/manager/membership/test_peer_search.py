"""The callers that a manager without a store accepts."""

import pytest

from skep.aio.clock import SystemClock
from skep.errors import PermissionDenied
from skep.manager.membership.peer_addresses import PeerAddresses
from skep.manager.membership.peer_search import PeerSearch
from skep.model.ids import ClusterId, NodeId
from skep.model.node import NodeRole
from skep.security.identity import Identity
from skep.security.tls import unverified_context
from skep.store.etcd.peers import Peer
from skep.wire.methods import Access


def test_without_a_store_only_known_managers_are_accepted() -> None:
    """The other managers have dropped the address of a removed one."""
    peer_addresses = PeerAddresses((Peer(name="a", url="https://a:2378", ip="10.0.0.1"),), lambda _: None)
    peer_search = PeerSearch(
        NodeId("own"), "10.0.0.9:2377", peer_addresses, (), unverified_context, SystemClock()
    )

    def caller(id: str) -> Identity:
        return Identity(node_id=NodeId(id), cluster_id=ClusterId("c"), role=NodeRole.MANAGER)

    peer_search.require_known(caller("a"), Access.MANAGER)
    with pytest.raises(PermissionDenied, match="not known here"):
        peer_search.require_known(caller("removed"), Access.MANAGER)
