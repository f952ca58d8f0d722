"""Subnets that the node chose for itself, remembered in files."""

from collections.abc import Callable, Iterable
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import TypeVar

import structlog

from skep.linux.files import is_no_file, replace_file

log = structlog.get_logger()

Network = TypeVar("Network", IPv4Network, IPv6Network)


def stored_subnet(
    file: Path, taken: Iterable[Network], version: type[Network], fresh: Callable[[], Network]
) -> Network:
    """The subnet that ``file`` remembers, unless one of ``taken`` collides with it by now: then a ``fresh`` one.

    ``taken``: what the machine's routes reach.  Raises: what ``fresh`` does; OSError: it cannot be read, or
    not be remembered.
    """
    try:
        remembered = version(file.read_text().strip())
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not is_no_file(error):
            raise  # containers are on it
    else:
        # The default route is everywhere.
        if not any(remembered.overlaps(network) for network in taken if network.prefixlen):
            return remembered
        log.warning("the gateway's subnet collides with a route and is changed", subnet=str(remembered))
    subnet = fresh()
    remember(file, subnet)
    return subnet


def remember(file: Path, subnet: IPv4Network | IPv6Network) -> None:
    """For the next process.  Raises: OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, f"{subnet}\n".encode(), is_durable=False)
