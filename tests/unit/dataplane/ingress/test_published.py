"""Ports that the routing mesh has on its node."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest

from skep.aio.clock import SystemClock
from skep.dataplane.ingress.mesh import Mesh
from skep.dataplane.netns.forwarding import ipv6_nat_refusal
from skep.dataplane.netns.nft_table import NftTable
from skep.dataplane.ports import PortReservations
from skep.errors import AlreadyExists, SkepError, Unavailable
from skep.model.ids import NetworkId, NodeId, ServiceId
from skep.model.tables import NetworkHead, Table, TablePort, TableService

NETWORK, SERVICE = NetworkId("ingress"), ServiceId("web")
TABLE = Table(
    head=NetworkHead(id=NETWORK, name="ingress", is_ingress=True),
    services={
        SERVICE: TableService(
            id=SERVICE,
            name="web",
            ports=tuple(
                TablePort(protocol=protocol, published=port, target=80)
                for protocol, port in (("tcp", 80), ("udp", 53), ("tcp", 22))
            ),
        )
    },
)


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

    async def held(self) -> Iterable[tuple[str, int, str]]:
        return [("tcp", 443, "")]


class NoKernel:
    """Routes of replies cannot be written."""

    async def apply(self, plan: object) -> None:
        raise Unavailable("no kernel")


class OldKernel:
    """In the place of ``Namespaces``: without address translation for IPv6."""

    home = Path("/none")

    async def run(self, _path: Path, work: object, *_arguments: object) -> object:
        return (
            "no address translation for IPv6: No such file or directory" if work is ipv6_nat_refusal else None
        )


class Home:
    """In the place of the node's reconciler."""

    def __init__(self) -> None:
        self.tables: list[str] = []

    def set_part(self, _part: str, _state: object, *tables: NftTable) -> None:
        self.tables = [table.name for table in tables]

    async def apply(self) -> None:
        """Done."""


class NoReplies:
    """Routes of replies need nothing."""

    async def apply(self, plan: object) -> None:
        """Done."""


async def test_a_kernel_without_ipv6_nat_publishes_by_ipv4(tmp_path: Path) -> None:
    home = Home()
    mesh = Mesh(
        namespaces=cast("Any", OldKernel()),
        home=cast("Any", home),
        reply_routing=cast("Any", NoReplies()),
        ports=Ports(),
        relays=tmp_path / "relays.json",
        clock=SystemClock(),
        rng=lambda: 0.5,
    )
    await mesh.apply(NodeId("n1"), {NETWORK: TABLE}, frozenset({NETWORK}))
    assert home.tables == ["ip skep_ingress"]


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
