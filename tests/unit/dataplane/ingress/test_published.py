"""Ports that the routing mesh has on its node."""

import asyncio
import os
import resource
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from socket import IPPROTO_TCP
from typing import Any, cast

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.dataplane.ingress.mesh import Mesh
from skep.dataplane.netns.kernel import nft
from skep.dataplane.netns.kernel.forwarding import ipv6_nat_refusal, ipv6_refusal
from skep.dataplane.netns.nft_table import NftTable
from skep.dataplane.plan.flows import StalePort
from skep.dataplane.ports import PortReservations
from skep.dataplane.stale_flows import delete_flows
from skep.errors import AlreadyExists, FailedPrecondition, SkepError, Unavailable
from skep.model.networks.tables import NetworkHead, NetworkTable, TableEndpoint, TablePort, TableService
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId
from tests.support.engine.container_networks import NetPorts
from tests.support.engine.oci_rig import QuickClock

NETWORK, SERVICE = NetworkId("ingress"), ServiceId("web")


def ports_table(*ports: tuple[str, int]) -> NetworkTable:
    """The ingress network's, with a service that publishes these."""
    published = tuple(TablePort(protocol=protocol, published=port, target=80) for protocol, port in ports)
    return NetworkTable(
        head=NetworkHead(id=NETWORK, name="ingress", is_ingress=True),
        services={SERVICE: TableService(id=SERVICE, name="web", ports=published)},
    )


TABLE = ports_table(("tcp", 80), ("udp", 53), ("tcp", 22))


class Ports(PortReservations):
    """Port 22 is another program's; an earlier process holds 443."""

    async def reserve(
        self, protocol: str, port: int, address: str = "", target: tuple[str, int] | None = None
    ) -> int:
        if port == 22:
            raise AlreadyExists("port is already allocated")
        return port

    async def release(self, protocol: str, port: int, address: str = "") -> None:
        pass

    async def list_held(self) -> Iterable[tuple[str, int, str]]:
        return [("tcp", 443, "")]


class NoKernel:
    """Routes of replies cannot be written."""

    async def apply(self, plan: object) -> None:
        raise Unavailable("no kernel")


async def test_ports_that_are_held_are_the_meshs_whatever_fails_later(tmp_path: Path) -> None:
    mesh = Mesh(
        namespaces=cast("Any", None),
        home=cast("Any", None),
        reply_routing=cast("Any", NoKernel()),
        ports=Ports(),
        relays=tmp_path / "relays.json",
        clock=SystemClock(),
        rng=lambda: 0.5,
    )
    assert mesh.published == frozenset()
    with pytest.raises(SkepError, match="no kernel"):
        await mesh.apply(NodeId("n1"), {NETWORK: TABLE}, frozenset({NETWORK}))
    assert mesh.published == {("tcp", 80), ("udp", 53), ("tcp", 443)}


class RefusedPorts(NetPorts):
    """Port 22 and SCTP cannot be held."""

    async def reserve(
        self, protocol: str, port: int, address: str = "", target: tuple[str, int] | None = None
    ) -> int:
        if port == 22 or protocol == "sctp":
            raise FailedPrecondition("cannot reserve it: Operation not permitted")
        return await super().reserve(protocol, port, address, target)


class UnansweredPorts(NetPorts):
    """Requests in ``unanswered`` are carried out without an answer; those in ``late`` only after the next listing."""

    def __init__(self) -> None:
        super().__init__()
        self.unanswered: list[str] = []
        self.late: list[str] = []
        self._after_listing: set[tuple[str, int, str]] = set()

    async def reserve(
        self, protocol: str, port: int, address: str = "", target: tuple[str, int] | None = None
    ) -> int:
        if "reserve" in self.late:
            self.late.remove("reserve")
            self._after_listing.add((protocol, port, address))
            raise Unavailable("the net process does not answer")
        await super().reserve(protocol, port, address, target)
        return self._answered("reserve", port)

    async def release(self, protocol: str, port: int, address: str = "") -> None:
        await super().release(protocol, port, address)
        self._answered("release", port)

    async def list_held(self) -> Iterable[tuple[str, int, str]]:
        found = await super().list_held()
        self.keys |= self._after_listing
        self._after_listing.clear()
        if "list" in self.unanswered:
            self._answered("list", 0)
        return found

    def _answered(self, request: str, port: int) -> int:
        if request in self.unanswered:
            self.unanswered.remove(request)
            raise Unavailable("the net process does not answer")
        return port


class Kernel:
    """Everything works, but translation of IPv6 addresses if there is a ``refusal``."""

    home = Path("/none")

    def __init__(self, refusal: str = "") -> None:
        self.tables: list[str] = []
        self.refusal = refusal
        self.deleted: tuple[StalePort, ...] = ()
        self.has_deleted = asyncio.Event()

    async def run(self, _path: Path, work: object, *given: Any) -> object:
        if work is delete_flows:
            self.deleted = given[0]
            self.has_deleted.set()
        return self.refusal if work is ipv6_nat_refusal else None

    async def apply(self, *_: object) -> None: ...

    def set_part(self, _part: str, _state: object, *tables: NftTable) -> None:
        self.tables = [table.name for table in tables]

    def remove_part(self, *_: object) -> None: ...


HTTP, HTTP_IPV6 = ("tcp", 80, ""), ("tcp", 80, "::")
ONE_PORT = ports_table(HTTP[:2])


def a_mesh(directory: Path, ports: PortReservations, kernel: Kernel | None = None) -> Mesh:
    works = cast("Any", kernel or Kernel())
    return Mesh(
        namespaces=works,
        home=works,
        reply_routing=works,
        ports=ports,
        relays=directory / "relays",
        clock=QuickClock(),
        rng=lambda: 0.5,
    )


async def publish(mesh: Mesh, *tables: NetworkTable) -> None:
    await mesh.apply(NodeId("n1"), {one.head.id: one for one in tables}, frozenset({NETWORK}))


@pytest.mark.parametrize("refusal", ["", "no address translation for IPv6: No such file or directory"])
async def test_a_kernel_without_ipv6_nat_publishes_by_ipv4(tmp_path: Path, refusal: str) -> None:
    kernel = Kernel(refusal)
    await publish(a_mesh(tmp_path, Ports(), kernel), TABLE)
    assert kernel.tables == ["ip skep_ingress"] + ["ip6 skep_ingress"] * (not refusal)


async def test_a_kernel_that_gets_ipv6_nat_later_is_given_the_rules_with_the_next_change(
    tmp_path: Path,
) -> None:
    kernel = Kernel("no address translation for IPv6: No such file or directory")
    mesh = a_mesh(tmp_path, Ports(), kernel)
    await publish(mesh, TABLE)
    kernel.refusal = ""
    await publish(mesh, ONE_PORT)
    assert kernel.tables == ["ip skep_ingress", "ip6 skep_ingress"]


def test_a_want_of_descriptors_is_no_refusal_of_the_kernels() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):  # libraries that use select(2) take no number above 1023
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(nft.NftUnavailable, match="too many open files"):
            ipv6_nat_refusal()
        assert ipv6_refusal()


async def test_connections_to_a_backend_that_was_removed_are_sent_to_another_if_it_has_not_accepted_them(
    tmp_path: Path,
) -> None:
    """Otherwise a lost node keeps the client's address and port for two minutes."""
    kernel = Kernel()
    mesh = a_mesh(tmp_path, Ports(), kernel)
    both = {
        TaskId(name): TableEndpoint(
            task_id=TaskId(name),
            node_id=NodeId(name),
            service_id=SERVICE,
            addresses=(address,),
            is_serving=True,
        )
        for name, address in (("t1", "10.0.0.1"), ("t2", "10.0.0.2"))
    }
    with_both = replace(ONE_PORT, endpoints=both)
    await publish(mesh, with_both)
    running = asyncio.create_task(mesh.run())
    try:
        await publish(mesh, replace(with_both, endpoints={TaskId("t1"): both[TaskId("t1")]}))
        async with asyncio.timeout(10):
            await kernel.has_deleted.wait()
    finally:
        running.cancel()
        await asyncio.wait([running])
    (port,) = kernel.deleted
    assert (port.port, port.protocol, port.backends) == (80, IPPROTO_TCP, frozenset({("10.0.0.1", 80)}))


async def test_a_port_that_cannot_be_held_keeps_no_other_from_being_published(tmp_path: Path) -> None:
    mesh = a_mesh(tmp_path, RefusedPorts())
    await publish(mesh, ports_table(("tcp", 22), ("tcp", 80), ("sctp", 90)))
    assert mesh.published == {("tcp", 80)}
    reason = "cannot reserve it: Operation not permitted"
    assert mesh.warnings() == (
        f"port 90/sctp is not published on this node: {reason}",
        f"port 22/tcp is not published on this node: {reason}",
    )


async def test_a_port_whose_reservation_was_not_answered_is_published_with_the_next_attempt(
    tmp_path: Path,
) -> None:
    ports = UnansweredPorts()
    ports.unanswered.append("reserve")
    mesh = a_mesh(tmp_path, ports)
    with pytest.raises(SkepError, match="does not answer"):
        await publish(mesh, ONE_PORT)
    assert ports.keys == {HTTP}
    await publish(mesh, ONE_PORT)
    assert (mesh.conflicts, mesh.published) == ({}, {HTTP[:2]})
    await publish(mesh)
    assert ports.keys == set()


async def test_a_port_whose_reservation_was_not_answered_and_is_not_wanted_any_more_is_released(
    tmp_path: Path,
) -> None:
    ports = UnansweredPorts()
    ports.unanswered.append("reserve")
    mesh = a_mesh(tmp_path, ports)
    with pytest.raises(SkepError, match="does not answer"):
        await publish(mesh, ONE_PORT)
    await publish(mesh)
    assert ports.keys == set()


async def test_a_port_that_is_reserved_later_than_it_was_asked_for_is_no_other_programs_for_long(
    tmp_path: Path,
) -> None:
    ports = UnansweredPorts()
    ports.late.append("reserve")
    mesh = a_mesh(tmp_path, ports)
    with pytest.raises(SkepError, match="does not answer"):
        await publish(mesh, ONE_PORT)
    await publish(mesh, ONE_PORT)
    assert mesh.conflicts.keys() == {HTTP}
    await publish(mesh, ONE_PORT)
    assert (mesh.conflicts, mesh.published) == ({}, {HTTP[:2]})


async def test_a_port_whose_release_was_not_answered_is_held_again_when_it_is_published_again(
    tmp_path: Path,
) -> None:
    ports = UnansweredPorts()
    mesh = a_mesh(tmp_path, ports)
    await publish(mesh, ONE_PORT)
    ports.unanswered.append("release")
    with pytest.raises(SkepError, match="does not answer"):
        await publish(mesh)
    await publish(mesh, ONE_PORT)
    assert ports.keys == {HTTP, HTTP_IPV6}


async def test_what_an_earlier_process_published_is_cleared_once_the_net_process_answers(
    tmp_path: Path,
) -> None:
    ports = UnansweredPorts()
    ports.keys.add(HTTP)
    ports.unanswered.append("list")
    mesh = a_mesh(tmp_path, ports)
    await mesh.apply_nothing()
    running = asyncio.create_task(mesh.run())
    async with asyncio.timeout(20):
        while ports.keys:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.wait([running])
