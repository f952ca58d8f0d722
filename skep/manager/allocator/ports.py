"""Allocates the numbers of published ports.

Ingress ports are unique in the cluster, per protocol.  A port without a number gets the lowest free number of the
dynamic range and keeps it as long as the service has the same target port.  Host ports are checked on the node and only
copied here.

Source: swarmkit, manager/allocator/portallocator.go.
"""

from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence

from msgspec.structs import replace

from skep.errors import SkepError
from skep.model.service import (
    Endpoint,
    EndpointSpec,
    EndpointVirtualIP,
    PortConfig,
    PublishMode,
    Service,
)
from skep.model.values.ids import ServiceId

FIRST_DYNAMIC = 30000
"""SwarmKit's range of ports that it chooses is 30000 to 32767."""
LAST_DYNAMIC = 32767
"""Range of automatically allocated ports, as in swarmkit (dynamicPortStart, dynamicPortEnd)."""


class PortAllocations:
    """Published ports and the services that have them, from specs and endpoints."""

    def __init__(self) -> None:
        self._holders: dict[tuple[str, int], set[ServiceId]] = {}
        self._ports_by_service: dict[ServiceId, frozenset[tuple[str, int]]] = {}

    def enter(self, service: Service) -> None:
        """Update a service.  A removed service has no ports."""
        self.leave(service.id)
        if service.removed_at is not None:
            return
        wanted = service.spec.endpoint_spec.ports if service.spec.endpoint_spec else ()
        ports = frozenset(_key(port) for port in (*wanted, *service.endpoint.ports) if port.published_port)
        if ports:
            self._ports_by_service[service.id] = ports
        for port in ports:
            self._holders.setdefault(port, set()).add(service.id)

    def leave(self, service_id: ServiceId) -> None:
        """Release all ports of the service."""
        for port in self._ports_by_service.pop(service_id, ()):
            self._holders[port].discard(service_id)
            if not self._holders[port]:
                del self._holders[port]

    def is_free_for(
        self, service_id: ServiceId, reserved: Callable[[], Container[tuple[str, int]]] = tuple
    ) -> Callable[[str, int], bool]:
        """Return a function that returns whether (protocol, port) is not ``reserved`` and no other service has it.

        ``reserved`` is called at most once.
        """
        known: Container[tuple[str, int]] | None = None

        def is_free(protocol: str, port: int) -> bool:
            nonlocal known
            key = protocol, port
            if not self._holders.get(key, set()) <= {service_id}:
                return False
            if known is None:
                known = reserved()
            return key not in known

        return is_free


class PortsExhausted(SkepError):
    """The dynamic range has no free port for this protocol."""

    def __init__(self, protocol: str) -> None:
        super().__init__(f"no free {protocol} port between {FIRST_DYNAMIC} and {LAST_DYNAMIC}")


def endpoint_for(
    service: Service,
    is_free: Callable[[str, int], bool],
    virtual_ips: tuple[EndpointVirtualIP, ...] = (),
) -> Endpoint:
    """Return the endpoint that ``service`` should have, equal to its current one if nothing has to change.

    A service without ports, networks and virtual addresses keeps its empty endpoint and is not written again.

    Args:
        is_free: Whether no other service has (protocol, port).

    Raises:
        PortsExhausted: The dynamic range is full.

    Source: swarmkit, manager/allocator/network.go (serviceAllocate), networkallocator (IsServiceAllocated).
    """
    spec = service.spec.endpoint_spec or EndpointSpec()
    networks = service.spec.task_template.networks or service.spec.networks
    given = service.endpoint
    # A service with nothing but routes has a virtual address on the front door's network.
    if not (spec.ports or networks or virtual_ips or given.ports or given.virtual_ips):
        return given
    ports = _ports(spec.ports, given.ports, is_free)
    return Endpoint(spec=spec, ports=ports, virtual_ips=virtual_ips)


def _ports(
    wanted: Sequence[PortConfig], given: Sequence[PortConfig], is_free: Callable[[str, int], bool]
) -> tuple[PortConfig, ...]:
    taken = {_key(port) for port in wanted if _is_ingress(port) and port.published_port}
    # numbers of ports that are equal except for the number, by the port without a number
    kept: dict[PortConfig, deque[int]] = {}
    for port in given:
        is_dynamic = FIRST_DYNAMIC <= port.published_port <= LAST_DYNAMIC
        if is_dynamic and _is_ingress(port) and _key(port) not in taken:
            kept.setdefault(replace(port, published_port=0), deque()).append(port.published_port)
    taken |= {(port.protocol, number) for port, numbers in kept.items() for number in numbers}
    free: dict[str, Iterator[int]] = {}
    ports = []
    for port in wanted:
        if _is_ingress(port) and not port.published_port:
            if before := kept.get(port):
                number = before.popleft()
            else:
                numbers = free.setdefault(port.protocol, _free_numbers(port.protocol, taken, is_free))
                number = next(numbers, 0)
                if not number:
                    raise PortsExhausted(port.protocol)
            port = replace(port, published_port=number)
        ports.append(port)
    return tuple(ports)


def _free_numbers(
    protocol: str, taken: Container[tuple[str, int]], is_free: Callable[[str, int], bool]
) -> Iterator[int]:
    """Yield free dynamic port numbers, the lowest first."""
    for number in range(FIRST_DYNAMIC, LAST_DYNAMIC + 1):
        if (protocol, number) not in taken and is_free(protocol, number):
            yield number


def _is_ingress(port: PortConfig) -> bool:
    return port.publish_mode is PublishMode.INGRESS


def _key(port: PortConfig) -> tuple[str, int]:
    return port.protocol, port.published_port
