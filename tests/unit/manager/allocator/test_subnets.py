"""Which VXLAN ids, subnets and gateways networks get."""

from ipaddress import IPv4Network, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.allocator.subnets import (
    AddressSpans,
    NetworkAllocations,
    NotAllocated,
    allocated,
    free_subnet,
    is_allocated,
)
from skep.model.network import IPAMConfig, IPAMOptions, Network, NetworkSpec, network_of
from skep.model.networks.addresses import parsed
from skep.model.networks.data_planes import DOCKER, PLANE_OPTION, SKEP
from skep.model.networks.overlays import VXLAN_OPTION
from skep.model.values.ids import NetworkId
from skep.model.values.meta import Driver
from tests.support.builders import an_overlay
from tests.support.managers.counted_calls import calls_in

POOLS = ("10.0.0.0/8",)


def entered(allocations: NetworkAllocations, network: Network) -> Network:
    given_network = allocated(network, allocations, POOLS, 24)
    allocations.enter(given_network)
    return given_network


def config_of(network: Network) -> IPAMConfig:
    assert network.ipam_options is not None
    (config,) = network.ipam_options.configs
    return config


def test_networks_get_subnets_and_vxlan_ids_one_after_another_as_docker_gives_them() -> None:
    allocations = NetworkAllocations()
    ingress = entered(allocations, an_overlay("ingress", subnet="", ingress=True))
    first = entered(allocations, an_overlay("net1", subnet=""))
    second = entered(allocations, an_overlay("net2", subnet=""))
    assert [config_of(one).subnet for one in (ingress, first, second)] == [
        "10.0.0.0/24",
        "10.0.1.0/24",
        "10.0.2.0/24",
    ]
    assert config_of(first).gateway == "10.0.1.1"
    ids = [one.driver_state.options[VXLAN_OPTION] for one in (ingress, first, second)]
    assert ids == ["4096", "4097", "4098"]
    assert first.driver_state.name == "overlay"
    assert first.ipam_options is not None
    assert first.ipam_options.driver.name == "default"


def test_what_a_removed_network_held_is_given_again() -> None:
    allocations = NetworkAllocations()
    first = entered(allocations, an_overlay("net1", subnet=""))
    entered(allocations, an_overlay("net2", subnet=""))
    allocations.leave(first.id)
    assert config_of(entered(allocations, an_overlay("net3", subnet=""))) == config_of(first)


def test_a_subnet_that_the_user_names_is_kept_unless_it_overlaps() -> None:
    allocations = NetworkAllocations()
    named = IPAMOptions(driver=Driver(name="default"), configs=(IPAMConfig(subnet="10.0.0.0/20"),))
    first = entered(allocations, an_overlay("net1", subnet="", ipam_options=named))
    assert config_of(first) == IPAMConfig(subnet="10.0.0.0/20", gateway="10.0.0.1")
    with pytest.raises(NotAllocated, match="Pool overlaps with other one on this address space"):
        allocated(an_overlay("net2", subnet="", ipam_options=named), allocations, POOLS, 24)
    assert config_of(entered(allocations, an_overlay("net3", subnet=""))).subnet == "10.0.16.0/24"


def test_a_network_of_the_node_only_learns_its_driver() -> None:
    host = Network(id=NetworkId("h"), spec=NetworkSpec(name="host", driver_configuration=Driver(name="host")))
    assert not is_allocated(host)
    given_network = allocated(host, NetworkAllocations(), POOLS, 24)
    assert is_allocated(given_network)
    assert given_network == replace(host, driver_state=Driver(name="host"))


def test_the_drivers_own_options_stay() -> None:
    options = {"encrypted": "", "com.docker.network.driver.mtu": "1400"}
    spec = NetworkSpec(name="n", driver_configuration=Driver(name="overlay", options=options))
    state = allocated(Network(id=NetworkId("n"), spec=spec), NetworkAllocations(), POOLS, 24).driver_state
    assert state.options == {**options, VXLAN_OPTION: "4097"}


def test_when_the_pools_are_empty_it_says_so() -> None:
    with pytest.raises(NotAllocated, match=r"could not find an available, non-overlapping IPv4 address pool"):
        free_subnet(
            ("10.0.0.0/23",), 24, [AddressSpans([IPv4Network("10.0.0.0/24"), IPv4Network("10.0.1.0/28")])]
        )


@given(st.sets(st.integers(0, 63), max_size=40), st.integers(25, 29))
def test_a_free_subnet_overlaps_with_nothing_and_is_the_lowest(taken: set[int], length: int) -> None:
    held = [IPv4Network((0x0A000000 + number * 16, 28)) for number in taken]
    pool = IPv4Network("10.0.0.0/22")
    free = [one for one in pool.subnets(new_prefix=length) if not any(one.overlaps(other) for other in held)]
    if free:
        assert free_subnet((str(pool),), length, [AddressSpans(held)]) == free[0]
    else:
        with pytest.raises(NotAllocated):
            free_subnet((str(pool),), length, [AddressSpans(held)])


def test_the_routes_of_machines_are_avoided() -> None:
    routes = [IPv4Network("10.0.0.0/24"), IPv4Network("10.0.2.0/23"), IPv4Network("192.168.0.0/16")]
    allocations = NetworkAllocations()
    names = ("net1", "net2", "net3")
    subnets = []
    for name in names:
        network = allocated(an_overlay(name, subnet=""), allocations, POOLS, 24, routes=routes)
        allocations.enter(network)
        subnets.append(config_of(network).subnet)
    assert subnets == ["10.0.1.0/24", "10.0.4.0/24", "10.0.5.0/24"]


def test_another_pool_is_taken_before_one_that_a_route_contains() -> None:
    routes = [IPv4Network("10.0.0.0/8"), IPv4Network("10.0.0.0/24")]
    assert free_subnet(("10.0.0.0/8", "172.30.0.0/16"), 24, [], routes) == IPv4Network("172.30.0.0/24")
    assert free_subnet(("10.0.0.0/8",), 24, [], routes) == IPv4Network("10.0.1.0/24")


def test_a_network_with_ipv6_has_a_subnet_of_each_version_and_belongs_to_skep_nodes() -> None:
    allocations = NetworkAllocations()
    first = allocated(an_overlay("net1", subnet="", ipv6_enabled=True), allocations, POOLS, 24, cluster="c1")
    allocations.enter(first)
    second = allocated(an_overlay("net2", subnet="", ipv6_enabled=True), allocations, POOLS, 24, cluster="c1")
    other = allocated(
        an_overlay("net1", subnet="", ipv6_enabled=True), NetworkAllocations(), POOLS, 24, cluster="c2"
    )
    v4, v6 = first.ipam_options.configs if first.ipam_options else ()
    assert (v4.subnet, IPv6Network(v6.subnet).prefixlen) == ("10.0.0.0/24", 64)
    assert IPv6Network(v6.subnet).subnet_of(IPv6Network("fd00::/8"))
    assert v6.gateway == str(IPv6Network(v6.subnet)[1])
    assert first.driver_state.options == {VXLAN_OPTION: "4097", PLANE_OPTION: SKEP}
    assert second.ipam_options is not None
    assert second.ipam_options.configs[1].subnet != v6.subnet
    assert other.ipam_options is not None
    assert other.ipam_options.configs[1].subnet != v6.subnet
    assert is_allocated(first)


def test_named_subnets_of_both_versions_are_kept_ipv4_first() -> None:
    configs = (IPAMConfig(subnet="2001:db8::/64"), IPAMConfig(subnet="10.9.0.0/24"))
    named = IPAMOptions(driver=Driver(name="default"), configs=configs)
    network = allocated(
        an_overlay("n", subnet="", ipv6_enabled=True, ipam_options=named), NetworkAllocations(), POOLS, 24
    )
    assert network.ipam_options is not None
    assert [(one.subnet, one.gateway) for one in network.ipam_options.configs] == [
        ("10.9.0.0/24", "10.9.0.1"),
        ("2001:db8::/64", "2001:db8::1"),
    ]


def test_an_ingress_network_with_ipv6_is_of_both_data_planes() -> None:
    ingress = an_overlay("ingress", subnet="", ingress=True, ipv6_enabled=True)
    given_network = allocated(ingress, NetworkAllocations(), POOLS, 24, cluster="c1")
    assert PLANE_OPTION not in given_network.driver_state.options
    assert given_network.ipam_options is not None
    first, second = given_network.ipam_options.configs
    assert (first.subnet, second.subnet[:2]) == ("10.0.0.0/24", "fd")


def test_engines_give_ipv6_addresses_for_themselves() -> None:
    requested = an_overlay("n", subnet="", ipv6_enabled=True, labels={PLANE_OPTION: DOCKER})
    assert config_of(allocated(requested, NetworkAllocations(), POOLS, 24)).subnet == "10.0.0.0/24"


def test_the_gateway_is_no_auxiliary_address() -> None:
    config = IPAMConfig(subnet="10.9.0.0/24", auxiliary_addresses={"a": "10.9.0.1", "b": "10.9.0.2"})
    named = IPAMOptions(driver=Driver(name="default"), configs=(config,))
    network = allocated(an_overlay("n", subnet="", ipam_options=named), NetworkAllocations(), POOLS, 24)
    assert config_of(network).gateway == "10.9.0.3"


@given(
    st.sets(st.integers(0, 63), max_size=30),
    st.lists(st.tuples(st.integers(0, 2**10 - 1), st.integers(22, 32)), max_size=8),
)
def test_a_free_subnet_avoids_routes_that_lie_across_each_other(
    taken: set[int], routes: list[tuple[int, int]]
) -> None:
    held = [IPv4Network((0x0A000000 + number * 16, 28)) for number in taken]
    reached = [IPv4Network((0x0A000000 + offset, length), strict=False) for offset, length in routes]
    pool = IPv4Network("10.0.0.0/22")
    narrow = [one for one in reached if not pool.subnet_of(one)]
    for avoided in (held + reached, held + narrow):
        free = [
            one for one in pool.subnets(new_prefix=27) if not any(one.overlaps(other) for other in avoided)
        ]
        if free:
            assert free_subnet((str(pool),), 27, [AddressSpans(held)], reached) == free[0]
            return
    with pytest.raises(NotAllocated):
        free_subnet((str(pool),), 27, [AddressSpans(held)], reached)


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["", "/26", "/24", "/23"]), st.booleans()))
)
def test_after_any_changes_the_allocations_are_those_of_the_present_networks(
    steps: list[tuple[str, str, bool]],
) -> None:
    """With subnets within one another, as a restored store may have them."""
    known, networks = NetworkAllocations(), dict[str, Network]()
    for number, (name, length, is_gone) in enumerate(steps):
        if is_gone:
            networks.pop(name, None)
            known.leave(NetworkId(name))
        else:
            subnet = str(IPv4Network(f"10.0.{number % 4}.0{length}", strict=False)) if length else ""
            base = an_overlay(name, subnet=subnet)
            state = Driver(name="overlay", options={VXLAN_OPTION: str(4097 + number % 5)} if length else {})
            networks[name] = replace(base, driver_state=state)
            known.enter(networks[name])
        fresh = NetworkAllocations()
        for network in networks.values():
            fresh.enter(network)
        for wanted in (an_overlay("new", subnet=""), *networks.values()):
            wanted = replace(wanted, driver_state=Driver())
            assert allocated(wanted, known, POOLS, 24) == allocated(wanted, fresh, POOLS, 24)


def test_a_network_costs_the_same_however_many_there_are() -> None:
    """A search among all networks for each of 10,000 takes minutes."""
    network_of.cache_clear()  # the first networks would cost less if an earlier test had the same subnets
    parsed.cache_clear()
    allocations = NetworkAllocations()

    def allocate(first: int) -> None:
        for number in range(first, first + 200):
            entered(allocations, an_overlay(f"n{number}", subnet="", ipv6_enabled=number % 2 == 0))

    allocate(0)
    few = calls_in(lambda: allocate(1_000))
    for first in range(2_000, 4_000, 200):
        allocate(first)
    assert calls_in(lambda: allocate(5_000)) < 1.2 * few
