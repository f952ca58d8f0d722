"""Deletes stale flows of published ports, so that the next packet of each client follows the current rules."""

import socket
from collections.abc import Collection
from functools import cache
from ipaddress import ip_address

import structlog

from skep.dataplane.netns.kernel import conntrack
from skep.dataplane.plan.flows import StalePort, is_stale
from skep.linux.network.route_lookup import route_to

log = structlog.get_logger()


def delete_flows(stale: Collection[StalePort], version: int = 4, selection: bytes = b"") -> None:
    """Delete stale flows of IP ``version`` in the calling thread's namespace.  Blocks.

    ``selection`` is a filter of ``conntrack`` for the kernel.

    A refusal (the kernel does not list flows, or offloads one) is only logged, because a retry would fail too.
    Raises: OSError: the kernel did not answer.
    """
    ports = {one.port.to_bytes(2, "big") for one in stale}
    is_local = cache(is_local_address)
    try:
        conntrack.delete_stale(
            socket.AF_INET if version == 4 else socket.AF_INET6,
            lambda flow: is_stale(flow, stale, is_local),
            # Most entries do not contain the bytes of a port, which can be tested without decoding them.
            concerns=lambda entry: any(port in entry for port in ports),
            selection=selection,
        )
    except conntrack.ConntrackRefused as error:
        log.warning("flows to published ports not moved", error=str(error))


def delete_undirected_flows(address: str) -> None:
    """Delete flows to ``address`` that began before the calling thread's namespace had it.  Blocks.

    A failure is only logged, because it does not concern other connections.
    """
    try:
        conntrack.delete_undirected(ip_address(address))
    except OSError as error:
        log.warning("flows to an address not deleted", address=address, error=str(error))


def is_local_address(address: str) -> bool:
    """Return whether the calling thread's namespace has ``address``, by the same rule as nftables."""
    return route_to(ip_address(address)).is_local
