"""Where managers find each other: every manager keeps the address book of its own member up to date.

The addresses are those that the node objects say; a member whose object says nothing keeps the one it had.  One that
has announced itself elsewhere (``whereabouts``) is there, until its object says something new.
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
from skep.manager.informer import LoopStore, run_informer
from skep.manager.manager_list import on_manager_change
from skep.manager.membership.consensus import Consensus
from skep.model.addresses import is_address, joined, parted
from skep.model.node import Node
from skep.store.etcd.membership import RaftMember
from skep.store.etcd.peers import Peer
from skep.wire.client import split_address

log = structlog.get_logger(__name__)

FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 10.0


def full_address(said: str, seen: str) -> str:
    """Where others reach a manager that calls itself ``said`` and whose calls come from ``seen``.

    Raises: InvalidArgument: it is no address.
    """
    host, port = parted(said)
    addr = joined(host or seen, port)
    split_address(addr)
    if not is_address(host or seen):
        raise InvalidArgument(f"invalid address {addr!r}: want ip:port")
    return addr


def said_by(nodes: Iterable[Node]) -> dict[str, tuple[str, int]]:
    """Name of each manager -> its address and port, as the node objects say."""
    return {
        str(node.id): _ip_and_port(node.manager_status.addr)
        for node in nodes
        if node.manager_status is not None and node.manager_status.addr
    }


def _ip_and_port(addr: str) -> tuple[str, int]:
    ip, port = parted(addr)
    return ip, int(port) if port.isdecimal() else 0


def peers_of(
    said: Mapping[str, tuple[str, int]], members: Iterable[RaftMember], known: Iterable[Peer]
) -> tuple[Peer, ...]:
    """All managers with their addresses: members, and those about to become one."""
    found = {peer.name: (peer.ip, peer.manager_port) for peer in known}
    urls = {member.name: member.url for member in members}
    peers = []
    for name in sorted(urls.keys() | said.keys()):
        ip, port = said.get(name) or found.get(name, ("", 0))
        peers.append(Peer(name=name, url=urls.get(name, ""), ip=ip, manager_port=port))
    return tuple(peers)


class _Moved(msgspec.Struct, frozen=True):
    """Where a manager says it is, and what its node object said then."""

    ip: str
    instead_of: str


class AddressBook:
    """All managers and where they are; ``save`` is told of every change (short, and harmless when nothing changed)."""

    def __init__(self, known: Iterable[Peer], save: Callable[[tuple[Peer, ...]], None]) -> None:
        """``known``: as the last run left it."""
        self.peers = tuple(known)
        self._save = save
        self._said: dict[str, str] = {}
        self._moved: dict[str, _Moved] = {}

    @property
    def moved(self) -> list[Peer]:
        """Those that have announced themselves at other addresses than were written down."""
        return [peer for peer in self.peers if peer.name in self._moved]

    def note(self, nodes: Iterable[Node], members: Iterable[RaftMember]) -> None:
        """Take over what nodes and members are now."""
        said = said_by(nodes)
        self._said = {name: ip for name, (ip, _) in said.items()}
        self._moved = {
            name: moved
            for name, moved in self._moved.items()
            if self._said.get(name, "") in {"", moved.instead_of} and moved.ip != self._said.get(name)
        }
        present = {name: (moved.ip, said[name][1]) for name, moved in self._moved.items() if name in said}
        self._write(peers_of(said | present, members, self.peers))

    def learn(self, name: str, ip: str) -> None:
        """A manager says where it is.  Strangers are not taken note of: only members and those let in are known."""
        before = next((peer for peer in self.peers if peer.name == name), None)
        if before is None or before.ip == ip:
            return
        log.info("a manager has moved", node=name, before=before.ip, now=ip)
        self._moved[name] = _Moved(ip, self._said.get(name, ""))
        self._write(
            tuple(msgspec.structs.replace(peer, ip=ip) if peer.name == name else peer for peer in self.peers)
        )

    def _write(self, peers: tuple[Peer, ...]) -> None:
        self.peers = peers
        self._save(peers)


async def keep_book(
    book: AddressBook, store: LoopStore, consensus: Consensus, clock: Clock, random: Random
) -> None:
    """Follow the managers until cancelled."""
    changed = asyncio.Event()
    backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=random.random)

    async def keep() -> None:
        while True:
            await changed.wait()
            changed.clear()
            try:
                book.note(store.view().find(Node), await consensus.all())
            except Unavailable as error:
                log.debug("members not known", reason=str(error))
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
