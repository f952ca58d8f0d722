"""Warnings about networks that are nearly full."""

from collections.abc import Iterable

import structlog

from skep.manager.allocator.addresses import AddressAllocations
from skep.model.network import Network
from skep.model.networks.data_planes import is_overlay
from skep.model.values.ids import NetworkId

log = structlog.get_logger()


class FullnessWarnings:
    """Logs a warning when a network is nearly full: once, and again if it had free addresses meanwhile."""

    def __init__(self) -> None:
        self._warned: set[NetworkId] = set()

    def check(self, networks: Iterable[Network | None], addresses: AddressAllocations) -> None:
        """Check ``networks`` after addresses in them were allocated."""
        for network in networks:
            if network is None or not is_overlay(network):
                continue
            usage = addresses.usage(network)
            if not usage.is_nearly_full:
                self._warned.discard(network.id)
            elif network.id not in self._warned:
                self._warned.add(network.id)
                log.warning("network nearly full", network=network.spec.name, usage=str(usage))

    def forget(self, id: NetworkId) -> None:
        """Forget a deleted network."""
        self._warned.discard(id)
