"""This manager's part in the store: its member of the consensus, its keys, and the space that the store uses."""

from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from skep.aio.failures import retry
from skep.aio.groups import first_alone
from skep.manager.environment import ManagerEnvironment
from skep.manager.membership.consensus import Consensus
from skep.manager.membership.peer_addresses import PeerAddresses, sync_peer_addresses
from skep.manager.membership.peer_search import PeerSearch
from skep.manager.membership.service import MembersService
from skep.manager.storage.autolock import Autolock
from skep.manager.storage.backup import Backups
from skep.manager.storage.incarnation import Incarnation
from skep.manager.storage.keys import StoreKeys, WrappingKeys
from skep.manager.storage.store_space import StoreSpace
from skep.model.values.ids import NodeId
from skep.security.locking import KeyLock
from skep.wire.client import ManagerChannel
from skep.wire.service import Handler


class ConsensusMember(NamedTuple):
    """This manager's member of the consensus (its etcd), and the addresses of the others."""

    consensus: Consensus
    peer_addresses: PeerAddresses
    peer_search: PeerSearch
    restart: Callable[[], Awaitable[None]]
    cut_peers: Callable[[], None]
    """Ends the connections that other members have opened to this member."""
    error: Callable[[], str]
    """Returns a sentence about a problem of the member, such as a full disk, or an empty text."""


class StoreMember:
    """Keeps the member's addresses, keys and incarnation current, and serves joining managers."""

    def __init__(
        self,
        environment: ManagerEnvironment,
        member: ConsensusMember,
        incarnation: Incarnation,
        channel_to: Callable[[NodeId], ManagerChannel],
    ) -> None:
        store, config = environment.store, environment.config
        self._environment = environment
        self.member = member
        self._incarnation = incarnation
        self.keys = StoreKeys(store, WrappingKeys(config.paths))
        self.lock = KeyLock(config.paths)
        self.space = StoreSpace(store, config.node_id, member.consensus, channel_to, environment.clock)
        self._members = MembersService(
            store,
            member.consensus,
            member.peer_addresses,
            self.keys.disk.load,
            self.keys.keep,
            config.cluster_id,
            environment.clock,
        )

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (*self._members.services(), *self.member.peer_search.services(), *self.space.services())

    def backups(self) -> Backups:
        """Return the backups of the store."""
        environment = self._environment
        return Backups(environment.config, environment.store, self.keys.disk.load, environment.clock)

    def tasks(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """Yield the work that runs on every manager, with its names."""
        config, store, clock, _, random = self._environment
        incarnation = partial(self._incarnation.run, config.paths)
        addresses = partial(
            sync_peer_addresses, self.member.peer_addresses, store, self.member.consensus, clock, random
        )
        yield "incarnation", self._retrying(incarnation, "incarnation")
        yield "peer addresses", self._retrying(addresses, "peer addresses")
        yield "autolock", Autolock(store, self.lock, clock, random).run()
        yield "wrapping keys", self.keys.prune(clock)

    def _retrying(
        self, work: Callable[[], Coroutine[Any, Any, None]], name: str
    ) -> Coroutine[Any, Any, None]:
        """Return a coroutine that runs ``work`` and retries disk errors while the manager continues."""

        async def run() -> None:
            with first_alone(OSError):
                await work()

        return retry(
            run,
            "part of the manager failed",
            clock=self._environment.clock,
            longest_s=10.0,
            rng=self._environment.random.random,
            kinds=(OSError,),
            part=name,
        )
