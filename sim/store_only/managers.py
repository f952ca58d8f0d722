"""Managers that consist of their store, with one control loop and one watcher on it."""

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from operator import eq

from msgspec.structs import replace

from sim.etcd.client import SimulatedClient
from sim.world.time import VirtualClock
from skep.aio.backoff import Backoff
from skep.errors import Unavailable
from skep.model.values.ids import NodeId
from skep.store.etcd.store import EtcdStore, store_on
from skep.store.interface import Created, Deleted, NotLeader, Term, Transaction, Updated, View, WatchLagged
from skep.store.kinds import Payload

WRAPPING_KEY = bytes(32)
WANT = "want-"
"""Payloads with this prefix get a unique number from the leader."""
RETRY_S = 0.25


class Manager:
    """One manager: its store, its control loop while it leads, and a watcher."""

    def __init__(
        self,
        id: NodeId,
        client: SimulatedClient,
        clock: VirtualClock,
        rng: Callable[[], float],
        note: Callable[[Iterable[str]], None],
    ) -> None:
        self.store: EtcdStore | None = None
        self.task: asyncio.Task[None] | None = None
        self.leads = False
        self.watcher = Watcher(note, id)
        self._rng = rng
        self._id = id
        self._client = client
        self._clock = clock

    async def run(self) -> None:
        backoff = Backoff(0.1, 1.0, rng=self._rng)
        while True:
            try:
                members = (await self._client.members(is_current=True)).members
                async with (
                    store_on(
                        *(self._client, self._id, WRAPPING_KEY, self._clock),
                        rng=self._rng,
                        is_only_member=partial(eq, len(members), 1),
                    ) as store,
                    asyncio.TaskGroup() as group,
                ):
                    self.store = store
                    group.create_task(self.watcher.run(store), name=f"{self._id} watcher")
                    group.create_task(self._stand(store, group), name=f"{self._id} election")
            except Unavailable:
                assert self.store is None, "a part of the store failed"
                await backoff.sleep(self._clock)
            finally:
                self.store = None

    async def _stand(self, store: EtcdStore, group: asyncio.TaskGroup) -> None:
        async for term in store.terms(self._id, f"{self._id}:2377"):
            self.leads = True
            leading = group.create_task(self._lead(term), name=f"{self._id} leads")
            try:
                await term.wait_lost()
            finally:
                self.leads = False
                leading.cancel()
                await asyncio.wait([leading])

    async def _lead(self, term: Term) -> None:
        while True:
            try:
                async with term.watch(Payload) as watch:
                    numbers = Numbers(term, self._clock)
                    await numbers.allocate_all()
                    async for _ in watch:
                        await numbers.allocate_all()
            except WatchLagged:
                continue
            except NotLeader:
                return


class Numbers:
    """Allocates the lowest free number to each payload that needs one, and caches the holders, as the allocator does.

    As in the allocator, a payload whose write failed is retried later while the others continue.
    """

    def __init__(self, term: Term, clock: VirtualClock) -> None:
        self._term = term
        self._clock = clock
        self._held: dict[str, bytes] = {}
        self._not_before: dict[str, float] = {}
        self._given: set[str] = set()
        """Payloads that are not considered again, even if they change in the store, as in the allocator."""

    async def allocate_all(self) -> None:
        """Allocate until every payload has a number.  Raises: NotLeader."""
        for one in self._term.view().find(Payload):
            if one.id.startswith(WANT):
                self._refresh(one.id)
        while wanting := self._wanting():
            now = self._clock.monotonic()
            due = [id for id in wanting if self._not_before.get(id, 0.0) <= now]
            if not due:
                await self._clock.sleep(RETRY_S)
                continue
            id = due[0]
            self._held[id] = self._lowest()
            try:
                await self._term.update(given, id, self._held[id])
            except NotLeader:
                raise
            except Unavailable:
                self._not_before[id] = self._clock.monotonic() + RETRY_S
            else:
                self._given.add(id)
            self._refresh(id)

    def _wanting(self) -> list[str]:
        payloads = self._term.view().find(Payload)
        return [
            one.id
            for one in payloads
            if one.id.startswith(WANT) and not one.data and one.id not in self._given
        ]

    def _refresh(self, id: str) -> None:
        """Update the cached number of ``id`` from the store."""
        self._held.pop(id, None)
        found = self._term.view().lookup(Payload, id)
        if found is not None and found.data:
            self._held[id] = found.data

    def _lowest(self) -> bytes:
        held = set(self._held.values())
        return next(number for number in (b"%d" % each for each in count(1)) if number not in held)


class Watcher:
    """Consumes a manager's watch.  Each event must continue from the state before it, and none may be missing."""

    def __init__(self, note: Callable[[Iterable[str]], None], id: NodeId) -> None:
        self._note = note
        self._id = id
        self._known: dict[str, Payload] = {}

    async def run(self, store: EtcdStore) -> None:
        """Consume the watch until cancelled."""
        while True:
            try:
                async with store.watch(Payload) as watch:
                    self._known = {one.id: one for one in watch.snapshot.find(Payload)}
                    async for commit in watch:
                        self._note(text for event in commit.events for text in self._taken(event))
            except WatchLagged:
                continue

    def differences(self, view: View) -> Iterable[str]:
        """Yield the differences between the consumed events and ``view``."""
        present = {one.id: one for one in view.find(Payload)}
        for id in sorted(present.keys() | self._known.keys()):
            if present.get(id) != self._known.get(id):
                yield f"shows {id} as {self._known.get(id)}, not {present.get(id)}"

    def _taken(self, event: object) -> Iterable[str]:
        match event:
            case Created(Payload() as new):
                yield from self._is(new.id, None)
                self._known[new.id] = new
            case Updated(Payload() as old, Payload() as new):
                yield from self._is(new.id, old)
                self._known[new.id] = new
            case Deleted(Payload() as old):
                yield from self._is(old.id, old)
                self._known.pop(old.id, None)

    def _is(self, id: str, expected: Payload | None) -> Iterable[str]:
        if self._known.get(id) != expected:
            yield f"the watch of {self._id} has {expected} as the old value of {id}, which was {self._known.get(id)}"


def given(tx: Transaction, id: str, number: bytes) -> None:
    found = tx.lookup(Payload, id)
    if found is not None and not found.data:
        tx.put(replace(found, data=number))
