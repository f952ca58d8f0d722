"""A simulated manager: the production store, dispatcher, link and control loops on a simulated etcd member."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from random import Random
from typing import Concatenate, ParamSpec, TypeVar, cast

from sim.world.network import Network
from sim.world.software import FailingTerm, StaleStore
from sim.world.versions import write_newer_fields
from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import SkepError, Unavailable
from skep.manager.autoscaling.waking import Wakes
from skep.manager.control.quotas import check_quota
from skep.manager.control_loops.loops import Loop, loops
from skep.manager.discovery.loop import Discovery
from skep.manager.dispatcher.loop import Dispatcher
from skep.manager.dispatcher.node_sessions.adoption import SessionAdoption
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer
from skep.manager.eviction.loop import Evictions
from skep.manager.failover.keeper import FailoverKeeper
from skep.manager.journal.loop import Journal
from skep.manager.link.loop import ManagerLink
from skep.manager.logbroker.broker import LogBroker
from skep.manager.manager_status import ManagerStatusWriter
from skep.manager.membership.consensus import Consensus
from skep.manager.membership.loop import ManagerReconciler
from skep.manager.peer_reports import PeerReports
from skep.manager.queries.board import AskedQuery
from skep.manager.queries.node_questions import commanded_service, commanded_tasks
from skep.manager.storage.keys import StoreKeys, WrappingKeys
from skep.manager.storage.store_space import StoreSpace
from skep.manager.telemetry.task_usages import TaskUsages
from skep.manager.volumes.driver_calls import FindDriver, no_drivers
from skep.model.node import NodeRole
from skep.model.task import Task
from skep.model.values.ids import ClusterId, IdSource, NodeId
from skep.security.identity import NodeIdentity
from skep.store.etcd.client import EtcdClient
from skep.store.etcd.membership import RaftMembers
from skep.store.etcd.process.member import EtcdMember
from skep.store.etcd.store import EtcdStore, store_on
from skep.store.interface import LoopStore, NotLeader, Object, Store, Term, Transaction, View, Watch
from skep.wire.client import ManagerChannel

R = TypeVar("R")
Item = TypeVar("Item")
P = ParamSpec("P")


class SimulatedManager:
    """One manager process.  Simulated users call the control functions on ``store`` while that is not None."""

    def __init__(
        self,
        id: NodeId,
        addr: str,
        client: EtcdClient,
        wrapping_key: bytes,
        network: Network,
        *,
        clock: Clock,
        new_id: IdSource,
        random: Random,
        poisoned: set[str],
        is_newer: bool = False,
        find_driver: FindDriver | None = None,
    ) -> None:
        """Create a manager process, which ``run`` starts.

        Args:
            poisoned: Services for which every decision raises an error.  The set may change at any time.
            is_newer: whether it runs a newer version than the others.
            find_driver: returns the driver of cluster volumes on its machine.  If None, the machine has no driver, and
                the manager keeps no journal and evicts no node.
        """
        self._is_newer = is_newer
        self._find_driver = find_driver
        self._journal: Journal | None = None
        self.store: EtcdStore | None = None
        """The loaded store, or None before the first load."""
        self.members: Consensus
        """Members of the store, set at its first load."""
        self._shown: StaleStore | None = None
        """The store that the dispatcher reads."""
        self.dispatcher: Dispatcher | None = None
        self.logs: LogBroker | None = None
        self.leads = False
        self.loops: Sequence[Loop] = ()
        """Control loops of the current term.  Empty while the manager does not lead."""
        self.writes = 0
        """Number of updates by these loops that are in progress."""
        self.visited = 0
        """Number of objects that these loops have looked up in the store."""
        self.id = self._id = id
        self._addr = addr
        self._client = client
        self._wrapping_key = wrapping_key
        self._network = network
        self._clock = clock
        self._new_id = new_id
        self._random = random
        self._poisoned = poisoned

    async def run(self) -> None:
        """Serve nodes, and lead when elected, until cancelled.  Waits for the store while there is no quorum."""
        backoff = Backoff(0.1, 1.0, rng=self._random.random)
        while True:
            try:
                members = RaftMembers(self._client, cast("EtcdMember", NoProcess()))
                await members.count()
                async with store_on(
                    *(self._client, self._id, self._wrapping_key, self._clock),
                    rng=self._random.random,
                    is_only_member=members.is_only_member,
                ) as store:
                    self.store = store
                    await self._serve(store, members)
            except Unavailable:
                assert self.store is None, "a part of the manager failed"
                await backoff.sleep(self._clock)
            finally:
                self.store = None

    def serve_stale_state(self, past: View) -> bool:
        """Send nodes the complete state of ``past`` from now on.  Return whether the dispatcher is running."""
        if self.store is None or self._shown is None or self.dispatcher is None:
            return False
        present = self.store.view()
        self._shown.past = past
        for session in self.dispatcher.sessions.all():
            session.wake_assignments([task.id for task in present.find(Task, node_id=session.node_id)])
        return True

    async def _serve(self, store: EtcdStore, members: RaftMembers) -> None:
        if self._is_newer:
            write_newer_fields(store.cipher)
        own, reports = ManagerPeer(node_id=self._id, addr=self._addr), PeerReports()
        self._shown = StaleStore(store)
        dispatcher = self.dispatcher = Dispatcher(
            cast("Store", self._shown), own, self._clock, self._new_id, self._random, reports=reports
        )
        logs = self.logs = LogBroker(store, self._new_id, self._clock)
        discovery = Discovery(store, self._id, dispatcher.session, self._clock)
        addresses = FailoverKeeper(
            store,
            self._id,
            dispatcher.session,
            self._clock,
            lambda services: frozenset(s.id for s in services),
        )
        link = ManagerLink(store, self._id, self._connect, self._clock, self._random, reports=reports)
        self.members = members
        space = StoreSpace(store, self._id, self.members, link.channel, self._clock)
        usages = TaskUsages(store, self._id, dispatcher.measured, link.channel)
        presence = ManagerStatusWriter(store, self._id, self._addr, "", self._clock, self._random)
        if self._find_driver is not None:
            # The journal has its own random source, so that its draws do not affect the rest of the manager.
            self._journal = Journal(store, self._id, self._clock, Random(f"journal of {self._id}"))
        handlers = (
            *dispatcher.services(),
            *discovery.services(),
            *logs.services(),
            *addresses.services(),
            *Wakes(store, dispatcher.session, self._clock, check_quota).services(),
            *link.services(),
            *space.services(),
        )
        async with self._network.listening(self._addr, handlers), asyncio.TaskGroup() as group:
            group.create_task(dispatcher.run(), name=f"{self._id} dispatcher")
            group.create_task(discovery.run(), name=f"{self._id} discovery")
            group.create_task(addresses.run(), name=f"{self._id} addresses")
            group.create_task(link.run(), name=f"{self._id} link")
            group.create_task(presence.run(), name=f"{self._id} presence")
            if self._journal is not None:
                group.create_task(self._journal.run(), name=f"{self._id} journal")
            group.create_task(self._stand(store, link, usages, space, presence), name=f"{self._id} election")

    def _connect(self, addr: str, *, bounds: object = None) -> AbstractAsyncContextManager[ManagerChannel]:
        """Connect to another manager.  Simulated connections have no bounds."""
        identity = NodeIdentity(node_id=self._id, cluster_id=ClusterId("sim"), role=NodeRole.MANAGER)
        # A ``MemoryChannel`` has the methods of a ``ManagerChannel``.
        return cast("AbstractAsyncContextManager[ManagerChannel]", self._network.connect(addr, identity))

    async def _stand(
        self,
        store: EtcdStore,
        link: ManagerLink,
        usages: TaskUsages,
        space: StoreSpace,
        presence: ManagerStatusWriter,
    ) -> None:
        async for term in store.terms(self._id, self._addr):
            self.leads = True
            presence.lead(term)
            try:
                await self._lead(term, store.incarnation, link, usages, space)
            except* NotLeader:
                pass  # wait for the next term
            finally:
                self.leads = False
                presence.lead(None)

    async def _lead(
        self, term: Term, incarnation: int, link: ManagerLink, usages: TaskUsages, space: StoreSpace
    ) -> None:
        state = FailingTerm(_Counted(term, self), self._poisoned, self._visit)
        adoption = SessionAdoption(term, self._id, link.silent, self._clock, self._new_id, self._random)
        assert self.dispatcher is not None, "it serves"
        managers = ManagerReconciler(term, self._id, self.members, link, self._clock, self._random)
        control = loops(
            state,
            self._clock,
            self._new_id,
            self._random,
            incarnation,
            find_driver=self._find_driver or no_drivers,
            confirm=term.confirm,
            collect_usages=usages.collect,
            ask=self._ask,
            ask_doors=self._network.ask_doors,
            publish_answers=self.dispatcher.measured.publish,
            send=self._network.notify,
        )
        own = self.loops = (*control, adoption, managers)
        try:
            async with asyncio.TaskGroup() as group:
                running = [
                    group.create_task(loop.run(), name=f"{self._id} {type(loop).__name__}") for loop in own
                ]
                running.append(group.create_task(space.keep(), name=f"{self._id} store's space"))
                if self._journal is not None:
                    running.append(
                        group.create_task(self._journal.lead(term), name=f"{self._id} journal's leader")
                    )
                    evictions = self._evictions(term, link)
                    running.append(group.create_task(evictions.run(), name=f"{self._id} evictions"))
                await term.wait_lost()
                for task in running:
                    task.cancel()
        finally:
            self.loops = ()

    async def _ask(self, asked: AskedQuery) -> float:
        if asked.query.command:
            assert self.store is not None, "it leads"
            view = self.store.view()
            commanded_tasks(view, commanded_service(view, asked))
        return await self._network.ask(asked)

    def _visit(self, number: int) -> None:
        self.visited += number

    def _evictions(self, term: Term, link: ManagerLink) -> Evictions:
        assert self.store is not None, "it leads"
        keys = StoreKeys(self.store, cast("WrappingKeys", _NoDisk()))
        random = Random(f"evictions of {self._id}")
        return Evictions(term, self._id, keys, link.channel, self._clock, self._new_id, random)


class _NoDisk:
    """Stands for the wrapping keys on a manager's disk.  A simulated manager has none."""

    async def add(self, key: bytes) -> None:
        """Ignore the key."""


class _Counted:
    """A term that counts the updates in progress."""

    def __init__(self, term: LoopStore, manager: SimulatedManager) -> None:
        self._term = term
        self._manager = manager

    def view(self) -> View:
        return self._term.view()

    def watch(self, *kinds: type[Object]) -> AbstractAsyncContextManager[Watch]:
        return self._term.watch(*kinds)

    async def update(
        self, body: Callable[Concatenate[Transaction, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        self._manager.writes += 1
        try:
            return await self._term.update(body, *args, **kwargs)
        finally:
            self._manager.writes -= 1

    async def update_each(
        self, body: Callable[[Transaction, Item], R], items: Iterable[Item], /
    ) -> Sequence[R | SkepError]:
        self._manager.writes += 1
        try:
            return await self._term.update_each(body, items)
        finally:
            self._manager.writes -= 1


class NoProcess:
    """Stands for the etcd process in ``RaftMembers``."""

    async def expect_others(self) -> None:
        """A simulated member has the same timers alone and among several."""
