"""Registers names and virtual addresses of containers with the net process, which serves them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from skep.dataplane.net_process.protocol import ContainerEndpoint, Named, NameServer, ServedListing
from skep.errors import SkepError
from skep.linux.name_files import forwarded_to, sets_ndots
from skep.model.networks.sandbox import Sandbox, SandboxConfig
from skep.model.values.ids import ContainerId, NetworkId

log = structlog.get_logger()


class NameRegistry(Protocol):
    """The net process's service of names (``client.NetClient``)."""

    async def serve(self, named: Named) -> None:
        """Serve names in a container's namespace, replacing earlier ones.  Raises: SkepError."""

    async def forget(self, id: str) -> None:
        """Stop serving names to container ``id``.  Does nothing if it is not served.  Raises: SkepError."""

    async def refresh(self, networks: Iterable[NetworkId] = ()) -> None:
        """Reload and apply the tables of ``networks``, or of all networks if empty.  Raises: SkepError."""

    async def listing(self) -> ServedListing:
        """Return everything that the net process serves.  Raises: SkepError."""


class NameRegistration:
    """Registers each container that is on a network with the net process.

    ``resolver`` is the path of the node's resolv.conf.
    """

    def __init__(self, service: NameRegistry, resolver: Path) -> None:
        self._service = service
        self._resolver = resolver
        self._wanted: dict[str, Named] = {}
        self._failing: dict[str, str] = {}

    async def restore(self, live: Sequence[tuple[SandboxConfig, Sandbox]]) -> None:
        """Serve exactly the ``live`` containers.  Failures are only logged, because these containers run already."""
        found = ((config.id, self._named(config, one)) for config, one in live)
        self._wanted = {id: named for id, named in found if named is not None}
        served = {one.id: one for one in (await self._service.listing()).served}
        for id in served.keys() - self._wanted.keys():
            await self._service.forget(id)
        await self._serve_others(served)

    async def ensure_served(self) -> frozenset[str]:
        """Register containers whose names are not served.  Return the ids of the other containers.

        Raises: SkepError: the net process does not respond.
        """
        served = {one.id: one for one in (await self._service.listing()).served}
        await self._serve_others(served)
        return frozenset(served)

    async def _serve_others(self, served: Mapping[str, Named]) -> None:
        for id, named in tuple(self._wanted.items()):
            if served.get(id) == named or self._wanted.get(id) is not named:
                continue
            try:
                await self._service.serve(named)
            except SkepError as error:
                if self._failing.get(id) != str(error):
                    log.warning("container names not served", container=id, reason=str(error))
                self._failing[id] = str(error)
            else:
                self._failing.pop(id, None)

    async def attach(self, config: SandboxConfig, sandbox: Sandbox) -> None:
        """Register the container's names.  They are served when this returns.  Raises: SkepError."""
        if (named := self._named(config, sandbox)) is not None:
            await self._service.serve(named)
            self._wanted[config.id] = named

    async def detach(self, id: ContainerId) -> None:
        """Stop serving names to the container.  Does nothing if it has none.  Raises: SkepError."""
        self._wanted.pop(id, None)
        self._failing.pop(id, None)
        await self._service.forget(id)

    async def listing(self) -> ServedListing:
        """Return everything that the net process holds and has counted.  Raises: SkepError."""
        return await self._service.listing()

    async def refresh(self, networks: Iterable[NetworkId]) -> None:
        """Reload and apply the tables of ``networks`` in the net process.  Raises: SkepError."""
        await self._service.refresh(networks)

    def _named(self, config: SandboxConfig, sandbox: Sandbox) -> Named | None:
        node = self._resolver.read_text() if self._resolver.is_file() else ""
        return named_of(config, sandbox, node)


def named_of(config: SandboxConfig, sandbox: Sandbox, node_resolver: str) -> Named | None:
    """Return the request for a container's names, or None if it is on no network.

    ``node_resolver`` is the text of the node's /etc/resolv.conf.
    """
    if not sandbox.endpoints:
        return None
    return Named(
        id=config.id,
        netns=sandbox.netns,
        networks=tuple(
            ContainerEndpoint(
                network=one.network_id,
                task=one.config.attachment or config.task,
                addresses=tuple(address.partition("/")[0] for address in one.config.addresses),
                links=one.config.links,
            )
            for one in sandbox.endpoints
        ),
        servers=tuple(map(NameServer, forwarded_to(node_resolver, config.nameservers))),
        forwards=bool(sandbox.address),
        forwards_single_labels=not sets_ndots(node_resolver, config.dns_options),
    )
