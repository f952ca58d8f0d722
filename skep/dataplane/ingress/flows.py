"""UDP flows that have to move: the kernel's memory of them is removed, so that their next packet is dealt anew.

A UDP flow sticks to its backend as long as packets come, even after the backend has gone.  Its entry in connection
tracking is looked up and deleted; a TCP connection is left alone, it ends by itself.
"""

import socket
from ipaddress import ip_address, ip_network

import msgspec
import structlog

from skep.dataplane.netns import conntrack
from skep.dataplane.netns.conntrack import Refused, Tuple

log = structlog.get_logger()

_TIMEOUT_S = 5.0


class Misled(msgspec.Struct, frozen=True):
    """Flows to the published port ``port`` that go elsewhere than to one of ``backends``.

    That is to a task of the ingress network (``subnets``) that serves no more, or to the node itself because they began
    before the port was published.
    """

    port: int
    backends: frozenset[str]
    subnets: tuple[str, ...]


def forget(misled: tuple[Misled, ...], version: int) -> None:
    """Delete the UDP flows of IP ``version`` in the present namespace that are ``misled``.

    What the kernel refuses (it lists no flows, or keeps an offloaded one) is logged and no error: the port is published
    all the same, and to try again would change nothing.  Blocks for the time of a dump.  Raises: OSError: the kernel
    did not answer.
    """
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    ports = {one.port.to_bytes(2, "big") for one in misled}

    def concerns(entry: bytes) -> bool:
        return any(port in entry for port in ports)  # most flows have none of them, without a closer look

    with conntrack.opened(_TIMEOUT_S) as connection:
        try:
            found = [
                flow
                for flow in conntrack.flows(connection, family, concerns=concerns)
                if any(is_misled(one, flow.original, flow.reply) for one in misled)
            ]
            conntrack.delete(connection, family, found)
        except Refused as error:
            log.warning("flows to published ports stay where they are", reason=str(error))


def is_misled(misled: Misled, original: Tuple, reply: Tuple) -> bool:
    """Whether the flow of these two directions is one of those.  ``backends`` empty: they are to be refused."""
    if original.protocol != socket.IPPROTO_UDP or original.destination_port != misled.port:
        return False
    if reply.source in misled.backends:
        return False
    source = ip_address(reply.source)
    return reply.source == original.destination or any(source in ip_network(one) for one in misled.subnets)
