"""Managers and nodes with failover addresses on virtual time: real keepers, streams and stores, simulated kernels."""

import asyncio
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from random import Random

from msgspec.structs import replace

from sim.world.addresses import AddressTruth, SimulatedAddresses
from sim.world.links import Links
from sim.world.network import MemoryChannel, Network
from sim.world.time import VirtualClock, VirtualLoop
from skep.agent.session.address_stream import AddressStream, HeldAddresses
from skep.aio.event import Event
from skep.errors import SkepError
from skep.manager.failover.editing import add_address, remove_address, shown_addresses
from skep.manager.failover.keeper import FailoverKeeper
from skep.manager.failover.records import FailoverAddresses, addresses_in
from skep.model.door.settings import DOOR
from skep.model.networks.failover import AddressOrder, AddressRequest, AddressShown
from skep.model.node import Availability, NodeRole
from skep.model.values.ids import ClusterId, NodeId
from skep.security.identity import NodeIdentity
from skep.store.interface import Transaction
from skep.store.level import LEVEL
from skep.store.memory import MemoryCluster, MemoryStore
from skep.wire import skep_pb2 as skep
from tests.support.builders import a_node, a_service, a_service_spec, a_task

ADDRESS = "10.0.0.100"
MANAGERS = ("m1", "m2", "m3")
RECONNECTED_S = 0.1
"""Seconds until a node connects to the next manager, as the agent's first retry."""


class Session:
    """A session of a node with a manager.  Implements ``manager.nodes.node_session.NodeSession``."""

    id = "s"

    def require_open(self) -> None:
        """Do nothing: it is open."""

    @contextmanager
    def signal(self) -> Iterator["Waker"]:
        yield Waker()


class Waker:
    """Implements ``manager.nodes.node_session.StreamWaker``."""

    def __init__(self) -> None:
        self._event = Event()

    def wake(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event.clear()


class FailoverRig:
    """Three managers and some nodes with the front door.  Runs within ``async with``."""

    def __init__(
        self, loop: VirtualLoop, nodes: tuple[str, ...] = ("n1", "n2"), *, seed: int = 0, drift: float = 0.0
    ) -> None:
        """``drift``: largest share by which clocks are fast or slow."""
        self.loop = loop
        self.random = Random(seed)
        self.links = Links()
        self.network = Network(loop, self.links)
        self.cluster = MemoryCluster()
        self.violations: list[str] = []
        self.truth = AddressTruth(loop, self.violations.append)
        self.clocks = {id: self._clock(id, drift) for id in (*MANAGERS, *nodes)}
        self.stores = {id: MemoryStore(self.clocks[id], self.cluster) for id in MANAGERS}
        self.nodes = nodes
        self.held: dict[str, _Process] = {}
        self._processes: dict[str, asyncio.Task[None]] = {}
        self._stack = AsyncExitStack()

    def _clock(self, id: str, drift: float) -> VirtualClock:
        return VirtualClock(
            self.loop,
            drift=1.0 + self.random.choice((-drift, 0.0, drift)),
            began_s=self.random.uniform(0.0, 1000.0),
            wait_running=lambda: self.links.wait_thawed(id),
        )

    async def __aenter__(self) -> "FailoverRig":
        group = await self._stack.enter_async_context(asyncio.TaskGroup())
        await self.stores["m1"].update(self._begin)
        for id in MANAGERS:
            keeper = FailoverKeeper(self.stores[id], NodeId(id), lambda *_: Session(), self.clocks[id])
            await self._stack.enter_async_context(self.network.listening(f"{id}:1", keeper.services()))
            self._processes[id] = group.create_task(keeper.run())
            self._processes[f"term of {id}"] = group.create_task(self._stand(id))
        for id in self.nodes:
            self.start(id, group)
        self._group = group
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.cancel()
        await asyncio.gather(*self._processes.values(), return_exceptions=True)
        await self._stack.aclose()

    def _begin(self, tx: Transaction) -> None:
        tx.raise_level(LEVEL)
        spec = replace(a_service_spec("skep-door", is_global=True), labels={DOOR: "true"})
        door = tx.put(a_service("skep-door", spec=spec))
        for id in self.nodes:
            tx.put(a_node(id))
            tx.put(a_task(f"t-{id}", node=id, service=door, slot=0))

    async def _stand(self, id: str) -> None:
        async for term in self.stores[id].terms(NodeId(id), id):
            await term.wait_lost()

    def start(self, id: str, group: asyncio.TaskGroup | None = None) -> None:
        """Start the node process."""
        self._processes[id] = (group or self._group).create_task(self._run_node(id))

    async def kill(self, id: str) -> None:
        """End a process at once, without any of its clean-up: the kernel keeps the addresses."""
        process = self._processes.pop(id)
        self.held.pop(id).is_killed = True
        process.cancel()
        await asyncio.gather(process, return_exceptions=True)

    async def _run_node(self, id: str) -> None:
        held = self.held[id] = _Process(self, id)
        held.want(True)
        async with asyncio.TaskGroup() as group:
            group.create_task(held.run())
            while True:
                await asyncio.wait([group.create_task(self._attempt(id, held))])
                await self.clocks[id].sleep(RECONNECTED_S * self.random.uniform(0.5, 1.0))

    async def _attempt(self, id: str, held: HeldAddresses) -> None:
        try:
            async with self.connected(id, self.random.choice(MANAGERS)) as channel:
                await AddressStream(channel, held, self.clocks[id]).run("s")  # type: ignore[arg-type]
        except* SkepError:
            pass

    def connected(self, id: str, manager: str) -> AbstractAsyncContextManager[MemoryChannel]:
        """Connect a node to a manager."""
        identity = NodeIdentity(node_id=NodeId(id), cluster_id=ClusterId("c"), role=NodeRole.WORKER)
        return self.network.connect(f"{manager}:1", identity, timeout_s=0.5)

    # -- what tests do --------------------------------------------------------------------------------------------

    async def add(self, address: str = ADDRESS) -> None:
        await self.stores["m1"].update(add_address, AddressRequest(address=f"{address}/24"))

    async def remove(self, address: str = ADDRESS) -> None:
        await self.stores["m1"].update(remove_address, address)

    async def disturb(self) -> None:
        """Let one drawn fault begin or end."""
        draw, id = self.random.random(), self.random.choice(self.nodes)
        manager = self.random.choice(MANAGERS)
        store, faults = self.stores[manager], self.stores[manager].faults
        if draw < 0.2:
            self.links.cut([id], self.random.sample(MANAGERS, self.random.randint(1, 3)))
        elif draw < 0.35:
            self.links.restore()
        elif draw < 0.5:
            (self.links.thaw if self.links.is_frozen(id) else self.links.freeze)(id)
        elif draw < 0.6 and id in self.held:
            await self.kill(id)
        elif draw < 0.7 and id not in self.held:
            self.start(id)
        elif draw < 0.8:
            (store.heal if faults.is_partitioned else store.partition)()
        elif draw < 0.9:
            delay_s = self.random.choice((0.0, 0.01, 0.5))
            faults.delay_s = lambda: delay_s * self.random.random()
            faults.lag_s = self.random.choice((0.0, 0.0, 0.2, 5.0))
        else:
            self.network.slow[id] = self.random.choice((0.0, 0.2, 0.6))

    def settle(self) -> None:
        """End all faults."""
        self.links.restore()
        self.network.slow.clear()
        for id in self.nodes:
            self.links.thaw(id)
            if id not in self.held:
                self.start(id)
        for store in self.stores.values():
            store.faults.lag_s, store.faults.delay_s = 0.0, lambda: 0.0
            store.heal()

    async def drain(self, id: str, availability: Availability = Availability.DRAIN) -> None:
        await self.stores["m1"].update(lambda tx: tx.put(a_node(id, availability=availability)))

    def holder(self, address: str = ADDRESS) -> str:
        """Return the machine that has an address in truth, or an empty text."""
        return next(iter(self.truth.holders(address)), "")

    async def wait_held(self, *but: str, address: str = ADDRESS, within_s: float = 10.0) -> str:
        """Wait until a machine has the address, none of ``but``, and return it."""
        until = self.loop.time() + within_s
        while (found := self.holder(address)) in ("", *but):
            assert self.loop.time() < until, f"{found or 'no machine'} has {address}: {self.violations}"
            await asyncio.sleep(0.005)
        return found

    def record(self) -> FailoverAddresses:
        return addresses_in(self.stores["m1"].view())

    def shown(self) -> list[AddressShown]:
        return shown_addresses(self.stores["m1"].view())


class _Process(HeldAddresses):
    """Held addresses of a process that can be frozen and killed."""

    def __init__(self, rig: FailoverRig, id: str) -> None:
        self._rig = rig
        self._id = id
        self.is_killed = False
        self.kernel = _Kernel(self, rig, id)
        super().__init__(self.kernel, rig.clocks[id].since_boot)

    async def take(self, message: skep.AddressOrders) -> None:
        await self._rig.links.wait_thawed(self._id)
        await super().take(message)

    async def extend(self) -> None:
        await self._rig.links.wait_thawed(self._id)
        await super().extend()


class _Kernel(SimulatedAddresses):
    """The kernel of a machine, to which a killed process sends nothing any longer."""

    def __init__(self, process: _Process, rig: FailoverRig, id: str) -> None:
        super().__init__(NodeId(id), rig.truth, rig.clocks[id], rig.random, always_late=True)
        self._process = process

    async def drop(self, order: AddressOrder) -> bool:
        return not self._process.is_killed and await super().drop(order)
