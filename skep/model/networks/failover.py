"""Failover addresses: addresses outside of the cluster's networks, each held by one node that runs the front door.

The times below are one budget.  A node holds an address only while a manager confirms it, and managers name another
node only after the last confirmation has certainly run out on the former holder.
"""

from typing import Final

import msgspec

from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NodeId
from skep.model.values.times import Timestamp

RENEWAL_S: Final = 0.35
"""Seconds between two renewals of a holder.  Two of them may be lost before its kernel drops the address."""
ANSWER_S_MAX: Final = 0.5
"""Seconds after a renewal was sent in which its confirmation counts.  A write of a healthy store takes 20 ms."""
KERNEL_S: Final = 1
"""Lifetime in seconds of an address in the kernel, which drops it even if the node process hangs.

The kernel counts in whole seconds, so this is the shortest lifetime.
"""
KERNEL_LATE_S: Final = 1.1
"""Seconds by which the kernel may drop an address too late.

It looks for expired addresses at most once a second, and rounds timers.  Measured: at most 1.0 s.

Source: linux, net/ipv4/devinet.c (check_lifetime) and net/ipv6/addrconf.c (addrconf_verify_rtnl).
"""
KERNEL_EARLY_S: Final = 0.05
"""Seconds by which the kernel may drop an address too early.  It rounds by 20 ms.

Source: linux, include/net/addrconf.h (ADDRCONF_TIMER_FUZZ_MINUS).
"""
DRIFT: Final = 0.01
"""Share by which the clock of a machine may be fast or slow.  NTP slews clocks by at most 0.05 %."""
LEASE_S: Final = 2.7
"""Seconds without a renewal after which the former holder certainly has no longer the address.

At least the three times above, by the slowest clock of a node and the fastest clock of a manager.
"""

SILENT: Final = "it was silent"
"""Reason of a node that lost an address because its lease is over."""
STOPS: Final = "its daemon stops"
"""Reason of a node that releases its addresses before a planned stop."""
UNASKED: Final = "it gave the address up without a reason"
"""Reason of a node that released an address which it was not asked to release."""
ADDRESSES_MAX: Final = 32
"""Largest number of failover addresses.  Each renewal names all addresses of its node."""
REASON_CHARACTERS_MAX: Final = 200
"""Longest reason of a node, because nodes are not trusted."""


class AddressOrder(msgspec.Struct, frozen=True, kw_only=True):
    """An order to one node about an address.

    Attributes:
        prefix: Prefix length of the subnet in which the address is.
        interface: Name of the interface, or empty to use the one whose subnet has the address.
        epoch: Number of the naming of a holder.
        is_leaving: Whether the node has to release the address.
    """

    address: str
    prefix: int = 32
    interface: str = ""
    epoch: int = 0
    is_leaving: bool = False


class AddressRequest(ApiObject):
    """Body of a request that adds an address: ``10.0.0.100/24``."""

    address: str = ""
    interface: str = ""


class AddressShown(ApiObject):
    """A failover address.

    Attributes:
        address: The address with the prefix length of its subnet.
        state: ``held``, ``moving`` or ``unheld``.
        since: Time at which the node was named.
        reason: Why no node holds it, or why it moves.
    """

    address: str = always("")
    interface: str = ""
    state: str = always("unheld")
    node_id: NodeId = always(NodeId(""))
    hostname: str = always("")
    since: Timestamp = Timestamp("")
    reason: str = always("")
