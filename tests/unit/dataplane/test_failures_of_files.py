"""Whichever call on a file of the data plane fails: the error is named, and nothing false is served."""

import asyncio
import errno
import os
import socket
from contextlib import suppress
from ipaddress import IPv4Network
from pathlib import Path
from random import Random
from typing import Any, cast

import msgspec
import pytest
from structlog.testing import capture_logs

from skep.aio.failures import retry
from skep.api.formats.networks import SubnetBody
from skep.dataplane.dns.networks import NetworkFiles
from skep.dataplane.gateway import stored_subnet
from skep.dataplane.ingress.mesh import Mesh
from skep.dataplane.local.endpoints import LocalEndpoints
from skep.dataplane.local.objects import LocalNetwork
from skep.dataplane.net_process.protocol import Named, Reservation, SocketLabel
from skep.dataplane.net_process.served_container import ContainerRecord, namespace_at
from skep.dataplane.net_process.served_containers import ServedContainers
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.ports import Reservations, bind, reopened
from skep.dataplane.probe.measurements import Measurements
from skep.dataplane.probe.prober import PathProber, SavedState, load_state, save_state
from skep.dataplane.proxy.relay import ConnectionRelays
from skep.dataplane.proxy.relays import RelayPort
from skep.errors import SkepError, Unavailable
from skep.linux.mounting import mount_targets
from skep.model.networks.paths import PathPeer, ProbeTargets
from skep.model.networks.publishing import PublishOptions
from skep.model.networks.sandbox import EndpointRequest, SandboxConfig
from skep.model.networks.tables import (
    NetworkHead,
    NetworkTable,
    Segment,
    TableEndpoint,
    TablePort,
    TableService,
)
from skep.model.values.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId
from skep.model.values.times import Timestamp
from skep.paths import Paths
from tests.support.engine.oci_rig import QuickClock
from tests.support.file_faults import Faults, file_faults, walk

NETWORK = LocalNetwork(
    id="a" * 64,
    name="net",
    driver="bridge",
    created_at=Timestamp(""),
    configs=(SubnetBody(subnet="10.5.0.0/24", gateway="10.5.0.1"),),
)


REAL_OPEN, REAL_WRITE = os.open, os.write
"""They do not count, and do not fail."""
NET = NetworkId("net1")
STATE = SavedState(
    ProbeTargets(node=PathPeer(node_id=NodeId("n1"), hostname="m", data_path="192.0.2.1"), peers=()),
    Measurements({NodeId("n2"): 1400}),
)


class OneNetwork:
    """In the place of ``LocalNetworks``."""

    def all(self) -> list[LocalNetwork]:
        return [NETWORK]

    bridges = all


def names_in(path: Path) -> set[str]:
    try:
        table = msgspec.msgpack.decode(path.read_bytes(), type=NetworkTable)
    except FileNotFoundError:
        return set()
    return {endpoint.name for endpoint in table.endpoints.values()}


def a_container(name: str) -> SandboxConfig:
    return SandboxConfig(id=ContainerId(name * 64), name=name)


async def test_names_on_a_nodes_own_network_are_those_of_its_containers(tmp_path: Path) -> None:
    async def life(place: Path, faults: Faults) -> None:
        endpoints = LocalEndpoints(cast("Any", OneNetwork()), place / "tables", None)
        request = EndpointRequest(network=NETWORK.id)
        taken, left = {}, set[str]()
        for name in ("b", "c"):
            with suppress(SkepError, OSError):
                taken[name] = await endpoints.take(a_container(name), NETWORK, request)
        for name in [name for name in ("b",) if name in taken]:
            while True:  # as it is freed: again, until it has been
                try:
                    await endpoints.give_back(ContainerId(name * 64), taken[name])
                    break
                except (SkepError, OSError):
                    faults.end()
            left.add(name)
        faults.end()
        taken["d"] = await endpoints.take(a_container("d"), NETWORK, request)
        assert names_in(place / "tables" / NETWORK.id) == taken.keys() - left
        addresses = [taken[name].addresses for name in taken if name not in left]
        assert len(set(addresses)) == len(addresses)

    assert await walk(tmp_path, life) > 8


async def test_names_of_the_last_container_go_with_it(tmp_path: Path) -> None:
    async def life(place: Path, faults: Faults) -> None:
        endpoints = LocalEndpoints(cast("Any", OneNetwork()), place / "tables", None)
        with suppress(SkepError, OSError):
            taken = await endpoints.take(a_container("b"), NETWORK, EndpointRequest(network=NETWORK.id))
            while True:
                try:
                    await endpoints.give_back(ContainerId("b" * 64), taken)
                    break
                except (SkepError, OSError):
                    faults.end()
        faults.end()
        assert names_in(place / "tables" / NETWORK.id) == set()

    assert await walk(tmp_path, life) > 4


async def test_ports_that_a_process_holds_are_held_by_the_next_one_too(tmp_path: Path) -> None:
    async def life(place: Path, faults: Faults) -> None:
        first = Reservations(place / "ports", {})
        with suppress(SkepError, OSError):
            first.reserve("udp", 0, "before")
        ports = {}
        for token in ("one", "two"):
            with suppress(SkepError, OSError):
                ports[token] = first.reserve("udp", 0, token)
                if token == "one":
                    first.release("udp", ports["one"])
        faults.end()
        if "two" not in ports:
            ports["two"] = first.reserve("udp", 0, "two")
        assert ports["two"] in {one.port for one in first.list()}
        held = {one.port for one in first.list()}
        for opened in first.sockets():
            opened.close()
        assert {one.port for one in reopened(place / "ports")} >= held, "a port was held that no file has"

    before = len(os.listdir("/proc/self/fd"))
    assert await walk(tmp_path, life) > 10
    assert len(os.listdir("/proc/self/fd")) <= before + 1000


async def test_a_process_that_cannot_read_which_ports_it_held_does_not_take_them_for_none(
    tmp_path: Path,
) -> None:
    (tmp_path / "template").mkdir()
    first = Reservations(tmp_path / "template" / "ports", {})
    port = first.reserve("udp", 0, "one")
    for opened in first.sockets():
        opened.close()

    async def life(place: Path, faults: Faults) -> None:
        held: Any = None
        with suppress(OSError):
            held = reopened(place / "ports")
        assert held is None or {one.port for one in held} == {port}
        for opened in (held or {}).values():
            opened.close()

    assert await walk(tmp_path / "lives", life, template=tmp_path / "template") >= 1


def test_a_damaged_list_of_held_ports_is_kept_aside(tmp_path: Path) -> None:
    (tmp_path / "ports").write_bytes(b"[")
    assert reopened(tmp_path / "ports") == {}
    assert (tmp_path / "ports.damaged").read_bytes() == b"["


async def test_the_gateways_subnet_stays_or_is_not_used(tmp_path: Path) -> None:
    kept, other = IPv4Network("172.19.0.0/16"), IPv4Network("172.20.0.0/16")

    async def life(place: Path, faults: Faults) -> None:
        with suppress(OSError):
            assert stored_subnet(place / "kept", [], IPv4Network, lambda: other) == kept
        new = None
        with suppress(OSError):
            new = stored_subnet(place / "run/new", [], IPv4Network, lambda: other)
        faults.end()
        assert stored_subnet(place / "kept", [], IPv4Network, lambda: other) == kept
        again = stored_subnet(place / "run/new", [], IPv4Network, lambda: kept)
        assert new in (None, again)

    (tmp_path / "template").mkdir()
    (tmp_path / "template/kept").write_text(f"{kept}\n")
    assert await walk(tmp_path / "lives", life, template=tmp_path / "template") > 4


async def test_relays_follow_their_plan(tmp_path: Path) -> None:
    async def life(place: Path, faults: Faults) -> None:
        plan = place / "relays/plan"
        relays = ConnectionRelays(
            plan, QuickClock(), Random(1).random, lambda: [(Reservation("tcp", 0, "", host), own)]
        )
        running = asyncio.create_task(retry(relays.run, "relays of ports failed", clock=QuickClock()))
        try:
            while not (relays.open_relays or faults.hits):  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(0)
            faults.end()
            while not relays.open_relays:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        finally:
            running.cancel()
            await asyncio.wait([running])

    host = "127.0.0.1"
    (tmp_path / "template/relays").mkdir(parents=True)
    (tmp_path / "template/relays/plan").write_bytes(msgspec.json.encode((port(0),)))
    with bind("tcp", 0, host) as own:
        assert await walk(tmp_path / "lives", life, template=tmp_path / "template") >= 3


async def test_relayed_ports_are_those_before_or_those_now(tmp_path: Path) -> None:
    async def life(place: Path, faults: Faults) -> None:
        plan = place / "relays/plan"
        mesh = Mesh(
            namespaces=cast("Any", Kernel()),
            home=cast("Any", Kernel()),
            reply_routing=cast("Any", Kernel()),
            ports=cast("Any", FreePorts()),
            relays=plan,
            clock=QuickClock(),
            rng=Random(1).random,
        )
        for port in (81, 82):
            with suppress(SkepError):
                await mesh.apply(NodeId("n1"), {NET: published(port)}, frozenset({NET}))
        faults.end()
        assert relayed(plan) <= {81, 82}
        await mesh.apply(NodeId("n1"), {NET: published(82)}, frozenset({NET}))
        assert relayed(plan) == {82}

    def relayed(plan: Path) -> set[int]:
        if not plan.exists():
            return set()
        return {one.port for one in msgspec.json.decode(plan.read_bytes(), type=tuple[RelayPort, ...])}

    assert await walk(tmp_path, life) > 4


def published(port: int) -> NetworkTable:
    """Relayed: it has no backends at this node, and speaks the proxy protocol."""
    service = TableService(
        id=ServiceId("web"),
        name="web",
        ports=(
            TablePort(protocol="tcp", published=port, target=80, options=PublishOptions(proxy_protocol=2)),
        ),
    )
    return NetworkTable(
        head=NetworkHead(id=NET, name="ingress", is_ingress=True), services={ServiceId("web"): service}
    )


class Kernel:
    """Everything about the kernel works."""

    home = Path("/none")

    async def run(self, *_: Any) -> None: ...

    async def apply(self, *_: Any) -> None: ...

    def set_part(self, *_: Any) -> None: ...

    def remove_part(self, *_: Any) -> None: ...


class FreePorts:
    async def list_held(self) -> tuple[()]:
        return ()

    async def reserve(self, *_: Any) -> int:
        return 0

    async def release(self, *_: Any) -> None: ...


async def test_measurements_of_an_earlier_process_are_used_as_soon_as_they_can_be_read(
    tmp_path: Path,
) -> None:
    async def life(place: Path, faults: Faults) -> None:
        path = DataPathOfNone()
        prober = PathProber(
            cast("Any", path),
            cast("Any", None),
            place / "paths",
            Kernel().apply,
            QuickClock(),
            Random(1).random,
        )
        await prober.restore()
        running = asyncio.create_task(prober.run())
        while path.measured != STATE.measured or path.targets != STATE.targets:  # noqa: ASYNC110
            await asyncio.sleep(0)
        faults.end()
        running.cancel()
        await asyncio.wait([running])
        assert load_state(place / "paths") == STATE

    (tmp_path / "template").mkdir()
    save_state(tmp_path / "template/paths", STATE)
    assert await walk(tmp_path / "lives", life, template=tmp_path / "template") >= 1


class DataPathOfNone:
    """Nothing is sent."""

    failure = ""
    offload = None

    def __init__(self) -> None:
        self.measured = Measurements()
        self.targets: ProbeTargets | None = None

    async def apply(self, targets: ProbeTargets | None) -> str:
        self.targets = targets
        return ""

    def close(self) -> None: ...


async def test_a_table_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    def write(directory: Path, *names: str) -> None:
        endpoints = {
            TaskId(name): TableEndpoint(
                task_id=TaskId(name),
                node_id=NodeId("n1"),
                name=name,
                addresses=("10.5.0.9",),
                is_running=True,
                is_serving=True,
            )
            for name in names
        }
        head = NetworkHead(id=NET, name="net", segments=(Segment("10.5.0.0/24", "10.5.0.1", 4097),))
        (directory / NET).write_bytes(msgspec.msgpack.encode(NetworkTable(head=head, endpoints=endpoints)))

    def known(networks: NetworkFiles) -> set[str]:
        return {name for name in ("old", "new") if networks.index(NET).find(name) is not None}

    async def life(place: Path, faults: Faults) -> None:
        networks = NetworkFiles(place)
        before = known(networks)
        real_write(place)
        networks.refresh([NET])
        is_unread = bool(networks.unread)
        faults.end()
        if is_unread:
            assert known(networks) == before, "the earlier one stays in use"
            networks.refresh([NET])
        assert known(networks) == {"new"}
        assert not networks.unread

    write(tmp_path, "new")
    new = (tmp_path / NET).read_bytes()

    def real_write(place: Path) -> None:
        descriptor = REAL_OPEN(place / NET, os.O_WRONLY | os.O_TRUNC)
        REAL_WRITE(descriptor, new)
        os.close(descriptor)

    (tmp_path / "template").mkdir()
    write(tmp_path / "template", "old")
    assert await walk(tmp_path / "lives", life, template=tmp_path / "template") >= 2


async def test_a_table_that_cannot_be_read_fails_no_change_of_another_network(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "data", tmp_path / "run")
    paths.tables.mkdir(parents=True)
    other = NetworkId("net2")
    for id in (NET, other):
        (paths.tables / id).write_bytes(
            msgspec.msgpack.encode(NetworkTable(head=NetworkHead(id=id, name=id)))
        )
    serving = ServedContainers(
        paths,
        cast("Namespaces", None),
        clock=QuickClock(),
        rng=lambda: 0.5,
        new_id=lambda: 1,
        start_task=asyncio.ensure_future,  # type: ignore[arg-type]
    )
    for id in (NET, other):
        serving._networks.index(id)
    with file_faults(paths.tables / NET) as faults, capture_logs():
        faults.plan(0, errno.EIO, 100)
        with pytest.raises(Unavailable, match="tables of 1 networks cannot be read"):
            await serving.refresh([NET])
        await serving.refresh([other])
        faults.end()
        await serving.refresh([other])
    assert not serving._networks.unread, "it was read with the other one"


async def test_the_backends_of_a_table_that_is_readable_again_are_changed_ones(tmp_path: Path) -> None:
    service = TableService(id=ServiceId("web"), name="web", virtual_ips=("10.5.0.2",))
    table = NetworkTable(head=NetworkHead(id=NET, name="net"), services={service.id: service})
    (tmp_path / NET).write_bytes(msgspec.msgpack.encode(table))
    networks = NetworkFiles(tmp_path)
    with file_faults(tmp_path) as faults, capture_logs():
        faults.plan(0, errno.EMFILE, 100)
        assert not networks.backends(NET)
        assert not networks.refresh([NET])
        faults.end()
        assert networks.refresh([]) == {(NET, service.id)}
    assert networks.backends(NET) == {service.id: {"10.5.0.2": ()}}


def port(number: int) -> RelayPort:
    return RelayPort(protocol="tcp", address="127.0.0.1", port=number, backends=())


@pytest.mark.needs("root")
async def test_a_namespace_that_could_not_be_made_leaves_no_pin(tmp_path: Path) -> None:
    async def life(place: Path, faults: Faults) -> None:
        spaces = Namespaces(place / "netns")
        try:
            with suppress(OSError):
                await spaces.create("one", {})
                with suppress(OSError):
                    await spaces.destroy("one")
            faults.end()
            if spaces.pinned():
                await spaces.destroy("one")
            assert spaces.pinned() == []
            await spaces.create("one", {})
            await spaces.destroy("one")
        finally:
            spaces.close()

    before = len(os.listdir("/proc/self/fd"))
    assert await walk(tmp_path, life) > 4
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.needs("root")
async def test_a_setting_that_the_kernel_refuses_leaves_no_namespace(tmp_path: Path) -> None:
    spaces = Namespaces(tmp_path / "netns")
    with pytest.raises(OSError, match="Invalid argument"):
        await spaces.create("one", {"net/ipv4/ip_forward": "not a number"})
    assert spaces.pinned() == []
    assert not [point for point in mount_targets() if point.startswith(str(tmp_path))]
    spaces.close()


# --- the net process takes over ------------------------------------------------------------------------------------


class StuckNamespaces:
    """Nothing is done in a namespace."""

    writer = "skep-1"

    async def run(self, *_: Any) -> Any:
        await asyncio.Event().wait()


async def test_a_record_that_cannot_be_read_keeps_no_other_container_from_its_names(tmp_path: Path) -> None:
    template, ids = tmp_path / "template", {"c1", "c2"}
    (template / "run/names").mkdir(parents=True)
    for id in ids:
        named = Named(id=id, netns=str(tmp_path / "template"), networks=())
        record = ContainerRecord(named, namespace=namespace_at(template))
        (template / "run/names" / id).write_bytes(msgspec.msgpack.encode(record))
    (template / "run/names/c3.new").write_bytes(b"half")
    (template / "run/names/c4").write_bytes(b"\x00")

    async def life(place: Path, faults: Faults) -> None:
        async with asyncio.TaskGroup() as group:
            tasks: list[asyncio.Task[None]] = []

            def start(work: Any) -> asyncio.Task[None]:
                tasks.append(group.create_task(work))
                return tasks[-1]

            serving = ServedContainers(
                Paths(place / "data", place / "run"),
                cast("Any", StuckNamespaces()),
                clock=QuickClock(),
                rng=Random(1).random,
                new_id=lambda: 1,
                start_task=start,
            )
            given = {SocketLabel(id, kind): bound(kind) for id in ids for kind in ("udp", "tcp")}
            serving.take_over(given, ())
            read = any(f"names/{id}" in hit for hit in faults.hits for id in ids)
            assert len(serving.list()) >= (1 if read else 0 if faults.hits else 2)
            assert serving.sockets() == given, "what was handed over is kept, and handed over again"
            faults.end()
            while {one.id for one in serving.list()} != ids:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            assert serving.sockets() == given
            serving.close()
            for task in tasks:
                task.cancel()

    def bound(kind: str) -> socket.socket:
        opened = socket.socket(type=socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
        opened.bind(("127.0.0.1", 0))
        if kind == "tcp":
            opened.listen()
        opened.setblocking(False)
        return opened

    assert await walk(tmp_path / "lives", life, template=template) > 5


def test_a_namespace_that_cannot_be_looked_at_is_not_taken_for_gone(tmp_path: Path) -> None:
    assert namespace_at(tmp_path / "none") == (0, 0)
    with file_faults(tmp_path) as faults:
        faults.plan(0, errno.ENOMEM)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            namespace_at(tmp_path)


# --- keys of encrypted networks -----------------------------------------------------------------------------------
