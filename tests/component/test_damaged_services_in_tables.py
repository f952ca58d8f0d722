"""A service that a manager cannot read keeps its names, addresses and ports on the nodes until it is written anew."""

from collections.abc import Mapping

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.dataplane.tables.network_tables import merged
from skep.manager.discovery.network_tables import TableBuilder
from skep.model.network import Network
from skep.model.networks.publishing import PublishOptions
from skep.model.networks.tables import NetworkTable, TablePort, TableSet
from skep.model.service import Endpoint, EndpointSpec, EndpointVirtualIP, PortConfig, Service
from skep.model.task import NetworkAttachment
from skep.model.values.ids import NetworkId, NodeId
from skep.model.values.times import Timestamp
from skep.store.interface import Store
from skep.store.memory import MemoryCluster, MemoryStore
from skep.wire.convert.tables import messages_of, pieces_of, table_set_from_pb
from tests.support.builders import a_node, a_service, a_task, an_overlay
from tests.support.networks.derived_tables import table_of
from tests.support.store.damage_rigs import damage

INGRESS = an_overlay("ingress", subnet="10.0.0.0/24", ingress=True)
WEB = a_service("web")
PORT = PortConfig(protocol="tcp", target_port=80, published_port=8080)
ENDPOINT = Endpoint(
    spec=EndpointSpec(ports=(PORT,)),
    ports=(PORT,),
    virtual_ips=(EndpointVirtualIP(network_id=INGRESS.id, addr="10.0.0.5/24"),),
)
PUBLISHED = TablePort(protocol="tcp", published=8080, target=80, options=PublishOptions())


async def a_cluster() -> tuple[MemoryCluster, MemoryStore]:
    cluster = MemoryCluster()
    store = MemoryStore(SystemClock(), cluster)
    service = replace(WEB, spec=replace(WEB.spec, endpoint_spec=ENDPOINT.spec), endpoint=ENDPOINT)
    place = NetworkAttachment(network=INGRESS, addresses=("10.0.0.6/24",))
    task = replace(a_task("t1", node="n1", service=service), networks_attachments=(place,))
    for one in (INGRESS, a_node("n1"), a_node("n2"), service, task):
        await store.update(lambda tx, one=one: tx.put(one))
    return cluster, store


class Manager:
    """What one manager makes of its replica for a node."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.tables = TableBuilder()
        for _ in self.tables.begin(store.view()):
            pass

    def reported(
        self, tables: Mapping[NetworkId, NetworkTable], since: int | None
    ) -> Mapping[NetworkId, NetworkTable]:
        """A node's tables after the next set, as it goes over the wire."""
        assert self.tables.networks_of(NodeId("n2")) == [INGRESS.id], "every node answers for published ports"
        book, revision = self.tables.tables[INGRESS.id], self.tables.revision
        whole = replace(book.table(revision), revision=0)
        assert whole == replace(
            table_of(self.store.view(), self.store.view().get(Network, INGRESS.id)), revision=0
        )
        pieces = pieces_of(book.since(since, revision))
        messages = messages_of(pieces, incarnation=1, revision=revision, is_complete=since is None)
        changed: TableSet = table_set_from_pb(list(messages))
        return merged(tables, changed)[0]


def shown(tables: Mapping[NetworkId, NetworkTable]) -> tuple[object, ...]:
    table = tables[INGRESS.id]
    return tuple((one.name, one.virtual_ips, one.ports) for one in table.services.values())


@pytest.mark.parametrize("part", ["", "endpoint"])
async def test_a_service_that_cannot_be_read_keeps_its_place_on_the_nodes(part: str) -> None:
    cluster, store = await a_cluster()
    tables = Manager(store).reported({}, None)
    known = (("web", ("10.0.0.5",), (PUBLISHED,)),)
    assert shown(tables) == known
    damage(cluster, "service", "web", part)

    anew = Manager(MemoryStore(SystemClock(), cluster))
    after = anew.reported(tables, None)
    assert shown(after) == known
    assert after[INGRESS.id].endpoints == tables[INGRESS.id].endpoints, "the names of its tasks, too"

    commit_of = anew.tables.revision
    renamed = replace(
        WEB,
        spec=replace(WEB.spec, name="mended", endpoint_spec=ENDPOINT.spec),
        endpoint=replace(ENDPOINT, ports=()),
    )
    events = await noted(anew, renamed)
    assert events
    mended = anew.reported(after, commit_of)
    assert shown(mended) == (("mended", ("10.0.0.5",), ()),)
    assert mended[INGRESS.id].unread == ()


async def test_a_service_that_is_removed_while_it_cannot_be_read_leaves_the_nodes() -> None:
    cluster, store = await a_cluster()
    tables = Manager(store).reported({}, None)
    damage(cluster, "service", "web", "endpoint")
    anew = Manager(MemoryStore(SystemClock(), cluster))
    kept = anew.reported(tables, None)
    assert shown(kept) == shown(tables)
    await noted(
        anew, a_service("other", ports=(replace(PORT, published_port=9090),))
    )  # nodes stay on ingress
    before = anew.tables.revision
    removed = replace(anew.store.view().get(Service, WEB.id), removed_at=Timestamp("2026-01-01T00:00:00Z"))
    await noted(anew, removed)
    assert shown(anew.reported(kept, before)) == ()


async def noted(manager: Manager, service: Service) -> bool:
    """Write ``service``; the manager takes in the commit."""
    async with manager.store.watch(Service) as watch:
        await manager.store.update(lambda tx: tx.put(service))
        async for commit in watch:
            manager.tables.note(commit)
            return True
    return False
