"""Virtual addresses of services: one per overlay network, for as long as the service wants them.

Source: swarmkit, manager/allocator/cnmallocator/networkallocator.go (AllocateService).
"""

from collections.abc import Callable

from skep.manager.allocator.attachments import Networks, wanted_networks
from skep.manager.allocator.subnets import is_allocated
from skep.model.ids import NetworkId
from skep.model.network import Network
from skep.model.planes import is_overlay
from skep.model.service import EndpointVirtualIP, Service

DNS_ROUND_ROBIN = "dnsrr"


def virtual_ips_for(
    service: Service, networks: Networks, give: Callable[[Network], str]
) -> tuple[EndpointVirtualIP, ...]:
    """The virtual addresses that ``service`` should have: those it has, and new ones where they are missing.

    A network without an allocation is passed over; ask again when it has one.  ``give`` may raise NoAddress.
    """
    spec = service.spec.endpoint_spec
    if spec is not None and spec.mode == DNS_ROUND_ROBIN:
        return ()
    present = {one.network_id: one for one in service.endpoint.virtual_ips}
    virtual_ips = []
    for wanted in wanted_networks(service.spec, networks.ingress):
        network = networks.find(NetworkId(wanted.target))
        if network is None or not is_overlay(network) or not is_allocated(network):
            continue
        kept = present.get(network.id)
        virtual_ips.append(kept or EndpointVirtualIP(network_id=network.id, addr=give(network)))
    return tuple(virtual_ips)
