"""Where virtual addresses lead: derived from a network's table, nothing kept."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from skep.model.ids import ServiceId
from skep.model.tables import Table

Backends: TypeAlias = tuple[str, ...]
Leads: TypeAlias = Mapping[str, Backends]
"""From a virtual address to the addresses that serve, of the same family; none: there is nobody to connect to."""


def leads_of(table: Table) -> Mapping[ServiceId, Leads]:
    """Where the virtual addresses of each service lead; backends are in the order of their tasks' ids.

    The ingress network's are nobody's destination: its ports are led by the nodes.
    """
    if table.head.is_ingress:
        return {}
    serving: dict[ServiceId, list[tuple[str, ...]]] = defaultdict(list)
    for _, endpoint in sorted(table.endpoints.items()):
        if endpoint.is_serving:
            serving[endpoint.service_id].append(endpoint.addresses)
    return {
        id: {
            address: tuple(filter(None, (first_of_family(one, is_ipv6(address)) for one in serving[id])))
            for address in service.virtual_ips
        }
        for id, service in table.services.items()
        if service.virtual_ips
    }


def placed(before: Backends, backends: Backends) -> Backends:
    """``backends`` in an order that leaves as many as possible where they were ``before``.

    Who goes leaves a hole, which who comes fills, and else the last; so a change costs as many elements as it
    has backends, wherever in the order it happens.
    """
    stays, coming = set(backends), [one for one in backends if one not in before]
    places: list[str | None] = [one if one in stays else None for one in before]
    places += [None] * (len(backends) - len(places))
    while len(places) > len(backends):
        last = places.pop()
        if last is not None:
            coming.append(last)
    waiting = iter(coming)
    return tuple(one if one is not None else next(waiting) for one in places)


def is_ipv6(address: str) -> bool:
    return ":" in address


def first_of_family(addresses: Iterable[str], ipv6: bool) -> str:
    """The first of ``addresses`` that is IPv6, or IPv4; empty: none is."""
    return next((one for one in addresses if is_ipv6(one) is ipv6), "")
