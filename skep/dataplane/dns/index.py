"""A network's table, indexed by name.

A table is large and changes often, but few of its names are queried.  So each version indexes only which services,
containers and tasks have a name.  The addresses of a name are computed at its first query.
"""

import socket
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network, ip_network

import msgspec

from skep.model.networks.dns_messages import key
from skep.model.networks.tables import NetworkTable, TableEndpoint
from skep.model.values.ids import ServiceId

_IPV4_BYTES = 4
"""Length in bytes of a packed IPv4 address."""
_TASKS, _ALL_TASKS = "tasks.", "all.tasks."


class NameRecord(msgspec.Struct, frozen=True):
    """The addresses of a name, packed.  ``services`` are the services whose virtual addresses are included."""

    ipv4: tuple[bytes, ...] = ()
    ipv6: tuple[bytes, ...] = ()
    services: frozenset[ServiceId] = frozenset()


class Index:
    """The names in one version of ``table``.  They are as in queries, without the network's own name as a suffix.

    The ingress network has no names, and neither has the front door's, where only the proxies open connections.
    Source: moby, libnetwork/network.go (addSvcRecords).
    """

    def __init__(self, table: NetworkTable) -> None:
        self.id = table.head.id
        self.name = key(table.head.name)
        has_names = not (table.head.is_ingress or table.head.is_door)
        self._table = table if has_names else NetworkTable(head=table.head)
        self._found: dict[str, NameRecord] = {}
        self._tasks: dict[ServiceId, list[TableEndpoint]] = defaultdict(list)
        self._containers: dict[str, list[TableEndpoint]] = defaultdict(list)
        self._services: dict[str, list[ServiceId]] = defaultdict(list)
        for endpoint in self._table.endpoints.values():
            self._tasks[endpoint.service_id].append(endpoint)
            for name in (endpoint.name, *endpoint.aliases):
                self._containers[key(name)].append(endpoint)
        self._containers.pop("", None)
        for id, service in self._table.services.items():
            for name in dict.fromkeys(map(key, (service.name, *service.aliases))):
                self._services[name].append(id)

    def find(self, name: str) -> NameRecord | None:
        """Return the addresses of ``name``, or None if the network does not have it.

        If several services, or several containers, have the name, their addresses are combined, as in Docker.  A
        service or task with the name hides other containers with that name or alias.  Otherwise any node that attaches
        a container could take over part of a service's connections by such a name, as it can in Docker.  A service
        without serving tasks has its name, but no address.

        Source: moby, libnetwork/service_common.go (addEndpointNameResolution).
        """
        known = self._found.get(name)
        if known is None:
            addresses = [*self._of_services(name), *self._of_tasks(name)] or [*self._of_containers(name)]
            if not addresses:
                return None
            virtual = [id for id in self._services.get(name, ()) if self._table.services[id].virtual_ips]
            known = self._found[name] = _known([one for some in addresses for one in some], virtual)
        return known

    def is_service(self, name: str) -> bool:
        """Return whether ``name`` is the name or an alias of a service."""
        return name in self._services

    def serving(self, name: str) -> Sequence[TableEndpoint]:
        """Return the serving tasks of the services called ``name``, in the order of their ids."""
        return [
            task for id in self._services.get(name, ()) for task in self._ordered(id) if task.gets_connections
        ]

    @cached_property
    def reverse(self) -> dict[str, tuple[str, ServiceId]]:
        """Name by address, with the service if the address is virtual."""
        found: dict[str, tuple[str, ServiceId]] = {}
        for _, endpoint in sorted(self._table.endpoints.items()):
            for address in endpoint.addresses:
                if endpoint.name:
                    found.setdefault(address, (endpoint.name, ServiceId("")))
        for id, service in sorted(self._table.services.items()):
            for address in service.virtual_ips:
                found[address] = (service.name, id)
        return found

    @cached_property
    def subnets(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """Subnets of the network, without malformed ones."""
        found = []
        for segment in self._table.head.segments:
            with suppress(ValueError):  # a malformed subnet is left out
                found.append(ip_network(segment.subnet, strict=False))
        return tuple(found)

    def _of_containers(self, name: str) -> Iterator[Sequence[str]]:
        found = self._containers.get(name, ())
        of_services = [endpoint for endpoint in found if endpoint.service_id]
        for endpoint in of_services or found:
            yield endpoint.addresses if _has_names(endpoint) else ()

    def _of_services(self, name: str) -> Iterator[Sequence[str]]:
        """Yield the virtual addresses of each service, or its tasks' addresses if it has none."""
        for id in self._services.get(name, ()):
            service = self._table.services[id]
            yield service.virtual_ips
            if not service.virtual_ips:
                yield from (task.addresses for task in self._ordered(id) if _is_listed(task))

    def _of_tasks(self, name: str) -> Iterator[Sequence[str]]:
        """Yield the addresses of ``tasks.<service>``, ``all.tasks.<service>`` or ``<slot>.<service>``."""
        slot, _, rest = name.partition(".")
        if name.startswith(_TASKS):
            ids, wanted = self._services.get(name.removeprefix(_TASKS), ()), _is_listed
        elif name.startswith(_ALL_TASKS):
            ids, wanted = self._services.get(name.removeprefix(_ALL_TASKS), ()), _runs
        else:
            tasks = [task for id in self._services.get(rest, ()) for task in self._ordered(id)]
            yield from (
                task.addresses if _has_names(task) else ()
                for task in tasks
                if task.slot and str(task.slot) == slot
            )
            return
        for id in ids:
            yield ()
            yield from (task.addresses for task in self._ordered(id) if wanted(task))

    def _ordered(self, id: ServiceId) -> Sequence[TableEndpoint]:
        return sorted(self._tasks.get(id, ()), key=lambda task: task.task_id)


def _has_names(task: TableEndpoint) -> bool:
    return task.is_serving or task.is_named_early


def _is_listed(task: TableEndpoint) -> bool:
    """Return whether the name of its service leads to the task."""
    return _has_names(task) and not task.is_far


def _runs(task: TableEndpoint) -> bool:
    return task.is_running


def _known(addresses: Iterable[str], services: Iterable[ServiceId]) -> NameRecord:
    packed: list[bytes] = []
    for one in dict.fromkeys(addresses):
        with suppress(OSError):  # not an address
            packed.append(socket.inet_pton(socket.AF_INET6 if ":" in one else socket.AF_INET, one))
    return NameRecord(
        tuple(one for one in packed if len(one) == _IPV4_BYTES),
        tuple(one for one in packed if len(one) != _IPV4_BYTES),
        frozenset(services),
    )
