"""Whether a network has addresses for all replicas of its services: checked when a service is created or changed.

Replicas of specs are counted, not tasks, so that the warning comes before the first task waits.
"""

from collections.abc import Iterable

from skep.manager.allocator.addresses import NEARLY_FULL, usage_of
from skep.manager.allocator.subnets import has_addresses
from skep.model.network import Network
from skep.model.node import Node
from skep.model.planes import is_overlay
from skep.model.service import Service
from skep.store.interface import View

_SERVICES_MAX = 2_000
"""With more services nothing is counted, because a create must not block the event loop."""


def room_warnings(view: View, service: Service) -> list[str]:
    """A sentence for each network of ``service`` that it makes nearly full, or more than full."""
    services = view.find(Service)
    attached = [view.lookup(Network, target) for target in _targets(service)]
    if not attached or len(services) > _SERVICES_MAX:
        return []
    nodes = len(view.find(Node))
    warnings = []
    for network in attached:
        if network is None or not is_overlay(network) or not has_addresses(network):
            continue
        users = (one for one in services if one.removed_at is None and network.id in _targets(one))
        wanted = sum(_addresses(one, nodes) for one in users)
        size = usage_of(network, 0).size
        if wanted >= NEARLY_FULL * size:
            warnings.append(
                f"network {network.spec.name} has {size} addresses, and its services need {wanted}: "
                f"skep network update --subnet-add SUBNET {network.spec.name} gives it more"
            )
    return warnings


def _targets(service: Service) -> list[str]:
    wanted: Iterable[str] = (
        one.target for one in service.spec.task_template.networks or service.spec.networks
    )
    return list(wanted)


def _addresses(service: Service, nodes: int) -> int:
    """One per task, and a virtual one unless its name gives the tasks' own."""
    mode, endpoint = service.spec.mode, service.spec.endpoint_spec
    virtual = 0 if endpoint is not None and endpoint.mode == "dnsrr" else 1
    if mode.global_ is not None or mode.global_job is not None:
        return nodes + virtual
    if mode.replicated_job is not None:
        return (mode.replicated_job.max_concurrent or 1) + virtual
    return service.spec.replicas + virtual
