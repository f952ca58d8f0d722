"""Addresses of the other managers, which every manager keeps up to date for its own etcd member.

The addresses come from the node objects.  A member whose node object has no address keeps its last one.  If a manager
announces another address (``peer_search``), that is used until its node object changes.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from random import Random

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.race import wait_first
from skep.errors import InvalidArgument, Unavailable
from skep.manager.control_loops.informer import run_informer
from skep.manager.manager_list import on_manager_change
from skep.manager.membership.consensus import Consensus
from skep.model.networks.addresses import is_address, joined, parted
from skep.model.node import Node
from skep.store.etcd.membership import RaftMember
from skep.store.etcd.peers import EtcdPeer
from skep.store.interface import LoopStore
from skep.wire.client import split_address

log = structlog.get_logger(__name__)

FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 10.0
"""Limits of the delay until the members are requested again."""


def full_address(written: str, seen: str) -> str:
    """Return where others reach a manager with address ``written`` whose calls come from ``seen``.

    Raises:
        InvalidArgument: It is not an address.
    """
    host, port = parted(written)
    addr = joined(host or seen, port)
    split_address(addr)
    if not is_address(host or seen):
        raise InvalidArgument(f"invalid address {addr!r}: expected ip:port")
    return addr


def addresses_in(nodes: Iterable[Node]) -> dict[str, tuple[str, int]]:
    """Return address and port of each manager in the node objects, by the manager's name."""
    return {
        str(node.id): _ip_and_port(node.manager_status.addr)
        for node in nodes
        if node.manager_status is not None and node.manager_status.addr
    }


def _ip_and_port(addr: str) -> tuple[str, int]:
    ip, port = parted(addr)
    return ip, int(port) if port.isdecimal() else 0


def peers_of(
    written: Mapping[str, tuple[str, int]], members: Iterable[RaftMember], known: Iterable[EtcdPeer]
) -> tuple[EtcdPeer, ...]:
    """Return all managers with their addresses: members, and nodes that are about to become members."""
    found = {peer.name: (peer.ip, peer.manager_port) for peer in known}
    urls = {member.name: member.url for member in members}
    peers = []
    for name in sorted(urls.keys() | written.keys()):
        ip, port = written.get(name) or found.get(name, ("", 0))
        peers.append(EtcdPeer(name=name, url=urls.get(name, ""), ip=ip, manager_port=port))
    return tuple(peers)


class _Moved(msgspec.Struct, frozen=True):
    """An announced address, and the address in the node object at that time."""

    ip: str
    replaced: str


class PeerAddresses:
    """All managers with their addresses.

    ``save`` is called after every update.  It is short, and harmless without a change.
    """

    def __init__(self, known: Iterable[EtcdPeer], save: Callable[[tuple[EtcdPeer, ...]], None]) -> None:
        """Start with the addresses saved by the last run."""
        self.peers = tuple(known)
        self._save = save
        self._written: dict[str, str] = {}
        self._moved: dict[str, _Moved] = {}

    @property
    def moved(self) -> list[EtcdPeer]:
        """Managers that announced other addresses than in their node objects."""
        return [peer for peer in self.peers if peer.name in self._moved]

    def note(self, nodes: Iterable[Node], members: Iterable[RaftMember]) -> None:
        """Update from the current nodes and members."""
        written = addresses_in(nodes)
        self._written = {name: ip for name, (ip, _) in written.items()}
        self._moved = {
            name: moved
            for name, moved in self._moved.items()
            if self._written.get(name, "") in {"", moved.replaced} and moved.ip != self._written.get(name)
        }
        present = {
            name: (moved.ip, written[name][1]) for name, moved in self._moved.items() if name in written
        }
        self._write(peers_of(written | present, members, self.peers))

    def record_move(self, name: str, ip: str) -> None:
        """Record the address that a manager announced.  Ignored unless it is a member or was admitted."""
        before = next((peer for peer in self.peers if peer.name == name), None)
        if before is None or before.ip == ip:
            return
        log.info("manager address changed", node=name, before=before.ip, now=ip)
        self._moved[name] = _Moved(ip, self._written.get(name, ""))
        self._write(
            tuple(msgspec.structs.replace(peer, ip=ip) if peer.name == name else peer for peer in self.peers)
        )

    def _write(self, peers: tuple[EtcdPeer, ...]) -> None:
        self.peers = peers
        self._save(peers)


async def sync_peer_addresses(
    peer_addresses: PeerAddresses, store: LoopStore, consensus: Consensus, clock: Clock, random: Random
) -> None:
    """Keep the addresses up to date until cancelled."""
    changed = asyncio.Event()
    backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=random.random)

    async def keep() -> None:
        while True:
            await changed.wait()
            changed.clear()
            try:
                peer_addresses.note(store.view().find(Node), await consensus.all())
            except Unavailable as error:
                log.debug("members not available, will retry", reason=str(error))
                await wait_first(backoff.sleep(clock), changed.wait())
                changed.set()
            else:
                backoff.reset()

    await run_informer(
        store,
        (Node,),
        on_snapshot=lambda _: changed.set(),
        on_commit=on_manager_change(changed.set),
        work=keep,
    )
