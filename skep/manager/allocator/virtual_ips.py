"""Virtual addresses of services.  A service keeps one per overlay network and IP version as long as it has the network.

Source: swarmkit, manager/allocator/cnmallocator/networkallocator.go (AllocateService).
"""

from collections.abc import Callable

from skep.manager.allocator.addresses import has_ipv6
from skep.manager.allocator.attachments import AttachableNetworks, wanted_networks
from skep.manager.allocator.subnets import has_addresses
from skep.model.network import Network
from skep.model.networks.data_planes import is_overlay
from skep.model.service import EndpointVirtualIP, Service
from skep.model.values.ids import NetworkId

DNS_ROUND_ROBIN = "dnsrr"


def virtual_ips_for(
    service: Service, networks: AttachableNetworks, allocate: Callable[[Network, int], str]
) -> tuple[EndpointVirtualIP, ...]:
    """Return the virtual addresses that ``service`` should have: its existing ones, and new ones where they are
    missing.

    A network without an allocation is skipped until it has one.  The IPv4 address of a network comes first, because
    engines read no other.

    Args:
        allocate: Allocates an address of a network and an IP version.  Raises NoAddress.
    """
    spec = service.spec.endpoint_spec
    if spec is not None and spec.mode == DNS_ROUND_ROBIN:
        return ()
    present = {(one.network_id, ":" in one.addr): one for one in service.endpoint.virtual_ips}
    virtual_ips = []
    for wanted in wanted_networks(service.spec, networks.ingress):
        network = networks.find(NetworkId(wanted.target))
        if network is None or not is_overlay(network) or not has_addresses(network):
            continue
        for version in (4, 6) if has_ipv6(network) else (4,):
            kept = present.get((network.id, version == 6))
            virtual_ips.append(
                kept or EndpointVirtualIP(network_id=network.id, addr=allocate(network, version))
            )
    return tuple(virtual_ips)
