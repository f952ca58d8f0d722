"""Follows the catalog of a cluster over the API, with the rights of the caller."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.api.client.requests import Requests
from skep.errors import SkepError, Unavailable
from skep.model.catalog import CatalogAnswer, CatalogService, ServiceCatalog
from skep.model.networks.addresses import PORT_MAX, is_address
from skep.model.staging.shares import WEIGHT_MAX
from skep.model.values.times import SECOND_NS
from skep.model.values.unknown import leniently

WAIT_S: Final = 30.0
"""Seconds that a request waits for a change."""
GRACE_S: Final = 15.0
"""Further seconds until a request counts as unanswered.  A change of the leader takes about a second."""
RETRY_S: Final = 0.5, 5.0
"""First and longest delay in seconds, with jitter, after a failed request."""
PACE_S: Final = 0.5
"""Least seconds between two responses, so that a restless cluster costs its managers two requests a second."""
_OF_A_WORKER: Final = "Worker nodes can't be used"
"""Part of Docker's words with which a worker refuses a request.  A worker answers its clients with the rights of a
viewer of all stacks, and the catalog depends on the rights of each user."""


def first_index_at(now_ns: int) -> int:
    """Return the first index of a view that starts at this time.

    Clients remember indexes, which have to grow when a view is started again.  So this one grows by a thousand in a
    second, and an index by one in ``PACE_S`` at most.
    """
    return now_ns * 1000 // SECOND_NS


def of_a_manager(error: SkepError) -> SkepError:
    """Return an error of the managers, or the next step if a worker has refused the request."""
    if _OF_A_WORKER in str(error):
        return Unavailable("workers do not pass on the catalog: choose a manager with --host or --context")
    return error


class KnownCatalog:
    """The last known catalog, which stays while no manager responds.

    ``index`` grows with every change.  It is ``first_index`` before the first response.
    """

    def __init__(self, first_index: int = 0) -> None:
        self.first_index = self.index = first_index
        self.services: Mapping[str, CatalogService] = {}
        self.nodes: Mapping[str, str] = {}
        self.digest = ""
        self._changed = asyncio.Event()

    def replace(self, digest: str, catalog: ServiceCatalog) -> None:
        """Take another catalog without what cannot be an address, and wake all that wait."""
        self.digest = digest
        self.services = {one.name: _checked(one) for one in catalog.services}
        self.nodes = {name: address for name, address in catalog.nodes.items() if is_address(address)}
        self.index += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_changed(self, index: int) -> None:
        """Wait until the index is greater than ``index``."""
        while self.index <= index:
            await self._changed.wait()


def _checked(service: CatalogService) -> CatalogService:
    """Return the service without instances that would make a program refuse the whole catalog.

    Addresses and ports come from nodes, which are not trusted, and from managers of any version.
    """
    kept = [
        msgspec.structs.replace(one, weight=max(1, min(one.weight, WEIGHT_MAX)))
        for one in service.instances
        if 0 <= one.port <= PORT_MAX and is_address(one.address)
    ]
    return msgspec.structs.replace(service, instances=tuple(kept))


class CatalogReader:
    """Keeps a ``KnownCatalog`` up to date.

    Args:
        report: Takes a message when the managers stop responding, and when they respond again.
        pace_s: Least seconds between two responses.
        retry_s: First and longest delay in seconds after a failed request.
        first_index: See ``KnownCatalog``.
    """

    def __init__(
        self,
        client: Requests,
        clock: Clock,
        report: Callable[[str], None],
        pace_s: float = PACE_S,
        retry_s: tuple[float, float] = RETRY_S,
        first_index: int = 0,
    ) -> None:
        self.known = KnownCatalog(first_index)
        self._client = client
        self._clock = clock
        self._report = report
        self._pace_s = pace_s
        self._retry_s = retry_s

    async def run(self) -> None:
        """Follow the catalog until cancelled."""
        backoff, is_failing = Backoff(*self._retry_s), False
        while True:
            try:
                await self._read()
            except SkepError as error:
                if not is_failing:
                    self._report(f"the catalog cannot be read, and its last state stays: {error}")
                is_failing = True
                await backoff.sleep(self._clock)
                continue
            if is_failing:
                self._report("the catalog is read again")
            is_failing = False
            backoff.reset()
            await self._clock.sleep(self._pace_s)

    async def _read(self) -> None:
        query = {"after": self.known.digest, "wait": f"{WAIT_S:g}"} if self.known.digest else {}
        timeout_s = WAIT_S + GRACE_S
        try:
            found = await self._client.request("GET", "/skep/catalog", query=query, timeout_s=timeout_s)
        except Unavailable as error:
            raise of_a_manager(error) from error
        answer = leniently(msgspec.json.encode(found), CatalogAnswer)
        if answer.catalog is not None:
            self.known.replace(answer.digest, answer.catalog)

    @asynccontextmanager
    async def following(self) -> AsyncIterator[KnownCatalog]:
        """Follow the catalog during the block, once it is known.  Raises: SkepError: it cannot be read."""
        await self._read()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.run(), name="catalog")
            try:
                yield self.known
            finally:
                task.cancel()
