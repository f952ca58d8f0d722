"""Certificates and roots change under a running server."""

from contextlib import AsyncExitStack

import pytest

from skep.errors import Unavailable
from skep.model.node import Node, NodeRole
from skep.model.values.ids import new_id
from skep.security.keypair import KeyPair
from skep.security.tls import ServerTls, client_context
from skep.wire import methods
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.client import open_channel
from skep.wire.server import serve
from skep.wire.service import unary
from tests.support.managers.wire_rig import Cluster, until


async def answer(_: pb.HeartbeatRequest, _caller: Caller) -> pb.HeartbeatResponse:
    return pb.HeartbeatResponse()


async def call(address: str, pair: KeyPair) -> None:
    async with open_channel(address, client_context(pair), "swarm-manager") as channel:
        await channel.call(methods.HEARTBEAT, pb.HeartbeatRequest())


async def test_a_root_that_is_taken_away_is_not_trusted_any_more():
    old, new = Cluster(), Cluster()
    old.id = new.id
    both = old.authority.root_pem + new.authority.root_pem
    manager, worker = old.pair(new_id(), NodeRole.MANAGER), old.pair(new_id())
    tls = ServerTls(manager)
    handlers = [unary(methods.HEARTBEAT, answer)]
    async with serve(handlers, host="127.0.0.1", port=0, tls=tls.front, cluster_id=new.id) as bound:
        address = f"127.0.0.1:{bound.port}"
        await call(address, worker)
        tls.replace(new.pair(new_id(), NodeRole.MANAGER).with_root(both))
        await call(address, worker.with_root(both))
        await call(address, new.pair(new_id()))
        with pytest.raises(Unavailable, match="not trusted"):
            await call(address, worker)
        tls.replace(new.pair(new_id(), NodeRole.MANAGER))
        with pytest.raises(Unavailable):
            await call(address, worker.with_root(both))
        await call(address, new.pair(new_id()))


async def test_a_server_that_ends_closes_its_connections_at_once():
    cluster = Cluster()
    pair = cluster.pair(new_id())
    async with AsyncExitStack() as stack:
        async with cluster.serving():
            await cluster.store.update(lambda tx: tx.put(Node(id=pair.identity.node_id)))
            channel = await stack.enter_async_context(
                open_channel(cluster.address, client_context(pair), "swarm-manager")
            )
            call = await stack.enter_async_context(channel.stream(methods.LISTEN_SUBSCRIPTIONS))
            await call.send(pb.ListenSubscriptionsRequest(), end=True)
            await until(lambda: pair.identity.node_id in cluster.logs.listeners)
        with pytest.raises(Unavailable):
            await call.receive()
