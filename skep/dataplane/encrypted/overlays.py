"""The node's encrypted networks: what the overlay and the managers say becomes the forwarder's plan.

Used by the overlay like this, whenever a network's table or place changes::

    if reason := encrypted.refusal(table.head):         # before a container is attached
        raise FailedPrecondition(reason)
    encrypted.carry(table, namespace)                    # instead of VXLAN devices
    ...                                                  # the bridge gets ``devices(table.head)`` as ports when they
                                                         # appear: learning off, MTU ``encrypted.mtu``
    encrypted.drop(network_id)                           # with the network's namespace
    encrypted.restored()                                 # once, when those of an earlier node process are carried

Nothing waits here: the plan is applied by ``run``, again and again until it is.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.guard import report
from skep.dataplane.encrypted.forwarder import Status
from skep.dataplane.encrypted.frames import inner_mtu
from skep.dataplane.encrypted.methods import Refusal, refusal_for
from skep.dataplane.encrypted.plan import Plan, device_of, plan_of, planned_segments
from skep.model.ids import NetworkId, NodeId
from skep.model.pair_keys import KeysTold, Method, NodeKeys, after
from skep.model.tables import NetworkHead, Table

log = structlog.get_logger(__name__)

RETRY_S_MAX = 5.0


class Process(Protocol):
    """The supervised forwarder process (``supervision.supervisor.Supervisor``)."""

    async def run(self) -> None: ...


class Carrier(Protocol):
    """Who has plans done (``ForwarderClient``)."""

    async def apply(self, plan: Plan) -> Status: ...


class Encryption(Protocol):
    """What the overlay asks for (``EncryptedOverlays``)."""

    def refusal(self, head: NetworkHead) -> str: ...

    def place(self, node: NodeId, address: str, underlay_mtu: int) -> None: ...

    def carry(self, table: Table, namespace: Path) -> None: ...

    def drop(self, network: NetworkId) -> None: ...

    def restored(self) -> None: ...


class NoEncryption:
    """Of who carries plain networks only."""

    def refusal(self, head: NetworkHead) -> str:
        return f"network {head.name} is encrypted, and nobody encrypts here" if head.is_encrypted else ""

    def place(self, node: NodeId, address: str, underlay_mtu: int) -> None:
        pass

    def carry(self, table: Table, namespace: Path) -> None:
        pass

    def drop(self, network: NetworkId) -> None:
        pass

    def restored(self) -> None:
        pass


class EncryptedOverlays:
    """All of one node.

    Args:
        forwarder: its process, which is started with the first encrypted network and not before.
        is_running: whether a forwarder of an earlier node process runs: that is adopted at once.
    """

    def __init__(
        self,
        method: Method | Refusal,
        client: Carrier,
        forwarder: Process,
        *,
        is_running: Callable[[], bool],
        clock: Clock,
        chance: Callable[[], float],
    ) -> None:
        self._method = method
        self._client = client
        self._forwarder = forwarder
        self._is_running = is_running
        self._clock = clock
        self._chance = chance
        self._node = NodeId("")
        self._address = ""
        self._underlay_mtu = 1500
        self._keys = NodeKeys()
        self._are_keys_told = False
        self._is_restored = False
        self._networks: dict[NetworkId, tuple[Table, Path]] = {}
        self._changed = asyncio.Event()
        self._is_wanted = asyncio.Event()

    @property
    def mtu(self) -> int:
        """Of encrypted networks' interfaces, unless the user wished another."""
        return inner_mtu(self._underlay_mtu, is_ipv6=":" in self._address)

    def refusal(self, head: NetworkHead) -> str:
        """Why a task on this network cannot run here; empty: it can."""
        return refusal_for(head.name, self._method) if head.is_encrypted else ""

    def place(self, node: NodeId, address: str, underlay_mtu: int) -> None:
        """Which node this is, and where on the underlay."""
        if (node, address, underlay_mtu) != (self._node, self._address, self._underlay_mtu):
            self._node, self._address, self._underlay_mtu = node, address, underlay_mtu
            self._changed.set()

    def told(self, told: KeysTold) -> None:
        """A manager tells keys."""
        self._keys = after(self._keys, told)
        self._are_keys_told = True
        self._changed.set()

    def carry(self, table: Table, namespace: Path) -> None:
        """Carry this encrypted network, whose namespace exists, as its table says; not if this node refuses it."""
        assert table.head.is_encrypted, "others have VXLAN"
        if self.refusal(table.head):
            return
        if self._networks.get(table.head.id) != (table, namespace):
            self._networks[table.head.id] = (table, namespace)
            self._is_wanted.set()
            self._changed.set()

    def drop(self, network: NetworkId) -> None:
        """Carry it no more.  Harmless when it is not carried."""
        if self._networks.pop(network, None) is not None:
            self._changed.set()

    def plan(self) -> Plan:
        """What the forwarder is to do now."""
        tables = [table for table, _ in self._networks.values()]
        segments = [
            segment
            for table, namespace in self._networks.values()
            for segment in planned_segments(table, self._node, str(namespace))
        ]
        return plan_of(
            self._node, tables, self._keys, segments, address=self._address, mtu=self._underlay_mtu
        )

    def restored(self) -> None:
        """All networks of an earlier node process are carried again: what is not, is wanted no more."""
        self._is_restored = True
        self._changed.set()

    async def run(self) -> None:
        """Keep the forwarder running and its plan up to date, until cancelled."""
        if not self._is_running():
            await self._is_wanted.wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._forwarder.run(), name="forwarder")
            await self._keep()

    async def _keep(self) -> None:
        backoff = Backoff(0.1, RETRY_S_MAX, chance=self._chance)
        applied: Plan | None = None
        while True:
            self._changed.clear()
            # One that was adopted goes on with the plan it has until all that belongs into the next is known.
            is_whole = self._is_restored and self._are_keys_told
            if self._address and (is_whole or not self._is_running()):
                try:
                    plan = self.plan()
                    if plan != applied:
                        status = await self._client.apply(plan)
                        applied = plan
                        _say_trouble(status)
                    backoff.reset()
                except Exception as error:  # containers of plain networks go on, whatever it is
                    report(error, "encrypted networks not carried, trying again")
                    applied = None
                    await backoff.sleep(self._clock)
                    continue
            await self._changed.wait()


def devices(head: NetworkHead) -> tuple[str, ...]:
    """Names of the devices that carry an encrypted network, in its namespace: its bridge's ports."""
    return tuple(device_of(segment) for segment in head.segments)


def _say_trouble(status: Status) -> None:
    for vni, reason in status.trouble.items():
        log.warning("encrypted segment has no device yet", vni=vni, reason=reason)
