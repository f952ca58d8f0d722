"""Who is heard by a manager that has no store to ask."""

import pytest

from skep.aio.clock import SystemClock
from skep.errors import PermissionDenied
from skep.manager.membership.addresses import AddressBook
from skep.manager.membership.whereabouts import Whereabouts
from skep.model.ids import ClusterId, NodeId
from skep.model.node import NodeRole
from skep.security.identity import Identity
from skep.security.tls import unverified_context
from skep.store.etcd.peers import Peer
from skep.wire.methods import Access


def test_only_managers_that_were_known_are_heard_without_a_store() -> None:
    """A removed one has left the address book of those that were there."""
    book = AddressBook((Peer(name="a", url="https://a:2378", ip="10.0.0.1"),), lambda _: None)
    whereabouts = Whereabouts(NodeId("own"), "10.0.0.9:2377", book, (), unverified_context, SystemClock())

    def caller(id: str) -> Identity:
        return Identity(node_id=NodeId(id), cluster_id=ClusterId("c"), role=NodeRole.MANAGER)

    whereabouts.require_known(caller("a"), Access.MANAGER)
    with pytest.raises(PermissionDenied, match="not known here"):
        whereabouts.require_known(caller("removed"), Access.MANAGER)
