"""The callers that a manager without a store accepts."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from skep.aio.clock import SystemClock
from skep.errors import PermissionDenied
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


async def test_managers_are_searched_at_their_own_ports() -> None:
    """Those of one machine have different ones; a port that is not known is taken to be this manager's."""
    called, all_called = set[str](), asyncio.Event()

    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = writer.get_extra_info("sockname")
        called.add(f"{host}:{port}")
        if len(called) == 3:
            all_called.set()
        writer.close()

    async with AsyncExitStack() as stack:

        async def listening(host: str, port: int = 0) -> int:
            server = await stack.enter_async_context(await asyncio.start_server(refuse, host, port))
            return int(server.sockets[0].getsockname()[1])

        own = await listening("127.0.0.9")
        beside, third = await listening("127.0.0.9"), await listening("127.0.0.3")
        await listening("127.0.0.2", own)
        peers = (
            EtcdPeer(name="a", url="https://a:12478", ip="127.0.0.9", manager_port=beside),
            EtcdPeer(name="b", url="https://b:2378", ip="127.0.0.2"),
            EtcdPeer(name="own", url="https://own:12477", ip="127.0.0.9", manager_port=own),
        )
        search = PeerSearch(
            NodeId("own"),
            f"127.0.0.9:{own}",
            PeerAddresses(peers, lambda _: None),
            (f"127.0.0.3:{third}",),
            unverified_context,
            SystemClock(),
        )
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            searching = group.create_task(search.search())
            await all_called.wait()
            searching.cancel()
    assert called == {f"127.0.0.2:{own}", f"127.0.0.3:{third}", f"127.0.0.9:{beside}"}
