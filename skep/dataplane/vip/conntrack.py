"""Connection tracking of a namespace: flows that have to find another backend.

UDP has no end, so a flow that goes on keeps its entry, and with it a backend that is gone: such entries are deleted,
and the flow's next packet draws another backend.  TCP connections stay where they are.
"""

import socket

from skep.dataplane.netns import conntrack
from skep.dataplane.netns.conntrack import SYSCTLS
from skep.dataplane.netns.namespaces import set_sysctl
from skep.dataplane.vip.wanted import Leads, is_ipv6


def set_times() -> None:
    """Set ``SYSCTLS`` in the namespace of the calling thread.

    A namespace has its own, with the kernel's values at first, whatever the node's are; a container sees them
    read-only.
    """
    for name, value in SYSCTLS.items():
        set_sysctl(name, value)


def forget_flows(leads: Leads) -> frozenset[str]:
    """Delete the UDP entries to addresses in ``leads`` that lead to none of their backends; to which there were any.

    And those of all protocols that are not led anywhere: they began before the address was.

    In the namespace of the calling thread.  Blocks.  Raises: OSError: whatever the reason, flows may lead astray; who
    asks says so, and goes on.
    """
    seen: set[str] = set()

    def is_stale(flow: conntrack.Flow) -> bool:
        address, backend = flow.original.destination, flow.reply.source
        if address not in leads:
            return False
        is_udp = flow.original.protocol == socket.IPPROTO_UDP
        if is_udp:
            seen.add(address)
        return backend == address or (is_udp and backend not in leads[address])

    for family in sorted({socket.AF_INET6 if is_ipv6(address) else socket.AF_INET for address in leads}):
        conntrack.delete_stale(family, is_stale)
    return frozenset(seen)
