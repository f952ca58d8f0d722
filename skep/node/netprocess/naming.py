"""The node process's side of names: which containers have them, and word of new tables."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from skep.model.ids import NetworkId
from skep.model.tables import Table
from skep.node.netprocess.client import NetClient
from skep.node.netprocess.protocol import Named, NameServer, Place
from skep.node.oci.hosts import forwarded_to, sets_ndots


class Naming:
    """``resolver``: the node's own resolv.conf."""

    def __init__(self, net: NetClient, resolver: Path) -> None:
        self._net = net
        self._resolver = resolver

    def named(
        self,
        id: str,
        netns: Path,
        places: Iterable[Place],
        *,
        name_servers: Sequence[str] = (),
        dns_options: Sequence[str] = (),
        has_way_out: bool = True,
    ) -> Named:
        """What a container is to have: ``name_servers`` and ``dns_options`` are the user's; without ``has_way_out``
        nothing is asked for it outside of its networks."""
        node = self._resolver.read_text() if self._resolver.is_file() else ""
        return Named(
            id=id,
            netns=str(netns),
            networks=tuple(places),
            servers=tuple(NameServer(one) for one in forwarded_to(node, name_servers)),
            forwards=has_way_out,
            forwards_single_labels=not sets_ndots(node, dns_options),
        )

    async def serve(self, named: Named) -> None:
        """Have names in a container's namespace; they are there when this returns.

        Raises: FailedPrecondition: they cannot be had there; Unavailable.
        """
        await self._net.serve(named)

    async def forget(self, id: str) -> None:
        """A container goes; ignored when it has no names.  Raises: Unavailable."""
        await self._net.forget(id)

    async def restore(self, containers: Iterable[Named]) -> None:
        """After a restart of this process: just these have names.  Raises: FailedPrecondition, Unavailable."""
        wanted = {one.id: one for one in containers}
        for served in (await self._net.listing()).served:
            if served.id not in wanted:
                await self._net.forget(served.id)
        for named in wanted.values():
            await self._net.serve(named)

    async def apply(self, tables: Mapping[NetworkId, Table], changed: frozenset[NetworkId]) -> None:
        """The tables of ``changed`` are on tmpfs; returns when every namespace on this node is as they say.

        Raises: Unavailable: some are not yet.
        """
        await self._net.refresh(sorted(changed))
