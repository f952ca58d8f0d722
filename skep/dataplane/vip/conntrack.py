"""Connection tracking of a namespace: flows that have to find another backend.

UDP has no end, so a flow that goes on keeps its entry, and with it a backend that is gone: such entries are deleted,
and the flow's next packet draws another backend.  TCP connections stay where they are.
"""

import socket

from skep.dataplane.netns import conntrack
from skep.dataplane.netns.conntrack import SYSCTLS
from skep.dataplane.netns.namespaces import set_sysctl
from skep.dataplane.vip.wanted import Leads, is_ipv6

_TIMEOUT_S = 2.0


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
    for family in sorted({socket.AF_INET6 if is_ipv6(address) else socket.AF_INET for address in leads}):
        with conntrack.opened(_TIMEOUT_S) as connection:
            astray = []
            for flow in conntrack.flows(connection, family):
                address, backend = flow.original.destination, flow.reply.source
                if address not in leads:
                    continue
                is_datagrams = flow.original.protocol == socket.IPPROTO_UDP
                if is_datagrams:
                    seen.add(address)
                if backend == address or (is_datagrams and backend not in leads[address]):
                    astray.append(flow)
            conntrack.delete(connection, family, astray)
    return frozenset(seen)
