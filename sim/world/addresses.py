"""Failover addresses in the kernels of simulated machines, and which machine has each of them in truth.

A kernel drops an address by itself, on the machine's clock and up to ``KERNEL_LATE_S`` late, whatever its processes do.
"""

import asyncio
from collections.abc import Callable, Iterable
from random import Random

from sim.world.time import VirtualClock
from skep.model.networks.failover import KERNEL_LATE_S, KERNEL_S, AddressOrder
from skep.model.values.ids import NodeId

USUALLY_LATE_S = 0.27
"""Seconds by which real kernels usually drop an address late, as measured."""
LATE_SHARE = 0.1
"""Share of cases in which a kernel is as late as it can be.  More than on machines, so that runs meet them."""


class AddressTruth:
    """The machines that have each address."""

    def __init__(self, loop: asyncio.AbstractEventLoop, report: Callable[[str], None]) -> None:
        """``report`` is called if two machines have one address."""
        self.moves: list[tuple[float, str, NodeId]] = []
        """Times at which addresses were added, with the machines."""
        self._loop = loop
        self._report = report
        self._until: dict[str, dict[NodeId, float]] = {}

    def extend(self, address: str, node_id: NodeId, until: float) -> bool:
        """Let a machine have an address until a time of the loop.  Return whether it was added."""
        now, machines = self._loop.time(), self._until.setdefault(address, {})
        for other, other_until in sorted(machines.items()):
            if other != node_id and other_until > now:
                self._report(
                    f"{node_id} has {address} while {other} has it for {other_until - now:.3f} s more"
                )
        is_added = machines.get(node_id, now) <= now
        machines[node_id] = until
        if is_added:
            self.moves.append((now, address, node_id))
        return is_added

    def drop(self, address: str, node_id: NodeId) -> None:
        """Remove an address from a machine."""
        self._until.get(address, {}).pop(node_id, None)

    def lose(self, node_id: NodeId) -> None:
        """Remove all addresses from a machine without power."""
        for machines in self._until.values():
            machines.pop(node_id, None)

    def holders(self, address: str) -> Iterable[NodeId]:
        """Return the machines that have an address now."""
        now = self._loop.time()
        return [id for id, until in sorted(self._until.get(address, {}).items()) if until > now]


class SimulatedAddresses:
    """The addresses of one machine.  Implements ``agent.session.address_stream.AddressKernel``."""

    def __init__(
        self,
        node_id: NodeId,
        truth: AddressTruth,
        clock: VirtualClock,
        random: Random,
        *,
        always_late: bool = False,
    ) -> None:
        """``always_late``: whether the kernel is as late as it can be."""
        self._always_late = always_late
        self.release_s = 0.0
        """Seconds for which the hook of a released address runs."""
        self._node_id = node_id
        self._truth = truth
        self._clock = clock
        self._random = random

    async def hold(self, order: AddressOrder, is_allowed: Callable[[], bool]) -> bool:
        """Add the address or extend its lifetime.  Return whether it was added."""
        if not is_allowed():
            return False
        is_late = self._always_late or self._random.random() < LATE_SHARE
        late_s = KERNEL_LATE_S if is_late else USUALLY_LATE_S * self._random.random()
        until = self._clock.loop_time_after(KERNEL_S + late_s)
        return self._truth.extend(order.address, self._node_id, until)

    async def drop(self, order: AddressOrder) -> bool:
        """Remove the address.  Return True."""
        self._truth.drop(order.address, self._node_id)
        return True

    def took(self, order: AddressOrder, left_s: Callable[[], float]) -> None:
        """Announce nothing."""

    async def release(self, order: AddressOrder, left_s: Callable[[], float]) -> None:
        """Take as long as a hook, at most as long as the lease lasts."""
        end_at = self._clock.monotonic() + self.release_s
        while (seconds := min(end_at - self._clock.monotonic(), left_s())) > 0:
            await self._clock.sleep(seconds)
