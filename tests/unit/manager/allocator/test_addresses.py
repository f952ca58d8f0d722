"""Addresses of networks: each has one holder."""

from ipaddress import IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.allocator.addresses import AddressAllocations, NoAddress
from skep.model.network import IPAMConfig, IPAMOptions, Network
from skep.model.values.meta import Driver
from tests.support.builders import an_overlay

NET = an_overlay("net1", subnet="10.0.1.0/29")


def test_network_broadcast_and_gateway_are_never_given() -> None:
    allocations = AddressAllocations()
    given_ones = [allocations.allocate(f"t{number}", NET) for number in range(5)]
    assert given_ones == [f"10.0.1.{host}/29" for host in (2, 3, 4, 5, 6)]
    with pytest.raises(NoAddress):
        allocations.allocate("t5", NET)


def test_an_address_that_was_given_back_waits_its_turn() -> None:
    allocations = AddressAllocations()
    assert allocations.allocate("a", NET) == "10.0.1.2/29"
    allocations.release("a")
    assert [allocations.allocate(owner, NET) for owner in "bcde"] == [
        f"10.0.1.{host}/29" for host in (3, 4, 5, 6)
    ]
    assert allocations.allocate("f", NET) == "10.0.1.2/29"


def test_a_request_for_an_address_in_use_is_refused() -> None:
    allocations = AddressAllocations()
    assert allocations.allocate("a", NET, "10.0.1.4") == "10.0.1.4/29"
    with pytest.raises(NoAddress, match=r"address 10\.0\.1\.4 of network net1 is already in use"):
        allocations.allocate("b", NET, "10.0.1.4")
    with pytest.raises(NoAddress, match="is not an IP address"):
        allocations.allocate("b", NET, "nonsense")


def test_a_full_network_is_known_as_such_until_it_has_an_address_again() -> None:
    allocations = AddressAllocations()
    for owner in "abcde":
        allocations.allocate(owner, NET)
    assert not allocations.is_full(NET), "nobody has looked"
    with pytest.raises(NoAddress):
        allocations.allocate("f", NET)
    assert allocations.is_full(NET)
    configs = (IPAMConfig(subnet="10.0.1.0/29"), IPAMConfig(subnet="10.9.0.0/24"))
    larger = replace(NET, ipam_options=IPAMOptions(driver=Driver(name="default"), configs=configs))
    assert not allocations.is_full(larger)
    assert allocations.hold("a", []) == {NET.id}
    assert not allocations.is_full(NET)
    assert allocations.hold("f", [(NET.id, "10.0.1.2/29")]) == frozenset()


def test_a_range_bounds_what_is_given_not_the_length_of_the_prefix() -> None:
    config = IPAMConfig(subnet="10.0.1.0/24", range="10.0.1.128/30", gateway="10.0.1.1")
    net = replace(NET, ipam_options=IPAMOptions(driver=Driver(name="default"), configs=(config,)))
    assert AddressAllocations().allocate("a", net) == "10.0.1.128/24"


def test_a_second_subnet_is_used_when_the_first_is_full() -> None:
    configs = (IPAMConfig(subnet="10.0.1.0/30", gateway="10.0.1.1"), IPAMConfig(subnet="10.9.0.0/24"))
    net = replace(NET, ipam_options=IPAMOptions(driver=Driver(name="default"), configs=configs))
    allocations = AddressAllocations()
    assert [allocations.allocate(owner, net) for owner in "ab"] == ["10.0.1.2/30", "10.9.0.1/24"]


@given(st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=40))
def test_no_two_holders_share_an_address(steps: list[tuple[int, bool]]) -> None:
    allocations = AddressAllocations()
    held: dict[str, str] = {}
    for number, takes in steps:
        owner = f"t{number}"
        allocations.release(owner)
        held.pop(owner, None)
        if not takes:
            continue
        try:
            address = allocations.allocate(owner, NET)
        except NoAddress:
            assert len(held) == 5
            continue
        assert address not in held.values()
        held[owner] = address


def with_both(subnet_6: str = "fd00:1::/64", **fields: object) -> Network:
    configs = (
        IPAMConfig(subnet="10.0.1.0/29", gateway="10.0.1.1"),
        IPAMConfig(subnet=subnet_6, gateway=str(IPv6Network(subnet_6)[1])),
    )
    return replace(NET, ipam_options=IPAMOptions(driver=Driver(name="default"), configs=configs), **fields)


def test_a_network_of_both_versions_gives_an_address_of_each() -> None:
    allocations = AddressAllocations()
    net = with_both()
    assert allocations.allocate_all("a", net) == ("10.0.1.2/29", "fd00:1::2/64")
    assert allocations.allocate_all("b", net) == ("10.0.1.3/29", "fd00:1::3/64")
    allocations.release("a")
    assert allocations.allocate_all("c", net, ("10.0.1.2",)) == ("10.0.1.2/29", "fd00:1::4/64")
    assert allocations.allocate_all("d", net, ("fd00:1::77",)) == ("10.0.1.4/29", "fd00:1::77/64")
    assert allocations.allocate_all("e", net, ("fd00:1::78", "10.0.1.6")) == ("10.0.1.6/29", "fd00:1::78/64")


def test_a_network_that_lacks_addresses_of_one_version_gives_none_of_the_other() -> None:
    allocations = AddressAllocations()
    net = with_both("fd00:1::/126")
    assert [len(allocations.allocate_all(owner, net)) for owner in "ab"] == [2, 2]
    with pytest.raises(NoAddress, match="no available IPv6 addresses on this network's address pools: net1"):
        allocations.allocate_all("c", net)
    assert allocations.usage(net).used == 2
    assert allocations.allocate("c", net) == "10.0.1.5/29"  # what was tried comes again only in its turn


def test_auxiliary_addresses_are_never_given() -> None:
    config = IPAMConfig(subnet="10.0.1.0/29", gateway="10.0.1.1", auxiliary_addresses={"nas": "10.0.1.3"})
    net = replace(NET, ipam_options=IPAMOptions(driver=Driver(name="default"), configs=(config,)))
    allocations = AddressAllocations()
    assert [allocations.allocate(owner, net) for owner in "abcd"] == [
        f"10.0.1.{host}/29" for host in (2, 4, 5, 6)
    ]
    assert str(allocations.usage(net)) == "4 of 4 addresses are in use"
    with pytest.raises(NoAddress):
        allocations.allocate("e", net)


def test_a_network_is_nearly_full_from_four_fifths_on() -> None:
    allocations = AddressAllocations()
    given_ones = [allocations.allocate(owner, NET) for owner in "abc"]
    assert not allocations.usage(NET).is_nearly_full
    allocations.allocate("d", NET)
    assert allocations.usage(NET).is_nearly_full, given_ones


def test_a_new_leader_does_not_give_again_what_may_just_have_been_given_back() -> None:
    allocations = AddressAllocations()
    allocations.hold("a", [(NET.id, "10.0.1.4/29")])
    assert allocations.allocate("b", NET) == "10.0.1.5/29"


def test_a_thousand_tasks_come_and_go_in_a_small_network() -> None:
    net = an_overlay("tiny", subnet="10.0.1.0/28")
    allocations = AddressAllocations()
    before = ""
    for number in range(1000):
        address = allocations.allocate(f"t{number}", net)
        assert address != before
        before = address
        allocations.release(f"t{number}")
    assert not allocations.is_used(net.id)
