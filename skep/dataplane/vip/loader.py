"""Keeps the rules of virtual addresses in one container's namespace as the tables are.

A service is loaded when the container is first told its virtual address, and stays for as long as the container
lives: a program may keep the address for as long.  What changes while the namespace is being written to is written
together, next.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from skep.dataplane.netns.nft import NftFailed
from skep.dataplane.vip.plan import Plan, There, plan
from skep.dataplane.vip.wanted import Backends, Leads
from skep.model.ids import NetworkId, ServiceId

Services = frozenset[tuple[NetworkId, ServiceId]]
LeadsOf = Callable[[NetworkId], Mapping[ServiceId, Leads]]


Write = Callable[[Plan], Awaitable[None]]
"""Brings a plan into the namespace.  Raises: SkepError, OSError."""


class VirtualAddresses:
    """The virtual addresses of one container.

    ``loaded``: the services that an earlier process had loaded; the namespace has rules for them, of some age.
    """

    def __init__(self, leads_of: LeadsOf, write: Write, loaded: Services = frozenset()) -> None:
        self._leads_of = leads_of
        self._write = write
        self._turn = asyncio.Lock()
        self._loaded = loaded
        self._usable = loaded
        self._there: There = {}
        self._is_out_of_date = self._is_distrusted = bool(loaded)

    @property
    def loaded(self) -> Services:
        return self._loaded

    def is_usable(self, services: Services) -> bool:
        """Whether the namespace leads the virtual addresses of ``services``."""
        return services <= self._usable

    async def load(self, services: Services) -> None:
        """Lead the virtual addresses of ``services`` from now on.  Raises: SkepError, OSError."""
        if not services <= self._loaded:
            self._loaded |= services
            self._is_out_of_date = True
        await self.settle()

    def touch(self, services: Services) -> bool:
        """These lead elsewhere than before; whether ``settle`` has work."""
        if services & self._loaded:
            self._is_out_of_date = True
        return self._is_out_of_date

    def distrust(self) -> None:
        """Somebody else may have written to the namespace: ``settle`` writes all of it, if there is anything."""
        if self._loaded:
            self._is_distrusted = self._is_out_of_date = True

    async def settle(self) -> None:
        """Return when the namespace has what it is to have.  Raises: SkepError, OSError: it has not."""
        async with self._turn:
            while self._is_out_of_date:
                services = self._loaded
                there = None if self._is_distrusted else self._there
                self._is_out_of_date = self._is_distrusted = False
                leads: dict[str, Backends] = {}
                for network, service in sorted(services):
                    leads.update(self._leads_of(network).get(service, {}))
                planned = plan(there, leads)
                try:
                    if planned.text:
                        await self._write(planned)
                except BaseException as error:
                    self._is_out_of_date = self._is_distrusted = True
                    if there is None or not isinstance(error, NftFailed):
                        raise
                    continue  # something else is there than was thought: all of it, then
                self._there = planned.after
                self._usable = services
