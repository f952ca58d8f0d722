"""A published port is in force only where a socket of the node holds it, by address family and address."""

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skep.dataplane.ingress.mesh import Mesh
from skep.dataplane.netns.kernel.forwarding import ipv6_nat_refusal
from skep.dataplane.netns.nft_table import NftTable
from skep.dataplane.ports import AddressNotHere
from skep.dataplane.proxy.relays import RelayPort
from skep.errors import AlreadyExists, FailedPrecondition, SkepError, Unavailable
from skep.model.networks.publishing import PublishOptions
from skep.model.networks.tables import (
    NetworkHead,
    NetworkTable,
    Segment,
    TableEndpoint,
    TableNode,
    TablePort,
    TableService,
)
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId
from tests.support.engine.container_networks import NetPorts
from tests.support.engine.oci_rig import QuickClock

NETWORK, WEB = NetworkId("ingress"), ServiceId("web")
HEAD = NetworkHead(
    id=NETWORK,
    name="ingress",
    is_ingress=True,
    segments=(Segment("10.0.0.0/24", "10.0.0.1", 4096), Segment("fd00:1::/64", "fd00:1::1", 4096)),
)
Key = tuple[str, int, str]


class NetProcess(NetPorts):
    """Other programs listen on ``programs``, the node lacks the addresses ``absent``, ``broken`` cannot be bound."""

    def __init__(self) -> None:
        super().__init__()
        self.programs: frozenset[Key] = frozenset()
        self.absent: frozenset[str] = frozenset()
        self.broken: frozenset[Key] = frozenset()
        self.unanswered = 0
        self.reserved: list[Key] = []
        self.in_force: set[Key] = set()

    async def reserve(
        self, protocol: str, port: int, address: str = "", target: tuple[str, int] | None = None
    ) -> int:
        self.reserved.append((protocol, port, address))
        if self.unanswered:
            self.unanswered -= 1
            raise Unavailable("the net process does not answer")
        if address in self.absent:
            raise AddressNotHere("bind: cannot assign requested address")
        if (protocol, port, address) in self.broken:
            raise FailedPrecondition("cannot reserve it: Operation not permitted")
        if any(conflicts((protocol, port, address), program) for program in self.programs):
            raise AlreadyExists(f"Bind for {address}:{port} failed: port is already allocated")
        return await super().reserve(protocol, port, address, target)

    async def release(self, protocol: str, port: int, address: str = "") -> None:
        assert (protocol, port, address) not in self.in_force, "a port in force is not released"
        await super().release(protocol, port, address)


def conflicts(one: Key, other: Key) -> bool:
    """Whether the kernel refuses the second of two sockets, each of which has one address family only."""
    wildcards = ("", "::")
    is_one_family = (":" in one[2]) == (":" in other[2])
    return (
        one[:2] == other[:2]
        and is_one_family
        and (one[2] == other[2] or one[2] in wildcards or other[2] in wildcards)
    )


class Kernel:
    """Checks with each transaction that every element has its socket."""

    home = Path("/none")

    def __init__(self, net: NetProcess) -> None:
        self.net = net
        self.tables: tuple[NftTable, ...] = ()
        self.wanted: tuple[NftTable, ...] = ()

    async def run(self, _path: Path, work: object, *_: object) -> object:
        return "" if work is ipv6_nat_refusal else None

    async def apply(self, *_: object) -> None:
        self.tables = self.wanted
        self.net.in_force = {key for table in self.tables for _, key in sockets_of(table)}
        assert self.net.in_force <= self.net.keys

    def set_part(self, _part: str, _state: object, *tables: NftTable) -> None:
        self.wanted = tables

    def remove_part(self, *_: object) -> None:
        self.wanted = ()


def sockets_of(table: NftTable) -> Iterator[tuple[str, Key]]:
    """Each element that leads or refuses connections, as its set and the socket that has to hold it."""
    any_address = "" if table.name.startswith("ip ") else "::"
    for name, element in table.elements:
        words = element.partition(" : ")[0].split(" . ")
        if name in ("ports", "refused"):
            yield name, (words[0], int(words[1]), any_address)
        elif name in ("bound", "bound_refused"):
            yield name, (words[1], int(words[2]), words[0])


def a_mesh(directory: Path, net: NetProcess) -> tuple[Mesh, Kernel]:
    kernel = cast("Any", Kernel(net))
    mesh = Mesh(
        namespaces=kernel,
        home=kernel,
        reply_routing=cast("Any", Replies()),
        ports=net,
        relays=directory / "relays",
        clock=QuickClock(),
        rng=lambda: 0.5,
    )
    return mesh, kernel


class Replies:
    """Routes of replies are always written."""

    async def apply(self, plan: object) -> None: ...


def a_table(
    ports: Mapping[tuple[str, int], PublishOptions], addresses: tuple[str, ...] | None = None
) -> NetworkTable:
    """One service with these ports and a task with ``addresses``; None: without a task."""
    published = tuple(
        TablePort(
            protocol=protocol,
            published=number,
            target=80,
            options=options if protocol == "tcp" else msgspec.structs.replace(options, proxy_protocol=0),
        )
        for (protocol, number), options in sorted(ports.items())
    )
    task = TableEndpoint(
        task_id=TaskId("t"), node_id=NodeId("n2"), service_id=WEB, addresses=addresses or (), is_serving=True
    )
    return NetworkTable(
        head=HEAD,
        services={WEB: TableService(id=WEB, name="web", ports=published)},
        endpoints={task.task_id: task} if addresses is not None else {},
    )


async def publish(mesh: Mesh, table: NetworkTable) -> None:
    await mesh.apply(NodeId("n1"), {NETWORK: table}, frozenset({NETWORK}))


def relays(directory: Path) -> set[Key]:
    """The sockets on which the net process relays."""
    file = directory / "relays"
    found = msgspec.json.decode(file.read_bytes(), type=tuple[RelayPort, ...]) if file.exists() else ()
    return {(one.protocol, one.port, "" if one.address == "0.0.0.0" else one.address) for one in found}


ADDRESSES = ("127.0.0.1", "192.0.2.9", "::1", "2001:db8::9")
hosts = st.sampled_from(("", "0.0.0.0", "::", *ADDRESSES))
protocols, numbers = st.sampled_from(("tcp", "udp", "sctp")), st.sampled_from((22, 80))
keys = st.tuples(protocols, numbers, st.sampled_from(("", "::", *ADDRESSES)))
options = st.builds(
    PublishOptions,
    host_ip=hosts,
    is_sticky=st.booleans(),
    proxy_protocol=st.sampled_from((0, 0, 1)),
)
tables = st.builds(
    a_table,
    st.dictionaries(st.tuples(protocols, numbers), options, max_size=4),
    st.sampled_from((None, ("10.0.0.9",), ("10.0.0.9", "fd00:1::9"), ("fd00:1::9",))),
)
machines = st.fixed_dictionaries(
    {
        "programs": st.frozensets(keys, max_size=3),
        "absent": st.frozensets(st.sampled_from(ADDRESSES), max_size=3),
        "broken": st.frozensets(keys, max_size=2),
        "unanswered": st.sampled_from((0, 0, 0, 1)),
    }
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(life=st.lists(st.tuples(tables, machines), min_size=1, max_size=4))
def test_what_is_led_refused_or_relayed_is_held_whatever_others_have(
    tmp_path: Path, life: list[tuple[NetworkTable, dict[str, Any]]]
) -> None:
    async def run() -> None:
        net = NetProcess()
        mesh, kernel = a_mesh(tmp_path, net)
        for table, machine in life:
            net.programs = frozenset(
                one for one in machine["programs"] if not any(conflicts(one, held) for held in net.keys)
            )
            net.absent, net.broken = machine["absent"], machine["broken"]
            net.unanswered = machine["unanswered"]
            try:
                await publish(mesh, table)
            except SkepError:
                net.unanswered = 0
                await publish(mesh, table)
            assert relays(tmp_path) <= net.keys
            assert_in_force_where_held(table, net.keys, kernel, relays(tmp_path))

    (tmp_path / "relays").unlink(missing_ok=True)
    asyncio.run(run())


def assert_in_force_where_held(
    table: NetworkTable, held: set[Key], kernel: Kernel, relayed: set[Key]
) -> None:
    """Each held port is led to a task, relayed or refused; nothing is held that no service publishes."""
    acts = {key for one in kernel.tables for _, key in sockets_of(one)} | relayed
    refused = {key for one in kernel.tables for name, key in sockets_of(one) if "refused" in name}
    for key in held:
        port = next(one for one in table.services[WEB].ports if (one.protocol, one.published) == key[:2])
        addresses = [address for one in table.endpoints.values() for address in one.addresses]
        has_way = any((":" in address) == (":" in key[2]) for address in addresses)
        assert key in acts or (table.endpoints and not has_way), f"{port} is held for nothing"
        if not table.endpoints:
            assert key in refused


@pytest.mark.parametrize("options", [PublishOptions(proxy_protocol=1), PublishOptions(host_ip="::")])
@pytest.mark.parametrize("addresses", [None, ("10.0.0.9", "fd00:1::9")])
async def test_a_port_of_a_program_of_the_machine_stays_the_programs(
    tmp_path: Path, options: PublishOptions, addresses: tuple[str, ...] | None
) -> None:
    net = NetProcess()
    net.programs = frozenset({("tcp", 22, ""), ("tcp", 22, "::")})
    mesh, kernel = a_mesh(tmp_path, net)
    await publish(mesh, a_table({("tcp", 22): options}, addresses))
    assert not any(table.elements for table in kernel.tables)
    assert not relays(tmp_path)
    assert any(
        one.startswith("port 22/tcp is not published on this node: Bind for ") for one in mesh.warnings()
    )


@pytest.mark.parametrize("address", ["", "::"])
async def test_a_program_that_listens_by_one_address_family_keeps_the_port_for_both(
    tmp_path: Path, address: str
) -> None:
    """Or clients of ``localhost`` would reach the program or a task, by chance."""
    net = NetProcess()
    net.programs = frozenset({("tcp", 80, address)})
    mesh, _ = a_mesh(tmp_path, net)
    table = a_table({("tcp", 80): PublishOptions()}, ("10.0.0.9", "fd00:1::9"))
    await publish(mesh, table)
    assert (net.in_force, net.keys, relays(tmp_path)) == (set(), set(), set())
    assert mesh.warnings() == (
        f"port 80/tcp is not published on this node: Bind for {address}:80 failed: port is already allocated",
    )
    net.programs = frozenset()
    await publish(mesh, table)
    assert net.in_force == {("tcp", 80, ""), ("tcp", 80, "::")}
    assert not mesh.warnings()


async def test_a_retry_leaves_the_family_alone_that_the_program_does_not_use(tmp_path: Path) -> None:
    """The program may bind it at that moment."""
    net = NetProcess()
    net.programs = frozenset({("tcp", 80, "::")})
    mesh, _ = a_mesh(tmp_path, net)
    for attempt in range(3):
        net.reserved.clear()
        await publish(mesh, a_table({("tcp", 80): PublishOptions()}))
        assert (("tcp", 80, "") in net.reserved) == (attempt == 0)


async def test_a_port_that_the_net_process_lost_in_a_crash_is_withdrawn(tmp_path: Path) -> None:
    net = NetProcess()
    mesh, _ = a_mesh(tmp_path, net)
    await publish(mesh, a_table({("tcp", 80): PublishOptions(), ("tcp", 443): PublishOptions()}))
    net.keys -= {("tcp", 80, ""), ("tcp", 80, "::")}
    net.programs = frozenset({("tcp", 80, "")})
    running = asyncio.create_task(mesh.run())
    async with asyncio.timeout(20):
        while not mesh.warnings():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        while ("tcp", 80, "") in net.in_force:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.wait([running])
    assert net.in_force == {("tcp", 443, ""), ("tcp", 443, "::")}


async def test_a_machine_without_ipv6_publishes_by_ipv4_without_a_warning(tmp_path: Path) -> None:
    net = NetProcess()
    net.absent = frozenset({"::"})
    mesh, _ = a_mesh(tmp_path, net)
    await publish(mesh, a_table({("tcp", 80): PublishOptions()}, ("10.0.0.9",)))
    assert net.in_force == {("tcp", 80, "")}
    assert not mesh.warnings()


@pytest.mark.parametrize("is_first", [True, False])
async def test_a_new_ingress_network_is_published_while_a_task_is_left_on_the_removed_one(
    tmp_path: Path, is_first: bool
) -> None:
    mesh, _ = a_mesh(tmp_path, NetProcess())
    removed = a_table({("tcp", 80): PublishOptions()}, ("10.0.0.9",))
    present = a_table({("tcp", 81): PublishOptions()}, ("10.9.0.9",))
    nodes = {
        NodeId(f"n{number}"): TableNode(
            id=NodeId(f"n{number}"), underlay=f"192.0.2.{number}", addresses=(f"10.9.0.{number}",)
        )
        for number in (1, 2)
    }
    head = msgspec.structs.replace(HEAD, id=NetworkId("new"), segments=(Segment("10.9.0.0/24", "", 4097),))
    both = [removed, msgspec.structs.replace(present, head=head, nodes=nodes)]
    tables = {one.head.id: one for one in (both if is_first else reversed(both))}
    await mesh.apply(NodeId("n1"), tables, frozenset(tables))
    assert mesh.published == {("tcp", 81)}
