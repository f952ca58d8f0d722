"""The managers, etcd members and users of a run of only the store (``sim.store_only.run``)."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from itertools import count
from random import Random
from typing import Any, TypeVar, cast

import msgspec

from sim.etcd.client import SimulatedClient
from sim.etcd.raft import Raft
from sim.invariants.bookkeeping import kept_of_writes
from sim.invariants.quiescence import replica_violations
from sim.store_only.managers import WANT, WRAPPING_KEY, Manager
from sim.store_only.registers import Registers, compare, delete, swap, swap_each
from sim.world.committed import Change, CommittedState
from sim.world.links import Links
from sim.world.time import VirtualClock, VirtualLoop
from skep.errors import NotFound, Unavailable
from skep.model.network import Network, NetworkSpec
from skep.model.service import NetworkAttachmentConfig, NetworkAttachmentSpec, TaskSpec
from skep.model.task import Task
from skep.model.values.ids import NetworkId, NodeId, TaskId
from skep.store.etcd.encryption.cipher import Cipher
from skep.store.etcd.initialize import cluster_in, initialize_on
from skep.store.etcd.store import EtcdStore
from skep.store.interface import (
    Created,
    Deleted,
    InUse,
    Transaction,
    Updated,
    View,
)
from skep.store.keys import LEADER
from skep.store.kinds import Payload
from skep.store.leadership import LeaderRecord
from skep.store.state import State

T = TypeVar("T")

REGISTERS = ("k1", "k2", "k3")
NETWORKS = ("x1", "x2")
LATENCY_S = 0.002
LED_S = 10.0
"""Time within which a majority of healthy managers elects a leader."""
WRITTEN_S = 10.0
TURNS_MAX = 200_000
LOOK_S = 0.25
REST_S = 3.0
"""Longer than any timeout of a lost response."""
SLOWNESS_S = (0.4, 0.8, 1.2, 2.0, 4.0)
"""Seconds that an entry takes on slow disks. etcd's own timeout is six seconds."""
SLOW_FOR_S = 60.0


class StoreWorld:
    """The managers, members and users of one run."""

    def __init__(self, seed: int, managers: int | None = None) -> None:
        """``managers``: the number of managers, or None for a random one."""
        self.seed = seed
        self.random = Random(seed)
        self.violations: list[str] = []
        self.trace: list[str] = []
        self.loop = VirtualLoop(TURNS_MAX, seed)
        self.links = Links()
        self.raft = Raft(self.loop, self.random, self.links, LATENCY_S)
        self.committed = CommittedState(self.loop.time)
        self.committed.watchers.append(self._committed)
        managers = managers or self.random.choice((1, 3, 3, 5))
        self.ids = tuple(NodeId(f"m{number}") for number in range(1, managers + 1))
        self.managers: dict[NodeId, Manager] = {}
        self.registers = Registers(self.loop.time)
        self.written: Counter[bytes] = Counter()
        """Number of commits of each value.  Users write each value once."""
        self.on_next_want: Callable[[], None] | None = None
        """Called as soon as a number is requested."""
        self._clock = VirtualClock(self.loop)
        self._requests: set[asyncio.Task[None]] = set()
        self._numbers = count(1)
        self._term = 0
        """The raft term of the last leader record."""

    def create(self) -> None:
        """Create the cluster and start its managers."""
        asyncio.set_event_loop(self.loop)
        for id in self.ids:
            self.raft.add(id)
            self.raft.start(id)
        self.do(self.initialize())
        for id in self.ids:
            self.start(id)

    def conclude(self) -> None:
        """Wait for all requests, and check their leftovers."""
        self._finish()
        self.run_for(REST_S)
        self.note(self.registers.violations())
        self.note(
            f"{value!r} was written {times} times" for value, times in self.written.items() if times > 1
        )
        self.do(self._check_all())

    def end(self) -> None:
        """End everything that runs."""
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()
        asyncio.set_event_loop(None)

    # -- managers ------------------------------------------------------------------------------------------------------

    def start(self, id: NodeId) -> None:
        member = self.raft.members[id]
        client = SimulatedClient(self.raft, member, self.links, self.random)
        manager = Manager(id, client, self._clock_of(id), self.random.random, self.note)
        self.managers[id] = manager
        manager.task = self.loop.create_task(manager.run(), name=id)

    def crash(self, id: NodeId) -> Callable[[], None]:
        """Kill a manager and its member with SIGKILL. Return a function that starts both again."""
        manager = self.managers.pop(id)
        self.raft.crash(id)
        assert manager.task is not None, "it was started"
        manager.task.cancel()

        def start() -> None:
            self.raft.start(id, less=self.random.choice((0, 0, 3, 20)))
            self.start(id)

        return start

    def restart_member(self, id: NodeId) -> Callable[[], None]:
        """Kill a member with SIGKILL, but not its manager.  Return a function that restarts it, with fewer entries
        applied at first.
        """
        self.raft.crash(id)
        return lambda: self.raft.start(id, less=self.random.choice((0, 3, 20)))

    def _clock_of(self, id: NodeId) -> VirtualClock:
        return VirtualClock(self.loop, wait_running=lambda: self.links.wait_thawed(id))

    async def initialize(self) -> None:
        first = self.ids[0]
        client = SimulatedClient(self.raft, self.raft.members[first], self.links, self.random)
        await self.raft.wait_readable(self.raft.members[first])
        await initialize_on(client, WRAPPING_KEY, self._clock, _networks)
        self.committed.begin(Cipher((await cluster_in(client)).ring, WRAPPING_KEY))
        self.committed.take(first, self.raft.kv.revision, self.raft.kv.events(2, self.raft.kv.revision))
        self.raft.committed.append(self.committed.take)

    # -- users ---------------------------------------------------------------------------------------------------------

    def begin_request(self) -> None:
        """Begin a random request."""
        actions = (
            *(self._swap,) * 4,
            *(self._read_register,) * 3,
            *(self._compare, self._delete, self._swap_each, self._want, self._want),
            *(self._attach, self._detach, self._remove_network),
        )
        self.request(self.random.choice(actions)())

    def request(self, work: Awaitable[None]) -> None:
        """Start a request whose expected errors are ignored."""
        task = self.loop.create_task(_without_errors(work), name="user")
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)

    def _store(self) -> EtcdStore:
        """Return a random store.  Raises: Unavailable: no manager serves."""
        stores = [manager.store for manager in self.managers.values() if manager.store is not None]
        if not stores:
            raise Unavailable("no manager serves")
        return self.random.choice(stores)

    async def _swap(self, store: EtcdStore | None = None) -> None:
        key, value = self.random.choice(REGISTERS), self._value()
        store = store or self._store()
        await self.registers.record_swap(key, value, store.update(swap, key, value))

    async def _swap_each(self) -> None:
        store = self._store()
        items = [(key, self._value()) for key in REGISTERS]
        await self.registers.swapped_each(items, store.update_each(swap_each, items))

    async def _compare(self) -> None:
        key, value = self.random.choice(REGISTERS), self._value()
        store = self._store()
        present = store.view().lookup(Payload, key)
        expected = present.data if present is not None and self.random.random() < 0.8 else b"another"
        await self.registers.record_compare(key, expected, value, store.update(compare, key, expected, value))

    async def _delete(self) -> None:
        key, store = self.random.choice(REGISTERS), self._store()
        await self.registers.record_delete(key, store.update(delete, key))

    async def _read_register(self) -> None:
        key, store = self.random.choice(REGISTERS), self._store()
        began = self.loop.time()
        await store.barrier()
        found = store.view().lookup(Payload, key)
        self.registers.record_read(key, began, found.data if found is not None else None)

    async def _want(self) -> None:
        """Request a number for one or two payloads at once."""
        store = self._store()
        names = [f"{WANT}{next(self._numbers)}" for _ in range(self.random.choice((1, 2)))]
        await store.update_each(lambda tx, name: tx.put(Payload(id=name)), names)

    async def _attach(self) -> None:
        network = self.random.choice(NETWORKS)
        task = Task(
            id=TaskId(f"t{next(self._numbers)}"),
            spec=TaskSpec(
                networks=(NetworkAttachmentConfig(target=network),),
                network_attachment_spec=NetworkAttachmentSpec(),
            ),
        )
        await self._store().update(lambda tx: tx.put(task))

    async def _detach(self) -> None:
        store = self._store()
        if tasks := store.view().find(Task):
            await store.update(_without, tasks[0].id)

    async def _remove_network(self) -> None:
        """Remove a network with its tasks, or create it again if it was removed."""
        id, store = NetworkId(self.random.choice(NETWORKS)), self._store()
        for task in store.view().find(Task):
            if task.spec.networks[0].target == id:
                await store.update(partial(_without, id=task.id))
        if store.view().lookup(Network, id) is None:
            await store.update(lambda tx: tx.put(_network(id)))
        else:
            await store.update(lambda tx: tx.delete(Network, id))

    def _value(self) -> bytes:
        return b"v%d" % next(self._numbers)

    # -- invariants ----------------------------------------------------------------------------------------------------

    def note(self, violations: Iterable[str]) -> None:
        """Record a violation."""
        self.violations += [f"{self.loop.time():.3f} s: {violation}" for violation in violations]

    def log(self, text: str) -> None:
        """Record an event."""
        self.trace.append(f"{self.loop.time():9.3f}  {text}")

    def _committed(self, change: Change, view: View) -> None:
        written = [one.key for one in change.keys if not one.key.startswith(("w/", "r/"))]
        self.log(f"r{change.revision} by {change.origin}: {' '.join(written)}")
        for one in change.keys:
            if one.key == LEADER and one.value is not None:
                self.note(self._term_violations(msgspec.json.decode(one.value, type=LeaderRecord)))
        for event in change.events:
            match event:
                case Created(Payload() as new) | Updated(_, Payload() as new) if new.data:
                    if new.id in REGISTERS:
                        self.written[new.data] += 1
                    else:
                        self.note(_number_violations(new, change, view))
                case Created(Payload()) if self.on_next_want is not None:
                    self.on_next_want()
                    self.on_next_want = None
                case Created(Task() as task):
                    if view.lookup(Network, task.spec.networks[0].target) is None:
                        self.note([f"{task.id} is on a network that is not there"])
                case Deleted(Network() as network):
                    users = [one.id for one in view.find(Task) if one.spec.networks[0].target == network.id]
                    if users:
                        self.note([f"network {network.id} was removed under {users}"])

    def _term_violations(self, record: LeaderRecord) -> Iterable[str]:
        if record.term < self._term:
            yield f"{record.node} leads in term {record.term}, after term {self._term}"
        self._term = record.term

    def wait_healthy(self) -> None:
        """Let time pass until all managers are healthy.  A timeout is a violation."""
        until = self.loop.time() + LED_S
        while lacking := list(self._unhealthy()):
            if self.loop.time() > until:
                self.note(lacking)
                return
            self.run_for(LOOK_S)

    def _unhealthy(self) -> Iterable[str]:
        """Yield the unhealthy parts after the end of all faults."""
        if not any(manager.leads for manager in self.managers.values()):
            yield f"no leader {LED_S} s after the end of all faults"
        if silent := [id for id, manager in self.managers.items() if manager.store is None]:
            yield f"{silent} serve nothing"
        view = self.committed.view
        if waiting := [one.id for one in view.find(Payload) if one.id.startswith(WANT) and not one.data]:
            yield f"{waiting} have no number"

    def slow_for_long(self) -> None:
        """Make every disk slow for a while.  Writes must still be committed and numbers allocated."""
        took_s = self.random.choice(SLOWNESS_S)
        self.log(f"fault: every entry takes {took_s} s")
        for member in self.raft.members.values():
            member.stall_s = took_s
        before = {one.id for one in self.committed.view.find(Payload)}
        began = self.loop.time()
        while self.loop.time() < began + SLOW_FOR_S:
            self.do(_without_errors(self._want()))
            self.run_for(1.0)
        wanted = [one for one in self.committed.view.find(Payload) if one.id not in before]
        if not wanted:
            self.note([f"nothing was written in {SLOW_FOR_S} s, though an entry takes only {took_s} s"])
        elif not any(one.data for one in wanted):
            self.note([f"no number was given in {SLOW_FOR_S} s, though an entry takes only {took_s} s"])
        for member in self.raft.members.values():
            member.stall_s = 0.0
        self.wait_healthy()

    def _finish(self) -> None:
        """Wait for all requests, and check that every manager can write and read."""
        self.do(self._wait_for_requests())
        for id in self.ids:
            store = self.managers[id].store
            try:
                self.do(self._written_by(store))
            except TimeoutError:
                self.note([f"{id} cannot write within {WRITTEN_S} s"])

    async def _written_by(self, store: EtcdStore | None) -> None:
        async with asyncio.timeout(WRITTEN_S):
            while True:
                before = len(self.written)
                await self._swap(store)
                if len(self.written) > before:
                    return
                await asyncio.sleep(LOOK_S)

    async def _wait_for_requests(self) -> None:
        while self._requests:
            await asyncio.wait(self._requests)

    async def _check_all(self) -> None:
        """Check that replicas and watchers match the committed state, and that no state of finished writes is left."""
        for id in self.ids:
            manager = self.managers[id]
            if manager.store is None:
                continue
            await manager.store.barrier()
            await asyncio.sleep(0)
            self.note(replica_violations(id, cast("State", manager.store.view()), self.committed.view))
            self.note(
                f"the watch of {id} {text}" for text in manager.watcher.differences(self.committed.view)
            )
            self.note(f"the store of {id} {text}" for text in kept_of_writes(manager.store))

    # -- time ----------------------------------------------------------------------------------------------------------

    def run_for(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.do(asyncio.sleep(seconds))

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Let time pass until ``work`` is done.  Raises: the error of ``work``, or of a manager meanwhile."""
        result = self.loop.run_until_complete(work)
        for manager in self.managers.values():
            if manager.task is not None and manager.task.done():
                manager.task.result()
        return result


def _without(tx: Transaction, id: TaskId) -> None:
    tx.delete(Task, id)


def _network(id: NetworkId) -> Network:
    return Network(id=id, spec=NetworkSpec(name=id))


def _networks(tx: Transaction) -> None:
    for id in NETWORKS:
        tx.put(_network(NetworkId(id)))


def _number_violations(new: Payload, change: Change, view: View) -> Iterable[str]:
    same = [one.id for one in view.find(Payload) if one.id.startswith(WANT) and one.data == new.data]
    if len(same) > 1:
        yield f"{same} all have the number {new.data.decode()}"
    if change.leader != change.origin:
        yield f"{change.origin} gave {new.id} a number, while {change.leader} leads"


async def _without_errors(work: Awaitable[None]) -> None:
    try:
        await work
    except (Unavailable, InUse, NotFound):
        pass
