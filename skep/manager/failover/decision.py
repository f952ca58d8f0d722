"""Decides which node holds which failover address.  Pure.

A node that may hold an address loses it in one of two ways.  It is asked, and reports that it has given the address up.
Or it was silent for ``LEASE_S``, after which its kernel has certainly dropped the address.  Only then another node is
named.  An address stays where it is for as long as its node can hold it, so it does not return after a failure.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import msgspec

from skep.manager.failover.records import (
    FailoverAddress,
    FailoverAddresses,
    HolderChange,
    Renewals,
    addresses_in,
)
from skep.model.door.settings import is_door
from skep.model.networks.addresses import parsed
from skep.model.networks.failover import LEASE_S, SILENT, STOPS
from skep.model.networks.routes import Subnet, routes_of
from skep.model.node import Availability, Node, NodeState, takes_tasks
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId
from skep.model.values.times import SECOND_NS
from skep.store.interface import View

REFUSED_S = 30.0
"""Seconds for which a node that refused an address is not named for it again, so that few writes are in vain."""
AWAY_S = 5.0
"""The same for a node that was silent or stops.  After three seconds of silence it counts as down anyway."""


class DoorNodes(msgspec.Struct, frozen=True):
    """The nodes that may hold addresses: they are ready, not drained, and run the front door.

    Attributes:
        subnets: The subnets that each of them reaches, or an empty collection if it has reported none.
        paused: Those that only keep what they have.
    """

    subnets: Mapping[NodeId, Collection[Subnet]] = {}
    paused: frozenset[NodeId] = frozenset()

    def reaches(self, node_id: NodeId, address: FailoverAddress) -> bool:
        """Return whether a node may hold an address, by its subnets.  The node itself decides at last."""
        if node_id not in self.subnets:
            return False
        subnets = self.subnets[node_id]
        ip = parsed(address.address)
        return bool(address.interface) or not subnets or any(ip in one for one in subnets)


class Seen(msgspec.Struct, frozen=True):
    """The last sign of a holder: its naming, or a renewal.

    Attributes:
        at: When this manager has first seen it (monotonic time).
    """

    epoch: int
    renewals: Renewals
    at: float


class Decision(msgspec.Struct, frozen=True):
    """Changes to make now, and when to decide again (monotonic time), or None if nothing ends by time."""

    changes: tuple[HolderChange, ...] = ()
    look_at: float | None = None


def door_services(services: Iterable[Service]) -> frozenset[ServiceId]:
    """Return the services whose tasks are the front door's proxies."""
    return frozenset(one.id for one in services if is_door(one.spec.labels) and one.removed_at is None)


def holders_in(view: View, doors: Iterable[ServiceId]) -> DoorNodes:
    """Return the nodes that may hold addresses.

    While a service cannot be read, it may be the front door, so the present holders keep their addresses.
    """
    running = {
        task.node_id for door in sorted(doors) for task in view.find(Task, service_id=door) if serves(task)
    }
    holding = {one.node_id for one in addresses_in(view).addresses} if view.unreadable(Service) else set()
    nodes = [node for id in sorted(running | holding) if (node := view.lookup(Node, id)) is not None]
    kept = [node for node in nodes if keeps_addresses(node)]
    return DoorNodes(
        {node.id: _subnets(node) for node in kept},
        frozenset(node.id for node in kept if not takes_tasks(node) or node.id not in running),
    )


def serves(task: Task) -> bool:
    """Return whether a proxy's task runs, should, and is not being stopped as unhealthy."""
    return (
        task.desired_state is TaskState.RUNNING
        and task.status.state is TaskState.RUNNING
        and not task.is_failing
    )


def keeps_addresses(node: Node) -> bool:
    """Return whether a node keeps its addresses: it is ready, and not drained."""
    return node.status.state is NodeState.READY and node.spec.availability is not Availability.DRAIN


def _subnets(node: Node) -> Collection[Subnet]:
    return [route.subnet for route in routes_of(node)]


def observed(
    before: Mapping[str, Seen], record: FailoverAddresses, view_of: Mapping[NodeId, Renewals], now: float
) -> dict[str, Seen]:
    """Return the last signs of all holders.  A sign that differs from the one before was seen at ``now``."""
    found: dict[str, Seen] = {}
    for one in record.addresses:
        if one.node_id:
            renewals, last = view_of.get(one.node_id, Renewals()), before.get(one.address)
            is_known = last is not None and (last.epoch, last.renewals) == (one.epoch, renewals)
            found[one.address] = last if last is not None and is_known else Seen(one.epoch, renewals, now)
    return found


def decide(
    record: FailoverAddresses, seen: Mapping[str, Seen], holders: DoorNodes, now: float, now_ns: int
) -> Decision:
    """Return the changes that are due.  ``seen`` has every address with a holder."""
    load = Counter(one.node_id for one in record.addresses if one.node_id)
    silent = {one.node_id for one in record.addresses if one.node_id and _is_over(seen[one.address], now)}
    changes: list[HolderChange] = []
    looks: list[float] = []
    for one in record.addresses:
        free = [
            id
            for id in holders.subnets
            if id != one.node_id and id not in silent | holders.paused and holders.reaches(id, one)
        ]
        waits = {id: _refused_s(one, id, now_ns) for id in free}
        willing = [(load[id], id) for id in free if not waits[id]]
        best = min(willing, default=(0, NodeId("")))[1]
        change = _change(one, seen.get(one.address), holders, best, now)
        if change is not None:
            changes.append(change)
            load[change.node_id] += bool(change.node_id)
        elif one.node_id and not _is_over(seen[one.address], now):
            looks.append(seen[one.address].at + LEASE_S)
        elif not best and any(waits.values()):
            looks.append(now + min(filter(None, waits.values())))
    return Decision(tuple(changes), min(looks, default=None))


def _is_over(seen: Seen, now: float) -> bool:
    """Return whether the lease is over.  Only one comparison decides, so that no rounding is between it and a look."""
    return now >= seen.at + LEASE_S


def _change(
    one: FailoverAddress, seen: Seen | None, holders: DoorNodes, best: NodeId, now: float
) -> HolderChange | None:
    """Return the change of one address, or None."""
    if seen is None:
        if one.is_removed:
            return HolderChange(address=one.address, epoch=one.epoch)
        return HolderChange(address=one.address, epoch=one.epoch, node_id=best) if best else None
    if _is_over(seen, now):
        if not best and not one.is_removed:
            return None  # it renews once it can, and no other node could do more
        return HolderChange(
            address=one.address,
            epoch=one.epoch,
            renewals=seen.renewals,
            is_over=True,
            node_id=NodeId("") if one.is_removed else best,
            reason=SILENT,
        )
    if one.is_leaving or (holders.reaches(one.node_id, one) and not one.is_removed):
        return None
    return HolderChange(address=one.address, epoch=one.epoch, asks=True)


def _refused_s(one: FailoverAddress, node_id: NodeId, now_ns: int) -> float:
    """Return the seconds for which a node is not named for an address, because it has refused it."""
    refusal = one.refusals.get(node_id)
    if refusal is None:
        return 0.0
    lasts_s = AWAY_S if refusal.reason in (SILENT, STOPS) else REFUSED_S
    return max(0.0, lasts_s - abs(now_ns - refusal.at_ns) / SECOND_NS)


def why_unheld(one: FailoverAddress, holders: DoorNodes, names: Mapping[NodeId, str]) -> str:
    """Return why no node holds an address, with the next step."""
    if one.is_removed:
        return "it is being removed"
    if not holders.subnets:
        return "no active node runs the front door: run skep door up"
    if holders.paused == holders.subnets.keys():
        return "all nodes with the front door are paused: activate one"
    if not any(holders.reaches(id, one) for id in holders.subnets):
        return (
            f"no node with the front door has a subnet with {one.address}: name an interface with --interface"
        )
    refusals = [f"{names.get(id, id)}: {one.refusals[id].reason}" for id in sorted(one.refusals)]
    return "; ".join(refusals[:3]) or "a node is named soon"
