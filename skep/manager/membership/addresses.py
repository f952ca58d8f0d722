"""Where managers find each other: every manager keeps the address book of its own member up to date.

The addresses are those that the node objects say; a member whose object says nothing keeps the one it had.
"""

import asyncio
from collections.abc import Callable, Iterable

import structlog

from skep.aio.clock import Clock
from skep.errors import Unavailable
from skep.manager.follow import State, follow
from skep.manager.membership.consensus import Consensus
from skep.model.node import Node
from skep.store.etcd.membership import RaftMember
from skep.store.etcd.peers import Peer

log = structlog.get_logger(__name__)

RETRY_S = 1.0


def host_of(addr: str) -> str:
    """``10.0.0.1:2377`` or ``[::1]:2377`` -> the address without its port."""
    return addr.rpartition(":")[0].strip("[]")


def peers_of(nodes: Iterable[Node], members: Iterable[RaftMember], known: Iterable[Peer]) -> tuple[Peer, ...]:
    """All managers with their addresses: members, and those about to become one."""
    found = {peer.name: peer for peer in known}
    urls = {member.name: member.url for member in members}
    said = {
        str(node.id): host_of(node.manager_status.addr)
        for node in nodes
        if node.manager_status is not None and node.manager_status.addr
    }
    return tuple(
        Peer(
            name=name,
            url=urls.get(name, ""),
            ip=said.get(name) or (found[name].ip if name in found else ""),
        )
        for name in sorted(urls.keys() | said.keys())
    )


class AddressBook:
    """Keeps ``save`` informed of all managers and where they are."""

    def __init__(
        self,
        store: State,
        consensus: Consensus,
        known: Iterable[Peer],
        save: Callable[[tuple[Peer, ...]], None],
        clock: Clock,
    ) -> None:
        """``known``: as the last run left it; ``save``: short, and harmless when nothing has changed."""
        self._store = store
        self._consensus = consensus
        self._save = save
        self._clock = clock
        self.peers = tuple(known)

    async def run(self) -> None:
        """Follow the nodes until cancelled."""
        changed = asyncio.Event()

        async def keep() -> None:
            while True:
                await changed.wait()
                changed.clear()
                await self._keep()

        await follow(
            self._store,
            (Node,),
            start=lambda _: changed.set(),
            note=lambda _: changed.set(),
            work=keep,
        )

    async def _keep(self) -> None:
        """Bring the book up to date, however often that takes."""
        while True:
            try:
                return self.note(await self._consensus.all())
            except Unavailable as error:
                log.debug("members not known", reason=str(error))
                await self._clock.sleep(RETRY_S)

    def note(self, members: Iterable[RaftMember]) -> None:
        """Take over ``members``, and the addresses that the nodes say now."""
        self.peers = peers_of(self._store.view().find(Node), members, self.peers)
        self._save(self.peers)
