"""Finds flows through a published port or a virtual address that lead to a backend that no longer answers.  Pure.

As long as packets of a flow arrive, connection tracking sends them where the first one was sent, even if the rules have
changed.  A UDP client that keeps sending from one port would therefore never reach the container that has replaced its
server.  A TCP client whose connection a lost node did not accept would get no answer from the same port for two
minutes, also for a new connection.
"""

from collections.abc import Callable, Iterable
from ipaddress import ip_address, ip_network
from socket import IPPROTO_TCP, IPPROTO_UDP
from typing import Final

import msgspec

from skep.dataplane.netns.state import Flow
from skep.dataplane.plan.vip import VipBackends
from skep.model.networks.sandbox import PublishedPort
from skep.model.service import PublishMode

ACCEPTED_S: Final = 2.0
"""Seconds after which a backend that was removed has accepted each connection, or never will.

A round trip takes less, and a client repeats its request after 1 s and 3 s (Linux).
"""


class StalePort(msgspec.Struct, frozen=True):
    """A published port.  Its flows are stale if they lead to anything but ``backends``.

    A stale flow leads to a container in one of ``subnets`` that no longer has the port.  If it began before the port
    was published, it leads to the node itself.  ``backends`` is empty if nothing serves the port.
    """

    port: int
    backends: frozenset[tuple[str, int]]
    """Address and port of each container that serves the port."""
    subnets: tuple[str, ...]
    address: str = ""
    """The only address of the node with the port, or empty for all addresses."""
    protocol: int = IPPROTO_UDP
    """UDP, or TCP for connections that nobody has accepted yet.  Accepted ones keep their backend."""

    def concerns(self, flow: Flow) -> bool:
        """Return whether ``flow`` uses the port."""
        original = flow.original
        return (
            original.protocol == self.protocol
            and not (self.protocol == IPPROTO_TCP and flow.is_answered)
            and original.destination_port == self.port
            and self.address in ("", original.destination)
        )

    def is_stale(self, flow: Flow, is_local: Callable[[str], bool]) -> bool:
        """Return whether ``flow``, which has the port's number, uses the port and leads elsewhere.

        A flow whose destination was not translated uses the port only if the destination is an address of the node.
        Otherwise it only passes through the node, like a container's queries to a name server.
        """
        backend = flow.reply.source
        if (backend, flow.reply.source_port) in self.backends:
            return False
        if backend == flow.original.destination:
            return is_local(backend)
        return any(ip_address(backend) in ip_network(one) for one in self.subnets)


def is_stale(flow: Flow, ports: Iterable[StalePort], is_local: Callable[[str], bool]) -> bool:
    """Return whether ``flow`` is stale, according to the first of ``ports`` that it uses.

    ``is_local`` tells whether the node has an address.  A port that was published on all addresses and is now published
    on one is twice in ``ports``, the current one first.
    """
    return next((port.is_stale(flow, is_local) for port in ports if port.concerns(flow)), False)


def is_unaccepted(flow: Flow, backends: VipBackends) -> bool:
    """Return whether ``flow`` is a TCP connection to a virtual address that was sent to a backend that it no longer
    has, and that this backend has not accepted.
    """
    present = backends.get(flow.original.destination)
    return (
        flow.original.protocol == IPPROTO_TCP
        and not flow.is_answered
        and present is not None
        and flow.reply.source not in present
    )


def stale_host_ports(
    ports: tuple[PublishedPort, ...], address: str, subnet: str, *, is_published: bool
) -> tuple[StalePort, ...]:
    """Return the ports whose stale flows must be deleted, of one container's host-mode ``ports``.

    IPv6 flows are not included, because the net process relays them.

    Args:
        address: The container's address on the gateway bridge.
        subnet: The subnet of the gateway bridge.
        is_published: True if the container has just got the ports, False if it has lost them.
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
