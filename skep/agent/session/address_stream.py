"""Failover addresses on this node.  Addresses that a manager has confirmed are in the kernel, and no others.

An address is only added after a manager has confirmed a renewal, and the time counts from when that renewal was sent.
The kernel gets a lifetime of a second, which each confirmation renews.  So it drops the address by itself if the node
is cut off from the managers, or if this process hangs or is killed.  Nothing remains that a later process would have to
clean up.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

import structlog

from skep.aio.clock import Clock
from skep.aio.event import Event
from skep.aio.race import is_set_within, wait_first
from skep.errors import SkepError, Unavailable
from skep.model.networks.failover import (
    ADDRESSES_MAX,
    ANSWER_S_MAX,
    KERNEL_EARLY_S,
    KERNEL_S,
    RENEWAL_S,
    STOPS,
    AddressOrder,
)
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import ManagerChannel, StreamCall

log = structlog.get_logger(__name__)

MISSED_MAX = 2
"""Renewals without a sign of the manager after which the node switches to another manager.

The third renewal then still reaches another manager before the kernel drops the address.
"""
SENT_KEPT = 64
"""Renewals whose time of sending is kept.  A confirmation of an earlier one would be too late anyway."""
SERVES_S_MAX = 5.0
"""Longest wait in seconds of a new address for this node's proxy, whose container runs before it has its routes.

Clients repeat their packets meanwhile, and would be refused otherwise.  Afterwards, the address is held all the same,
because an image of HAProxy without its sockets may serve as well.
"""
GIVEN_UP_S_MAX = 0.5
"""Longest wait in seconds of a planned stop for the managers to record that the addresses are free."""


class AddressKernel(Protocol):
    """Addresses of this machine's interfaces (``dataplane.failover.interfaces``)."""

    async def hold(self, order: AddressOrder, is_allowed: Callable[[], bool]) -> bool:
        """Add the address for ``KERNEL_S``, or extend its lifetime.  Return whether it was added.

        Nothing is left behind if ``is_allowed`` returns False right before or right after that.

        Raises: SkepError: this machine cannot hold it.
        """

    async def drop(self, order: AddressOrder) -> bool:
        """Remove the address if it is there.  Return whether it is certainly removed."""

    def took(self, order: AddressOrder, left_s: Callable[[], float]) -> None:
        """Announce an added address to the neighbors, and run the hook.  Returns at once.

        Both end when ``left_s()``, the seconds that are left of the lease, is no longer positive.
        """

    async def release(self, order: AddressOrder, left_s: Callable[[], float]) -> None:
        """Wait until a dropped address is certainly removed, and run its hook, which ends with the lease."""


class HeldAddresses:
    """The failover addresses of this node.  Lives as long as the node process."""

    def __init__(
        self,
        kernel: AddressKernel,
        since_boot: Callable[[], float],
        serves: Callable[[], bool] = lambda: True,
    ) -> None:
        """Make the addresses, none at first.

        Args:
            since_boot: Returns the seconds since boot, including the time while the machine is suspended.
            serves: Returns whether this node's proxy has its routes and certificates.
        """
        self._kernel = kernel
        self._since_boot = since_boot
        self._serves = serves
        self.changed = Event()
        """Set when a report is due at once."""
        self._is_wanted = asyncio.Event()
        self._is_stopping = False
        self._orders: dict[str, AddressOrder] = {}
        self._confirmed_at: dict[tuple[str, int], float] = {}
        """When the last confirmed renewal was sent, by address and epoch."""
        self._waits_since: dict[tuple[str, int], float] = {}
        """When each address could first be held, by address and epoch."""
        self._held_at: dict[tuple[str, int], float] = {}
        """Since when the kernel counts the present lifetime, by address and epoch."""
        self._gone: dict[tuple[str, int], str] = {}
        """Released addresses with their epochs and reasons, as long as they are ordered."""
        self._leaving: dict[tuple[str, int], asyncio.Task[None]] = {}
        """Hooks that run before an address counts as given up."""
        self._sent: dict[int, float] = {}
        self._number = 0
        self._writing = asyncio.Lock()
        self._are_free = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Run hooks until cancelled, and then drop all addresses."""
        try:
            async with asyncio.TaskGroup() as self._group:
                await asyncio.Event().wait()
        finally:
            self._group = None
            for order in self._orders.values():
                await self._kernel.drop(order)

    def want(self, is_wanted: bool) -> None:
        """Set whether this node may be named for addresses, because it runs the front door."""
        (self._is_wanted.set if is_wanted else self._is_wanted.clear)()

    async def wait_wanted(self) -> None:
        """Wait until this node may be named."""
        await self._is_wanted.wait()

    async def give_up(self) -> None:
        """Give all addresses up before a planned stop.  Returns when the managers know it, or after a short time."""
        self._is_stopping = True
        async with self._writing:
            for order in tuple(self._orders.values()):
                await self._leave(order, STOPS)
        if self._orders and not await is_set_within(self._are_free, GIVEN_UP_S_MAX):
            log.warning("failover addresses given up, but no manager has recorded it")

    def next_report(self) -> skep.AddressReport | None:
        """Return the next report, or None without addresses."""
        ordered = {(one.address, one.epoch): one for one in self._orders.values()}
        if not ordered:
            return None
        self._number += 1
        self._sent[self._number] = self._since_boot()
        self._sent.pop(self._number - SENT_KEPT, None)
        renewed = [key for key in ordered if key not in self._gone]
        return skep.AddressReport(
            number=self._number,
            renewed=[skep.AddressEpoch(address=address, epoch=epoch) for address, epoch in renewed],
            released=[
                skep.AddressEpoch(address=address, epoch=epoch, error=reason)
                for (address, epoch), reason in self._gone.items()
            ],
        )

    async def take(self, message: skep.AddressOrders) -> None:
        """Apply a manager's message: drop the addresses of other nodes, and hold the confirmed ones."""
        async with self._writing:
            before, self._orders = self._orders, {one.address: one for one in _orders(message)}
            for address, order in before.items():
                if address not in self._orders:
                    await self._kernel.drop(order)
            if (sent_at := self._sent.get(message.confirmed)) is not None:
                for held in message.held:
                    key = held.address, held.epoch
                    self._confirmed_at[key] = max(self._confirmed_at.get(key, sent_at), sent_at)
            self._forget(one for one in self._orders.values())
            for order in self._orders.values():
                key = order.address, order.epoch
                if order.is_leaving or self._is_stopping:
                    await self._leave(order, STOPS if self._is_stopping else "")
                elif (former := before.get(order.address)) is None or former.epoch != order.epoch:
                    self.changed.set()  # it is new, so it is renewed at once
            await self._hold_confirmed()
            if self._orders:
                self._are_free.clear()
            else:
                self._are_free.set()

    async def extend(self) -> None:
        """Extend the lifetimes of all addresses whose last confirmation allows it."""
        async with self._writing:
            await self._hold_confirmed()

    async def _hold_confirmed(self) -> None:
        for order in self._orders.values():
            key = order.address, order.epoch
            if order.is_leaving or key in self._gone or key in self._leaving or not self._is_fresh(key):
                continue
            if key not in self._held_at and self._must_wait(key):
                continue
            left_s, now = partial(self._held_s, key), self._since_boot()
            is_over = left_s() <= 0  # the kernel may be late and still have it, but nothing announces it
            try:
                is_added = await self._kernel.hold(order, partial(self._is_fresh, key))
                if self._is_fresh(key):
                    self._held_at[key] = now
                if is_added or (is_over and left_s() > 0):
                    log.info("failover address held", address=order.address, epoch=order.epoch)
                    self._kernel.took(order, left_s)
            except SkepError as error:
                log.warning("failover address refused", address=order.address, reason=str(error))
                await self._leave(order, str(error))

    def _must_wait(self, key: tuple[str, int]) -> bool:
        """Return whether a new address waits for the proxy."""
        now = self._since_boot()
        return not self._serves() and now - self._waits_since.setdefault(key, now) < SERVES_S_MAX

    def _is_fresh(self, key: tuple[str, int]) -> bool:
        """Return whether an address may get a further lifetime in the kernel."""
        sent_at = self._confirmed_at.get(key)
        return sent_at is not None and self._since_boot() - sent_at <= ANSWER_S_MAX

    def _held_s(self, key: tuple[str, int]) -> float:
        """Return the seconds for which the kernel certainly has an address, or less than 0."""
        held_at = self._held_at.get(key, float("-inf"))
        return held_at + KERNEL_S - KERNEL_EARLY_S - self._since_boot()

    def _released_s(self, key: tuple[str, int]) -> float:
        """Return the seconds for which no other node is named for an address that this node releases."""
        sent_at = self._confirmed_at.get(key, float("-inf"))
        return sent_at + ANSWER_S_MAX + KERNEL_S - self._since_boot()

    async def _leave(self, order: AddressOrder, reason: str) -> None:
        """Drop an address for good.  It counts as given up once its hook has ended."""
        key = order.address, order.epoch
        if key in self._gone or key in self._leaving:
            return
        self._held_at.pop(key, None)
        await self._kernel.drop(order)
        log.info("failover address given up", address=order.address, epoch=order.epoch, reason=reason)
        if self._group is None:
            await self._finish(order, reason)
        else:
            self._leaving[key] = self._group.create_task(
                self._finish(order, reason), name="release an address"
            )

    async def _finish(self, order: AddressOrder, reason: str) -> None:
        key = order.address, order.epoch
        try:
            await self._kernel.release(order, partial(self._released_s, key))
        finally:
            self._leaving.pop(key, None)
            self._note_gone(key, reason)

    def _note_gone(self, key: tuple[str, int], reason: str) -> None:
        self._gone[key] = reason
        self.changed.set()

    def _forget(self, orders: Iterable[AddressOrder]) -> None:
        """Forget what concerns earlier epochs."""
        present = {(one.address, one.epoch) for one in orders}
        self._gone = {key: reason for key, reason in self._gone.items() if key in present}
        self._confirmed_at = {key: at for key, at in self._confirmed_at.items() if key in present}
        self._held_at = {key: at for key, at in self._held_at.items() if key in present}
        self._waits_since = {key: at for key, at in self._waits_since.items() if key in present}


class AddressStream:
    """The stream of failover addresses of one session.  Runs once."""

    def __init__(self, channel: ManagerChannel, held: HeldAddresses, clock: Clock) -> None:
        self._channel = channel
        self._held = held
        self._clock = clock
        self._received = 0

    async def run(self, session_id: str) -> None:
        """Renew and apply orders until the stream ends, once this node may be named.

        Raises:
            SkepError: The reason why the stream ended.
            Unimplemented: The manager has no failover addresses.
        """
        await self._held.wait_wanted()
        async with self._channel.stream(methods.ADDRESSES) as call, asyncio.TaskGroup() as group:
            await call.send(skep.AddressReport(session_id=session_id))
            group.create_task(self._renew(call), name="renew addresses")
            async for message in call:
                self._received = message.received
                await self._held.take(message)
            raise Unavailable(f"{self._channel.address} ended the stream of addresses")

    async def _renew(self, call: StreamCall[skep.AddressReport, skep.AddressOrders]) -> None:
        held, missed = self._held, 0
        while True:
            held.changed.clear()
            report = held.next_report()
            if report is None:
                await held.changed.wait()
                continue
            await call.send(report)
            await held.extend()
            due_at = self._clock.monotonic() + RENEWAL_S
            await wait_first(held.changed.wait(), self._clock.sleep(RENEWAL_S))
            if self._clock.monotonic() < due_at:
                continue
            missed = missed + 1 if self._received < report.number else 0
            if missed >= MISSED_MAX:
                raise Unavailable(f"{self._channel.address} does not respond to renewals of addresses")


def _orders(message: skep.AddressOrders) -> Iterator[AddressOrder]:
    """Yield the orders of a manager, limited in number."""
    for one in message.orders[:ADDRESSES_MAX]:
        yield AddressOrder(
            address=one.address,
            prefix=one.prefix,
            interface=one.interface,
            epoch=one.epoch,
            is_leaving=one.leaving,
        )
