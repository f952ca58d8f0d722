"""Finds flows through a published UDP port that lead to a backend that no longer answers.  Pure.

Connection tracking sends a flow's packets where the first one was sent for as long as packets arrive, whatever the
rules say by then.  A UDP client that keeps sending from one port would never reach the container that replaced its
server.
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

    A stale flow leads to a container in one of ``subnets`` that no longer has the port, or to the node itself because
    it began before the port was published.  ``backends`` is empty if nothing serves the port.
    """

    port: int
    backends: frozenset[tuple[str, int]]
    """Address and port of each container that serves the port."""
    subnets: tuple[str, ...]
    address: str = ""
    """The only address of the node with the port, or empty for all addresses."""

    def concerns(self, flow: Flow) -> bool:
        """Return whether ``flow`` uses the port."""
        original = flow.original
        return (
            original.protocol == IPPROTO_UDP
            and original.destination_port == self.port
            and self.address in ("", original.destination)
        )

    def is_stale(self, flow: Flow, is_local: Callable[[str], bool]) -> bool:
        """Return whether ``flow``, which has the port's number, uses the port and leads elsewhere.

        A flow that keeps its destination uses the port only if the destination is an address of the node.  Otherwise it
        passes through the node, as a container's queries of a name server do.
        """
        backend = flow.reply.source
        if (backend, flow.reply.source_port) in self.backends:
            return False
        if backend == flow.original.destination:
            return is_local(backend)
        return any(ip_address(backend) in ip_network(one) for one in self.subnets)


def is_stale(flow: Flow, ports: Iterable[StalePort], is_local: Callable[[str], bool]) -> bool:
    """Return whether ``flow`` is stale by the first of ``ports`` that it uses.

    ``is_local`` tells whether the node has an address.  A port that was published on all addresses and is now published
    on one is twice in ``ports``, the current one first.
    """
    return next((port.is_stale(flow, is_local) for port in ports if port.concerns(flow)), False)


def stale_host_ports(
    ports: tuple[PublishedPort, ...], address: str, subnet: str, *, is_published: bool
) -> tuple[StalePort, ...]:
    """Return the ports whose stale flows must be deleted, of one container's host-mode ``ports``.

    IPv6 flows are not included, because the net process relays them.

    Args:
        address: The container's address on the gateway bridge.
        subnet: The subnet of the gateway bridge.
        is_published: Whether the container has just got the ports, or has lost them.
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
