"""Addresses of networks: each has one holder."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.allocator.addresses import AddressBook, NoAddress
from skep.model.meta import Driver
from skep.model.network import IPAMConfig, IPAMOptions
from tests.builders import an_overlay

NET = an_overlay("net1", subnet="10.0.1.0/29")


def test_network_broadcast_and_gateway_are_never_given() -> None:
    book = AddressBook()
    given_ones = [book.give(f"t{number}", NET) for number in range(5)]
    assert given_ones == [f"10.0.1.{host}/29" for host in (2, 3, 4, 5, 6)]
    with pytest.raises(NoAddress):
        book.give("t5", NET)


def test_an_address_that_was_given_back_waits_its_turn() -> None:
    book = AddressBook()
    assert book.give("a", NET) == "10.0.1.2/29"
    book.release("a")
    assert [book.give(owner, NET) for owner in "bcde"] == [f"10.0.1.{host}/29" for host in (3, 4, 5, 6)]
    assert book.give("f", NET) == "10.0.1.2/29"


def test_an_address_that_somebody_has_cannot_be_wished_for() -> None:
    book = AddressBook()
    assert book.give("a", NET, "10.0.1.4") == "10.0.1.4/29"
    with pytest.raises(NoAddress, match=r"address 10\.0\.1\.4 of network net1 is already in use"):
        book.give("b", NET, "10.0.1.4")
    with pytest.raises(NoAddress, match="is not an IPv4 address"):
        book.give("b", NET, "nonsense")


def test_a_range_bounds_what_is_given_not_the_length_of_the_prefix() -> None:
    config = IPAMConfig(subnet="10.0.1.0/24", range="10.0.1.128/30", gateway="10.0.1.1")
    net = replace(NET, ipam_options=IPAMOptions(driver=Driver(name="default"), configs=(config,)))
    assert AddressBook().give("a", net) == "10.0.1.128/24"


def test_a_second_subnet_is_used_when_the_first_is_full() -> None:
    configs = (IPAMConfig(subnet="10.0.1.0/30", gateway="10.0.1.1"), IPAMConfig(subnet="10.9.0.0/24"))
    net = replace(NET, ipam_options=IPAMOptions(driver=Driver(name="default"), configs=configs))
    book = AddressBook()
    assert [book.give(owner, net) for owner in "ab"] == ["10.0.1.2/30", "10.9.0.1/24"]


@given(st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=40))
def test_nobody_shares_an_address(steps: list[tuple[int, bool]]) -> None:
    book = AddressBook()
    held: dict[str, str] = {}
    for number, takes in steps:
        owner = f"t{number}"
        book.release(owner)
        held.pop(owner, None)
        if not takes:
            continue
        try:
            address = book.give(owner, NET)
        except NoAddress:
            assert len(held) == 5
            continue
        assert address not in held.values()
        held[owner] = address
