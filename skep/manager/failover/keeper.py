"""Keeps each failover address on one node, and serves the nodes' streams.  Active on every manager.

Every manager observes the renewals and may name holders, since the store alone decides (``records``).  So an address
moves in time even if the leader's machine was lost as well.  The others wait a moment longer than the leader.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial

import structlog

from skep.aio.clock import Clock
from skep.aio.event import Event
from skep.aio.groups import errors_as_they_are
from skep.aio.race import wait_first
from skep.errors import InvalidArgument, SkepError
from skep.manager.control_loops.informer import run_informer
from skep.manager.failover.decision import (
    Decision,
    DoorNodes,
    Seen,
    decide,
    door_services,
    holders_in,
    observed,
    serves,
)
from skep.manager.failover.records import (
    FailoverAddresses,
    HolderChange,
    addresses_in,
    apply_report,
    change_holder,
    forget_holders,
    is_failover,
    orders_for,
    renewals_in,
)
from skep.manager.nodes.node_session import NodeSession, StreamWaker
from skep.manager.nodes.node_streams import NodeStream, NodeStreams, run_stream, session_named
from skep.model.networks.failover import ADDRESSES_MAX, DRIFT, LEASE_S, RENEWAL_S, AddressOrder
from skep.model.networks.routes import differ_in_routes
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import NodeId, ServiceId
from skep.store.interface import Commit, Created, Deleted, Store, Updated, View
from skep.store.interface import Event as StoreEvent
from skep.store.kinds import Payload
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.service import Handler, duplex

log = structlog.get_logger(__name__)

SECOND_S = 0.3
"""Seconds by which other managers act later than the leader, so that usually only the leader writes."""
RETRY_S = 1.0
"""Seconds after a refused write.  DoorNodes renew meanwhile, as soon as the store accepts writes again."""
WAIT_S_MIN = 0.001
"""Shortest wait in seconds, so that rounded times cause no busy loop."""
WRITTEN_EVERY_S = RENEWAL_S * (1 - 2 * DRIFT)
"""Seconds between two writes of one node's reports: the interval of renewals, by the fastest clock of a node."""
RELEASED_MAX = 2 * ADDRESSES_MAX
"""Releases in one message.  More than any node has addresses."""

Send = Callable[[skep.AddressOrders], Awaitable[None]]


class FailoverKeeper:
    """Names holders, and tells the nodes of this manager which addresses are theirs."""

    def __init__(
        self,
        store: Store,
        own: NodeId,
        session: Callable[[NodeId, str], NodeSession],
        clock: Clock,
        find_doors: Callable[[Iterable[Service]], frozenset[ServiceId]] = door_services,
    ) -> None:
        """Create a keeper.

        Args:
            session: Returns a node's session here by its id, or raises SkepError.
            find_doors: Returns the services whose nodes may hold addresses.
        """
        self._find_doors = find_doors
        self._store = store
        self._own = own
        self._session = session
        self._clock = clock
        self._streams: NodeStreams[_Stream] = NodeStreams("addresses")
        self._doors: frozenset[ServiceId] = frozenset()
        self._nodes: DoorNodes | None = None
        """The nodes that may hold addresses, or None if they may have changed.  Renewals do not change them."""
        self._seen: dict[str, Seen] = {}
        self._restored_at: float | None = None
        """When a record of an earlier incarnation was first seen."""
        self._changed = Event()
        self._paces: dict[NodeId, _Pace] = {}
        self._due_at: dict[tuple[str, int], float] = {}
        """Since when a change is due, by address and epoch."""
        self._not_before = float("-inf")

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (duplex(methods.ADDRESSES, self._addresses),)

    async def run(self) -> None:
        """Keep the addresses until cancelled."""
        await run_informer(
            self._store,
            (Payload, Node, Service, Task),
            on_snapshot=self._on_snapshot,
            on_commit=self._on_commit,
            work=self._work,
        )

    # -- the store ------------------------------------------------------------------------------------------------

    def _on_snapshot(self, view: View) -> None:
        self._doors, self._nodes = self._find_doors(view.find(Service)), None
        self._observe(view)

    def _on_commit(self, commit: Commit) -> None:
        for event in commit.events:
            match event:
                case Created(Payload(id=id)) | Updated(_, Payload(id=id)) | Deleted(Payload(id=id)):
                    if is_failover(id):
                        self._observe(self._store.view())
                case Created(Service()) | Updated(_, Service()) | Deleted(Service()):
                    self._note_service(event)
                case Updated(Node() as old, Node() as new):
                    states = [(one.status.state, one.spec) for one in (old, new)]
                    if states[0] != states[1] or differ_in_routes(old, new):
                        self._note_nodes()
                case Deleted(Node()):
                    self._note_nodes()
                case Created(Task() as task) | Updated(_, Task() as task) | Deleted(Task() as task):
                    if task.service_id in self._doors and _is_decisive(event):
                        self._note_nodes()

    def _note_service(self, event: StoreEvent) -> None:
        one = event.new if isinstance(event, Updated) else event.object
        assert isinstance(one, Service), "the caller has matched it"
        found = self._find_doors((one,)) if not isinstance(event, Deleted) else frozenset()
        if (one.id in self._doors) != bool(found):
            self._doors = (self._doors - {one.id}) | found
            self._note_nodes()

    def _note_nodes(self) -> None:
        self._nodes = None
        self._changed.set()

    def _observe(self, view: View) -> None:
        """Record the signs of holders, and wake all streams."""
        record = addresses_in(view)
        renewals = {one.node_id: renewals_in(view, one.node_id) for one in record.addresses if one.node_id}
        self._seen = observed(self._seen, record, renewals, self._clock.monotonic())
        self._changed.set()
        for stream in self._streams.values():
            stream.signal.wake()

    # -- holders --------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            self._changed.clear()
            try:
                look_at = await self._step()
            except SkepError as error:
                log.warning("failover addresses not written, will retry", reason=str(error))
                look_at = self._not_before = self._clock.monotonic() + RETRY_S
            if look_at is None:
                await self._changed.wait()
            else:
                wait_s = max(look_at - self._clock.monotonic(), WAIT_S_MIN)
                await wait_first(self._changed.wait(), self._clock.sleep(wait_s))

    async def _step(self) -> float | None:
        """Make the changes that are due.  Return when to look again (monotonic time), or None."""
        view, now = self._store.view(), self._clock.monotonic()
        record = addresses_in(view)
        if not record.addresses:
            self._due_at.clear()
            return None
        if now < self._not_before:
            return self._not_before
        if record.incarnation not in (0, self._store.incarnation):
            return await self._forget_former(now)
        self._restored_at = None
        decision = self._decision(view, record, now)
        looks = [decision.look_at] if decision.look_at is not None else []
        wait_s = 0.0 if self._store.leader == self._own else SECOND_S
        keys = {(change.address, change.epoch) for change in decision.changes}
        self._due_at = {key: self._due_at.get(key, now) for key in keys}
        for change in decision.changes:
            due_at = self._due_at[change.address, change.epoch] + wait_s
            if due_at > now:
                looks.append(due_at)
            elif await self._store.update(
                change_holder, change, self._store.incarnation, self._clock.now_ns()
            ):
                self._note(change, record, view)
        return min(looks, default=None)

    def _decision(self, view: View, record: FailoverAddresses, now: float) -> Decision:
        if any(one.node_id and one.address not in self._seen for one in record.addresses):
            self._observe(view)  # the informer has not shown this commit yet
        if self._nodes is None:
            self._nodes = holders_in(view, self._doors)
        return decide(record, self._seen, self._nodes, now, self._clock.now_ns())

    async def _forget_former(self, now: float) -> float | None:
        """Name no holder of a record that was restored, once the leases of its time are certainly over."""
        if self._restored_at is None:
            self._restored_at = now
        if now < self._restored_at + LEASE_S:
            return self._restored_at + LEASE_S
        await self._store.update(forget_holders, self._store.incarnation)
        return None

    def _note(self, change: HolderChange, record: FailoverAddresses, view: View) -> None:
        former = record.get(change.address)
        node = view.lookup(Node, former.node_id) if former is not None and former.node_id else None
        log.info(
            "failover address leaves its node" if change.asks else "failover address has another node",
            address=change.address,
            node=change.node_id,
            former=node.shown_name if node is not None else "",
            is_over=change.is_over,
        )

    # -- streams --------------------------------------------------------------------------------------------------

    async def _addresses(
        self, requests: AsyncIterator[skep.AddressReport], send: Send, caller: Caller
    ) -> None:
        session = self._session(caller.node_id, await session_named(requests))
        orders = partial(orders_for, node_id=caller.node_id, incarnation=self._store.incarnation)
        self._forget_paces()
        with (
            session.signal() as signal,
            self._streams.open(_Stream(caller.node_id, session, signal)) as stream,
        ):
            async with errors_as_they_are(), asyncio.TaskGroup() as group:
                writing = group.create_task(self._write_reports(stream), name="reports of addresses")
                try:
                    await run_stream(
                        stream,
                        requests,
                        stream.receive,
                        stream.send_orders(lambda: orders(self._store.view()), send),
                    )
                finally:
                    writing.cancel()

    async def _write_reports(self, stream: "_Stream") -> None:
        """Write the latest report of a node, once per ``WRITTEN_EVERY_S``, whatever it sends.

        The first renewal and the release of each naming do not wait for that, and managers name holders.
        """
        while True:
            await self._wait_due(stream)
            number, renewed, released = stream.next_report()
            try:
                held = await self._store.update(
                    apply_report,
                    stream.node_id,
                    renewed,
                    released,
                    self._store.incarnation,
                    self._clock.now_ns(),
                )
            except SkepError as error:
                log.warning("addresses of a node not written", node=stream.node_id, reason=str(error))
                stream.keep_released(released)
                continue
            stream.confirm(number, held)

    async def _wait_due(self, stream: "_Stream") -> None:
        """Wait for a report that may be written now, and note that it is."""
        pace = self._paces.setdefault(stream.node_id, _Pace())
        await stream.came.wait()
        while True:
            orders = orders_for(self._store.view(), stream.node_id, self._store.incarnation)
            firsts = stream.named_by(orders) - pace.firsts
            wait_s = pace.due_at - self._clock.monotonic()
            if firsts or wait_s <= 0:
                break
            stream.came.clear()
            await wait_first(stream.came.wait(), self._clock.sleep(wait_s))
        present = {one.epoch for one in orders}
        pace.firsts = {one for one in pace.firsts | firsts if one[0] in present}
        pace.due_at = self._clock.monotonic() + WRITTEN_EVERY_S

    def _forget_paces(self) -> None:
        """Forget nodes without a stream whose next report may be written at once."""
        now = self._clock.monotonic()
        self._paces = {
            id: pace for id, pace in self._paces.items() if id in self._streams or pace.due_at > now
        }


class _Pace:
    """The last writes for one node."""

    def __init__(self) -> None:
        self.due_at = float("-inf")
        self.firsts: set[tuple[int, bool]] = set()
        """Present epochs that were renewed, or released if True, without waiting."""


class _Stream(NodeStream):
    """One node's stream."""

    __slots__ = ("_confirmed", "_held", "_received", "_released", "_renewed", "_sent", "came")

    def __init__(self, node_id: NodeId, session: NodeSession, signal: StreamWaker) -> None:
        super().__init__(node_id, session, signal)
        self._received = self._confirmed = 0
        self._held: Mapping[str, int] = {}
        self._renewed: dict[str, int] = {}
        self._released: dict[tuple[str, int], str] = {}
        self.came = asyncio.Event()
        """Set when there is a report."""
        self._sent: tuple[int, int, tuple[AddressOrder, ...]] | None = None

    def receive(self, message: skep.AddressReport) -> None:
        """Record a node's report.  Later renewals replace earlier ones.  Raises: InvalidArgument: it is too large."""
        if len(message.renewed) > ADDRESSES_MAX or len(message.released) > RELEASED_MAX:
            raise InvalidArgument(f"more than {ADDRESSES_MAX} failover addresses in one report")
        self._received = message.number
        self._renewed = {one.address: one.epoch for one in message.renewed}
        self.keep_released([(one.address, one.epoch, one.error) for one in message.released])
        self.came.set()
        self.signal.wake()

    def named_by(self, orders: Sequence[AddressOrder]) -> set[tuple[int, bool]]:
        """Return the epochs of orders that the last report renews, or releases (True)."""
        epochs = {one.address: one.epoch for one in orders}
        renewed = {(epoch, False) for key, epoch in self._renewed.items() if epochs.get(key) == epoch}
        return renewed | {(epoch, True) for key, epoch in self._released if epochs.get(key) == epoch}

    def next_report(self) -> tuple[int, dict[str, int], list[tuple[str, int, str]]]:
        """Return the last report: its number, its renewals, and all releases that are not written."""
        self.came.clear()
        released = [(*key, reason) for key, reason in self._released.items()]
        self._released = {}
        return self._received, self._renewed, released

    def keep_released(self, released: Sequence[tuple[str, int, str]]) -> None:
        """Keep releases until they are written.  The node repeats them in every report, so they are few."""
        for address, epoch, reason in released:
            if len(self._released) < RELEASED_MAX:
                self._released[address, epoch] = reason

    def confirm(self, number: int, held: Mapping[str, int]) -> None:
        """Confirm the report with this number, which is written and has renewed the epochs in ``held``."""
        self._confirmed, self._held = number, held
        self.signal.wake()

    async def send_orders(self, orders: Callable[[], tuple[AddressOrder, ...]], send: Send) -> None:
        """Send what changes: orders, and the numbers of reports.  Raises: the error that ended the stream."""
        while True:
            self.require_open()
            # The confirmation is read before the orders, so the orders are at least as new.
            state = (self._received, self._confirmed, orders())
            if state != self._sent:
                self._sent = state
                await send(_message(self._held, *state))
            await self.signal.wait()


def _message(
    held: Mapping[str, int], received: int, confirmed: int, orders: Sequence[AddressOrder]
) -> skep.AddressOrders:
    return skep.AddressOrders(
        received=received,
        confirmed=confirmed,
        held=[skep.AddressEpoch(address=address, epoch=epoch) for address, epoch in held.items()],
        orders=[
            skep.AddressOrders.Order(
                address=one.address,
                prefix=one.prefix,
                interface=one.interface,
                epoch=one.epoch,
                leaving=one.is_leaving,
            )
            for one in orders
        ],
    )


def _is_decisive(event: StoreEvent) -> bool:
    """Return whether a task's change may change which nodes run the front door."""
    match event:
        case Updated(Task() as old, Task() as new):
            return serves(old) != serves(new)
        case _:
            return True
