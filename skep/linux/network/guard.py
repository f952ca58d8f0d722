"""Checks addresses before the machine sends logs or notifications to them."""

import errno
import ipaddress
import re
from collections.abc import Callable, Collection

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
        found = ipaddress.ip_address(address.partition("%")[0])
        found = getattr(found, "ipv4_mapped", None) or found
        route = route_to(found)
        if found.is_loopback or found.is_unspecified or route.is_own:
            raise PermissionError(
                errno.EACCES, f"{address} is an address of this machine, which {self._rule}"
            )
        if found.is_link_local:
            raise PermissionError(errno.EACCES, f"{address} is a link-local address, which {self._rule}")
        if _CONTAINER_INTERFACES.fullmatch(route.device):
            raise PermissionError(
                errno.EACCES, f"{address} is a container of this machine, which {self._rule}"
            )
        if str(found) in self._peers():
            raise PermissionError(
                errno.EACCES, f"{address} is an address of another node, which {self._rule}"
            )


_CONTAINER_INTERFACES = re.compile(r"skep-.*|docker\d+|docker_gwbridge|br-[0-9a-f]{12}")
"""Names of container interfaces in the machine's own namespace, of Skep and of a Docker Engine.

Through these interfaces, even unpublished ports of containers can be reached.
"""
