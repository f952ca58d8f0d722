"""Whatever is created, grown and removed in whatever order: no two networks share a subnet or a VXLAN id."""

from ipaddress import ip_network
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.allocator.subnets import NetworkAllocations, NotAllocated, allocated, is_allocated
from skep.model.network import IPAMConfig, IPAMOptions, Network
from skep.model.networks.overlays import vxlan_ids
from skep.model.networks.routes import overlap
from skep.model.values.meta import Driver
from tests.support.builders import an_overlay

POOLS = ("10.0.0.0/24", "10.0.4.0/25")
ROUTES = [ip_network("10.0.0.32/28"), ip_network("10.0.4.0/24")]

names = st.sampled_from(["net1", "net2", "net3", "net4"])
configs = st.just(IPAMConfig()) | st.builds(
    lambda number, length: IPAMConfig(
        subnet=str(ip_network((0x0A000000 + 16 * number, length), strict=False))
    ),
    st.integers(0, 20),
    st.integers(24, 29),
)
steps = st.lists(
    st.tuples(st.sampled_from(["create", "grow", "remove"]), names, configs, st.booleans()), max_size=25
)


def requesting(network: Network, *ipam_configs: IPAMConfig) -> Network:
    options = IPAMOptions(driver=Driver(name="default"), configs=ipam_configs)
    return replace(network, spec=replace(network.spec, ipam_options=options))


def requested_by(network: Network) -> tuple[IPAMConfig, ...]:
    options = network.spec.ipam_options
    return (options.configs if options is not None else ()) or (IPAMConfig(),)


@given(steps)
def test_networks_never_share_what_they_have(steps: list[tuple[str, str, IPAMConfig, bool]]) -> None:
    allocations = NetworkAllocations()
    networks: dict[str, Network] = {}
    for verb, name, config, has_ipv6 in steps:
        present = networks.get(name)
        if verb == "remove":
            networks.pop(name, None)
            allocations.leave(an_overlay(name).id)
            continue
        if verb == "create" and present is None:
            wanted = requesting(an_overlay(name, subnet="", ipv6_enabled=has_ipv6), config)
        elif verb == "grow" and present is not None:
            wanted = requesting(present, *requested_by(present), config)
        else:
            continue
        try:
            given_network = allocated(wanted, allocations, POOLS, 27, routes=ROUTES, cluster="c1")
        except NotAllocated:
            continue  # and nothing has changed
        kept = (
            present.ipam_options.configs if present is not None and present.ipam_options is not None else ()
        )
        assert given_network.ipam_options is not None
        assert set(map(str, kept)) <= set(map(str, given_network.ipam_options.configs))
        assert is_allocated(given_network)
        assert allocated(given_network, allocations, POOLS, 27, routes=ROUTES, cluster="c1") == given_network
        if present is not None:
            assert vxlan_ids(given_network.driver_state.options)[
                : len(vxlan_ids(present.driver_state.options))
            ] == vxlan_ids(present.driver_state.options)
        networks[name] = given_network
        allocations.enter(given_network)
    subnets = [
        ip_network(config.subnet)
        for network in networks.values()
        for config in (network.ipam_options.configs if network.ipam_options is not None else ())
    ]
    assert not any(overlap(one, other) for one, other in combinations(subnets, 2))
    ids = [id for network in networks.values() for id in vxlan_ids(network.driver_state.options)]
    assert len(ids) == len(set(ids)) == sum(subnet.version == 4 for subnet in subnets)
