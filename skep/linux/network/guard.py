"""Checks addresses before the machine sends logs or notifications to them."""

import errno
import re
from collections.abc import Callable, Collection
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from skep.linux.network.route_lookup import route_to

_FOR_LOGS = "only an administrator may choose for logs"


class Guard:
    """Checks the addresses to which a container's log or a notification may be sent, after names are resolved.

    Both are sent from the machine's network.  There, services on loopback, a cloud's metadata service (link-local)
    and the other nodes trust every client that can connect.  Users below administrator control the content that a log
    driver sends, so their logs must not reach any of these.  The target of a notification may move by a change of DNS.
    """

    def __init__(
        self,
        peers: Callable[[], Collection[str]] = tuple,
        *,
        is_restricted: bool = True,
        rule: str = _FOR_LOGS,
    ) -> None:
        """``peers`` returns the other nodes' addresses.

        ``is_restricted`` is False if an administrator chose the address.  ``rule`` ends the refusals.
        """
        self._peers = peers
        self._is_restricted = is_restricted
        self._rule = rule

    def check_socket(self, path: str) -> None:
        """Raise PermissionError if the Unix socket ``path`` may not be used."""
        if self._is_restricted:
            raise PermissionError(errno.EACCES, f"{path} is the machine's own, which {self._rule}")

    def check(self, address: str) -> None:
        """Raise PermissionError if nothing may be sent to ``address``."""
        if not self._is_restricted:
            return
        for found in _carried(ip_address(address.partition("%")[0])):
            if what := self._why_not(found):
                raise PermissionError(errno.EACCES, f"{address} is {what}, which {self._rule}")

    def _why_not(self, found: IPv4Address | IPv6Address) -> str:
        route = route_to(found)
        if found.is_loopback or found.is_unspecified or route.is_own:
            return "an address of this machine"
        if found.is_link_local:
            return "a link-local address"
        if found in _METADATA:
            return "a cloud's metadata service"
        if _CONTAINER_INTERFACES.fullmatch(route.device):
            return "a container of this machine"
        return "an address of another node" if str(found) in self._peers() else ""


_CONTAINER_INTERFACES = re.compile(r"skep-.*|docker\d+|docker_gwbridge|br-[0-9a-f]{12}")
"""Names of container interfaces in the machine's own namespace, of Skep and of a Docker Engine.

Through these interfaces, even unpublished ports of containers can be reached.
"""

_IPV4_PREFIXES = tuple(map(IPv6Network, ("::/96", "64:ff9b::/96", "64:ff9b:1::/48")))
"""Prefixes of addresses whose last 32 bits are an IPv4 address: compatible (RFC 4291), and NAT64 (RFC 6052, RFC 8215).
"""
_METADATA = frozenset(
    map(
        ip_address,
        (
            "fd00:ec2::254",  # Amazon
            "fd20:ce::254",  # Google
            "100.100.100.200",  # Alibaba
            "168.63.129.16",  # Azure
            "192.0.0.192",  # Oracle
        ),
    )
)
"""Metadata services of clouds, which answer any client on a machine.  The others are link-local."""


def _carried(address: IPv4Address | IPv6Address) -> list[IPv4Address | IPv6Address]:
    """Return the address, and those to which a gateway or tunnel may forward its packets."""
    if isinstance(address, IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    found: list[IPv4Address | IPv6Address] = [address]
    if any(address in prefix for prefix in _IPV4_PREFIXES) and not (
        address.is_loopback or address.is_unspecified
    ):
        found.append(IPv4Address(int(address) & 0xFFFF_FFFF))
    return [*found, *filter(None, (address.sixtofour, *(address.teredo or ())))]
