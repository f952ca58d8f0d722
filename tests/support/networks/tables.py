"""Tables of networks for tests, with defaults for all fields that a test does not set."""

from collections.abc import Iterable, Sequence

from skep.agent.session.session_state import SessionState
from skep.aio.clock import SystemClock
from skep.model.networks.tables import NetworkHead, NetworkTable, Segment, TableEndpoint, TableService
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId

NODE = NodeId("n1")


def a_network(
    *services: tuple[TableService, Sequence[TableEndpoint]],
    name: str = "front",
    subnets: Sequence[str] = ("10.0.1.0/24",),
    is_ingress: bool = False,
    is_door: bool = False,
    containers: Iterable[TableEndpoint] = (),
) -> NetworkTable:
    """Return the table of network ``id-<name>``."""
    endpoints = [one for _, tasks in services for one in tasks] + list(containers)
    return NetworkTable(
        head=NetworkHead(
            id=NetworkId(f"id-{name}"),
            name=name,
            segments=tuple(
                Segment(subnet, subnet.replace("0/24", "1"), 4096 + number)
                for number, subnet in enumerate(subnets)
            ),
            is_ingress=is_ingress,
            is_door=is_door,
        ),
        revision=1,
        endpoints={one.task_id: one for one in endpoints},
        services={service.id: service for service, _ in services},
    )


def a_served(
    name: str,
    virtual_ip: str | Sequence[str] = (),
    tasks: Sequence[str | Sequence[str]] = (),
    *,
    aliases: Sequence[str] = (),
    starting: Sequence[str] = (),
    unhealthy: Sequence[str] = (),
) -> tuple[TableService, Sequence[TableEndpoint]]:
    """Return service ``id-<name>`` and its tasks, one per address: serving, then not yet running, then unhealthy."""
    virtual_ips = (virtual_ip,) if isinstance(virtual_ip, str) else tuple(virtual_ip)
    id = ServiceId(f"id-{name}")
    kinds = [*((one, True, True) for one in tasks), *((one, False, False) for one in starting)]
    kinds += [(one, True, False) for one in unhealthy]
    return TableService(id=id, name=name, aliases=tuple(aliases), virtual_ips=virtual_ips), [
        TableEndpoint(
            task_id=TaskId(f"{name}-{slot}"),
            node_id=NODE,
            service_id=id,
            slot=slot,
            name=f"{name}.{slot}.t{slot}",
            addresses=(addresses,) if isinstance(addresses, str) else tuple(addresses),
            is_running=running,
            is_serving=serving,
        )
        for slot, (addresses, running, serving) in enumerate(kinds, start=1)
    ]


def a_container(name: str, address: str, *, aliases: Sequence[str] = ()) -> TableEndpoint:
    """Return a container without a service."""
    return TableEndpoint(
        task_id=TaskId(name),
        node_id=NODE,
        name=name,
        aliases=tuple(aliases),
        addresses=(address,),
        is_running=True,
        is_serving=True,
    )


def a_member(id: str = "n1") -> SessionState:
    """Return the state of a node that is a member of a cluster as ``id``, without a session."""
    state = SessionState(SystemClock())
    state.join(NodeId(id))
    return state
