"""This manager's part in the store: its member of the consensus, its keys, and the space that the store uses."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any, NamedTuple

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import retry
from skep.aio.groups import first_alone
from skep.errors import SkepError
from skep.manager.control.swarm import unlock_key_of
from skep.manager.control_loops.informer import run_informer
from skep.manager.environment import ManagerEnvironment
from skep.manager.membership.consensus import Consensus
from skep.manager.membership.peer_addresses import PeerAddresses, sync_peer_addresses
from skep.manager.membership.peer_search import PeerSearch
from skep.manager.membership.service import MembersService
from skep.manager.storage.backup import Backups
from skep.manager.storage.incarnation import Incarnation
from skep.manager.storage.keys import StoreKeys, WrappingKeys
from skep.manager.storage.store_space import StoreSpace
from skep.model.values.ids import NodeId
from skep.security.locking import KeyLock
from skep.store.interface import Commit, Created, Deleted, Store, Updated, View
from skep.store.kinds import UNLOCK_KEY_ID, Payload
from skep.wire.client import ManagerChannel
from skep.wire.service import Handler

log = structlog.get_logger(__name__)


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


class Autolock:
    """Keeps the keys on this manager's disk encrypted (locked) with the cluster's unlock key, or unlocked.

    Each manager does so itself whenever the unlock key differs from the key with which its disk is locked.  A manager
    that was offline during a rotation catches up when it returns.
    """

    def __init__(self, store: Store, lock: KeyLock, clock: Clock, random: Random) -> None:
        self._store = store
        self._lock = lock
        self._clock = clock
        self._random = random
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Follow the cluster's unlock key until cancelled."""
        await run_informer(
            self._store, (Payload,), on_snapshot=self._on_snapshot, on_commit=self._on_commit, work=self._work
        )

    def _on_snapshot(self, _view: View) -> None:
        self._changed.set()

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Payload(id=id)) | Updated(_, Payload(id=id)) | Deleted(Payload(id=id)):
                    if id == UNLOCK_KEY_ID:
                        self._changed.set()

    async def _work(self) -> None:
        backoff = Backoff(longest_s=10.0, rng=self._random.random)
        while True:
            await self._changed.wait()
            self._changed.clear()
            view = self._store.view()
            if UNLOCK_KEY_ID in view.unreadable(Payload):
                continue  # without the unlock key, the keys on disk would be written in clear text
            key = unlock_key_of(view)
            try:
                if await asyncio.to_thread(self._lock.turn, key):
                    log.info("lock of the keys on disk changed", locked=key is not None)
                backoff.reset()
            except (SkepError, OSError) as error:
                log.error("keys on disk not locked or unlocked, will retry", reason=str(error))
                self._changed.set()
                await backoff.sleep(self._clock)


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
