"""Rules on allocations: no two objects hold the same address, port or subnet, and unused ones are released."""

from collections import defaultdict
from collections.abc import Iterable

from sim.world.committed import Change
from skep.manager.verify.allocations import (
    Holding,
    holdings,
    mixed_networks,
    networks_in_use,
    owner_name,
    shared_holding,
    unreachable,
)
from skep.model.network import Network
from skep.model.node import Node
from skep.model.service import PublishMode, Service
from skep.model.task import Task
from skep.store.interface import Created, Deleted, Updated, View


class UniqueAllocations:
    """Addresses of networks and published ports have at most one holder."""

    def __init__(self) -> None:
        self._held: dict[str, frozenset[Holding]] = {}
        self._holders: dict[Holding, set[str]] = defaultdict(set)

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        taken: set[Holding] = set()
        for event in change.events:
            match event:
                case Created(Task() | Service() | Node() as object) | Updated(
                    _, Task() | Service() | Node() as object
                ):
                    taken |= self._hold(owner_name(object), holdings(object))
                case Deleted(Task() | Service() | Node() as object):
                    self._hold(owner_name(object), frozenset())
        for holding in sorted(taken, key=str):
            if len(holders := self._holders[holding]) > 1:
                yield shared_holding(holding, holders).text

    def _hold(self, owner: str, holdings: frozenset[Holding]) -> frozenset[Holding]:
        """Return the holdings that the object did not have before."""
        before = self._held.get(owner, frozenset())
        if holdings == before:
            return frozenset()
        for holding in before - holdings:
            self._holders[holding].discard(owner)
        for holding in holdings - before:
            self._holders[holding].add(owner)
        self._held[owner] = holdings
        return holdings - before


def networks_are_apart(change: Change, view: View) -> Iterable[str]:
    """Check that no two networks share a VXLAN id or overlap.  Removed networks count while tasks are attached to
    them.
    """
    if any(isinstance(_present(event), Network) for event in change.events):
        yield from (one.text for one in mixed_networks(networks_in_use(view)))


def allocation_violations(view: View) -> Iterable[str]:
    """Yield the missing allocations in a cluster at rest."""
    for network in view.find(Network):
        if not network.driver_state.name:
            yield f"network {network.id} has not been allocated"
    for service in view.find(Service):
        if service.removed_at is not None or service.spec.endpoint_spec is None:
            continue
        asked = [
            port for port in service.spec.endpoint_spec.ports if port.publish_mode is PublishMode.INGRESS
        ]
        given = {(port.protocol, port.target_port): port.published_port for port in service.endpoint.ports}
        for port in asked:
            number = given.get((port.protocol, port.target_port), 0)
            if not number or port.published_port not in (0, number):
                yield f"{service.id} asked for port {port.published_port} and has {number}"
    for task in view.find(Task):
        yield from (one.text for one in unreachable(task, view))


def _present(event: object) -> object:
    match event:
        case Created(object) | Updated(_, object) | Deleted(object):
            return object
    return None
