"""Names and virtual addresses for containers on networks: what the net process is asked to serve."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import structlog

from skep.dataplane.protocol import Listing, Named, NameServer, Place
from skep.engine.container import Container
from skep.engine.hosts import forwarded_to, sets_ndots
from skep.errors import SkepError
from skep.model.ids import ContainerId, NetworkId, TaskId
from skep.model.labels import LABEL_TASK_ID
from skep.model.tables import Table

log = structlog.get_logger()


class NameRegistry(Protocol):
    """The net process (``netprocess.client``)."""

    async def serve(self, named: Named) -> None: ...

    async def forget(self, id: str) -> None: ...

    async def refresh(self, networks: Iterable[NetworkId] = ()) -> None: ...

    async def listing(self) -> Listing: ...


class NameRegistration:
    """Has each container on networks served.  ``resolver``: the node's /etc/resolv.conf."""

    def __init__(self, service: NameRegistry, resolver: Path) -> None:
        self._service = service
        self._resolver = resolver

    async def restore(self, live: Collection[Container]) -> None:
        """Serve exactly the ``live`` ones.  Failures are logged: these containers run already."""
        wanted = {one.id: named for one in live if (named := self._named(one)) is not None}
        served = {one.id: one for one in (await self._service.listing()).served}
        for id in served.keys() - wanted.keys():
            await self._service.forget(id)
        for id, named in wanted.items():
            if served.get(id) != named:
                try:
                    await self._service.serve(named)
                except SkepError as error:
                    log.warning("container without names", container=id, reason=str(error))

    async def attach(self, container: Container) -> None:
        """Names are there when this returns.  Raises: SkepError."""
        if (named := self._named(container)) is not None:
            await self._service.serve(named)

    async def detach(self, id: ContainerId) -> None:
        """Ignored when it has none.  Raises: SkepError."""
        await self._service.forget(id)

    async def served(self) -> frozenset[str]:
        """Ids of the containers that have names.  Raises: SkepError."""
        return frozenset(one.id for one in (await self._service.listing()).served)

    async def apply(self, tables: Mapping[NetworkId, Table], changed: frozenset[NetworkId]) -> None:
        """A listener of the table keeper, after the one that wrote the tables where the net process reads them."""
        await self._service.refresh(changed)

    def _named(self, container: Container) -> Named | None:
        node = self._resolver.read_text() if self._resolver.is_file() else ""
        return named_of(container, node)


def named_of(container: Container, node_resolver: str) -> Named | None:
    """What to ask for a container as it is connected; None: it is on no network.

    ``node_resolver``: the text of the node's /etc/resolv.conf.
    """
    sandbox, config = container.sandbox, container.config
    if sandbox is None or not sandbox.endpoints:
        return None
    task_id = TaskId(container.labels.get(LABEL_TASK_ID, ""))
    return Named(
        id=container.id,
        netns=sandbox.netns,
        networks=tuple(
            Place(
                network=one.network_id,
                task=one.config.attachment or task_id,
                addresses=tuple(address.partition("/")[0] for address in one.config.addresses),
            )
            for one in sandbox.endpoints
        ),
        servers=tuple(map(NameServer, forwarded_to(node_resolver, config.nameservers))),
        forwards=bool(sandbox.address),
        forwards_single_labels=not sets_ndots(node_resolver, config.dns_options),
    )
