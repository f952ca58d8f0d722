"""Sockets of a container in the net process: forgotten while they are opened, or opened twice."""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skep.aio.clock import SystemClock
from skep.dataplane.dns.networks import NetworkFiles
from skep.dataplane.dns.server import DnsSockets
from skep.dataplane.dns.upstream import QueryForwarder
from skep.dataplane.net_process.protocol import ContainerEndpoint, Named, NameServer
from skep.dataplane.net_process.served_container import ContainerRecord, ServedContainer, SharedResources
from skep.errors import Unavailable
from skep.model.networks.tables import NetworkHead, NetworkTable, Segment
from skep.model.values.ids import NetworkId


class SlowNamespaces:
    """A thread that is in the namespace until ``go``, and then has opened what it was to open."""

    def __init__(self, opened: tuple[DnsSockets, socket.socket, socket.socket | None]) -> None:
        self.opened = opened
        self.writer = "skep-1"
        self.is_inside = asyncio.Event()
        self.go = asyncio.Event()

    async def run(self, namespace: Path, call: Callable[..., Any], /, *args: Any) -> Any:
        self.is_inside.set()
        await self.go.wait()
        return self.opened


def a_served(tmp_path: Path, namespaces: "SlowNamespaces | QuickNamespaces", **more: Any) -> ServedContainer:
    named = Named(**{"id": "c1", "netns": str(tmp_path / "ns"), "networks": (), **more})
    environment = SharedResources(
        tmp_path,
        namespaces,  # type: ignore[arg-type]
        NetworkFiles(tmp_path),
        QueryForwarder(SystemClock(), lambda: 1),
        lambda: 0.5,
        asyncio.ensure_future,
    )
    return ServedContainer(environment, ContainerRecord(named), lambda: None, lambda _: None)


def datagrams() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


async def test_what_was_opened_for_a_container_that_is_gone_is_closed_and_nothing_written(
    tmp_path: Path,
) -> None:
    opened = DnsSockets(datagrams(), datagrams()), datagrams(), datagrams()
    namespaces = SlowNamespaces(opened)
    served = a_served(tmp_path, namespaces)
    opening = asyncio.ensure_future(served.open())
    await namespaces.is_inside.wait()
    served.close()
    namespaces.go.set()
    with pytest.raises(Unavailable, match="was removed while its names were set up"):
        await opening
    sockets, notifications, packets = opened
    assert [one.fileno() for one in (sockets.udp, sockets.tcp, notifications, packets)] == [-1] * 4
    served.save()
    assert list(tmp_path.iterdir()) == []


async def test_sockets_that_have_another_owner_by_then_stay_open(tmp_path: Path) -> None:
    sockets = DnsSockets(datagrams(), datagrams())
    namespaces = SlowNamespaces((sockets, datagrams(), None))
    served = a_served(tmp_path, namespaces)
    served.sockets = sockets
    opening = asyncio.ensure_future(served.open())
    await namespaces.is_inside.wait()
    assert served.release_sockets() is sockets
    served.close()
    namespaces.go.set()
    with pytest.raises(Unavailable):
        await opening
    assert sockets.udp.fileno() > 0
    sockets.close()


class QuickNamespaces:
    """What listens is opened anew at each run, one moment later."""

    def __init__(self) -> None:
        self.writer = "skep-1"
        self.sockets = DnsSockets(datagrams(), datagrams())
        self.opened = [self.sockets.udp, self.sockets.tcp]

    async def run(self, namespace: Path, call: Callable[..., Any], /, *args: Any) -> Any:
        listening = [datagrams(), datagrams()]
        self.opened += listening
        await asyncio.sleep(0)
        return self.sockets, *listening


async def test_what_is_opened_twice_at_the_same_time_is_closed_in_the_end(tmp_path: Path) -> None:
    """Tables that name other subnets come while a container is opened: a socket that stays keeps its namespace."""
    namespaces = QuickNamespaces()
    served = a_served(tmp_path, namespaces)
    await asyncio.gather(served.open(), served.open())
    served.close()
    assert [one for one in namespaces.opened if one.fileno() >= 0] == []


async def test_a_name_server_is_asked_from_inside_once_the_containers_network_has_its_subnet(
    tmp_path: Path,
) -> None:
    """The container may be served before its network's table is there, and subnets are added to networks in use."""
    network = NetworkId("front")
    servers = (NameServer("10.0.9.3"), NameServer("192.0.2.53"))
    served = a_served(tmp_path, QuickNamespaces(), networks=(ContainerEndpoint(network),), servers=servers)
    networks = served.environment.networks

    async def asked_inside(*subnets: str) -> list[str]:
        segments = tuple(Segment(subnet, "", 4097) for subnet in subnets)
        table = NetworkTable(head=NetworkHead(id=network, name=network, segments=segments))
        (tmp_path / network).write_bytes(msgspec.msgpack.encode(table))
        networks.refresh([network])
        assert served.has_other_subnets()
        await served.open()
        assert served.server is not None
        return [one.address for one in served.server.forwarding.servers if one.is_inside]

    await served.open()
    assert await asked_inside("10.0.1.0/24") == []
    assert await asked_inside("10.0.1.0/24", "10.0.9.0/24") == ["10.0.9.3"]
    served.close()
