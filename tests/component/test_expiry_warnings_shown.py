"""A certificate that expires soon: its warnings in events and in ``docker info``."""

import asyncio
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from skep.api.client.client import ApiClient
from skep.manager.ca.admission import stamp
from skep.manager.manager import serving
from skep.manager.routes import application
from skep.manager.telemetry.events import ClusterEvents
from skep.model.node import Node, NodeCertificate, NodeDescription
from skep.model.values.ids import NodeId
from skep.node.cluster.swarm_info import cluster_section
from skep.security import keypair
from tests.conformance.manager import a_manager_api
from tests.support.managers.wire_rig import CLOCK, MANAGER_ID, Cluster, put

LATE = Node(
    id=NodeId("late"),
    description=NodeDescription(hostname="cellar"),
    certificate=NodeCertificate(not_after=stamp(datetime.now(UTC) + timedelta(days=3))),
)


@pytest.fixture
async def cluster():
    async with Cluster().serving() as serving_cluster:
        yield serving_cluster


async def test_docker_info_warns_of_a_node_that_has_not_renewed(cluster, tmp_path: Path):
    await put(cluster, LATE)
    socket = tmp_path / "manager.sock"
    manager_api = ApiClient.local(socket, "the manager")
    async with (
        a_manager_api(store=cluster.store) as api,
        serving(application(api), socket, tmp_path / "handover.sock"),
        manager_api,
    ):
        section = await cluster_section(manager_api)
    (warning,) = section["Warnings"]
    assert warning.startswith("WARNING: the certificate of node cellar expires on ")


async def test_events_and_log_report_it(cluster, tmp_path: Path, capsys):
    await put(cluster, LATE)
    events = ClusterEvents(cluster.store, CLOCK)
    async with aclosing(events.subscribe(None, None, lambda _: True)) as coming:
        first = asyncio.ensure_future(anext(coming))
        await asyncio.sleep(0)
        pair = cluster.pair(MANAGER_ID)
        keypair.save(pair, tmp_path)
        async with cluster.kept_up(tmp_path, on_expiry=events.expires):
            message = await asyncio.wait_for(first, 5)
    assert (message.type, message.action, message.actor.id) == ("node", "expire", "late")
    assert message.actor.attributes["name"] == "cellar"
    assert "certificate expires soon" in capsys.readouterr().out
