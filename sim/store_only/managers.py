"""Managers that are nothing but their store, with a leader's loop and a watcher on it."""

import asyncio
from collections.abc import Callable, Iterable
from itertools import count

from msgspec.structs import replace

from sim.etcd.client import SimulatedClient
from sim.time import VirtualClock
from skep.aio.backoff import Backoff
from skep.errors import Unavailable
from skep.model.ids import NodeId
from skep.store.etcd.store import EtcdStore, store_on
from skep.store.interface import Created, Deleted, NotLeader, Term, Transaction, Updated, View, WatchLagged
from skep.store.kinds import Payload

WRAPPING_KEY = bytes(32)
WANT = "want-"
"""Payloads with this name get a number from the leader, each another one."""
RETRY_S = 0.25


class Manager:
    """One manager: its store, its leader's loop, a watcher."""

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
                async with (
                    store_on(self._client, self._id, WRAPPING_KEY, self._clock, rng=self._rng) as store,
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
    """Gives each payload that wants one the lowest number that nobody holds; remembers who does, as the allocator.

    Like there, one whose write has failed waits a moment while the others go on.
    """

    def __init__(self, term: Term, clock: VirtualClock) -> None:
        self._term = term
        self._clock = clock
        self._held: dict[str, bytes] = {}
        self._not_before: dict[str, float] = {}
        self._given: set[str] = set()
        """Not looked at again, as the allocator goes on with the next one, whatever the store shows."""

    async def allocate_all(self) -> None:
        """Until nobody wants.  Raises: NotLeader."""
        for one in self._term.view().find(Payload):
            if one.id.startswith(WANT):
                self._look_again(one.id)
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
            self._look_again(id)

    def _wanting(self) -> list[str]:
        payloads = self._term.view().find(Payload)
        return [
            one.id
            for one in payloads
            if one.id.startswith(WANT) and not one.data and one.id not in self._given
        ]

    def _look_again(self, id: str) -> None:
        """What the store shows is held; what it does not show is not."""
        self._held.pop(id, None)
        found = self._term.view().lookup(Payload, id)
        if found is not None and found.data:
            self._held[id] = found.data

    def _lowest(self) -> bytes:
        held = set(self._held.values())
        return next(number for number in (b"%d" % each for each in count(1)) if number not in held)


class Watcher:
    """Follows a manager's watch: each change continues what was there before, and nothing is left out."""

    def __init__(self, note: Callable[[Iterable[str]], None], id: NodeId) -> None:
        self._note = note
        self._id = id
        self._known: dict[str, Payload] = {}

    async def run(self, store: EtcdStore) -> None:
        """Follow until cancelled."""
        while True:
            try:
                async with store.watch(Payload) as watch:
                    self._known = {one.id: one for one in watch.snapshot.find(Payload)}
                    async for commit in watch:
                        self._note(text for event in commit.events for text in self._taken(event))
            except WatchLagged:
                continue

    def differences(self, view: View) -> Iterable[str]:
        """What it does not know, of what there is."""
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
            yield f"the watch of {self._id} says that {id} was {expected}, and it was {self._known.get(id)}"


def given(tx: Transaction, id: str, number: bytes) -> None:
    found = tx.lookup(Payload, id)
    if found is not None and not found.data:
        tx.put(replace(found, data=number))
