"""Addresses that nodes say and tables hold: one that is none changes nothing for the others."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest

from skep.aio.clock import SystemClock
from skep.dataplane.tables.files import StoredTables
from skep.dataplane.tables.network_tables import NetworkTables
from skep.model.networks.data_planes import DATA_PATH_LABEL, NODE_LABEL
from skep.model.networks.tables import NetworkHead, NetworkTable, TableNode, TableSet, whole
from skep.model.values.ids import NodeId
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from tests.component.test_network_tables import (
    NET1,
    OTHER,
    Listening,
    a_node_with_tables,
    other_node,
    placed,
)
from tests.support.builders import a_service
from tests.support.managers.wire_rig import Cluster, a_session, a_worker, put, until
from tests.support.networks.tables import a_member


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster().serving() as serving:
        yield serving


async def test_what_a_node_says_of_its_address_changes_nothing_for_the_others(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Neither of a node that connects over a link, nor of one that a hostile worker describes."""
    pair, hostile = await a_worker(cluster, tmp_path / "good"), await a_worker(cluster, tmp_path / "bad")
    web = a_service("web")
    link = other_node("linked", "fe80::7%eth0")
    await put(cluster, NET1, web, other_node(), link, placed(web, OTHER, NET1), placed(web, link.id, NET1))
    async with a_session(cluster, hostile) as (channel, session):
        said = pb.NodeDescription(hostname="bad")
        said.engine.engine_version = "1"
        said.engine.labels.update({NODE_LABEL: "true", DATA_PATH_LABEL: "fe80::1%x"})
        await channel.call(methods.DESCRIBE, skep.DescribeRequest(session_id=session, description=said))
        bad = hostile.identity.node_id
        await put(cluster, placed(web, bad, NET1))
        async with a_node_with_tables(cluster, pair, tmp_path / "good") as (node_id, network_tables):
            await put(cluster, placed(web, node_id, NET1))
            await until(
                lambda: NET1.id in network_tables.tables and OTHER in network_tables.tables[NET1.id].nodes
            )
            nodes = network_tables.tables[NET1.id].nodes
            assert {id: one.underlay for id, one in nodes.items()} == {
                OTHER: "192.168.0.9",
                node_id: "127.0.0.1",
                bad: "127.0.0.1",  # where it connects from
            }


async def test_a_table_of_an_older_manager_is_taken_without_what_cannot_be_acted_on(
    tmp_path: Path,
) -> None:
    clock, listening = SystemClock(), Listening()
    network_tables = NetworkTables(
        StoredTables(tmp_path, clock), (listening,), a_member(), clock, Random(1).random
    )
    good = TableNode(id=OTHER, underlay="192.168.0.9")
    odd = ("fe80::1%x", "fe80::1", "224.0.0.1", "0.0.0.0", "255.255.255.255", "nothing")
    nodes = (good, *(TableNode(id=NodeId(f"bad{address}"), underlay=address) for address in odd))
    table = NetworkTable(head=NetworkHead(id=NET1.id, name="net1"), nodes={one.id: one for one in nodes})
    running = asyncio.create_task(network_tables.run())
    try:
        network_tables.update(TableSet(revision=1, is_complete=True, changes=(whole(table),)), 1)
        await until(lambda: NET1.id in network_tables.applied)
        assert set(listening.tables[NET1.id].nodes) == {OTHER}
    finally:
        running.cancel()
        await asyncio.wait([running])
    # Nor is what an older process kept on the disk.
    kept = StoredTables(tmp_path, clock)
    kept.schedule(NET1.id, table, 1)
    await kept.flush()
    again = NetworkTables(StoredTables(tmp_path, clock), (), a_member(), clock, Random(1).random)
    again.load()
    assert set(again.tables[NET1.id].nodes) == {OTHER}
