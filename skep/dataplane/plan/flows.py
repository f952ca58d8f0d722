"""Which flows through a published UDP port lead to what no longer answers: pure.

Connection tracking keeps leading a flow where its first packet went for as long as packets come, whatever the rules say
by then.  A UDP client that goes on sending from one port would never reach the container that replaced its server.
"""

from collections.abc import Callable, Iterable
from ipaddress import ip_address, ip_network
from socket import IPPROTO_UDP

import msgspec

from skep.dataplane.netns.state import Flow
from skep.model.sandbox import PublishedPort
from skep.model.service import PublishMode


class StalePort(msgspec.Struct, frozen=True):
    """A published UDP port whose flows to anything but ``backends`` are stale.

    They lead to a container in one of ``subnets`` that no longer has the port, or to the node itself because they began
    before the port was published.  ``backends`` is empty if nothing serves the port.
    """

    port: int
    backends: frozenset[tuple[str, int]]
    """Address and port of each container that serves the port."""
    subnets: tuple[str, ...]
    address: str = ""
    """The only address of the node with the port; empty: all."""

    def concerns(self, flow: Flow) -> bool:
        """Whether ``flow`` goes through the port."""
        original = flow.original
        return (
            original.protocol == IPPROTO_UDP
            and original.destination_port == self.port
            and self.address in ("", original.destination)
        )

    def is_stale(self, flow: Flow, is_local: Callable[[str], bool]) -> bool:
        """Whether ``flow``, which has the port's number, goes through the port and leads elsewhere.

        A flow that keeps its destination goes through the port only if that is an address of the node.  Otherwise it
        passes through the node, as a container's queries of a name server do.
        """
        backend = flow.reply.source
        if (backend, flow.reply.source_port) in self.backends:
            return False
        if backend == flow.original.destination:
            return is_local(backend)
        return any(ip_address(backend) in ip_network(one) for one in self.subnets)


def is_stale(flow: Flow, ports: Iterable[StalePort], is_local: Callable[[str], bool]) -> bool:
    """Whether ``flow`` is stale by the first of ``ports`` that it goes through.

    ``is_local``: whether an address is one of the node.
    A port that was published on all addresses and is on one now is twice in ``ports``, the present one first.
    """
    return next((port.is_stale(flow, is_local) for port in ports if port.concerns(flow)), False)


def stale_host_ports(
    ports: tuple[PublishedPort, ...], address: str, subnet: str, *, is_published: bool
) -> tuple[StalePort, ...]:
    """The stale flows of host-mode ``ports`` of one container, whose flows by IPv6 end in user space.

    Args:
        address: of the container on the gateway bridge.
        subnet: of the gateway bridge.
        is_published: whether the container has the ports from now on, and no longer has them otherwise.
    """
    return tuple(
        StalePort(
            port.published_port,
            frozenset({(address, port.target_port)}) if is_published else frozenset(),
            (subnet if is_published else address,),
            port.host_ip if port.host_ip != "0.0.0.0" else "",
        )
        for port in ports
        if port.protocol == "udp" and port.publish_mode is PublishMode.HOST and ":" not in port.host_ip
    )
