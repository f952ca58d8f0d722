"""Says when a network is nearly full: once, and again when it has had room meanwhile."""

from collections.abc import Iterable

import structlog

from skep.manager.allocator.addresses import AddressBook
from skep.model.ids import NetworkId
from skep.model.network import Network
from skep.model.planes import is_overlay

log = structlog.get_logger()


class Fullness:
    """What was said of which network."""

    def __init__(self) -> None:
        self._told: set[NetworkId] = set()

    def look(self, networks: Iterable[Network | None], book: AddressBook) -> None:
        """Somebody got addresses of ``networks``."""
        for network in networks:
            if network is None or not is_overlay(network):
                continue
            usage = book.usage(network)
            if not usage.is_nearly_full:
                self._told.discard(network.id)
            elif network.id not in self._told:
                self._told.add(network.id)
                log.warning("network nearly full", network=network.spec.name, usage=str(usage))

    def forget(self, id: NetworkId) -> None:
        """The network is gone."""
        self._told.discard(id)
