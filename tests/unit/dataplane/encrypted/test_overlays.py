"""The node's encrypted networks: what the overlay and the managers say becomes one plan, applied until it is."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from skep.aio.clock import SystemClock
from skep.dataplane.encrypted.forwarder import Status
from skep.dataplane.encrypted.methods import Refusal
from skep.dataplane.encrypted.overlays import EncryptedOverlays, devices
from skep.dataplane.encrypted.plan import Plan, PlannedEndpoint, mac_of, planned_segments
from skep.errors import Unavailable
from skep.model.ids import NetworkId, NodeId, TaskId
from skep.model.pair_keys import KeysTold, Method, PeerKeys
from skep.model.tables import NetworkHead, Segment, Table, TableEndpoint, TableNode
from tests.unit.dataplane.encrypted.rig import a_key

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
SEGMENTS = (
    Segment(subnet="10.0.1.0/24", gateway="10.0.1.1", vni=4097),
    Segment(subnet="fd00:1::/64", gateway="fd00:1::1", vni=4098),
)
NAMESPACE = Path("/run/netns/secure")


def a_table(*, port: int = 4789, encrypted: bool = True) -> Table:
    head = NetworkHead(
        id=NetworkId("n1"), name="secure", segments=SEGMENTS, port=port, is_encrypted=encrypted
    )
    nodes = {id: TableNode(id=id, underlay=f"192.0.2.{number}") for number, id in enumerate((A, B, C), 1)}
    places = {
        "own": (A, ("10.0.1.2",)),
        "there": (B, ("10.0.1.3", "fd00:1::3")),
        "six": (C, ("fd00:1::4",)),
        "nowhere": (C, ()),
    }
    endpoints = {
        TaskId(name): TableEndpoint(task_id=TaskId(name), node_id=node, addresses=addresses)
        for name, (node, addresses) in places.items()
    }
    return Table(head=head, nodes=nodes, endpoints=endpoints)


def told(*nodes: NodeId) -> KeysTold:
    peers = tuple(PeerKeys(node_id=node, keys=(a_key(1),)) for node in nodes)
    return KeysTold(peers=peers, is_complete=True)


class Forwarding:
    """In place of the forwarder and its process."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.is_running = False
        self.failures = 0
        self.applied = asyncio.Event()

    async def apply(self, plan: Plan) -> Status:
        if self.failures:
            self.failures -= 1
            raise Unavailable("not there yet")
        self.plans.append(plan)
        self.applied.set()
        return Status()

    async def run(self) -> None:
        self.is_running = True
        await asyncio.Event().wait()

    async def wait_plans(self, count: int) -> Plan:
        async with asyncio.timeout(5):
            while len(self.plans) < count:
                self.applied.clear()
                await self.applied.wait()
        return self.plans[-1]


@asynccontextmanager
async def overlays(
    forwarding: Forwarding, method: Method | Refusal = Method.USER_SPACE
) -> AsyncIterator[EncryptedOverlays]:
    made = EncryptedOverlays(
        method,
        forwarding,
        forwarding,
        is_running=lambda: forwarding.is_running,
        clock=SystemClock(),
        chance=lambda: 0.0,
    )
    async with asyncio.TaskGroup() as group:
        running = group.create_task(made.run())
        yield made
        running.cancel()


async def test_tables_and_keys_become_a_plan() -> None:
    forwarding = Forwarding()
    async with overlays(forwarding) as made:
        made.place(A, "192.0.2.1", 1500)
        made.restored()
        made.told(told(B))
        made.carry(a_table(port=4000), NAMESPACE)
        plan = await forwarding.wait_plans(1)
    assert (plan.node_id, plan.address, plan.port, plan.mtu) == (A, "192.0.2.1", 4010, 1500)
    assert [(peer.node_id, peer.address, len(peer.keys)) for peer in plan.peers] == [
        (B, "192.0.2.2", 1),
        (C, "192.0.2.3", 0),
    ], "without keys nothing goes to a node"
    first, second = plan.segments
    assert (first.vni, first.device, first.namespace) == (4097, "enc4097", str(NAMESPACE))
    assert devices(a_table().head) == (first.device, second.device)
    both = ("10.0.1.3", "fd00:1::3")
    assert first.endpoints == (PlannedEndpoint(node_id=B, mac=mac_of(both), addresses=both),)
    assert [endpoint.node_id for endpoint in second.endpoints] == [C], "each by one device"


def test_subnets_that_share_a_vxlan_id_share_the_device() -> None:
    table = a_table()
    shared = tuple(msgspec.structs.replace(one, vni=4097) for one in SEGMENTS)
    table = msgspec.structs.replace(table, head=msgspec.structs.replace(table.head, segments=shared))
    (segment,) = planned_segments(table, A, str(NAMESPACE))
    assert sorted(endpoint.node_id for endpoint in segment.endpoints) == [B, C]


async def test_a_forwarder_of_before_goes_on_until_everything_is_known() -> None:
    forwarding = Forwarding()
    forwarding.is_running = True
    async with overlays(forwarding) as made:
        made.place(A, "192.0.2.1", 1500)
        made.carry(a_table(), NAMESPACE)
        made.told(told(B))
        for _ in range(20):
            await asyncio.sleep(0)
        assert forwarding.plans == [], "not all networks are carried again yet"
        made.restored()
        plan = await forwarding.wait_plans(1)
    assert len(plan.segments) == 2


async def test_a_forwarder_that_does_not_answer_is_told_again() -> None:
    forwarding = Forwarding()
    forwarding.failures = 2
    async with overlays(forwarding) as made:
        made.place(A, "192.0.2.1", 1500)
        made.restored()
        made.told(told(B))
        made.carry(a_table(), NAMESPACE)
        await forwarding.wait_plans(1)
    assert forwarding.failures == 0


async def test_nothing_runs_before_the_first_encrypted_network_and_what_is_dropped_leaves() -> None:
    forwarding = Forwarding()
    async with overlays(forwarding) as made:
        made.place(A, "192.0.2.1", 1500)
        made.restored()
        made.told(told(B))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not forwarding.is_running
        made.carry(a_table(), NAMESPACE)
        await forwarding.wait_plans(1)
        made.carry(a_table(), NAMESPACE)
        made.drop(NetworkId("n1"))
        plan = await forwarding.wait_plans(2)
        made.drop(NetworkId("n1"))
    assert plan.segments == plan.peers == ()


async def test_a_node_that_cannot_encrypt_refuses_and_carries_nothing() -> None:
    forwarding = Forwarding()
    async with overlays(forwarding, Refusal("it cannot")) as made:
        table = a_table()
        reason = "network secure is encrypted, and it cannot; nothing is sent in clear"
        assert made.refusal(table.head) == reason
        assert made.refusal(a_table(encrypted=False).head) == ""
        made.carry(table, NAMESPACE)
        assert made.plan().segments == ()
    assert not forwarding.is_running


async def test_the_mtu_leaves_room_for_what_is_put_around() -> None:
    async with overlays(Forwarding()) as made:
        made.place(A, "192.0.2.1", 9000)
        assert made.mtu == 8904
        made.place(A, "fd00::1", 1500)
        assert made.mtu == 1384
