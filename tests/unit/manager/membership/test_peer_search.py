"""The callers that a manager without a store accepts."""

import asyncio

import pytest

from skep.aio.clock import SystemClock
from skep.errors import PermissionDenied, Unavailable
from skep.manager.membership.peer_addresses import PeerAddresses
from skep.manager.membership.peer_search import PeerSearch
from skep.model.node import NodeRole
from skep.model.values.ids import ClusterId, NodeId
from skep.security.identity import NodeIdentity
from skep.security.tls import unverified_context
from skep.store.etcd.peers import EtcdPeer
from skep.wire.methods import MethodAccess


def test_without_a_store_only_known_managers_are_accepted() -> None:
    """The other managers have dropped the address of a removed one."""
    peer_addresses = PeerAddresses((EtcdPeer(name="a", url="https://a:2378", ip="10.0.0.1"),), lambda _: None)
    peer_search = PeerSearch(
        NodeId("own"), "10.0.0.9:2377", peer_addresses, (), unverified_context, SystemClock()
    )

    def caller(id: str) -> NodeIdentity:
        return NodeIdentity(node_id=NodeId(id), cluster_id=ClusterId("c"), role=NodeRole.MANAGER)

    peer_search.require_known(caller("a"), MethodAccess.MANAGER)
    with pytest.raises(PermissionDenied, match="not known here"):
        peer_search.require_known(caller("removed"), MethodAccess.MANAGER)


async def test_managers_are_searched_at_their_own_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one machine have different ones; a port that is not known is taken to be this manager's."""
    peers = (
        EtcdPeer(name="a", url="https://a:12478", ip="10.0.0.9", manager_port=2478),
        EtcdPeer(name="b", url="https://b:2378", ip="10.0.0.2"),
        EtcdPeer(name="own", url="https://own:12477", ip="10.0.0.9", manager_port=2477),
    )
    search = PeerSearch(
        NodeId("own"),
        "10.0.0.9:2477",
        PeerAddresses(peers, lambda _: None),
        ("10.0.0.3:2377",),
        unverified_context,
        SystemClock(),
    )
    called, all_called = list[str](), asyncio.Event()

    def connected(addr: str, *_: object) -> None:
        called.append(addr)
        if len(called) == 3:
            all_called.set()
        raise Unavailable("nothing listens")

    monkeypatch.setattr("skep.manager.membership.peer_search.open_channel", connected)
    async with asyncio.TaskGroup() as group:
        searching = group.create_task(search.search())
        await all_called.wait()
        searching.cancel()
    assert sorted(called) == ["10.0.0.2:2477", "10.0.0.3:2377", "10.0.0.9:2478"]
