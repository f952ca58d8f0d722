"""Tables of networks from the store to a node, and acknowledgements back, over real mutual TLS on loopback."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from skep.agent.session.table_stream import SET_BYTES_MAX
from skep.aio.clock import SystemClock
from skep.dataplane.tables.files import SharedTables, StoredTables
from skep.dataplane.tables.network_tables import NetworkTables, TableListener
from skep.errors import FailedPrecondition, NotFound, Unavailable
from skep.model.network import Network
from skep.model.networks.tables import NetworkTable, TableSet, whole
from skep.model.node import Node, NodeRole, NodeState, NodeStatus
from skep.model.service import Endpoint, EndpointVirtualIP, PortConfig, Service
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import NetworkId, NodeId
from skep.security.keypair import KeyPair
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.methods import MESSAGE_BYTES_MAX
from tests.support.builders import a_node, a_service, a_task, an_overlay
from tests.support.managers.wire_rig import Cluster, a_session, a_worker, an_agent, put, until
from tests.support.networks.derived_tables import table_of
from tests.support.networks.tables import a_member

NET1, NET2 = an_overlay("net1"), an_overlay("net2", subnet="10.0.2.0/24")
INGRESS = an_overlay("ingress", subnet="10.0.0.0/24", ingress=True)
OTHER = NodeId("other")


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster().serving() as serving:
        yield serving


class Listening:
    """Records the tables it receives; fails or waits on demand."""

    def __init__(self) -> None:
        self.reported: list[frozenset[NetworkId]] = []
        self.tables: Mapping[NetworkId, NetworkTable] = {}
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def apply(
        self, node_id: NodeId, tables: Mapping[NetworkId, NetworkTable], changed: frozenset[NetworkId]
    ) -> None:
        await self.may_go_on.wait()
        self.reported.append(changed)
        self.tables = tables


@asynccontextmanager
async def a_node_with_tables(
    cluster: Cluster, pair: KeyPair, directory: Path, *listeners: TableListener
) -> AsyncIterator[tuple[NodeId, NetworkTables]]:
    """An agent whose tables are kept below ``directory``."""
    clock = SystemClock()
    shared = SharedTables(directory / "run")
    network_tables = NetworkTables(
        StoredTables(directory / "networks", clock), (shared, *listeners), a_member(), clock, Random(1).random
    )
    await asyncio.to_thread(network_tables.load)
    running = asyncio.create_task(network_tables.run())
    try:
        async with an_agent(cluster, pair, directory, tables=network_tables) as (agent, _):
            yield agent.node_id, network_tables
    finally:
        running.cancel()
        await asyncio.wait([running])


def placed(service: Service, node: NodeId, *networks: Network, state: TaskState = TaskState.RUNNING) -> Task:
    task = a_task(node=node, service=service, state=state)
    places = tuple(
        NetworkAttachment(network=one, addresses=(f"10.0.{n}.7/24",)) for n, one in enumerate(networks)
    )
    return replace(task, networks_attachments=places)


def other_node(id: str = "other", address: str = "192.168.0.9") -> Node:
    node = a_node(id)
    return replace(node, status=NodeStatus(state=NodeState.READY, addr=address))


def from_store(cluster: Cluster, network: Network) -> NetworkTable:
    return replace(table_of(cluster.view, network), revision=0)


def shown(network_tables: NetworkTables) -> dict[str, NetworkTable]:
    return {id: replace(table, revision=0) for id, table in network_tables.tables.items()}


def shows(cluster: Cluster, network_tables: NetworkTables, *networks: Network) -> bool:
    """Whether the node knows exactly these, as the store has them."""
    return shown(network_tables) == {one.id: from_store(cluster, one) for one in networks}


async def test_a_node_gets_the_tables_of_its_networks_only(cluster: Cluster, tmp_path: Path) -> None:
    pair = await a_worker(cluster, tmp_path)
    web = a_service("web")
    await put(
        cluster, NET1, NET2, INGRESS, web, other_node(), placed(web, OTHER, NET1), placed(web, OTHER, NET2)
    )
    async with a_node_with_tables(cluster, pair, tmp_path) as (node_id, network_tables):
        await until(lambda: network_tables.tables == {})
        mine = placed(web, node_id, NET1, state=TaskState.ASSIGNED)
        await put(cluster, mine)
        await until(lambda: shows(cluster, network_tables, NET1))
        assert {one.node_id for one in network_tables.tables[NET1.id].endpoints.values()} == {OTHER, node_id}
        # Changes of the other network are not sent; later ones of its own network are.
        revision = network_tables.tables[NET1.id].revision
        await put(cluster, placed(web, OTHER, NET2))
        await put(cluster, replace(mine, status=replace(mine.status, state=TaskState.RUNNING)))
        await until(lambda: network_tables.tables[NET1.id].endpoints[mine.id].is_serving)
        assert set(network_tables.tables) == {NET1.id}
        assert network_tables.tables[NET1.id].revision > revision
        await put(cluster, replace(mine, status=replace(mine.status, state=TaskState.FAILED)))
        await until(lambda: network_tables.tables == {})


async def test_a_published_port_has_every_node_know_the_ingress_network(
    cluster: Cluster, tmp_path: Path
) -> None:
    pair = await a_worker(cluster, tmp_path)
    async with a_node_with_tables(cluster, pair, tmp_path) as (node_id, network_tables):
        ports = (PortConfig(target_port=80, published_port=8080),)
        vip = EndpointVirtualIP(network_id=INGRESS.id, addr="10.0.0.2/24")
        web = replace(a_service("web", ports=ports), endpoint=Endpoint(ports=ports, virtual_ips=(vip,)))
        await put(cluster, INGRESS, web)
        await until(lambda: shows(cluster, network_tables, INGRESS))
        assert network_tables.tables[INGRESS.id].services[web.id].ports[0].published == 8080
        assert node_id in network_tables.tables[INGRESS.id].nodes
        await cluster.store.update(lambda tx: tx.delete(Service, web.id))
        await until(lambda: network_tables.tables == {})


async def test_what_a_node_has_in_force_is_acknowledged(cluster: Cluster, tmp_path: Path) -> None:
    pair = await a_worker(cluster, tmp_path)
    listening = Listening()
    known = cluster.discovery.state.acknowledgements
    async with a_node_with_tables(cluster, pair, tmp_path, listening) as (node_id, network_tables):
        web = a_service("web")
        first = placed(web, node_id, NET1)
        await put(cluster, NET1, web, first)
        begun = cluster.view.revision
        await until(lambda: known.has_applied(NET1.id, begun) and known.smallest(NET1.id))
        listening.may_go_on.clear()
        await put(cluster, other_node(), placed(web, OTHER, NET1))
        changed_at = cluster.view.revision
        await until(lambda: shows(cluster, network_tables, NET1))
        waiting = asyncio.create_task(known.wait_applied(NET1.id, changed_at))
        await until(lambda: network_tables.tables[NET1.id].revision >= changed_at)
        assert not known.has_applied(NET1.id, changed_at)
        assert not waiting.done()
        listening.may_go_on.set()
        async with asyncio.timeout(10):
            await waiting
        assert listening.tables[NET1.id] == network_tables.tables[NET1.id]
        assert known.has_applied(NET1.id, changed_at)
    await until(lambda: known.smallest(NET1.id) is None)  # there is no wait for a removed node


async def test_a_node_finds_its_tables_again_without_a_manager(cluster: Cluster, tmp_path: Path) -> None:
    pair = await a_worker(cluster, tmp_path)
    async with a_node_with_tables(cluster, pair, tmp_path) as (node_id, network_tables):
        web = a_service("web")
        mine = placed(web, node_id, NET1, NET2)
        await put(cluster, NET1, NET2, web, mine)
        await until(lambda: shows(cluster, network_tables, NET1, NET2))
        before = dict(network_tables.tables)
    listening = Listening()
    clock = SystemClock()
    stored = StoredTables(tmp_path / "networks", clock)
    again = NetworkTables(
        stored, (SharedTables(tmp_path / "again"), listening), a_member(), clock, Random(1).random
    )
    again.load()
    assert again.tables == before
    running = asyncio.create_task(again.run())
    await until(lambda: listening.reported)
    running.cancel()
    await asyncio.wait([running])
    assert listening.reported == [frozenset(before)]
    found = {
        p.name: msgspec.msgpack.decode(p.read_bytes(), type=NetworkTable)
        for p in (tmp_path / "again").iterdir()
    }
    assert found == before
    # And what is none of its any more goes with the first word of a manager.
    elsewhere = replace(mine, networks_attachments=mine.networks_attachments[:1])
    await put(cluster, elsewhere)
    async with a_node_with_tables(cluster, pair, tmp_path) as (_, network_tables):
        await until(lambda: shows(cluster, network_tables, NET1))
        await until(lambda: [path.name for path in (tmp_path / "run").iterdir()] == [NET1.id])
        await until(lambda: [path.name for path in (tmp_path / "networks").iterdir()] == [NET1.id])


async def test_a_node_does_not_go_back_to_an_older_life_of_the_cluster(
    cluster: Cluster, tmp_path: Path
) -> None:
    pair = await a_worker(cluster, tmp_path)
    web = a_service("web")
    cluster.store.cluster.incarnation = 7
    async with a_node_with_tables(cluster, pair, tmp_path) as (node_id, network_tables):
        await put(cluster, NET1, web, placed(web, node_id, NET1))
        await until(lambda: shows(cluster, network_tables, NET1))
        with pytest.raises(FailedPrecondition, match="the manager is behind"):
            network_tables.update(_told_again(network_tables), 6)
        assert shows(cluster, network_tables, NET1)


def _told_again(network_tables: NetworkTables) -> Any:
    revision = max(table.revision for table in network_tables.tables.values())
    return TableSet(
        revision=revision, is_complete=True, changes=tuple(map(whole, network_tables.tables.values()))
    )


async def test_a_large_table_comes_in_pieces_and_counts_when_it_is_whole(
    cluster: Cluster, tmp_path: Path
) -> None:
    """500 services with 20 tasks each, in messages below the size limit."""
    pair = await a_worker(cluster, tmp_path)
    (tmp_path / "keys").mkdir()
    node_id = pair.identity.node_id
    await put(cluster, NET1, other_node())
    for number in range(500):
        service = a_service(f"service-with-a-long-name-{number:03}")
        tasks = [placed(service, OTHER, NET1) for _ in range(20)]
        await put(cluster, service, *tasks)
    web = a_service("web")
    await put(cluster, web, placed(web, node_id, NET1))
    async with (
        a_session(cluster, pair) as (channel, session_id),
        channel.stream(methods.NETWORKS) as call,
    ):
        await call.send(skep.AppliedTables(session_id=session_id))
        messages = []
        async for message in call:
            messages.append(message)
            if not message.more:
                break
    sizes = [message.ByteSize() for message in messages]
    assert len(sizes) > 1
    assert max(sizes) < MESSAGE_BYTES_MAX / 2
    assert sum(sizes) < SET_BYTES_MAX / 10
    async with a_node_with_tables(cluster, pair, tmp_path) as (_, network_tables):
        await until(lambda: network_tables.tables)
        assert len(network_tables.tables[NET1.id].endpoints) == 10_001
        # A busy machine may take the node for down meanwhile.
        await until(lambda: shows(cluster, network_tables, NET1))


async def test_a_node_cannot_acknowledge_a_revision_it_was_not_sent(cluster: Cluster, tmp_path: Path) -> None:
    pair = await a_worker(cluster, tmp_path)
    known = cluster.discovery.state.acknowledgements
    web = a_service("web")
    await put(cluster, NET1, NET2, web, placed(web, pair.identity.node_id, NET1))
    async with (
        a_session(cluster, pair) as (channel, session_id),
        channel.stream(methods.NETWORKS) as call,
    ):
        await call.send(skep.AppliedTables(session_id=session_id))
        message = await call.receive()
        assert message is not None
        assert (message.complete, [one.head.id for one in message.changes]) == (True, [NET1.id])
        assert known.smallest(NET1.id) == 0
        await call.send(skep.AppliedTables(revisions={NET1.id: 2**60, NET2.id: 5, "": 1}))
        await until(lambda: known.smallest(NET1.id) == message.revision)
        assert known.smallest(NET2.id) is None


async def test_of_two_streams_of_a_node_the_later_one_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    pair = await a_worker(cluster, tmp_path)
    async with (
        a_session(cluster, pair) as (channel, session_id),
        channel.stream(methods.NETWORKS) as first,
        channel.stream(methods.NETWORKS) as second,
    ):
        await first.send(skep.AppliedTables(session_id=session_id))
        await first.receive()
        await second.send(skep.AppliedTables(session_id=session_id))
        await second.receive()
        with pytest.raises(Unavailable, match="another stream of tables"):
            await first.receive()
        web = a_service("web")
        await put(cluster, NET1, web, placed(web, pair.identity.node_id, NET1))
        message = await second.receive()
        assert message is not None
        assert (message.complete, [one.whole for one in message.changes]) == (False, [True])


async def test_tables_end_with_the_session(cluster: Cluster, tmp_path: Path) -> None:
    pair = await a_worker(cluster, tmp_path)
    async with (
        a_session(cluster, pair) as (channel, session_id),
        channel.stream(methods.NETWORKS) as call,
    ):
        await call.send(skep.AppliedTables(session_id=session_id))
        await call.receive()
        await cluster.store.update(lambda tx: tx.delete(Node, pair.identity.node_id))
        with pytest.raises((NotFound, Unavailable)):
            await call.receive()


async def test_a_node_goes_on_with_a_manager_without_tables(cluster: Cluster, tmp_path: Path) -> None:
    class OlderDiscovery:
        """Serves nothing; the rig answers UNIMPLEMENTED for it."""

        state = None

        def services(self) -> tuple[()]:
            return ()

        async def run(self) -> None:
            await asyncio.Event().wait()

    del cluster
    older = Cluster()
    older.make_discovery = lambda _clock: OlderDiscovery()  # type: ignore[assignment,return-value]
    async with older.serving():
        pair = await a_worker(older, tmp_path)
        async with a_node_with_tables(older, pair, tmp_path) as (node_id, network_tables):
            session = older.node(node_id).session
            web = a_service("web")
            await put(older, NET1, web, placed(web, node_id, NET1, state=TaskState.ASSIGNED))
            later = older.dispatcher.session(node_id, session.session_id if session else "")
            received = later.last_seen
            await until(lambda: later.last_seen > received)  # heartbeats go on in the same session
            assert network_tables.tables == {}
            assert older.node(node_id).session == session


async def test_many_nodes_get_the_same_tables(cluster: Cluster, tmp_path: Path) -> None:
    web = a_service("web")
    await put(cluster, NET1, web)
    pairs = [cluster.pair(f"node{number:02}", NodeRole.WORKER) for number in range(12)]
    for pair in pairs:
        await put(cluster, Node(id=pair.identity.node_id), placed(web, pair.identity.node_id, NET1))

    async def hears(pair: KeyPair, number: int) -> None:
        directory = tmp_path / str(number)
        directory.mkdir()
        async with a_node_with_tables(cluster, pair, directory) as (_, network_tables):
            await until(
                lambda: len(network_tables.tables.get(NET1.id, EMPTY).nodes) == len(pairs), within_s=30
            )
            await until(lambda: shows(cluster, network_tables, NET1), within_s=30)
            arrived.append(number)
            await until(lambda: len(arrived) == len(pairs), within_s=30)

    arrived: list[int] = []
    async with asyncio.TaskGroup() as group:
        for number, pair in enumerate(pairs):
            group.create_task(hears(pair, number))


EMPTY = NetworkTable(head=None)  # type: ignore[arg-type]
